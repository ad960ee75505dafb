"""watch.py: a picture that moves, of the policy alone or beside the data, from where they started."""

import json

import gymnasium as gym
import numpy as np
import pytest
from conftest import SHORT, SHORTER, assert_one_line, random_episode, run_script, write_policy
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from PIL import Image
from watch import median_episode, picture, set_pose

from common.command_line import BadInput
from common.data import load_dataset

FEW = ["--num-updates", "3", *SHORT]


def test_an_environment_without_pictures_is_told_as_such():
    with pytest.raises(BadInput, match=r"cannot be drawn here .*: it has no pictures"):
        picture(gym.Wrapper(gym.Env()))


@pytest.mark.parametrize(
    ("algorithm", "dataset"), [("bc", "pendulum"), ("fqi", "cartpole"), ("discrete_iql", "cartpole")]
)
def test_the_policy_beside_the_data(algorithm, dataset, tmp_path, request):
    pytest.importorskip("pygame")
    buffer = request.getfixturevalue(dataset)
    assert run_script(algorithm, *FEW, "--run-dir", str(tmp_path / "run")).returncode == 0
    sizes = []
    for extra in ([], ["--beside-data"]):
        out = tmp_path / "policy.gif"
        arguments = [str(tmp_path / "run"), "--out", str(out), "--max-steps", "7", "--height", "50", *extra]
        run = run_script("watch", *arguments)
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith(f"{algorithm} on {buffer.dataset.dataset_id}: return ")
        with Image.open(out) as picture:
            sizes.append(picture.size)
            assert picture.n_frames == 7 or dataset == "cartpole"  # CartPole's frames are more than eyes see
            frames = []
            for number in range(picture.n_frames):
                picture.seek(number)
                frames.append(np.asarray(picture.convert("RGB")))
        assert any((frames[0] != frame).any() for frame in frames[1:])
    assert sizes[0][1] == sizes[1][1] == 50 and sizes[1][0] == 2 * sizes[0][0]
    half = sizes[0][0]
    data, policy = frames[0][15:, :half], frames[0][15:, half:]  # below the captions: both start at one place
    assert np.abs(data.astype(int) - policy).mean() < 2


@pytest.mark.parametrize("dataset", ["pendulum", "cartpole"])
def test_a_pose_is_what_was_observed(dataset, request):
    """From it, a step with the recorded action leads to what the data observed next."""
    episode = next(request.getfixturevalue(dataset).dataset.read_episodes())
    with gym.make(request.getfixturevalue(dataset).dataset.env_id) as environment:
        environment.reset(seed=0)
        for step in (0, 5):
            set_pose(environment)(episode.observations[step])
            observation = environment.step(episode.actions[step])[0]
            np.testing.assert_allclose(observation, episode.next_observations[step], atol=1e-4)


def test_mujocos_pose_is_what_was_observed():
    pytest.importorskip("mujoco")
    with gym.make("Hopper-v5") as environment:
        first, _ = environment.reset(seed=0)
        action = np.array([0.3, -0.2, 0.5])
        after = environment.step(action)[0]
        environment.reset(seed=1)
        set_pose(environment)(first)
        np.testing.assert_allclose(environment.step(action)[0], after, atol=1e-6)


def test_the_median_episode(make_dataset):
    episodes = [random_episode(seed, rewards=np.full(30, reward)) for seed, reward in enumerate((3.0, 1.0, 2.0))]
    assert median_episode(load_dataset(make_dataset(episodes=episodes))).rewards.mean() == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "policy.png"], "--out policy.png: must end with .gif"),
        (["--out", "nowhere/policy.gif"], "--out nowhere/policy.gif: there is no folder nowhere"),
        (["--max-steps", "0"], "--max-steps 0: must be at least 1"),
        (["--seed", "-1"], "--seed -1: must not be negative"),
        ([], "no policy at nosuch/policy.pt"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    assert_one_line(run_script("watch", "nosuch", *arguments), message)


def test_a_folder_with_a_policy_alone(tmp_path):
    assert_one_line(run_script("watch", write_policy(tmp_path / "run")), "cannot read .*args.json")


def test_the_environment_of_a_run_is_no_code_that_is_run(tmp_path):
    """A module of the user's own is named again."""
    assert run_script("bc", *FEW, "--run-dir", str(tmp_path / "run")).returncode == 0
    path = tmp_path / "run" / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"env_id": "antigravity:Pendulum-v1"}))
    words = [str(tmp_path / "run"), "--out", str(tmp_path / "policy.gif"), "--max-steps", "3"]
    assert_one_line(run_script("watch", *words), "give --env-id antigravity:Pendulum-v1 again, or another one")
    pytest.importorskip("pygame")
    run = run_script("watch", *words, "--env-id", "gymnasium:Pendulum-v1")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("algorithm", ["sac", "mbpo"])
def test_a_policy_that_learned_from_no_dataset_plays_alone(algorithm, tmp_path):
    words = [*FEW, *SHORTER[algorithm], "--num-updates", "2", "--run-dir", str(tmp_path / "run")]
    assert run_script(algorithm, *words).returncode == 0
    words = [str(tmp_path / "run"), "--out", str(tmp_path / "policy.gif"), "--max-steps", "3"]
    assert_one_line(run_script("watch", *words, "--beside-data"), f"{algorithm}, which learns from no dataset")
    assert_one_line(run_script("watch", *words, "--env-id", "CartPole-v1"), "actions must be vectors of real numbers")
    pytest.importorskip("pygame")
    run = run_script("watch", *words)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{algorithm} on Pendulum-v1: return ")


def test_an_environment_that_fails_is_one_line_and_a_kept_policy_is_played(tmp_path, monkeypatch):
    pytest.importorskip("pygame")
    words = [*FEW, "--keep-policies", "--run-dir", str(tmp_path / "run")]
    assert run_script("bc", *words).returncode == 0
    words = [str(tmp_path / "run" / "policy-3.pt"), "--out", str(tmp_path / "policy.gif"), "--max-steps", "3"]
    monkeypatch.setitem(PendulumEnv.metadata, "render_fps", None)
    assert run_script("watch", *words).returncode == 0
    monkeypatch.setattr(PendulumEnv, "step", lambda self, action: 1 / 0)
    assert_one_line(run_script("watch", *words), "the environment failed at step 1 of an episode: division by zero")


def test_no_environment_is_one_line(tmp_path, make_dataset):
    dataset_id = make_dataset()
    arguments = ["--dataset-id", dataset_id, *FEW, "--run-dir", str(tmp_path / "run")]
    assert run_script("bc", *arguments).returncode == 0
    run = run_script("watch", str(tmp_path / "run"), "--out", str(tmp_path / "policy.gif"))
    assert_one_line(run, f"{dataset_id} names no environment")


def test_an_environment_whose_poses_are_not_known():
    with gym.make("Acrobot-v1") as environment, pytest.raises(ValueError, match="--beside-data: there is no way"):
        set_pose(environment)
