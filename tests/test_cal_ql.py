"""Cal-QL's returns and losses against NumPy on small numbers, and its whole episodes in the environment."""

import inspect
import math

import cal_ql
import cql
import gymnasium as gym
import numpy as np
import pytest
import rlpd
import torch
from conftest import (
    assert_each_trains_its_own,
    assert_one_line,
    assert_same_runs,
    checkpoint,
    level,
    lower,
    numpy_sample,
    numpy_twins,
    random_batch,
    random_episode,
    run_script,
    sac_learner,
    sac_networks,
)

from common.evaluation import load_policy

NUM_SAMPLES = 3


@pytest.fixture
def args():
    return cal_ql.Args(hidden_dims=(5, 4), num_samples=NUM_SAMPLES, cql_alpha=2.0, gamma=0.9)


@pytest.fixture
def learner(args):
    return sac_learner(cal_ql, args)


def batch_with(returns):
    return cal_ql.Batch(*random_batch(), torch.as_tensor(returns, dtype=torch.float32).expand(8))


def draws():
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(NUM_SAMPLES, 8, 2, generator=generator) * 2 - 1
    return uniform, torch.randn(2, NUM_SAMPLES, 8, 2, generator=generator)


def critic_loss(learner, batch, args, script=cal_ql):
    uniform, noise = draws()
    policy = learner.actor.sample(batch.observations, noise[0])
    return script.critic_loss(learner, policy, batch, uniform, noise[1], args)


# --- Returns ---


def numpy_returns(rewards, terminations, lengths, gamma):
    returns, end = [], 0
    for length in lengths:
        start, end = end, end + length
        value = 0 if terminations[end - 1] else rewards[end - 1] / (1 - gamma)  # the last reward again and again
        backwards = []
        for step in reversed(range(start, end)):
            value = rewards[step] + gamma * value
            backwards.append(value)
        returns += reversed(backwards)
    return np.array(returns)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99])
def test_returns_to_go(gamma):
    rng = np.random.default_rng(0)
    lengths = [1, 7, 1, 2, 16, 5]
    rewards, terminations = rng.normal(size=32), np.zeros(32)
    terminations[[0, 10, 31]] = 1  # the ends of the first, the fourth and the last
    returns = cal_ql.returns_to_go(torch.tensor(rewards), torch.tensor(terminations), torch.tensor(lengths), gamma)
    np.testing.assert_allclose(returns.numpy(), numpy_returns(rewards, terminations, lengths, gamma), rtol=1e-12)


# --- Losses ---


@pytest.mark.parametrize("max_backup", [True, False])
def test_critic_loss(learner, args, max_backup):
    args.max_backup = max_backup
    with torch.no_grad():  # so that the twins have their bests at different actions
        learner.target_critic.layers[0].weight[:, 3:].mul_(3)
    level(learner.target_critic)
    uniform, noise = draws()
    batch = batch_with(np.linspace(-1.5, 1.5, 8))
    observations, next_observations = batch.observations.numpy(), batch.next_observations.numpy()
    actions, log_prob = numpy_sample(learner.actor, observations, noise[0])
    next_actions, next_log_prob = numpy_sample(learner.actor, next_observations, noise[1])
    next_qs = np.stack([numpy_twins(learner.target_critic, next_observations, rows) for rows in next_actions])
    lowest = next_qs.min(axis=1)
    assert not np.allclose(lowest.max(axis=0), lower(next_qs.max(axis=0)))  # CQL's order of the two
    next_q = lowest.max(axis=0) if max_backup else lowest[0]
    target = batch.rewards.numpy() + 0.9 * np.where(batch.terminations.numpy() == 1, 0, next_q)
    q_data, *q = (  # [2, n, batch]
        np.stack([numpy_twins(learner.critic, observations, rows) for rows in each], axis=1)
        for each in (batch.actions.numpy()[None], uniform.numpy(), actions, next_actions)
    )
    below = np.concatenate(q[1:], axis=1) < batch.returns.numpy()
    assert 0.1 < below.mean() < 0.9
    bounded = [q[0], *(np.maximum(each, batch.returns.numpy()) for each in q[1:])]
    density = np.concatenate([np.full_like(log_prob, 0.25), np.exp(log_prob), np.exp(next_log_prob)])
    expected = np.log((np.exp(np.concatenate(bounded, axis=1)) / density).mean(axis=1))
    gap = (expected - q_data[:, 0]).mean(axis=1)
    bellman = ((q_data[:, 0] - target) ** 2).mean(axis=1)
    loss, metrics = critic_loss(learner, batch, args)
    assert loss.item() == pytest.approx((bellman + 2 * gap).sum(), rel=1e-4)
    assert metrics["critic/bounded"].item() == pytest.approx(below.mean())
    assert metrics["critic/q_policy"].item() == pytest.approx(q[1].mean(), rel=1e-4)

    args.lagrange, args.target_gap = True, 0.5
    with torch.no_grad():
        learner.multiplier.log.fill_(math.log(1.5))
    loss, _ = critic_loss(learner, batch, args)
    assert loss.item() == pytest.approx((bellman + 3 * gap).sum() - 3 * (gap.mean() - 0.5), rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, learner.multiplier.log)
    assert gradient.item() == pytest.approx(-3 * (gap.mean() - 0.5), rel=1e-4)
    learner.multiplier.log.data.fill_(20.0)
    assert critic_loss(learner, batch, args)[1]["critic/cql_alpha"] == 2 * 1e6


def test_with_returns_below_every_q_it_is_cql(learner, args):
    args.max_backup = False
    of_cql = cql.Args(hidden_dims=(5, 4), num_samples=NUM_SAMPLES, cql_alpha=2.0, gamma=0.9)
    batch = batch_with(-1e6)
    losses = [critic_loss(learner, batch, *words)[0] for words in ((args,), (of_cql, cql))]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, [*learner.critic.parameters()]) for loss in losses]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_below_the_returns_nothing_pushes_the_policys_actions_down(learner, args):
    """The gradient: at uniform actions alone where R is above every Q, and at all of them where below."""
    q = torch.zeros(2, 1 + 3 * NUM_SAMPLES, 8, requires_grad=True)  # of the data, uniform, pi at s and at s'
    fixed = learner._replace(critic=lambda observations, actions: q)
    for returns, pushed in ((1.0, NUM_SAMPLES), (-1.0, 3 * NUM_SAMPLES)):
        (gradient,) = torch.autograd.grad(critic_loss(fixed, batch_with(returns), args)[0], q)
        assert (gradient[:, 1 : 1 + pushed] > 0).all() and not gradient[:, 1 + pushed :].any()


def test_where_the_returns_are_above_every_q_the_policys_actions_are_left_alone(learner, args):
    """In the critic's loss the gap is then the data's Q and a constant: Q of uniform actions is far below R, too."""
    args.max_backup = False
    batch, critic = batch_with(1e6), [*learner.critic.parameters()]
    loss, _ = critic_loss(learner, batch, args)
    gradients = torch.autograd.grad(loss, critic)
    args.cql_alpha = 0.0
    bellman_error, _ = critic_loss(learner, batch, args)
    q = learner.critic(batch.observations, batch.actions)
    for found, expected in zip(
        gradients, torch.autograd.grad(bellman_error - 2 * q.mean(dim=1).sum(), critic), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_each_loss_trains_its_own_network_only(learner, args):
    batch = batch_with(0.0)
    temperature = learner.actor.log_temperature.exp()
    actions, log_prob = learner.actor.sample(batch.observations, draws()[1][0])
    losses = {
        "critic": critic_loss(learner, batch, args)[0],
        "actor": cal_ql.actor_loss(learner.critic, temperature, batch.observations, actions[0], log_prob[0])[0],
        "temperature": cal_ql.temperature_loss(temperature, log_prob[0], -2.0)[0],
    }
    networks = sac_networks(learner)
    assert_each_trains_its_own(losses, networks)
    total, _ = cal_ql.total_loss(learner, batch, *draws(), args)
    assert total.item() == pytest.approx(sum(losses.values()).item(), rel=1e-5)


@pytest.mark.parametrize(
    "name", ["actor_loss", "temperature_loss", "squashed_log_prob", "Critic", "Coefficient", "build"]
)
def test_what_is_cqls_has_its_text(name):
    assert inspect.getsource(getattr(cal_ql, name)) == inspect.getsource(getattr(cql, name))
    assert inspect.getsource(cal_ql.draw_both) == inspect.getsource(rlpd.draw_both)


# --- Runs ---


@pytest.fixture
def words(make_dataset):
    """Of an offline run of 6 updates, on data whose environment cuts its episodes after 4 steps."""
    gym.register("ShortPendulum-v0", "gymnasium.envs.classic_control:PendulumEnv", max_episode_steps=4)
    data = make_dataset(episodes=[random_episode(seed) for seed in range(4)])
    words = ["--dataset-id", data, "--env-id", "ShortPendulum-v0", "--hidden-dims", "4", "--num-samples", "2"]
    words += ["--num-updates", "6", "--batch-size", "16", "--log-every", "3", "--eval-every", "6"]
    yield [*words, "--reward-scale", "9", "--gamma", "0.5", "--eval-episodes", "1", "--final-eval-episodes", "1"]
    gym.registry.pop("ShortPendulum-v0")


def run(folder, *arguments):
    ran = run_script("cal_ql", *arguments, "--run-dir", str(folder))
    assert ran.returncode == 0, ran.stderr


def test_episodes_are_played_whole_and_half_of_a_batch_is_theirs(words, tmp_path, monkeypatch):
    """Ten steps are three episodes of four, of which the third has two updates."""
    batches, total_loss = [], cal_ql.total_loss
    monkeypatch.setattr(cal_ql, "total_loss", lambda *given: (batches.append(given[1]), total_loss(*given))[1])
    run(tmp_path, *words, "--online-steps", "10")
    player = checkpoint(tmp_path)["learner"]["player"]
    assert player["lengths"].tolist() == [4, 4, 4] and len(player["actions"]) == 0
    observations, actions, rewards, _, ends = np.split(player["added"].numpy(), [3, 4, 5, 8], axis=1)
    best = load_policy(tmp_path).act(torch.from_numpy(observations)).numpy()
    assert np.abs(actions - best).mean() > 0.1  # played with the policy's noise
    returns = numpy_returns(rewards[:, 0], ends[:, 0], [4, 4, 4], 0.5)
    for batch, known in zip(batches, [0] * 6 + [4] * 4 + [8] * 4 + [12] * 2, strict=True):
        same = (batch.observations.numpy()[:, None] == observations).all(axis=2)  # [batch, steps]
        assert same.any(axis=1).tolist() == [False] * (8 if known else 16) + [True] * (8 if known else 0)
        assert not same[:, known:].any()
        for row, step in np.argwhere(same):
            assert batch.returns[row].item() == pytest.approx(returns[step], rel=1e-5)
    data = np.concatenate(
        [numpy_returns(9 * random_episode(seed)["rewards"], [0] * 30, [30], 0.5) for seed in range(4)]
    )
    for value in batches[-1].returns[:8].tolist():
        assert np.abs(data - value).min() < 1e-4


def test_a_run_goes_on_online_to_the_same_bits(words, tmp_path):
    """From amid the updates of an episode, and where an offline run had ended."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, *words, "--online-steps", "9")
    for steps in ("0", "6", "9"):
        run(cut, *words, "--online-steps", steps, *(["--resume"] if steps != "0" else []))
    assert_same_runs(whole, cut)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cql-alpha", "-1"], "--cql-alpha -1.0: must not be negative"),
        (["--cql-alpha", "0", "--lagrange"], "--cql-alpha 0.0: --lagrange must start above 0"),
        (["--data-ratio", "-0.5"], r"--data-ratio -0.5: must be in \[0, 1\]"),
        (["--gamma", "1"], r"--gamma 1.0: must be in \[0, 1\)"),
        (["--online-steps", "-1"], "--online-steps -1: must be at least 0"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, tmp_path):
    assert_one_line(run_script("cal_ql", *arguments, "--run-dir", str(tmp_path / "run")), message)
    assert not (tmp_path / "run").exists()


def test_acting_needs_an_environment(make_dataset, tmp_path):
    arguments = ["--dataset-id", make_dataset(), "--online-steps", "5", "--run-dir", str(tmp_path / "run")]
    assert_one_line(run_script("cal_ql", *arguments), "names no environment")
    assert not (tmp_path / "run").exists()
