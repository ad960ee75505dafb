"""How the time of an update grows with the data, the networks' width, the batch and the number of critics.

One of the four varies at a time, the others are the scripts' defaults, on random data of HalfCheetah's sizes. Beside it
stands the time of the update's matrix products alone, as in throughput.py: the bound. Both take turns, and each time is
the median over --rounds. Writes a table and, beside it, a picture of the same name.

Run: python -m benchmarks.measurements.growth --csv benchmarks/results/growth.csv
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path += [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import throughput
from scratch import replace, replace_table

from common.command_line import check, launch

COLUMNS = "axis", "size", "algorithm", "mode", "ms", "bound_ms"


@dataclass
class Args:
    transitions: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000)
    """sizes of the dataset, of --algorithm; multiples of 1,000"""
    widths: tuple[int, ...] = (256, 512, 1024)
    """widths of the two hidden layers, of --algorithm"""
    batches: tuple[int, ...] = (256, 1024, 4096)
    """batch sizes, of --algorithm"""
    critics: tuple[int, ...] = (2, 10, 50)
    """numbers of critics, of edac"""
    algorithm: str = "td3_bc"
    """script whose updates are timed"""
    compile: bool = False
    """with --compile"""
    threads: int = torch.get_num_threads()
    """PyTorch's threads"""
    rounds: int = 5
    """times that update and bound take turns"""
    seconds: float = 1.0
    """of each measurement, or one update"""
    csv: Path = Path("growth.csv")
    """the table; the picture lies beside it"""


def measure(args: Args, algorithm: str, transitions: int = 100_000, batch_size: int = 256) -> tuple[float, float]:
    """Milliseconds of an update, with its batch's sampling, and of its products."""
    options = throughput.Args(threads=args.threads)
    algorithm = f"{algorithm} --batch-size {batch_size}"
    buffer = throughput.random_buffer(options, algorithm, torch.device("cpu"), transitions // 1000)
    train, _ = throughput.make_trainer(options, algorithm, buffer, args.compile)
    ways, times = [train, throughput.make_bound(options, algorithm)], []
    for _ in range(args.rounds + 1):
        times.append([1000 / throughput.rate(way, args.seconds, "cpu") for way in ways])
    update, bound = (statistics.median(column) for column in zip(*times[1:], strict=True))  # the first warms up
    return update, bound


def rows(args: Args) -> list[list[Any]]:
    wide = "{} --hidden-dims {} {}"
    axes: dict[str, Any] = {
        "transitions": [(size, args.algorithm, {"transitions": size}) for size in args.transitions],
        "width": [(size, wide.format(args.algorithm, size, size), {}) for size in args.widths],
        "batch": [(size, args.algorithm, {"batch_size": size}) for size in args.batches],
        "critics": [(size, f"edac --num-critics {size}", {}) for size in args.critics],
    }
    table: list[list[Any]] = []
    print(*(f"{name:>12}" for name in COLUMNS))
    for axis, cases in axes.items():
        for size, algorithm, more in cases:
            times = (f"{value:.2f}" for value in measure(args, algorithm, **more))
            name, mode = throughput.script_of(algorithm), "compile" if args.compile else "eager"
            table.append([axis, size, name, mode, *times])
            print(*(f"{value:>12}" for value in table[-1]), flush=True)
    return table


def draw(table: list[list[Any]], path: Path) -> None:
    figure = Figure(figsize=(12, 3), layout="constrained")
    axes = list(dict.fromkeys(row[0] for row in table))
    for axis, plot in zip(axes, figure.subplots(1, len(axes), squeeze=False, sharey=True)[0], strict=True):
        _, sizes, names, _, times, bounds = zip(*(row for row in table if row[0] == axis), strict=True)
        plot.loglog(sizes, [float(str(time)) for time in times], marker="o", label="update")
        plot.loglog(sizes, [float(str(time)) for time in bounds], marker=".", linestyle="--", label="its products")
        plot.set(xlabel=axis, title=names[0], xticks=sizes, xticklabels=[f"{size:,}" for size in sizes])
        plot.minorticks_off()
    figure.axes[0].set_ylabel("milliseconds")
    figure.axes[0].legend()
    replace(path, lambda file: figure.savefig(file, dpi=100, format="png"))


def main(args: Args) -> None:
    known = throughput.Args.algorithms
    check(args.algorithm in known, f"--algorithm {args.algorithm}: there are {', '.join(known)}")
    check(min(args.rounds, args.threads) >= 1, "--rounds and --threads: must be at least 1")
    whole = all(size >= 1000 and size % 1000 == 0 for size in args.transitions)
    check(whole, f"--transitions {' '.join(map(str, args.transitions))}: must be multiples of 1,000")
    sizes = (*args.widths, *args.batches, *args.critics)
    check(min(sizes, default=1) >= 1, "--widths, --batches and --critics: must be at least 1")
    torch.set_num_threads(args.threads)
    table = rows(args)
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    replace_table(args.csv, [COLUMNS, *map(tuple, table)])
    draw(table, args.csv.with_suffix(".png"))


if __name__ == "__main__":
    launch(main, Args)
