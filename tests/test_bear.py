"""BEAR's losses against NumPy on small numbers, both divergences by hand, and what each of them may touch."""

import copy
import math

import bear
import numpy as np
import pytest
import torch
from conftest import assert_each_trains_its_own, networks_of, numpy_mlp, numpy_twins, random_batch

from common.optim import Adam

CPU = torch.device("cpu")


@pytest.fixture
def args():
    return bear.Args(hidden_dims=(6, 5), num_samples=3, num_target_actions=4, bandwidth=0.7, gamma=0.9)


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    learner = bear.build(3, 2, args, CPU, Adam)
    with torch.no_grad():  # so that the targets differ from what they follow, and alpha from 1
        for module in (learner.target_actor, learner.target_critic, learner.actor, learner.behaviour):
            for parameter in module.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        learner.alpha.log.fill_(math.log(0.3))
    return learner


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def numpy_distribution(actor, observations):
    hidden = np.maximum(numpy_mlp(actor.trunk, observations), 0)  # numpy_mlp has none after its last layer
    mean, log_std = (
        hidden @ head.weight.detach().numpy().T + head.bias.detach().numpy() for head in (actor.mean, actor.log_std)
    )
    return mean, np.exp(np.clip(log_std, -5, 2))


def numpy_kernel(x, y, kernel, bandwidth):
    difference = np.abs(x - y) if kernel == "laplacian" else (x - y) ** 2
    return math.exp(-difference.sum() / (2 * bandwidth))


def numpy_mmd(x, y, kernel, bandwidth):
    """Of samples [n, action_dim] at one state, pair by pair."""
    means = [
        sum(numpy_kernel(a, b, kernel, bandwidth) for a in left for b in right) / (len(left) * len(right))
        for left, right in ((x, x), (x, y), (y, y))
    ]
    return math.sqrt(means[0] - 2 * means[1] + means[2] + 1e-6)


# --- Divergences ---


@pytest.mark.parametrize("kernel", ["laplacian", "gaussian"])
def test_mmd_pair_by_pair(args, kernel):
    args.kernel = kernel
    x, y = normal(3, 8, 2), 0.5 + normal(3, 8, 2, seed=2)
    expected = [numpy_mmd(x[:, state].numpy(), y[:, state].numpy(), kernel, 0.7) for state in range(8)]
    np.testing.assert_allclose(bear.mmd(x, y, args).numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(("kernel", "exponent"), [("laplacian", 3.0), ("gaussian", 5.0)])
def test_mmd_of_two_points_by_hand(args, kernel, exponent):
    """From (0, 0) to (1, 2): 3 in absolute differences, 5 in squared ones."""
    args.kernel, args.bandwidth = kernel, 2.0
    x, y = torch.zeros(2, 1, 2), torch.tensor([1.0, 2.0]).expand(2, 1, 2)
    expected = math.sqrt(2 - 2 * math.exp(-exponent / 4) + 1e-6)
    assert bear.mmd(x, y, args).item() == pytest.approx(expected, rel=1e-6)
    assert bear.mmd(x, x, args).item() == pytest.approx(1e-3)


def test_samples_of_equal_policies_differ_by_what_the_docstring_says():
    args, x = bear.Args(), normal(2, 10, 2000, 1)
    assert 0.05 < bear.mmd(x[0], x[1], args).mean() < 0.12 < bear.THRESHOLDS["mmd"]


def test_mmd_has_a_gradient_where_all_samples_are_the_same(args):
    x = torch.zeros(3, 1, 2, requires_grad=True)
    bear.mmd(x, torch.zeros(3, 1, 2), args).sum().backward()
    assert x.grad.isfinite().all()


def test_kl_against_an_integral_over_the_actions_themselves():
    """Of the squashed densities, by a sum over a fine grid: tanh changes nothing."""
    mean, std, mean_b, std_b = 0.3, 0.5, -0.4, 0.8
    u, width = np.linspace(-6, 6, 200_001, retstep=True)
    actions = np.tanh(u)

    def density(mean, std):
        return np.exp(-0.5 * ((u - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi)) / (1 - actions**2)

    p, b = density(mean, std), density(mean_b, std_b)
    expected = np.sum(p * np.log(p / b) * (1 - actions**2)) * width  # da = (1 - a^2) du
    one = [torch.full((4, 1), value) for value in (mean, std, mean_b, std_b)]
    np.testing.assert_allclose(bear.kl((one[0], one[1]), (one[2], one[3])).numpy(), np.full(4, expected), rtol=1e-5)
    two = [tensor.expand(4, 2) for tensor in one]
    np.testing.assert_allclose(bear.kl((two[0], two[1]), (two[2], two[3])).numpy(), np.full(4, 2 * expected), rtol=1e-5)
    assert bear.kl((one[0], one[1]), (one[0], one[1])).abs().max() < 1e-6


# --- Losses ---


def test_behaviour_loss(learner):
    batch = random_batch()
    batch.actions[0, 0], batch.actions[1, 1] = 1.0, -1.0  # at a bound no density is finite
    mean, std = numpy_distribution(learner.behaviour, batch.observations.numpy())
    actions = np.clip(batch.actions.numpy().astype(np.float64), -0.999, 0.999)
    density = np.exp(-0.5 * ((np.arctanh(actions) - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))
    expected = -np.log(density / (1 - actions**2)).sum(axis=1).mean()
    assert bear.behaviour_loss(learner.behaviour, batch)[0].item() == pytest.approx(expected, rel=1e-4)


def test_critic_loss(learner, args):
    batch, noise = random_batch(), normal(4, 8, 2)
    next_observations = batch.next_observations.numpy()
    mean, std = numpy_distribution(learner.target_actor, next_observations)
    values = []
    for sample in noise.numpy():
        q = numpy_twins(learner.target_critic, next_observations, np.tanh(mean + std * sample))
        values.append(0.75 * np.minimum(q[0], q[1]) + 0.25 * np.maximum(q[0], q[1]))
    assert len(set(np.argmax(values, axis=0))) > 1  # no sample is the best for every state
    next_q = np.max(values, axis=0)
    target = batch.rewards.numpy() + 0.9 * np.where(batch.terminations.numpy() == 1, 0, next_q)
    q = numpy_twins(learner.critic, batch.observations.numpy(), batch.actions.numpy())
    loss, _ = bear.critic_loss(learner, batch, noise, args)
    assert loss.item() == pytest.approx(((q - target) ** 2).mean(axis=1).sum(), rel=1e-4)


@pytest.mark.parametrize("divergence", ["mmd", "kl"])
@pytest.mark.parametrize("threshold", [None, 0.7])
def test_actor_loss(learner, args, divergence, threshold):
    args.divergence, args.threshold = divergence, threshold
    batch, noise = random_batch(), normal(2, 3, 8, 2)
    observations = batch.observations.numpy()
    (mean, std), (mean_b, std_b) = (
        numpy_distribution(actor, observations) for actor in (learner.actor, learner.behaviour)
    )
    u, u_b = mean + std * noise[0].numpy(), mean_b + std_b * noise[1].numpy()
    q = np.stack([numpy_twins(learner.critic, observations, np.tanh(sample)) for sample in u])  # [samples, 2, batch]
    if divergence == "mmd":
        expected = np.mean([numpy_mmd(u[:, state], u_b[:, state], "laplacian", 0.7) for state in range(8)])
    else:
        terms = np.log(std_b / std) + (std**2 + (mean - mean_b) ** 2) / (2 * std_b**2) - 0.5
        expected = terms.sum(axis=1).mean()
    limit = {"mmd": 0.2, "kl": 2.0}[divergence] if threshold is None else 0.7
    loss, metrics = bear.actor_loss(learner, batch, noise, args)
    assert metrics["actor/divergence"].item() == pytest.approx(expected, rel=1e-4)
    loss_pi = 0.3 * expected - q.mean(axis=0).min(axis=0).mean()
    assert metrics["actor/loss"].item() == pytest.approx(loss_pi, rel=1e-4)
    assert loss.item() == pytest.approx(loss_pi - 0.3 * (expected - limit), rel=1e-4)


def test_termination_ends_the_target_and_truncation_does_not(learner, args):
    batch = random_batch()._replace(rewards=torch.zeros(8))
    with torch.no_grad():
        learner.target_critic.layers[-1].bias.fill_(1000.0)
    for terminated, expected in ((1.0, 0.0), (0.0, 900.0)):  # a truncated step is stored as not terminated
        step = batch._replace(terminations=torch.full((8,), terminated))
        _, metrics = bear.critic_loss(learner, step, normal(4, 8, 2), args)
        assert metrics["critic/target"].item() == pytest.approx(expected, abs=20)


# --- Update ---


@pytest.mark.parametrize("divergence", ["mmd", "kl"])
def test_each_loss_trains_its_own_network_only(learner, args, divergence):
    args.divergence = divergence
    batch, noise = random_batch(), normal(10, 8, 2)
    losses = {
        "behaviour": bear.behaviour_loss(learner.behaviour, batch)[0],
        "critic": bear.critic_loss(learner, batch, noise[:4], args)[0],
        "actor alpha": bear.actor_loss(learner, batch, noise[4:].unflatten(0, (2, 3)), args)[0],
    }
    assert_each_trains_its_own(losses, networks_of(learner, "actor", "behaviour", "critic", "alpha"))
    total, _ = bear.total_loss(learner, batch, noise, args)
    assert total.item() == pytest.approx(sum(losses.values()).item(), rel=1e-5)


@pytest.mark.parametrize("divergence", ["mmd", "kl"])
@pytest.mark.parametrize(("threshold", "rises"), [(0.0, True), (100.0, False)])
def test_alpha_rises_while_the_divergence_is_too_large(learner, args, divergence, threshold, rises):
    args.divergence, args.threshold = divergence, threshold
    before = learner.alpha().item()
    bear.update(learner, random_batch(), 1, args)
    assert (learner.alpha().item() > before) == rises and learner.alpha().item() != before


@pytest.mark.parametrize(("threshold", "start", "bound"), [(0.0, 9.9999, 10.0), (100.0, -4.9999, -5.0)])
def test_alpha_stays_in_the_authors_range(learner, args, threshold, start, bound):
    args.threshold = threshold
    with torch.no_grad():
        learner.alpha.log.fill_(start)
    bear.update(learner, random_batch(), 1, args)
    assert learner.alpha.log.item() == bound


def test_update_moves_every_network_and_targets_follow(learner, args):
    before = copy.deepcopy(learner)
    bear.update(learner, random_batch(), 1, args)
    for name in ("actor", "behaviour", "critic", "alpha"):
        pairs = zip(getattr(before, name).parameters(), getattr(learner, name).parameters(), strict=True)
        assert not any(torch.equal(old, new) for old, new in pairs)
    for name in ("actor", "critic"):
        networks = getattr(before, f"target_{name}"), getattr(learner, f"target_{name}"), getattr(learner, name)
        for old, new, followed in zip(*(network.parameters() for network in networks), strict=True):
            torch.testing.assert_close(new, old + args.tau * (followed - old))


@pytest.mark.parametrize("divergence", ["mmd", "kl"])
def test_a_tight_threshold_is_kept_and_a_loose_one_is_not_needed(args, divergence):
    """Rewards grow with the action, of which the data has a narrow band: only the threshold holds the actor to it."""
    args.divergence, args.gamma, args.alpha_learning_rate, args.bandwidth = divergence, 0.0, 0.1, 20.0
    args.hidden_dims, args.actor_learning_rate, args.critic_learning_rate = (16, 16), 1e-2, 1e-2
    generator = torch.Generator().manual_seed(0)
    actions = 0.4 * torch.rand(256, 1, generator=generator)
    batch = random_batch(256, action_dim=1)._replace(actions=actions, rewards=actions[:, 0])
    means = []
    for args.threshold in ({"mmd": 0.07, "kl": 0.1}[divergence], 1000.0):
        torch.manual_seed(0)
        learner = bear.build(3, 1, args, CPU, Adam)
        for step in range(1, 201):
            metrics = bear.update(learner, batch, step, args)
        means.append(learner.actor(batch.observations).mean().item())
    assert 0.1 < means[0] < 0.5 and means[1] > means[0] + 0.2, (means, metrics)
