"""Where policies go on anchorl/two-ways: the paths of the fifty final episodes of each run, side by side.

Run: python -m benchmarks.measurements.paths runs/bc runs/idql --out paths.png
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1]))
from two_ways import BORDER, FIELD, GOAL, WALL

from common.command_line import check, explain, launch
from common.data import BUILT_IN_TWO_WAYS_ID, load_dataset
from common.evaluation import FINAL_SEED, evaluate, load_policy, make_environments

matplotlib.use("Agg")
from matplotlib import pyplot as plt


@dataclass
class Args:
    run_dirs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs on anchorl/two-ways/mixed-v0"""
    out: Path = Path("paths.png")
    """the picture to write, .png"""
    num_episodes: int = 50
    """episodes of each, from the states that the final score is taken from"""


def main(args: Args) -> None:
    check(bool(args.run_dirs), "give the folder of a run, or several")
    check(args.out.suffix == ".png" and args.out.parent.is_dir(), f"--out {args.out}: must be a .png in a folder")
    check(args.num_episodes >= 1, f"--num-episodes {args.num_episodes}: must be at least 1")
    count = len(args.run_dirs)
    figure, panels = plt.subplots(1, count, figsize=(2.6 * count, 2.5), sharey=True, squeeze=False)
    for run_dir, axes in zip(args.run_dirs, panels[0], strict=True):
        policy, environments = load_policy(run_dir), make_environments(load_dataset(BUILT_IN_TWO_WAYS_ID), 1)
        with explain(f"cannot read {run_dir / 'args.json'}"):
            saved = json.loads((run_dir / "args.json").read_text())
            dataset_id, name = saved["dataset_id"], saved["algorithm"]
        check(dataset_id == BUILT_IN_TWO_WAYS_ID, f"{run_dir}: a run on {dataset_id}, not on {BUILT_IN_TWO_WAYS_ID}")
        draw_field(axes)
        arrived = 0
        for episode in range(args.num_episodes):
            (total,), _ = evaluate(policy, environments, 1, FINAL_SEED + episode)
            unwrapped: Any = environments[0].unwrapped
            axes.plot(*np.array(unwrapped.path).T, color="tab:blue" if total else "tab:red", linewidth=0.6)
            arrived += total > 0
        axes.set_title(f"{name}: {arrived} of {args.num_episodes} arrive", fontsize=9)
    figure.tight_layout()
    figure.savefig(args.out, dpi=90)
    print(f"the paths of {count} runs: {args.out}")


def draw_field(axes: Any) -> None:
    """The wall in the middle and the border, grey, and the goal, green."""
    (left, bottom), (right, top) = WALL
    axes.fill_between([left, right], bottom, top, color="0.6")
    for side in (-1, 1):
        axes.fill_between([-FIELD[0], FIELD[0]], side * BORDER, side * FIELD[1], color="0.6")
    axes.fill_between([GOAL, FIELD[0]], -BORDER, BORDER, color="tab:green", alpha=0.3)
    axes.set(xlim=(-FIELD[0], FIELD[0]), ylim=(-FIELD[1], FIELD[1]), aspect="equal", xticks=[], yticks=[])


if __name__ == "__main__":
    launch(main, Args)
