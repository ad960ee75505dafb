"""README.md's table of scores says what benchmarks/results/ holds, row by row."""

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
