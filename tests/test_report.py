"""What the report says of runs, those that failed among them, its refusals, and its page in a browser."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import report
from conftest import ROOT, assert_one_line, run_script
from matplotlib.image import imread
from scipy import stats

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HEADER = "algorithm,dataset_id,seed,num_updates,score,return_mean\n"


def write(path, runs, steps=(1, 2, 3)):
    """`runs`: (algorithm, dataset, seed) to the scores of its evaluations; a return is ten times the score, and all
    that is known on the dataset "raw".
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        f"{algorithm},{dataset},{seed},{step},{'' if dataset == 'raw' else score},{10 * score}\n"
        for (algorithm, dataset, seed), scores in runs.items()
        for step, score in zip(steps, scores, strict=True)
    ]
    path.write_text(HEADER + "".join(rows))
    return str(path)


def read(tmp_path, runs, steps=(1, 2, 3), by="last five"):
    """The evaluations, and the runs."""
    rows = report.read((Path(write(tmp_path / "evaluations.csv", runs, steps)),))
    return rows, report.measures(rows, by)


def final(algorithm, dataset, scores):
    """Runs of three evaluations that all score the same, a seed for each score."""
    return {(algorithm, dataset, seed): [score] * 3 for seed, score in enumerate(scores)}


def noisy(algorithm, mean, seeds=3, datasets=("a", "b"), steps=3):
    rng = np.random.default_rng(len(algorithm))
    cells = itertools.product([algorithm], datasets, range(seeds))
    return {cell: np.round(mean + 5 * rng.normal(size=steps), 2) for cell in cells}


# --- Statistics ---


def test_measures_are_the_last_the_mean_of_the_last_five_and_the_best(tmp_path):
    for by, value in (("last", 4), ("last five", 2), ("best", 9)):
        (row,) = read(tmp_path, {("x", "a", 0): [9, 0, 1, 2, 3, 4]}, range(6), by)[1].to_dict("records")
        assert (row["last"], row["last five"], row["best"]) == (4, 2, 9)
        assert row["value"] == value


def test_returns_stand_for_scores_where_one_of_the_dataset_is_missing(tmp_path):
    (tmp_path / "e.csv").write_text(HEADER + "x,a,0,1,,-7\nx,a,1,1,50,-8\nx,b,0,1,60,-9\n")
    rows = report.read((tmp_path / "e.csv",))
    assert rows["value"].tolist() == [-7, -8, 60]
    assert rows["unit"].tolist() == ["return", "return", "score"]


def test_every_interval_lies_inside_the_picture(tmp_path):
    bars = report.summary(read(tmp_path, noisy("x", 30, 5) | noisy("y", 90, 5))[1], "").axes[0]
    low, high = bars.get_xlim()
    assert len(bars.patches) == 2
    assert all(low < bar.get_x() and bar.get_x() + bar.get_width() < high for bar in bars.patches)


def test_the_overview_has_a_column_for_each_dataset(tmp_path):
    """And leaves a cell empty where an algorithm was not run."""
    runs = final("x", "a", [2, 4]) | final("x", "b", [5]) | final("y", "a", [3, 1])
    table = report.overview(read(tmp_path, runs)[1])
    assert list(table.columns) == ["algorithm", "a", "b"]
    assert table.to_numpy().tolist() == [["x", "3.0 [2.0, 4.0]", "5.0"], ["y", "2.0 [1.0, 3.0]", ""]]


def test_from_five_seeds_on_a_mean_has_students_interval(tmp_path):
    for seeds, ending in ((4, r"\[40\.0, .*60\.0\]"), (5, r"\((\S+) to (\S+)\)")):
        values = np.linspace(60, 40, seeds)
        (row,) = report.overview(read(tmp_path, final("x", "a", values))[1]).to_dict("records")
        found = re.fullmatch(rf"50\.0 {ending}", row["a"])
        assert found, row
    expected = stats.t.interval(0.95, 4, 50, stats.sem(values))
    np.testing.assert_allclose([float(end) for end in found.groups()], expected, atol=0.4)


def test_over_datasets_each_seed_stands_by_itself_too(tmp_path):
    """Where there are four runs an interquartile mean as well, here of 0 | 10 10 | 30; of three it is the mean."""
    runs = final("x", "a", [0, 10]) | final("x", "b", [10, 30])
    (line,) = report.over_datasets(read(tmp_path, runs)[1]).to_dict("records")
    assert (line["runs"], line["mean of scores"], line["IQM of scores"]) == (4, "12.5 [5.0, 20.0]", "10.0 [5.0, 20.0]")
    assert "IQM of scores" not in report.over_datasets(read(tmp_path, final("x", "a", [1, 2, 4]))[1])
    three = final("x", "a", [10]) | final("x", "b", [0, 100])  # though the one counts as much as the two
    assert "IQM of scores" not in report.over_datasets(read(tmp_path, three)[1])


def test_seeds_that_do_not_go_together_have_no_means_over_datasets(tmp_path):
    (line,) = report.over_datasets(read(tmp_path, final("x", "a", [0, 10]) | final("x", "b", [7]))[1]).to_dict(
        "records"
    )
    assert line["mean of scores"] == "6.0"


def test_a_profile_weighs_datasets_the_same(tmp_path):
    """Of two seeds on a one is above 50, of three on b none: a quarter, not one of five."""
    _, runs = read(tmp_path, final("x", "a", [40, 60]) | final("x", "b", [10, 20, 30]))
    axes = report.summary(runs, "").axes[1]
    (line,) = axes.lines
    above = dict(zip(*line.get_data(), strict=True))
    assert {x: round(share, 6) for x, share in above.items()} == {
        7.5: 1, 10: round(5 / 6, 6), 20: round(4 / 6, 6), 30: 0.5, 40: 0.25, 60: 0
    }  # fmt: skip
    (band,) = axes.collections
    assert band.get_paths()[0].get_extents().intervaly.tolist() == pytest.approx([0, 1])
    assert "95 % bands" in axes.get_title() and line.get_drawstyle() == "steps-post"  # above x, up to the next
    mean_or_iqm = report.summary(runs, "").axes[0].lines[0].get_xdata()
    assert mean_or_iqm == pytest.approx([(20 + 30 + 30 + 40 + 40 + 40) / 6] * 2)  # 10 10 20 | ... | 60 60 60


def test_the_picture_says_how_often_the_row_beats_the_column(tmp_path):
    _, runs = read(tmp_path, final("x", "a", [10, 20, 30]) | final("y", "a", [1, 2, 15]))
    axes = report.summary(runs, "").axes[2]
    found = {text.get_position(): text.get_text().split("\n")[0] for text in axes.texts}
    assert found == {(1, 0): "89", (0, 1): "11"}  # x, the first row, beats y in eight pairs of nine
    assert [label.get_text() for label in axes.get_yticklabels()] == ["x", "y"]
    np.testing.assert_allclose(axes.images[0].get_array().filled(np.nan), [[np.nan, 800 / 9], [100 / 9, np.nan]])


def test_a_curve_is_the_mean_of_the_seeds_and_their_range_at_each_evaluation(tmp_path):
    rows, _ = read(tmp_path, {("x", "a", 0): [0, 5, 7], ("x", "a", 1): [1, 6, 8], ("x", "a", 2): [5, 10, 90]})
    (axes,) = report.curves(rows).axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 2], [2, 7], [3, 35]])
    band = axes.collections[0].get_paths()[0].vertices
    for step, low, high in ((1, 0, 5), (2, 5, 10), (3, 7, 90)):  # of three seeds: their range
        assert (band[band[:, 0] == step][:, 1].min(), band[band[:, 0] == step][:, 1].max()) == (low, high)
    assert axes.get_ylabel() == "score: mean of seeds, range"


def test_from_five_seeds_on_a_curve_has_intervals(tmp_path):
    values = np.random.default_rng(0).normal(50, 10, (5, 3))
    rows, _ = read(tmp_path, {("x", "a", seed): scores for seed, scores in enumerate(values)})
    (axes,) = report.curves(rows).axes
    band = axes.collections[0].get_paths()[0].vertices
    for step, scores in enumerate(values.T, start=1):
        expected = stats.t.interval(0.95, 4, scores.mean(), stats.sem(scores))
        ends = band[band[:, 0] == step][:, 1]
        np.testing.assert_allclose([ends.min(), ends.max()], expected, atol=0.02 * np.ptp(expected))
    assert axes.get_ylabel() == "score: mean of seeds, 95 % interval"


# --- What it says about the runs ---


def test_a_table_with_gaps_has_no_summary_and_says_why(tmp_path):
    path = write(tmp_path / "e.csv", noisy("x", 1) | noisy("y<", 2) | noisy("z", 3, datasets=("b",)))
    run = run_script("report", path, "--out", str(tmp_path / "out"))
    note = "- means over datasets, who beats whom and profiles need each algorithm on each; missing: z on a\n"
    assert re.search(note, run.stdout) and re.search(note, (tmp_path / "out" / "report.md").read_text())
    assert "mean of scores" not in run.stdout and not (tmp_path / "out" / "summary.png").exists()
    assert "missing: z on a</li>" in (tmp_path / "out" / "report.html").read_text()


def test_one_dataset_is_compared_too(tmp_path):
    path = write(tmp_path / "e.csv", final("x", "a", [1, 2, 3]) | final("y", "a", [0, 2, 4]))
    run = run_script("report", path, "--out", str(tmp_path / "out"))
    assert re.search(r"\| x \| 3 \| 0 \| 2.0 \[1.0, 2.0, 3.0\] \|  \| 50 \(\d+ to \d+\) % \|", run.stdout)
    assert (tmp_path / "out" / "summary.png").exists() and "missing" not in run.stdout


def test_notes_on_seeds(tmp_path):
    steps = range(6)
    few, unequal, some = "3 seeds: .*no interval", "3 to 5 seeds: .*less sure", "5 seeds: .* 83 %"
    for seeds, patterns in (((3, 3), [few]), ((5, 3), [few, unequal]), ((5, 5), [some]), ((10, 10), [])):
        runs = noisy("x", 1, seeds[0], steps=6) | noisy("y", 1, seeds[1], steps=6)
        rows = report.read((Path(write(tmp_path / "e.csv", runs, steps)),), unequal=True)
        lines = report.notes(rows, report.measures(rows))
        assert len(lines) == len(patterns) and all(map(re.match, patterns, lines)), lines


def test_a_note_where_the_last_five_are_the_whole_run(tmp_path):
    for count, notes in ((5, ["five evaluations or fewer, so the last five are the whole run: a, b"]), (6, [])):
        assert report.notes(*read(tmp_path, noisy("x", 1, 10, steps=count), range(count))) == notes


def test_what_runs_are_compared_by_is_named(tmp_path, capsys):
    path = Path(write(tmp_path / "e.csv", {(name, key, 0): [9, 1] for name in "xy" for key in "ab"}, (1, 2)))
    for by, value in (("last", 1), ("best", 9), ("last five", 5)):
        report.main(report.Args((path,), by=by))
        text = capsys.readouterr().out
        assert f"### Side by side, by {by}\n" in text and f"### All runs, by {by}\n" in text
        assert f"| x | {value}.0 | {value}.0 |" in text and f"| x | 2 | 0 | {value}.0 |  | 50 (" in text
    assert report.summary(read(tmp_path, noisy("x", 1))[1], "by best").get_suptitle() == "by best"


def test_returns_are_named_and_not_compared_over_datasets(tmp_path, capsys):
    cells = final("x", "raw", [-100] * 3) | final("x", "a", [80] * 3) | final("y", "a", [70] * 3)
    path = Path(write(tmp_path / "e.csv", cells))  # y is not missing on raw, either
    report.main(report.Args((path,)))
    text = capsys.readouterr().out
    assert "| algorithm | a | raw (return) |" in text and "| raw (return) | x | 3 |" in text
    assert (
        "| algorithm | runs | failed | mean of scores |" in text and "| x | 3 | 0 | 80.0 [80.0, 80.0, 80.0] |" in text
    )
    assert "- no reference scores, so returns, which are not compared over datasets: raw\n" in text
    scores, returns = report.curves(report.read((path,))).axes
    assert scores.get_ylabel().startswith("score:") and returns.get_ylabel().startswith("return:")


def test_returns_on_one_dataset_are_compared(tmp_path):
    _, runs = read(tmp_path, final("x", "raw", [1, 2, 3]))
    left, middle, _ = report.summary(report.comparable(runs), "").axes
    assert left.get_xlabel().startswith("mean of returns, no interval") and middle.get_xlabel() == "return x"
    (line,) = report.over_datasets(runs).to_dict("records")
    assert line["mean of returns"] == "20.0 [10.0, 20.0, 30.0]"


def test_of_several_datasets_without_reference_scores_none_is_compared(tmp_path, capsys):
    for name in ("raw", "more"):
        text = Path(write(tmp_path / f"{name}.csv", final("x", "raw", [1, 2]))).read_text()
        (tmp_path / f"{name}.csv").write_text(text.replace("raw", name))
    report.main(report.Args((tmp_path / "raw.csv", tmp_path / "more.csv"), out=tmp_path / "out"))
    assert "mean of" not in capsys.readouterr().out and not (tmp_path / "out" / "summary.png").exists()


# --- Runs that failed ---

NOTHING = (
    r"no run was evaluated \(no environment, or none ended well\): benchmarks\.select compares policies by the data"
)
RESULTS = "algorithm,dataset_id,seed,eval_episodes,problem,final_returns,final_score,final_return_mean,num_updates\n"


def grid(folder, runs, results, steps=(1, 2, 3)):
    """A folder as benchmarks/run.py leaves it. `results`: rows of results.csv, without the dataset, which is "a". One
    of a run that failed has no number of updates.
    """
    write(folder / "evaluations.csv", runs, steps)
    lines = []
    for row in results:
        name, rest = row.split(",", 1)
        lines.append(f"{name},a,{rest},{'' if rest.split(',')[2] else 3}\n")
    (folder / "results.csv").write_text(RESULTS + "".join(lines))
    return folder


def failing(tmp_path):
    """y has scored 60 and, early, 20; one of x has scored 100, two failed."""
    runs = {("x", "a", 0): [100] * 3, **{("y", "a", seed): [20, 60, 60] for seed in range(3)}}
    results = [
        "x,0,1,,,,",
        "x,1,1,exit code 3: no | number,,,",
        "x,2,1,not finished,,,",
        *(f"y,{i},1,,,," for i in range(3)),
    ]
    return grid(tmp_path, runs, results)


def test_a_failed_run_counts_as_the_worst_and_stands_in_the_tables(tmp_path, capsys):
    """At most 0: 20, the lowest that anyone scored, would be more than what a run without a policy is worth."""
    report.main(report.Args((failing(tmp_path),), by="last", out=tmp_path / "out"))
    text = capsys.readouterr().out
    assert "| a | x | 3 | 2 | 3 | 33.3 [0.0, 0.0, 100.0] | 33.3 [0.0, 0.0, 100.0] |" in text
    assert "| a | y | 3 | 0 | 3 | 60.0 [60.0, 60.0, 60.0] |" in text
    assert re.search(r"\| x \| 3 \| 2 \| 33.3 \[0.0, 0.0, 100.0\] \|  \| 33 \(", text)  # it beats y in 3 of 9 pairs
    assert "- failed, counts as 0.0: x on a, seed 1: exit code 3: no | number\n" in text
    assert "- failed, counts as 0.0: x on a, seed 2: not finished\n" in text
    (axes,) = report.curves(report.read((tmp_path,))).axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [100 / 3] * 3)


def test_the_overview_says_what_failed(tmp_path):
    (x, y) = report.overview(report.measures(report.read((failing(tmp_path),))))["a"]
    assert x == "33.3 [0.0, 0.0, 100.0], 2 failed" and "failed" not in y


def test_a_failed_run_counts_as_the_user_says(tmp_path):
    run = run_script("report", str(failing(tmp_path)), "--failed-score", "-5")
    assert "| a | x | 3 | 2 | 3 | 30.0 [-5.0, -5.0, 100.0] |" in run.stdout
    assert_one_line(run_script("report", str(tmp_path), "--failed-score", "nan"), "--failed-score: must be finite")


@pytest.mark.parametrize("score", [None, 0])
def test_of_returns_the_lowest_evaluation_is_the_worst(tmp_path, score):
    folder = failing(tmp_path)
    for path in folder.iterdir():
        path.write_text(
            re.sub(r"\ba,(\d),(\d),\d+,", r"a,\1,\2,,", path.read_text()) if path.name[0] == "e" else path.read_text()
        )
    runs = report.measures(report.read((folder,), score))
    assert runs[runs["problem"] != ""]["last"].tolist() == [200, 200]  # ten times the score


def test_a_failed_run_is_not_above_the_final_score_of_one_that_ended_well(tmp_path):
    """A final of -120 in fresh episodes is below all evaluations on the way."""
    results = ['y,0,1,,"[-110, -130]",-12,-120', "x,0,1,exit code 3,,,"]
    grid(tmp_path, {("y", "a", 0): [-10] * 3}, results)
    runs = report.measures(report.read((tmp_path,)), "last")
    assert dict(zip(runs["algorithm"], runs["value"], strict=True)) == {"x": -12, "y": -12}


def test_a_failed_run_that_nothing_can_be_compared_with_is_named(tmp_path, capsys):
    """And a whole algorithm that failed is a row like any other."""
    runs = {("y", "a", 0): [50] * 3}
    grid(tmp_path, runs, ["y,0,1,,,,", "x,0,1,exit code 1,,,"])
    with (tmp_path / "results.csv").open("a") as file:
        file.write("y,b,0,1,exit code 2,,,\n")
    report.main(report.Args((tmp_path,)))
    text = capsys.readouterr().out
    assert "| a | x | 1 | 1 | 3 | 0.0 | 0.0 | 0.0 |" in text
    assert "- failed, nothing of the dataset to score it by: y on b, seed 0: exit code 2\n" in text


def test_a_folder_where_all_failed_counts_beside_others(tmp_path):
    all_failed = grid(tmp_path / "x", {}, ["x,0,1,exit code 3,,,"])
    good = grid(tmp_path / "y", {("y", "a", 0): [50] * 3}, ["y,0,1,,,,"])
    assert report.measures(report.read((all_failed, good)))["last"].tolist() == [0, 50]
    assert_one_line(run_script("report", str(all_failed)), f"nothing to report on: {NOTHING}")


def test_runs_without_an_environment_are_told_of(tmp_path, capsys):
    """Alone, beside one that failed, and beside runs that were evaluated, of the same grid and of another one."""
    unevaluated = ["x,0,1,,,,", "x,1,1,,,,", "y,0,1,,,,"]
    for rows in (unevaluated, [*unevaluated, "y,1,1,exit code 3,,,"]):
        assert_one_line(run_script("report", str(grid(tmp_path / "log", {}, rows))), f"report on: {NOTHING}")
    both = grid(tmp_path / "both", {("z", "a", 0): [50] * 3}, ["z,0,1,,,,"])
    report.main(report.Args((both,)))
    assert "not evaluated" not in capsys.readouterr().out
    with (both / "results.csv").open("a") as file:
        file.write("z,log,0,1,,,,,3\nz,log,1,1,,,,,3\nx,a,0,1,,,,,3\n")  # the last in both folders
    report.main(report.Args((both, tmp_path / "log")))
    text = capsys.readouterr().out
    note = r"- runs that ended well but were not evaluated .*benchmarks\.select .*: 3 on a, 2 on log\n"
    assert re.search(note, text) and "| a | z | 1 | 0 |" in text and "log | z" not in text


def test_a_run_that_failed_here_and_ended_well_there_is_refused(tmp_path):
    folders = [failing(tmp_path / "one"), grid(tmp_path / "two", {("x", "a", 1): [1] * 3}, ["x,1,1,,,,"])]
    assert_one_line(run_script("report", *map(str, folders)), "x a 1 is in more than one")


def test_without_a_plan_seeds_that_another_algorithm_has_are_missing(tmp_path):
    path = Path(write(tmp_path / "e.csv", final("x", "a", [10, 20]) | final("y", "a", [30]) | final("y", "b", [40])))
    runs = report.measures(report.read((path,)))
    found = [" ".join(map(str, run)) for run in runs[["algorithm", "dataset_id", "seed", "problem", "last"]].to_numpy()]
    assert found == ["x a 0  10.0", "x a 1  20.0", "y a 0  30.0", "y a 1 missing 0.0", "y b 0  40.0"]
    assert len(report.read((path,), unequal=True)) == 3 * 4  # nothing but what is there


# --- Final scores ---


def test_the_last_is_the_final_score_where_all_runs_have_one(tmp_path):
    """A score is a tenth of the return: the standard error of 100, 200, 300 and 400 is 129.1 / 2 / 10."""
    runs = {("x", "a", 0): [1, 2, 3], ("x", "a", 1): [5, 6, 7]}
    rows = ['x,0,1,,"[100.0, 200.0, 300.0, 400.0]",25,250', 'x,1,1,,"[100.0, 200.0, 300.0, 400.0]",25,250']
    table = report.read((grid(tmp_path, runs, [*rows, "x,2,1,exit code 3,,,"]),))
    assert report.measures(table)["last"].tolist() == [25, 25, 0]
    (line,) = report.per_dataset(table, report.measures(table)).to_dict("records")
    assert line["last"] == "16.7 [0.0, 25.0, 25.0]" and line["last five"] == "2.7 [0.0, 2.0, 6.0]"
    assert line["+- episodes"] == "6.5"
    table = report.read((grid(tmp_path, runs, [rows[0], "x,1,1,,,7,70"]),))
    assert report.measures(table)["last"].tolist() == [3, 7]
    (tmp_path / "results.csv").write_text(RESULTS + "x,a,0,1,,oh,25,250\n")
    assert_one_line(run_script("report", str(tmp_path)), "cannot read")


def test_the_error_of_final_scores_needs_no_evaluations_that_differ(tmp_path):
    """One of four episodes brought 80, whose score is 8: the standard error is 2 of a mean of 2."""
    runs = {("x", "a", 0): [0, 0, 0], ("x", "a", 1): [0, 0, 0]}
    folder = grid(tmp_path, runs, [f'x,{seed},1,,"[0.0, 0.0, 0.0, 80.0]",2,20' for seed in (0, 1)])
    table = report.read((folder,))
    assert report.per_dataset(table, report.measures(table))["+- episodes"].tolist() == ["2.0"]
    rows = ['x,0,1,,"[0.0, 0.0, 0.0, 80.0]",2,20', 'x,1,1,,"[0.0, 0.0, 0.0, 0.0]",0,0']
    table = report.read((grid(tmp_path, runs, rows),))  # of errors 2 and 0 the root of the mean square
    assert report.per_dataset(table, report.measures(table))["+- episodes"].tolist() == ["1.4"]


# --- What it compares ---


def test_unequal_protocols_are_refused_unless_told_to(tmp_path):
    one = write(tmp_path / "one" / "evaluations.csv", {("x", "a", 0): [1, 2, 3]})
    longer = write(tmp_path / "longer" / "evaluations.csv", {("y", "a", 0): [1, 2, 3, 4]}, range(1, 5))
    assert_one_line(run_script("report", one, longer), "a: unequal protocols .*3 updates.*4 updates.*--unequal")
    run = run_script("report", one, longer, "--unequal")
    assert run.returncode == 0 and "| a | y | 1 | 0 | 4 |" in run.stdout


def test_other_evaluations_are_unequal_too(tmp_path):
    paths = []
    for name, episodes in (("x", 10), ("y", 2)):
        paths.append(write(tmp_path / name / "evaluations.csv", {(name, "a", 0): [1, 2, 3]}))
        text = f"algorithm,dataset_id,seed,updates_per_second,wall_seconds,eval_episodes\n{name},a,0,5,9,{episodes}\n"
        (tmp_path / name / "results.csv").write_text(text)
    assert_one_line(run_script("report", *paths), "a: unequal protocols .*10 episodes.*2 episodes")


def test_an_environment_of_ones_own_is_not_the_datas(tmp_path):
    write(tmp_path / "evaluations.csv", {("x", "a", 0): [1, 2, 3], ("y", "a", 0): [1, 2, 3]})
    lines = ["algorithm,dataset_id,seed,env_id,problem", "x,a,0,,", "y,a,0,my_env:Light-v0,"]
    (tmp_path / "results.csv").write_text("\n".join(lines) + "\n")
    alone = write(tmp_path / "alone.csv", {("z", "a", 0): [1, 2, 3]})  # of which nothing is known
    (tmp_path / "results.csv").write_text("\n".join(lines[::2]) + "\n")
    write(tmp_path / "evaluations.csv", {("y", "a", 0): [1, 2, 3]})
    assert run_script("report", str(tmp_path), alone).returncode == 0
    write(tmp_path / "evaluations.csv", {("x", "a", 0): [1, 2, 3], ("y", "a", 0): [1, 2, 3]})
    (tmp_path / "results.csv").write_text("\n".join(lines) + "\n")
    line = "a: unequal protocols .*env_id as the data say.*env_id my_env:Light-v0"
    assert_one_line(run_script("report", str(tmp_path)), line)


def test_final_scores_of_other_numbers_of_episodes_are_unequal(tmp_path):
    runs = {("x", "a", 0): [1, 2, 3], ("y", "a", 0): [1, 2, 3]}
    folder = grid(tmp_path, runs, ['x,0,1,,"[10, 20]",1.5,15', 'y,0,1,,"[10, 20, 30]",2,20'])
    assert_one_line(run_script("report", str(folder)), "a: unequal protocols .*2 episodes.*3 episodes")


def test_a_final_score_of_one_episode_is_one(tmp_path):
    table = report.read((grid(tmp_path, {("x", "a", 0): [1, 2, 3]}, ["x,0,1,,[900],90,900"]),))
    runs = report.measures(table)
    assert runs["last"].tolist() == [90] and report.per_dataset(table, runs)["+- episodes"].tolist() == ["inf"]


def test_a_run_with_an_evaluation_that_is_no_number_has_failed(tmp_path):
    path = Path(write(tmp_path / "evaluations.csv", final("x", "a", [50, 40]) | final("y", "a", [10, 20])))
    path.write_text(path.read_text().replace("x,a,1,3,40,400", "x,a,1,3,nan,nan"))
    runs = report.measures(report.read((path,)))
    assert runs["value"].tolist() == [50, 0, 10, 20] and runs["unit"].unique().tolist() == ["score"]
    assert runs["problem"].tolist() == ["", "a return is not finite", "", ""]


@pytest.mark.parametrize("column", ["dataset_fingerprint", "env_id"])
def test_other_data_under_the_same_id_are_unequal(column, tmp_path):
    write(tmp_path / "evaluations.csv", {("x", "a", 0): [1, 2, 3], ("x", "a", 1): [1, 2, 3]})
    lines = [f"algorithm,dataset_id,seed,{column},problem", "x,a,0,12,", "x,a,1,ab,"]
    (tmp_path / "results.csv").write_text("\n".join(lines) + "\n")
    assert_one_line(run_script("report", str(tmp_path)), f"a: unequal protocols .*{column} 12.*{column} ab")


def test_a_file_that_does_not_tell_its_episodes_is_not_unequal(tmp_path):
    folder, alone = tmp_path / "folder", tmp_path / "alone.csv"
    write(folder / "evaluations.csv", final("x", "a", [1]))
    (folder / "results.csv").write_text("algorithm,dataset_id,seed,eval_episodes\nx,a,0,10\n")
    write(alone, final("y", "a", [2]))
    rows = report.read((folder, alone))
    assert rows["eval_episodes"].fillna(0).tolist() == [10, 10, 10, 0, 0, 0]
    report.check_equal(rows)


def test_other_steps_are_unequal_and_the_curve_is_of_those_that_seeds_share(tmp_path):
    paths = [
        write(tmp_path / str(seed) / "evaluations.csv", {("x", "a", seed): scores}, steps)
        for seed, scores, steps in ((0, [1, 2, 3], (1, 2, 4)), (1, [3, 4, 5], (1, 3, 4)))
    ]
    message = r"a: unequal protocols \(x 0: 4 updates, evaluated at 1, 2, 4; x 1: 4 updates, evaluated at 1, 3, 4\)"
    assert_one_line(run_script("report", *paths), message)
    (axes,) = report.curves(report.read(tuple(map(Path, paths)))).axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 2], [4, 4]])


def test_of_seeds_that_share_no_step_the_points_are_drawn(tmp_path):
    paths = [
        write(tmp_path / str(seed) / "evaluations.csv", {("x", "a", seed): scores}, steps)
        for seed, scores, steps in ((0, [1, 2], (1, 3)), (1, [3, 4], (2, 4)))
    ]
    run = run_script("report", *paths, "--unequal", "--out", str(tmp_path / "out"))
    assert run.returncode == 0, run.stderr
    (axes,) = report.curves(report.read(tuple(map(Path, paths)))).axes
    points = np.concatenate([line.get_xydata() for line in axes.lines])
    assert sorted(map(tuple, points[~np.isnan(points[:, 1])])) == [(1, 1), (2, 3), (3, 2), (4, 4)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no .*evaluations.csv"),
        ("a,b\n1,2\n", "lacks the column algorithm"),
        (HEADER, "no evaluation"),
        ("", "cannot read"),
        (HEADER + "x,a,0,1,high,2\n", "cannot read .*high"),
        (HEADER + "x,a,inf,1,1,2\n", "cannot read .*evaluations.csv"),
        (HEADER + f"x,a,{9**30},1,1,2\n", "cannot read .*evaluations.csv"),
        (HEADER + "x\0,a\n", "cannot read|lacks|no evaluation"),
        (HEADER + 2 * "x,a,0,1,2,2\n", "x a 0 .*two rows of an update"),
    ],
)
def test_bad_input_is_one_line(content, message, tmp_path):
    if content is not None:
        (tmp_path / "evaluations.csv").write_text(content)
    assert_one_line(run_script("report", str(tmp_path)), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("dataset_id,seed\na,0\n", "results.csv: lacks the column algorithm"),
        ("", "cannot read .*results.csv"),
        ("algorithm,dataset_id,seed,wall_seconds\nx,a,0,long\n", "cannot read .*results.csv: .*long"),
        ("algorithm,dataset_id,seed,eval_episodes\nx,a,0,many\n", "cannot read .*results.csv: .*many"),
        ("algorithm,dataset_id,seed,final_score\nx,a,0,high\n", "cannot read .*results.csv: .*high"),
        (f"algorithm,dataset_id,seed\nx,a,{9**30}\n", "cannot read .*results.csv"),
        ('algorithm,dataset_id,seed,final_returns\nx,a,0,"[1, []]"\n', "cannot read .*results.csv"),
    ],
)
def test_damaged_results_are_one_line(content, message, tmp_path):
    write(tmp_path / "evaluations.csv", {("x", "a", 0): [1, 2, 3]})
    (tmp_path / "results.csv").write_text(content)
    assert_one_line(run_script("report", str(tmp_path)), message)


def test_a_name_is_no_formula(tmp_path):
    """Matplotlib would read what is between two dollars as one, and end with a traceback where it is none."""
    path = write(tmp_path / "e.csv", {("x $a_{$", "b_$_{$", 0): [1, 2, 3]})
    run = run_script("report", path, "--out", str(tmp_path / "out"))
    assert run.returncode == 0 and (tmp_path / "out" / "summary.png").exists(), run.stderr


def test_a_run_in_two_files_is_refused(tmp_path):
    paths = [write(tmp_path / name / "evaluations.csv", {("x", "a", 0): [1, 2, 3]}) for name in ("one", "two")]
    assert_one_line(run_script("report", *paths), "x a 0 is in more than one")
    assert_one_line(run_script("report"), "nothing to report on")


# --- What it writes ---


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    runs = noisy("good", 80) | noisy("bad", 20) | noisy("middling", 50)
    path = write(folder / "evaluations.csv", runs)
    run = run_script("report", path, "--out", str(folder / "report"))
    assert run.returncode == 0, run.stderr
    (folder / "report" / "stdout").write_text(run.stdout)
    return folder / "report"


def test_the_tables(out):
    text = (out / "report.md").read_text()
    assert text == (out / "stdout").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| good |") and "%" in line)
    assert len(re.findall(r"\b100 \([56]\d to 100\) %", row)) == 2  # it beats both on every dataset, by six against six
    assert len(re.findall(r"\| a \| \w+ \| 3 \| 0 \| 3 \| \S+ \[\S+, \S+, \S+\]", text)) == 3


def test_the_page_needs_no_other_file_and_no_network(out):
    page = (out / "report.html").read_text()
    sources = re.findall(r"(?:src|href)\s*=\s*\"([^\"]*)\"", page)
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<script" not in page and "@import" not in page and "url(" not in page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_opens_in_a_browser(out, tmp_path):
    """Both pictures and both tables are to be seen in a screenshot."""
    shutil.copy(out / "report.html", tmp_path)  # alone
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,2000", "--hide-scrollbars"]
    command += [f"--screenshot={tmp_path / 'page.png'}", f"file://{tmp_path / 'report.html'}"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    pixels = imread(tmp_path / "page.png")[:, :, :3]
    assert pixels.shape[1] == 1400
    lines = (pixels < 0.99).any(axis=2).mean(axis=1)  # how much of each row of pixels is drawn on
    assert lines[:1200].max() > 0.5 and (lines > 0).mean() > 0.4
    colours = {tuple(colour) for colour in (pixels[::2, ::2].reshape(-1, 3) * 255).astype(int)}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours  # the curves' blue, orange and green


@pytest.mark.parametrize("tool", ["report", "select"])
def test_without_pandas_one_line_says_what_to_install(tool, tmp_path):
    (tmp_path / "pandas.py").write_text("raise ImportError")
    command = [sys.executable, "-m", f"benchmarks.{tool}", "runs/first"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert_one_line(run, r"pip install -e '\.\[report\]'")
