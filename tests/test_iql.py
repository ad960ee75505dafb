"""IQL's losses against NumPy on small numbers, and what each of them may touch."""

import math

import awac
import awr
import iql
import numpy as np
import pytest
import torch
from conftest import (
    SHORT,
    SHORTER,
    assert_each_trains_its_own,
    checkpoint,
    lower,
    networks_of,
    numpy_mlp,
    numpy_twins,
    random_batch,
    run_script,
)

CPU = torch.device("cpu")


@pytest.fixture
def args():
    return iql.Args(hidden_dims=(5, 4), num_updates=100)


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    return iql.build(3, 2, args, CPU)


def numpy_advantage(learner, batch):
    q = lower(numpy_twins(learner.target_critic, batch.observations.numpy(), batch.actions.numpy()))
    return q - numpy_mlp(learner.value.net, batch.observations.numpy())[:, 0]


def perturb(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_value_loss_by_hand():
    loss, _ = iql.value_loss(torch.tensor([2.0, -1.0, 0.0]), expectile=0.7)
    assert loss.item() == pytest.approx((0.7 * 4 + 0.3 * 1 + 0) / 3)


def test_advantage_takes_the_twins_minimum_of_the_target_critic(learner):
    perturb(learner.target_critic)  # so that it differs from the critic
    batch = random_batch()
    u = iql.advantage(learner.value, learner.target_critic, batch)
    np.testing.assert_allclose(u.detach().numpy(), numpy_advantage(learner, batch), atol=1e-5)


def test_critic_loss(learner):
    batch = random_batch()
    loss, _ = iql.critic_loss(learner.critic, learner.value, batch, gamma=0.9)
    next_value = numpy_mlp(learner.value.net, batch.next_observations.numpy())[:, 0]
    target = batch.rewards.numpy() + 0.9 * np.where(batch.terminations.numpy() == 1, 0, next_value)
    q = numpy_twins(learner.critic, batch.observations.numpy(), batch.actions.numpy())
    expected = np.mean((q[0] - target) ** 2) + np.mean((q[1] - target) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_actor_loss(learner):
    batch, u = random_batch(), torch.tensor([-2.0, -1, -0.5, 0, 0.5, 1, 2, 9])
    with torch.no_grad():
        learner.actor.log_std.copy_(torch.tensor([-0.5, -7.0]))  # the second is below the clamp at -5
    loss, metrics = iql.actor_loss(learner.actor, u, batch, beta=3.0, weight_clip=100.0)
    mean = np.tanh(numpy_mlp(learner.actor.net, batch.observations.numpy()))
    std = np.exp([-0.5, -5.0])
    density = np.exp(-0.5 * ((batch.actions.numpy()[:, 0] - mean[:, 0]) / std[0]) ** 2) / (
        std[0] * math.sqrt(2 * math.pi)
    )
    z = (batch.actions.numpy()[:, 1] - mean[:, 1]) / std[1]
    log_prob = np.log(density) - 0.5 * z**2 - np.log(std[1]) - 0.5 * np.log(2 * np.pi)
    weight = np.minimum(np.exp(3.0 * u.numpy()), 100)
    assert loss.item() == pytest.approx(-np.mean(weight * log_prob), rel=1e-5)
    assert metrics["actor/weight_clipped"].item() == 2 / 8  # exp(6) and exp(27)
    expected = weight.sum() ** 2 / np.sum(weight**2)
    assert metrics["actor/effective_sample_size"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("module", [iql, awr, awac])
def test_effective_sample_size(module):
    """From 1, where one weight is all, to the number of equal weights; of weights of any size."""
    sizes = {1e-25: [1.0, 1, 1, 1], 1.0: [1.0, 0, 0, 0], 1e25: [3.0, 1, 1, 1]}
    for scale, expected in zip(sizes, (4, 1, 36 / 12), strict=True):
        weight = torch.tensor(sizes[scale]) * scale
        assert module.effective_sample_size(weight).item() == pytest.approx(expected, rel=1e-5)
    assert module.effective_sample_size(torch.zeros(4)).item() == 0  # where exp(beta A) is too small for float32


def test_termination_ends_the_target_and_truncation_does_not(learner):
    batch = random_batch()._replace(rewards=torch.zeros(8))
    with torch.no_grad():
        learner.value.net[-1].bias.fill_(1000.0)
    for terminated, expected in ((1.0, 0.0), (0.0, 990.0)):  # a truncated step is stored as not terminated
        _, metrics = iql.critic_loss(
            learner.critic, learner.value, batch._replace(terminations=torch.full((8,), terminated)), 0.99
        )
        assert metrics["critic/target"].item() == pytest.approx(expected, abs=5)


@pytest.mark.parametrize(("expectile", "expected"), [(0.5, 5.0), (0.9, 9.0)])
def test_value_rises_above_the_mean_with_the_expectile(expectile, expected):
    """For Q uniform on {0, 10} the expectile solves e (10 - v) = (1 - e) v, so v = 10 e."""
    q, v = torch.tensor([0.0, 10.0]), torch.zeros(1, requires_grad=True)
    for _ in range(500):
        loss, _ = iql.value_loss(q - v, expectile)
        (gradient,) = torch.autograd.grad(loss, v)
        v = (v - 0.5 * gradient).detach().requires_grad_()
    assert v.item() == pytest.approx(expected, abs=0.01)


def test_each_loss_trains_its_own_network_only(learner, args):
    perturb(learner.target_critic)
    batch = random_batch()
    u = iql.advantage(learner.value, learner.target_critic, batch)
    losses = {
        "value": iql.value_loss(u, args.expectile)[0],
        "critic": iql.critic_loss(learner.critic, learner.value, batch, args.gamma)[0],
        "actor": iql.actor_loss(learner.actor, u, batch, args.beta, args.weight_clip)[0],
    }
    assert_each_trains_its_own(losses, networks_of(learner, "actor", "critic", "value"))
    total, _ = iql.total_loss(learner, batch, args)
    assert total.item() == pytest.approx(sum(losses.values()).item(), rel=1e-5)


def test_update_moves_the_target_by_tau(learner, args):
    before = [parameter.clone() for parameter in learner.target_critic.parameters()]
    iql.update(learner, random_batch(), 51, args)
    after, online = learner.target_critic.parameters(), learner.critic.parameters()
    for old, new, target in zip(before, after, online, strict=True):
        torch.testing.assert_close(new, old + args.tau * (target - old))


def learning_rates(folder):
    numbers = [value for value in checkpoint(folder)["learner"]["optimizer"].values() if not value.dim()]
    return [float(rate) for rate in numbers[::2]]  # each group's, and then its steps


@pytest.mark.parametrize("script", ["iql", "sql", "xql", "idql"])
def test_the_actors_learning_rate_decays(script, tmp_path):
    """Half a cosine: the fourth of four updates has what is left after three quarters of the way."""
    arguments = "--num-updates", "4", *SHORT, *SHORTER.get(script, []), "--run-dir", str(tmp_path / "run")
    assert run_script(script, *arguments).returncode == 0
    expected = [3e-4 * 0.5 * (1 + np.cos(np.pi * 3 / 4)), 3e-4, 3e-4]
    assert learning_rates(tmp_path / "run") == pytest.approx(expected)


def test_the_actors_learning_rate_is_whole_again_while_it_acts(tmp_path):
    arguments = "--num-updates", "4", "--online-steps", "1", *SHORT, "--run-dir", str(tmp_path / "run")
    assert run_script("iql", *arguments).returncode == 0
    assert learning_rates(tmp_path / "run") == pytest.approx([3e-4, 3e-4, 3e-4])
