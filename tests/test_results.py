"""The pages' tables of scores and of speed say what benchmarks/results/ holds, row by row."""

import csv
import re
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, SCRIPTS
from scipy import stats

from benchmarks.measurements import tables

PAGES = ("", "algorithms", "benchmarks", "benchmarks/results")
README, GUIDE, TOOLS, RESULTS = ((ROOT / path / "README.md").read_text() for path in PAGES)
MODEL_BASED = ("model-medium", "peers/offlinerlkit")


def rows_of(page, section):
    """The cells of the lines about a dataset in a section, or in the paragraph that begins so."""
    lines = page[page.index(section) :].split("\n## ")[0].splitlines()
    rows = [line for line in lines if re.match(r"\| (anchorl|zoo)/\S+ \| .* \| [\d,]+ \|", line)]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


ROWS, PEERS = rows_of(RESULTS, "These are older"), rows_of(TOOLS, "**Peers.**")


def script_of(label):
    """`IQL, --no-cosine-decay` is iql.py, `discrete CQL` discrete_cql.py, `TD3+BC` td3_bc.py, `DT` its long name's."""
    label = "Decision Transformer" if label == "DT" else label
    return re.sub(r"[ +-]", "_", re.sub(r"^10% |,.*", "", label)).lower()


def mean_and_range(scores):
    return f"{np.mean(scores):.1f} ({min(scores):.1f} to {max(scores):.1f})"


def runs():
    """For every file, dataset and algorithm: both names, and by seed the scores after so many updates."""
    for path in (ROOT / "benchmarks" / "results").glob("*.csv"):
        found = defaultdict(lambda: defaultdict(dict))
        with path.open() as file:
            for row in csv.DictReader(file):
                if {"score", "dataset_id"} <= row.keys():
                    seeds = found[row["dataset_id"], row["algorithm"]]
                    seeds[row["seed"]][int(row["num_updates"])] = float(row["score"])
        for (dataset_id, algorithm), seeds in found.items():
            yield dataset_id, algorithm, seeds


def measured():
    """For every file, dataset and algorithm: script, updates, the last evaluation and the mean of the last five."""
    for dataset_id, algorithm, seeds in runs():
        scores = [[score for _, score in sorted(run.items())] for run in seeds.values()]
        last, last_five = [run[-1] for run in scores], [np.mean(run[-5:]) for run in scores]
        updates = f"{max(seeds['0']):,}"
        yield (dataset_id, algorithm.split()[0], updates), mean_and_range(last), mean_and_range(last_five)


def after(updates, dataset_id, algorithm):
    """What each file with seeds 0, 1 and 2 of it says."""
    return [
        mean_and_range([run[updates] for run in seeds.values()])
        for *what, seeds in runs()
        if what == [dataset_id, algorithm] and all(updates in run for run in seeds.values()) and len(seeds) == 3
    ]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:3]))
def test_the_older_table_says_what_was_measured(row):
    dataset_id, label, updates, last, last_five = row
    assert script_of(label) in SCRIPTS
    found = [scores for what, *scores in measured() if what == (dataset_id, script_of(label), updates)]
    assert any(last == known[0] and last_five in ("", known[1]) for known in found), found


@pytest.mark.parametrize(("page", "make"), [(README, tables.overview), (RESULTS, tables.final_scores)])
def test_the_tables_of_final_scores_are_what_their_command_makes(page, make):
    assert page.split(tables.BEGIN)[1].split(tables.END)[0] == make(), "python -m benchmarks.measurements.tables"


def test_a_table_is_put_between_its_comments(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.BEGIN}| old |\n{tables.END}\nafter\n")
    tables.put(page, "| new |\n")
    assert page.read_text() == f"before\n{tables.BEGIN}| new |\n{tables.END}\nafter\n"


def test_peers_stand_beside_ours_of_as_many_updates():
    """The difference and Welch's interval, by hand."""
    ours, theirs = [100.0, 90.0, 110.0, 95.0, 105.0], [80.0, 100.0, 90.0]
    rows = [("zoo/hopper", "td3_bc", 10_000, score) for score in ours]
    rows += [("zoo/hopper", "CORL td3_bc", 10_000, score) for score in theirs]
    rows += [("zoo/hopper", "CORL iql", 10_000, 1.0), ("zoo/hopper", "d3rlpy td3_bc", 5_000, 1.0)]
    made = tables.beside_peers(pd.DataFrame(rows, columns=["dataset_id", "algorithm", "updates", "last"]))
    (line,) = made.strip().splitlines()[2:]
    parts = np.var(ours, ddof=1) / 5, np.var(theirs, ddof=1) / 3
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 4 + parts[1] ** 2 / 2)
    half = stats.t.ppf(0.975, freedom) * sum(parts) ** 0.5
    assert line.endswith(f"| CORL | 90.0 [80.0, 90.0, 100.0] | 10.0 ({10 - half:.1f} to {10 + half:.1f}) |")
    assert line.startswith("| zoo/hopper | TD3+BC | 10,000 | 100.0 (")


def test_final_scores_by_hand():
    """A row of five seeds and one of two, from the files."""
    rows = list(csv.DictReader((ROOT / "benchmarks/results/pendulum-five/results.csv").open()))
    scores = np.array([float(row["final_score"]) for row in rows if row["algorithm"] == "td3_bc"])
    half = 2.776 * scores.std(ddof=1) / 5**0.5  # Student's t of 4 degrees of freedom
    made = tables.final_scores().split("anchorl/pendulum/mixed-v0:")[1]
    line = next(line for line in made.splitlines() if line.startswith("| TD3+BC |"))
    mean, low, high = map(float, re.findall(r"-?\d+\.\d", line)[:3])
    assert [mean, low, high] == pytest.approx([scores.mean(), scores.mean() - half, scores.mean() + half], abs=0.15)
    (line,) = (line for line in tables.overview().splitlines() if line.startswith("| TD3+BC |"))
    assert [float(cell) for cell in line.split("|")[2].split("±")] == pytest.approx([scores.mean(), half], abs=0.15)


def test_runs_of_other_lengths_are_rows_of_their_own_and_the_longest_are_in_the_overview():
    means = {}
    for folder in ("hopper-medium-expert", "medium-expert-50k"):
        rows = list(csv.DictReader((ROOT / "benchmarks/results" / folder / "results.csv").open()))
        cell = "td3_bc", "zoo/hopper/medium-expert-v0"
        own = [row for row in rows if (row["algorithm"], row["dataset_id"]) == cell]
        means[f"{int(own[0]['num_updates']):,}"] = np.mean([float(row["final_score"]) for row in own])
    made = tables.final_scores().split("zoo/hopper/medium-expert-v0:")[1].split("\nzoo/")[0]
    lines = [line.split("|") for line in made.splitlines() if line.startswith("| TD3+BC |")]
    assert {line[2].strip(): line[3].split()[0] for line in lines} == {key: f"{means[key]:.1f}" for key in means}
    (line,) = (line for line in tables.overview().splitlines() if line.startswith("| TD3+BC |"))
    assert line.split("|")[4].split()[0] == f"{means['100,000']:.1f}"


@pytest.mark.parametrize("row", PEERS, ids=lambda row: " ".join(row[:3]))
def test_the_peer_stands_beside_ours_as_measured(row):
    dataset_id, label, updates, theirs, ours = row
    number, script = int(updates.replace(",", "")), script_of(label)
    assert theirs in after(number, dataset_id, f"d3rlpy {script}")
    assert ours in after(number, dataset_id, script)


def test_the_tables_were_found():
    assert len(ROWS) > 20 and {script_of(label) for _, label, *_ in PEERS} == {"td3_bc", "iql", "cql", "bcq"}


SPEEDS = {  # the files behind the tables of speed, in their order, and the modes of a table's columns
    "throughput.csv": ("eager", "compile", "d3rlpy"),
    "throughput-avx2.csv": ("eager", "compile"),
    "throughput-amx.csv": ("eager", "compile", "compile bf16"),
    "throughput-one-core.csv": ("eager", "compile", "compile bf16"),
}
PARTS = {"MOPO, its model": "mopo:dynamics", "MOPO, 50,000 rollouts of 5 steps": "mopo:rollout"}


@pytest.mark.parametrize("name", SPEEDS)
def test_the_tables_of_speed_say_what_was_measured(name):
    """Updates per second of each mode, the bound, and each mode's ratio to it."""
    measured = defaultdict(dict)
    with (ROOT / "benchmarks" / "results" / name).open() as file:
        for row in csv.DictReader(file):
            measured[row["algorithm"]][row["mode"]] = row
    tables = re.findall(r"\| algorithm \| updates per second.*\n\|[-|]+\n((?:\|.*\n)+)", RESULTS)
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in tables[list(SPEEDS).index(name)].splitlines()]
    for label, *cells in rows:
        modes = measured[PARTS.get(label) or script_of(label)]
        speeds = [modes[mode]["updates_per_second"] if mode in modes else "" for mode in SPEEDS[name]]
        ratios = [f"{float(modes[mode]['ratio']):.2f}" if mode in modes else "" for mode in SPEEDS[name]]
        assert cells == [*speeds, modes["eager"]["bound_updates_per_second"], *ratios], label
    assert len(rows) == len(measured)


BESIDE_JAX = {"TD3+BC": "td3_bc", "IQL": "iql", "CQL, one action of each kind": "cql --num-samples 1"}
BESIDE_JAX["COMBO, `--regularizer logsumexp`, likewise"] = "combo --regularizer logsumexp --num-samples 1"


@pytest.mark.parametrize(("number", "name"), [(0, "throughput-jax.csv"), (1, "throughput-jax-amx.csv")])
def test_the_tables_beside_jax_say_what_was_measured(number, name):
    """Updates per second with one thread and with two, and how many times JAX's they are with --compile."""
    with (ROOT / "benchmarks" / "results" / name).open() as file:
        speeds = {
            (row["algorithm"], row["mode"], row["threads"]): row["updates_per_second"] for row in csv.DictReader(file)
        }
    table = re.findall(r"\| algorithm \| eager \| `--compile` \| JAX .*\n\|[-|]+\n((?:\|.*\n)+)", RESULTS)[number]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()]
    for label, *cells in rows:
        pairs = [[speeds[BESIDE_JAX[label], mode, n] for n in "12"] for mode in ("eager", "compile", "jax")]
        ratios = [f"{float(ours) / float(theirs):.2f}" for ours, theirs in zip(*pairs[1:], strict=True)]
        assert cells == [", ".join(pair) for pair in [*pairs, ratios]], label
    assert 6 * len(rows) == len(speeds)


@pytest.mark.parametrize("label", ["`mbpo`", "`mbpo --real-ratio 1`, without the model", "`sac`"])
def test_the_guide_has_the_steps_that_the_pendulums_took(label):
    cells = [label]
    for name, enough in (("pendulum-steps.csv", -200), ("inverted-pendulum.csv", 950)):
        with (ROOT / "benchmarks" / "results" / name).open() as file:
            rows = [row for row in csv.DictReader(file) if row["algorithm"] == label.split("`")[1]]
        good = [(row["seed"], int(row["steps"])) for row in rows if float(row["return_mean"]) > enough]
        cells.append(", ".join(f"{min(count for own, count in good if own == seed):,}" for seed in "012"))
    assert f"| {' | '.join(cells)} |" in GUIDE


def test_the_guide_has_what_rollouts_gave_naf():
    runs = pd.read_csv(ROOT / "benchmarks" / "results" / "pendulum-naf.csv", keep_default_na=False)
    final = runs[runs["step"] == "final"]
    table = GUIDE[GUIDE.index("| updates, then steps online") :].split("\n\n")[0].splitlines()
    heads = ["none", "0.5", "0.5 until 4,000", "0.83"]
    count = 0
    for line, (updates, steps) in zip(table[2:], [(4000, 0), (8000, 0), (4000, 4000)], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")][1:]
        for head, cell in zip(heads, cells, strict=True):
            same = (final["rollouts"] == head) & (final["num_updates"] == updates) & (final["online_steps"] == steps)
            found = ", ".join(f"{float(score):.0f}" for score in final[same]["score"])
            assert found == cell.removeprefix("the same")
            count += bool(found)
    assert 3 * count == len(final)
    online = runs[(runs["step"] != "final") & (runs["online_steps"] > 0) & (runs["score"] > 95)].astype({"step": int})
    for head, label in zip(heads, ["no rollouts", "ratio 0.5", "0.5 until the switch"], strict=False):
        first = online[online["rollouts"] == head].groupby("seed")["step"].min() - 4000
        assert f"{', '.join(f'{steps:,}' for steps in first.clip(lower=0))} |\n" in GUIDE[GUIDE.index(f"| {label}") :]


def test_the_guide_has_the_scores_of_the_model_based_scripts_beside_offlinerlkits():
    """Mean and seeds of each cell, the average of the data, and what is said of all: noise, and below the data."""
    found = [pd.read_csv(ROOT / "benchmarks" / "results" / name / "results.csv") for name in MODEL_BASED]
    runs = pd.concat(found).set_index(["dataset_id", "algorithm"])
    table = GUIDE[GUIDE.index("| | data | `mopo` | the kit's |") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    columns = ["mopo", "OfflineRL-Kit mopo", "combo", "OfflineRL-Kit combo", "morel", "mobile"]
    for task, average, *cells in rows:
        scores = [sorted(runs.loc[(f"zoo/{task}-v0", f"{name} --tau 0.02"), "final_score"]) for name in columns]
        assert cells == [f"{np.mean(three):.1f} [{', '.join(f'{x:.1f}' for x in three)}]" for three in scores]
        data = runs.loc[f"zoo/{task}-v0", "dataset_score"].max()
        assert average == f"{data:.0f}" and all(len(three) == 3 and np.mean(three) < data for three in scores)
        for ours, theirs in (scores[:2], scores[2:4]):
            assert stats.ttest_ind(ours, theirs, equal_var=False).pvalue > 0.05
    assert len(rows) == runs.index.get_level_values(0).nunique()
