"""Discrete IQL's losses against NumPy on small numbers, and what each of them may touch."""

import discrete_iql
import numpy as np
import pytest
import torch
from conftest import (
    SHORT,
    assert_each_trains_its_own,
    assert_one_line,
    checkpoint,
    discrete_batch,
    networks_of,
    numpy_mlp,
    run_script,
)

from common.optim import Adam

CPU = torch.device("cpu")


@pytest.fixture
def args():
    return discrete_iql.Args(hidden_dims=(5, 4), num_updates=100)


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    learner = discrete_iql.build(3, 3, args, CPU, Adam)
    with torch.no_grad():
        for parameter in learner.target_critic.parameters():  # so that it differs from the critic
            parameter.add_(torch.randn_like(parameter))
    return learner


def numpy_q(critic, observations):
    """Of both twins and all actions, [2, batch, num_actions]."""
    twins = []
    for member in range(2):
        x = observations.numpy()
        for number, layer in enumerate(critic.layers):
            x = x @ layer.weight[member].detach().numpy() + layer.bias[member].detach().numpy()
            x = np.maximum(x, 0) if number < len(critic.layers) - 1 else x
        twins.append(x)
    return np.stack(twins)


def of_the_data(q, batch):
    return np.array([[twin[row, int(action)] for row, action in enumerate(batch.actions)] for twin in q])


def numpy_value(learner, observations):
    return numpy_mlp(learner.value.net, observations.numpy())[:, 0]


def test_the_critic_gives_every_action_of_both_twins(learner):
    observations = discrete_batch().observations
    q = learner.critic(observations)
    np.testing.assert_allclose(q.detach().numpy(), numpy_q(learner.critic, observations), atol=1e-5)
    assert q.shape == (2, 8, 3)


def test_value_loss_by_hand():
    loss, _ = discrete_iql.value_loss(torch.tensor([2.0, -1.0, 0.0]), expectile=0.7)
    assert loss.item() == pytest.approx((0.7 * 4 + 0.3 * 1 + 0) / 3)


def test_advantage_takes_the_twins_minimum_of_the_target_critic_at_the_datas_actions(learner):
    batch = discrete_batch()
    u = discrete_iql.advantage(learner.value, learner.target_critic, batch)
    q = of_the_data(numpy_q(learner.target_critic, batch.observations), batch)
    expected = q.min(axis=0) - numpy_value(learner, batch.observations)
    np.testing.assert_allclose(u.detach().numpy(), expected, atol=1e-5)


def test_critic_loss(learner):
    batch = discrete_batch()
    loss, _ = discrete_iql.critic_loss(learner.critic, learner.value, batch, gamma=0.9)
    future = np.where(batch.terminations.numpy() == 1, 0, numpy_value(learner, batch.next_observations))
    target = batch.rewards.numpy() + 0.9 * future
    q = of_the_data(numpy_q(learner.critic, batch.observations), batch)
    expected = np.mean((q[0] - target) ** 2) + np.mean((q[1] - target) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_actor_loss(learner):
    batch, u = discrete_batch(), torch.tensor([-2.0, -1, -0.5, 0, 0.5, 1, 2, 9])
    loss, metrics = discrete_iql.actor_loss(learner.actor, u, batch, beta=3.0, weight_clip=100.0)
    logits = numpy_mlp(learner.actor.net, batch.observations.numpy())
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    log_prob = np.log([row[int(action)] for row, action in zip(probabilities, batch.actions, strict=True)])
    weight = np.minimum(np.exp(3.0 * u.numpy()), 100)
    assert loss.item() == pytest.approx(-np.mean(weight * log_prob), rel=1e-5)
    assert metrics["actor/log_prob"].item() == pytest.approx(log_prob.mean(), rel=1e-5)
    assert metrics["actor/weight_clipped"].item() == 2 / 8  # exp(6) and exp(27)
    expected = weight.sum() ** 2 / np.sum(weight**2)
    assert metrics["actor/effective_sample_size"].item() == pytest.approx(expected, rel=1e-5)


def test_log_prob_is_finite_where_exp_is_not(learner):
    batch = discrete_batch()
    with torch.no_grad():
        learner.actor.net[-1].bias.copy_(torch.tensor([1e4, 0, 0]))
    log_prob = learner.actor.log_prob(batch.observations, batch.actions)
    expected = np.where(batch.actions.numpy() == 0, 0, -1e4)
    np.testing.assert_allclose(log_prob.detach().numpy(), expected, atol=10)


def test_no_illegal_action_is_the_best(args):
    """The last of three actions is preferred by far, and legal in the second state alone."""
    args.legal_actions = True
    actor = discrete_iql.Actor(4, 3, args)
    with torch.no_grad():
        actor.net[-1].bias[2] += 1000
    observations = torch.tensor([[1.0, 0, 0, 0.3], [1, 1, 1, 0.3], [0, 1, 0, 0.3]])
    assert actor(observations).argmax(dim=1).tolist() == [0, 2, 1]


def test_the_critics_loss_asks_no_action_at_the_next_state(learner, args):
    """Whatever it says of actions that the data did not take, the losses stay as they are."""
    batch = discrete_batch()._replace(actions=torch.zeros(8, dtype=torch.int64))
    before, _ = discrete_iql.total_loss(learner, batch, args)
    with torch.no_grad():
        for critic in (learner.critic, learner.target_critic):
            critic.layers[-1].bias[..., 1:] += 1000
    after, _ = discrete_iql.total_loss(learner, batch, args)
    assert after.item() == before.item()


def test_termination_ends_the_target_and_truncation_does_not(learner):
    batch = discrete_batch()._replace(rewards=torch.zeros(8))
    with torch.no_grad():
        learner.value.net[-1].bias.fill_(1000.0)
    for terminated, expected in ((1.0, 0.0), (0.0, 990.0)):  # a truncated step is stored as not terminated
        ended = batch._replace(terminations=torch.full((8,), terminated))
        _, metrics = discrete_iql.critic_loss(learner.critic, learner.value, ended, 0.99)
        assert metrics["critic/target"].item() == pytest.approx(expected, abs=5)


def test_each_loss_trains_its_own_network_only(learner, args):
    batch = discrete_batch()
    u = discrete_iql.advantage(learner.value, learner.target_critic, batch)
    losses = {
        "value": discrete_iql.value_loss(u, args.expectile)[0],
        "critic": discrete_iql.critic_loss(learner.critic, learner.value, batch, args.gamma)[0],
        "actor": discrete_iql.actor_loss(learner.actor, u, batch, args.beta, args.weight_clip)[0],
    }
    assert_each_trains_its_own(losses, networks_of(learner, "actor", "critic", "value"))
    total, _ = discrete_iql.total_loss(learner, batch, args)
    assert total.item() == pytest.approx(sum(losses.values()).item(), rel=1e-5)


def test_update_moves_the_target_by_tau(learner, args):
    before = [parameter.clone() for parameter in learner.target_critic.parameters()]
    discrete_iql.update(learner, discrete_batch(), 51, args)
    after, online = learner.target_critic.parameters(), learner.critic.parameters()
    for old, new, target in zip(before, after, online, strict=True):
        torch.testing.assert_close(new, old + args.tau * (target - old))


def test_the_actors_learning_rate_decays(tmp_path):
    """Half a cosine: the fourth of four updates has what is left after three quarters of the way."""
    arguments = ["--num-updates", "4", *SHORT, "--run-dir", str(tmp_path / "run")]
    assert run_script("discrete_iql", *arguments).returncode == 0
    numbers = [value for value in checkpoint(tmp_path / "run")["learner"]["optimizer"].values() if not value.dim()]
    rates = [float(rate) for rate in numbers[::2]]  # each group's, and then its steps
    assert rates == pytest.approx([3e-4 * 0.5 * (1 + np.cos(np.pi * 3 / 4)), 3e-4, 3e-4])


@pytest.mark.parametrize(
    ("argument", "value", "problem"),
    [
        ("--expectile", "1", r"must be in \(0, 1\)"),
        ("--beta", "-1", "must not be negative"),
        ("--weight-clip", "0", "must be positive"),
    ],
)
def test_values_that_cannot_be_are_one_line(tmp_path, argument, value, problem):
    run = run_script("discrete_iql", argument, value, "--run-dir", str(tmp_path / "run"))
    assert_one_line(run, rf"{argument}.*{problem}")
    assert not (tmp_path / "run").exists()
