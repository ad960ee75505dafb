"""ReBRAC's losses against NumPy on small numbers, the data's next actions, and what each loss may touch."""

import copy
import math

import numpy as np
import pytest
import rebrac
import torch
from conftest import SHORT, assert_one_line, level, lower, numpy_mlp, random_batch, run_script

from common.optim import Adam

CPU = torch.device("cpu")


@pytest.fixture
def args():
    return rebrac.Args(hidden_dims=(5, 4), policy_noise=0.4, noise_clip=0.3, actor_beta=0.3, critic_beta=0.7, gamma=0.9)


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    learner = rebrac.build(3, 2, args, CPU, Adam)
    with torch.no_grad():  # so that the targets differ from what they follow, and the norms from doing nothing
        for parameter in (*learner.target_actor.parameters(), *learner.target_critic.parameters()):
            parameter.add_(torch.randn_like(parameter))
        for parameter in learner.critic.norms.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    level(learner.critic)
    level(learner.target_critic)
    return learner


def numpy_normed_twins(critic, observations, actions):
    """Q_1 and Q_2, [2, batch], each twin as a network of its own: linear, ReLU, then layer norm."""
    values = []
    for twin in range(2):
        x = np.concatenate([observations, actions], axis=1).astype(np.float64)
        for layer, norm in zip(critic.layers[:-1], critic.norms, strict=True):
            x = np.maximum(x @ layer.weight[twin].detach().numpy() + layer.bias[twin].detach().numpy(), 0)
            x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
            x = x * norm.weight[twin].detach().numpy() + norm.bias[twin].detach().numpy()
        last = critic.layers[-1]
        values.append((x @ last.weight[twin].detach().numpy() + last.bias[twin].detach().numpy())[:, 0])
    return np.stack(values)


def batch_of_the_data():
    actions = torch.randn(8, 2, generator=torch.Generator().manual_seed(2)).tanh()
    actions[[2, 5]] = math.nan  # 2 ends an episode by its time limit; 5 is anywhere
    return rebrac.Batch(*random_batch(), actions)


@pytest.mark.parametrize("known", [True, False])
def test_critic_loss(learner, args, known):
    batch, noise = batch_of_the_data(), torch.linspace(-2, 2, 16).reshape(8, 2)
    if not known:
        batch = batch._replace(next_actions=torch.full((8, 2), math.nan))
    loss, metrics = rebrac.critic_loss(learner, batch, noise, args)
    next_observations, smoothing = batch.next_observations.numpy(), np.clip(0.4 * noise.numpy(), -0.3, 0.3)
    next_actions = np.clip(np.tanh(numpy_mlp(learner.target_actor.net, next_observations)) + smoothing, -1, 1)
    penalty = np.zeros(8)
    for row in set(range(8)) - {2, 5} if known else ():
        penalty[row] = sum((next_actions[row, i] - batch.next_actions[row, i].item()) ** 2 for i in range(2))
    next_value = lower(numpy_normed_twins(learner.target_critic, next_observations, next_actions)) - 0.7 * penalty
    target = batch.rewards.numpy() + 0.9 * np.where(batch.terminations.numpy() == 1, 0, next_value)
    q = numpy_normed_twins(learner.critic, batch.observations.numpy(), batch.actions.numpy())
    assert loss.item() == pytest.approx(((q - target) ** 2).mean(axis=1).sum(), rel=1e-4)
    assert metrics["critic/penalty"].item() == pytest.approx(penalty.mean(), rel=1e-4)


def test_actor_loss(learner, args):
    batch = batch_of_the_data()
    loss, _ = rebrac.actor_loss(learner, batch, args)
    actions = np.tanh(numpy_mlp(learner.actor.net, batch.observations.numpy()))
    q = lower(numpy_normed_twins(learner.critic, batch.observations.numpy(), actions))
    distance = ((actions - batch.actions.numpy()) ** 2).sum(axis=1)
    assert loss.item() == pytest.approx(-np.mean(q) / np.mean(np.abs(q)) + 0.3 * np.mean(distance), rel=1e-4)


def test_actor_gradient_treats_lambda_as_a_constant(learner, args):
    """Were lambda part of the gradient, Q's share would vanish wherever Q has one sign: d(-Q / |Q|) = 0."""
    batch, parameters = batch_of_the_data(), list(learner.actor.parameters())
    gradients = torch.autograd.grad(rebrac.actor_loss(learner, batch, args)[0], parameters)
    actions = learner.actor(batch.observations)
    q = learner.critic(batch.observations, actions).min(dim=0).values
    imitation = 2 * (actions - batch.actions).square().mean()  # two dimensions: the mean times two is their sum
    expected = torch.autograd.grad(-q.mean() / q.abs().mean().item() + 0.3 * imitation, parameters)
    torch.testing.assert_close(gradients, expected)


def test_the_data_act_at_s_prime_as_in_the_next_row_of_the_episode():
    actions = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]).unsqueeze(1)
    found = rebrac.following_actions(actions, torch.tensor([3, 1, 2]))
    expected = [0.2, 0.3, math.nan, math.nan, 0.6, math.nan]
    np.testing.assert_allclose(found[:, 0].numpy(), expected, rtol=1e-6)


def test_a_run_hands_the_next_actions_to_its_updates(pendulum, tmp_path, monkeypatch):
    batches, critic_loss = [], rebrac.critic_loss

    def spy(learner, batch, *others):
        batches.append(batch)
        return critic_loss(learner, batch, *others)

    monkeypatch.setattr(rebrac, "critic_loss", spy)
    arguments = ["--num-updates", "3", "--batch-size", "64", *SHORT, "--run-dir", str(tmp_path / "run")]
    assert run_script("rebrac", *arguments).returncode == 0
    data = pendulum.transitions
    following = rebrac.following_actions(data.actions, pendulum.episode_lengths)
    assert len(batches) == 3
    for batch in batches:
        rows = (batch.observations[:, None] == data.observations).all(dim=-1).int().argmax(dim=1)
        torch.testing.assert_close(batch.next_actions, following[rows], equal_nan=True)


def test_termination_ends_the_target_and_truncation_does_not(learner, args):
    batch = batch_of_the_data()._replace(rewards=torch.zeros(8))
    with torch.no_grad():
        learner.target_critic.layers[-1].bias.fill_(1000.0)
    for terminated, expected in ((1.0, 0.0), (0.0, 900.0)):  # a truncated step is stored as not terminated
        step = batch._replace(terminations=torch.full((8,), terminated))
        _, metrics = rebrac.critic_loss(learner, step, torch.zeros(8, 2), args)
        assert metrics["critic/target"].item() == pytest.approx(expected, abs=20)


def test_actor_and_targets_move_every_second_update(learner, args):
    moving = {"actor": learner.actor, "target_actor": learner.target_actor, "target_critic": learner.target_critic}
    for step in (1, 2, 3):
        before = {name: [weight.clone() for weight in module.parameters()] for name, module in moving.items()}
        critic = [weight.clone() for weight in learner.critic.parameters()]
        rebrac.update(learner, batch_of_the_data(), step, args)
        assert not all(map(torch.equal, critic, learner.critic.parameters()))
        for name, module in moving.items():
            still = all(map(torch.equal, before[name], module.parameters()))
            assert still == (step % 2 == 1), f"{name} at step {step}"


def test_the_actors_update_leaves_the_critic_alone(learner, args):
    """From the same state, step 2 trains the actor too and must give the critic of step 1."""
    twins = [copy.deepcopy(learner) for _ in range(2)]
    for step, twin in enumerate(twins, start=1):
        torch.manual_seed(1)
        rebrac.update(twin, batch_of_the_data(), step, args)
    assert all(map(torch.equal, twins[0].critic.parameters(), twins[1].critic.parameters()))
    assert not all(map(torch.equal, twins[0].actor.parameters(), twins[1].actor.parameters()))


def test_targets_move_by_tau(learner, args):
    before = copy.deepcopy(learner)
    rebrac.update(learner, batch_of_the_data(), 2, args)
    for name in ("actor", "critic"):
        networks = getattr(before, f"target_{name}"), getattr(learner, f"target_{name}"), getattr(learner, name)
        for old, new, online in zip(*(network.parameters() for network in networks), strict=True):
            torch.testing.assert_close(new, old + args.tau * (online - old))


@pytest.mark.parametrize("flag", ["--actor-beta", "--critic-beta"])
def test_bad_input_is_one_line(flag, tmp_path):
    run = run_script("rebrac", flag, "-1", "--run-dir", str(tmp_path / "run"))
    assert_one_line(run, f"{flag} -1.0: must not be negative")
