"""The task with two ways around a wall, where the average of good actions crashes."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import assert_one_line, run_script
from gymnasium.utils.env_checker import check_env
from PIL import Image
from two_ways import BORDER, FIELD, GREEN, GREY, MAX_STEPS, RED, SPREAD, START, STEP, WALL, in_wall

from common.data import BUILT_IN_TWO_WAYS_ID, ReplayBuffer, load_dataset
from common.evaluation import make_environments


@pytest.fixture
def environment():
    (made,) = make_environments(load_dataset(BUILT_IN_TWO_WAYS_ID), 1, render_mode="rgb_array")
    return made


def play(environment, *moves):
    """What the last step of the moves gives, (action, how many times) each."""
    environment.reset(seed=0)
    for action, times in moves:
        for _ in range(times):
            result = environment.step(np.array(action, np.float32))
    return result


def test_straight_on_is_a_crash(environment):
    place, reward, terminated, truncated, _ = play(environment, ((1, 0), 3))
    assert in_wall(place) and (reward, terminated, truncated) == (0, True, False)


@pytest.mark.parametrize("side", [1, -1])
def test_either_way_leads_to_the_goal(environment, side):
    _, reward, terminated, truncated, _ = play(environment, ((0, side), 3), ((1, side / 2), 1), ((1, 0), 8))
    assert (reward, terminated, truncated) == (100, True, False)


def test_the_border_is_a_wall(environment):
    place, reward, terminated, _, _ = play(environment, ((0, 1), 5))
    assert place[1] >= BORDER and (reward, terminated) == (0, True)


def test_who_stands_still_runs_out_of_time(environment):
    assert play(environment, ((0, 0), MAX_STEPS - 1))[2:4] == (False, False)
    assert play(environment, ((0, 0), MAX_STEPS))[2:4] == (False, True)


def test_starts_and_steps(environment):
    starts = np.stack([environment.reset(seed=seed)[0] for seed in range(50)])
    assert np.abs(starts - START).max() <= SPREAD + 1e-6 and len(np.unique(starts, axis=0)) == 50
    np.testing.assert_array_equal(environment.reset(seed=7)[0], starts[7])
    place = environment.step(np.array([0.5, -0.25], np.float32))[0]
    np.testing.assert_allclose(place, starts[7] + STEP * np.array([0.5, -0.25]), atol=1e-6)
    place = play(environment, ((-9, 0), 5))[0]  # a move is no longer than one of -1, and ends at the field's
    assert place[0] == -np.float32(FIELD[0]) and environment.observation_space.contains(place)


def test_the_environment_keeps_gymnasiums_rules():
    check_env(gym.make("anchorl/TwoWays-v0").unwrapped, skip_render_check=True)


def test_the_picture(environment):
    environment.reset(seed=0)
    before = environment.render()
    environment.step(np.array([0, 1], np.float32))
    after = environment.render()
    assert before.dtype == np.uint8 and before.shape == (240, 288, 3)
    assert (before[120, 144] == GREY).all() and (before[120, 280] == GREEN).all()
    rows = [np.argwhere((picture == RED).all(axis=-1)).mean(axis=0) for picture in (before, after)]
    height = before.shape[0] / (2 * FIELD[1])
    assert rows[0][0] - rows[1][0] == pytest.approx(STEP * height, abs=1.5)  # up


def test_the_average_of_the_good_first_steps_leads_into_the_wall(datasets_path):
    """Each of the two ways goes by."""
    buffer = ReplayBuffer(load_dataset(BUILT_IN_TWO_WAYS_ID), torch.device("cpu"), normalize_observations=False)
    rows = buffer.episode_starts[:40][buffer.episode_returns[:40] == 100]
    first = buffer.transitions.actions[rows].double().numpy()
    up, down = first[first[:, 1] > 0].mean(axis=0), first[first[:, 1] < 0].mean(axis=0)

    def height_at_the_wall(action):
        return abs(action[1] / action[0] * (WALL[0, 0] - START[0]))

    assert height_at_the_wall(up) > WALL[1, 1] < height_at_the_wall(down)
    assert height_at_the_wall((up + down) / 2) < 0.2 * WALL[1, 1]


SMALL = ["--dataset-id", BUILT_IN_TWO_WAYS_ID, "--hidden-dims", "64", "64", "--batch-size", "128"]
FAST = ["--gamma", "0.95", "--reward-scale", "0.1", "--actor-learning-rate", "1e-3", "--critic-learning-rate", "1e-3"]
FAST += ["--tau", "0.02"]


@pytest.mark.parametrize(
    ("algorithm", "arguments", "low", "high"),
    [("bc", ["--learning-rate", "1e-3"], 0, 10), ("iql", [*FAST, "--value-learning-rate", "1e-3"], 50, 100)],
)
def test_cloning_crashes_and_iql_whose_weights_choose_a_way_arrives(algorithm, arguments, low, high, tmp_path):
    more = ["--num-updates", "1500", "--eval-every", "100000", "--run-dir", str(tmp_path / "run")]
    run = run_script(algorithm, *SMALL, *arguments, *more)
    assert run.returncode == 0, run.stderr
    assert low <= json.loads((tmp_path / "run" / "result.json").read_text())["final_score"] <= high


def test_the_paths_are_drawn(tmp_path):
    run, out = str(tmp_path / "run"), tmp_path / "paths.png"
    more = ["--num-updates", "3", "--eval-episodes", "1", "--final-eval-episodes", "1", "--run-dir", run]
    assert run_script("bc", *SMALL, *more).returncode == 0
    drawn = run_script("benchmarks.measurements.paths", run, run, "--out", str(out), "--num-episodes", "2")
    assert drawn.returncode == 0, drawn.stderr
    with Image.open(out) as picture:
        assert picture.size == (468, 225)
    gif = run_script("watch", run, "--out", str(tmp_path / "policy.gif"), "--max-steps", "3")
    assert gif.returncode == 0, gif.stderr
    assert_one_line(
        run_script("benchmarks.measurements.paths", run, "--out", str(tmp_path / "a.jpg")), "must be a .png"
    )
