"""Fitted Q evaluation against the truth: policies of several kinds, what fqe.py makes of each, and their true returns.

The last line is Spearman's correlation of the ranks by estimate and by truth. A policy with random weights is bc.py's
after one update. A run that is finished is not repeated: stop the command, and give it again. Arguments after `--` go
to fqe.py.

Run: python -m benchmarks.measurements.estimates
"""

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import tyro
from scipy.stats import spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1]))
import run
from scratch import replace_table

from common.command_line import check, launch


@dataclass
class Args:
    dataset_id: str = "anchorl/pendulum/mixed-v0"
    """dataset of the policies and of the estimates"""
    policies: tuple[str, ...] = ("random", "bc", "bc --top-fraction 0.1", "td3_bc", "awr", "iql")
    """scripts in algorithms/, without .py; with arguments of their own in quotes"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """seeds of the policies; an estimate has that of its policy"""
    num_updates: int = 3_000
    """of each policy but the random one"""
    eval_episodes: int = 100
    """of each policy, for its true return"""
    results: Path = Path("runs/estimates/estimates.csv")
    """the estimates go here"""
    workers: int = 2
    """runs side by side, one thread each"""
    runs_dir: Path = Path("runs/estimates")
    """run folders go to <runs_dir>/<policy>/<seed>/<script>"""
    script: tyro.conf.Positional[tuple[str, ...]] = ()
    """after `--`: arguments of fqe.py"""


def estimate(args: Args, policy: str, seed: int) -> list[Any]:
    """Trains a policy and evaluates it: a row of the results. Raises SystemExit if a run fails."""
    num_updates = 1 if policy == "random" else args.num_updates
    algorithm, *own = ["bc"] if policy == "random" else policy.split()
    folder = args.runs_dir.resolve() / run.as_name(policy) / str(seed)
    training = [*own, "--num-updates", str(num_updates), "--eval-episodes", "1"]
    evaluation = ["--policy-run-dir", str(folder / algorithm), "--eval-episodes", str(args.eval_episodes), *args.script]
    for script, arguments in ((algorithm, training), ("fqe", evaluation)):
        cell = run.Cell(script, args.dataset_id, seed, folder / script)
        if problem := run.run_cell(cell, run.Args(script=tuple(arguments)), {}):
            sys.exit(f"error: {cell.name}: {problem}")
    result = json.loads((folder / "fqe" / "result.json").read_text())
    check(result["true_return_mean"] is not None, f"{args.dataset_id} names no environment: there is no true return")
    error = result["true_return_std"] / math.sqrt(max(args.eval_episodes - 1, 1))
    numbers = [result["estimate"], *result["interval"], result["true_return_mean"], error]
    return [args.dataset_id, policy, seed, result["num_updates"], *(f"{number:.6g}" for number in numbers)]


def main(args: Args) -> None:
    check(bool(args.policies and args.seeds), "--policies and --seeds: name one of each at least")
    words = [args.dataset_id, args.num_updates, args.eval_episodes, *args.script]
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    run.same_arguments(args.runs_dir.resolve(), tuple(map(str, words)))
    with ThreadPoolExecutor(args.workers) as pool:
        jobs = [pool.submit(estimate, args, *cell) for cell in product(args.policies, args.seeds)]
        rows = [job.result() for job in jobs]
    columns = "dataset_id", "policy", "seed", "num_updates", "estimate", "low", "high", "true_return", "standard_error"
    args.results.parent.mkdir(parents=True, exist_ok=True)
    replace_table(args.results, [columns, *map(tuple, rows)])
    estimates, truths = zip(*((float(row[4]), float(row[7])) for row in rows), strict=True)
    print(f"Spearman's rank correlation of {len(rows)} policies: {spearmanr(estimates, truths).statistic:.2f}")


if __name__ == "__main__":
    launch(main, Args)
