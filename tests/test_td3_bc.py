"""TD3+BC's losses against NumPy on small numbers, and what each of them may touch."""

import copy

import numpy as np
import pytest
import td3_bc
import torch
from conftest import level, lower, numpy_mlp, numpy_twins, random_batch

from common.optim import Adam

CPU = torch.device("cpu")


@pytest.fixture
def args():
    return td3_bc.Args(hidden_dims=(5, 4), num_updates=100, policy_noise=0.4, noise_clip=0.3)


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    learner = td3_bc.build(3, 2, args, CPU, Adam)
    with torch.no_grad():  # so that the targets differ from what they follow
        for module in (learner.target_actor, learner.target_critic):
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
    level(learner.target_critic)
    return learner


def test_critic_loss(learner, args):
    batch, noise = random_batch(), torch.linspace(-2, 2, 16).reshape(8, 2)
    loss, _ = td3_bc.critic_loss(learner, batch, noise, args)
    smoothing = np.clip(0.4 * noise.numpy(), -0.3, 0.3)
    next_actions = np.clip(
        np.tanh(numpy_mlp(learner.target_actor.net, batch.next_observations.numpy())) + smoothing, -1, 1
    )
    next_q = lower(numpy_twins(learner.target_critic, batch.next_observations.numpy(), next_actions))
    target = batch.rewards.numpy() + args.gamma * np.where(batch.terminations.numpy() == 1, 0, next_q)
    q = numpy_twins(learner.critic, batch.observations.numpy(), batch.actions.numpy())
    assert loss.item() == pytest.approx(np.mean((q[0] - target) ** 2) + np.mean((q[1] - target) ** 2), rel=1e-5)


def test_actor_loss(learner, args):
    batch = random_batch()
    loss, _ = td3_bc.actor_loss(learner, batch, args)
    actions = np.tanh(numpy_mlp(learner.actor.net, batch.observations.numpy()))
    q1 = numpy_twins(learner.critic, batch.observations.numpy(), actions)[0]
    expected = -2.5 / np.mean(np.abs(q1)) * np.mean(q1) + np.mean((actions - batch.actions.numpy()) ** 2)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_actor_gradient_treats_lambda_as_a_constant(learner, args):
    """Were lambda part of the gradient, Q's share would vanish wherever Q has one sign: d(-2.5 Q / |Q|) = 0."""
    batch, parameters = random_batch(), list(learner.actor.parameters())
    loss, metrics = td3_bc.actor_loss(learner, batch, args)
    gradients = torch.autograd.grad(loss, parameters)
    actions = learner.actor(batch.observations)
    q1 = learner.critic(batch.observations, actions)[0]
    frozen = 2.5 / q1.abs().mean().item()
    expected = torch.autograd.grad(-frozen * q1.mean() + (actions - batch.actions).square().mean(), parameters)
    torch.testing.assert_close(gradients, expected)
    assert metrics["actor/q"].item() == pytest.approx(q1.mean().item(), rel=1e-5)


def test_termination_ends_the_target_and_truncation_does_not(learner, args):
    batch = random_batch()._replace(rewards=torch.zeros(8))
    with torch.no_grad():
        learner.target_critic.layers[-1].bias.fill_(1000.0)
    for terminated, expected in ((1.0, 0.0), (0.0, 990.0)):  # a truncated step is stored as not terminated
        step = batch._replace(terminations=torch.full((8,), terminated))
        _, metrics = td3_bc.critic_loss(learner, step, torch.zeros(8, 2), args)
        assert metrics["critic/target"].item() == pytest.approx(expected, abs=20)


def test_actor_and_targets_move_every_second_update(learner, args):
    moving = {"actor": learner.actor, "target_actor": learner.target_actor, "target_critic": learner.target_critic}
    for step in (1, 2, 3):
        before = {name: [weight.clone() for weight in module.parameters()] for name, module in moving.items()}
        critic = [weight.clone() for weight in learner.critic.parameters()]
        td3_bc.update(learner, random_batch(), step, args)
        assert not all(map(torch.equal, critic, learner.critic.parameters()))
        for name, module in moving.items():
            still = all(map(torch.equal, before[name], module.parameters()))
            assert still == (step % 2 == 1), f"{name} at step {step}"


def test_the_actors_update_leaves_the_critic_alone(learner, args):
    """From the same state, step 2 trains the actor too and must give the critic of step 1."""
    twins = [copy.deepcopy(learner) for _ in range(2)]
    for step, twin in enumerate(twins, start=1):
        torch.manual_seed(1)
        td3_bc.update(twin, random_batch(), step, args)
    assert all(map(torch.equal, twins[0].critic.parameters(), twins[1].critic.parameters()))
    assert not all(map(torch.equal, twins[0].actor.parameters(), twins[1].actor.parameters()))
