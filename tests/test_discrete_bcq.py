"""Discrete BCQ's losses against NumPy on small numbers, and what each of them may touch."""

import discrete_bcq
import numpy as np
import pytest
import torch
from conftest import assert_each_trains_its_own, discrete_batch, networks_of, numpy_mlp

from common.optim import Adam

CPU = torch.device("cpu")


@pytest.fixture
def args():
    return discrete_bcq.Args(hidden_dims=(5, 4), gamma=0.9, threshold=0.5, logit_penalty=0.2)


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    learner = discrete_bcq.build(3, 3, args, CPU, Adam)
    with torch.no_grad():
        for network in (learner.target_critic, learner.actor.behaviour):
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
    return learner


def numpy_policy(learner, observations, threshold):
    """The action of every row, by probabilities."""
    logits = numpy_mlp(learner.actor.behaviour.net, observations.numpy())
    beta = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    q, actions = numpy_mlp(learner.actor.critic.net, observations.numpy()), []
    for row in range(len(q)):
        allowed = [a for a in range(3) if beta[row, a] / beta[row].max() > threshold]
        actions.append(max(allowed, key=lambda a: q[row, a]))
    return actions


def test_critic_loss(learner, args):
    batch = discrete_batch()
    loss, _ = discrete_bcq.critic_loss(learner, batch, args)
    q = numpy_mlp(learner.actor.critic.net, batch.observations.numpy())
    next_q = numpy_mlp(learner.target_critic.net, batch.next_observations.numpy())
    losses = []
    for row, action in enumerate(numpy_policy(learner, batch.next_observations, 0.5)):
        future = 0 if batch.terminations[row] else next_q[row, action]
        losses.append((float(batch.rewards[row]) + 0.9 * future - q[row, int(batch.actions[row])]) ** 2)
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_behaviour_loss(learner):
    batch = discrete_batch()
    loss, _ = discrete_bcq.behaviour_loss(learner.actor.behaviour, batch, 0.2)
    logits = numpy_mlp(learner.actor.behaviour.net, batch.observations.numpy())
    log_beta = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -log_beta[np.arange(8), batch.actions.numpy()].mean() + 0.2 * np.mean(logits**2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.99])
def test_the_policy_takes_the_best_of_the_likely_actions(learner, threshold):
    learner.actor.threshold.fill_(threshold)
    torch.manual_seed(1)
    observations = torch.randn(300, 3)
    actions = learner.actor(observations).argmax(dim=1)
    assert actions.tolist() == numpy_policy(learner, observations, threshold)
    best, likeliest = (net(observations).argmax(dim=1) for net in (learner.actor.critic, learner.actor.behaviour))
    assert torch.equal(actions, best) == (threshold == 0)
    assert torch.equal(actions, likeliest) == (threshold == 0.99)


def test_each_loss_trains_its_own_network_only(learner, args):
    batch = discrete_batch()
    losses = {
        "critic": discrete_bcq.critic_loss(learner, batch, args)[0],
        "behaviour": discrete_bcq.behaviour_loss(learner.actor.behaviour, batch, 0.2)[0],
    }
    assert_each_trains_its_own(losses, networks_of(learner.actor, "critic", "behaviour"))


def test_update_trains_both_and_moves_the_target_by_tau(learner, args):
    before = [parameter.clone() for parameter in learner.target_critic.parameters()]
    trained = [parameter.clone() for parameter in learner.actor.parameters()]
    discrete_bcq.update(learner, discrete_batch(), 1, args)
    assert not any(map(torch.equal, trained, learner.actor.parameters()))
    after, online = learner.target_critic.parameters(), learner.actor.critic.parameters()
    for old, new, target in zip(before, after, online, strict=True):
        torch.testing.assert_close(new, old + args.tau * (target - old))


def test_what_beta_would_take_alone_is_not_taken_where_it_is_illegal(args):
    """Beta is sure of an illegal action: without its mask no other would be likely."""
    args.legal_actions = True
    torch.manual_seed(0)
    actor = discrete_bcq.build(5, 3, args, CPU, Adam).actor
    with torch.no_grad():
        actor.behaviour.net[-1].bias[2] = 5
    observations = torch.cat([torch.tensor([1.0, 1.0, 0.0]).expand(100, -1), torch.randn(100, 2)], dim=1)
    assert (actor(observations).argmax(dim=1) != 2).all()
