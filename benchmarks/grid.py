"""Runs algorithms x datasets x seeds, each in a process of its own, and collects every evaluation in one CSV.

A run whose result.json exists is not repeated and an unfinished one is resumed: stop the command, and give it again.
Arguments after `--` go to every script.

Run: python benchmarks/grid.py --algorithms bc td3_bc iql awr --results benchmarks/results/pendulum.csv
"""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Args:
    algorithms: tuple[str, ...] = ("bc", "td3_bc", "iql", "awr")
    """scripts in algorithms/, without .py"""
    dataset_ids: tuple[str, ...] = ("anchorl/pendulum/mixed-v0",)
    """datasets"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds"""
    results: Path = ROOT / "benchmarks" / "results" / "pendulum.csv"
    """the evaluations of all runs go here"""
    workers: int = 2
    """runs side by side, one thread each"""
    runs_dir: Path = Path("runs/grid")
    """run folders go to <runs_dir>/<algorithm>/<dataset>/<seed>"""


def run_dir(args: Args, algorithm: str, dataset_id: str, seed: int) -> Path:
    return args.runs_dir / algorithm / dataset_id.replace("/", "-") / str(seed)


def run(args: Args, algorithm: str, dataset_id: str, seed: int, extra: list[str]) -> bool:
    """One training; its output goes to a log beside the run folder. True if it went well."""
    folder = run_dir(args, algorithm, dataset_id, seed)
    if (folder / "result.json").exists():
        return True
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "algorithms" / f"{algorithm}.py"), "--run-dir", str(folder)]
    command += (
        ["--resume"]
        if (folder / "checkpoint.pt").exists()
        else ["--dataset-id", dataset_id, "--seed", str(seed), *extra]
    )
    with folder.with_suffix(".log").open("a") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    outcome = "done" if code == 0 else f"failed with exit code {code}, see {log.name}"
    print(f"{algorithm} {dataset_id} seed {seed}: {outcome}", flush=True)
    return code == 0


def collect(args: Args) -> None:
    """Writes the evaluations of all finished runs of the grid."""
    rows = []
    for algorithm, dataset_id, seed in product(args.algorithms, args.dataset_ids, args.seeds):
        folder = run_dir(args, algorithm, dataset_id, seed)
        if not (folder / "result.json").exists():
            continue
        result = json.loads((folder / "result.json").read_text())
        with (folder / "metrics.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get("eval/return_mean"):
                    score = f"{float(row['eval/score']):.1f}" if row["eval/score"] else ""
                    values = [algorithm, dataset_id, seed, row["step"], score, f"{float(row['eval/return_mean']):.1f}"]
                    rows.append([*values, f"{result['updates_per_second']:.0f}"])
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["algorithm", "dataset_id", "seed", "num_updates", "score", "return_mean", "updates_per_second"]
        )
        writer.writerows(rows)


def main() -> None:
    command_line, extra = sys.argv[1:], []
    if "--" in command_line:
        split = command_line.index("--")
        command_line, extra = command_line[:split], command_line[split + 1 :]
    args = tyro.cli(Args, args=command_line, description=__doc__)
    cells = product(args.algorithms, args.dataset_ids, args.seeds)
    succeeded = True
    with ThreadPoolExecutor(args.workers) as pool:
        for job in [pool.submit(run, args, *cell, extra) for cell in cells]:
            succeeded &= job.result()
            collect(args)
    sys.exit(0 if succeeded else 1)


if __name__ == "__main__":
    main()
