"""README.md's table of final scores, made anew of what benchmarks/results/ holds.

A row is an algorithm on a dataset: the mean of its runs' scores with a 95 % interval over seeds or, of fewer than five,
each seed's, as benchmarks/report.py has them. It stands between two comments in README.md, and a test compares them.

Run: python -m benchmarks.measurements.tables
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1]))
from read_runs import measures, read
from report import words

from common.command_line import launch

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("pendulum-five", "cartpole-five", "hopper-medium-expert", "hopper-more", "walker2d-medium-expert")
NAMES = {"td3_bc": "TD3+BC", "sac_bc": "SAC+BC", "rebrac": "ReBRAC", "bc --top-fraction 0.1": "10% BC"}
BEGIN, END = "<!-- made by benchmarks.measurements.tables -->\n", "<!-- the end of it -->"


@dataclass
class Args:
    page: Path = ROOT / "README.md"
    """the file that holds the two comments"""


def label(algorithm: str) -> str:
    """`rebrac --actor-beta 0.1` as ReBRAC, `--actor-beta 0.1`."""
    if algorithm in NAMES:
        return NAMES[algorithm]
    script, _, own = algorithm.partition(" ")
    name = NAMES.get(script) or script.upper().replace("DISCRETE_", "discrete ")
    return f"{name}, `{own}`" if own else name


def table(runs: pd.DataFrame, updates: pd.Series) -> str:
    """The highest mean first, dataset by dataset."""
    lines = ["| dataset | algorithm | updates | final score | last five evaluations |", "|---|---|---|---|---|"]
    for dataset_id, of_dataset in runs.groupby("dataset_id", sort=False):
        means = of_dataset.groupby("algorithm")["last"].mean().sort_values(ascending=False)
        for algorithm in means.index:
            own = of_dataset[of_dataset["algorithm"] == algorithm]
            cells = [words([own[name].to_numpy()]) for name in ("last", "last five")]
            failed = (own["problem"] != "").sum()
            cells[0] += f", {failed} failed" if failed else ""
            count = f"{updates[dataset_id, algorithm]:,}"
            lines.append(" | ".join([f"| {dataset_id}", label(algorithm), count, *cells]) + " |")
    return "\n".join(lines) + "\n"


def final_scores() -> str:
    folders = (ROOT / "benchmarks" / "results" / name for name in FOLDERS)
    rows = pd.concat([read((folder,), unequal=True) for folder in folders])
    return table(measures(rows, "last"), rows.groupby(["dataset_id", "algorithm"])["num_updates"].max())


def main(args: Args) -> None:
    pattern = f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})"
    args.page.write_text(re.sub(pattern, lambda _: final_scores(), args.page.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    launch(main, Args)
