"""The report's statistics against hand calculations, its refusals, and its page in a browser."""

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


def test_the_interquartile_mean_is_that_of_the_middle_half_of_all_runs():
    first, second = np.array([1.0, 100.0, 3.0, 4.0]), np.array([2.0, 5.0, -50.0, 6.0])
    assert report.iqm(first, second, axis=-1) == (2 + 3 + 4 + 5) / 4  # of -50 1 | 2 3 4 5 | 6 100


def test_the_interquartile_mean_weighs_datasets_the_same():
    """Four seeds beside two: each of the two counts twice, in the estimate and in each of the bootstrap's draws."""
    four, two = np.array([1.0, 2.0, 3.0, 4.0]), np.array([10.0, 20.0])
    estimate, low, high = report.bootstrap([four, two], report.iqm)
    assert estimate == (3 + 4 + 10 + 10) / 4  # of 1 2 | 3 4 10 10 | 20 20
    draws = itertools.product(itertools.product(four, repeat=4), itertools.product(two, repeat=2))
    means = [np.mean(sorted([*of_four, *of_two, *of_two])[2:6]) for of_four, of_two in draws]  # all 1024
    np.testing.assert_allclose([low, high], np.percentile(means, [2.5, 97.5]), atol=0.26)  # steps of the draws: 0.25


def test_improvement_counts_pairs_within_each_dataset():
    x, y = [np.array([1.0, 3.0]), np.array([0.0, 0.0])], [np.array([2.0, 2.0, 0.0]), np.array([0.0, 1.0, 1.0])]
    first = (0 + 0 + 1 + 1 + 1 + 1) / 6
    second = (0.5 + 0 + 0 + 0.5 + 0 + 0) / 6
    assert report.improvement(*x, *y, axis=-1) == pytest.approx((first + second) / 2)


def test_the_interval_is_the_percentile_bootstrap_of_the_mean():
    values = np.array([3.0, 8.0, 1.0, 9.0, 4.0])
    estimate, low, high = report.bootstrap([values], np.mean)
    draws = np.array(list(itertools.product(values, repeat=5))).mean(axis=1)  # every way to draw, 3125
    assert estimate == 5
    np.testing.assert_allclose([low, high], np.percentile(draws, [2.5, 97.5]), atol=0.21)  # steps of the draws: 0.2
    assert np.isnan(report.bootstrap([values[:1]], np.mean)[1:]).all()  # one seed has none


def test_every_interval_lies_inside_the_picture(tmp_path):
    bars = report.summary(read(tmp_path, noisy("x", 30) | noisy("y", 90))[1], "").axes[0]
    low, high = bars.get_xlim()
    assert len(bars.patches) == 2
    assert all(low < bar.get_x() and bar.get_x() + bar.get_width() < high for bar in bars.patches)


def test_datasets_are_drawn_each_by_itself():
    """Two datasets far from each other: drawn together, the mean of the two would swing by tens."""
    tasks = [np.array([0.0, 1.0, 2.0]), np.array([100.0, 101.0, 102.0])]
    estimate, low, high = report.bootstrap(tasks, lambda *x, axis: np.concatenate(x, axis=axis).mean(axis=axis))
    assert estimate == 51 and 50 <= low < 50.5 and 51.5 < high <= 52


def test_the_overview_has_a_column_for_each_dataset(tmp_path):
    """And leaves a cell empty where an algorithm was not run."""
    runs = {("x", "a", 0): [0, 2, 4], ("x", "b", 0): [5, 5, 5], ("y", "a", 0): [1, 1, 1], ("y", "a", 1): [3, 3, 3]}
    table = report.overview(read(tmp_path, runs)[1])
    assert list(table.columns) == ["algorithm", "a", "b"]
    assert table.to_numpy().tolist() == [["x", "2.0", "5.0"], ["y", "2.0 (1.0 to 3.0)", ""]]


def test_a_profile_weighs_datasets_the_same(tmp_path):
    """Of two seeds on a one is above 50, of three on b none: a quarter, not one of five."""
    _, runs = read(tmp_path, final("x", "a", [40, 60]) | final("x", "b", [10, 20, 30]))
    (line,) = report.summary(runs, "").axes[1].lines
    above = dict(zip(*line.get_data(), strict=True))
    assert {x: round(share, 6) for x, share in above.items()} == {
        7.5: 1, 10: round(5 / 6, 6), 20: round(4 / 6, 6), 30: 0.5, 40: 0.25, 60: 0
    }  # fmt: skip


def test_a_curve_is_the_mean_of_the_seeds_and_their_interval_at_each_evaluation(tmp_path):
    rows, _ = read(tmp_path, {("x", "a", 0): [0, 5, 7], ("x", "a", 1): [1, 6, 8], ("x", "a", 2): [5, 10, 90]})
    (axes,) = report.curves(rows).axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[1, 2], [2, 7], [3, 35]])
    band = axes.collections[0].get_paths()[0].vertices
    for step, low, high in ((1, 0, 5), (2, 5, 10), (3, 7, 90)):  # of three seeds: their range
        assert (band[band[:, 0] == step][:, 1].min(), band[band[:, 0] == step][:, 1].max()) == (low, high)


# --- What it says about the runs ---


def test_a_table_with_gaps_has_no_summary_and_says_why(tmp_path):
    path = write(tmp_path / "e.csv", noisy("x", 1) | noisy("y<", 2) | noisy("z", 3, datasets=("b",)))
    run = run_script("report", path, "--out", str(tmp_path / "out"))
    note = r"- IQM, P\(X > Y\) and profiles need each algorithm on each dataset; missing: z on a\n"
    assert re.search(note, run.stdout) and re.search(note, (tmp_path / "out" / "report.md").read_text())
    assert "IQM of" not in run.stdout and not (tmp_path / "out" / "summary.png").exists()
    assert "missing: z on a</li>" in (tmp_path / "out" / "report.html").read_text()


def test_one_dataset_is_compared_too(tmp_path):
    path = write(tmp_path / "e.csv", final("x", "a", [1, 2, 3]) | final("y", "a", [0, 2, 4]))
    run = run_script("report", path, "--out", str(tmp_path / "out"))
    assert re.search(r"\| x \| 2.0 \(1.0 to 3.0\) \|  \| 50.0 \(\S+ to \S+\) % \|", run.stdout)
    assert (tmp_path / "out" / "summary.png").exists() and "missing" not in run.stdout


def test_notes_on_seeds(tmp_path):
    steps = range(6)
    few, unequal = "3 seeds: .*their range", "3 to 5 seeds: .*failed or diverged"
    for seeds, patterns in (((3, 3), [few]), ((5, 3), [few, unequal]), ((5, 5), [])):
        runs = noisy("x", 1, seeds[0], steps=6) | noisy("y", 1, seeds[1], steps=6)
        lines = report.notes(*read(tmp_path, runs, steps))
        assert len(lines) == len(patterns) and all(map(re.match, patterns, lines)), lines


def test_a_note_where_the_last_five_are_the_whole_run(tmp_path):
    for count, notes in ((5, ["five evaluations or fewer, so the last five are the whole run: a, b"]), (6, [])):
        assert report.notes(*read(tmp_path, noisy("x", 1, 5, steps=count), range(count))) == notes


def test_what_runs_are_compared_by_is_named(tmp_path, capsys):
    path = Path(write(tmp_path / "e.csv", {(name, key, 0): [9, 1] for name in "xy" for key in "ab"}, (1, 2)))
    for by, value in (("last", 1), ("best", 9), ("last five", 5)):
        report.main(report.Args((path,), by=by))
        text = capsys.readouterr().out
        assert f"### Side by side, by {by}\n" in text and f"### All runs, by {by}\n" in text
        assert f"| x | {value}.0 | {value}.0 |" in text and f"| x | {value}.0 |  | 50.0 % |" in text
    assert report.summary(read(tmp_path, noisy("x", 1))[1], "by best").get_suptitle() == "by best"


def test_returns_are_named_and_not_compared_over_datasets(tmp_path, capsys):
    cells = final("x", "raw", [-100] * 3) | final("x", "a", [80] * 3) | final("y", "a", [70] * 3)
    path = Path(write(tmp_path / "e.csv", cells))  # y is not missing on raw, either
    report.main(report.Args((path,)))
    text = capsys.readouterr().out
    assert "| algorithm | a | raw (return) |" in text and "| raw (return) | x | 3 |" in text
    assert "| algorithm | IQM of scores |" in text and "| x | 80.0 (80.0 to 80.0) |" in text
    assert "- no reference scores, so returns, which are not compared over datasets: raw\n" in text
    scores, returns = report.curves(report.read((path,))).axes
    assert scores.get_ylabel().startswith("score:") and returns.get_ylabel().startswith("return:")


def test_returns_on_one_dataset_are_compared(tmp_path):
    _, runs = read(tmp_path, final("x", "raw", [1, 2, 3]))
    left, middle, _ = report.summary(report.comparable(runs), "").axes
    assert left.get_xlabel().startswith("IQM of returns") and middle.get_xlabel() == "return x"
    assert report.over_datasets(runs).to_dict("records") == [{"algorithm": "x", "IQM of returns": "20.0 (10.0 to 30.0)",
                                                              "beats x": ""}]  # fmt: skip


def test_of_several_datasets_without_reference_scores_none_is_compared(tmp_path, capsys):
    for name in ("raw", "more"):
        text = Path(write(tmp_path / f"{name}.csv", final("x", "raw", [1, 2]))).read_text()
        (tmp_path / f"{name}.csv").write_text(text.replace("raw", name))
    report.main(report.Args((tmp_path / "raw.csv", tmp_path / "more.csv"), out=tmp_path / "out"))
    assert "IQM" not in capsys.readouterr().out and not (tmp_path / "out" / "summary.png").exists()


# --- What it compares ---


def test_unequal_protocols_are_refused_unless_told_to(tmp_path):
    one = write(tmp_path / "one" / "evaluations.csv", {("x", "a", 0): [1, 2, 3]})
    longer = write(tmp_path / "longer" / "evaluations.csv", {("y", "a", 0): [1, 2, 3, 4]}, range(1, 5))
    assert_one_line(run_script("report", one, longer), "a: unequal protocols .*3 updates.*4 updates.*--unequal")
    run = run_script("report", one, longer, "--unequal")
    assert run.returncode == 0 and "| a | y | 1 | 4 |" in run.stdout


def test_other_evaluations_are_unequal_too(tmp_path):
    paths = []
    for name, episodes in (("x", 10), ("y", 2)):
        paths.append(write(tmp_path / name / "evaluations.csv", {(name, "a", 0): [1, 2, 3]}))
        text = f"algorithm,dataset_id,seed,updates_per_second,wall_seconds,eval_episodes\n{name},a,0,5,9,{episodes}\n"
        (tmp_path / name / "results.csv").write_text(text)
    assert_one_line(run_script("report", *paths), "a: unequal protocols .*10 episodes.*2 episodes")


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
        (HEADER + 2 * "x,a,0,1,2,2\n", "x a 0 .*two rows of an update"),
    ],
)
def test_bad_input_is_one_line(content, message, tmp_path):
    if content is not None:
        (tmp_path / "evaluations.csv").write_text(content)
    assert_one_line(run_script("report", str(tmp_path)), message)


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
    assert row.count("100.0 (100.0 to 100.0) %") == 2  # it beats both on every dataset
    assert len(re.findall(r"\| a \| \w+ \| 3 \| 3 \| \S+ \(\S+ to \S+\)", text)) == 3


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


def test_without_pandas_one_line_says_what_to_install(tmp_path):
    (tmp_path / "pandas.py").write_text("raise ImportError")
    command = [sys.executable, "-m", "benchmarks.report", "runs/first"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert_one_line(run, r"pip install -e '\.\[report\]'")
