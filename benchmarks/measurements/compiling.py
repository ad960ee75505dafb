"""When does --compile pay? Seconds until an update is a graph, and how many updates win them back.

`cold` is with an empty cache of the compiler, `warm` with the one that the run before has left: PyTorch keeps what it
compiled on disk (TORCHINDUCTOR_CACHE_DIR). Each is a process of its own, as a run is. Eager and compiled updates take
turns in it; `pays after` is the number of updates whose time, saved by the graph, makes up for the seconds before.

Run: python -m benchmarks.measurements.compiling --csv benchmarks/results/compiling.csv
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path += [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import throughput
from scratch import replace_table

from common.command_line import check, launch

COLUMNS = "algorithm", "threads", "eager_ms", "compiled_ms", "cold_s", "warm_s", "pays_after_cold", "pays_after_warm"


@dataclass
class Args:
    algorithms: tuple[str, ...] = ("bc", "td3_bc", "iql", "awac", "rebrac", "bcq", "cql", "edac", "mopo")
    """scripts in algorithms/, without .py"""
    rounds: int = 5
    """times that eager and compiled updates take turns"""
    seconds: float = 1.0
    """of each measurement"""
    threads: int = torch.get_num_threads()
    """PyTorch's threads"""
    csv: Path | None = None
    """write the table here"""
    only: str | None = None
    """measure this script alone, in this process, and print its numbers: what each process is told"""


def measure(args: Args, algorithm: str) -> dict[str, float]:
    """Seconds of the first compiled updates, and milliseconds of an update then and without --compile."""
    sizes = throughput.Args(threads=args.threads)
    buffer = throughput.random_buffer(sizes, algorithm, torch.device("cpu"), 10)
    eager, _ = throughput.make_trainer(sizes, algorithm, buffer, compile=False)
    for _ in range(4):
        eager()
    compiled, _ = throughput.make_trainer(sizes, algorithm, buffer, compile=True)
    began = time.perf_counter()
    for _ in range(4):  # TD3's second update is another graph than its first
        compiled()
    first = time.perf_counter() - began
    times: dict[str, list[float]] = {"eager": [], "compiled": []}
    for _ in range(args.rounds):
        for name, train in (("eager", eager), ("compiled", compiled)):
            times[name].append(1000 / throughput.rate(train, args.seconds, "cpu"))
    return {"first": first} | {name: statistics.median(values) for name, values in times.items()}


def measure_apart(args: Args, algorithm: str, cache: str) -> dict[str, float]:
    """`measure`, in a process of its own whose compiler keeps its files in `cache`."""
    words = ["--only", algorithm, "--rounds", str(args.rounds), "--seconds", str(args.seconds)]
    words += ["--threads", str(args.threads)]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
    run = subprocess.run([sys.executable, __file__, *words], env=environment, stdout=subprocess.PIPE, text=True)
    check(run.returncode == 0, f"{algorithm} could not be measured")
    return json.loads(run.stdout)


def pays_after(seconds: float, found: dict[str, float]) -> int | None:
    """Updates; None where the graph is no faster."""
    saved = found["eager"] - found["compiled"]
    return round(1000 * seconds / saved) if saved > 0 else None


def main(args: Args) -> None:
    check(min(args.rounds, args.threads) >= 1, "--rounds and --threads: must be at least 1")
    torch.set_num_threads(args.threads)
    if args.only:
        print(json.dumps(measure(args, args.only)))
        return
    rows: list[dict[str, Any]] = []
    for algorithm in args.algorithms:
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (measure_apart(args, algorithm, cache) for _ in range(2))
        milliseconds = {f"{name}_ms": round(warm[name], 2) for name in ("eager", "compiled")}
        seconds = {"cold_s": round(cold["first"], 1), "warm_s": round(warm["first"], 1)}
        after = {
            f"pays_after_{name}": pays_after(found["first"], warm) for name, found in (("cold", cold), ("warm", warm))
        }
        rows.append({"algorithm": algorithm, "threads": args.threads} | milliseconds | seconds | after)
        print(" ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
        if args.csv:  # each time, so that a script that fails leaves what was measured before
            replace_table(args.csv, [COLUMNS, *(tuple(row[name] for name in COLUMNS) for row in rows)])


if __name__ == "__main__":
    launch(main, Args)
