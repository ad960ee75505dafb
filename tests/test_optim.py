"""Adam as the scripts use it. That a compiled update trains to eager's weights is in test_compile.py."""

import copy
from unittest import mock

import pytest
import torch

from common.optim import Adam


@pytest.mark.parametrize("in_a_graph", [False, True])
def test_it_is_torchs_adam(in_a_graph):
    """Weight decay, learning rates that change, and a parameter that has no gradient at some steps."""
    torch.manual_seed(0)
    ours = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 3), (5,))]
    theirs = [parameter.detach().clone().requires_grad_() for parameter in ours]
    groups = [
        [{"params": [first], "lr": 0.1, "weight_decay": 0.5}, {"params": [second]}] for first, second in (ours, theirs)
    ]
    optimizers = Adam(groups[0], lr=0.3), torch.optim.Adam(groups[1], lr=0.3)
    for step in range(20):
        optimizers[0].param_groups[0]["lr"].fill_(0.1 / (1 + step))
        optimizers[1].param_groups[0]["lr"] = 0.1 / (1 + step)
        target = torch.randn(5, dtype=torch.float64)
        for (first, second), optimizer in zip((ours, theirs), optimizers, strict=True):
            loss = ((first - 1) ** 2).sum()
            if step % 2:
                loss = loss + ((second - target) ** 2).sum()
            loss.backward()
            in_graph = in_a_graph and optimizer is optimizers[0]
            with mock.patch("torch.compiler.is_compiling", return_value=in_graph):
                optimizer.step()
            optimizer.zero_grad()
            assert first.grad is None and second.grad is None
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, atol=1e-6, rtol=1e-5)


def test_its_state_can_be_saved_and_loaded():
    torch.manual_seed(0)
    first, second = (torch.nn.Linear(3, 2) for _ in range(2))
    optimizers = Adam([{"params": first.parameters(), "lr": 0.1}]), Adam([{"params": second.parameters(), "lr": 0.2}])
    for step in range(4):
        if step == 2:
            second.load_state_dict(first.state_dict())
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
        for network, optimizer in zip((first, second), optimizers, strict=True):
            network(torch.ones(3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert optimizers[1].param_groups[0]["lr"] == torch.tensor(0.1)
