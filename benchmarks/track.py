"""Shows a run to Weights & Biases (W&B): its arguments, its rows of metrics as they come, and its result.

A script's --track starts this beside its training, in a process of its own, so that W&B may fail or hang and the
training goes on. By itself it shows a run that was not tracked, finished or not, to the project, group and entity that
its arguments name.

Run: python -m benchmarks.track runs/first
"""

import csv
import json
import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from filelock import FileLock, Timeout

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.command_line import check, check_argument, explain, launch, warn


@dataclass
class Args:
    run_dir: tyro.conf.Positional[Path]
    """folder of the run"""
    skip: int = 0
    """rows of metrics.csv that W&B has already"""
    patience: float = 100.0
    """seconds that W&B has for the rest, once the training is over"""


def rows(run_dir: Path) -> list[dict[str, float]]:
    """Whole lines of metrics.csv, without what they leave empty."""
    path = run_dir / "metrics.csv"
    text = path.read_text() if path.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]


def is_over(run_dir: Path) -> bool:
    """Waits a second for the training, which holds the folder's lock as long as it lives."""
    try:
        with FileLock(run_dir / ".lock", timeout=1):
            return True
    except Timeout:
        return False


def watch(run_dir: Path, patience: float, done: threading.Event) -> None:
    """Ends this process `patience` seconds after the training, whatever it is waiting for, unless all is done."""
    while not is_over(run_dir):
        pass
    if not done.wait(patience):
        warn(f"W&B failed (no answer in {patience:g} s): the run is complete without it")
        os._exit(0)


def follow(run_dir: Path, arguments: dict[str, Any], skip: int) -> None:
    """Gives W&B each row once, until the training is over, and then its result."""
    import wandb  # slow to import, and it may not be there

    names: Any = {name: arguments[f"wandb_{name}"] for name in ("project", "group", "entity")}
    names["name"] = f"{arguments['algorithm']}-{run_dir.name}"  # in a grid the folders are 0, 1, ...
    # W&B keeps the run's id in this folder until the run ends: a tracker that was killed, too, goes on under it
    run = wandb.init(**names, dir=run_dir, config=arguments, resume="auto")
    skip = skip if run.resumed else 0  # a new run of W&B's has none of the rows
    run.define_metric("*", step_metric="step")  # W&B's own step counts rows: several may be of one update
    run.define_metric("dynamics/*", step_metric="seconds")  # its epochs before the first update are all of step 0
    over = False
    while not over:
        over = is_over(run_dir)  # before the rows are read: nothing comes after them
        for row in rows(run_dir)[skip:]:
            run.log(row)
            skip += 1
    result = run_dir / "result.json"
    found = json.loads(result.read_text()) if result.exists() else {}
    if found.get("num_updates") == arguments["num_updates"]:  # else it is of a shorter run in this folder
        run.summary.update({name: value for name, value in found.items() if not isinstance(value, list)})
    run.finish()


def main(args: Args) -> None:
    check_argument(args, "skip", args.skip >= 0, "must not be negative")
    with explain(f"no run in {args.run_dir}"):
        arguments = json.loads((args.run_dir / "args.json").read_text())
        check({"algorithm", "wandb_project", "num_updates"} <= set(arguments), "args.json is not of a run")
    run_dir, done = args.run_dir.resolve(), threading.Event()
    threading.Thread(target=watch, args=(run_dir, args.patience, done), daemon=True).start()
    try:
        follow(run_dir, arguments, args.skip)
    except Exception as error:
        warn(f"W&B failed ({error!r}): training goes on without it")
    done.set()


if __name__ == "__main__":
    launch(main, Args)
