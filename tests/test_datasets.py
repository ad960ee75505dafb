"""Where data comes from, and what is said when it cannot be had."""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from conftest import random_episode
from minari.storage.datasets_root_dir import get_dataset_path

from common.datasets import BUILT_IN_DISCRETE_ID, BUILT_IN_ID, BadInput, load_dataset
from common.evaluation import make_environments, normalized_score
from common.replay_buffer import ReplayBuffer

CPU = torch.device("cpu")


# --- Built in ---


def test_the_built_in_dataset_is_a_minari_dataset_of_good_weak_and_random_episodes(pendulum):
    dataset = minari.load_dataset(BUILT_IN_ID)
    assert (dataset.total_episodes, dataset.total_steps) == (150, 30_000)
    assert dataset.env_spec.id == pendulum.dataset.env_id == "Pendulum-v1"
    scores = [normalized_score(float(value), pendulum.dataset) for value in pendulum.episode_returns]
    good, weak, random = np.mean(scores[:30]), np.mean(scores[30:90]), np.mean(scores[90:])
    assert good == pytest.approx(100, abs=10)
    assert random == pytest.approx(0, abs=10)
    assert 25 < weak < 75


def test_the_built_in_dataset_has_the_same_bits_each_time(pendulum, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    again = ReplayBuffer(load_dataset(BUILT_IN_ID), CPU)
    assert again.fingerprint == pendulum.fingerprint
    assert again.dataset.reference_returns == pendulum.dataset.reference_returns
    assert sorted(os.listdir(tmp_path)) == ["anchorl"]  # nothing half-made is left


def test_the_built_in_dataset_with_discrete_actions(cartpole):
    dataset = minari.load_dataset(BUILT_IN_DISCRETE_ID)
    assert dataset.total_episodes == 200 and dataset.action_space == gym.spaces.Discrete(2)
    assert dataset.env_spec.id == cartpole.dataset.env_id == "CartPole-v1"
    assert [normalized_score(value, cartpole.dataset) for value in (cartpole.dataset.reference_returns[0], 500)] == [
        0,
        100,
    ]
    scores = [normalized_score(float(value), cartpole.dataset) for value in cartpole.episode_returns]
    good, weak, short_sighted, random = (np.mean(scores[a:b]) for a, b in ((0, 20), (20, 80), (80, 140), (140, 200)))
    assert good == 100
    assert 0 < random + 3 < 6 and 3 < weak < 15 and 1 < short_sighted < 10
    data = cartpole.transitions
    ends = cartpole.episode_starts + cartpole.episode_lengths - 1
    np.testing.assert_array_equal(data.terminations[ends], cartpole.episode_lengths < 500)  # the time limit is no end
    assert data.terminations.sum() == 180
    assert (data.actions.dtype, data.actions.unique().tolist()) == (torch.int64, [0, 1])


def test_the_built_in_dataset_with_discrete_actions_has_the_same_bits_each_time(cartpole, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    again = ReplayBuffer(load_dataset(BUILT_IN_DISCRETE_ID, discrete=True), CPU)
    assert again.fingerprint == cartpole.fingerprint
    assert again.dataset.reference_returns == cartpole.dataset.reference_returns


def make_at_once(barrier):
    barrier.wait()
    return ReplayBuffer(load_dataset(BUILT_IN_ID), CPU).fingerprint


@pytest.mark.parametrize("count", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_processes_make_the_built_in_dataset_at_once(count, pendulum, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with multiprocessing.Manager() as manager, ProcessPoolExecutor(count, multiprocessing.get_context("fork")) as pool:
        barrier = manager.Barrier(count)
        fingerprints = list(pool.map(make_at_once, [barrier] * count))
    assert fingerprints == [pendulum.fingerprint] * count
    assert make_at_once(multiprocessing.Barrier(1)) == pendulum.fingerprint
    assert sorted(os.listdir(tmp_path)) == ["anchorl"]  # nothing half-made is left


def test_unknown_built_in_id():
    with pytest.raises(BadInput, match=BUILT_IN_ID):
        load_dataset("anchorl/pendulum/expert-v0")


def test_a_datasets_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")  # the tests may run as root, whom no permission stops

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    with pytest.raises(BadInput, match="MINARI_DATASETS_PATH"):
        load_dataset(BUILT_IN_ID)


def test_a_datasets_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "file" / "datasets"))
    with pytest.raises(BadInput, match="MINARI_DATASETS_PATH"):
        load_dataset(BUILT_IN_ID)


# --- Minari ---


def test_reference_scores_and_environment_come_from_the_metadata(make_dataset):
    dataset = load_dataset(make_dataset(env="Pendulum-v1", ref_min_score=-1000.0, ref_max_score=-200.0))
    assert (dataset.env_id, dataset.max_episode_steps) == ("Pendulum-v1", 200)
    assert normalized_score(-600, dataset) == pytest.approx(50)
    without = load_dataset(make_dataset("test/logs-v0"))
    assert (without.env_id, normalized_score(-600, without)) == (None, None)
    elsewhere = load_dataset("test/data-v0", "MountainCarContinuous-v0")  # whose returns are on another scale
    assert (elsewhere.env_id, normalized_score(-600, elsewhere)) == ("MountainCarContinuous-v0", None)
    equal = load_dataset(make_dataset("test/equal-v0", env="Pendulum-v1", ref_min_score=1.0, ref_max_score=1.0))
    assert normalized_score(-600, equal) is None


@pytest.mark.parametrize("dataset_id", ["mujoco/hopper/medium-v0", "D4RL/pen/human-v2", "D4RL/pointmaze/umaze-v2"])
def test_an_id_that_is_not_local_reaches_minaris_download(dataset_id, monkeypatch, datasets_path):
    asked = []

    def download(dataset_id, force_download=False):
        asked.append(dataset_id)
        (get_dataset_path(dataset_id) / "data").mkdir(parents=True)  # as a download that breaks off leaves it
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(minari, "download_dataset", download)
    with pytest.raises(BadInput, match=rf"{dataset_id} .*Name or service not known.*network") as caught:
        load_dataset(dataset_id)
    assert "\n" not in str(caught.value)
    assert asked == [dataset_id]
    assert not (datasets_path / dataset_id).exists()


def test_a_downloaded_dataset_is_used(make_dataset, monkeypatch, datasets_path):
    local = make_dataset("test/remote-v0")
    aside = datasets_path / "aside"
    (datasets_path / local).rename(aside)

    def download(dataset_id):
        get_dataset_path(dataset_id).parent.mkdir(parents=True)
        aside.rename(get_dataset_path(dataset_id))

    monkeypatch.setattr(minari, "download_dataset", download)
    assert load_dataset(local).num_steps == 120


PATHS = ["../../etc/data-v0", "/etc/data-v0", "a/../b-v0", "..-v0", "a//b-v0", "a/b-v0/..", "~/x-v0", "C:\\x-v0"]


@pytest.mark.parametrize("dataset_id", ["nonsense", "no/version", "../../etc/passwd", "http://x/y-v0", "", *PATHS])
def test_malformed_id(dataset_id):
    with pytest.raises(BadInput, match="no dataset"):
        load_dataset(dataset_id)


def test_damaged_dataset(make_dataset, datasets_path):
    path = datasets_path / make_dataset() / "data" / "metadata.json"
    path.write_text("{")
    with pytest.raises(BadInput, match="cannot read dataset test/data-v0"):
        load_dataset("test/data-v0")


def test_damaged_data_file(make_dataset, datasets_path):
    dataset = load_dataset(make_dataset())
    path = datasets_path / "test/data-v0" / "data" / "main_data.hdf5"
    with h5py.File(path, "a") as file:
        del file["episode_2"]["rewards"]
    with pytest.raises(BadInput, match="cannot read dataset test/data-v0"):
        ReplayBuffer(dataset, CPU)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(BadInput, match="cannot read dataset test/data-v0"):
        ReplayBuffer(dataset, CPU)


IMAGE = gym.spaces.Box(0, 255, (32, 32, 3), np.uint8)
REFUSED = {
    "discrete": (
        {"action_space": gym.spaces.Discrete(3)},
        {"actions": np.zeros(30, np.int64)},
        r"actions must be vectors of real numbers \(a Box\), not Discrete\(3\)",
    ),
    "unbounded": ({"action_space": gym.spaces.Box(-np.inf, np.inf, (1,))}, {}, "finite bounds"),
    "image": ({"observation_space": IMAGE}, {"observations": np.zeros((31, 32, 32, 3), np.uint8)}, "images"),
    "discrete observations": (
        {"observation_space": gym.spaces.Discrete(3)},
        {"observations": np.zeros(31, np.int64)},
        "observations must be",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_spaces_it_cannot_train_on(make_dataset, name):
    spaces, fields, message = REFUSED[name]
    dataset_id = make_dataset(episodes=[random_episode(0, **fields)], **spaces)
    with pytest.raises(BadInput, match=rf"test/data-v0: .*{message}"):
        load_dataset(dataset_id)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unbounded", r"actions must be numbered \(a Discrete\), not Box"),
        ("discrete observations", "observations must be"),
    ],
)
def test_refuses_spaces_it_cannot_train_discrete_actions_on(make_dataset, name, message):
    spaces, fields, _ = REFUSED[name]
    if name == "discrete observations":
        spaces, fields = spaces | REFUSED["discrete"][0], fields | REFUSED["discrete"][1]
    dataset_id = make_dataset(episodes=[random_episode(0, **fields)], **spaces)
    with pytest.raises(BadInput, match=rf"test/data-v0: .*{message}"):
        load_dataset(dataset_id, discrete=True)


def test_more_actions_than_can_be_stored_are_refused(make_dataset):
    space = gym.spaces.Discrete(2**24 + 1)
    dataset_id = make_dataset(episodes=[random_episode(0, actions=np.zeros(30, np.int64))], action_space=space)
    with pytest.raises(BadInput, match="16777217 actions are more than"):
        load_dataset(dataset_id, discrete=True)


def test_takes_either_kind_of_actions_where_asked_to(make_dataset):
    spaces, fields, _ = REFUSED["discrete"]
    make_dataset("test/discrete-v0", [random_episode(0, **fields)], **spaces)
    make_dataset("test/box-v0")
    assert [load_dataset(name, discrete=None).discrete for name in ("test/discrete-v0", "test/box-v0")] == [True, False]


def test_never_imports_what_a_dataset_names(make_dataset, datasets_path, tmp_path, monkeypatch, capsys):
    """Neither an entry point, nor a module in the environment's id, nor a missing space may run code."""
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = datasets_path / make_dataset(env="Pendulum-v1") / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    spec = json.loads(metadata["env_spec"])
    for change in ({"id": "evil:Env-v0"}, {"id": "Evil-v0", "entry_point": "evil:Env"}):
        path.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec | change)}))
        assert make_environments(load_dataset("test/data-v0"), 1) is None
        assert "not installed" in capsys.readouterr().err
    unlike = {"entry_point": "evil:Env", "kwargs": {"g": 5.0}}  # Gymnasium's own is made, as it is
    path.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec | unlike)}))
    (environment,) = make_environments(load_dataset("test/data-v0"), 1)
    assert environment.unwrapped.g == 10
    assert "made without {'g': 5.0}: these are for 'evil:Env'" in capsys.readouterr().err
    path.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec | {"kwargs": {"g": 5.0}})}))
    (environment,) = make_environments(load_dataset("test/data-v0"), 1)
    assert environment.unwrapped.g == 5
    assert not capsys.readouterr().err
    del metadata["observation_space"]
    path.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec | {"entry_point": "evil:Env"})}))
    with pytest.raises(BadInput, match="lacks the spaces"):
        load_dataset("test/data-v0")


@pytest.mark.parametrize(
    "change",
    [
        {"env_spec": "null"},
        {"env_spec": {"id": []}},
        {"env_spec": {"id": "a b"}},
        {"env_spec": {"kwargs": "g"}},
        {"total_steps": "../.."},
        {"ref_min_score": "low"},
    ],
)
def test_metadata_of_other_types(change, make_dataset, datasets_path):
    path = datasets_path / make_dataset(env="Pendulum-v1") / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    if isinstance(change.get("env_spec"), dict):
        change = {"env_spec": json.dumps(json.loads(metadata["env_spec"]) | change["env_spec"])}
    path.write_text(json.dumps(metadata | change))
    with pytest.raises(BadInput, match="cannot read dataset test/data-v0 in "):
        load_dataset("test/data-v0")


def test_complex_numbers_are_refused(make_dataset):
    dataset = load_dataset(make_dataset(episodes=[random_episode(0, rewards=np.ones(30, dtype=np.complex64))]))
    with pytest.raises(BadInput, match="episode 0: rewards are complex numbers"):
        ReplayBuffer(dataset, CPU)


def test_trust_runs_what_a_dataset_names(make_dataset, datasets_path, tmp_path, monkeypatch, capsys):
    (tmp_path / "theirs.py").write_text(
        "from gymnasium.envs.classic_control.pendulum import PendulumEnv\nclass Env(PendulumEnv):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    path = datasets_path / make_dataset(env="Pendulum-v1") / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    for env_id in ("Pendulum-v1", "Theirs-v0"):
        spec = json.loads(metadata["env_spec"]) | {"id": env_id, "entry_point": "theirs:Env", "kwargs": {"g": 5.0}}
        path.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec)}))
        (environment,) = make_environments(load_dataset("test/data-v0"), 1, trust=True)
        assert type(environment.unwrapped).__module__ == "theirs" and environment.unwrapped.g == 5
        assert (environment.spec.id, environment.spec.max_episode_steps) == (env_id, 200)
    assert not capsys.readouterr().err


# --- D4RL files ---


@pytest.fixture
def d4rl_file(tmp_path):
    """Three episodes of 4, 3 and 3 rows: a termination, a time limit, and one the file breaks off."""
    rng = np.random.default_rng(0)
    arrays = {
        "observations": rng.normal(size=(10, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(10, 1)).astype(np.float32),
        "rewards": np.arange(10, dtype=np.float32),
        "terminals": np.arange(10) == 3,
        "timeouts": np.arange(10) == 6,
    }

    def write(**changes):
        with h5py.File(tmp_path / "logs.hdf5", "w") as file:
            for name, values in (arrays | changes).items():
                if values is not None:
                    file[name] = values
        return str(tmp_path / "logs.hdf5"), arrays

    return write


def test_d4rl_file_without_next_observations(d4rl_file):
    path, arrays = d4rl_file()
    buffer = ReplayBuffer(load_dataset(path), CPU, normalize_observations=False)
    assert buffer.transitions.rewards.tolist() == [0, 1, 2, 3, 4, 5, 7, 8]  # what followed 6 and 9 is not known
    assert buffer.transitions.terminations.tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert buffer.episode_lengths.tolist() == [4, 2, 2]
    np.testing.assert_array_equal(buffer.transitions.next_observations[4], arrays["observations"][5])
    np.testing.assert_array_equal(buffer.transitions.actions[:, 0], arrays["actions"][[0, 1, 2, 3, 4, 5, 7, 8], 0])


def test_d4rl_file_with_next_observations(d4rl_file):
    following = np.random.default_rng(1).normal(size=(10, 3)).astype(np.float32)
    path, _ = d4rl_file(next_observations=following)
    buffer = ReplayBuffer(load_dataset(path), CPU, normalize_observations=False)
    np.testing.assert_array_equal(buffer.transitions.next_observations, following)
    assert buffer.episode_lengths.tolist() == [4, 3, 3]


def test_d4rl_file_takes_action_bounds_from_the_environment(d4rl_file):
    path, arrays = d4rl_file()
    dataset = load_dataset(path, "Pendulum-v1")
    assert (dataset.env_id, dataset.action_high.tolist()) == ("Pendulum-v1", [2])
    np.testing.assert_allclose(ReplayBuffer(dataset, CPU).transitions.actions[0], arrays["actions"][0] / 2)


def test_d4rl_file_for_discrete_actions_is_refused(d4rl_file):
    with pytest.raises(BadInput, match="are for continuous actions: write discrete actions as a Minari dataset"):
        load_dataset(d4rl_file()[0], discrete=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": None}, "lacks rewards"),
        ({"rewards": np.zeros(9)}, "do not match in length"),
        ({"actions": np.full((10, 1), 1.5)}, "beyond .* --env-id"),
        ({"actions": np.zeros(10, np.int64)}, "actions must be vectors"),
        ({"observations": np.zeros((10, 8, 8))}, "must be vectors"),
    ],
)
def test_d4rl_file_in_another_layout(d4rl_file, changes, message):
    with pytest.raises(BadInput, match=message):
        ReplayBuffer(load_dataset(d4rl_file(**changes)[0]), CPU)


def test_d4rl_file_with_other_arrays_is_read(d4rl_file):
    path, _ = d4rl_file(observation_mean=np.zeros(3))
    assert load_dataset(path).num_steps == 10


def test_d4rl_file_whose_environment_has_other_actions_or_cannot_be_made(d4rl_file):
    path, _ = d4rl_file(actions=np.zeros((10, 2)))
    with pytest.raises(BadInput, match="Pendulum-v1 has actions of size 1"):
        load_dataset(path, "Pendulum-v1")
    assert load_dataset(path, "Hopper-v2").action_high.tolist() == [1, 1]  # its bindings are gone


def test_empty_d4rl_file(d4rl_file):
    names = {"observations": (0, 3), "actions": (0, 1), "rewards": (0,), "terminals": (0,), "timeouts": (0,)}
    path, _ = d4rl_file(**{name: np.zeros(shape) for name, shape in names.items()})
    with pytest.raises(BadInput, match="empty"):
        ReplayBuffer(load_dataset(path), CPU)


def test_d4rl_episode_of_nothing_but_a_time_limit_is_none(d4rl_file):
    path, _ = d4rl_file(timeouts=np.isin(np.arange(10), [4, 6]))  # row 4 is an episode by itself
    assert ReplayBuffer(load_dataset(path), CPU).episode_lengths.tolist() == [4, 1, 2]


def test_d4rl_file_with_a_number_that_is_not_finite(d4rl_file):
    rewards = np.arange(10, dtype=np.float32)
    rewards[5] = np.nan
    path, _ = d4rl_file(rewards=rewards)
    with pytest.raises(BadInput, match="episode 1, step 1: rewards hold nan"):
        ReplayBuffer(load_dataset(path), CPU)


def test_file_that_is_missing_or_not_hdf5(tmp_path):
    with pytest.raises(BadInput, match="no file"):
        load_dataset(str(tmp_path / "absent.hdf5"))
    (tmp_path / "text.hdf5").write_text("not HDF5")
    with pytest.raises(BadInput, match="as HDF5"):
        load_dataset(str(tmp_path / "text.hdf5"))
