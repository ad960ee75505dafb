"""README.md's tables of scores and of speed say what benchmarks/results/ holds, row by row."""

import csv
import re
from collections import defaultdict

import numpy as np
import pytest
from conftest import ROOT, SCRIPTS

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "README.md").read_text().splitlines()
    if re.match(r"\| (anchorl|zoo)/\S+ \| .* \| [\d,]+ \|", line)
]


def script_of(label):
    """`IQL, --no-cosine-decay` is iql.py, `discrete CQL` discrete_cql.py, `TD3+BC` td3_bc.py."""
    return re.sub(r"[ +]", "_", re.sub(r"^10% |,.*", "", label)).lower()


def mean_and_range(scores):
    return f"{np.mean(scores):.1f} ({min(scores):.1f} to {max(scores):.1f})"


def measured():
    """For every file, dataset and algorithm: script, updates, the last evaluation and the mean of the last five."""
    for path in (ROOT / "benchmarks" / "results").glob("*.csv"):
        runs = defaultdict(lambda: defaultdict(list))
        with path.open() as file:
            for row in csv.DictReader(file):
                if "score" in row:
                    score = int(row["num_updates"]), float(row["score"])
                    runs[row["dataset_id"], row["algorithm"]][row["seed"]].append(score)
        for (dataset_id, algorithm), seeds in runs.items():
            updates, _ = max(seeds["0"])
            scores = [[score for _, score in sorted(evaluations)] for evaluations in seeds.values()]
            last, last_five = [run[-1] for run in scores], [np.mean(run[-5:]) for run in scores]
            yield (dataset_id, algorithm.split()[0], f"{updates:,}"), mean_and_range(last), mean_and_range(last_five)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:3]))
def test_the_readme_says_what_was_measured(row):
    dataset_id, label, updates, last, last_five = row
    assert script_of(label) in SCRIPTS
    found = [scores for what, *scores in measured() if what == (dataset_id, script_of(label), updates)]
    assert any(last == known[0] and last_five in ("", known[1]) for known in found), found


def test_the_table_was_found():
    assert len(ROWS) > 20


SPEEDS = {  # the files behind README.md's tables of speed, in their order, and the modes of a table's columns
    "throughput.csv": ("eager", "compile", "d3rlpy"),
    "throughput-avx2.csv": ("eager", "compile"),
    "throughput-amx.csv": ("eager", "compile", "compile bf16"),
}
PARTS = {"MOPO, its model": "mopo:dynamics", "MOPO, 50,000 rollouts of 5 steps": "mopo:rollout"}


@pytest.mark.parametrize("name", SPEEDS)
def test_the_tables_of_speed_say_what_was_measured(name):
    """Updates per second of each mode, the bound, and each mode's ratio to it."""
    measured = defaultdict(dict)
    with (ROOT / "benchmarks" / "results" / name).open() as file:
        for row in csv.DictReader(file):
            measured[row["algorithm"]][row["mode"]] = row
    tables = re.findall(
        r"\| algorithm \| updates per second.*\n\|[-|]+\n((?:\|.*\n)+)", (ROOT / "README.md").read_text()
    )
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in tables[list(SPEEDS).index(name)].splitlines()]
    for label, *cells in rows:
        modes = measured[PARTS.get(label) or script_of(label)]
        speeds = [modes[mode]["updates_per_second"] if mode in modes else "" for mode in SPEEDS[name]]
        ratios = [f"{float(modes[mode]['ratio']):.2f}" if mode in modes else "" for mode in SPEEDS[name]]
        assert cells == [*speeds, modes["eager"]["bound_updates_per_second"], *ratios], label
    assert len(rows) == len(measured)
