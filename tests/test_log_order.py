"""The rows of a table come in the order that a column says, or one line says why not, or that they look disordered."""

import numpy as np
import pandas as pd
import pytest
from test_import_logs import ID, assert_refused, import_logs, load, write


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A datasets folder of this test alone; tables are written beside it."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def nights(**changes):
    """Four nights of six hours, of which each ends with a termination; what is observed says night and hour."""
    night, hour = np.repeat(np.arange(4), 6), np.tile(np.arange(6), 4)
    columns = {
        "episode": [f"night {index}" for index in night],
        "hour": hour,
        "obs_0": night + hour / 10,
        "action_0": np.sin(np.arange(24)),
        "reward": 100 * night + hour,
        "terminated": hour == 5,
    }
    return pd.DataFrame(columns | changes)


def interleaved(values):
    return values.sort_values("hour", kind="stable")


def scrambled(values):
    """Sorted by episode, as a sort that is not stable leaves it."""
    rows = np.concatenate([start + np.random.default_rng(start).permutation(6) for start in range(0, 24, 6)])
    return values.iloc[rows]


def outcome_of(values, tmp_path, *arguments, dataset_id=ID, suffix=".csv"):
    return import_logs(write(values, tmp_path / f"logs{suffix}"), *arguments, dataset_id=dataset_id)


def assert_nights(outcome, dataset_id=ID):
    assert (outcome.returncode, outcome.stderr) == (0, "")
    buffer = load(dataset_id)
    assert buffer.transitions.rewards.tolist() == nights()["reward"].tolist()
    np.testing.assert_allclose(buffer.transitions.observations[:, 0], nights()["obs_0"], rtol=1e-6)
    assert buffer.episode_lengths.tolist() == [6] * 4
    return buffer


DATES = pd.Timestamp("2023-12-31 21:00") + pd.to_timedelta(np.arange(24), "h")
COLUMNS = {
    "numbers": np.tile(np.arange(6), 4),
    "fractions": np.tile(np.arange(6) / 3, 4),
    "dates": DATES,
    "iso text": [f"{date:%Y-%m-%dT%H:%M:%SZ}" for date in DATES],
    "a change of the clocks": [
        *(f"2023-10-29 02:{5 * row:02}:00+02:00" for row in range(12)),
        *(f"2023-10-29 02:{5 * row:02}:00+01:00" for row in range(12)),
    ],
    "month first": [f"{date:%m/%d/%Y %I:%M %p}" for date in DATES],  # 12/31 says which
    "day first": [f"{date:%d.%m.%Y %H:%M}" for date in DATES],
    "names of months": [f"{date:%d %b %Y %H:%M}" for date in DATES],
    "half days": [f"{hour}:30 {half}" for half in ("AM", "PM") for hour in (12, *range(1, 12))],
    "half days with seconds": [f"{date:%m/%d/%Y %I:%M:%S %p}" for date in DATES],
    "half of the seconds whole": [f"08:00:0{row // 2}{'.5' * (row % 2)}" for row in range(6)] * 4,
    "dates, half of the seconds whole": [f"13/01/2020 10:00:0{row // 2}{'.5' * (row % 2)}" for row in range(6)] * 4,
    "milliseconds behind a comma": [f"2023-01-01 10:00:00,{row}00" for row in range(6)] * 4,
    "clock": [f"{hour:02}:30" for hour in np.tile(np.arange(6), 4)],
}


@pytest.mark.parametrize("arrange", [interleaved, scrambled])
@pytest.mark.parametrize("name", COLUMNS)
def test_rows_are_sorted_by_numbers_dates_and_times(name, arrange, tmp_path):
    values = arrange(nights(logged=COLUMNS[name])).drop(columns="hour")
    assert_nights(outcome_of(values, tmp_path, "--order", "logged"))
    outcome = outcome_of(values, tmp_path, "--order", "logged", dataset_id="test/parquet-v0", suffix=".parquet")
    assert_nights(outcome, "test/parquet-v0")


@pytest.mark.parametrize("logged", [DATES[:6], 1_700_000_000 + np.arange(6)], ids=["dates", "seconds since 1970"])
def test_halves_of_an_episode_in_the_wrong_order_are_no_midnight(logged, tmp_path):
    values = nights(hour=np.tile(logged, 4)).iloc[
        np.concatenate([6 * night + np.roll(range(6), 2) for night in range(4)])
    ]
    assert_nights(outcome_of(values, tmp_path, "--order", "hour"))


@pytest.mark.parametrize(("id_", "known"), [("nan", False), ("null", False), ("NA", True)])
def test_an_id_that_stands_for_none_among_words(id_, known, tmp_path, folder):
    """NA may be a country's."""
    outcome = outcome_of(nights(episode=np.repeat(["p1", "p2", id_, "p3"], 6)), tmp_path)
    if known:
        assert_nights(outcome)
    else:
        assert_refused(outcome, "column episode: 6 of 24 rows have no episode's id, the first in row 13", folder)


def test_spaces_around_an_id_say_nothing(tmp_path):
    assert_nights(outcome_of(nights(episode=[f"night {row // 6}{' ' * (row % 2)}" for row in range(24)]), tmp_path))


def test_it_says_what_it_did(tmp_path):
    outcome = outcome_of(interleaved(nights()), tmp_path, "--order", "hour")
    assert (
        outcome.stdout.splitlines()[0] == "the episodes' rows lie between one another in the file: grouped by episode"
    )
    assert "sorted by" not in outcome.stdout
    values = nights().iloc[[0, 2, 1, *range(3, 24)]]
    outcome = outcome_of(values, tmp_path, "--order", "hour", dataset_id="test/again-v0")
    assert outcome.stdout.splitlines()[0] == (
        "sorted by hour: 1 rows stood behind a later one of their episode, the first in row 3"
    )
    assert "hour" not in outcome.stdout.splitlines()[1]


def test_a_file_in_order_is_left_as_it_is(tmp_path):
    outcome = outcome_of(nights(), tmp_path, "--order", "hour")
    assert_nights(outcome)
    assert outcome.stdout.startswith("observations: obs_0\n")


def test_the_order_may_be_an_observation(tmp_path):
    values = scrambled(nights(obs_hour=nights()["hour"]))
    assert outcome_of(values, tmp_path, "--order", "obs_hour").returncode == 0
    assert load().transitions.observations[:, 1].tolist() == nights()["hour"].tolist()


def test_whole_numbers_of_nanoseconds_are_told_apart(tmp_path):
    """In double precision they would be the same."""
    values = nights(stamp=1_700_000_000_000_000_000 + np.arange(24))
    assert_nights(outcome_of(interleaved(values), tmp_path, "--order", "stamp"))


def test_rows_of_one_time_keep_the_files_order(tmp_path):
    outcome = outcome_of(nights(hour=np.tile([0, 1, 1, 1, 2, 3], 4)), tmp_path, "--order", "hour")
    assert load().transitions.rewards.tolist() == nights()["reward"].tolist()
    assert outcome.stderr == (
        "warning: 8 rows have the same hour as another of their episode, the first in row 3: these keep the file's "
        "order; two episodes under one id look so, too\n"
    )


def test_gaps_are_counted(tmp_path):
    values = nights().drop(index=[2, 9, 10])
    outcome = outcome_of(values, tmp_path, "--order", "hour")
    assert outcome.stderr == (
        "warning: 2 steps of hour are unlike the usual one, the first in row 3, from 1 to 3: rows may be missing there"
        "; what follows a gap can have an episode id of its own\n"
    )


def test_the_usual_step_is_that_of_most_rows_and_shorter_ones_are_unlike_it_too(tmp_path):
    """Four gaps of 100 hours, and four steps of a quarter."""
    outcome = outcome_of(nights(hour=np.tile([0, 1, 2, 3, 103, 103.25], 4)), tmp_path, "--order", "hour")
    assert outcome.stderr.startswith("warning: 8 steps of hour are unlike the usual one, the first in row 5, from 3")


def test_without_an_order_a_column_of_time_that_goes_back_is_warned_of(tmp_path):
    values = scrambled(nights(terminated=0))
    outcome = outcome_of(values, tmp_path)
    assert outcome.returncode == 0
    back = int((np.diff(values["hour"].to_numpy().reshape(4, 6)) < 0).sum())
    assert outcome.stderr.startswith(
        f"warning: column hour goes back at {back} rows within episodes, the first in row "
    )
    assert outcome.stderr.endswith("if it says when a row was logged, give --order hour\n")
    assert outcome.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name",
    [
        *["t", "Time", "time_s", "sim_time", "step", "timestep", "time step", "Timestamp", "date", "created_at"],
        *["logged at", "epoch", "seq", "Zeitstempel", "Datum", "period", "t_sec", "Time (s)", "time[ms]", "time_(h)"],
    ],
)
def test_columns_that_are_named_like_time(name, tmp_path):
    outcome = outcome_of(scrambled(nights(terminated=0)).rename(columns={"hour": name}), tmp_path)
    assert f"--order {name}\n" in outcome.stderr


@pytest.mark.parametrize(
    "name",
    [
        "sometimes",
        "note",
        "temperature",
        "stepper",
        "target",
        "at",
        "tid",
        "heat",
        "set_at",
        "tariff_period",
        "remaining_sec",
    ],
)
def test_columns_that_are_not_named_like_time(name, tmp_path):
    assert outcome_of(scrambled(nights(terminated=0)).rename(columns={"hour": name}), tmp_path).stderr == ""


def test_no_warning_of_time_that_goes_on_or_cannot_be_read(tmp_path):
    values = nights(
        date="2023-01-02", time=[f"at {row}" for row in range(24)], day=[f"{row + 1}/02/2023" for row in range(24)]
    )
    assert outcome_of(values, tmp_path).stderr == ""


DAYS = [f"0{day}/0{6 - day}/2023" for day in range(1, 6)] * 4 + ["06/06/2023"] * 4
TEXT, ONE_WORD = nights(hour=["first", *"abcde"] * 4), nights(hour=[1, 2, "x", 4, 5, 6] * 4)
THREE_DAYS = ["08:05", "12:31", "18:02", "07:58", "12:10", "19:00", "06:30", "11:59", "20:15"]
REFUSED = {
    "interleaved": (
        interleaved(nights()),
        "row 5, column episode: 'night 0' comes again after another episode: --order hour sorts by episode and that",
    ),
    "interleaved, no time": (
        interleaved(nights()).drop(columns="hour"),
        "--order COLUMN sorts by episode and that column of times or steps; or sort the file by episode and time, or",
    ),
    "absent": (nights(), "lacks the columns minute: it has episode, hour, obs_0", "minute"),
    "another": (nights(), "--order episode: is another column of the table already", "episode"),
    "text": (TEXT, "column hour: 'first' in row 1 is no number, and the column not all dates", "hour"),
    "one word": (ONE_WORD, "column hour: 'x' in row 3 is no number", "hour"),
    "blank": (
        nights(hour=[0, 1, 2, None, 4, 5] * 4),
        "hour: 4 of 24 cells are blank, the first in row 4: every",
        "hour",
    ),
    "day or month": (nights(hour=DAYS), "'01/05/2023' and others may begin with the day or the month: write", "hour"),
    "zones, here and there": (
        nights(hour=[f"2023-01-01 08:0{row}{'Z' * (row == 3)}" for row in range(6)] * 4),
        "column hour: '2023-01-01 08:00' in row 1 is no number, and the column not all dates or times of one form",
        "hour",
    ),
    "midnight": (
        nights(hour=np.tile([22, 23, 0, 1, 2, 3], 4)),
        "in 4 episodes the column goes back to less than it began with, as hours do at midnight: name a column",
        "hour",
    ),
    "midnight, some seconds whole": (
        nights(hour=["23:59:58", "23:59:58.5", "23:59:59", "23:59:59.5", "00:00:00", "00:00:00.5"] * 4),
        "in 4 episodes the column goes back to less than it began with, as hours do at midnight: name a column",
        "hour",
    ),
    "midnight in microseconds": (
        nights(hour=np.tile(10**6 * np.array([86_398, 86_399, 0, 1, 2, 3]), 4)),
        "in 4 episodes the column goes back to less than it began with, as hours do at midnight: name a column",
        "hour",
    ),
    "two midnights": (
        pd.DataFrame(
            {"episode": 1, "time": THREE_DAYS, "obs_0": range(9), "action_0": 0.5, "reward": 1.0, "terminated": 0}
        ),
        "in 1 episodes the column goes back to less than it began with, as hours do at midnight: name a column",
        "time",
    ),
    "an end amid": (
        interleaved(nights(terminated=nights()["hour"] == 3)),
        "row 17: follows row 13, which ended the same episode",
        "hour",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_orders(name, tmp_path, folder):
    values, message, *order = REFUSED[name]
    arguments = ["--order", *order] if order else []
    assert_refused(outcome_of(values, tmp_path, *arguments), message, folder)


def test_next_observations_in_disorder_name_the_switch(tmp_path, folder):
    values = nights(next_obs_0=nights()["obs_0"] + 0.1)
    assert_nights(outcome_of(scrambled(values), tmp_path, "--order", "hour"))
    outcome = outcome_of(scrambled(values.assign(terminated=0)), tmp_path, dataset_id="test/again-v0")
    assert outcome.returncode == 2 and "rows are missing or out of order: --order COLUMN sorts them" in outcome.stderr
