"""Updates per second with one thread, with all, and with what a run chooses by itself; alone and on a busy machine.

Busy means that another program keeps one core at work. The three take turns, and each number is the median over rounds.

Run: python -m benchmarks.measurements.threads
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.command_line import check, launch

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Args:
    algorithms: tuple[str, ...] = ("bc", "iql", "cql")
    """scripts in algorithms/, without .py"""
    num_updates: tuple[int, ...] = (6000, 1500, 300)
    """of each of them; the first trial of threads begins after 100"""
    dataset_id: str = "anchorl/pendulum/mixed-v0"
    """what they train on: with 6 actions, say, sums could depend on the threads"""
    rounds: int = 3
    """times that the three take turns"""


@contextlib.contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """Keeps a core at work."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if other:
            other.kill()
            other.wait()


def updates_per_second(algorithm: str, num_updates: int, dataset_id: str, threads: int | None) -> float:
    """Of a run. Raises CalledProcessError if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    with tempfile.TemporaryDirectory() as folder:
        words = ["--num-updates", str(num_updates), "--eval-every", str(num_updates), "--run-dir", f"{folder}/run"]
        words += ["--dataset-id", dataset_id, "--eval-episodes", "1", "--final-eval-episodes", "1", "--device", "cpu"]
        command = [sys.executable, str(ROOT / "algorithms" / f"{algorithm}.py"), *words]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return float(json.loads(Path(folder, "run", "result.json").read_text())["updates_per_second"])


def main(args: Args) -> None:
    enough = len(args.num_updates) >= len(args.algorithms) and args.rounds >= 1
    check(enough, "--num-updates needs a number for each of --algorithms, --rounds at least 1")
    for name in args.algorithms:
        check((ROOT / "algorithms" / f"{name}.py").is_file(), f"--algorithms {name}: there is no such script")
    count = os.cpu_count() or 1
    choices = {"1 thread": 1, f"{count} threads": count, "its own choice": None}
    print(f"| algorithm | other programs | {' | '.join(choices)} |", *["|---" * (2 + len(choices)) + "|"], sep="\n")
    for algorithm, num_updates in zip(args.algorithms, args.num_updates, strict=False):
        for wanted in (False, True):
            found: dict[str, list[float]] = {name: [] for name in choices}
            with busy(wanted):
                for _ in range(args.rounds):
                    for name, threads in choices.items():
                        found[name].append(updates_per_second(algorithm, num_updates, args.dataset_id, threads))
            cells = " | ".join(f"{statistics.median(values):.3g}" for values in found.values())
            print(f"| {algorithm} | {'one' if wanted else 'none'} | {cells} |", flush=True)


if __name__ == "__main__":
    launch(main, Args)
