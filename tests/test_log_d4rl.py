"""An HDF5 file in D4RL's layout becomes a dataset with the same numbers, or one line says why not."""

import h5py
import minari
import numpy as np
import pytest
from log_steps import Steps, find_gaps
from test_import_logs import ID, assert_refused, import_logs, load


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A datasets folder of this test alone; files are written beside it."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def imported(path, *arguments):
    outcome = import_logs(path, *arguments)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    return load(), outcome.stdout


def imported_again(path, *arguments):
    assert import_logs(path, *arguments, dataset_id="test/again-v0").returncode == 0
    return load("test/again-v0")


def d4rl_arrays():
    """Three episodes of 4, 3 and 3 rows: a termination, a time limit, and one the file breaks off."""
    rng = np.random.default_rng(0)
    return {
        "observations": rng.normal(size=(10, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(10, 1)).astype(np.float32),
        "rewards": np.arange(10, dtype=np.float32),
        "terminals": np.arange(10) == 3,
        "timeouts": np.arange(10) == 6,
    }


@pytest.fixture
def d4rl_file(tmp_path):
    def write(name="logs.hdf5", **changes):
        with h5py.File(tmp_path / name, "w") as file:
            for array, values in (d4rl_arrays() | changes).items():
                if values is not None:
                    file[array] = values
        return tmp_path / name

    return write


def next_observations():
    """What each row led to; after the last rows of episodes, what is in no other row."""
    following = np.roll(d4rl_arrays()["observations"], -1, axis=0)
    following[[3, 6, 9]] = [[70, 0, 0], [71, 0, 0], [72, 0, 0]]
    return following


def test_without_next_observations(d4rl_file):
    buffer, said = imported(d4rl_file())
    transitions, arrays, rows = buffer.transitions, d4rl_arrays(), [0, 1, 2, 3, 4, 5, 7, 8]
    assert transitions.rewards.tolist() == rows  # what followed 6 and 9 is not known
    assert transitions.terminations.tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert buffer.episode_lengths.tolist() == [4, 2, 2]
    np.testing.assert_array_equal(transitions.observations, arrays["observations"][rows])
    np.testing.assert_array_equal(transitions.next_observations, arrays["observations"][[1, 2, 3, 3, 5, 6, 8, 9]])
    np.testing.assert_array_equal(transitions.actions, arrays["actions"][rows])
    assert said.splitlines() == [
        "observations: 3 numbers, as the file has them",
        "1 episodes end neither terminated nor truncated: taken as truncated",
        "dropped 2 rows: the last ones of episodes that did not terminate, with no next observation",
        "actions: action_0 from -1 to 1",
        f"for what to doubt in them: python -m benchmarks.inspect_dataset {ID}",
        f"{ID}: 8 transitions in 3 episodes",
    ]
    dataset = minari.load_dataset(ID)
    assert [episode.truncations[-1] for episode in dataset] == [False, True, True]
    assert [episode.terminations[-1] for episode in dataset] == [True, False, False]
    names = "observations 3 numbers, as the file has them; actions action_0"
    assert dataset.storage.metadata["description"] == f"imported from logs.hdf5: {names}"


def test_with_next_observations(d4rl_file):
    buffer, said = imported(d4rl_file(next_observations=next_observations()))
    np.testing.assert_array_equal(buffer.transitions.next_observations, next_observations())
    assert buffer.transitions.rewards.tolist() == list(range(10))
    assert buffer.episode_lengths.tolist() == [4, 3, 3]
    assert "cut" not in said and "dropped" not in said


def test_next_observations_of_ends_may_be_missing(d4rl_file):
    """A termination has no value after it, so its own observation stands in; the last row of a cut is left out."""
    following = next_observations()
    following[[3, 6, 9], 1] = np.nan
    buffer, said = imported(d4rl_file(next_observations=following))
    observations = d4rl_arrays()["observations"]
    np.testing.assert_array_equal(buffer.transitions.next_observations, observations[[1, 2, 3, 3, 5, 6, 8, 9]])
    assert "dropped 2 rows" in said


def test_next_observations_that_do_not_go_on_cut_the_episode(d4rl_file):
    following = next_observations()
    following[[1, 8]] = [[0.5, 0, 0], [0.6, 0, 0]]
    buffer, said = imported(d4rl_file(next_observations=following))
    np.testing.assert_array_equal(buffer.transitions.next_observations, following)
    assert buffer.transitions.rewards.tolist() == list(range(10))
    assert buffer.transitions.terminations.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert buffer.episode_lengths.tolist() == [2, 2, 3, 2, 1]
    assert "2 cuts inside episodes, each after a row whose next observation is not the next row's observation\n" in said
    assert [episode.truncations[-1] for episode in minari.load_dataset(ID)] == [True, False, True, True, True]


def test_transitions_in_no_order_stay_what_they_are(d4rl_file):
    following = np.random.default_rng(1).normal(size=(10, 3)).astype(np.float32)
    buffer, said = imported(d4rl_file(next_observations=following))
    np.testing.assert_array_equal(buffer.transitions.next_observations, following)
    assert buffer.episode_lengths.tolist() == [1] * 10 and "7 cuts inside episodes" in said


def test_what_a_large_number_hides_is_seen(d4rl_file):
    """A pressure of 101,325 that changes by one is the same number to four digits, in whatever row."""
    arrays = {name: values + np.float32(101_325) for name, values in (("observations", d4rl_arrays()["observations"]),)}
    following = np.random.default_rng(1).permutation(np.roll(arrays["observations"], -1, axis=0))
    buffer, said = imported(d4rl_file(**arrays, next_observations=following))
    assert buffer.episode_lengths.tolist() == [1] * 10 and "7 cuts inside episodes" in said
    in_order = imported_again(d4rl_file(**arrays, next_observations=np.roll(arrays["observations"], -1, axis=0)))
    assert in_order.episode_lengths.tolist() == [4, 3, 3]


def test_next_observations_that_are_rounded_cut_nothing(d4rl_file):
    following = next_observations() * (1 + 1e-6)
    assert imported(d4rl_file(next_observations=following))[0].episode_lengths.tolist() == [4, 3, 3]


@pytest.mark.parametrize("digits", [4, 3])
def test_next_observations_with_fewer_digits_cut_nothing(digits, d4rl_file):
    """Of a constant column, and of temperatures near 20 that hardly vary."""
    observations = d4rl_arrays()["observations"].astype(np.float64) / 3 + 20
    observations[:, 1] = 9.80665
    following = np.roll(observations, -1, axis=0).round(digits)
    buffer, _ = imported(d4rl_file(observations=observations, next_observations=following))
    assert buffer.episode_lengths.tolist() == [4, 3, 3]


@pytest.mark.parametrize(
    ("level", "spread", "inside", "beyond"), [(10.0, 20.0, 0.0005, 0.005), (101_325.0, 1.0, 0.01, 0.06)]
)
def test_how_far_a_next_observation_may_be_from_the_next_row(level, spread, inside, beyond):
    """A ten-thousandth of the number, or a hundredth of the column's deviation, whichever is less."""
    observations = level + spread * np.tile([-1.0, 1.0], 5)[:, None]
    following = np.roll(observations, -1, axis=0)
    following[[2, 5]] += [[inside], [beyond]]
    nothing = np.zeros(10)
    steps = Steps(observations, nothing, nothing, nothing > 0, nothing > 0, following, np.array([10]))
    assert find_gaps(steps).tolist() == [5]


def test_a_termination_at_the_time_limit_is_one(d4rl_file):
    buffer, _ = imported(d4rl_file(terminals=np.isin(np.arange(10), [3, 6])))
    assert buffer.transitions.terminations.tolist() == [0, 0, 0, 1, 0, 0, 1, 0, 0]
    assert buffer.episode_lengths.tolist() == [4, 3, 2]


def test_rows_after_a_terminal_are_another_episode(d4rl_file):
    buffer, _ = imported(d4rl_file(terminals=np.isin(np.arange(10), [3, 4, 5, 9])))
    assert buffer.episode_lengths.tolist() == [4, 1, 1, 3]  # row 6 is an episode by itself, cut and so no transition
    assert buffer.transitions.terminations.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 1]


def test_episode_of_nothing_but_a_time_limit_is_none(d4rl_file):
    buffer, said = imported(d4rl_file(timeouts=np.isin(np.arange(10), [4, 6])))  # row 4 is an episode by itself
    assert buffer.episode_lengths.tolist() == [4, 1, 2]
    assert "dropped 3 rows" in said and "dropped 1 episodes with them" in said


def test_without_timeouts_no_limit_is_asked_for(d4rl_file, folder):
    """An episode that a limit cut would run on into the next one."""
    path = d4rl_file(
        timeouts=None, episode_terminals=np.isin(np.arange(10), [3, 6]), **{"infos/goal": np.zeros((10, 2))}
    )
    message = (
        "has no timeouts, so an episode that a limit cut would run on into the next one: name the array that marks"
    )
    assert_refused(import_logs(path), message, folder)
    assert_refused(import_logs(path), "(not used: episode_terminals, infos/goal)\n", folder)
    assert_refused(
        import_logs(path, "--timeouts", "ends"), "has no such array: not used: episode_terminals, inf", folder
    )
    assert_refused(import_logs(path, "--timeouts", "rewards"), "--timeouts rewards: is read as such already", folder)
    assert_refused(import_logs(path, "--timeouts", "infos/goal"), "infos/goal must be one number a row", folder)


def test_without_timeouts_and_without_limits(d4rl_file):
    buffer, said = imported(d4rl_file(timeouts=None), "--timeouts", "")
    assert buffer.episode_lengths.tolist() == [4, 5]
    assert said.startswith("observations: 3 numbers")


def test_timeouts_under_another_name(d4rl_file):
    ends = np.isin(np.arange(10), [3, 6, 9])  # all ends, those by terminals, too
    for name in ("episode_terminals", "infos/ends"):
        buffer, said = imported(d4rl_file(**{"timeouts": None, name: ends}), "--timeouts", name)
        assert buffer.fingerprint == imported_again(d4rl_file()).fingerprint
        assert "not used" not in said
        for dataset_id in (ID, "test/again-v0"):
            minari.delete_dataset(dataset_id)


def test_timeouts_that_are_nowhere_are_warned_of(d4rl_file):
    outcome = import_logs(d4rl_file(timeouts=np.zeros(10), cuts=np.zeros(10), seeds=np.zeros(3)))
    assert outcome.returncode == 0 and load().episode_lengths.tolist() == [4, 5]
    assert outcome.stderr == (
        "warning: no episode is cut by a limit: terminals alone end them, and the longest has 6 rows: if one of these "
        "marks ends, name it with --timeouts (not used: cuts); --timeouts '' says that all is well\n"
    )
    path = d4rl_file(timeouts=np.zeros(10))
    assert imported_again(path, "--timeouts", "").episode_lengths.tolist() == [4, 5]


def test_next_observations_that_run_on_across_every_limit_are_warned_of(d4rl_file):
    following = np.roll(d4rl_arrays()["observations"], -1, axis=0)
    outcome = import_logs(d4rl_file(timeouts=None, next_observations=following))
    assert outcome.returncode == 0
    assert (
        "no episode is cut by a limit" in outcome.stderr and "(no other array has its number of rows)" in outcome.stderr
    )


def test_flags_that_are_words(d4rl_file):
    flags = {name: np.where(d4rl_arrays()[name], b" True", b"False") for name in ("terminals", "timeouts")}
    assert imported(d4rl_file(**flags))[0].fingerprint == imported_again(d4rl_file()).fingerprint


def test_next_observations_say_where_a_time_limit_was(d4rl_file):
    buffer, said = imported(d4rl_file(timeouts=None, next_observations=next_observations()))
    assert buffer.episode_lengths.tolist() == [4, 3, 3] and "1 cuts inside" in said and "no timeouts" not in said


def test_arrays_with_a_column_and_of_other_types(d4rl_file):
    arrays = {name: values[:, None] for name, values in d4rl_arrays().items() if values.ndim == 1}
    doubles = {name: d4rl_arrays()[name].astype(np.float64) for name in ("observations", "actions")}
    columns, _ = imported(d4rl_file(**arrays, **doubles))
    assert columns.dataset.num_steps == 8
    assert columns.fingerprint == imported_again(d4rl_file()).fingerprint


def test_whole_numbers_keep_their_digits(d4rl_file):
    """As counters have them: 20,000,001 is none of float32."""
    counted = 20_000_001 + 2 * np.arange(30, dtype=np.int32).reshape(10, 3)
    imported(d4rl_file(observations=counted))
    np.testing.assert_array_equal(minari.load_dataset(ID)[0].observations[:4], counted[:4])


def test_takes_action_bounds_from_the_environment(d4rl_file):
    actions = 1.7 * d4rl_arrays()["actions"]
    buffer, said = imported(d4rl_file(actions=actions), "--env-id", "Pendulum-v1")
    assert (buffer.dataset.env_id, buffer.dataset.action_high.tolist()) == ("Pendulum-v1", [2])
    np.testing.assert_allclose(buffer.transitions.actions[0], actions[0] / 2)
    assert "actions: action_0 from -2 to 2\n" in said


def test_action_bounds_that_are_given(d4rl_file):
    path = d4rl_file(actions=np.linspace(-0.5, 3, 10)[:, None])
    assert imported(path, "--action-high", "3")[0].dataset.action_low.tolist() == [-1]
    buffer = imported_again(path, "--action-low", "-2", "--action-high", "4")
    assert (buffer.dataset.action_low.tolist(), buffer.dataset.action_high.tolist()) == ([-2], [4])


def test_environment_that_cannot_be_made(d4rl_file):
    buffer, said = imported(d4rl_file(), "--env-id", "Hopper-v2")  # its bindings are gone
    assert "'Hopper-v2' cannot be made" in said
    assert (buffer.dataset.env_id, buffer.dataset.action_high.tolist()) == ("Hopper-v2", [1])


def test_d4rls_reference_returns_by_the_files_name(d4rl_file):
    path = d4rl_file("hopper_medium-v2.hdf5")
    buffer, said = imported(path)
    assert buffer.dataset.reference_returns == (-20.272305, 3234.3)
    assert "scores: 0 for a return of -20.2723, 100 for 3234.3\n" in said
    assert imported_again(path, "--reference-returns", "0", "10").dataset.reference_returns == (0, 10)


def test_the_environment_says_more_of_returns_than_the_files_name(d4rl_file):
    buffer, said = imported(d4rl_file("hopper_medium-v2.hdf5"), "--env-id", "Pendulum-v1")
    assert buffer.dataset.reference_returns is None and "no scores" in said


def test_other_arrays_are_named(d4rl_file):
    others = {"observation_mean": np.zeros(3), "infos/qpos": np.zeros((10, 2)), "metadata/policy": b"cos\nsystem\n"}
    buffer, said = imported(d4rl_file(**others))
    assert buffer.dataset.num_steps == 8
    assert said.startswith("not used: infos/qpos, metadata, observation_mean\n")


def number_at(name, place, value):
    values = d4rl_arrays()[name].astype(np.float64)
    values[place] = value
    return {name: values}


EMPTY = {"observations": (0, 3), "actions": (0, 1), "rewards": (0,), "terminals": (0,), "timeouts": (0,)}
D4RL_REFUSED = {
    "missing": (
        {"rewards": None},
        "is in neither layout: for D4RL's it lacks rewards; for robomimic's, groups data/dem",
    ),
    "lengths": ({"rewards": np.zeros(9)}, "do not match in length: {'observations': 10, 'actions': 10, 'rewards': 9"),
    "empty": ({name: np.zeros(shape) for name, shape in EMPTY.items()}, "logs.hdf5 is empty"),
    "beyond": (
        {"actions": np.full((10, 1), 1.5)},
        "beyond [-1, 1], from 1.5 to 1.5: name an environment that bounds th",
    ),
    "whole numbers": (
        {"actions": np.zeros(10, np.int64)},
        "actions must be vectors of real numbers, not an array of in",
    ),
    "image": (
        {"observations": np.zeros((10, 8, 8))},
        "observations must be vectors of real numbers, not an array of fl",
    ),
    "no numbers": ({"observations": np.zeros((10, 0))}, "observations must be vectors"),
    "text": (
        {"rewards": np.array([b"cos\nsystem"] * 10)},
        "rewards must be vectors of real numbers, not an array of |S",
    ),
    "complex": (
        {"rewards": np.zeros(10, np.complex64)},
        "rewards must be vectors of real numbers, not an array of compl",
    ),
    "group": ({"rewards": None, "rewards/0": np.zeros(10)}, "rewards must be vectors of real numbers, not a group"),
    "two rewards": ({"rewards": np.zeros((10, 2))}, "rewards must be one number a row, not an array of float64"),
    "nan": (number_at("rewards", 5, np.nan), "logs.hdf5: rewards[5] = nan is not a finite number: repair it"),
    "infinite": (number_at("observations", (7, 2), np.inf), "observations[7, 2] = inf is not a finite number"),
    "beyond float32": (number_at("actions", (1, 0), 1e300), "actions[1, 0] = 1e+300 is not a finite number"),
    "flag": (
        {"terminals": np.arange(10)},
        "terminals must be 0 and 1, or true and false, and holds 2.0, 3.0, 4.0, 5.0, 6.0, ...",
    ),
    "negative flag": (
        {"timeouts": -5.0 * (np.arange(10) == 6)},
        "timeouts must be 0 and 1, or true and false, and hol",
    ),
    "word for a flag": (
        {"terminals": np.where(np.arange(10) == 3, b"failed", b"")},
        "terminals must be 0 and 1, or true and false, and holds '', 'failed'",
    ),
    "words in columns": ({"terminals": np.full((10, 2), b"true")}, "terminals must be one word a row"),
    "next size": ({"next_observations": np.zeros((10, 2))}, "next_observations are of another size than observations"),
    "next nan": ({"next_observations": np.full((10, 3), np.nan)}, "next_observations[0, 0] = nan is not a finite"),
    "next nan, short": (
        {"next_observations": np.full((4, 3), np.nan)},
        "next_observations[0, 0] = nan is not a finite",
    ),
}


@pytest.mark.parametrize("name", D4RL_REFUSED)
def test_refuses_d4rl_files(name, d4rl_file, folder):
    changes, message = D4RL_REFUSED[name]
    assert_refused(import_logs(d4rl_file(**changes)), message, folder)


OPTIONS_REFUSED = {
    "actions": (["--env-id", "MountainCarContinuous-v0"], "has observations of size 2, the file of size 3"),
    "table": (["--reward", "gain", "--discrete-action", "dose"], "--reward, --discrete-action: for tables, which"),
    "robomimic": (["--dones", "truncated"], "--observation-keys and --dones are for robomimic's layout: "),
}


@pytest.mark.parametrize("name", OPTIONS_REFUSED)
def test_refuses_options_for_d4rl_files(name, d4rl_file, folder):
    arguments, message = OPTIONS_REFUSED[name]
    assert_refused(import_logs(d4rl_file(), *arguments), message, folder)


def test_refuses_an_environment_with_other_actions(d4rl_file, folder):
    outcome = import_logs(d4rl_file(actions=np.zeros((10, 2))), "--env-id", "Pendulum-v1")
    assert_refused(outcome, "--env-id Pendulum-v1 has actions of size 1, the file of size 2", folder)


def test_refuses_a_file_that_is_missing_or_not_hdf5(tmp_path, folder, d4rl_file):
    assert_refused(import_logs(tmp_path / "absent.hdf5"), "no file", folder)
    (tmp_path / "text.h5").write_text("not HDF5")
    assert_refused(import_logs(tmp_path / "text.h5"), "text.h5 as HDF5", folder)
    path = d4rl_file()
    path.write_bytes(path.read_bytes()[:3000])
    assert_refused(import_logs(path), "logs.hdf5 as HDF5", folder)


@pytest.mark.parametrize("content", [{}, {"data/episode_0/obs": np.zeros(3)}, {"data": np.zeros(3)}])
def test_refuses_other_layouts(content, tmp_path, folder):
    with h5py.File(tmp_path / "logs.hdf5", "w") as file:
        file.update(content)
    message = (
        "is in neither layout: for D4RL's it lacks observations, actions, rewards, terminals; for robomimic's, gro"
    )
    assert_refused(import_logs(tmp_path / "logs.hdf5"), message, folder)
