"""Where data comes from, and what is said when it cannot be had."""

import json
import re
import shutil

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from conftest import random_episode
from minari.storage.datasets_root_dir import get_dataset_path

from common.command_line import BUILT_IN_ID, BadInput
from common.data import BUILT_IN_DISCRETE_ID, ReplayBuffer, flatten_observations, load_dataset, observation_names
from common.evaluation import make_environments

CPU = torch.device("cpu")


# --- Built in ---


def test_the_built_in_datasets_are_read_from_the_package_and_nothing_is_written(datasets_path):
    for dataset_id in (BUILT_IN_ID, BUILT_IN_DISCRETE_ID):
        assert load_dataset(dataset_id, discrete=None).num_steps > 10_000
        assert not (datasets_path / dataset_id).exists()


def test_a_users_own_dataset_comes_before_a_built_in_one(make_dataset):
    assert load_dataset(make_dataset(BUILT_IN_ID)).num_steps == 120


def test_unknown_built_in_id():
    with pytest.raises(BadInput, match=BUILT_IN_ID):
        load_dataset("anchorl/pendulum/expert-v0")


def test_a_datasets_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "file" / "datasets"))
    with pytest.raises(BadInput, match="MINARI_DATASETS_PATH"):
        load_dataset(BUILT_IN_ID)


# --- Minari ---


def test_reference_scores_and_environment_come_from_the_metadata(make_dataset):
    dataset = load_dataset(make_dataset(env="Pendulum-v1", ref_min_score=-1000.0, ref_max_score=-200.0))
    assert (dataset.env_id, dataset.env_spec["max_episode_steps"]) == ("Pendulum-v1", 200)
    assert dataset.score(-600) == pytest.approx(50)
    without = load_dataset(make_dataset("test/logs-v0"))
    assert (without.env_id, without.score(-600)) == (None, None)
    elsewhere = load_dataset("test/data-v0", "MountainCarContinuous-v0")  # whose returns are on another scale
    assert (elsewhere.env_id, elsewhere.score(-600)) == ("MountainCarContinuous-v0", None)
    equal = load_dataset(make_dataset("test/equal-v0", env="Pendulum-v1", ref_min_score=1.0, ref_max_score=1.0))
    assert equal.score(-600) is None


@pytest.mark.parametrize("dataset_id", ["mujoco/hopper/medium-v0", "D4RL/pen/human-v2", "D4RL/pointmaze/umaze-v2"])
def test_an_id_that_is_not_local_reaches_minaris_download(dataset_id, monkeypatch, datasets_path):
    asked = []

    def download(dataset_id, force_download=False):
        asked.append(dataset_id)
        (get_dataset_path(dataset_id) / "data").mkdir(parents=True)  # as a download that breaks off leaves it
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(minari, "download_dataset", download)
    with pytest.raises(BadInput, match=rf"{dataset_id} .*network.*Name or service not known") as caught:
        load_dataset(dataset_id)
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="download failed"):  # the half of it that is there is not taken for a dataset
        load_dataset(dataset_id)
    assert asked == [dataset_id] * 2
    shutil.rmtree(datasets_path / dataset_id)


def test_a_downloaded_dataset_is_used(make_dataset, monkeypatch, datasets_path):
    local = make_dataset("test/remote-v0")
    aside = datasets_path / "aside"
    (datasets_path / local).rename(aside)

    def download(dataset_id):
        get_dataset_path(dataset_id).parent.mkdir(parents=True, exist_ok=True)
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
        r"actions must be vectors of real numbers \(a Box\), not Discrete\(3\): fqi and the discrete_",
    ),
    "unbounded": ({"action_space": gym.spaces.Box(-np.inf, np.inf, (1,))}, {}, "finite bounds"),
    "image": ({"observation_space": IMAGE}, {"observations": np.zeros((31, 32, 32, 3), np.uint8)}, "images"),
    "nested image": (
        {
            "observation_space": gym.spaces.Dict(
                {"speed": gym.spaces.Discrete(3), "camera": gym.spaces.Dict({"rgb": IMAGE})}
            )
        },
        {"observations": {"speed": np.zeros(31, int), "camera": {"rgb": np.zeros((31, 32, 32, 3), np.uint8)}}},
        "observation camera/rgb must hold numbers",
    ),
    "whole actions": (
        {"action_space": gym.spaces.Box(0, 9, (1,), np.int64)},
        {"actions": np.zeros((30, 1), np.int64)},
        "must be real vectors",
    ),
    "matrices": (
        {"action_space": gym.spaces.Box(-1, 1, (2, 2))},
        {"actions": np.zeros((30, 2, 2), np.float32)},
        "must be real vectors",
    ),
    "a constant action": (
        {"action_space": gym.spaces.Box(np.float32([-1, 0]), np.float32([1, 0]))},
        {"actions": np.zeros((30, 2), np.float32)},
        "each low below its high",
    ),
    "many discrete": (
        {"action_space": gym.spaces.MultiDiscrete([3, 4])},
        {"actions": np.zeros((30, 2), np.int64)},
        "not MultiDiscrete.*other scripts a Box",
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
    [("unbounded", r"actions must be numbered \(a Discrete\), not Box"), ("image", "must hold numbers, no images")],
)
def test_refuses_spaces_it_cannot_train_discrete_actions_on(make_dataset, name, message):
    spaces, fields, _ = REFUSED[name]
    if name == "image":
        spaces, fields = spaces | REFUSED["discrete"][0], fields | REFUSED["discrete"][1]
    dataset_id = make_dataset(episodes=[random_episode(0, **fields)], **spaces)
    with pytest.raises(BadInput, match=rf"test/data-v0: .*{message}"):
        load_dataset(dataset_id, discrete=True)


def test_more_actions_than_can_be_stored_are_refused(make_dataset):
    space = gym.spaces.Discrete(2**24 + 1)
    dataset_id = make_dataset(episodes=[random_episode(0, actions=np.zeros(30, np.int64))], action_space=space)
    with pytest.raises(BadInput, match=r"not Discrete\(16777217\): .*2\^24 at most"):
        load_dataset(dataset_id, discrete=True)


def test_takes_either_kind_of_actions_where_asked_to(make_dataset):
    spaces, fields, _ = REFUSED["discrete"]
    make_dataset("test/discrete-v0", [random_episode(0, **fields)], **spaces)
    make_dataset("test/box-v0")
    assert [load_dataset(name, discrete=None).discrete for name in ("test/discrete-v0", "test/box-v0")] == [True, False]


KITCHEN = gym.spaces.Dict(
    {
        "observation": gym.spaces.Box(-np.inf, np.inf, (4,), np.float64),
        "achieved_goal": gym.spaces.Dict({"kettle": gym.spaces.Box(-1, 1, (2,)), "light": gym.spaces.Box(-1, 1, (1,))}),
        "desired_goal": gym.spaces.Dict({"light": gym.spaces.Box(-1, 1, (1,)), "kettle": gym.spaces.Box(-1, 1, (2,))}),
    }
)
MIXED = gym.spaces.Tuple(
    [
        gym.spaces.Discrete(3, start=5),
        gym.spaces.Dict({"flags": gym.spaces.MultiBinary(2), "count": gym.spaces.Box(0, 9, (), np.int64)}),
        gym.spaces.MultiDiscrete([4, 7]),
        gym.spaces.Box(-1, 1, (2, 2)),
    ]
)
NAMES = {
    "kitchen": [
        *(f"{goal}_goal/{part}" for goal in ("achieved", "desired") for part in ("kettle/0", "kettle/1", "light/0")),
        *(f"observation/{i}" for i in range(4)),
    ],
    "mixed": ["0/5", "0/6", "0/7", "1/count/0", "1/flags/0", "1/flags/1", "2/0", "2/1", *(f"3/{i}" for i in range(4))],
}


def by_hand(name, one):
    """A single observation as a list of numbers."""
    if name == "kitchen":
        goals = one["achieved_goal"], one["desired_goal"]
        return [
            *(number for goal in goals for part in ("kettle", "light") for number in goal[part]),
            *one["observation"],
        ]
    phase, counts, codes, matrix = one
    return [
        *(float(phase == k) for k in (5, 6, 7)),
        float(counts["count"]),
        *counts["flags"],
        *codes,
        *np.ravel(matrix),
    ]


@pytest.mark.parametrize(("name", "space"), [("kitchen", KITCHEN), ("mixed", MIXED)])
def test_observations_of_several_parts_are_flattened(make_dataset, name, space):
    """As Minari stores and reads them, and as an environment gives them one by one; each number has a name."""
    space.seed(3)
    samples = [space.sample() for _ in range(6)]
    expected = np.array([by_hand(name, sample) for sample in samples])
    np.testing.assert_allclose([flatten_observations(sample, space) for sample in samples], expected)
    columns = gym.vector.utils.concatenate(space, samples, gym.vector.utils.create_empty_array(space, 6))
    episodes = [random_episode(seed, 5, observations=columns) for seed in range(2)]
    dataset = load_dataset(make_dataset(episodes=episodes, observation_space=space))
    assert dataset.observation_names == NAMES[name] == observation_names(space)
    buffer = ReplayBuffer(dataset, CPU, normalize_observations=False)
    np.testing.assert_allclose(buffer.transitions.observations, np.tile(expected[:-1], (2, 1)), rtol=1e-6)
    np.testing.assert_allclose(buffer.transitions.next_observations, np.tile(expected[1:], (2, 1)), rtol=1e-6)


@pytest.mark.parametrize("number", [-1, 3])
def test_a_number_that_a_discrete_observation_cannot_be_is_refused(make_dataset, datasets_path, number):
    episodes = [random_episode(seed, observations=np.zeros(31, np.int64)) for seed in range(2)]
    dataset = load_dataset(make_dataset(episodes=episodes, observation_space=gym.spaces.Discrete(3)))
    with h5py.File(datasets_path / "test/data-v0" / "data" / "main_data.hdf5", "a") as file:
        file["episode_1"]["observations"][4] = number
    with pytest.raises(BadInput, match="cannot read dataset test/data-v0: Class values must be"):
        ReplayBuffer(dataset, CPU)


def test_actions_beyond_their_bounds_are_told(make_dataset, capsys):
    for share in (0, 2):
        actions = np.ones((30, 1), np.float32)
        actions[:share] = 5
        dataset_id = make_dataset(f"test/{share}-v0", [random_episode(seed, actions=actions) for seed in range(2)])
        assert ReplayBuffer(load_dataset(dataset_id), CPU).transitions.actions.max() <= 1
        assert ("warning: 4 of 60 actions lie beyond their bounds" in capsys.readouterr().err) == (share > 0)


@pytest.mark.parametrize("value", [-5.0, 0.5, 2])
def test_terminations_are_0_or_1(make_dataset, datasets_path, value):
    dataset = load_dataset(make_dataset())
    with h5py.File(datasets_path / "test/data-v0" / "data" / "main_data.hdf5", "a") as file:
        del file["episode_1"]["terminations"]
        file["episode_1"]["terminations"] = np.array([*np.zeros(29), value])
    with pytest.raises(
        BadInput, match=rf"episode 1 .repair or remove it.: step 29: terminations hold {value:g}, .* from 0 to 1"
    ):
        ReplayBuffer(dataset, CPU)


def test_never_imports_what_a_dataset_names(make_dataset, datasets_path, tmp_path, monkeypatch, capsys):
    """Neither an entry point, nor a module in the environment's id, nor a missing space may run code."""
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    path = datasets_path / make_dataset(env="Pendulum-v1") / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    spec = json.loads(metadata["env_spec"])
    for change in ({"id": "evil:Env-v0"}, {"id": "Evil-v0", "entry_point": "evil:Env"}):
        path.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec | change)}))
        with pytest.raises(BadInput, match="not installed"):
            make_environments(load_dataset("test/data-v0"), 1)
    unlike = {"entry_point": "evil:Env", "kwargs": {"g": 5.0}}
    path.write_text(json.dumps(metadata | {"env_spec": json.dumps(spec | unlike)}))
    with pytest.raises(BadInput, match=r"other code, 'evil:Env', .*\(--env-id Pendulum-v1 takes that\)"):
        make_environments(load_dataset("test/data-v0"), 1)
    (environment,) = make_environments(load_dataset("test/data-v0", "Pendulum-v1"), 1)
    assert environment.unwrapped.g == 10
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
        {"dataset_id": "../.."},
        {"dataset_id": "x"},
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
    with pytest.raises(BadInput, match=r"episode 0 .repair or remove it.: rewards are complex numbers"):
        ReplayBuffer(dataset, CPU)


def test_a_module_that_the_user_names_is_imported(make_dataset, tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(
        "import gymnasium\nfrom gymnasium.envs.classic_control.pendulum import PendulumEnv\n"
        "class Env(PendulumEnv):\n    pass\n"
        "gymnasium.register('Theirs-v0', Env, max_episode_steps=7)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (environment,) = make_environments(load_dataset(make_dataset(), "theirs:Theirs-v0"), 1)
    assert type(environment.unwrapped).__module__ == "theirs" and environment.spec.max_episode_steps == 7
    with pytest.raises(BadInput, match=r"'nobodys:Env-v0' cannot be made: .*No module named 'nobodys'"):
        make_environments(load_dataset("test/data-v0", "nobodys:Env-v0"), 1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def (", "cannot be made: invalid syntax"),
        ("import nobodys", "cannot be made: No module named 'nobodys'"),
        ("{}['x']", "cannot be made: 'x'"),
        ("raise SystemExit(5)", "cannot be made: 5"),
        ("", "cannot be made: Environment `Env` doesn't exist"),
        ("import gymnasium\ngymnasium.register('Env-v0', lambda **_: {}['y'])", "cannot be made: 'y'"),
    ],
)
def test_a_users_module_that_fails_is_named(text, reason, make_dataset, tmp_path, monkeypatch):
    name = f"faulty{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadInput, match=re.escape(f"environment '{name}:Env-v0' {reason}")):
        make_environments(load_dataset(make_dataset(), f"{name}:Env-v0"), 1)
    gym.registry.pop("Env-v0", None)


def test_scores_stay_where_the_users_module_registers_the_datas_environment(make_dataset):
    make_dataset(env="Pendulum-v1", ref_min_score=-1000.0, ref_max_score=-200.0)
    assert load_dataset("test/data-v0", "conftest:Pendulum-v1").reference_returns == (-1000, -200)
    assert load_dataset("test/data-v0", "conftest:CartPole-v1").reference_returns is None


@pytest.mark.parametrize("steps", [-1, 10**18])
def test_a_number_of_steps_that_cannot_be(steps, make_dataset, datasets_path):
    path = datasets_path / make_dataset() / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"total_steps": steps}))
    with pytest.raises(BadInput, match=f"test/data-v0: cpu has no room for {steps} steps: give it fewer"):
        ReplayBuffer(load_dataset("test/data-v0"), CPU)


def test_a_device_that_is_too_small_is_one_line(make_dataset, monkeypatch):
    def to(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    dataset = load_dataset(make_dataset())
    monkeypatch.setattr(torch.Tensor, "to", to)
    expected = "has no room for 120 steps: give it fewer: CUDA out of memory. Tried to allocate"
    with pytest.raises(BadInput, match=expected):
        ReplayBuffer(dataset, CPU)


def test_an_id_without_version_or_longer_than_a_path_may_be():
    with pytest.raises(BadInput, match=r"no dataset 'my/logs'.*: ids are .namespace/.name-v0"):
        load_dataset("my/logs")
    with pytest.raises(BadInput, match="File name too long"):
        load_dataset("l" * 300 + "-v0")


@pytest.mark.parametrize("name", ["logs.hdf5", "a/hopper.h5", "table.csv", "table.parquet"])
def test_a_file_is_no_dataset_but_can_become_one(name):
    with pytest.raises(
        BadInput, match=rf"no dataset '{name}'.*or make one of a file: python -m benchmarks.import_logs"
    ):
        load_dataset(name)
