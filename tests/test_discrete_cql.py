"""Discrete CQL's losses against NumPy on small numbers, and what each of them may touch."""

import discrete_cql
import numpy as np
import pytest
import torch
from conftest import assert_each_trains_its_own, discrete_batch, networks_of, numpy_mlp

from common.optim import Adam

CPU = torch.device("cpu")


@pytest.fixture
def args():
    return discrete_cql.Args(hidden_dims=(5, 4), gamma=0.9, cql_alpha=0.7, bc_weight=1.5)


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    learner = discrete_cql.build(3, 3, args, CPU, Adam)
    with torch.no_grad():
        for network in (learner.target_critic, learner.actor.behaviour):
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
    return learner


def numpy_log_beta(learner, observations):
    logits = numpy_mlp(learner.actor.behaviour.net, observations.numpy())
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def numpy_q(learner, observations):
    return numpy_mlp(learner.actor.critic.net, observations.numpy())


def test_critic_loss(learner, args):
    batch = discrete_batch()
    loss, metrics = discrete_cql.critic_loss(learner, batch, args)
    preference = numpy_q(learner, batch.next_observations) + 1.5 * numpy_log_beta(learner, batch.next_observations)
    next_q = numpy_mlp(learner.target_critic.net, batch.next_observations.numpy())
    errors, gaps = [], []
    for row, q in enumerate(numpy_q(learner, batch.observations)):
        future = 0 if batch.terminations[row] else next_q[row, np.argmax(preference[row])]
        taken = q[int(batch.actions[row])]
        errors.append(float(batch.rewards[row]) + 0.9 * future - taken)
        gaps.append(np.log(np.exp(q).sum()) - taken)
    assert loss.item() == pytest.approx(np.mean(np.square(errors)) + 0.7 * np.mean(gaps), rel=1e-5)
    assert metrics["critic/gap"].item() == pytest.approx(np.mean(gaps), rel=1e-5)


def test_the_gap_is_the_cross_entropy_of_softmax_q(learner, args):
    batch = discrete_batch()
    _, metrics = discrete_cql.critic_loss(learner, batch, args)
    q = numpy_q(learner, batch.observations)
    probabilities = np.exp(q) / np.exp(q).sum(axis=1, keepdims=True)
    expected = -np.mean(np.log(probabilities[np.arange(8), batch.actions.numpy()]))
    assert metrics["critic/gap"].item() == pytest.approx(expected, rel=1e-5)


def test_the_gap_is_finite_where_exp_is_not(learner, args):
    with torch.no_grad():
        learner.actor.critic.net[-1].bias.fill_(1e4)
    _, metrics = discrete_cql.critic_loss(learner, discrete_batch(), args)
    assert 0 < metrics["critic/gap"].item() < 10


def test_behaviour_loss(learner):
    batch = discrete_batch()
    loss, _ = discrete_cql.behaviour_loss(learner.actor.behaviour, batch)
    expected = -numpy_log_beta(learner, batch.observations)[np.arange(8), batch.actions.numpy()].mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_policy_weighs_q_against_the_behaviour(learner):
    observations = discrete_batch().observations
    expected = numpy_q(learner, observations) + 1.5 * numpy_log_beta(learner, observations)
    np.testing.assert_allclose(learner.actor(observations).detach().numpy(), expected, atol=1e-5)


def test_without_weight_there_is_no_behaviour_model(args):
    args.bc_weight = 0.0
    learner = discrete_cql.build(3, 3, args, CPU, Adam)
    assert learner.actor.behaviour is None and len(learner.optimizer.param_groups) == 1
    observations = discrete_batch().observations
    torch.testing.assert_close(learner.actor(observations), learner.actor.critic(observations))
    assert "behaviour/loss" not in discrete_cql.update(learner, discrete_batch(), 1, args)


def test_each_loss_trains_its_own_network_only(learner, args):
    batch = discrete_batch()
    losses = {
        "critic": discrete_cql.critic_loss(learner, batch, args)[0],
        "behaviour": discrete_cql.behaviour_loss(learner.actor.behaviour, batch)[0],
    }
    assert_each_trains_its_own(losses, networks_of(learner.actor, "critic", "behaviour"))


def test_update_trains_both_and_moves_the_target_by_tau(learner, args):
    before = [parameter.clone() for parameter in learner.target_critic.parameters()]
    trained = [parameter.clone() for parameter in learner.actor.parameters()]
    discrete_cql.update(learner, discrete_batch(), 1, args)
    assert not any(map(torch.equal, trained, learner.actor.parameters()))
    after, online = learner.target_critic.parameters(), learner.actor.critic.parameters()
    for old, new, target in zip(before, after, online, strict=True):
        torch.testing.assert_close(new, old + args.tau * (target - old))
