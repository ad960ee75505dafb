"""Diffusion-QL's losses against NumPy on small numbers, what each may touch, how it samples, and what it takes."""

import copy
import re
from unittest import mock

import diffusion_ql
import numpy as np
import pytest
import torch
from conftest import (
    SHORT,
    assert_each_trains_its_own,
    assert_one_line,
    level,
    lower,
    networks_of,
    random_batch,
    run_script,
)

from common.optim import Adam

CPU = torch.device("cpu")


@pytest.fixture
def args():
    few = {"diffusion_steps": 3, "num_target_actions": 2, "num_acting_actions": 7}
    return diffusion_ql.Args(hidden_dims=(5, 4), eta=0.7, gamma=0.9, **few)


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    learner = diffusion_ql.build(3, 2, args, CPU, Adam)
    with torch.no_grad():  # so that the targets differ from what they follow
        for module in (learner.actor.target_critic, learner.target_diffusion):
            for parameter in module.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
    return learner


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def numpy_mish(x):
    return x * np.tanh(np.log1p(np.exp(x)))


def numpy_network(net, x):
    for index, layer in enumerate(layer for layer in net if isinstance(layer, torch.nn.Linear)):
        x = numpy_mish(x) if index else x
        x = x @ layer.weight.detach().numpy().astype(np.float64).T + layer.bias.detach().numpy()
    return x


def numpy_twins(critic, observations, actions):
    """Q_1 and Q_2, [2, batch], each twin as a network of its own."""
    values = []
    for twin in range(2):
        x = np.concatenate([observations, actions], axis=1).astype(np.float64)
        for index, layer in enumerate(critic.layers):
            x = numpy_mish(x) if index else x
            x = x @ layer.weight[twin].detach().numpy() + layer.bias[twin].detach().numpy()
        values.append(x[:, 0])
    return np.stack(values)


def numpy_noise(diffusion, observations, x, times):
    """eps(s, x, t), [batch, action_dim], at `times` [batch] that count from 0."""
    angles = times[:, None] * 10_000.0 ** (-np.arange(8) / 7)
    embedded = numpy_network(diffusion.time_net, np.concatenate([np.sin(angles), np.cos(angles)], axis=1))
    return numpy_network(diffusion.net, np.concatenate([observations, x, embedded], axis=1))


def numpy_alpha(steps):
    """The authors' schedule."""
    return np.exp(-0.1 / steps - 0.5 * (10 - 0.1) * (2 * np.arange(1, steps + 1) - 1) / steps**2)


def numpy_sample(diffusion, observations, noise):
    """An action; x on the way by Bayes's rule, from where it was before this step's noise and what became of it."""
    steps = len(noise)
    alpha, x = numpy_alpha(steps), noise[0].astype(np.float64)
    alpha_bar = np.concatenate([[1], np.cumprod(alpha)])
    for t in range(steps, 0, -1):
        found = numpy_noise(diffusion, observations, x, np.full(len(x), t - 1))
        estimate = np.clip((x - np.sqrt(1 - alpha_bar[t]) * found) / np.sqrt(alpha_bar[t]), -1, 1)
        if t == 1:
            return estimate
        variance = 1 / (1 / (1 - alpha_bar[t - 1]) + alpha[t - 1] / (1 - alpha[t - 1]))
        mean = np.sqrt(alpha_bar[t - 1]) * estimate / (1 - alpha_bar[t - 1])
        mean += np.sqrt(alpha[t - 1]) * x / (1 - alpha[t - 1])
        x = variance * mean + np.sqrt(variance) * noise[t - 1]


# --- Losses ---


def test_mish_is_that_of_pytorch():
    """Values and slopes, far out, too: where e^x would be infinite, and where it is almost 0."""
    x = torch.cat([torch.linspace(-40, 40, 801), torch.tensor([-1e4, 1e4])]).double().requires_grad_()
    ours, theirs = diffusion_ql.mish(x), torch.nn.functional.mish(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)
    slopes = (torch.autograd.grad(y.sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-15)
    single = diffusion_ql.mish(x.detach().float())
    torch.testing.assert_close(single.double(), theirs, rtol=1e-5, atol=1e-12)


def test_diffusion_loss(learner):
    batch, noise, times = random_batch(), normal(8, 2), torch.arange(8) % 3
    loss, _ = diffusion_ql.diffusion_loss(learner.actor.diffusion, batch, noise, times)
    alpha_bar, z = np.cumprod(numpy_alpha(3))[times.numpy(), None], noise.numpy()
    x = np.sqrt(alpha_bar) * batch.actions.numpy() + np.sqrt(1 - alpha_bar) * z
    found = numpy_noise(learner.actor.diffusion, batch.observations.numpy(), x, times.numpy())
    assert loss.item() == pytest.approx(np.mean((found - z) ** 2), rel=1e-4)


@pytest.mark.parametrize("num_target_actions", [1, 5])
def test_critic_loss(learner, args, num_target_actions):
    batch, noise, target_critic = random_batch(), normal(3, num_target_actions, 8, 2), learner.actor.target_critic
    level(target_critic, batch.next_observations)
    loss, _ = diffusion_ql.critic_loss(learner, batch, noise, args)
    next_observations, next_qs = batch.next_observations.numpy(), []
    for z in noise.unbind(1):
        next_actions = numpy_sample(learner.target_diffusion, next_observations, z.numpy())
        next_qs.append(numpy_twins(target_critic, next_observations, next_actions))
    next_q = np.max(next_qs, axis=0).min(axis=0)
    assert num_target_actions == 1 or not np.allclose(next_q, np.min(next_qs, axis=1).max(axis=0))
    target = batch.rewards.numpy() + 0.9 * np.where(batch.terminations.numpy() == 1, 0, next_q)
    q = numpy_twins(learner.critic, batch.observations.numpy(), batch.actions.numpy())
    assert loss.item() == pytest.approx(((q - target) ** 2).mean(axis=1).sum(), rel=1e-4)


@pytest.mark.parametrize("swapped", [False, True])
def test_actor_loss(learner, args, swapped):
    batch, noise = random_batch(), normal(3, 8, 2)
    with torch.no_grad():  # so that the mean of |Q| is not |the mean of Q|
        first = learner.critic(batch.observations, learner.actor.diffusion.sample(batch.observations, noise))
        learner.critic.layers[-1].bias.sub_(first.median(dim=1).values[:, None, None])
    loss, metrics = diffusion_ql.actor_loss(learner, batch, noise, torch.tensor(swapped), args)
    observations = batch.observations.numpy()
    actions = numpy_sample(learner.actor.diffusion, observations, noise.numpy())
    q = numpy_twins(learner.critic, observations, actions)
    assert ((q > 0).any(axis=1) & (q < 0).any(axis=1)).all()
    i, j = (1, 0) if swapped else (0, 1)
    assert loss.item() == pytest.approx(-0.7 * np.mean(q[i]) / np.mean(np.abs(q[j])), rel=1e-4, abs=1e-6)
    assert metrics["actor/q"].item() == pytest.approx(np.mean(q), rel=1e-4, abs=1e-6)


def test_the_gradient_of_q_passes_through_every_step(learner, args):
    """Against differences of -eta E[Q_1] / E|Q_2| whose denominator stays: it is a constant of the loss."""
    learner.actor.double(), learner.critic.double()
    batch = diffusion_ql.Batch(*(column.double() for column in random_batch()))
    noise, diffusion = normal(3, 8, 2).double().requires_grad_(), learner.actor.diffusion
    weight = diffusion.net[0].weight
    loss = diffusion_ql.actor_loss(learner, batch, noise, torch.tensor(False), args)[0]
    to_weight, to_noise = torch.autograd.grad(loss, [weight, noise])
    assert (to_noise.abs().sum(dim=(1, 2)) > 1e-6).all()  # the first to enter is 0

    def twins():
        return learner.critic(batch.observations, diffusion.sample(batch.observations, noise)).mean(dim=1)

    with torch.no_grad():
        scale, differences = learner.critic(batch.observations, diffusion.sample(batch.observations, noise))[1], []
        for step in (1e-6, -1e-6):
            weight[1, 4] += step
            differences.append(-0.7 * twins()[0].item() / scale.abs().mean().item())
            weight[1, 4] -= step
    assert abs(to_weight[1, 4].item()) > 1e-6
    assert (differences[0] - differences[1]) / 2e-6 == pytest.approx(to_weight[1, 4].item(), rel=1e-4)


def test_the_actors_gradient_is_independent_of_the_scale_of_q(learner, args):
    batch, noise, last = random_batch(), normal(3, 8, 2), learner.critic.layers[-1]
    parameters, gradients = list(learner.actor.diffusion.parameters()), []
    for _ in range(2):
        loss = diffusion_ql.actor_loss(learner, batch, noise, torch.tensor(True), args)[0]
        gradients.append(torch.autograd.grad(loss, parameters))
        with torch.no_grad():
            last.weight.mul_(10), last.bias.mul_(10)
    assert gradients[0][0].abs().max() > 1e-4
    torch.testing.assert_close(*gradients)


def test_termination_ends_the_target_and_truncation_does_not(learner, args):
    batch = random_batch()._replace(rewards=torch.zeros(8))
    with torch.no_grad():
        learner.actor.target_critic.layers[-1].bias.fill_(1000.0)
    for terminated, expected in ((1.0, 0.0), (0.0, 900.0)):  # a truncated step is stored as not terminated
        step = batch._replace(terminations=torch.full((8,), terminated))
        _, metrics = diffusion_ql.critic_loss(learner, step, normal(3, 2, 8, 2), args)
        assert metrics["critic/target"].item() == pytest.approx(expected, abs=20)


# --- Update ---


def test_each_loss_trains_its_own_network_only(learner, args):
    batch, noise, times, swapped = random_batch(), normal(10, 8, 2), torch.arange(8) % 3, torch.tensor(True)
    losses = {
        "diffusion by imitation": diffusion_ql.diffusion_loss(learner.actor.diffusion, batch, noise[0], times)[0],
        "diffusion by value": diffusion_ql.actor_loss(learner, batch, noise[1:4], swapped, args)[0],
        "critic": diffusion_ql.critic_loss(learner, batch, noise[4:].view(3, 2, 8, 2), args)[0],
    }
    networks = networks_of(learner, "critic") | networks_of(learner.actor, "diffusion")
    assert_each_trains_its_own(losses, networks)
    total = diffusion_ql.total_loss(learner, batch, noise, times, swapped, args)[0]
    assert total.item() == pytest.approx(sum(loss.item() for loss in losses.values()), rel=1e-5)
    targets = *learner.actor.target_critic.parameters(), *learner.target_diffusion.parameters()
    assert not any(parameter.requires_grad for parameter in targets)


def test_update_moves_every_network_and_the_targets_follow(learner, args):
    before = copy.deepcopy(learner)
    diffusion_ql.update(learner, random_batch(), 1, args)
    for old, new in ((before.actor.diffusion, learner.actor.diffusion), (before.critic, learner.critic)):
        assert not any(map(torch.equal, old.parameters(), new.parameters()))
    critics = before.actor.target_critic, learner.actor.target_critic, learner.critic
    models = before.target_diffusion, learner.target_diffusion, learner.actor.diffusion
    for networks, tau in ((critics, 0.005), (models, 0.001)):
        for start, end, followed in zip(*(network.parameters() for network in networks), strict=True):
            torch.testing.assert_close(end, start + tau * (followed - start))


def test_each_row_has_a_time_of_its_own(learner, args, monkeypatch):
    seen, total_loss = [], diffusion_ql.total_loss
    monkeypatch.setattr(diffusion_ql, "total_loss", lambda *given: (seen.append(given[3]), total_loss(*given))[1])
    diffusion_ql.update(learner, random_batch(300), 1, args)
    assert all(70 < count < 130 for count in seen[0].bincount(minlength=3))


def test_targets_start_as_what_they_follow(args):
    learner = diffusion_ql.build(3, 2, args, CPU)
    assert all(map(torch.equal, learner.actor.target_critic.parameters(), learner.critic.parameters()))
    assert all(map(torch.equal, learner.target_diffusion.parameters(), learner.actor.diffusion.parameters()))


def test_each_network_has_its_learning_rate(args):
    args.actor_learning_rate, args.critic_learning_rate = 1e-3, 2e-3
    learner = diffusion_ql.build(3, 2, args, CPU)
    rates = {weight: group["lr"] for group in learner.optimizer.param_groups for weight in group["params"]}
    for network, rate in ((learner.actor.diffusion, 1e-3), (learner.critic, 2e-3)):
        assert {rates.pop(weight) for weight in network.parameters()} == {rate}
    assert not rates


def test_either_twin_is_maximised_as_often(learner, args, monkeypatch):
    loss, swaps = diffusion_ql.total_loss, []
    monkeypatch.setattr(diffusion_ql, "total_loss", lambda *rest: swaps.append(rest[4].item()) or loss(*rest))
    torch.manual_seed(0)
    for step in range(1, 31):
        diffusion_ql.update(learner, random_batch(), step, args)
    assert len(swaps) == 30 and 8 <= sum(swaps) <= 22


def test_gradients_are_shortened_network_by_network(learner, args):
    def length(gradients):
        return float(np.sqrt(sum(gradient.square().sum().item() for gradient in gradients)))

    found, batch = [], random_batch()._replace(rewards=torch.full((8,), 100.0))
    for args.gradient_clip in (1e9, 5.0, 1e-3):
        torch.manual_seed(0)
        copied = copy.deepcopy(learner)._replace(optimizer=mock.Mock())  # which leaves the gradients where they are
        diffusion_ql.update(copied, batch, 1, args)
        networks = copied.actor.diffusion, copied.critic
        found.append([[weight.grad for weight in network.parameters()] for network in networks])
    whole, *shortened = found
    assert 0.01 < length(whole[0]) < 5 < length(whole[1])
    for bound, networks in zip((5, 1e-3), shortened, strict=True):
        for gradients, short in zip(whole, networks, strict=True):
            scale = min(1, bound / length(gradients))
            torch.testing.assert_close(short, [gradient * scale for gradient in gradients], rtol=1e-4, atol=1e-7)


# --- Acting ---


def test_a_sample_is_the_last_estimate_of_the_action(learner):
    with torch.no_grad():  # so that some leave the range
        learner.actor.diffusion.net[-1].weight.mul_(5)
    observations, noise = normal(30, 3), normal(3, 30, 2)
    expected = numpy_sample(learner.actor.diffusion, observations.numpy(), noise.numpy())
    assert 0 < np.mean(np.abs(expected) == 1) < 1
    samples = learner.actor.diffusion.sample(observations, noise).detach().numpy()
    np.testing.assert_allclose(samples, expected, atol=1e-5)


def test_acting_takes_the_sample_of_highest_target_q(learner):
    level(learner.actor.target_critic)
    observations = normal(50, 3)
    actions = learner.actor(observations).detach()
    samples, q = [], []
    for noise in learner.actor.noise.expand(3, 7, 50, 2).unbind(1):
        samples.append(numpy_sample(learner.actor.diffusion, observations.numpy(), noise.numpy()))
        q.append(lower(numpy_twins(learner.actor.target_critic, observations.numpy(), samples[-1])))
    best = np.argmax(q, axis=0)
    assert len(set(best)) > 1
    np.testing.assert_allclose(actions.numpy(), np.array(samples)[best, np.arange(50)], atol=1e-5)


def test_acting_is_a_function_of_the_observation(learner, args):
    """The noise is drawn at the start, from the seed; training leaves it alone."""
    observations, noise = normal(20, 3), learner.actor.noise.clone()
    first = learner.actor(observations)
    torch.randn(100)
    assert torch.equal(first, learner.actor(observations))
    assert noise.shape == (3, 7, 1, 2) and noise.unique().numel() == 42
    diffusion_ql.update(learner, random_batch(), 1, args)
    assert torch.equal(noise, learner.actor.noise)
    assert not torch.equal(first, learner.actor(observations))
    for seed, same in ((0, True), (1, False)):
        torch.manual_seed(seed)
        assert torch.equal(diffusion_ql.build(3, 2, args, CPU, Adam).actor.noise, noise) == same


def test_takes_the_better_of_two_modes_and_not_their_average():
    """The data act near -0.5 or, less often, near 0.5; the more the better."""
    torch.manual_seed(0)
    rates = {"actor_learning_rate": 3e-3, "critic_learning_rate": 3e-3, "tau": 0.05}
    args = diffusion_ql.Args(hidden_dims=(32, 32), eta=0.3, num_acting_actions=10, **rates)
    learner = diffusion_ql.build(1, 1, args, CPU, Adam)
    states, mode = torch.randn(4096, 1), torch.where(torch.rand(4096, 1) < 0.3, 0.5, -0.5)
    actions = mode + 0.2 * torch.rand(4096, 1) - 0.1
    data = diffusion_ql.Batch(states, actions, 2 + actions[:, 0], states, torch.ones(4096))
    for step in range(1, 301):
        rows = torch.randint(4096, (64,))
        diffusion_ql.update(learner, diffusion_ql.Batch(*(column[rows] for column in data)), step, args)
    with torch.no_grad():
        samples, chosen = learner.actor.diffusion.sample(states, torch.randn(5, 4096, 1)), learner.actor(states)
    assert actions.mean() < -0.1
    assert (samples > 0.25).float().mean() > 0.1 and (samples < -0.25).float().mean() > 0.1
    assert ((chosen > 0.3) & (chosen < 0.9)).float().mean() > 0.95, chosen.aminmax()


# --- Two modes ---

MODE, WIDTH = 0.5, 0.05  # the data's actions are Normal(-MODE, WIDTH) or Normal(MODE, WIDTH), as often


def expected_action(x, scale, variance):
    """E[ a | x ], where x = scale a + Normal(0, variance): what a perfect network knows."""
    modes, total = np.array([-MODE, MODE]), scale**2 * WIDTH**2 + variance
    logits = -((x[:, None] - scale * modes) ** 2) / (2 * total)
    weight = np.exp(logits - logits.max(axis=1, keepdims=True))
    given = modes + WIDTH**2 * scale / total * (x[:, None] - scale * modes)
    return np.sum(weight * given, axis=1) / weight.sum(axis=1)


@pytest.mark.parametrize(("steps", "share"), [(5, 0.35), (10, 0.095), (20, 0.008)])
def test_how_far_a_perfect_network_keeps_modes_apart(monkeypatch, steps, share):
    """The share of samples nearer to 0 than to either mode: algorithms/README.md's claim."""
    diffusion = diffusion_ql.Diffusion(1, 1, diffusion_ql.HyperParameters(diffusion_steps=steps))

    def noise_in(_, x, t):
        values, scale = x[:, 0].double().numpy(), diffusion.sqrt_alpha_bar[t].item()
        std = diffusion.sqrt_one_minus_alpha_bar[t].item()
        return torch.from_numpy((values - scale * expected_action(values, scale, std**2)) / std)[:, None]

    monkeypatch.setattr(diffusion, "forward", noise_in)
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(steps, 40_000, 1)))
    samples = diffusion.sample(noise[0], noise).numpy()
    assert np.mean(np.abs(samples) < MODE / 2) == pytest.approx(share, abs=0.01)


def test_bad_arguments():
    for flag, value, rule in (
        ("--eta", "-1.0", "must not be negative"),
        ("--actor-tau", "2.0", "must be in (0, 1]"),
        ("--gradient-clip", "0.0", "must be positive"),
    ):
        assert_one_line(run_script("diffusion_ql", flag, value, *SHORT), re.escape(f"{flag} {value}: {rule}"))
