"""What SAC and the scripts built on it share, each in its own words: the losses against NumPy on small numbers."""

import importlib

import numpy as np
import pytest
import torch
from conftest import (
    assert_each_trains_its_own,
    draws,
    lower,
    numpy_sample,
    numpy_twins,
    random_batch,
    sac_learner,
    sac_networks,
)

SMALL_MODEL = {"dynamics_hidden_dims": (5,), "num_models": 5, "rollout_batch_size": 10}
ARGS = {
    "sac": {},
    "sac_bc": {"alpha": 0.4},
    "mopo": SMALL_MODEL,
    "combo": {"batch_size": 8, **SMALL_MODEL},
    "mobile": {"penalty_coefficient": 0.0, **SMALL_MODEL},  # whose penalty is of draws of its own
    "morel": SMALL_MODEL,
    "mbpo": SMALL_MODEL,
    "edac": {"num_critics": 4},
    "rlpd": {"num_critics": 4},
}


def script_and_learner(name):
    script = importlib.import_module(name)
    args = script.Args(hidden_dims=(5, 4), gamma=0.9, **ARGS.get(name, {}))
    return script, args, sac_learner(script, args)


@pytest.mark.parametrize(
    ("name", "temperature"),
    [("sac", 0.3), ("mopo", 0.3), ("mobile", 0.0), ("morel", 0.3), ("mbpo", 0.3), ("sac_bc", 0.0)],
)
def test_critic_loss(name, temperature):
    """`temperature` weighs the entropy of the target: MOBILE's and SAC+BC's have none."""
    script, args, learner = script_and_learner(name)
    batch, noise = random_batch(), draws()[0]
    next_observations = batch.next_observations.numpy()
    next_actions, log_prob = numpy_sample(learner.actor, next_observations, noise)
    next_q = lower(numpy_twins(learner.target_critic, next_observations, next_actions)) - temperature * log_prob
    target = batch.rewards.numpy() + 0.9 * np.where(batch.terminations.numpy() == 1, 0, next_q)
    q = numpy_twins(learner.critic, batch.observations.numpy(), batch.actions.numpy())
    loss, metrics = script.critic_loss(learner, batch, noise, args)
    assert loss.item() == pytest.approx(((q - target) ** 2).mean(axis=1).sum(), rel=1e-4)
    assert metrics["critic/target"].item() == pytest.approx(target.mean(), rel=1e-4)


@pytest.mark.parametrize("name", ["sac", "mopo", "combo", "mobile", "morel", "mbpo"])
def test_actor_and_temperature_losses(name):
    script, _, learner = script_and_learner(name)
    batch, noise = random_batch(), draws()[0]
    actions, log_prob = numpy_sample(learner.actor, batch.observations.numpy(), noise)
    q = lower(numpy_twins(learner.critic, batch.observations.numpy(), actions))
    ours = learner.actor.sample(batch.observations, noise)
    loss, _ = script.actor_loss(learner.critic, torch.tensor(0.3), batch.observations, *ours)
    assert loss.item() == pytest.approx(np.mean(0.3 * log_prob - q), rel=1e-4)
    loss, _ = script.temperature_loss(torch.tensor(0.3), ours[1], target_entropy=-2.0)
    assert loss.item() == pytest.approx(np.mean(-0.3 * (log_prob - 2.0)), rel=1e-4)


@pytest.mark.parametrize("name", ["sac", "mopo", "combo", "mobile", "morel", "mbpo", "edac"])
def test_each_loss_trains_its_own_network_only(name):
    script, args, learner = script_and_learner(name)
    batch, noise = random_batch(), draws()
    temperature = learner.actor.log_temperature.exp()
    actions, log_prob = learner.actor.sample(batch.observations, noise[1])
    losses = {
        "critic": script.critic_loss(learner, batch, noise[0], args)[0],
        "actor": script.actor_loss(learner.critic, temperature, batch.observations, actions, log_prob)[0],
        "temperature": script.temperature_loss(temperature, log_prob, -2.0)[0],
    }
    assert_each_trains_its_own(losses, sac_networks(learner))
    total, _ = script.total_loss(learner, batch, noise, args)
    assert total.item() == pytest.approx(sum(losses.values()).item(), rel=1e-5)


@pytest.mark.parametrize("name", ARGS)
def test_the_target_follows(name):
    script, args, learner = script_and_learner(name)
    before = [parameter.clone() for parameter in learner.target_critic.parameters()]
    script.update(learner, random_batch(), 1, args)
    followed = learner.critic.parameters()
    for old, new, target in zip(before, learner.target_critic.parameters(), followed, strict=True):
        torch.testing.assert_close(new, old + args.tau * (target - old))


@pytest.mark.parametrize("name", [*ARGS, "cql", "cal_ql"])
def test_the_deviation_has_bounds(name):
    """exp(-5) and exp(2), whatever the head says."""
    _, _, learner = script_and_learner(name)
    with torch.no_grad():
        learner.actor.log_std.weight.zero_()
        learner.actor.log_std.bias.copy_(torch.tensor([-9.0, 9.0]))
    observations, noise = random_batch().observations, 0.1 * draws()[0]
    found = learner.actor.sample(observations, noise)
    for ours, expected in zip(found, numpy_sample(learner.actor, observations.numpy(), noise), strict=True):
        np.testing.assert_allclose(ours.detach(), expected, rtol=1e-3)


@pytest.mark.parametrize("name", ["sac", "sac_bc", "edac"])
def test_target_entropy(name):
    """It moves the loss by the temperature, 0.3, times the difference; None is -action_dim, of two dimensions."""
    script, args, learner = script_and_learner(name)
    values = []
    for args.target_entropy in (None, -2.0, -5.0):
        values.append(script.total_loss(learner, random_batch(), draws(), args)[0].item())
    assert values[0] == values[1]
    assert values[2] - values[1] == pytest.approx(0.3 * 3.0, rel=1e-3)
