"""Fitted Q evaluation against the truth: policies of three kinds, what fqe.py makes of each, and their true returns.

The policies are those of iql.py, of bc.py, and of a network with random weights (bc.py after one update). A run that is
finished is not repeated: stop the command, and give it again. Arguments after `--` go to fqe.py.

Run: python benchmarks/estimates.py
"""

import csv
import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import grid
import tyro


@dataclass
class Args:
    dataset_id: str = "anchorl/pendulum/mixed-v0"
    """dataset of the policies and of the estimates"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of the policies; an estimate has that of its policy"""
    num_updates: int = 3_000
    """of iql.py and of bc.py"""
    eval_episodes: int = 100
    """of each policy, for its true return"""
    results: Path = grid.ROOT / "benchmarks" / "results" / "pendulum-fqe.csv"
    """the estimates go here"""
    workers: int = 2
    """runs side by side, one thread each"""
    runs_dir: Path = Path("runs/estimates")
    """run folders go to <runs_dir>/<policy>/<algorithm>/<dataset>/<seed>"""


def estimate(args: Args, policy: str, seed: int, extra: list[str]) -> list[object]:
    """Trains a policy and evaluates it: a row of the results. Raises SystemExit if a run fails; it has said why."""
    algorithm, num_updates = ("bc", 1) if policy == "random" else (policy, args.num_updates)
    plan = grid.Args(runs_dir=args.runs_dir / policy)
    training = ["--num-updates", str(num_updates), "--eval-episodes", "1"]
    trained = grid.run_dir(plan, algorithm, args.dataset_id, seed)
    evaluation = ["--policy-run-dir", str(trained), "--eval-episodes", str(args.eval_episodes), *extra]
    for script, arguments in ((algorithm, training), ("fqe", evaluation)):
        if not grid.run(plan, script, args.dataset_id, seed, arguments):
            sys.exit(1)
    result = json.loads((grid.run_dir(plan, "fqe", args.dataset_id, seed) / "result.json").read_text())
    error = result["true_return_std"] / math.sqrt(args.eval_episodes)
    numbers = [result["estimate"], *result["interval"], result["true_return_mean"], error]
    return [args.dataset_id, policy, seed, result["num_updates"], *(f"{number:.1f}" for number in numbers)]


def main() -> None:
    command_line, extra = sys.argv[1:], []
    if "--" in command_line:
        split = command_line.index("--")
        command_line, extra = command_line[:split], command_line[split + 1 :]
    args = tyro.cli(Args, args=command_line, description=__doc__)
    with ThreadPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(estimate, args, *cell, extra) for cell in product(("random", "bc", "iql"), args.seeds)]
        rows = [job.result() for job in jobs]
    columns = [
        "dataset_id",
        "policy",
        "seed",
        "num_updates",
        "estimate",
        "low",
        "high",
        "true_return",
        "standard_error",
    ]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


if __name__ == "__main__":
    main()
