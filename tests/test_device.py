"""Every script on a device other than the CPU, on which a tensor of the wrong device is an error, as it is on a GPU."""

import contextlib
import importlib
import json
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ALGORITHMS, DISCRETE, SCRIPTS, SHORT, SHORTER, batch_of, checkpoint, run_script
from pretend_device import DEVICE, pretending, waits

from common.data import Batch
from common.optim import Adam

ONLINE = "iql", "td3_bc", "awac", "awr", "cql", "cal_ql", "naf", "pets"


# --- The device ---


@pytest.mark.parametrize(
    "mixed",
    [
        lambda x, y: x + y,
        lambda x, y: y + x,
        lambda x, y: y * x[0],
        lambda x, y: y.add_(x),
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.where(x > 0, x, y),
        lambda x, y: torch._foreach_lerp_([x], [y], 0.1),
        lambda x, y: x.index_select(0, torch.tensor([0])),
        lambda x, y: x.__setitem__(torch.tensor([0, 1]), y[:2]),
        lambda x, y: y[torch.tensor([0], device=DEVICE)],
        lambda x, y: torch.nn.functional.linear(x, y[None]),
        lambda x, y: torch.randperm(3, generator=torch.Generator(), device=DEVICE),
        lambda x, y: x.numpy(),
        lambda x, y: np.asarray(x),
    ],
)
def test_what_cuda_refuses(mixed):
    with pretending(), pytest.raises((RuntimeError, TypeError)):
        mixed(torch.ones(3, device=DEVICE), torch.ones(3))


def test_what_cuda_allows():
    with pretending():
        x, y = torch.ones(3, device=DEVICE), torch.tensor([1.0, 2.0, 3.0])
        assert (x * y[1]).cpu().tolist() == [2, 2, 2] and float(x.copy_(y)[2]) == 3 and y.copy_(2 * x)[1] == 4
        assert x[torch.tensor([2])].device == DEVICE and x[torch.tensor([2])].cpu() == 3
        x.requires_grad_().square().sum().backward()
        assert x.grad.device == DEVICE and x.grad.cpu().tolist() == [2, 4, 6]


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: x.cpu(),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.ones(3).copy_(x),
        lambda x: torch.tensor([1.0], device=DEVICE),
        lambda x: torch.ones(3).to(DEVICE),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
    ],
)
def test_what_waits(waiting):
    with pretending():
        x = torch.ones(3, device=DEVICE)
        waits.clear()
        _ = (x + 1).cumsum(0), x.to(torch.float64), torch.full((3,), 2.0, device=DEVICE), x.index_select(0, x.long())
        assert waits == []
        waiting(x)
        assert len(waits) == 1


# --- The scripts ---


def run_on(device, algorithm, *arguments):
    """A script's command line on that device."""
    module = importlib.import_module(algorithm)
    set_up = module.set_up
    with (
        mock.patch.object(module, "set_up", lambda args: (set_up(args), device)[1]),
        pretending() if device == DEVICE else contextlib.nullcontext(),
    ):
        outcome = run_script(algorithm, *arguments)
    assert outcome.returncode == 0, outcome.stderr


def assert_same(folder, device_folder, part):
    """A run on the CPU and one on the device have that part in common, but for rounding."""
    assert json.loads((device_folder / "result.json").read_text())["device"] == str(DEVICE)
    weights, others = (checkpoint(each)["learner"][part] for each in (folder, device_folder))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "sac", "mbpo"])
def test_an_update_never_waits_for_the_device(algorithm):
    module = importlib.import_module(algorithm)
    args = module.Args(hidden_dims=(8, 8), batch_size=64)
    with pretending():
        learner = module.build(3, 2 if algorithm in DISCRETE else 1, args, DEVICE, Adam)
        for step in (1, 2, 20):  # at 20 every network learns
            x = torch.randn(64, 9, device=DEVICE)
            actions = (x[:, 3] > 0).long() if algorithm in DISCRETE else x[:, 3:4].tanh()
            batch = batch_of(module, Batch(x[:, :3], actions, x[:, 4], x[:, 5:8], (x[:, 8] > 1).float()))
            waits.clear()
            metrics = module.update(learner, batch, step, args)
            assert waits == [] and {str(value.device) for value in metrics.values()} == {str(DEVICE)}


@pytest.mark.parametrize("algorithm", [name for name in SCRIPTS if name != "fqe"])
def test_a_run_on_another_device_comes_to_the_same(algorithm, tmp_path):
    """It is resumed, too, to act where it can."""
    longer = ["--num-updates", "4", "--online-steps", "6"] if algorithm in ONLINE else ["--num-updates", "8"]
    own = ["--returns-every", "2"] if algorithm == "awr" else []  # else nothing of what is played counts
    own += ["--no-cosine-decay"] if algorithm in ("discrete_iql", "idql", "sql", "xql") else []  # of all updates
    for name, device in (("cpu", torch.device("cpu")), ("device", DEVICE)):
        common = [*SHORT, *SHORTER.get(algorithm, ()), *own, "--run-dir", str(tmp_path / name)]
        run_on(device, algorithm, "--num-updates", "4", *common)
        run_on(device, algorithm, *longer, "--resume", *common)
    assert_same(tmp_path / "cpu", tmp_path / "device", "actor")


@pytest.mark.parametrize("algorithm", ["iql", "mopo", "decision_transformer"])
def test_a_run_waits_for_the_device_as_often_however_many_updates_there_are(algorithm, tmp_path):
    """Where it neither logs nor evaluates, batches, learning rates and the rest of the loop make it wait no more."""
    counts = []
    for updates in ("5", "15"):
        waits.clear()
        rare = ["--log-every", "1000", "--eval-every", "1000", "--num-updates", updates]
        run_on(DEVICE, algorithm, *SHORT, *SHORTER.get(algorithm, ()), *rare, "--run-dir", str(tmp_path / updates))
        counts.append(len(waits))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("algorithm", "arguments"),
    [
        ("cql", ["--variant", "rho", "--lagrange"]),
        ("cql", ["--max-backup", "--warm-start", "2", "--gap-softness", "2"]),
        ("combo", ["--regularizer", "logsumexp", "--termination", "learned"]),
        ("mopo", ["--penalty", "ensemble_std", "--cosine-decay"]),
        ("mve", ["--expansion", "steve"]),
        ("iql", ["--validation-fraction", "0.3", "--reward-scale", "return-range"]),
    ],
)
def test_other_ways_on_another_device(algorithm, arguments, tmp_path):
    for name, device in (("cpu", torch.device("cpu")), ("device", DEVICE)):
        common = [*SHORT, *SHORTER.get(algorithm, ()), "--run-dir", str(tmp_path / name)]
        run_on(device, algorithm, "--num-updates", "4", *arguments, *common)
    assert_same(tmp_path / "cpu", tmp_path / "device", "actor")


def test_models_and_policies_of_other_runs(tmp_path):
    for name, device in (("cpu", torch.device("cpu")), ("device", DEVICE)):
        common, model = ["--num-updates", "4", "--run-dir"], str(tmp_path / name / "model")
        run_on(device, "mopo", *SHORT, *SHORTER["mopo"], *common, model)
        run_on(device, "morel", *SHORT, *SHORTER["mopo"], "--dynamics", model, *common, str(tmp_path / name / "morel"))
        policy = ["--policy-run-dir", model, "--hidden-dims", "16", "16"]
        run_on(device, "fqe", *policy, *common, str(tmp_path / name / "fqe"))
    for run, part in (("morel", "actor"), ("fqe", "critic")):
        assert_same(tmp_path / "cpu" / run, tmp_path / "device" / run, part)
