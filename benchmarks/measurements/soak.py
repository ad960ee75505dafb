"""A long run with many rows, evaluations and checkpoints: memory and open files must not grow, no row may be missing.

Memory is what is resident, in the last tenth of the run against the second: what comes before is warm-up. Open files
are the lower quartile of each half of the run: a file that is written is open for a moment, one that leaks stays.
Linux only.

Run: python -m benchmarks.measurements.soak
"""

import csv
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.command_line import check, launch

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Args:
    algorithm: str = "iql"
    """script to run"""
    num_updates: int = 30_000
    """gradient steps"""
    log_every: int = 10
    """updates between rows"""
    eval_every: int = 500
    """updates between evaluations"""
    checkpoint_every: int = 100
    """updates between checkpoints"""
    max_growth: float = 0.02
    """growth of memory that passes"""


def sample(process: subprocess.Popen) -> tuple[int, int]:
    """Resident memory in KiB and open files of the process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    resident = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(resident), len(list(Path(f"/proc/{process.pid}/fd").iterdir()))


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder, "run")
        numbers = {name: getattr(args, name) for name in ("num_updates", "log_every", "eval_every", "checkpoint_every")}
        command = [sys.executable, str(ROOT / "algorithms" / f"{args.algorithm}.py"), "--run-dir", str(run_dir)]
        command += [f"--{name.replace('_', '-')}={value}" for name, value in numbers.items()]
        process = subprocess.Popen([*command, "--eval-episodes=2", "--hidden-dims", "32", "32"])
        samples: list[tuple[int, int]] = []
        while process.poll() is None:
            time.sleep(0.05)
            if (run_dir / "metrics.csv").exists():  # it trains
                try:
                    samples.append(sample(process))
                except (OSError, StopIteration):  # it ended meanwhile
                    break
        if process.wait() != 0:
            sys.exit(f"{args.algorithm} failed with exit code {process.returncode}")
        with (run_dir / "metrics.csv").open() as file:
            steps = {int(row["step"]) for row in csv.DictReader(file)}
    check(len(samples) >= 3, f"--num-updates {args.num_updates}: too few for a course of memory")
    memory, files = np.array(samples, dtype=float).T
    tenth = max(1, len(samples) // 10)
    early, late = slice(tenth, 2 * tenth), slice(-tenth, None)
    before, after = (np.median(memory[part]) / 1024 for part in (early, late))
    middle = len(samples) // 2
    few, many = (
        int(np.quantile(files[half], 0.25, method="lower")) for half in (slice(middle + 1), slice(middle, None))
    )
    missing = len(set(range(args.log_every, args.num_updates + 1, args.log_every)) - steps)
    print(f"{args.algorithm}, {args.num_updates:,} updates: memory {before:.1f} to {after:.1f} MiB", end=", ")
    print(f"open files {few} to {many}, {missing} of {len(steps)} rows missing")
    if after > (1 + args.max_growth) * before or many > few or missing:
        sys.exit("that is not flat, or not complete")


if __name__ == "__main__":
    launch(main, Args)
