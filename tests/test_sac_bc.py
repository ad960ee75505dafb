"""SAC+BC's losses against NumPy on small numbers, and what each of them may touch."""

import numpy as np
import pytest
import sac_bc
import torch
from conftest import (
    assert_each_trains_its_own,
    assert_one_line,
    draws,
    lower,
    numpy_mlp,
    numpy_sample,
    numpy_twins,
    random_batch,
    run_script,
    sac_learner,
    sac_networks,
)


@pytest.fixture
def args():
    return sac_bc.Args(hidden_dims=(5, 4), gamma=0.9, alpha=0.4)


@pytest.fixture
def learner(args):
    return sac_learner(sac_bc, args)


def numpy_imitation(learner, batch):
    """By the change of variables: the density of a = tanh(u) is that of u over da/du = 1 - a^2."""
    actor = learner.actor
    hidden = np.maximum(numpy_mlp(actor.trunk, batch.observations.numpy()), 0)
    mean, log_std = (
        hidden @ head.weight.detach().numpy().T + head.bias.detach().numpy() for head in (actor.mean, actor.log_std)
    )
    std = np.exp(np.clip(log_std, -5, 2))
    actions = np.clip(batch.actions.numpy().astype(np.float64), -0.999, 0.999)
    u = np.log((1 + actions) / (1 - actions)) / 2
    log_density = -0.5 * ((u - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi)) - np.log(1 - actions**2)
    return -log_density.sum(axis=1).mean()


def numpy_actor_critic(learner, batch, noise):
    actions, log_prob = numpy_sample(learner.actor, batch.observations.numpy(), noise)
    q = lower(numpy_twins(learner.critic, batch.observations.numpy(), actions))
    return np.mean(0.3 * log_prob - q) / np.mean(np.abs(q))


def at_bounds():
    batch = random_batch()
    batch.actions[0] = torch.tensor([1.0, -1.0])
    return batch


@pytest.mark.parametrize("batch", [random_batch(), at_bounds()], ids=["inside", "at the bounds"])
def test_imitation_loss(learner, batch):
    loss, _ = sac_bc.imitation_loss(*learner.actor.distribution(batch.observations), batch.actions)
    assert loss.item() == pytest.approx(numpy_imitation(learner, batch), rel=1e-4)


def test_actor_and_temperature_losses(learner):
    batch, noise = random_batch(), draws()[0]
    actions, log_prob = learner.actor.sample(batch.observations, noise)
    loss, _ = sac_bc.actor_loss(learner.critic, torch.tensor(0.3), batch.observations, actions, log_prob)
    assert loss.item() == pytest.approx(numpy_actor_critic(learner, batch, noise), rel=1e-4)
    loss, _ = sac_bc.temperature_loss(torch.tensor(0.3), log_prob, target_entropy=-2.0)
    _, expected = numpy_sample(learner.actor, batch.observations.numpy(), noise)
    assert loss.item() == pytest.approx(np.mean(-0.3 * (expected - 2.0)), rel=1e-4)


def test_actor_gradient_treats_lambda_as_a_constant(learner):
    batch, parameters = random_batch(), sac_networks(learner)["actor"]
    actions, log_prob = learner.actor.sample(batch.observations, draws()[0])
    loss, _ = sac_bc.actor_loss(learner.critic, torch.tensor(0.3), batch.observations, actions, log_prob)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    q = learner.critic(batch.observations, actions).min(dim=0).values
    expected = torch.autograd.grad((0.3 * log_prob - q).mean() / q.abs().mean().item(), parameters)
    torch.testing.assert_close(gradients, expected)


def test_alpha_weighs_imitation_and_nothing_else(learner, args):
    """The gradient of the whole, less that without imitation, is alpha times imitation's."""
    batch, noise, everything = random_batch(), draws(), []
    parameters = [*learner.actor.parameters(), *learner.critic.parameters()]
    for args.alpha in (0.0, 0.4):
        loss, _ = sac_bc.total_loss(learner, batch, noise, args)
        everything.append(torch.autograd.grad(loss, parameters))
    imitation, _ = sac_bc.imitation_loss(*learner.actor.distribution(batch.observations), batch.actions)
    alone = torch.autograd.grad(imitation, parameters, allow_unused=True, materialize_grads=True)
    for without, with_it, expected in zip(*everything, alone, strict=True):
        torch.testing.assert_close(with_it - without, 0.4 * expected, atol=1e-5, rtol=1e-4)


def test_each_loss_trains_its_own_network_only(learner, args):
    batch, noise = random_batch(), draws()
    temperature = learner.actor.log_temperature.exp()
    actions, log_prob = learner.actor.sample(batch.observations, noise[1])
    losses = {
        "critic": sac_bc.critic_loss(learner, batch, noise[0], args)[0],
        "actor": sac_bc.actor_loss(learner.critic, temperature, batch.observations, actions, log_prob)[0],
        "temperature": sac_bc.temperature_loss(temperature, log_prob, -2.0)[0],
    }
    assert_each_trains_its_own(losses, sac_networks(learner))
    imitation, _ = sac_bc.imitation_loss(*learner.actor.distribution(batch.observations), batch.actions)
    assert_each_trains_its_own({"actor": imitation}, sac_networks(learner))
    total, _ = sac_bc.total_loss(learner, batch, noise, args)
    assert total.item() == pytest.approx((sum(losses.values()) + args.alpha * imitation).item(), rel=1e-5)


def test_bad_input_is_one_line(tmp_path):
    run = run_script("sac_bc", "--alpha", "-1", "--run-dir", str(tmp_path / "run"))
    assert_one_line(run, "--alpha -1.0: must not be negative")
