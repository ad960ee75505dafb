"""AWR's returns and losses against NumPy on small numbers, what each loss may touch, and resuming between returns."""

import copy
import math

import awr
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    assert_each_trains_its_own,
    assert_one_line,
    assert_same,
    checkpoint,
    networks_of,
    numpy_mlp,
    random_batch,
    random_episode,
    run_script,
)

from common.command_line import BadInput
from common.data import ReplayBuffer, load_dataset
from common.optim import Adam

CPU = torch.device("cpu")


def batch_with_returns():
    batch = random_batch()
    return awr.Batch(batch.observations, batch.actions, batch.rewards)


@pytest.fixture
def args():
    return awr.Args(hidden_dims=(5, 4), num_updates=100)


@pytest.fixture
def learner(args):
    torch.manual_seed(0)
    return awr.build(3, 2, args, CPU, Adam)


# --- Returns ---


def numpy_returns(rewards, terminations, next_values, episode_lengths, gamma, td_lambda):
    """Backwards through one episode after the other, one step at a time."""
    returns, start = np.zeros(len(rewards)), 0
    for length in episode_lengths:
        for t in reversed(range(start, start + length)):
            following = next_values[t]
            if t < start + length - 1:
                following = (1 - td_lambda) * next_values[t] + td_lambda * returns[t + 1]
            returns[t] = rewards[t] + (0 if terminations[t] else gamma * following)
        start += length
    return returns


def episodes_of(lengths):
    """Random float32 columns of episodes of these lengths, of which every second one ends by termination."""
    rng = np.random.default_rng(0)
    rewards, next_values = rng.normal(size=(2, sum(lengths))).astype(np.float32)
    terminations = np.zeros(sum(lengths), np.float32)
    terminations[np.cumsum(lengths)[::2] - 1] = 1
    return rewards, terminations, next_values, np.array(lengths)


@pytest.mark.parametrize("td_lambda", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("lengths", [[1], [1, 1], [4, 1, 3], [2, 9, 1, 8, 7], [1000, 1, 300, 1024, 1025]])
def test_returns_against_a_loop(lengths, td_lambda):
    """The lengths lie on both sides of powers of two, at which the scan takes one more pass."""
    columns = episodes_of(lengths)
    returns = awr.td_lambda_returns(*map(torch.from_numpy, columns), 0.99, td_lambda)
    expected = numpy_returns(*columns, 0.99, td_lambda)
    np.testing.assert_allclose(returns.numpy(), expected, rtol=1e-4, atol=1e-4)


# two episodes: of three steps, terminated, and of two, truncated
REWARDS = torch.tensor([1.0, 2, 3, 4, 5])
TERMINATIONS = torch.tensor([0.0, 0, 1, 0, 0])
NEXT_VALUES = torch.tensor([10.0, 20, 999, 30, 40])  # nothing comes of the terminated step's
LENGTHS = torch.tensor([3, 2])


@pytest.mark.parametrize(
    ("td_lambda", "expected"),
    [
        (1.0, [1 + 0.5 * (2 + 0.5 * 3), 2 + 0.5 * 3, 3, 4 + 0.5 * (5 + 0.5 * 40), 5 + 0.5 * 40]),  # Monte Carlo
        (0.0, [1 + 0.5 * 10, 2 + 0.5 * 20, 3, 4 + 0.5 * 30, 5 + 0.5 * 40]),  # one-step targets
        (0.5, [1 + 0.5 * (5 + 0.5 * 7.75), 2 + 0.5 * (10 + 0.5 * 3), 3, 4 + 0.5 * (15 + 0.5 * 25), 25]),
    ],
)
def test_returns_by_hand(td_lambda, expected):
    returns = awr.td_lambda_returns(REWARDS, TERMINATIONS, NEXT_VALUES, LENGTHS, 0.5, td_lambda)
    assert returns.tolist() == pytest.approx(expected)


def test_returns_leave_their_inputs_alone():
    before = [column.clone() for column in (REWARDS, TERMINATIONS, NEXT_VALUES, LENGTHS)]
    awr.td_lambda_returns(REWARDS, TERMINATIONS, NEXT_VALUES, LENGTHS, 0.5, 0.9)
    assert all(map(torch.equal, before, (REWARDS, TERMINATIONS, NEXT_VALUES, LENGTHS)))


def test_returns_of_the_data_bootstrap_from_the_target_value(args, pendulum):
    """Of 30,000 transitions, so that V' sees them in several pieces."""
    torch.manual_seed(0)
    learner = awr.build(3, 1, args, CPU, Adam)
    with torch.no_grad():
        learner.target_value.net[-1].bias.fill_(100.0)  # so that it differs from V
    _, _, rewards, next_observations, terminations = pendulum.transitions
    lengths = pendulum.episode_lengths
    returns = awr.compute_returns(learner.target_value, rewards, next_observations, terminations, lengths, args)
    next_values = numpy_mlp(learner.target_value.net, next_observations.numpy())[:, 0]
    expected = numpy_returns(rewards.numpy(), terminations.numpy(), next_values, lengths.numpy(), 0.99, 0.95)
    np.testing.assert_allclose(returns.numpy(), expected, rtol=1e-4, atol=1e-3)


def test_a_run_learns_from_returns_of_the_datas_own_rewards(monkeypatch, tmp_path, pendulum):
    """Computed at the start and every tenth update with a newer V, each time from the rewards, never from returns."""
    compute, calls, batches = awr.td_lambda_returns, [], []

    def spy(rewards, terminations, next_values, *rest):
        returns = compute(rewards, terminations, next_values, *rest)
        calls.append((rewards.clone(), next_values, returns))
        return returns

    def total_loss(learner, batch, args):
        batches.append((len(calls), batch))
        return awr_total_loss(learner, batch, args)

    awr_total_loss = awr.total_loss
    monkeypatch.setattr(awr, "td_lambda_returns", spy)
    monkeypatch.setattr(awr, "total_loss", total_loss)
    arguments = ["--num-updates", "25", "--returns-every", "10", "--batch-size", "8", "--hidden-dims", "8"]
    run = run_script(
        "awr", *arguments, "--eval-episodes", "1", "--final-eval-episodes", "1", "--run-dir", str(tmp_path / "run")
    )
    assert run.returncode == 0, run.stderr
    assert [count for count, _ in batches] == [1] * 10 + [2] * 10 + [3] * 5
    for rewards, _, _ in calls:
        torch.testing.assert_close(rewards, 0.01 * pendulum.transitions.rewards)  # 1 - gamma
    assert not torch.equal(calls[0][1], calls[1][1]) and not torch.equal(calls[1][1], calls[2][1])
    for count, batch in batches:
        assert torch.isin(batch.returns, calls[count - 1][2]).all()


def test_returns_of_what_was_played(monkeypatch, tmp_path, make_dataset):
    """Of 25 steps, by the V of updates 10, 20 and 30, the episode that goes on cut where they are computed."""
    entry_point = "gymnasium.envs.classic_control:PendulumEnv"
    gym.register("ShortPendulum-v0", entry_point, max_episode_steps=4)
    data = make_dataset(episodes=[random_episode(seed) for seed in range(4)])
    batches, total_loss = [], awr.total_loss

    def spy(learner, batch, args):
        batches.append((copy.deepcopy(learner.target_value), batch))
        return total_loss(learner, batch, args)

    monkeypatch.setattr(awr, "total_loss", spy)
    words = ["--dataset-id", data, "--env-id", "ShortPendulum-v0", "--hidden-dims", "8", "--batch-size", "64"]
    words += ["--num-updates", "10", "--online-steps", "25", "--returns-every", "10", "--run-dir", str(tmp_path)]
    words += ["--reward-scale", "3", "--reward-shift", "1", "--eval-episodes", "1", "--final-eval-episodes", "1"]
    run = run_script("awr", *words)
    gym.registry.pop("ShortPendulum-v0")
    assert run.returncode == 0, run.stderr
    added = checkpoint(tmp_path)["learner"]["player"]["added"].numpy()
    observations, actions, rewards, next_observations, ends = np.split(added, [3, 4, 5, 8], axis=1)
    counts = [0] * 20 + [10] * 10 + [20] * 5  # steps that have returns at each update
    for (value, batch), count in zip(batches, counts, strict=True):
        columns = rewards[:count, 0], ends[:count, 0], numpy_mlp(value.net, next_observations[:count])[:, 0]
        returns = numpy_returns(*columns, [4] * (count // 4) + [count % 4], 0.99, 0.95)
        place = (batch.observations.numpy()[:, None] == observations[None]).all(axis=2)  # [batch, steps]
        assert place[:, :count].sum() >= min(count, 1) and not place[:, count:].any()
        for row, step in np.argwhere(place):
            assert batch.returns[row].item() == pytest.approx(returns[step], rel=1e-4)
            assert batch.actions[row].item() == actions[step, 0]
    torque, (cos, sin, speed) = 2 * actions[0, 0], denormalised(data, observations[0])
    expected = -(math.atan2(sin, cos) ** 2 + 0.1 * speed**2 + 0.001 * torque**2)
    assert rewards[0, 0] == pytest.approx(0.01 * 3 * (expected + 1), rel=1e-3)  # 1 - gamma


def denormalised(data, observation):
    mean, std = ReplayBuffer(load_dataset(data), CPU).normalization.numpy()
    return mean + std * observation


# --- Losses ---


def numpy_log_prob(actor, batch):
    mean = np.tanh(numpy_mlp(actor.net, batch.observations.numpy()))
    std = np.exp(np.maximum(actor.log_std.detach().numpy(), -5.0))
    z = (batch.actions.numpy() - mean) / std
    return (-0.5 * z**2 - np.log(std) - 0.5 * math.log(2 * math.pi)).sum(axis=1)


def test_advantage_and_value_loss(learner):
    batch = batch_with_returns()
    u = awr.advantage(learner.value, batch)
    expected = batch.returns.numpy() - numpy_mlp(learner.value.net, batch.observations.numpy())[:, 0]
    np.testing.assert_allclose(u.detach().numpy(), expected, atol=1e-5)
    loss, _ = awr.value_loss(u)
    assert loss.item() == pytest.approx(np.mean(expected**2), rel=1e-5)


def test_actor_loss_clips_the_weights(learner):
    batch, u = batch_with_returns(), np.array([-2.0, -1, -0.5, 0, 0.5, 1, 2, 9])
    with torch.no_grad():
        learner.actor.log_std.copy_(torch.tensor([-0.5, -7.0]))  # the second is below the clamp at -5
    arguments = {"beta": 0.5, "weight_clip": 20.0, "standardize": False}
    loss, metrics = awr.actor_loss(learner.actor, torch.tensor(u, dtype=torch.float32), batch, **arguments)
    weight = np.minimum(np.exp(u / 0.5), 20)
    assert (weight == 20).sum() == 2  # exp(4) and exp(18)
    assert loss.item() == pytest.approx(-np.mean(weight * numpy_log_prob(learner.actor, batch)), rel=1e-5)
    assert metrics["actor/weight"].item() == pytest.approx(weight.mean(), rel=1e-5)
    assert metrics["actor/weight_clipped"].item() == 2 / 8
    expected = weight.sum() ** 2 / np.sum(weight**2)
    assert metrics["actor/effective_sample_size"].item() == pytest.approx(expected, rel=1e-5)


def test_actor_loss_standardizes_the_advantage(learner):
    """The same policy whatever the scale and the offset of the advantage."""
    batch, u = batch_with_returns(), np.array([-2.0, -1, -0.5, 0, 0.5, 1, 2, 9])
    weight = np.minimum(np.exp((u - u.mean()) / u.std() / 0.5), 20)
    expected = -np.mean(weight * numpy_log_prob(learner.actor, batch))
    for scale, offset in ((1, 0), (100, -300)):
        scaled = torch.tensor(scale * u + offset, dtype=torch.float32)
        loss, _ = awr.actor_loss(learner.actor, scaled, batch, beta=0.5, weight_clip=20.0, standardize=True)
        assert loss.item() == pytest.approx(expected, rel=1e-4)
    equal = torch.full((8,), 7.0)  # nothing to standardise by: plain behaviour cloning
    loss, _ = awr.actor_loss(learner.actor, equal, batch, beta=0.5, weight_clip=20.0, standardize=True)
    assert loss.item() == pytest.approx(-np.mean(numpy_log_prob(learner.actor, batch)), rel=1e-5)


def test_each_loss_trains_its_own_network_only(learner, args):
    batch = batch_with_returns()
    u = awr.advantage(learner.value, batch)
    losses = {
        "value": awr.value_loss(u)[0],
        "actor": awr.actor_loss(learner.actor, u, batch, args.beta, args.weight_clip, True)[0],
    }
    assert_each_trains_its_own(losses, networks_of(learner, "actor", "value"))


@pytest.mark.parametrize("standardize", [False, True])
def test_update_adds_the_two_losses_and_leaves_the_target_value_to_main(learner, args, standardize):
    args.standardize_advantage = standardize
    batch = batch_with_returns()
    u = awr.advantage(learner.value, batch)
    loss_v, _ = awr.value_loss(u)
    loss_pi, _ = awr.actor_loss(learner.actor, u, batch, args.beta, args.weight_clip, standardize)
    before = {name: [p.clone() for p in learner[i].parameters()] for i, name in enumerate(learner._fields[:3])}
    metrics = awr.update(learner, batch, 1, args)
    assert metrics["value/loss"].item() == pytest.approx(loss_v.item())
    assert metrics["actor/loss"].item() == pytest.approx(loss_pi.item())
    for name, weights in before.items():
        moved = not all(map(torch.equal, weights, getattr(learner, name).parameters()))
        assert moved == (name != "target_value"), name


# --- Runs ---


@pytest.mark.parametrize("stop", [27, 30])
def test_a_run_resumed_between_two_computations_of_the_returns_goes_on_to_the_same_bits(stop, tmp_path, pendulum):
    """At update 27 the returns are those of V at update 20; at update 30 those of V at update 30."""
    arguments = [
        "--returns-every",
        "10",
        "--hidden-dims",
        "16",
        "16",
        "--eval-episodes",
        "1",
        "--final-eval-episodes",
        "1",
    ]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_script("awr", *arguments, "--num-updates", "45", "--run-dir", str(whole)).returncode == 0
    assert run_script("awr", *arguments, "--num-updates", str(stop), "--run-dir", str(stopped)).returncode == 0
    at_stop = checkpoint(stopped)["learner"]
    newest = all(map(torch.equal, at_stop["value"].values(), at_stop["target_value"].values()))
    assert newest == (stop == 30)
    run = run_script("awr", *arguments, "--resume", "--num-updates", "45", "--run-dir", str(stopped))
    assert run.returncode == 0, run.stderr
    for key in ("learner", "random_state"):
        assert_same(checkpoint(whole)[key], checkpoint(stopped)[key])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("gamma", "1"),
        ("td_lambda", "1.1"),
        ("td_lambda", "nan"),
        ("returns_every", "0"),
        ("beta", "0"),
        ("weight_clip", "-1"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(flag, value, tmp_path):
    run = run_script("awr", f"--{flag}", value, "--run-dir", str(tmp_path / "run"))
    assert_one_line(run, f"error: --{flag.replace('_', '-')} {float(value) if flag != 'returns_every' else 0}")
    assert not (tmp_path / "run").exists()


def test_an_advantage_cannot_be_standardised_over_one_transition():
    with pytest.raises(BadInput, match="--batch-size 1: must be at least 2"):
        awr.Args(batch_size=1).validate()
    awr.Args(batch_size=1, standardize_advantage=False).validate()
