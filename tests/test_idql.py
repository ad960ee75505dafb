"""IDQL's losses against NumPy on small numbers, what each may touch, how it acts, and a clone with two modes."""

import copy
import inspect

import idql
import iql
import numpy as np
import pytest
import torch
from conftest import assert_each_trains_its_own, level, lower, numpy_mlp, numpy_twins, random_batch

CPU = torch.device("cpu")


@pytest.fixture
def args():
    return idql.Args(hidden_dims=(5, 4), flow_hidden_dims=(6, 5), flow_steps=4, num_acting_actions=7, num_updates=100)


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    learner = idql.build(3, 2, args, CPU)
    with torch.no_grad():  # so that the target differs from what it follows
        for parameter in learner.actor.target_critic.parameters():
            parameter.add_(torch.randn_like(parameter))
    return learner


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def numpy_flow(flow, observations, x):
    """Where Euler's method takes x, [batch, action_dim]."""
    for step in range(flow.steps):
        times = np.full((len(x), 1), step / flow.steps)
        x = x + numpy_mlp(flow.net, np.concatenate([observations, x, times], axis=1)) / flow.steps
    return np.clip(x, -1, 1)


# --- Losses ---


@pytest.mark.parametrize(
    "name", ["mlp", "Value", "EnsembleLinear", "Critic", "advantage", "value_loss", "critic_loss", "cosine_decay"]
)
def test_what_is_iqls_is_iqls_to_the_letter(name):
    """So test_iql.py's calculations in NumPy hold here, too."""
    ours = inspect.getsource(getattr(idql, name)).replace("(IQL, eq.", "(eq.")
    assert ours == inspect.getsource(getattr(iql, name))


def test_flow_loss(learner):
    batch, noise, times = random_batch(), normal(8, 2), torch.linspace(0, 1, 8)[:, None]
    loss, _ = idql.flow_loss(learner.actor.flow, batch, noise, times)
    z, t, a = noise.numpy(), times.numpy(), batch.actions.numpy()
    inputs = np.concatenate([batch.observations.numpy(), z + t * (a - z), t], axis=1)
    expected = np.mean((z + numpy_mlp(learner.actor.flow.net, inputs) - a) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_total_is_of_the_targets_advantage_and_the_three_losses(learner, args):
    batch, noise, times = random_batch(), normal(8, 2), torch.linspace(0, 1, 8)[:, None]
    observations, actions = batch.observations.numpy(), batch.actions.numpy()
    total, metrics = idql.total_loss(learner, batch, noise, times, args)
    value, next_value = (numpy_mlp(learner.value.net, x.numpy())[:, 0] for x in (batch[0], batch.next_observations))
    a = lower(numpy_twins(learner.actor.target_critic, observations, actions)) - value
    loss_v = np.mean(np.abs(0.7 - (a < 0)) * a**2)
    target = batch.rewards.numpy() + 0.99 * np.where(batch.terminations.numpy() == 1, 0, next_value)
    loss_q = np.sum(np.mean((target - numpy_twins(learner.critic, observations, actions)) ** 2, axis=1))
    loss_flow = idql.flow_loss(learner.actor.flow, batch, noise, times)[0].item()
    assert total.item() == pytest.approx(loss_v + loss_q + loss_flow, rel=1e-5)
    assert metrics["value/loss"].item() == pytest.approx(loss_v, rel=1e-5)


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.95])
def test_v_is_the_value_of_the_datas_actions_weighted(expectile):
    """Where L_V is least, V is the mean of Q with the weights |expectile - 1(A < 0)| of the docstring's policy."""
    q, v = torch.tensor([0.0, 1.0, 4.0, 9.0]), torch.zeros(1, requires_grad=True)
    for _ in range(500):
        (gradient,) = torch.autograd.grad(idql.value_loss(q - v, expectile)[0], v)
        v = (v - 0.5 * gradient).detach().requires_grad_()
    weight = np.where(q.numpy() < v.item(), 1 - expectile, expectile)
    assert v.item() == pytest.approx(np.sum(weight * q.numpy()) / np.sum(weight), abs=1e-3)


def test_each_loss_trains_its_own_network_only(learner, args):
    batch = random_batch()
    advantages = idql.advantage(learner.value, learner.actor.target_critic, batch)
    losses = {
        "value": idql.value_loss(advantages, args.expectile)[0],
        "critic": idql.critic_loss(learner.critic, learner.value, batch, args.gamma)[0],
        "flow": idql.flow_loss(learner.actor.flow, batch, normal(8, 2), torch.rand(8, 1))[0],
    }
    networks = {"value": learner.value, "critic": learner.critic, "flow": learner.actor.flow}
    assert_each_trains_its_own(losses, {name: list(network.parameters()) for name, network in networks.items()})
    assert not any(parameter.requires_grad for parameter in learner.actor.target_critic.parameters())


def test_update_moves_every_network_and_the_target_by_tau(learner, args):
    before = copy.deepcopy(learner)
    idql.update(learner, random_batch(), 1, args)
    for old, new in ((before[0].flow, learner[0].flow), (before[1], learner[1]), (before[2], learner[2])):
        assert not any(map(torch.equal, old.parameters(), new.parameters()))
    targets = before.actor.target_critic, learner.actor.target_critic, learner.critic
    for old, new, critic in zip(*(target.parameters() for target in targets), strict=True):
        torch.testing.assert_close(new, old + args.tau * (critic - old))


def test_the_target_starts_as_the_critic(args):
    learner = idql.build(3, 2, args, CPU)
    assert all(map(torch.equal, learner.actor.target_critic.parameters(), learner.critic.parameters()))


# --- Acting ---


def test_samples_follow_the_velocity(learner):
    with torch.no_grad():  # so that some samples leave the range
        learner.actor.flow.net[-1].weight.mul_(5)
    observations, noise = normal(30, 3), normal(30, 2)
    samples = learner.actor.flow.sample(observations, noise).detach().numpy()
    expected = numpy_flow(learner.actor.flow, observations.numpy(), noise.numpy())
    assert 0 < np.mean(np.abs(expected) == 1) < 1
    np.testing.assert_allclose(samples, expected, atol=1e-5)


def test_acting_takes_the_sample_of_highest_target_q(learner):
    level(learner.actor.target_critic)
    observations = normal(50, 3)
    actions = learner.actor(observations).detach()
    samples, q = [], []
    for z in learner.actor.noise.numpy():
        samples.append(numpy_flow(learner.actor.flow, observations.numpy(), np.tile(z, (50, 1))))
        q.append(lower(numpy_twins(learner.actor.target_critic, observations.numpy(), samples[-1])))
    best = np.argmax(q, axis=0)
    assert len(set(best)) > 1
    np.testing.assert_allclose(actions.numpy(), np.array(samples)[best, np.arange(50)], atol=1e-5)


def test_acting_is_a_function_of_the_observation(learner, args):
    """Noise is drawn at the start, from the seed; training leaves it alone."""
    observations, noise = normal(20, 3), learner.actor.noise.clone()
    first = learner.actor(observations)
    torch.randn(100)
    assert torch.equal(first, learner.actor(observations))
    assert noise.shape == (7, 2) and not noise[0].any() and noise[1:].unique().numel() == 12
    idql.update(learner, random_batch(), 1, args)
    assert torch.equal(noise, learner.actor.noise)
    for seed in (0, 1):
        torch.manual_seed(seed)
        assert torch.equal(idql.build(3, 2, args, CPU).actor.noise, noise) == (seed == 0)


# --- Two modes ---

MODE, WIDTH = 0.5, 0.05  # the data's actions are Normal(-MODE, WIDTH) or Normal(MODE, WIDTH), as often


def between(x):
    """The share of samples nearer to 0 than to either mode."""
    return float(np.mean(np.abs(np.asarray(x)) < MODE / 2))


def test_the_clone_has_two_modes_and_a_gaussian_cannot():
    torch.manual_seed(0)
    args = idql.Args(hidden_dims=(4,), flow_hidden_dims=(64, 64), actor_learning_rate=3e-3)
    learner, num_updates = idql.build(1, 1, args, CPU), 800
    for step in range(1, num_updates + 1):
        rate = args.actor_learning_rate * idql.cosine_decay(step, num_updates)
        learner.optimizer.param_groups[0]["lr"] = rate
        s, side = torch.randn(256, 1), torch.randint(2, (256, 1)) * 2 - 1
        actions = MODE * side + WIDTH * torch.randn(256, 1)
        idql.update(learner, idql.Batch(s, actions, torch.zeros(256), s, torch.ones(256)), step, args)
    with torch.no_grad():
        samples = learner.actor.flow.sample(torch.randn(4000, 1), torch.randn(4000, 1))[:, 0].numpy()
    gaussian = np.random.default_rng(0).normal(0, MODE, 4000)  # the likeliest one: of the data's mean and deviation
    near = [np.mean(np.abs(samples - mode) < 3 * WIDTH) for mode in (-MODE, MODE)]
    assert min(near) > 0.35 and between(samples) < 0.1
    assert between(gaussian) > 0.35


def expected_action(x, scale, variance):
    """E[ a | x ], where x = scale a + Normal(0, variance): what a perfect network of a flow or a diffusion knows."""
    modes, total = np.array([-MODE, MODE]), scale**2 * WIDTH**2 + variance
    logits = -((x[:, None] - scale * modes) ** 2) / (2 * total)
    weight = np.exp(logits - logits.max(axis=1, keepdims=True))
    given = modes + WIDTH**2 * scale / total * (x[:, None] - scale * modes)
    return np.sum(weight * given, axis=1) / weight.sum(axis=1)


def test_how_far_ten_steps_of_a_flow_and_five_of_a_diffusion_keep_modes_apart(args, monkeypatch):
    """The docstring's claim, of perfect networks: a hundredth and a quarter of the samples are between the modes."""

    def velocity(_, x, times):
        t, values = times[0].item(), x[:, 0].double().numpy()
        difference = expected_action(values, t, (1 - t) ** 2) - values
        return torch.from_numpy(difference / (1 - t))[:, None]

    flow, noise = idql.Flow(1, 1, idql.HyperParameters()), np.random.default_rng(0).normal(size=(6, 40_000))
    monkeypatch.setattr(flow, "forward", velocity)
    start = torch.from_numpy(noise[0])[:, None]
    assert between(flow.sample(start, start)) == pytest.approx(0.01, abs=0.005)

    t = np.arange(1, 6)
    alpha = np.exp(-0.1 / 5 - 0.5 * 9.9 * (2 * t - 1) / 25)  # the authors' schedule, variance-preserving
    kept, x = np.cumprod(alpha), noise[0]
    for k in reversed(range(5)):
        epsilon = (x - np.sqrt(kept[k]) * expected_action(x, np.sqrt(kept[k]), 1 - kept[k])) / np.sqrt(1 - kept[k])
        x = (x - (1 - alpha[k]) / np.sqrt(1 - kept[k]) * epsilon) / np.sqrt(alpha[k])
        x = np.clip(x + (k > 0) * np.sqrt(1 - alpha[k]) * noise[k + 1], -1, 1)
    assert between(x) == pytest.approx(0.25, abs=0.02)
