"""The tables of final scores, and their pictures, made anew of what benchmarks/results/ holds.

README.md has one table of the algorithms under their plain names: the mean of five seeds or more, and half the width of
its 95 % interval. benchmarks/results/README.md has a table for each dataset: a row is an algorithm, the mean of its
runs' scores with the interval or, of fewer than five, each seed's, as benchmarks/report.py has them; the highest first.
Then the peers, where their runs have as many updates as ours: the difference of the means with Welch's 95 % interval,
which takes scores for normal. The tables stand between two comments, and a test compares them.

Run: python -m benchmarks.measurements.tables
"""

import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[1]))
import intervals
import report
from read_runs import measures, read
from scratch import replace

from common.command_line import launch

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FOLDERS: tuple[str, ...] = (
    "pendulum-five",
    "cartpole-five",
    "two-ways-five",
    "hopper-medium-expert",
    "hopper-more",
    "walker2d-medium-expert",
    "halfcheetah-medium-expert",
    "medium-expert-short",
    "medium",
    "medium-expert-50k",
    "model-medium",
)
DRAWN = ("hopper-medium-expert", "walker2d-medium-expert", "halfcheetah-medium-expert")  # what the pictures show
COLUMNS = {  # of README.md's table
    "anchorl/pendulum/mixed-v0": "pendulum",
    "anchorl/two-ways/mixed-v0": "two-ways",
    "zoo/hopper/medium-expert-v0": "hopper",
    "zoo/walker2d/medium-expert-v0": "walker2d",
    "zoo/halfcheetah/medium-expert-v0": "halfcheetah",
}
PEERS = ("CORL", "OfflineRL-Kit", "d3rlpy", "snu-mllab")  # the last are EDAC's authors
NAMES = {"td3_bc": "TD3+BC", "sac_bc": "SAC+BC", "rebrac": "ReBRAC", "bc --top-fraction 0.1": "10% BC"}
NAMES |= {"morel": "MOReL", "cal_ql": "Cal-QL", "diffusion_ql": "Diffusion-QL", "decision_transformer": "DT"}
BEGIN, END = "<!-- made by benchmarks.measurements.tables -->\n", "<!-- the end of it -->"


@dataclass
class Args:
    pictures: bool = True
    """draw medium-expert-curves.png and medium-expert-summary.png in benchmarks/results/, too"""


def label(algorithm: str) -> str:
    """`rebrac --actor-beta 0.1` as ReBRAC, `--actor-beta 0.1`."""
    if algorithm in NAMES:
        return NAMES[algorithm]
    script, _, own = algorithm.partition(" ")
    name = NAMES.get(script) or script.upper().replace("DISCRETE_", "discrete ")
    return f"{name}, `{own}`" if own else name


def table(runs: pd.DataFrame) -> str:
    """Of one dataset, the highest mean first."""
    lines = ["| algorithm | updates | final score | last five evaluations |", "|---|---|---|---|"]
    groups = dict(list(runs.groupby(["algorithm", "updates"])))
    for (algorithm, updates), own in sorted(groups.items(), key=lambda group: -group[1]["last"].mean()):
        cells = [report.words([own[name].to_numpy()]) for name in ("last", "last five")]
        failed = (own["problem"] != "").sum()
        cells[0] += f", {failed} failed" if failed else ""
        lines.append(" | ".join([f"| {label(algorithm)}", f"{updates:,}", *cells]) + " |")
    return "\n".join(lines) + "\n"


def beside_peers(runs: pd.DataFrame) -> str:
    """Peers' runs, and ours of the same algorithm, dataset and number of updates."""
    head = [
        "| dataset | algorithm | updates | ours | peer | the peer's | ours less the peer's |",
        "|---|---|---|---|---|---|---|",
    ]
    lines, means = [], runs.groupby(["dataset_id", "algorithm", "updates"])["last"].apply(list)
    for (dataset_id, algorithm, updates), theirs in means.items():
        peer, _, script = algorithm.partition(" ")
        ours = means.get((dataset_id, script, updates))
        if peer not in PEERS or ours is None or min(len(ours), len(theirs)) < 2:
            continue
        low, high = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
        difference = sum(ours) / len(ours) - sum(theirs) / len(theirs)
        cells = [dataset_id, label(script), f"{updates:,}", report.words([pd.Series(ours).to_numpy()])]
        cells += [peer, report.words([pd.Series(theirs).to_numpy()]), f"{difference:.1f} ({low:.1f} to {high:.1f})"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(["", *head, *lines]) + "\n" if lines else ""


def measured() -> pd.DataFrame:
    """A row per run, with how many `updates` the algorithm had on the dataset in its folder."""
    tables = []
    for folder in [RESULTS / name for name in FOLDERS] + sorted((RESULTS / "peers").glob("*")):
        rows = read((folder,), unequal=True)
        counts = rows.groupby(["dataset_id", "algorithm"])["num_updates"].max().rename("updates")
        tables.append(measures(rows).join(counts, on=["dataset_id", "algorithm"]))
    return pd.concat(tables, ignore_index=True)


def mean_and_half_width(scores: np.ndarray) -> str:
    """`61.9 ± 3.4`; nothing of too few seeds."""
    if len(scores) < intervals.FEWEST:
        return ""
    low, high = intervals.interval([scores], intervals.mean)
    return f"{scores.mean():.1f} ± {(high - low) / 2:.1f}"


def overview() -> str:
    """The algorithms under their plain names, and a column for each of COLUMNS: of their longest runs."""
    runs = measured()
    runs = runs[runs["updates"] == runs.groupby(["algorithm", "dataset_id"])["updates"].transform("max")]
    lines = [f"| algorithm | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    scores = runs.groupby(["algorithm", "dataset_id"])["last"].apply(np.array)
    for algorithm in sorted(set(runs["algorithm"]), key=lambda name: label(name).lower()):
        cells = [mean_and_half_width(scores.get((algorithm, dataset_id), np.empty(0))) for dataset_id in COLUMNS]
        if any(cells) and "`" not in label(algorithm):
            lines.append(f"| {label(algorithm)} | {' | '.join(cells)} |")
    return "\n" + "\n".join(lines) + "\n\n"


def final_scores() -> str:
    """A table for each dataset, and one of the peers."""
    runs = measured()
    ours = runs[~runs["algorithm"].str.startswith(PEERS)]
    parts = [f"{dataset_id}:\n\n{table(own)}" for dataset_id, own in ours.groupby("dataset_id", sort=False)]
    told = "Peers with their own configurations (EDAC with 10 critics, as ours; d3rlpy's BCQ acts by the best of 10\n"
    told += "candidates, ours of 100; `--tau 0.02`: both with model-medium.sh's) on the same data, in the same\n"
    told += "protocol, and Welch's 95 % interval:\n"
    peers = beside_peers(runs)
    return "\n" + "\n".join([*parts, told + peers] if peers else parts) + "\n"


def put(page: Path, text: str) -> None:
    """Between the page's two comments."""
    pattern = f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})"
    replace(page, re.sub(pattern, lambda _: text, page.read_text(), flags=re.DOTALL).encode())


def draw() -> None:
    """The two pictures of benchmarks/report.py."""
    with tempfile.TemporaryDirectory() as folder:
        report.main(report.Args(tuple(RESULTS / name for name in DRAWN), Path(folder), unequal=True))
        for name in ("curves", "summary"):
            shutil.copyfile(Path(folder, f"{name}.png"), RESULTS / f"medium-expert-{name}.png")


def main(args: Args) -> None:
    put(ROOT / "README.md", overview())
    put(RESULTS / "README.md", final_scores())
    if args.pictures:
        draw()


if __name__ == "__main__":
    launch(main, Args)
