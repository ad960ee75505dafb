"""The report's statistics against hand calculations, its refusals, and its page in a browser."""

import itertools
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import report
from conftest import ROOT, assert_one_line, run_script
from matplotlib.image import imread

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HEADER = "algorithm,dataset_id,seed,num_updates,score,return_mean\n"


def write(path, runs, steps=(1, 2, 3)):
    """`runs`: (algorithm, dataset, seed) to the scores of its evaluations; a return is ten times the score."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        f"{algorithm},{dataset},{seed},{step},{score},{10 * score}\n"
        for (algorithm, dataset, seed), scores in runs.items()
        for step, score in zip(steps, scores, strict=True)
    ]
    path.write_text(HEADER + "".join(rows))
    return str(path)


def noisy(algorithm, mean, seeds=3, datasets=("a", "b"), steps=3):
    rng = np.random.default_rng(len(algorithm))
    cells = itertools.product([algorithm], datasets, range(seeds))
    return {cell: np.round(mean + 5 * rng.normal(size=steps), 2) for cell in cells}


# --- Statistics ---


def test_measures_are_the_last_the_mean_of_the_last_five_and_the_best(tmp_path):
    write(tmp_path / "evaluations.csv", {("x", "a", 0): [9, 0, 1, 2, 3, 4]}, range(6))
    (row,) = report.measures(report.read((tmp_path / "evaluations.csv",))).to_dict("records")
    assert (row["last"], row["last five"], row["best"]) == (4, 2, 9)


def test_a_return_stands_for_a_score_that_is_missing(tmp_path):
    (tmp_path / "e.csv").write_text(HEADER + "x,a,0,1,,-7\n")
    assert report.read((tmp_path / "e.csv",))["value"].tolist() == [-7]


def test_the_interquartile_mean_is_that_of_the_middle_half_of_all_runs():
    first, second = np.array([1.0, 100.0, 3.0, 4.0]), np.array([2.0, 5.0, -50.0, 6.0])
    assert report.iqm(first, second, axis=-1) == (2 + 3 + 4 + 5) / 4  # of -50 1 | 2 3 4 5 | 6 100


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
    write(tmp_path / "e.csv", noisy("x", 30) | noisy("y", 90))
    bars = report.summary(report.measures(report.read((tmp_path / "e.csv",)))).axes[0]
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
    write(tmp_path / "evaluations.csv", runs)
    table = report.overview(report.measures(report.read((tmp_path / "evaluations.csv",))))
    assert list(table.columns) == ["algorithm", "a", "b"]
    assert table.to_numpy().tolist() == [["x", "2.0", "5.0"], ["y", "2.0 (1.0 to 3.0)", ""]]


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


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no .*evaluations.csv"), ("a,b\n1,2\n", "lacks the column algorithm"), (HEADER, "no evaluation"), ("", "")],
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
