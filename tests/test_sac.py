"""SAC's way through the environment, and that it learns; test_sac_family.py has its losses."""

import json

import gymnasium as gym
import numpy as np
import pytest
import sac
import torch
from conftest import assert_one_line, random_batch, run_script

from common.data import ReplayBuffer
from common.evaluation import load_policy, make_environment
from common.optim import Adam

CPU = torch.device("cpu")


@pytest.fixture
def args():
    return sac.Args(hidden_dims=(5, 4), gamma=0.9, random_steps=250, replay_size=1000, seed=3)


# --- Environment ---


def test_the_random_episodes_are_whole_and_the_seed_determines_them(args):
    with make_environment("Pendulum-v1") as environment:
        buffers = [ReplayBuffer(sac.random_dataset(environment, args), CPU, False) for _ in range(2)]
        args.seed = 4
        other = ReplayBuffer(sac.random_dataset(environment, args), CPU, False)
    assert buffers[0].episode_lengths.tolist() == [200, 200]  # 250 steps or more, to the end of an episode
    assert buffers[0].fingerprint == buffers[1].fingerprint != other.fingerprint
    actions = buffers[0].transitions.actions
    assert -1 <= actions.min() < -0.98 and 0.98 < actions.max() <= 1 and actions.mean().abs() < 0.15
    assert not buffers[0].transitions.terminations.any()  # Pendulum-v1 only ever cuts its episodes


def play(environment, args, learner, count):
    player = sac.Player(environment, learner, args)
    for _ in range(count):
        player.play()
    return player


def test_the_player_records_what_happened(args):
    torch.manual_seed(0)
    learner = sac.build(3, 1, args, CPU, Adam)
    with make_environment("Pendulum-v1") as environment:
        play(environment, args, learner, 203)
        assert learner.episodes.lengths == [200, 3]
        transitions = learner.replay.newest(203)
        for first, last, episode in ((0, 200, 0), (200, 203, 1)):  # played again by hand
            observation = sac.reset(environment, args, episode)
            for row in range(first, last):
                np.testing.assert_array_equal(transitions.observations[row].numpy(), observation)
                action = 2 * transitions.actions[row].numpy()  # the torque reaches from -2 to 2
                observation, reward, *_ = environment.step(action)
                np.testing.assert_array_equal(transitions.next_observations[row].numpy(), observation)
                assert transitions.rewards[row].item() == pytest.approx(reward)


class Counter(gym.Env):
    """Every third episode ends by itself at its fifth step; the others go on."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    episode = -1

    def reset(self, *, seed=None, options=None):
        self.episode, self.step_number = self.episode + 1, 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.step_number += 1
        over = self.episode % 3 == 2 and self.step_number == 5
        return np.full(2, self.step_number, np.float32), 0.0, over, False, {}


def test_a_termination_is_one_and_a_time_limit_is_none(args):
    learner = sac.build(2, 1, args, CPU, Adam)
    with gym.wrappers.TimeLimit(Counter(), 8) as environment:
        play(environment, args, learner, 44)
    assert learner.episodes.lengths == [8, 8, 5, 8, 8, 5, 2]
    expected = np.isin(np.arange(44), [20, 41]).astype(np.float32)
    np.testing.assert_array_equal(learner.replay.newest(44).terminations.numpy(), expected)


def test_a_resumed_player_is_where_the_episode_was(args):
    torch.manual_seed(0)
    learner = sac.build(3, 1, args, CPU, Adam)
    with make_environment("Pendulum-v1") as environment, make_environment("Pendulum-v1") as fresh:
        player = play(environment, args, learner, 217)
        resumed = sac.Player(fresh, learner, args)
        np.testing.assert_array_equal(resumed.observation, player.observation)
        for torque in (0.5, -0.3):
            for one in (player, resumed):
                one._step(np.array([torque], np.float32))
            np.testing.assert_array_equal(resumed.observation, player.observation)


def test_the_newest_of_a_full_ring_come_in_order(args):
    learner = sac.build(3, 2, args, CPU, Adam)
    for start in (0, 600):
        batch = random_batch(600)
        learner.replay.add(batch._replace(rewards=torch.arange(start, start + 600.0)))
    assert learner.replay.newest(1000).rewards.tolist() == list(range(200, 1200))


# --- Runs ---

SMALL = ["--hidden-dims", "64", "64", "--tau", "0.02"]
SMALL += ["--actor-learning-rate", "1e-3", "--critic-learning-rate", "1e-3"]


def test_sac_learns_to_swing_the_pendulum_up(tmp_path):
    arguments = ["--num-updates", "3000", "--eval-every", "1500", "--gamma", "0.95", "--keep-policies"]
    run = run_script("sac", *arguments, *SMALL, "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["dataset_id"] == "Pendulum-v1"
    assert result["dataset_return_mean"] < -900 and result["final_return_mean"] > -300
    last, kept, earlier = (load_policy(tmp_path / "run" / f"policy{end}.pt") for end in ("", "-3000", "-1500"))
    for name, weight in last.actor.state_dict().items():
        assert torch.equal(weight, kept.actor.state_dict()[name])
        assert not torch.equal(weight, earlier.actor.state_dict()[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--env-id", "NoSuch-v0"], "environment '(json:)?NoSuch-v0' is not installed"),
        (["--env-id", "json:NoSuch-v0"], "environment '(json:)?NoSuch-v0' is not installed"),
        (["--env-id", "CartPole-v1"], r"actions must be vectors of real numbers \(a Box\), not Discrete"),
        (["--random-steps", "0"], "--random-steps 0: must be at least 1"),
        (["--replay-size", "1100"], "--replay-size 1100: must hold the random steps and an episode: 1200"),
        (["--tau", "2"], r"--tau 2.0: must be in \(0, 1\]"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    assert_one_line(run_script("sac", *arguments, "--run-dir", str(tmp_path / "run")), message)
    assert not (tmp_path / "run").exists()


def test_there_is_no_dataset_to_choose(tmp_path):
    run = run_script("sac", "--dataset-id", "anchorl/pendulum/mixed-v0", "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 2 and "Unrecognized options: --dataset-id" in run.stderr
