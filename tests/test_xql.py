"""XQL's losses against NumPy on small numbers, the value that Gumbel regression finds, and what each may touch."""

import inspect

import iql
import numpy as np
import pytest
import torch
import xql
from conftest import (
    SHORT,
    assert_each_trains_its_own,
    assert_one_line,
    networks_of,
    numpy_mlp,
    numpy_twins,
    random_batch,
    run_script,
)

CPU = torch.device("cpu")


@pytest.fixture
def args():
    own = {"temperature": 1.3, "z_clip": 0.2, "huber_delta": 0.5, "beta": 0.7, "weight_clip": 1.1}
    return xql.Args(hidden_dims=(5, 4), num_updates=100, gamma=0.9, **own)


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    learner = xql.build(3, 2, args, CPU)
    with torch.no_grad():  # so that the target differs from what it follows
        for parameter in learner.target_critic.parameters():
            parameter.add_(torch.randn_like(parameter))
    return learner


LIKE_IQL = ["Actor", "EnsembleLinear", "Critic", "advantage", "build", "update", "cosine_decay"]


@pytest.mark.parametrize("name", [*LIKE_IQL, "effective_sample_size"])
def test_what_is_iqls_is_iqls_to_the_letter(name):
    """So test_iql.py's calculations in NumPy hold here, too."""
    assert inspect.getsource(getattr(xql, name)) == inspect.getsource(getattr(iql, name))


@pytest.mark.parametrize("highest", [3.0, 100.0, -40.0])
def test_value_loss(highest):
    """Of z above the clip nothing draws V up; where all z are below -1 the loss is divided by exp(-1)."""
    a = np.array([highest, highest - 1, highest - 7])
    advantages = torch.tensor(a, dtype=torch.float32, requires_grad=True)
    loss, metrics = xql.value_loss(advantages, temperature=2.0, z_clip=7.0)
    z = np.minimum(a / 2, 7)
    factor = np.exp(-max(z.max(), -1))
    assert loss.item() == pytest.approx(np.mean(np.exp(z) - z - 1) * factor, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, advantages)
    expected = np.where(a / 2 > 7, 0, (np.exp(z) - 1) / 2 / 3 * factor)
    np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-4, atol=1e-9)
    assert metrics["value/z_clipped"].item() == (1 if highest == 100 else 0)


@pytest.mark.parametrize("temperature", [0.7, 2.0, 20.0])
def test_the_value_is_the_soft_maximum(temperature):
    """temperature log E[exp(Q / temperature)], from the mean to the maximum."""
    q = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    v = torch.full((1,), 2.0, dtype=torch.float64, requires_grad=True)
    for _ in range(4000):
        loss, _ = xql.value_loss(q - v, temperature, z_clip=7.0)
        (gradient,) = torch.autograd.grad(loss, v)
        v = (v - 0.2 * temperature * gradient).detach().requires_grad_()
    assert v.item() == pytest.approx(temperature * np.log(np.exp(q.numpy() / temperature).mean()), abs=1e-3)


def test_critic_loss(learner):
    batch = random_batch()
    batch.rewards[0] = 50.0  # beyond delta
    loss, _ = xql.critic_loss(learner.critic, learner.value, batch, gamma=0.9, huber_delta=20.0)
    with torch.no_grad():
        next_value = learner.value(batch.next_observations).numpy()
    target = batch.rewards.numpy() + 0.9 * np.where(batch.terminations.numpy() == 1, 0, next_value)
    error = np.abs(numpy_twins(learner.critic, batch.observations.numpy(), batch.actions.numpy()) - target)
    huber = np.where(error <= 20, 0.5 * error**2, 20 * (error - 10))
    assert loss.item() == pytest.approx(huber.mean(axis=1).sum(), rel=1e-5)
    assert (error > 20).any() and (error < 20).any()


def test_value_has_layer_normalisation(learner):
    """Linear, normalisation, ReLU, twice, and a last layer."""
    x = batch = random_batch().observations.numpy()
    for index in (0, 3):
        layer = learner.value.net[index]
        x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        x = np.maximum((x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5), 0)
    last = learner.value.net[6]
    expected = (x @ last.weight.detach().numpy().T + last.bias.detach().numpy())[:, 0]
    np.testing.assert_allclose(learner.value(torch.from_numpy(batch)).detach().numpy(), expected, atol=1e-5)


def test_actor_loss(learner):
    batch, a = random_batch(), torch.tensor([-2.0, -1, -0.5, 0, 0.5, 1, 2, 9])
    loss, _ = xql.actor_loss(learner.actor, a, batch, beta=3.0, weight_clip=100.0)
    mean = np.tanh(numpy_mlp(learner.actor.net, batch.observations.numpy()))
    log_prob = -(0.5 * (batch.actions.numpy() - mean) ** 2 + 0.5 * np.log(2 * np.pi)).sum(axis=1)
    assert loss.item() == pytest.approx(-np.mean(np.minimum(np.exp(3 * a.numpy()), 100) * log_prob), rel=1e-5)


def test_each_loss_trains_its_own_network_only(learner, args):
    batch = random_batch()
    advantages = xql.advantage(learner.value, learner.target_critic, batch)
    losses = {
        "value": xql.value_loss(advantages, args.temperature, args.z_clip)[0],
        "critic": xql.critic_loss(learner.critic, learner.value, batch, args.gamma, args.huber_delta)[0],
        "actor": xql.actor_loss(learner.actor, advantages, batch, args.beta, args.weight_clip)[0],
    }
    assert_each_trains_its_own(losses, networks_of(learner, "actor", "critic", "value"))
    total, _ = xql.total_loss(learner, batch, args)
    assert total.item() == pytest.approx(sum(losses.values()).item(), rel=1e-5)


@pytest.mark.parametrize("name", ["temperature", "z-clip", "huber-delta"])
def test_arguments_that_cannot_be(name):
    assert_one_line(run_script("xql", f"--{name}", "0", *SHORT), f"--{name} 0.0: must be positive")
