"""BEAR's losses against NumPy on small numbers, MMD by hand, the warm start, and what each loss may touch."""

import copy
import math

import bear
import numpy as np
import pytest
import torch
from conftest import assert_each_trains_its_own, level, lower, numpy_mlp, numpy_twins, random_batch

from common.command_line import BadInput
from common.evaluation import Policy, load_policy
from common.optim import Adam, compiled

CPU = torch.device("cpu")


@pytest.fixture
def args():
    return bear.Args(
        hidden_dims=(6, 5),
        vae_hidden_dims=(5, 4),
        num_samples=3,
        num_target_actions=4,
        num_acting_actions=7,
        bandwidth=0.7,
        gamma=0.9,
    )


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    learner = bear.build(3, 2, args, CPU, Adam)
    with torch.no_grad():  # so that the target differs from what it follows, policy from VAE, and alpha from 1
        for module in (learner.target_critic, learner.actor.policy, learner.decoder):
            for parameter in module.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))
        learner.actor.policy.log_std.bias.copy_(torch.tensor([-5.0, 2.0]))  # rows on either side of each end
        learner.alpha.log.fill_(math.log(0.3))
    level(learner.actor.critic)
    level(learner.target_critic)
    return learner


def distance(pair):
    return (pair[0] - pair[1]).abs().max().item()


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parts(learner):
    """The weights that each of the four losses trains."""
    vae = [*learner.encoder.parameters(), *learner.decoder.parameters()]
    actor, critic = list(learner.actor.policy.parameters()), list(learner.actor.critic.parameters())
    return {"vae": vae, "critic": critic, "actor": actor, "alpha": list(learner.alpha.parameters())}


def numpy_policy(policy, observations, noise):
    """u = mean + std noise, the action before tanh."""
    hidden = np.maximum(numpy_mlp(policy.trunk, observations), 0)  # numpy_mlp has none after its last layer
    mean, log_std = (
        hidden @ head.weight.detach().numpy().T + head.bias.detach().numpy() for head in (policy.mean, policy.log_std)
    )
    return mean + np.exp(np.clip(log_std, -5, 2)) * np.asarray(noise)


def numpy_network(network, observations, inputs):
    """Of encoder or decoder."""
    return numpy_mlp(network.net, np.concatenate([observations, inputs], axis=1))


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


# --- MMD ---


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


def test_mmd_has_a_gradient_where_all_samples_are_the_same(args):
    x = torch.zeros(3, 1, 2, requires_grad=True)
    bear.mmd(x, torch.zeros(3, 1, 2), args).sum().backward()
    assert x.grad.isfinite().all()


# --- Losses ---


def test_vae_loss(learner, args):
    batch, noise = random_batch(), normal(8, 4)
    with torch.no_grad():  # so that some of the encoder's deviations are clamped
        learner.encoder.net[-1].bias[4:].sub_(4)
    loss, metrics = bear.vae_loss(learner, batch, noise, args)
    observations, actions = batch.observations.numpy(), batch.actions.numpy()
    encoded = numpy_network(learner.encoder, observations, actions)
    assert (encoded[:, 4:] < -4).any() and (encoded[:, 4:] > -4).any()
    mean, log_std = encoded[:, :4], np.clip(encoded[:, 4:], -4, 15)
    decoded = np.tanh(numpy_network(learner.decoder, observations, mean + np.exp(log_std) * noise.numpy()))
    reconstruction = np.mean((decoded - actions) ** 2)
    variance = np.exp(2 * log_std)
    kl = np.mean(0.5 * (variance + mean**2 - 1 - np.log(variance)))
    assert metrics["vae/reconstruction"].item() == pytest.approx(reconstruction, rel=1e-5)
    assert metrics["vae/kl"].item() == pytest.approx(kl, rel=1e-5)
    assert loss.item() == pytest.approx(reconstruction + 0.5 * kl, rel=1e-5)


def test_critic_loss(learner, args):
    batch, noise = random_batch(), normal(4, 8, 2)
    next_observations = batch.next_observations.numpy()
    values = []
    for sample in noise:
        actions = np.tanh(numpy_policy(learner.actor.policy, next_observations, sample))
        q = numpy_twins(learner.target_critic, next_observations, actions)
        values.append(0.75 * lower(q) + 0.25 * q.max(axis=0))
    assert len(set(np.argmax(values, axis=0))) > 1  # no sample is the best for every state
    next_q = np.max(values, axis=0)
    target = batch.rewards.numpy() + 0.9 * np.where(batch.terminations.numpy() == 1, 0, next_q)
    q = numpy_twins(learner.actor.critic, batch.observations.numpy(), batch.actions.numpy())
    loss, _ = bear.critic_loss(learner, batch, noise, args)
    assert loss.item() == pytest.approx(((q - target) ** 2).mean(axis=1).sum(), rel=1e-4)


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize(("noise_clip", "largest"), [(math.inf, 100), (0.5, 0.5)])
def test_actor_loss(learner, args, warm, noise_clip, largest):
    args.threshold, args.noise_clip = 0.7, noise_clip
    batch, latents, noise = random_batch(), normal(3, 8, 4), normal(3, 8, 2, seed=2)
    observations = batch.observations.numpy()
    clipped = np.clip(latents.numpy(), -0.5, 0.5)
    v = np.stack([numpy_network(learner.decoder, observations, sample) for sample in clipped])
    u = numpy_policy(learner.actor.policy, observations, np.clip(noise.numpy(), -largest, largest))
    mmd = np.mean([numpy_mmd(u[:, state], v[:, state], "laplacian", 0.7) for state in range(8)])
    q = numpy_twins(learner.actor.critic, observations, np.tanh(u[0]))
    loss, metrics = bear.actor_loss(learner, batch, latents, noise, warm, args)
    assert metrics["actor/mmd"].item() == pytest.approx(mmd, rel=1e-4)
    loss_pi = 0.3 * mmd - (0 if warm else lower(q).mean())
    assert metrics["actor/loss"].item() == pytest.approx(loss_pi, rel=1e-4)
    assert loss.item() == pytest.approx(loss_pi - 0.3 * (mmd - 0.7), rel=1e-4)


def test_termination_ends_the_target_and_truncation_does_not(learner, args):
    batch = random_batch()._replace(rewards=torch.zeros(8))
    with torch.no_grad():
        learner.target_critic.layers[-1].bias.fill_(1000.0)
    for terminated, expected in ((1.0, 0.0), (0.0, 900.0)):  # a truncated step is stored as not terminated
        step = batch._replace(terminations=torch.full((8,), terminated))
        _, metrics = bear.critic_loss(learner, step, normal(4, 8, 2), args)
        assert metrics["critic/target"].item() == pytest.approx(expected, abs=20)


# --- Update ---


@pytest.mark.parametrize("warm", [True, False])
def test_each_loss_trains_its_own_network_only(learner, args, warm):
    batch, latents, noise = random_batch(), normal(4, 8, 4), normal(7, 8, 2)
    losses = {
        "vae": bear.vae_loss(learner, batch, latents[0], args)[0],
        "actor alpha": bear.actor_loss(learner, batch, latents[1:], noise[:3], warm, args)[0],
        "critic": bear.critic_loss(learner, batch, noise[3:], args)[0],
    }
    assert_each_trains_its_own(losses, parts(learner))
    total, _ = bear.total_loss(learner, batch, latents, noise, warm, args)
    weights = [weight for part in parts(learner).values() for weight in part]
    found, expected = (torch.autograd.grad(loss, weights, retain_graph=True) for loss in (total, sum(losses.values())))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_q_moves_the_policy_after_the_warm_start_only(learner, args):
    """Without a price of the MMD nothing else moves it; the critic learns from the first update on."""
    args.warm_start = 3
    with torch.no_grad():
        learner.alpha.log.fill_(-100.0)  # brought to -5 by the first update
    for step in range(1, 5):
        before = copy.deepcopy(learner)
        with torch.no_grad():
            learner.alpha.log.fill_(-100.0)
        metrics = bear.update(learner, random_batch(), step, args)
        moved = {
            name: max(map(distance, zip(parts(before)[name], weights, strict=True)))
            for name, weights in parts(learner).items()
        }
        assert moved["critic"] > 1e-5 and moved["vae"] > 1e-5
        assert (moved["actor"] > 1e-5) == (step == 4) == ("actor/q" in metrics)


@pytest.mark.parametrize(("threshold", "rises"), [(0.0, True), (100.0, False)])
def test_alpha_rises_while_the_mmd_is_too_large(learner, args, threshold, rises):
    """Also in the warm start. Adam's first step is as long as the rate."""
    args.threshold, before = threshold, learner.alpha.log.item()
    bear.update(learner, random_batch(), 1, args)
    assert learner.alpha.log.item() == pytest.approx(before + (1e-3 if rises else -1e-3), rel=1e-4)


@pytest.mark.parametrize(
    ("threshold", "start", "bound"), [(0.0, 9.9999, 10.0), (0.0, 4.5999, 4.6), (100.0, -4.9999, -5.0)]
)
def test_alpha_stays_in_the_authors_range(learner, args, threshold, start, bound):
    args.threshold, args.log_alpha_max = threshold, max(bound, 0)
    with torch.no_grad():
        learner.alpha.log.fill_(start)
    bear.update(learner, random_batch(), 1, args)
    assert learner.alpha.log.item() == pytest.approx(bound, abs=1e-6)


def test_update_moves_every_network_and_the_target_follows(learner, args):
    before = copy.deepcopy(learner)
    bear.update(learner, random_batch(), 1, args)
    for name, weights in parts(learner).items():
        assert not any(torch.equal(old, new) for old, new in zip(parts(before)[name], weights, strict=True)), name
    networks = before.target_critic, learner.target_critic, learner.actor.critic
    for old, new, followed in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(new, old + args.tau * (followed - old))


@pytest.mark.slow
def test_compiled_updates_equal_eager_ones_across_the_end_of_the_warm_start(args):
    torch.set_default_dtype(torch.float64)
    try:
        finals = []
        for args.compile in (False, True):
            args.warm_start = 4
            torch.manual_seed(0)
            learner = bear.build(3, 2, args, CPU, Adam)
            train = compiled(bear.update, learner, args)
            batch = bear.Batch(*(column.double() for column in random_batch()))
            metrics = [train(learner, batch, step, args) for step in range(1, 13)]
            assert ["actor/q" in row for row in metrics] == [False] * 4 + [True] * 8
            finals.append([weight.detach().clone() for weights in parts(learner).values() for weight in weights])
    finally:
        torch.set_default_dtype(torch.float32)
    for eager, graph in zip(*finals, strict=True):
        torch.testing.assert_close(eager, graph, atol=1e-9, rtol=1e-7)


# --- Policy ---


def test_acting_takes_the_candidate_of_highest_q1(learner):
    observations = normal(50, 3)
    actions = learner.actor(observations).detach()
    assert actions.abs().max() <= 1
    candidates, q = [], []
    for noise in learner.actor.noise.squeeze(1):
        candidates.append(np.tanh(numpy_policy(learner.actor.policy, observations.numpy(), noise)))
        q.append(numpy_twins(learner.actor.critic, observations.numpy(), candidates[-1]))
    best = np.argmax(np.array(q)[:, 0], axis=0)
    assert len(set(best)) > 1 and (best != np.argmax(np.min(q, axis=1), axis=0)).any()  # of Q_1, not of the lower
    np.testing.assert_allclose(actions.numpy(), np.array(candidates)[best, np.arange(50)], atol=1e-5)


def test_one_candidate_is_the_mean(args):
    args.num_acting_actions = 1
    actor, observations = bear.build(3, 2, args, CPU, Adam).actor, normal(50, 3)
    mean = np.tanh(numpy_policy(actor.policy, observations.numpy(), np.zeros((50, 2))))
    np.testing.assert_allclose(actor(observations).detach().numpy(), mean, atol=1e-6)


def test_acting_is_a_function_of_the_observation(learner, args):
    """The noise is drawn at the start, from the seed; training leaves it alone."""
    observations, noise = normal(20, 3), learner.actor.noise.clone()
    first = learner.actor(observations)
    torch.randn(100)
    assert torch.equal(first, learner.actor(observations))
    assert noise.shape == (7, 1, 2) and noise.unique().numel() == 13  # zero twice: the mean is a candidate
    bear.update(learner, random_batch(), 1, args)
    assert torch.equal(noise, learner.actor.noise)
    torch.manual_seed(0)
    assert torch.equal(bear.build(3, 2, args, CPU, Adam).actor.noise, noise)
    torch.manual_seed(1)
    assert not torch.equal(bear.build(3, 2, args, CPU, Adam).actor.noise, noise)


def test_a_tight_threshold_is_kept_and_a_loose_one_is_not_needed(args):
    """Rewards grow with the action, of which the data has a narrow band: only the threshold holds the actor to it."""
    args.gamma, args.alpha_learning_rate, args.bandwidth, args.warm_start = 0.0, 0.1, 20.0, 50
    args.hidden_dims = args.vae_hidden_dims = 16, 16
    args.actor_learning_rate = args.critic_learning_rate = args.vae_learning_rate = 1e-2
    generator = torch.Generator().manual_seed(0)
    actions = 0.4 * torch.rand(256, 1, generator=generator)
    batch = random_batch(256, action_dim=1)._replace(actions=actions, rewards=actions[:, 0])
    means = []
    for args.threshold in (0.05, 1000.0):
        torch.manual_seed(0)
        learner = bear.build(3, 1, args, CPU, Adam)
        for step in range(1, 251):
            metrics = bear.update(learner, batch, step, args)
        means.append(learner.actor(batch.observations).mean().item())
    assert 0.1 < means[0] < 0.5 and means[1] > means[0] + 0.2, (means, metrics)


def test_load_policy_equals_the_evaluated_policy(learner, args, tmp_path):
    for step in range(1, 11):
        bear.update(learner, random_batch(), step, args)
    bounds = np.array([[-2.0, -1.0], [2.0, 3.0]], np.float32)
    normalization, origin = torch.tensor([[0.5, 0.0, 1.0], [1.0, 2.0, 3.0]]), {"script": "bear"}
    policy = Policy(learner.actor, normalization, bounds, False, origin | {"hyper_parameters": vars(args)})
    with (tmp_path / "policy.pt").open("wb") as file:
        policy.save(file)
    observations = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    np.testing.assert_array_equal(load_policy(tmp_path)(observations), policy(observations))


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("bandwidth", 0.0, "must be positive"),
        ("num_samples", 1, "must be at least 2"),
        ("threshold", -0.1, "must not be negative"),
        ("log_alpha_max", -5.0, "must be more than -5"),
        ("noise_clip", 0.0, "must be positive"),
        ("warm_start", -1, "must be at least 0"),
        ("q_mix", 1.1, "must be in"),
        ("latent_clip", 0.0, "must be positive"),
        ("kl_weight", -1.0, "must not be negative"),
    ],
)
def test_a_value_out_of_range_is_refused(name, value, rule):
    with pytest.raises(BadInput, match=f"--{name.replace('_', '-')} {value}: {rule}"):
        bear.Args(**{name: value}).validate()
