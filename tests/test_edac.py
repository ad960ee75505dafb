"""EDAC's losses against NumPy on small numbers and known slopes, and what each of them may touch."""

import copy
import math

import edac
import numpy as np
import pytest
import torch
from conftest import draws, numpy_sample, random_batch, sac_learner
from torch import nn

from common.data import Batch
from common.optim import Adam, compiled

CPU = torch.device("cpu")


@pytest.fixture
def args():
    return edac.Args(hidden_dims=(16, 12), num_critics=4, eta=0.5, gamma=0.9)


@pytest.fixture
def learner(args):
    return sac_learner(edac, args)


def numpy_members(critic, observations, actions):
    """[members, batch], each member as a network of its own."""
    values = []
    for member in range(critic.members):
        x = np.concatenate([observations, actions], axis=1).astype(np.float64)
        for index, layer in enumerate(critic.layers):
            x = np.maximum(x, 0) if index else x
            x = x @ layer.weight[member].detach().numpy().astype(np.float64) + layer.bias[member].detach().numpy()
        values.append(x[:, 0])
    return np.stack(values)


def numpy_diversity(critic, observations, actions, step=1e-6):
    """By difference quotients, and pair by pair."""
    slopes = []
    for dimension in range(actions.shape[1]):
        shift = step * np.eye(actions.shape[1])[dimension]
        ends = (numpy_members(critic, observations, actions.astype(np.float64) + sign * shift) for sign in (1, -1))
        slopes.append(np.subtract(*ends) / (2 * step))
    slopes = np.stack(slopes, axis=-1)  # [members, batch, action_dim]
    total = 0.0
    for i in range(critic.members):
        for j in range(critic.members):
            if i != j:
                norms = np.linalg.norm(slopes[i], axis=1) * np.linalg.norm(slopes[j], axis=1)
                total += np.mean((slopes[i] * slopes[j]).sum(axis=1) / norms)
    return total / (critic.members - 1)


# --- Losses ---


def test_critic_loss(learner, args):
    batch, noise = random_batch(), draws()[0]
    next_observations = batch.next_observations.numpy()
    next_actions, log_prob = numpy_sample(learner.actor, next_observations, noise)
    next_qs = numpy_members(learner.target_critic, next_observations, next_actions)
    lowest = next_qs.argmin(axis=0)
    assert len(set(lowest)) > 1 and max(lowest) > 1  # not always the same, nor always one of the first two
    next_value = next_qs.min(axis=0) - 0.3 * log_prob
    target = batch.rewards.numpy() + 0.9 * np.where(batch.terminations.numpy() == 1, 0, next_value)
    q = numpy_members(learner.critic, batch.observations.numpy(), batch.actions.numpy())
    bellman = ((q - target) ** 2).mean(axis=1).sum()
    similarity = numpy_diversity(learner.critic, batch.observations.numpy(), batch.actions.numpy())
    loss, metrics = edac.critic_loss(learner, batch, noise, args)
    assert loss.item() == pytest.approx(bellman + 0.5 * similarity, rel=1e-4)
    assert metrics["critic/diversity"].item() == pytest.approx(similarity, rel=1e-4)
    assert metrics["critic/target"].item() == pytest.approx(target.mean(), rel=1e-4)
    assert metrics["critic/disagreement"].item() == pytest.approx(q.std(axis=0, ddof=1).mean(), rel=1e-4)
    args.eta = 0.0
    loss, metrics = edac.critic_loss(learner, batch, noise, args)
    assert loss.item() == pytest.approx(bellman, rel=1e-4) and "critic/diversity" not in metrics


def test_actor_and_temperature_losses(learner):
    batch, noise = random_batch(), draws()[0]
    actions, log_prob = numpy_sample(learner.actor, batch.observations.numpy(), noise)
    q = numpy_members(learner.critic, batch.observations.numpy(), actions).min(axis=0)
    ours = learner.actor.sample(batch.observations, noise)
    loss, _ = edac.actor_loss(learner.critic, torch.tensor(0.3), batch.observations, *ours)
    assert loss.item() == pytest.approx(np.mean(0.3 * log_prob - q), rel=1e-4)
    loss, _ = edac.temperature_loss(torch.tensor(0.3), ours[1], target_entropy=-2.0)
    assert loss.item() == pytest.approx(np.mean(-0.3 * (log_prob - 2.0)), rel=1e-4)


def test_termination_ends_the_target_and_truncation_does_not(learner, args):
    batch = random_batch()._replace(rewards=torch.zeros(8))
    with torch.no_grad():
        learner.target_critic.layers[-1].bias.fill_(1000.0)
    for terminated, expected in ((1.0, 0.0), (0.0, 900.0)):  # a truncated step is stored as not terminated
        step = batch._replace(terminations=torch.full((8,), terminated))
        _, metrics = edac.critic_loss(learner, step, draws()[0], args)
        assert metrics["critic/target"].item() == pytest.approx(expected, abs=20)


# --- Diversity ---


def diversity_of(critic, observations, actions):
    actions = actions.expand(critic.members, -1, -1).clone().requires_grad_()
    return edac.diversity(critic(observations, actions), actions)


class Planes(nn.Module):
    """Q_i(s, a) = slope_i . a + s: every slope is known, and trained."""

    def __init__(self, slopes):
        super().__init__()
        self.members, self.slopes = len(slopes), nn.Parameter(torch.tensor(slopes))

    def forward(self, observations, actions):
        return (actions * self.slopes.unsqueeze(1)).sum(dim=-1) + observations[:, 0]


@pytest.mark.parametrize(
    ("slopes", "expected"),
    [
        ([[1.0, 0.0], [7.0, 0.0]], 2.0),  # the same way, whatever their lengths: 2 pairs of cosine 1
        ([[1.0, 0.0], [0.0, -3.0]], 0.0),
        ([[1.0, 2.0], [-2.0, -4.0]], -2.0),
        ([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]], -1.0),  # cosines 0, 0 and -1, each twice, over N - 1 = 2
        ([[2.0, 2.0]] * 5, 5.0),
        ([[math.cos(angle), math.sin(angle)] for angle in (0, 2 * math.pi / 3, 4 * math.pi / 3)], -1.5),  # its least
    ],
)
def test_diversity_of_known_slopes(slopes, expected):
    batch = random_batch()
    value = diversity_of(Planes(slopes), batch.observations, batch.actions)
    assert value.item() == pytest.approx(expected, abs=1e-5)


def test_diversity_turns_slopes_away_from_each_other():
    """The gradient of cos of the angle between (1, 0) and (1, 1): at right angles to each, and they part."""
    planes, batch = Planes([[1.0, 0.0], [1.0, 1.0]]), random_batch()
    diversity_of(planes, batch.observations, batch.actions).backward()
    first, second = planes.slopes.grad
    # d cos / d slope_1 = (g_2 - cos g_1) / |slope_1|, twice
    root = math.sqrt(0.5)
    np.testing.assert_allclose(first.numpy(), [0.0, 2 * root], atol=1e-6)
    np.testing.assert_allclose(second.numpy(), [2 * (1 - 0.5) * root, -2 * 0.5 * root], atol=1e-6)


def test_gradient_of_the_diversity_against_difference_quotients():
    torch.manual_seed(0)
    critic = edac.Critic(3, 2, edac.HyperParameters(num_critics=3, hidden_dims=(5, 4))).double()
    batch = random_batch()
    inputs = batch.observations.double(), batch.actions.double()
    value = diversity_of(critic, *inputs)
    weight, step = critic.layers[1].weight, 1e-6
    (gradient,) = torch.autograd.grad(value, weight)
    assert gradient.abs().max() > 1e-3
    for place in ((0, 0, 0), (1, 3, 2), (2, 4, 1)):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * step
            ends.append(diversity_of(critic, *inputs).item())
            with torch.no_grad():
                weight[place] -= sign * step
        assert gradient[place].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-5)


def test_an_action_of_one_dimension_has_no_diversity_to_gain(args):
    """Its slopes point up or down: the term moves no weight, and EDAC is SAC-N, as the docstring says."""
    finals = []
    for args.eta in (0.0, 100.0):
        torch.manual_seed(0)
        learner = edac.build(3, 1, args, CPU, Adam)
        for step in range(1, 6):
            edac.update(learner, random_batch(action_dim=1), step, args)
        finals.append([*learner.critic.parameters(), *learner.actor.parameters()])
    assert all(map(torch.equal, *finals))
    batch = random_batch(action_dim=1)  # what is left out is N or less, and moves nothing but by rounding
    value = diversity_of(learner.critic, batch.observations, batch.actions)
    assert all(gradient.abs().max() < 1e-4 for gradient in torch.autograd.grad(value, learner.critic.layers[0].weight))


def test_training_makes_the_slopes_diverse(args):
    """Critics that learn from the same data end up with less similar slopes where the term is on."""
    found = []
    args.critic_learning_rate = 3e-3
    for args.eta in (0.0, 5.0):
        torch.manual_seed(0)
        learner = edac.build(3, 2, args, CPU, Adam)
        batch = random_batch(64)._replace(rewards=random_batch(64).actions.sum(dim=-1))
        for step in range(1, 101):
            edac.update(learner, batch, step, args)
        found.append(diversity_of(learner.critic, batch.observations, batch.actions).item())
    assert found[1] < 0 < 1 < found[0], found


# --- Update ---


@pytest.mark.slow
def test_the_gradient_through_a_gradient_is_compiled_too(args):
    """The built-in data's action has one dimension, where the tests of every script leave it out."""
    finals = []
    torch.set_default_dtype(torch.float64)  # Adam turns the rounding of a gradient near zero into a step
    try:
        for args.compile in (False, True):
            torch.manual_seed(0)
            learner = edac.build(3, 2, args, CPU, Adam)
            train = compiled(edac.update, learner, args)
            for step in range(1, 31):
                train(learner, Batch(*(tensor.double() for tensor in random_batch())), step, args)
            finals.append([weight.detach().clone() for part in learner[:3] for weight in part.parameters()])
    finally:
        torch.set_default_dtype(torch.float32)
    for eager, graph in zip(*finals, strict=True):
        torch.testing.assert_close(eager, graph, atol=1e-9, rtol=1e-7)


def test_update_moves_every_network_and_targets_follow(learner, args):
    before = copy.deepcopy(learner)
    edac.update(learner, random_batch(), 1, args)
    after = [*learner.actor.parameters(), *learner.critic.parameters()]
    moved = zip([*before.actor.parameters(), *before.critic.parameters()], after, strict=True)
    assert not any(torch.equal(old, new) for old, new in moved)
    targets = before.target_critic, learner.target_critic, learner.critic
    for old, new, followed in zip(*(critic.parameters() for critic in targets), strict=True):
        torch.testing.assert_close(new, old + args.tau * (followed - old))
