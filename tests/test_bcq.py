"""BCQ's losses against NumPy on small numbers, what each of them may touch, and a policy that stays in the data."""

import copy

import bcq
import numpy as np
import pytest
import torch
from conftest import level, lower, numpy_twins, random_batch

from common.evaluation import Policy, load_policy
from common.optim import Adam

CPU = torch.device("cpu")


@pytest.fixture
def args():
    return bcq.Args(hidden_dims=(5, 4), vae_hidden_dims=(6, 5), num_target_actions=3, num_acting_actions=7, phi=0.2)


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    learner = bcq.build(3, 2, args, CPU, Adam)
    with torch.no_grad():  # so that the targets differ from what they follow
        for module in (learner.target_perturbation, learner.target_critic):
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
    level(learner.actor.critic)
    return learner


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def numpy_network(network, observations, inputs):
    """The layers of a single network without torch: ReLU between them, none after the last."""
    x = np.concatenate([observations, inputs], axis=1).astype(np.float64)
    for index, layer in enumerate(layer for layer in network.net if isinstance(layer, torch.nn.Linear)):
        x = np.maximum(x, 0) if index else x
        x = x @ layer.weight.detach().numpy().astype(np.float64).T + layer.bias.detach().numpy()
    return x


def numpy_sample(decoder, perturbation, observations, latents, phi):
    """The action that `latents` [batch, latent_dim] stand for, perturbed."""
    sampled = np.tanh(numpy_network(decoder, observations, latents))
    return np.clip(sampled + phi * np.tanh(numpy_network(perturbation, observations, sampled)), -1, 1)


def scale(network, factor):
    """Larger outputs, which saturate the tanh after them."""
    with torch.no_grad():
        network.net[-2].weight.mul_(factor)  # before the tanh


# --- Losses ---


def test_vae_loss(learner, args):
    batch, noise = random_batch(), normal(8, 4)
    with torch.no_grad():  # so that some of the encoder's deviations are clamped
        learner.encoder.net[-1].bias[4:].sub_(4)
        learner.encoder.net[-1].bias[4].add_(20)
    loss, metrics = bcq.vae_loss(learner, batch, noise, args)
    observations, actions = batch.observations.numpy(), batch.actions.numpy()
    encoded = numpy_network(learner.encoder, observations, actions)
    assert (encoded[:, 4:] < -4).any() and (encoded[:, 4:] > 15).any()
    mean, log_std = encoded[:, :4], np.clip(encoded[:, 4:], -4, 15)
    decoded = np.tanh(numpy_network(learner.actor.decoder, observations, mean + np.exp(log_std) * noise.numpy()))
    reconstruction = np.mean((decoded - actions) ** 2)
    variance = np.exp(2 * log_std)
    kl = np.mean(0.5 * (variance + mean**2 - 1 - np.log(variance)))
    assert metrics["vae/reconstruction"].item() == pytest.approx(reconstruction, rel=1e-5)
    assert metrics["vae/kl"].item() == pytest.approx(kl, rel=1e-5)
    assert loss.item() == pytest.approx(reconstruction + 0.5 * kl, rel=1e-5)


def test_critic_loss(learner, args):
    batch, noise = random_batch(), normal(3, 8, 4)
    loss, _ = bcq.critic_loss(learner, batch, noise, args)
    next_observations = batch.next_observations.numpy()
    values = []
    for latents in np.clip(noise.numpy(), -0.5, 0.5):
        actions = numpy_sample(learner.actor.decoder, learner.target_perturbation, next_observations, latents, 0.2)
        q = numpy_twins(learner.target_critic, next_observations, actions)
        values.append(0.75 * lower(q) + 0.25 * q.max(axis=0))
    next_q = np.max(values, axis=0)
    assert len(set(np.argmax(values, axis=0))) > 1  # no sample is the best for every state
    target = batch.rewards.numpy() + args.gamma * np.where(batch.terminations.numpy() == 1, 0, next_q)
    q = numpy_twins(learner.actor.critic, batch.observations.numpy(), batch.actions.numpy())
    assert loss.item() == pytest.approx(np.mean((q[0] - target) ** 2) + np.mean((q[1] - target) ** 2), rel=1e-5)


def test_actor_loss(learner, args):
    batch, noise = random_batch(), normal(8, 4)
    loss, _ = bcq.actor_loss(learner, batch, noise, args)
    observations, latents = batch.observations.numpy(), np.clip(noise.numpy(), -0.5, 0.5)
    actions = numpy_sample(learner.actor.decoder, learner.actor.perturbation, observations, latents, 0.2)
    q = numpy_twins(learner.actor.critic, observations, actions)
    assert not np.allclose(lower(q), q[0])
    assert loss.item() == pytest.approx(-np.mean(q[0]), rel=1e-5)


def test_termination_ends_the_target_and_truncation_does_not(learner, args):
    batch = random_batch()._replace(rewards=torch.zeros(8))
    with torch.no_grad():
        learner.target_critic.layers[-1].bias.fill_(1000.0)
    for terminated, expected in ((1.0, 0.0), (0.0, 990.0)):  # a truncated step is stored as not terminated
        step = batch._replace(terminations=torch.full((8,), terminated))
        _, metrics = bcq.critic_loss(learner, step, normal(3, 8, 4), args)
        assert metrics["critic/target"].item() == pytest.approx(expected, abs=20)


# --- Update ---


def test_each_loss_trains_its_own_network_only(learner, args):
    """Every gradient of their sum is that of one loss alone."""
    batch, actor, noise = random_batch(), learner.actor, normal(5, 8, 4)
    noises = noise[0], noise[2:], noise[1]
    losses = bcq.vae_loss, bcq.critic_loss, bcq.actor_loss
    trained = [*learner.encoder.parameters(), *actor.decoder.parameters()], actor.critic, actor.perturbation
    groups = [list(group) if isinstance(group, list) else list(group.parameters()) for group in trained]
    expected = [
        torch.autograd.grad(loss(learner, batch, noise, args)[0], group)
        for loss, noise, group in zip(losses, noises, groups, strict=True)
    ]
    bcq.total_loss(learner, batch, noise, args)[0].backward()
    for group, gradients in zip(groups, expected, strict=True):
        assert all(gradient.abs().max() > 0 for gradient in gradients)
        torch.testing.assert_close(tuple(parameter.grad for parameter in group), gradients, rtol=1e-4, atol=0)
    assert sum(map(len, groups)) == sum(len(group["params"]) for group in learner.optimizer.param_groups)


def test_update_moves_every_network_and_targets_follow(learner, args):
    before = copy.deepcopy(learner)
    bcq.update(learner, random_batch(), 1, args)
    for old, new in zip([*before.actor.parameters()], [*learner.actor.parameters()], strict=True):
        assert not torch.equal(old, new)
    for name in ("perturbation", "critic"):
        old, target = getattr(before, f"target_{name}"), getattr(learner, f"target_{name}")
        for start, end, followed in zip(
            old.parameters(), target.parameters(), getattr(learner.actor, name).parameters(), strict=True
        ):
            torch.testing.assert_close(end, start + args.tau * (followed - start))


# --- Acting ---


def test_perturbation_never_exceeds_phi_nor_leaves_the_range(learner):
    scale(learner.actor.perturbation, 100)
    sampled = torch.tensor([-1.0, -0.5, 0.0, 0.9, 1.0]).repeat(200, 2, 1).mT  # [200, 5, 2]
    actions = learner.actor.perturbation(normal(5, 3), sampled)
    shift = (actions - sampled).abs()
    assert 0.19 < shift.max() <= 0.2 + 1e-6
    assert actions.abs().max() == 1  # where the sum would pass the bound, it is at the bound


def test_acting_takes_the_candidate_of_highest_q1(learner):
    scale(learner.actor.decoder, 20)  # candidates that differ
    observations = normal(50, 3)
    actions = learner.actor(observations).detach()
    assert actions.abs().max() <= 1
    candidates, q = [], []
    for latents in learner.actor.latents.expand(50, 7, 4).unbind(dim=1):
        networks = learner.actor.decoder, learner.actor.perturbation
        candidates.append(numpy_sample(*networks, observations.numpy(), latents.numpy(), 0.2))
        q.append(numpy_twins(learner.actor.critic, observations.numpy(), candidates[-1]))
    best = np.argmax(np.array(q)[:, 0], axis=0)
    assert len(set(best)) > 1 and (best != np.argmax(np.min(q, axis=1), axis=0)).any()  # of Q_1, not of the lower
    np.testing.assert_allclose(actions.numpy(), np.array(candidates)[best, np.arange(50)], atol=1e-5)


def test_acting_is_a_function_of_the_observation(learner, args):
    """Latents are drawn at the start, from the seed, within the clip; training leaves them alone."""
    observations, latents = normal(20, 3), learner.actor.latents.clone()
    first = learner.actor(observations)
    torch.randn(100)
    assert torch.equal(first, learner.actor(observations))
    assert latents.shape == (7, 4) and latents.abs().max() == 0.5 and latents.unique().numel() > 7
    bcq.update(learner, random_batch(), 1, args)
    assert torch.equal(latents, learner.actor.latents)
    assert not torch.equal(first, learner.actor(observations))
    torch.manual_seed(0)
    assert torch.equal(bcq.build(3, 2, args, CPU, Adam).actor.latents, latents)
    torch.manual_seed(1)
    assert not torch.equal(bcq.build(3, 2, args, CPU, Adam).actor.latents, latents)


def test_policy_stays_in_the_support_of_the_data():
    """Rewards grow with the action, but the data holds only a narrow band of actions: without perturbation the policy
    takes the better of these, although the critic believes that actions beyond would be better still.
    """
    torch.manual_seed(0)
    args = bcq.Args(hidden_dims=(32, 32), vae_hidden_dims=(32, 32), phi=0.0, kl_weight=0.02, gamma=0.5)
    learner = bcq.build(2, 1, args, CPU, Adam)
    observations = torch.rand(4096, 2) * 2 - 1
    center = 0.5 * observations[:, :1]
    actions = center + torch.rand(4096, 1) * 0.6 - 0.3
    data = bcq.Batch(observations, actions, 10 * actions[:, 0], observations.roll(1, dims=0), torch.zeros(4096))
    for step in range(1, 601):
        rows = torch.randint(4096, (64,))
        bcq.update(learner, bcq.Batch(*(column[rows] for column in data)), step, args)
    with torch.no_grad():
        chosen = learner.actor(observations)
        inside = learner.actor.critic(observations, chosen, twins=1)
        beyond = learner.actor.critic(observations, (chosen + 0.5).clamp(max=1), twins=1)
    assert (chosen - center).abs().max() < 0.3
    assert (chosen - center).mean() > 0.05
    assert (beyond > inside).float().mean() > 0.9


def test_load_policy_equals_the_evaluated_policy(learner, args, tmp_path):
    for step in range(1, 11):
        bcq.update(learner, random_batch(), step, args)
    bounds = np.array([[-2.0, -1.0], [2.0, 3.0]], np.float32)
    normalization, origin = torch.tensor([[0.5, 0.0, 1.0], [1.0, 2.0, 3.0]]), {"script": "bcq"}
    policy = Policy(learner.actor, normalization, bounds, False, origin | {"hyper_parameters": vars(args)})
    with (tmp_path / "policy.pt").open("wb") as file:
        policy.save(file)
    loaded = load_policy(tmp_path)
    for count in (1, 10, 333):
        observations = np.random.default_rng(count).normal(size=(count, 3)).astype(np.float32)
        np.testing.assert_array_equal(loaded(observations), policy(observations))
    assert len(np.unique(policy(observations), axis=0)) > 100
