"""The tables of benchmarks/run.py: what the run folders of a grid hold, as results.csv and evaluations.csv."""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.command_line import BadInput, check

CellLike = tuple[str, str, int, Path]  # algorithm, dataset id, seed, run folder: as run.Cell has them


def collect(cells: Sequence[CellLike], out: Path) -> list[CellLike]:
    """Writes results.csv and evaluations.csv of the cells that have ended well, and of those that results.csv holds
    from earlier commands; returns them.
    """
    tables: dict[str, list[dict[str, Any]]] = {"results": [], "evaluations": []}
    ours = {word for cell in cells for word in (cell[:3], cell[3])}
    earlier = [cell for cell in _cells_in(out / "results.csv") if ours.isdisjoint((cell[:3], cell[3]))]
    written = []
    for cell in [*earlier, *cells]:
        try:
            result, evaluations = _rows(cell)
        except (OSError, KeyError, ValueError):  # not there, or damaged
            continue
        tables["results"].append(result)
        tables["evaluations"] += evaluations
        written.append(cell)
    for name, table in tables.items():
        columns = dict.fromkeys(column for row in table for column in row)  # fqe.py's results have some of their own
        writer = csv.DictWriter(text := io.StringIO(), list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        write(out / f"{name}.csv", text.getvalue().encode())
    return written


def _rows(cell: CellLike) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The cell's row of results.csv, and those of evaluations.csv."""
    algorithm, dataset_id, seed, folder = cell
    key = {"algorithm": algorithm, "dataset_id": dataset_id, "seed": seed}
    result, saved = (json.loads((folder / name).read_text()) for name in ("result.json", "args.json"))
    versions = " ".join(f"{name} {number}" for name, number in result.pop("versions").items())
    protocol = {name: saved[name] for name in ("eval_every", "eval_episodes")}
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("eval/return_mean")]
    columns = {"num_updates": "step", "score": "eval/score", "return_mean": "eval/return_mean"}
    evaluations = [key | {name: row.get(column, "") for name, column in columns.items()} for row in rows]
    return result | key | protocol | {"versions": versions, "run_dir": str(folder)}, evaluations


def _cells_in(path: Path) -> Iterator[CellLike]:
    """Those of a results.csv, which may have been moved together with their run folders."""
    with path.open(newline="") if path.exists() else io.StringIO() as file:
        for row in csv.DictReader(file):
            check({"algorithm", "dataset_id", "seed", "run_dir"} <= row.keys(), f"{path}: not of a grid; rename it")
            folder = path.parent.joinpath(*Path(row["run_dir"]).parts[-3:])
            yield row["algorithm"], row["dataset_id"], int(row["seed"]), folder


def write(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    scratch = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content)
        os.replace(scratch, path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror}") from None
