"""The tables of benchmarks/run.py: what the run folders of a grid hold, as results.csv and evaluations.csv."""

import csv
import io
import itertools
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from scratch import replace

from common.command_line import check, explain

CellLike = tuple[str, str, int, Path]  # algorithm, dataset id, seed, run folder: as run.Cell has them
KEY = ("algorithm", "dataset_id", "seed")
EVALUATION = {
    "num_updates": "step",
    "score": "eval/score",
    "return_mean": "eval/return_mean",
}  # as metrics.csv has them


def collect(problems: Mapping[Any, str], out: Path) -> list[CellLike]:
    """Writes results.csv and evaluations.csv of the cells, each with the problem to tell of if it has not ended well,
    and of those that results.csv holds from earlier commands. Returns the cells that have ended well. An earlier one
    whose folder is gone, or with a problem the folder around it, was taken away, and has no row.
    """
    tables: dict[str, list[dict[str, Any]]] = {"results": [], "evaluations": []}
    ours = {word for cell in problems for word in (cell[:3], cell[3])}
    earlier = {cell: it for cell, it in cells_in(out / "results.csv") if ours.isdisjoint((cell[:3], cell[3]))}
    written = []
    for cell, problem in [*earlier.items(), *problems.items()]:
        try:
            result, evaluations = _rows(cell)
        except Exception:  # not there, or damaged, which raises many kinds
            if problem and (cell in problems or cell[3].parent.exists()):
                tables["results"].append(_key(cell) | {"problem": problem, "run_dir": str(cell[3])})
            continue
        tables["results"].append(result)
        tables["evaluations"] += evaluations
        written.append(cell)
    for name, table in tables.items():
        # fqe.py's results have columns of their own; evaluations have the same ones even where there is none
        columns = dict.fromkeys([*KEY, *EVALUATION] if name == "evaluations" else itertools.chain.from_iterable(table))
        writer = csv.DictWriter(text := io.StringIO(), list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        replace(out / f"{name}.csv", text.getvalue().encode())
    return written


def _key(cell: CellLike) -> dict[str, Any]:
    return dict(zip(KEY, cell[:3], strict=True))


def _rows(cell: CellLike) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The cell's row of results.csv, and those of evaluations.csv."""
    key, folder = _key(cell), cell[3]
    result, saved = (json.loads((folder / name).read_text()) for name in ("result.json", "args.json"))
    versions = " ".join(f"{name} {number}" for name, number in result.pop("versions").items())
    protocol = {name: saved[name] for name in ("eval_every", "eval_episodes")}
    protocol |= {name: saved.get(name) for name in ("dataset_fingerprint", "env_id")}
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("eval/return_mean")]
    evaluations = [key | {name: row.get(column, "") for name, column in EVALUATION.items()} for row in rows]
    result |= key | protocol | {"versions": versions, "problem": "", "run_dir": str(folder)}
    return result, evaluations


def run_of(algorithm: str, dataset_id: str) -> str:
    """What a folder holds, of which two names may have the same: `bc --x=1` is `bc --x 1`, and no `bc --x 1e-1`."""
    return f"{' '.join(shlex.split(algorithm.replace('=', ' ')))} on {dataset_id}"


def cells_in(path: Path) -> Iterator[tuple[CellLike, str]]:
    """Those of a results.csv, which may have been moved together with their run folders, and their problems."""
    with explain(str(path)), path.open(newline="") if path.exists() else io.StringIO() as file:
        for row in csv.DictReader(file):
            check(None not in map(row.get, (*KEY, "run_dir")), "not of a grid, or damaged; rename it")
            folder = path.parent.joinpath(*Path(row["run_dir"]).parts[-3:])
            yield (row["algorithm"], row["dataset_id"], int(row["seed"]), folder), row.get("problem") or ""
