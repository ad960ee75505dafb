"""What benchmarks/run.py wrote, as the tables that report.py works on: a row per evaluation, and a row per run."""

import json
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import numpy as np
import pandas as pd

from common.command_line import check, explain

Measure = Literal["last", "last five", "best"]
MEASURES: dict[str, Any] = {"last": "last", "last five": lambda x: x.tail(5).mean(), "best": "max"}
KEYS = ["algorithm", "dataset_id", "seed"]
NEEDED = [*KEYS, "num_updates", "score", "return_mean"]
TIMES = ["updates_per_second", "wall_seconds"]
DATA = ["dataset_fingerprint", "env_id"]  # what is the same in all runs on a dataset
EPISODES = ["eval_episodes", "final_episodes"]  # of an evaluation, and behind the final score
KNOWN = [*TIMES, *EPISODES, *DATA]  # if there is a results.csv beside the evaluations
FINAL = ["final_score", "final_return_mean", "episode_error"]  # and if its runs have final_returns


def read(paths: tuple[Path, ...], failed_score: float | None = None, unequal: bool = False) -> pd.DataFrame:
    """A row per evaluation: its `value` is the score or, in datasets without reference scores, the return, as `unit`
    says. `final` is the same of the run's last policy on fresh episodes, and `episode_error` its standard error.

    A run that failed has a `problem`, and the same value at every evaluation: `failed_score` or, without one and where
    returns stand for scores, the dataset's lowest, and of scores at most 0, the random policy's. Where nothing of the
    dataset was evaluated it has one row, and no value. Runs that ended well and were not evaluated, as where no
    environment is named, have no row: `attrs["unevaluated"]` counts them by dataset.

    Raises BadInput for a file that is none of run.py's, and for a run that is there twice.
    """
    files = [_read_file(path / "evaluations.csv" if path.is_dir() else path, unequal) for path in paths]
    both = pd.concat([table for tables in files for table in tables[:2]], ignore_index=True)
    twice = both[both.duplicated([*KEYS, "num_updates"]) | (both.groupby(KEYS)["source"].transform("nunique") > 1)]
    run = " ".join(map(str, twice[KEYS].to_numpy()[:1].flat))
    check(twice.empty, f"{run} is in more than one of the files, or has two rows of an update")

    rows = pd.concat([evaluations for evaluations, _, _ in files], ignore_index=True)
    why = "no run was evaluated (no environment, or none ended well)"
    check(len(rows) > 0, f"nothing to report on: {why}: benchmarks.select compares policies by the data alone")
    datasets = rows.groupby("dataset_id")
    scored = rows["score"].notna().groupby(rows["dataset_id"]).transform("all")
    rows["unit"] = np.where(scored, "score", "return")
    rows["value"] = rows["score"].where(scored, rows["return_mean"])
    rows["final"] = rows["final_score"].where(scored, rows["final_return_mean"]).where(rows["episode_error"].notna())
    scale = _spread(rows, "score", "final_score") / _spread(rows, "return_mean", "final_return_mean")
    rows["episode_error"] *= scale.where(scored, 1.0)  # of a return: of its score

    failed = pd.concat([failures for _, failures, _ in files], ignore_index=True)
    failed = failed.merge(rows[["dataset_id", "unit", "num_updates"]].drop_duplicates(), on="dataset_id", how="left")
    failed["num_updates"] = failed["num_updates"].fillna(0).astype(int)
    lowest = failed["dataset_id"].map(datasets[["value", "final"]].min().min(axis=1)).astype(float)
    random = lowest.clip(upper=0.0) if failed_score is None else failed_score
    failed["value"] = failed["final"] = lowest.where(failed["unit"] != "score", random)
    rows = pd.concat([rows.assign(problem=""), failed], ignore_index=True)
    rows = rows.sort_values([*KEYS, "num_updates"], kind="stable")
    unevaluated = pd.concat([runs for _, _, runs in files]).drop_duplicates()
    rows.attrs["unevaluated"] = unevaluated["dataset_id"].value_counts().to_dict()
    return rows


def _spread(rows: pd.DataFrame, *columns: str) -> pd.Series:
    """The highest number in any of the columns less the lowest, of a row's dataset: [rows]."""
    groups = rows[[*columns]].astype(float).groupby(rows["dataset_id"])
    return groups.transform("max").max(axis=1) - groups.transform("min").min(axis=1)


def _read_file(file: Path, unequal: bool) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The evaluations, the runs that failed, and those that ended well and were not evaluated."""
    check(file.is_file(), f"no {file}: give a folder that benchmarks/run.py wrote, or its evaluations.csv")
    results = file.with_name("results.csv")
    rows = _read_table(file, NEEDED)
    cells = _read_table(results, KEYS) if results.exists() else rows.reindex(columns=KEYS).iloc[:0]
    if "final_returns" in cells:
        with explain(f"cannot read {results}: final_returns"), np.errstate(all="ignore"):
            cells["episode_error"] = cells["final_returns"].map(_standard_error).astype(float)
            cells["final_episodes"] = cells["final_returns"].map(lambda x: len(json.loads(x)), na_action="ignore")
    if "env_id" in cells:
        cells["env_id"] = cells["env_id"].fillna("as the data say")  # without --env-id
    runs = rows[KEYS].drop_duplicates()
    lost = rows[~np.isfinite(rows["return_mean"])][KEYS].drop_duplicates().assign(problem="a return is not finite")
    if "problem" in cells:
        planned = cells[[*KEYS, "problem"]].dropna()
    elif unequal:
        planned = runs.assign(problem="")
    else:  # on a dataset all algorithms the same seeds
        planned = runs[KEYS[:2]].drop_duplicates().merge(runs[KEYS[1:]].drop_duplicates()).assign(problem="missing")
    check(len(rows) + len(cells) > 0, f"{file}: holds no evaluation")
    failed, unevaluated = _without(planned, runs), _without(_without(cells[KEYS], planned[KEYS]), runs)
    failed, rows = pd.concat([failed, lost]), _without(rows, lost[KEYS])
    known = [name for name in [*KNOWN, *FINAL] if name not in rows]
    rows = rows.merge(cells.reindex(columns=[*KEYS, *known]), on=KEYS, how="left")
    return rows[[*NEEDED, *KNOWN, *FINAL]].assign(source=str(file)), failed.assign(source=str(file)), unevaluated


def _without(some: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """The rows of `some` whose KEYS are not among those of `runs`."""
    return some.merge(runs, how="left", indicator="there").query("there == 'left_only'").drop(columns="there")


def _read_table(path: Path, needed: list[str]) -> pd.DataFrame:
    """Raises BadInput for a column that it lacks, and for text among numbers."""
    numbers = ["score", "return_mean", *TIMES, "eval_episodes", *FINAL]
    with explain(f"cannot read {path}"), np.errstate(all="ignore"):  # what is beyond a whole number is refused
        names = dict.fromkeys([*KEYS[:2], *DATA], str) | {
            name: int for name in ("seed", "num_updates") if name in needed
        }
        table = pd.read_csv(path, dtype=names | dict.fromkeys(numbers, float))  # type: ignore[arg-type]
    missing = [name for name in needed if name not in table]
    check(not missing, f"{path}: lacks the column {', '.join(missing)}; give a folder that benchmarks/run.py wrote")
    return table


def _standard_error(returns: Any) -> float:
    """Of the mean of the final returns, which results.csv holds as JSON; infinite of one; NaN where there are none."""
    if not isinstance(returns, str):
        return np.nan
    numbers = json.loads(returns)
    return float(np.std(numbers, ddof=1) / np.sqrt(len(numbers))) if len(numbers) > 1 else np.inf


def check_equal(rows: pd.DataFrame) -> None:
    """Raises BadInput unless all runs on a dataset learned from the same data, and were evaluated after the same
    updates, with as many episodes, in the same environment."""
    for dataset_id, runs in rows[rows["problem"] == ""].groupby("dataset_id"):
        groups = runs.groupby(["algorithm", "seed"])
        steps = groups["num_updates"].apply(lambda x: f"{x.max():,} updates, evaluated at {', '.join(map(str, x))}")
        counts = [groups[name].first().dropna().map("{:.0f} episodes".format) for name in EPISODES]  # where known
        data = [groups[name].first().dropna().map(f"{name} {{}}".format) for name in DATA]
        for protocols in (steps, *counts, *data):
            kinds = protocols.drop_duplicates().iloc[:2]
            what = "; ".join(f"{' '.join(map(str, run))}: {shorten(kind, 90)}" for run, kind in kinds.items())
            check(len(kinds) < 2, f"{dataset_id}: unequal protocols ({what}): --unequal compares them all the same")


def measures(rows: pd.DataFrame, by: Measure = "last") -> pd.DataFrame:
    """A row per run: its MEASURES, as its `value` the one to compare by, its `problem` and what `read` says of it."""
    runs = rows.groupby([*KEYS, "unit"], sort=False)
    table = runs["value"].agg(**MEASURES).join(runs[["final", "episode_error", "problem"]].first()).reset_index()
    fresh = table["final"].notna().groupby(table["dataset_id"]).transform("all")
    table["last"] = table["final"].where(fresh, table["last"])
    return table.assign(value=table[by])
