"""Cells of a table that nobody uses may be blank; of others one line says what is wrong with the column."""

import numpy as np
import pandas as pd
import pytest
from test_import_logs import ID, assert_refused, following, import_logs, load, table, write


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A datasets folder of this test alone; tables are written beside it."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def imported(values, tmp_path, suffix, dataset_id=ID):
    outcome = import_logs(write(values, tmp_path / f"logs{suffix}"), dataset_id=dataset_id)
    assert (outcome.returncode, outcome.stderr) == (0, "")
    return load(dataset_id), outcome.stdout


def with_cells(values, row, cell, *names):
    """The table with one cell in place of what it has there, in each of the columns `names`."""
    values = values.copy()
    for name in names:
        values[name] = values[name].astype(object)
        values.loc[row, name] = cell
    return values if cell is None else values.astype(dict.fromkeys(names, str))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("cell", [None, "none", "12%"])
def test_a_last_row_that_is_no_transition_needs_no_action_and_reward(cell, suffix, tmp_path):
    values = with_cells(table(), 5, cell, "action_0", "reward")
    buffer, said = imported(values, tmp_path, suffix)
    assert "dropped 1 rows" in said
    again, _ = imported(table(), tmp_path, suffix, "test/again-v0")
    assert buffer.fingerprint == again.fingerprint


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_next_observation_of_an_end_need_not_be_known(suffix, tmp_path):
    """As where they were made by a shift by one row within each episode."""
    values = following()
    values.loc[[2, 5], ["next_obs_10", "next_obs_2"]] = np.nan
    buffer, said = imported(values, tmp_path, suffix)
    assert "dropped 1 rows" in said
    again, _ = imported(table(), tmp_path, suffix, "test/again-v0")
    assert buffer.fingerprint == again.fingerprint


@pytest.mark.parametrize("word", ["None", "NaN", "<NA>", "inf", "-", "null", ""])
def test_what_programs_write_for_an_unknown_next_observation(word, tmp_path):
    values = following().astype({"next_obs_2": object, "next_obs_10": object})
    values.loc[[2, 5], ["next_obs_2", "next_obs_10"]] = word
    buffer, said = imported(values, tmp_path, ".csv")
    assert buffer.episode_lengths.tolist() == [3, 2] and "dropped 1 rows" in said


def test_a_next_observation_that_is_known_is_kept_where_another_is_not(tmp_path):
    values = following()
    values.loc[2, "next_obs_2"] = np.nan  # the terminated row; one of its two numbers
    buffer, said = imported(values, tmp_path, ".csv")
    assert "dropped" not in said
    expected = following()[["next_obs_2", "next_obs_10"]].to_numpy(np.float32)
    expected[2] = values.loc[2, ["obs_2", "obs_10"]]
    np.testing.assert_array_equal(buffer.transitions.next_observations, expected)


WORDS = {"yes": [*["no"] * 2, "yes", *["NO"] * 3], "t": list("fftfff"), "Y": list("NNYNNN"), "True": [" False "] * 6}
WORDS["True"][2] = " True"


@pytest.mark.parametrize("name", WORDS)
def test_flags_that_are_words(name, tmp_path):
    buffer, _ = imported(table(terminated=WORDS[name]), tmp_path, ".csv")
    assert buffer.transitions.terminations.tolist() == [0, 0, 1, 0, 0]


FILL = "fill them in, or remove their episodes"
REFUSED = {
    "blank reward of an end": (
        table(reward=[1, 2, None, 4, 5, 6]),
        f"reward: 1 of 6 cells are blank, the first in row 3: {FILL}",
    ),
    "blank observation of a last row": (
        table(obs_2=[1, 2, 3, 4, 5, None]),
        "obs_2: 1 of 6 cells are blank, the first in row 6",
    ),
    "blank next observation": (
        following(next_obs_2=[11.1, None, 70, 14.1, None, 71]),
        "next_obs_2: 2 of 6 cells are blank, the first in row 2",
    ),
    "blank column": (table(obs_2=[None] * 6), "obs_2: 6 of 6 cells are blank, the first in row 1"),
    "percentages": (
        table(obs_2=["7%", "12 %", "1%", "2%", "3%", "4%"]),
        "column obs_2 holds percentages, such as '7%' in row 1: write 12% as 0.12, or as 12",
    ),
    "one percentage": (
        table(obs_2=["7", "0.12", "1%", "2", "3", "4"]),
        "column obs_2 holds percentages, such as '1%' in row 3",
    ),
    "lists": (
        table(obs_2=["[1, 2]"] * 6),
        "column obs_2 holds lists, such as '[1, 2]' in row 1: give each of their numbers a column",
    ),
    "dates": (
        table(obs_2=["03.04.2023"] * 6),
        "column obs_2 holds dates or times, such as '03.04.2023' in row 1: give numbers",
    ),
    "times": (table(action_0=["12:30"] * 6), "column action_0 holds dates or times, such as '12:30"),
    "units": (
        table(obs_2=[f"{row} kg" for row in range(6)]),
        "column obs_2 holds numbers with units, such as '0 kg' in row 1: write the numbers alone",
    ),
    "money": (
        table(reward=[f"${row}.5" for row in range(6)]),
        "column reward holds numbers with units, such as '$0.5' in row 1",
    ),
    "words": (
        table(action_0=["on", "off"] * 3),
        "column action_0 holds text, such as 'on' in row 1: give each word a number, or a column of 0 and 1",
    ),
    "some words": (
        table(obs_2=["1", "?", "3", "-", "5", "6"]),
        "row 2, column obs_2: '?' is not a finite number (2 such cells): repair",
    ),
    "thousands": (
        table(obs_2=["1,000.5"] * 6),
        "column obs_2 holds numbers in another notation, such as '1,000.5' in row 1: write",
    ),
    "blank flags": (
        table(terminated=[None, None, True, None, None, None]),
        "column terminated: 5 of 6 cells are blank, the first",
    ),
    "blank limits": (table(truncated=["", "", "", "", "", 1]), "column truncated: 5 of 6 cells are blank, the first"),
    "words for flags": (
        table(terminated=["", "", "crash", "", "", "goal"]).replace("", "none"),
        "column terminated: 'none', 'crash', 'goal', first in row 1: each cell must be true (or 1, yes)",
    ),
    "negative flags": (
        table(terminated=[0, 0, -5.0, 0, 0, 0]),
        "column terminated: '-5.0', first in row 3: each cell must be true (or 1, yes)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_columns(name, tmp_path, folder):
    values, message = REFUSED[name]
    assert_refused(import_logs(write(values, tmp_path / "logs.csv")), message, folder)


def test_refuses_columns_of_parquet(tmp_path, folder):
    for cells, kind in [([[1.5, 2.5]] * 6, "lists"), ([pd.Timestamp("2023-04-03").date()] * 6, "dates or times")]:
        path = write(table(obs_2=cells), tmp_path / "logs.parquet")
        assert_refused(import_logs(path), f"column obs_2 holds {kind}, such as ", folder)
