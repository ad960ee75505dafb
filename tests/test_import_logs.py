"""A table of logs becomes a dataset with the same numbers, or one line says why not."""

import json
import os
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import minari
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, run_script
from minari.namespace import create_namespace

from common.data import ReplayBuffer, load_dataset

ID = "test/imported-v0"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A datasets folder of this test alone; tables are written beside it."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def table(**changes):
    """Two episodes of three rows: "b" terminates; "a" is cut, and nobody knows what its last action led to.

    A change of None removes the column.
    """
    columns = {
        "episode": ["b", "b", "b", "a", "a", "a"],
        "obs_10": np.arange(6) / 7,
        "obs_2": np.arange(6) + 10.1,
        "action_0": [-1.5, 0.3, 0.5, 0.6, 2.5, 99.0],
        "reward": [1.0, 2.0, 3.0, 4.0, 5.0, 6.1],
        "terminated": [False, False, True, False, False, False],
        "truncated": [False, False, False, False, False, True],
        "note": "of no interest",
    }
    return pd.DataFrame({name: values for name, values in (columns | changes).items() if values is not None})


def following(**changes):
    """The table with next observations; the last ones of the episodes are in no other row."""
    values = table()
    last = {2: (70.0, 80.0), 5: (71.0, 81.0)}
    for index, name in enumerate(("obs_10", "obs_2")):
        column = values[name].shift(-1)
        for row, observation in last.items():
            column[row] = observation[index]
        values[f"next_{name}"] = column
    return values.assign(**changes)


def write(values, path):
    values.to_csv(path, index=False) if path.suffix == ".csv" else values.to_parquet(path)
    return path


def import_logs(path, *arguments, dataset_id=ID):
    return run_script("benchmarks.import_logs", str(path), "--dataset-id", dataset_id, *arguments)


def load(dataset_id=ID):
    return ReplayBuffer(load_dataset(dataset_id), torch.device("cpu"), normalize_observations=False)


def imported(values, tmp_path, *arguments, dataset_id=ID, suffix=".csv"):
    outcome = import_logs(write(values, tmp_path / f"logs{suffix}"), *arguments, dataset_id=dataset_id)
    assert outcome.returncode == 0, outcome.stderr
    return load(dataset_id), outcome.stdout


# --- What is written ---


def test_values_without_next_observations(tmp_path):
    buffer, said = imported(table(), tmp_path)
    rows = [0, 1, 2, 3, 4]  # row 5 is what row 4 led to
    transitions = buffer.transitions
    observations = table()[["obs_2", "obs_10"]].to_numpy(np.float32)
    np.testing.assert_array_equal(transitions.observations, observations[rows])
    np.testing.assert_array_equal(transitions.next_observations, observations[[1, 2, 2, 4, 5]])
    assert transitions.rewards.tolist() == [1, 2, 3, 4, 5]
    assert transitions.terminations.tolist() == [0, 0, 1, 0, 0]
    assert buffer.episode_lengths.tolist() == [3, 2]
    assert (buffer.dataset.action_low.tolist(), buffer.dataset.action_high.tolist()) == ([-1.5], [2.5])
    np.testing.assert_allclose(transitions.actions[:, 0], [-1, -0.1, 0, 0.05, 1], atol=1e-6)
    assert said.splitlines() == [
        "not used: note",
        "observations: obs_2, obs_10",
        "dropped 1 rows: the last ones of episodes that did not terminate, with no next observation",
        "actions: action_0 from -1.5 to 2.5",
        f"for what to doubt in them: python -m benchmarks.inspect_dataset {ID}",
        f"{ID}: 5 transitions in 2 episodes",
    ]
    dataset = minari.load_dataset(ID)
    assert [episode.truncations.tolist() for episode in dataset] == [[False, False, False], [False, True]]
    description = dataset.storage.metadata["description"]
    assert description == "imported from logs.csv: observations obs_2, obs_10; actions action_0"


def test_values_with_next_observations(tmp_path):
    buffer, said = imported(following(), tmp_path)
    expected = following()[["next_obs_2", "next_obs_10"]].to_numpy(np.float32)
    np.testing.assert_array_equal(buffer.transitions.next_observations, expected)
    assert buffer.transitions.terminations.tolist() == [0, 0, 1, 0, 0, 0]
    assert buffer.transitions.rewards[-1] == np.float32(6.1)
    assert "dropped" not in said


@pytest.mark.parametrize("changes", [{"truncated": None}, {"truncated": [0] * 6}])
def test_an_episode_that_does_not_terminate_is_cut_by_the_end_of_the_log(tmp_path, changes):
    buffer, said = imported(table(**changes), tmp_path)
    assert "1 episodes end neither terminated nor truncated: taken as truncated" in said
    assert buffer.fingerprint == imported(table(), tmp_path, dataset_id="test/again-v0")[0].fingerprint
    assert minari.load_dataset(ID)[1].truncations.tolist() == [False, True]


@pytest.mark.parametrize("values", [table(), following()])
def test_csv_and_parquet_give_the_same_dataset(tmp_path, values):
    values["action_0"] = np.random.default_rng(0).normal(size=6)
    buffer, _ = imported(values, tmp_path)
    indexed = values.set_index("obs_2")  # pandas' own index is a column like others
    again, _ = imported(indexed, tmp_path, dataset_id="test/parquet-v0", suffix=".parquet")
    assert again.fingerprint == buffer.fingerprint


def test_next_observations_can_be_ignored(tmp_path):
    buffer, said = imported(following(next_obs_2=0.0), tmp_path, "--next-observation-prefix", "")
    assert "not used: note, next_obs_10, next_obs_2\n" in said
    assert buffer.fingerprint == imported(table(), tmp_path, dataset_id="test/again-v0")[0].fingerprint


def test_columns_without_numbers_stay_in_the_tables_order(tmp_path):
    values = following().rename(columns=lambda name: name.replace("obs_10", "obs_z").replace("obs_2", "obs_a1"))
    buffer, said = imported(values, tmp_path)
    assert "observations: obs_z, obs_a1\n" in said
    np.testing.assert_array_equal(buffer.transitions.next_observations[2], [70, 80])


def test_cells_that_hold_lines_and_commas(tmp_path):
    values = table(episode=["b, 1\n"] * 3 + ["NA"] * 3, note='of\r\nno, "interest"')
    assert imported(values, tmp_path)[0].episode_lengths.tolist() == [3, 2]


def test_a_column_whose_kind_shows_late(tmp_path):
    """Whole numbers for longer than the reader's block of a mebibyte, then others."""
    rows = 150_000
    values = pd.DataFrame({"episode": 1, "obs_0": [*range(rows - 1), 0.5], "action_0": 1, "reward": 1, "terminated": 0})
    buffer, _ = imported(values.assign(action_0=np.arange(rows) % 2), tmp_path)
    assert buffer.transitions.next_observations[-1].item() == 0.5


def test_other_names(tmp_path):
    names = {"episode": "trip", "reward": "gain", "terminated": "done", "truncated": "cut", "action_0": "u"}
    names |= {"obs_2": "s2", "obs_10": "s10", "next_obs_2": "s_next2", "next_obs_10": "s_next10"}
    options = ["--episode", "trip", "--reward", "gain", "--terminated", "done", "--truncated", "cut"]
    options += ["--observation-prefix", "s", "--action-prefix", "u", "--next-observation-prefix", "s_next"]
    renamed, _ = imported(following().rename(columns=names), tmp_path, *options)
    assert renamed.fingerprint == imported(following(), tmp_path, dataset_id="test/again-v0")[0].fingerprint


@pytest.mark.parametrize("flags", [[0, 0, 1, 0, 0, 0], ["false", "FALSE", "True", "0", "0", "false"]])
def test_flags_are_numbers_or_words(tmp_path, flags):
    assert imported(table(terminated=flags), tmp_path)[0].transitions.terminations.tolist() == [0, 0, 1, 0, 0]


def test_a_cut_episode_of_one_row_is_no_transition(tmp_path):
    buffer, said = imported(table(episode=["b", "b", "b", "a", "a", "c"]), tmp_path)
    assert buffer.episode_lengths.tolist() == [3, 1]
    assert "dropped 2 rows" in said and "dropped 1 episodes with them" in said


@pytest.mark.parametrize(("rewards", "share"), [([0, 0, 0.1, 0, 0, -9.9], "99%"), ([1, 2, 3, 4, 5, 6], None)])
def test_rewards_that_are_lost_with_the_dropped_rows_are_warned_of(rewards, share, tmp_path):
    """As where the reward comes at the end alone, and no column says that the episode ended there."""
    outcome = import_logs(write(table(reward=rewards), tmp_path / "log.csv"))
    assert outcome.returncode == 0
    assert (f"the dropped rows hold {share} of all reward" in outcome.stderr) == (share is not None)
    whole = import_logs(write(table(reward=rewards, terminated=[0, 0, 1] * 2), tmp_path / "log.csv"), dataset_id="a-v1")
    assert whole.returncode == 0 and "reward" not in whole.stderr


@pytest.mark.parametrize(
    ("rewards", "warned"),
    [
        (1e9 + np.arange(6), True),  # a balance, in place of what a step earned
        (1e3 + np.arange(6), False),
        (-np.diff(np.cumsum(np.full(7, 0.7)) + 1000), False),  # always the same, but for rounding
        (np.exp(-(np.arange(6.0) ** 2)), False),
        (np.zeros(6), False),
    ],
)
def test_rewards_that_float32_hardly_tells_apart_are_warned_of(rewards, warned, tmp_path):
    outcome = import_logs(write(table(reward=rewards, terminated=[0, 0, 1] * 2), tmp_path / "log.csv"))
    assert outcome.returncode == 0 and ("which float32 hardly holds" in outcome.stderr) == warned


def test_a_relative_datasets_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINARI_DATASETS_PATH", "some data")
    outcome = import_logs(write(table(), tmp_path / "log.csv"))
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "some data" / ID / "data" / "main_data.hdf5").is_file() and len(load().episode_lengths) == 2


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "log.parquet").mkdir()
    outcome = import_logs(tmp_path / "log.parquet")
    assert outcome.returncode == 2 and "no regular file" in outcome.stderr


def test_action_bounds_that_are_given(tmp_path):
    values = table(action_1=[0.0] * 4 + [7.0, 0.0])  # in the row in which action_0 is beyond, too
    buffer, said = imported(values, tmp_path, "--action-low", "-3", "-1", "--action-high", "1")
    assert (buffer.dataset.action_low.tolist(), buffer.dataset.action_high.tolist()) == ([-3, -1], [1, 1])
    assert "1 rows have actions beyond the bounds" in said


def test_a_constant_action_is_the_middle_of_narrow_bounds(tmp_path):
    outcome = import_logs(write(table(action_1=[200.0] * 6), tmp_path / "logs.csv"))
    buffer = load()
    assert buffer.dataset.action_low[1] < 200 < buffer.dataset.action_high[1] < 201
    assert buffer.transitions.actions[:, 1].tolist() == pytest.approx([0] * 5, abs=1e-3)
    assert outcome.stderr == (
        "warning: action_1 is 200 in all rows, so that nothing is learned of it: its bounds are just around it, so "
        "that policies stay there (--action-low and --action-high set others)\n"
    )


def test_the_warning_of_a_constant_action_says_how_to_end_it(tmp_path):
    options = ["--action-low", "-3", "0", "--action-high", "3", "400"]
    outcome = import_logs(write(table(action_1=[200.0] * 6), tmp_path / "logs.csv"), *options)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert load().transitions.actions[:, 1].tolist() == [0] * 5


def test_whole_numbers_as_actions_are_remarked_on(tmp_path):
    values = table(action_0=[3, 1, 7, 3, 1, 1], action_1=[0.0, 0.5, 1.0, 0.0, 0.5, 1.0])
    outcome = import_logs(write(values, tmp_path / "logs.csv"))
    assert outcome.returncode == 0
    assert outcome.stderr.startswith(
        "warning: whole numbers alone in action_0 (1, 3, 7): they are read as amounts, and"
    )
    assert "action_1" not in outcome.stderr


def test_an_environment_and_its_reference_returns(tmp_path):
    options = ["--env-id", "Pendulum-v1", "--reference-returns", "-1200", "-150.5"]
    buffer, said = imported(table(obs_11=0.0), tmp_path, *options)
    assert (buffer.dataset.env_id, buffer.dataset.reference_returns) == ("Pendulum-v1", (-1200, -150.5))
    assert buffer.transitions.actions[:, 0].tolist() == pytest.approx([-0.75, 0.15, 0.25, 0.3, 1])
    assert said.splitlines()[-5:] == [
        "actions: action_0 from -2 to 2",
        "1 rows have actions beyond the bounds: the dataset keeps them, training clips them",
        "scores: 0 for a return of -1200, 100 for -150.5",
        f"for what to doubt in them: python -m benchmarks.inspect_dataset {ID}",
        f"{ID}: 5 transitions in 2 episodes",
    ]
    spec = minari.load_dataset(ID).recover_environment(eval_env=True).spec
    assert (spec.id, spec.max_episode_steps) == ("Pendulum-v1", 200)


def test_bounds_that_are_given_come_before_the_environments(tmp_path):
    options = ["--env-id", "Pendulum-v1", "--action-high", "3"]
    buffer, said = imported(table(obs_11=0.0), tmp_path, *options)
    assert (buffer.dataset.action_low.tolist(), buffer.dataset.action_high.tolist()) == ([-2], [3])
    assert "no scores: D4RL has no reference returns for Pendulum-v1 (--reference-returns" in said
    assert buffer.dataset.reference_returns is None
    options = ["--env-id", "Pendulum-v1", "--action-low", "-3"]
    buffer, _ = imported(table(obs_11=0.0), tmp_path, *options, dataset_id="test/again-v0")
    assert (buffer.dataset.action_low.tolist(), buffer.dataset.action_high.tolist()) == ([-3], [2])


def test_an_environment_that_cannot_be_made_is_recorded(tmp_path):
    buffer, said = imported(table(), tmp_path, "--env-id", "Hopper-v2")  # its bindings are gone
    assert said.startswith("no bounds of actions are known of it: environment 'Hopper-v2' cannot be made: ")
    assert (buffer.dataset.env_id, buffer.dataset.action_high.tolist()) == ("Hopper-v2", [2.5])
    assert buffer.dataset.reference_returns == (-20.272305, 3234.3)


def test_a_users_own_environment_gives_bounds_and_is_named_without_its_module(tmp_path, monkeypatch):
    text = (
        "import gymnasium\nfrom gymnasium.envs.classic_control import PendulumEnv\nclass Mine(PendulumEnv):\n    pass\n"
    )
    (tmp_path / "my_own.py").write_text(f"{text}gymnasium.register('Mine-v0', Mine, max_episode_steps=7)\n")
    monkeypatch.syspath_prepend(tmp_path)
    values = table(obs_3=np.arange(6) / 3)
    run = import_logs(write(values, tmp_path / "logs.csv"), "--env-id", "my_own:Mine-v0")
    assert run.returncode == 0 and "scripts need --env-id my_own:Mine-v0, too" in run.stdout, run.stderr
    dataset = load_dataset(ID)
    assert dataset.env_id == "Mine-v0" and dataset.action_high == [2] and dataset.env_spec["entry_point"] is None


def test_reference_returns_without_an_environment(tmp_path):
    path = write(table(), tmp_path / "door-human-v1.csv")  # a table's name is the user's own
    assert import_logs(path).returncode == 0 and load().dataset.reference_returns is None
    assert import_logs(path, "--reference-returns", "1", "2", dataset_id="test/other-v0").returncode == 0
    assert load("test/other-v0").dataset.reference_returns == (1, 2)


def test_training_on_an_imported_dataset(tmp_path):
    imported(table(), tmp_path)
    run = run_script("bc", "--dataset-id", ID, "--num-updates", "2", "--run-dir", str(tmp_path / "run"))
    assert run.returncode == 0, run.stderr


def test_the_namespace_keeps_its_description(tmp_path, folder):
    create_namespace("test", description="ours")
    imported(table(), tmp_path)
    assert json.loads((folder / "test" / "namespace_metadata.json").read_text()) == {"description": "ours"}
    assert sorted(path.name for path in folder.iterdir()) == ["test"]


def test_as_a_module(tmp_path):
    command = [sys.executable, "-m", "benchmarks.import_logs", str(write(table(), tmp_path / "logs.csv"))]
    run = subprocess.run([*command, "--dataset-id", ID], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert load().dataset.num_steps == 5


# --- What is refused ---


def assert_refused(outcome, message, folder: Path, code=2):
    assert outcome.returncode == code
    assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1
    assert message in outcome.stderr
    assert not folder.exists() or not os.listdir(folder)


TABLES = {
    "missing columns": (
        table(reward=None, terminated=None),
        "lacks the columns reward, terminated: it has episode, obs",
    ),
    "no observations": (table(obs_2=None, obs_10=None), "no column that begins with obs_: it has episode, action_0"),
    "no actions": (table(action_0=None), "no column that begins with action_: it has"),
    "no rows": (table().iloc[:0], "the table is empty"),
    "text": (table(obs_2=[1, 2, "x", 4, 5, 6]).astype({"obs_2": str}), "row 3, column obs_2: 'x' is not a finite"),
    "infinite": (table(action_0=[1, np.inf, 3, 4, 5, 6]), "row 2, column action_0: 'inf' is not a finite"),
    "nan": (table(reward=[1, 2, 3, np.nan, 5, 6]), "column reward: 1 of 6 cells are blank, the first in row 4: fill"),
    "beyond float32": (table(obs_2=[1, 2, 3, 4, 5, 1e300]), "row 6, column obs_2: '1e+300' is not a finite"),
    "dates": (table(obs_2=pd.Timestamp("2020-01-01")), "column obs_2 holds dates or times, such as '2020-01-01"),
    "flag": (table(terminated=[0, 0, 2, 0, 0, 0]), "column terminated: '2', first in row 3: each cell must be true"),
    "no id": (
        table(episode=["b", "b", None, "a", "a", "a"]),
        "column episode: 1 of 6 rows have no episode's id, the first in row 3: fill",
    ),
    "id not known": (
        table(episode=["1", "1", "NA", "3", "3", "3"]),
        "1 of 6 rows have no episode's id, the first in row 3",
    ),
    "next is text": (
        following(next_obs_2=[*map(str, following()["next_obs_2"][:5]), "#REF!"]),
        "row 6, column next_obs_2: '#REF!'",
    ),
    "next too large": (
        following(next_obs_2=[*following()["next_obs_2"][:5], 1e300]),
        "row 6, column next_obs_2: '1e+300'",
    ),
    "id again": (table(episode=["b", "b", "a", "a", "b", "b"]), "row 5, column episode: 'b' comes again after another"),
    "after the end": (table(terminated=[0, 1, 1, 0, 0, 0]), "row 3: follows row 2, which ended the same episode"),
    "after a cut": (table(truncated=[0, 0, 0, 1, 0, 0]), "row 5: follows row 4, which ended the same episode"),
    "no transitions": (table(episode=range(6), terminated=0, truncated=None), "no transition is left"),
    "gap": (following().drop(index=4), "row 4: its next observation is not that of row 5"),
    "unpaired": (following().drop(columns="next_obs_2"), "next_obs_10 must match obs_2, obs_10"),
}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("name", TABLES)
def test_refuses_tables(name, suffix, tmp_path, folder):
    values, message = TABLES[name]
    assert_refused(import_logs(write(values, tmp_path / f"logs{suffix}")), message, folder)


FILES = {
    "logs.txt": (b"", "unknown suffix '.txt'"),
    "empty.csv": (b"", "cannot read"),
    "damaged.parquet": (b"PAR1 and no more", "cannot read"),
    "binary.csv": (b"episode,\0\xff\xfe\n", "it holds bytes of zero, so it is no text, or UTF-16 without"),
    "twice.csv": (b"episode,obs_0,obs_0,action_0,reward,terminated\n1,1,1,1,1,0\n", "several columns named obs_0"),
    "long.csv": (b"episode,obs_0,action_0,reward,terminated\n1,1,1,1,0\n1,1,1,1,0,9\n", "cannot read"),
    "longer.csv": (b"episode,obs_0,action_0,reward,terminated\n1,1,1,1,0,9\n", "cannot read"),
    "short.csv": (b"episode,obs_0,action_0,reward,terminated\n1,1,1,1,0\n1,1,1\n", "cannot read"),
    "gap.csv": (
        b"episode,obs_0,action_0,reward,terminated\n1,1,1,1,0\n1,1,1,,1\n",
        "column reward: 1 of 2 cells are blank, the first in row 2: fill",
    ),
    "header.csv": (b"episode,obs_0,action_0,reward,terminated\n", "the table is empty"),
}


@pytest.mark.parametrize("name", FILES)
def test_refuses_files(name, tmp_path, folder):
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    assert_refused(import_logs(tmp_path / name), message, folder)


def test_refuses_a_file_that_is_not_there(tmp_path, folder):
    assert_refused(import_logs(tmp_path / "absent.csv"), "no file", folder)


ARGUMENTS = {
    "id": (["--dataset-id", "no-version"], "no Minari id: it has no version at its end: give one such as my/logs-v0"),
    "path as id": (["--dataset-id", "../x-v0"], "no Minari id: it has '.', and may have letters, digits, _ and -"),
    "dot in id": (["--dataset-id", "my/rooms.2024-v0"], "no Minari id: it has '.', and may have letters"),
    "no name": (["--dataset-id", "my/-v0"], "no Minari id: it needs a name"),
    "short namespace": (["--dataset-id", "x/y-v0"], "no Minari id: its namespace has one character, and needs two"),
    "reserved id": (["--dataset-id", "anchorl/mine-v0"], "for built-in datasets"),
    "truncated": (["--truncated", "cut"], "lacks the columns cut: it has episode, obs_10"),
    "next observations": (["--next-observation-prefix", "s_"], "no column that begins with s_: it has episode"),
    "number of bounds": (["--action-low", "1", "2"], "has 2 numbers"),
    "infinite bounds": (["--action-high", "inf"], "do not make a finite interval: give --action-low and --action-high"),
    "bounds in disorder": (["--action-low", "3"], "action_0: the bounds 3 and 2.5 do not make"),
    "one column twice": (["--reward", "episode"], "name one column twice"),
    "empty prefix": (["--action-prefix", ""], "prefixes must differ"),
    "no environment": (
        ["--env-id", "Pendulum-v99"],
        "--env-id Pendulum-v99: check the name, or leave it out and give it to the script that trains: environment 'P",
    ),
    "no such module": (
        ["--env-id", "no_such:Pendulum-v1"],
        "'no_such:Pendulum-v1' cannot be made: No module named 'no_such'",
    ),
    "not in the module": (
        ["--env-id", "conftest:Nobodys-v0"],
        "'conftest:Nobodys-v0' cannot be made: Environment `Nobodys` doesn't exist.",
    ),
    "size": (["--env-id", "Pendulum-v1"], "--env-id Pendulum-v1 has observations of size 3, the file of size 2: name"),
    "discrete actions": (["--env-id", "CartPole-v1"], "--env-id CartPole-v1: actions must be vectors"),
    "one return": (["--reference-returns", "1", "1"], "--reference-returns 1.0 1.0: give two, the lower first"),
    "infinite return": (["--reference-returns", "1", "inf"], "give two, the lower first"),
    "robomimic": (["--observation-keys", "object"], "--observation-keys: for HDF5 files, which "),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_refuses_arguments(name, tmp_path, folder):
    arguments, message = ARGUMENTS[name]
    assert_refused(import_logs(write(table(), tmp_path / "logs.csv"), *arguments), message, folder)


def test_refuses_an_unknown_argument(tmp_path, folder):
    outcome = import_logs(write(table(), tmp_path / "logs.csv"), "--rewards", "x")
    assert outcome.returncode == 2 and "--help" in outcome.stderr and not folder.exists()


@pytest.mark.parametrize("module", ["pandas", "pyarrow"])
def test_pandas_is_not_installed(tmp_path, folder, monkeypatch, module):
    path = write(table(), tmp_path / "logs.csv")
    monkeypatch.setitem(sys.modules, module, None)
    assert_refused(import_logs(path), "pip install -e '.[logs]'", folder)


def test_refuses_an_existing_dataset(tmp_path):
    before = imported(table(), tmp_path)[0].fingerprint
    outcome = import_logs(write(following(), tmp_path / "logs.csv"))
    assert outcome.returncode == 2 and "exists: take another id" in outcome.stderr
    assert load().fingerprint == before


def test_a_dataset_that_appears_meanwhile_is_kept(tmp_path, folder, monkeypatch):
    create = minari.create_dataset_from_buffers

    def create_late(*arguments, **options):
        (folder / ID / "data").mkdir(parents=True)
        return create(*arguments, **options)

    monkeypatch.setattr(minari, "create_dataset_from_buffers", create_late)
    outcome = import_logs(write(table(), tmp_path / "logs.csv"))
    assert outcome.returncode == 1 and outcome.stderr.startswith(f"error: cannot write {ID}")
    assert not os.listdir(folder / ID / "data")


def test_refuses_a_disk_without_room(tmp_path, folder):
    """HDF5 crashes where it fills up, with thousands of lines: a process of its own has a quota."""
    command = [sys.executable, "-m", "benchmarks.import_logs", str(write(table(), tmp_path / "logs.csv"))]
    quota = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (2**15, 2**15))
    run = subprocess.run([*command, "--dataset-id", ID], cwd=ROOT, capture_output=True, text=True, preexec_fn=quota)
    message = f"error: no room for the 0.1 MiB of {ID} in {folder} (File too large): make some, or take a larger disk"
    assert_refused(run, message, folder, code=1)


def test_a_write_that_fails_leaves_nothing(tmp_path, folder, monkeypatch):
    def fail(dataset_id, *_, **__):
        (Path(os.environ["MINARI_DATASETS_PATH"]) / dataset_id).mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(minari, "create_dataset_from_buffers", fail)
    assert_refused(import_logs(write(table(), tmp_path / "logs.csv")), "No space left on device", folder, code=1)
    shutil.rmtree(folder)
    folder.write_text("in the way")
    outcome = import_logs(tmp_path / "logs.csv")
    assert outcome.returncode == 2 and "MINARI_DATASETS_PATH" in outcome.stderr


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_unix_seconds_keep_their_digits(tmp_path, suffix):
    """A second apart and far from 0: imported, loaded and normalised they are still apart."""
    imported(table(obs_time=1.7e9 + np.arange(6)), tmp_path, suffix=suffix)
    buffer = ReplayBuffer(load_dataset(ID), torch.device("cpu"))
    mean, std = buffer.normalization
    index = int(mean.argmax())
    seconds = buffer.transitions.observations[:, index].double() * std[index] + mean[index]
    np.testing.assert_allclose(seconds - 1.7e9, [0, 1, 2, 3, 4], atol=1e-3)
