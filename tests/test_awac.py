"""AWAC's losses against NumPy on small numbers, and what each of them may touch."""

import awac
import numpy as np
import pytest
import torch
from conftest import (
    assert_each_trains_its_own,
    assert_one_line,
    level,
    lower,
    networks_of,
    numpy_mlp,
    numpy_twins,
    random_batch,
    run_script,
)

from common.optim import Adam

CPU = torch.device("cpu")
STD = np.exp([-0.2, -1.0])  # of the fixture's actor


@pytest.fixture
def args():
    return awac.Args(hidden_dims=(5, 4), gamma=0.9, beta=0.7, num_value_samples=3)


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    learner = awac.build(3, 2, args, CPU, Adam)
    with torch.no_grad():  # so that the target differs from what it follows
        for parameter in learner.target_critic.parameters():
            parameter.add_(torch.randn_like(parameter))
        learner.actor.log_std.copy_(torch.tensor([-0.2, -1.0]))
    level(learner.critic)
    level(learner.target_critic)
    return learner


def draws():
    return torch.randn(4, 8, 2, generator=torch.Generator().manual_seed(1))


def numpy_sample(learner, observations, noise):
    return np.clip(np.tanh(numpy_mlp(learner.actor.net, observations)) + STD * noise.numpy(), -1, 1)


def numpy_advantage(learner, batch, noise):
    observations = batch.observations.numpy()
    value = [
        lower(numpy_twins(learner.critic, observations, numpy_sample(learner, observations, rows))) for rows in noise
    ]
    return lower(numpy_twins(learner.critic, observations, batch.actions.numpy())) - np.mean(value, axis=0)


def test_samples_are_clipped_to_the_range_of_actions(learner):
    observations, noise = random_batch().observations, draws()
    actions, log_prob = learner.actor.sample(observations, noise)
    np.testing.assert_allclose(actions.detach(), numpy_sample(learner, observations.numpy(), noise), atol=1e-5)
    assert (abs(actions) == 1).any() and (abs(actions) < 1).any()
    inside = (abs(actions) < 1).all(dim=-1)
    assert inside.any()
    torch.testing.assert_close(log_prob[inside], learner.actor.log_prob(observations, actions)[inside])


def test_the_deviation_has_bounds(learner):
    """exp(-5) and exp(2), whatever the parameter says."""
    with torch.no_grad():
        learner.actor.log_std.copy_(torch.tensor([-9.0, 9.0]))
    batch, noise = random_batch(), 0.01 * draws()[0]
    actions, log_prob = learner.actor.sample(batch.observations, noise)
    mean, std = np.tanh(numpy_mlp(learner.actor.net, batch.observations.numpy())), np.exp([-5, 2])
    np.testing.assert_allclose(actions.detach(), np.clip(mean + std * noise.numpy(), -1, 1), atol=1e-5)
    density = np.exp(-0.5 * noise.numpy() ** 2) / (std * np.sqrt(2 * np.pi))
    inside = (abs(actions) < 1).all(dim=-1)
    assert inside.any()
    expected = np.log(density).sum(axis=1)[inside.numpy()]
    np.testing.assert_allclose(log_prob.detach()[inside], expected, atol=1e-3)


def test_advantage_is_over_what_the_policy_would_do(learner):
    batch, noise = random_batch(), draws()[1:]
    u = awac.advantage(learner.actor, learner.critic, batch, noise)
    np.testing.assert_allclose(u.numpy(), numpy_advantage(learner, batch, noise), atol=1e-5)
    assert not u.requires_grad


def test_critic_loss(learner, args):
    batch, noise = random_batch(), draws()[0]
    loss, metrics = awac.critic_loss(learner, batch, noise, args.gamma)
    next_observations = batch.next_observations.numpy()
    next_actions = numpy_sample(learner, next_observations, noise)
    next_q = lower(numpy_twins(learner.target_critic, next_observations, next_actions))
    target = batch.rewards.numpy() + 0.9 * np.where(batch.terminations.numpy() == 1, 0, next_q)
    q = numpy_twins(learner.critic, batch.observations.numpy(), batch.actions.numpy())
    assert loss.item() == pytest.approx(((q - target) ** 2).mean(axis=1).sum(), rel=1e-5)
    assert metrics["critic/target"].item() == pytest.approx(target.mean(), rel=1e-5)


def test_actor_loss(learner):
    batch, u = random_batch(), torch.tensor([-2.0, -1, -0.5, 0, 0.5, 1, 2, 9])
    loss, metrics = awac.actor_loss(learner.actor, u, batch, beta=0.7)
    mean = np.tanh(numpy_mlp(learner.actor.net, batch.observations.numpy()))
    density = np.exp(-0.5 * ((batch.actions.numpy() - mean) / STD) ** 2) / (STD * np.sqrt(2 * np.pi))
    weight = np.exp(u.numpy().astype(np.float64) / 0.7)
    weight /= weight.mean()
    assert loss.item() == pytest.approx(-np.mean(weight * np.log(density).sum(axis=1)), rel=1e-5)
    assert metrics["actor/weight_max"].item() == pytest.approx(weight.max(), rel=1e-5)
    assert metrics["actor/effective_sample_size"].item() == pytest.approx(8**2 / np.sum(weight**2), rel=1e-5)


def test_advantages_of_any_size_give_finite_weights(learner):
    """exp(1e4) is beyond float32: the largest of a batch takes all the weight instead."""
    u = torch.tensor([-1e6, 1e4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    loss, metrics = awac.actor_loss(learner.actor, u, random_batch(), beta=1.0)
    assert loss.isfinite() and metrics["actor/weight_max"].item() == pytest.approx(8)
    assert metrics["actor/effective_sample_size"].item() == pytest.approx(1)


def test_termination_ends_the_target_and_truncation_does_not(learner):
    batch = random_batch()._replace(rewards=torch.zeros(8))
    with torch.no_grad():
        learner.target_critic.layers[-1].bias.fill_(1000.0)
    for terminated, expected in ((1.0, 0.0), (0.0, 990.0)):  # a truncated step is stored as not terminated
        step = batch._replace(terminations=torch.full((8,), terminated))
        _, metrics = awac.critic_loss(learner, step, draws()[0], 0.99)
        assert metrics["critic/target"].item() == pytest.approx(expected, abs=20)


def test_each_loss_trains_its_own_network_only(learner, args):
    batch, noise = random_batch(), draws()
    u = awac.advantage(learner.actor, learner.critic, batch, noise[1:])
    losses = {
        "critic": awac.critic_loss(learner, batch, noise[0], args.gamma)[0],
        "actor": awac.actor_loss(learner.actor, u, batch, args.beta)[0],
    }
    assert_each_trains_its_own(losses, networks_of(learner, "actor", "critic"))
    total, _ = awac.total_loss(learner, batch, noise, args)
    assert total.item() == pytest.approx(sum(losses.values()).item(), rel=1e-5)


def test_update_moves_the_target_by_tau(learner, args):
    before = [parameter.clone() for parameter in learner.target_critic.parameters()]
    awac.update(learner, random_batch(), 1, args)
    after, online = learner.target_critic.parameters(), learner.critic.parameters()
    for old, new, target in zip(before, after, online, strict=True):
        torch.testing.assert_close(new, old + args.tau * (target - old))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beta", "0"], "--beta 0.0: must be positive"),
        (["--num-value-samples", "0"], "--num-value-samples 0: must be at least 1"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    assert_one_line(run_script("awac", *arguments, "--run-dir", str(tmp_path / "run")), message)
