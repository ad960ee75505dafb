"""An HDF5 file in robomimic's layout becomes a dataset with the same numbers, or one line says why not."""

import json

import h5py
import minari
import numpy as np
import pytest
from test_import_logs import ID, assert_refused, import_logs
from test_log_d4rl import imported, imported_again


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A datasets folder of this test alone; files are written beside it."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


LENGTHS = {"demo_10": 2, "demo_2": 4, "demo_0": 3}  # in no order
IN_ORDER = "data/demo_0", "data/demo_2", "data/demo_10"


def robomimic_arrays():
    """Three demos of 3, 4 and 2 rows, of which the second is not done; `object` [T, 2] is sorted before `pos` [T]."""
    rng, arrays = np.random.default_rng(2), {}
    for name, length in LENGTHS.items():
        states = {"object": rng.normal(size=(length + 1, 2)), "pos": rng.normal(size=length + 1)}
        arrays |= {f"data/{name}/obs/{key}": values[:-1] for key, values in states.items()}
        arrays |= {f"data/{name}/next_obs/{key}": values[1:] for key, values in states.items()}
        arrays[f"data/{name}/actions"] = rng.uniform(-1, 1, size=(length, 2))
        arrays[f"data/{name}/rewards"] = np.arange(length) + 10.0 * length
        arrays[f"data/{name}/dones"] = (np.arange(length) == length - 1) & (name != "demo_2")
    return arrays


@pytest.fixture
def robomimic_file(tmp_path):
    def write(**changes):
        changes = {f"data/{name}".replace("__", "/"): values for name, values in changes.items()}
        with h5py.File(tmp_path / "low_dim.hdf5", "w") as file:
            for array, values in (robomimic_arrays() | changes).items():
                if values is not None:
                    file[array] = values
            file["data"].attrs["env_args"] = json.dumps({"env_name": "evil:Env-v0", "type": 2, "env_kwargs": {}})
        return tmp_path / "low_dim.hdf5"

    return write


def expected(group, keys=("object", "pos")):
    arrays = robomimic_arrays()
    parts = [np.column_stack([arrays[f"{demo}/{group}/{key}"] for key in keys]) for demo in IN_ORDER]
    return np.concatenate(parts).astype(np.float32)


def without_next(**changes):
    """Changes that leave a file without next observations."""
    return {name[5:].replace("/", "__"): None for name in robomimic_arrays() if "next_obs" in name} | changes


def test_with_next_observations(robomimic_file):
    buffer, said = imported(robomimic_file())
    transitions = buffer.transitions
    np.testing.assert_array_equal(transitions.observations, expected("obs"))
    np.testing.assert_array_equal(transitions.next_observations, expected("next_obs"))
    assert transitions.rewards.tolist() == [30, 31, 32, 40, 41, 42, 43, 20, 21]  # demo_2 before demo_10
    assert transitions.terminations.tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert buffer.episode_lengths.tolist() == [3, 4, 2]
    np.testing.assert_allclose(transitions.actions[:3], robomimic_arrays()["data/demo_0/actions"], rtol=1e-6)
    assert said.splitlines() == [
        "2 of 3 demos are done at their end: taken as terminated (--dones)",
        "observations: object (2), pos (1)",
        "1 episodes end neither terminated nor truncated: taken as truncated",
        "actions: action_0 from -1 to 1, action_1 from -1 to 1",
        f"for what to doubt in them: python -m benchmarks.inspect_dataset {ID}",
        f"{ID}: 9 transitions in 3 episodes",
    ]
    description = minari.load_dataset(ID).storage.metadata["description"]
    assert description == "imported from low_dim.hdf5: observations object (2), pos (1); actions action_0, action_1"


def test_without_next_observations(robomimic_file):
    buffer, said = imported(robomimic_file(**without_next()))
    assert buffer.transitions.rewards.tolist() == [30, 31, 32, 40, 41, 42, 20, 21]
    np.testing.assert_array_equal(buffer.transitions.next_observations[3:6], expected("obs")[4:7])
    assert buffer.transitions.terminations.tolist() == [0, 0, 1, 0, 0, 0, 0, 1] and "dropped 1 rows" in said


def test_dones_of_a_limit_are_no_terminations(robomimic_file):
    buffer, said = imported(robomimic_file(), "--dones", "truncated")
    assert not buffer.transitions.terminations.any() and buffer.episode_lengths.tolist() == [3, 4, 2]
    assert "2 of 3 demos are done at their end: taken as truncated (--dones)\n" in said
    path = robomimic_file(**without_next())
    assert imported_again(path, "--dones", "truncated").episode_lengths.tolist() == [2, 3, 1]


def test_demo_ends_with_its_first_done(robomimic_file):
    """As robosuite's do, which hold on to their success for some steps."""
    buffer, said = imported(robomimic_file(demo_2__dones=np.array([0, 1, 1, 1])))
    assert buffer.transitions.rewards.tolist() == [30, 31, 32, 40, 41, 20, 21]
    assert buffer.transitions.terminations.tolist() == [0, 0, 1, 0, 1, 0, 1]
    np.testing.assert_array_equal(buffer.transitions.next_observations[4], expected("next_obs")[4])
    assert "dropped 2 rows: those after the first done of their demo\n" in said


def test_next_observations_that_do_not_go_on_cut_the_episode(robomimic_file):
    following = robomimic_arrays()["data/demo_2/next_obs/pos"]
    following[1] = 9
    buffer, said = imported(robomimic_file(demo_2__next_obs__pos=following))
    assert buffer.episode_lengths.tolist() == [3, 2, 2, 2] and "1 cuts inside episodes" in said
    assert buffer.transitions.next_observations[4, 2] == 9


def with_images():
    arrays = {f"{name}__obs__camera": np.zeros((length, 4, 4, 3), np.uint8) for name, length in LENGTHS.items()}
    return arrays | {"demo_0__states": np.zeros((3, 9)), "demo_2__obs__late": np.zeros(4)}


def test_observation_keys(robomimic_file):
    buffer, said = imported(robomimic_file(**with_images()), "--observation-keys", "pos", "object")
    np.testing.assert_array_equal(buffer.transitions.observations, expected("obs", ("pos", "object")))
    np.testing.assert_array_equal(buffer.transitions.next_observations, expected("next_obs", ("pos", "object")))
    assert "observations: pos (1), object (2)\n" in said
    assert "not used: data/demo_*/obs/camera, data/demo_*/obs/late, data/demo_*/states\n" in said


def test_other_groups_are_named(robomimic_file):
    path = robomimic_file(mask=np.zeros(1))
    with h5py.File(path, "a") as file:
        file["mask/train"] = np.array([b"demo_0"])
    assert "not used: mask, data/mask\n" in imported(path)[1]


def test_robomimics_environment_is_never_made(robomimic_file, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert imported(robomimic_file())[0].dataset.env_id is None


def test_with_an_environment_and_reference_returns(robomimic_file):
    changes = {f"{name}__actions": np.full((length, 1), 1.5) for name, length in LENGTHS.items()}
    path = robomimic_file(**changes)
    dataset = imported(path, "--env-id", "Pendulum-v1", "--reference-returns", "-1200", "-150")[0].dataset
    assert (dataset.env_id, dataset.action_high.tolist()) == ("Pendulum-v1", [2])
    assert dataset.reference_returns == (-1200, -150)


NAN = robomimic_arrays()["data/demo_2/obs/object"]
NAN[3, 1] = np.nan
RAW = {f"{name}__{array}": None for name in LENGTHS for array in ("obs__object", "obs__pos", "rewards", "dones")}
ROBOMIMIC_REFUSED = {
    "image": (
        with_images(),
        "observations must be vectors of numbers, not camera (an array of uint8 and shape (3, 4, ",
    ),
    "and what to do": (with_images(), "give --observation-keys object pos"),
    "raw": (without_next(**RAW), "data/demo_0/obs holds no observations: robomimic's scripts/dataset_states_to_obs.py"),
    "no actions": ({"demo_0__actions": None}, "low_dim.hdf5: data/demo_0 lacks actions"),
    "no rewards": ({"demo_10__rewards": None}, "data/demo_10 lacks rewards"),
    "no key": ({"demo_2__obs__pos": None, "demo_2__next_obs__pos": None}, "data/demo_2 lacks obs/pos, next_obs/pos"),
    "no next": ({"demo_2__next_obs__pos": None}, "data/demo_2 lacks next_obs/pos"),
    "key size": (
        {"demo_10__obs__pos": np.zeros((2, 3))},
        "demo_10/obs/pos has 3 numbers a row, and that of data/demo_0 ",
    ),
    "action size": (
        {"demo_10__actions": np.zeros((2, 3))},
        "data/demo_10/actions has 3 numbers a row, and that of data",
    ),
    "whole numbers": (
        {"demo_2__actions": np.zeros((4, 2), int)},
        "data/demo_2/actions must be vectors of real numbers",
    ),
    "lengths": ({"demo_2__obs__pos": np.zeros(3)}, "data/demo_2: the arrays do not match in length: {'actions': 4, "),
    "empty": (
        {name[5:].replace("/", "__"): a[:0] for name, a in robomimic_arrays().items() if "demo_2" in name},
        "low_dim.hdf5: data/demo_2 is empty",
    ),
    "nan": ({"demo_2__obs__object": NAN}, "data/demo_2/obs/object[3, 1] = nan is not a finite number"),
    "flag": (
        {"demo_2__dones": np.array([0, 0, 2, 0])},
        "data/demo_2/dones must be 0 and 1, or true and false, and holds 2.0",
    ),
    "beyond": ({"demo_0__actions": np.full((3, 2), -1.5)}, "actions reach beyond [-1, 1], from -1.5 to "),
    "text": (
        {"demo_0__rewards": np.array([b"cos\nsystem"] * 3)},
        "data/demo_0/rewards must be vectors of real numbers",
    ),
}


@pytest.mark.parametrize("name", ROBOMIMIC_REFUSED)
def test_refuses_robomimic_files(name, robomimic_file, folder):
    changes, message = ROBOMIMIC_REFUSED[name]
    assert_refused(import_logs(robomimic_file(**changes)), message, folder)


def test_refuses_unknown_observation_keys(robomimic_file, folder):
    outcome = import_logs(robomimic_file(), "--observation-keys", "pos", "eef")
    assert_refused(outcome, "data/demo_0/obs has object, pos, not eef", folder)


def test_rewards_and_dones_with_a_column(robomimic_file):
    arrays = {name.removeprefix("data/").replace("/", "__"): values for name, values in robomimic_arrays().items()}
    columns = {name: values[:, None] for name, values in arrays.items() if name.endswith(("rewards", "dones"))}
    buffer, _ = imported(robomimic_file(**columns))
    assert buffer.fingerprint == imported_again(robomimic_file()).fingerprint


def test_whole_numbers_as_actions_are_refused_with_the_way_on(robomimic_file, folder):
    message = (
        "data/demo_0/actions must be vectors of real numbers, not an array of int32 and shape (3, 2): if they are am"
    )
    assert_refused(import_logs(robomimic_file(demo_0__actions=np.ones((3, 2), np.int32))), message, folder)


def test_refuses_timeouts_which_the_layout_does_not_have(robomimic_file, folder):
    assert_refused(import_logs(robomimic_file(), "--timeouts", "cuts"), "--timeouts is for D4RL's layout", folder)
