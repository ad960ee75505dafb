"""Turns the CSV files of benchmarks/grid.py into a Markdown table and a picture of learning curves.

Numbers are scores, or returns where a dataset has no reference scores. A cell is the mean over seeds, and the range
from the worst seed to the best: of the last evaluation, and of the mean of the last five, which swings less.

Run: python benchmarks/report.py benchmarks/results/pendulum.csv --picture pendulum.png
"""

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

Curves = dict[tuple[str, str], dict[int, list[tuple[int, float]]]]  # (dataset, algorithm) -> seed -> (updates, score)


@dataclass
class Args:
    results: tyro.conf.Positional[tuple[Path, ...]]
    """CSV files written by grid.py, each algorithm on each dataset in one of them"""
    picture: Path | None = None
    """write learning curves here, one panel per dataset"""


def read_curves(paths: tuple[Path, ...]) -> Curves:
    curves: Curves = defaultdict(lambda: defaultdict(list))
    for path in paths:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                point = int(row["num_updates"]), float(row["score"] or row["return_mean"])
                curves[row["dataset_id"], row["algorithm"]][int(row["seed"])].append(point)
    return curves


def summary(values: list[float]) -> str:
    return f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def table(curves: Curves) -> str:
    lines = [
        "| dataset | algorithm | updates | seeds | last evaluation | mean of the last five |",
        "|---|---|---|---|---|---|",
    ]
    for (dataset_id, algorithm), seeds in curves.items():
        last = [points[-1][1] for points in seeds.values()]
        last_five = [float(np.mean([score for _, score in points[-5:]])) for points in seeds.values()]
        updates = max(points[-1][0] for points in seeds.values())
        cells = [dataset_id, algorithm, f"{updates:,}", len(seeds), summary(last), summary(last_five)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def plot(curves: Curves, path: Path) -> None:
    datasets = list(dict.fromkeys(dataset_id for dataset_id, _ in curves))
    figure = Figure(figsize=(7.5 * len(datasets), 3.6), layout="constrained")
    for axes, dataset_id in zip(np.atleast_1d(figure.subplots(1, len(datasets))), datasets, strict=True):
        for algorithm in (name for found, name in curves if found == dataset_id):
            seeds = list(curves[dataset_id, algorithm].values())
            length = min(map(len, seeds))
            steps = [step for step, _ in seeds[0][:length]]
            scores = np.array([[score for _, score in points[:length]] for points in seeds])
            (line,) = axes.plot(steps, scores.mean(axis=0), marker=".", label=f"{algorithm} ({len(seeds)} seeds)")
            axes.fill_between(steps, scores.min(axis=0), scores.max(axis=0), color=line.get_color(), alpha=0.15)
        axes.set(xlabel="updates", ylabel="normalised score: mean and range of seeds", title=dataset_id)
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))  # beside the curves, not on them
    figure.savefig(path, dpi=130)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    curves = read_curves(args.results)
    print(table(curves))
    if args.picture is not None:
        plot(curves, args.picture)


if __name__ == "__main__":
    main()
