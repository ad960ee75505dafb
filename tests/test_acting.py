"""The table of benchmarks.measurements.online: what each number is made of, by runs that are written by hand."""

import csv
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, assert_one_line, run_script

from benchmarks.measurements import online
from common.data import load_dataset

DATA = "anchorl/pendulum/mixed-v0"
SCRIPT = "benchmarks.measurements.online"


def write_run(folder, rows, **args):
    """A finished run: its arguments, and evaluations as (update, return)."""
    folder.mkdir(parents=True)
    known = {"algorithm": "iql", "dataset_id": DATA, "seed": 0, "num_updates": 100, "online_steps": 0}
    (folder / "args.json").write_text(json.dumps(known | args))
    (folder / "result.json").write_text("{}")
    lines = ["step,critic/loss,eval/return_mean", "50,1.0,"] + [f"{step},1.0,{value}" for step, value in rows]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def score(value):
    return load_dataset(DATA).score(value)


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "pendulum"
    for seed, more in enumerate([0, 10]):
        rows = [(60, -900), (100, -500), (110, -700 - more), (120, -600), (195, -200), (200, -180 + more)]
        write_run(folder / "iql" / str(seed), rows, seed=seed, online_steps=100)
    scratch = {"algorithm": "sac", "dataset_id": "Pendulum-v1", "random_steps": 10}
    write_run(folder / "sac", [(10, -1200), (90, -400)], **scratch)
    prior = {"algorithm": "rlpd", "random_steps": 10, "updates_per_step": 4, "data_ratio": 0.5}
    write_run(folder / "rlpd", [(41, -1000), (360, -300)], **prior)
    return folder


def test_steps_count_from_the_switch_or_from_the_first_random_one(runs, tmp_path):
    words = [str(runs), "--out", str(tmp_path / "out"), "--at", "20", "100", "--dip", "30"]
    run = run_script(SCRIPT, *words)
    assert run.returncode == 0, run.stderr
    with (tmp_path / "out" / "pendulum.csv").open() as file:
        rows = list(csv.DictReader(file))
    steps = {script: [int(row["steps"]) for row in rows if row["script"] == script] for script in ("rlpd", "sac")}
    assert steps == {"sac": [20, 100], "rlpd": [21, 100]}  # 41 updates are 11 steps, of 4 each, after 10 random ones
    assert [int(row["steps"]) for row in rows if row["script"] == "iql"] == [0, 10, 20, 95, 100] * 2
    table = (tmp_path / "out" / "table.md").read_text()
    lines = {line.split("`")[1]: line.split("|")[2:-1] for line in table.splitlines() if "`" in line}
    cells = {script: [cell.split("[")[0].strip() for cell in row] for script, row in lines.items()}
    low = (score(-700) + score(-710)) / 2
    at_20, end = score(-600), (score(-200) * 2 + score(-180) + score(-170)) / 4
    assert cells["iql"] == ["2", *(f"{value:.1f}" for value in (score(-500), low, at_20, end))]
    assert cells["sac"] == ["1", "-", "-", f"{score(-1200):.1f}", f"{score(-400):.1f}"]
    assert list(lines) == ["iql", "rlpd", "sac"]  # the highest at the end first
    assert (tmp_path / "out" / "online.png").stat().st_size > 10_000
    again = run_script(SCRIPT, str(tmp_path / "out" / "pendulum.csv"), *words[1:2], str(tmp_path / "b"), *words[3:])
    assert again.returncode == 0 and (tmp_path / "b" / "table.md").read_text() == table


@pytest.mark.parametrize(
    ("steps", "value"), [(1100, 10), (1000, 10 * 1000 / 1054), (2000, 10 + 20 * 946 / 972), (0, 0), (3000, np.nan)]
)
def test_where_no_evaluation_falls_the_line_between_two_counts(steps, value):
    run = pd.DataFrame({"steps": [0, 1054, 2026], "value": [0, 10, 30]})
    assert online.value_at(run, steps) == pytest.approx(value, nan_ok=True)


def test_the_picture_is_of_all_seeds_at_each_step(tmp_path):
    """Two seeds whose episodes differ in length: the mean of 0 and 100 is 50 throughout."""
    rows = [("cal_ql", seed, step + seed, 100.0 * seed, "score") for seed in (0, 1) for step in (0, 10, 20)]
    own = online.over_seeds(pd.DataFrame(rows, columns=online.COLUMNS[:5]))
    assert own.index.tolist() == [1, 10, 11, 20] and own.mean(axis=1).tolist() == [50] * 4


def test_scripts_of_earlier_commands_stay(runs, tmp_path):
    words, last = ["--out", str(tmp_path / "out"), "--at", "100"], tmp_path / "out" / "table.md"
    assert run_script(SCRIPT, str(runs), *words).returncode == 0
    before = last.read_text()
    shutil.rmtree(runs / "sac")
    metrics = runs / "iql" / "1" / "metrics.csv"
    metrics.write_text(metrics.read_text().replace("-200", "-250"))
    assert run_script(SCRIPT, str(runs), *words).returncode == 0
    pairs = list(zip(before.splitlines(), last.read_text().splitlines(), strict=True))
    assert [line.split("`")[1] for line, after in pairs if line != after] == ["iql"]


def test_seeds_of_earlier_commands_are_not_lost(runs, tmp_path):
    words, file = ["--out", str(tmp_path / "out")], tmp_path / "out" / "pendulum.csv"
    assert run_script(SCRIPT, str(runs), *words).returncode == 0
    before = file.read_text()
    shutil.rmtree(runs / "iql" / "1")
    assert_one_line(run_script(SCRIPT, str(runs), *words), r"has seeds that the folder lacks \(iql 1\): add them to it")
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("column", "other"),
    [("unit", "return"), ("dataset_id", "anchorl/pendulum/mixed-v1"), ("env_id", "Pendulum-v2")],
)
def test_a_file_of_another_task_is_not_added_to(runs, tmp_path, column, other):
    words, file = ["--out", str(tmp_path / "out")], tmp_path / "out" / "pendulum.csv"
    assert run_script(SCRIPT, str(runs), *words).returncode == 0
    pd.read_csv(file).assign(**{column: other}).to_csv(file, index=False)
    assert_one_line(run_script(SCRIPT, str(runs), *words), f"has .*{other}.*, the runs .*: name another --out")


def test_two_sources_of_one_name_are_refused(runs, tmp_path):
    run = run_script(SCRIPT, str(runs), str(tmp_path / "out" / "pendulum.csv"), "--out", str(tmp_path / "out"))
    assert_one_line(run, "two of the sources have one name")


@pytest.mark.parametrize(("lines", "said"), [(1, "it must be of one dataset"), (0, "No columns")])
def test_a_file_without_rows_is_one_line(runs, tmp_path, lines, said):
    file = tmp_path / "pendulum.csv"
    file.write_text(",".join(online.COLUMNS) * lines)
    assert_one_line(run_script(SCRIPT, str(file), "--out", str(tmp_path / "out")), f"pendulum.csv: {said}")


def test_runs_that_were_not_evaluated_since_they_act_are_one_line(tmp_path):
    write_run(tmp_path / "short" / "iql", [(60, -900)], online_steps=100)
    run = run_script(SCRIPT, str(tmp_path / "short"), "--out", str(tmp_path / "out"))
    assert_one_line(run, "short: no run was evaluated since it acts")


def test_a_folder_has_its_whole_name(runs, tmp_path, monkeypatch):
    runs.rename(tmp_path / "hopper.a")
    monkeypatch.chdir(tmp_path / "hopper.a")
    assert run_script(SCRIPT, ".", "--out", str(tmp_path / "out")).returncode == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"hopper.a.csv", "table.md", "online.png"}


def test_a_run_that_never_acts_is_refused(runs, tmp_path):
    write_run(runs / "bc", [(100, -300)], algorithm="bc")
    run = run_script(SCRIPT, str(runs), "--out", str(tmp_path / "out"))
    assert_one_line(run, "bc: a run that never acts; give it --online-steps, or take it away")


@pytest.mark.parametrize(
    ("lacks", "line"),
    [
        ("online_steps", "0: a run that never acts"),
        ("dataset_id", "cannot read the args.json of a run in .*: .*0 lacks dataset_id: take it away"),
    ],
)
def test_the_run_of_an_older_version_is_one_line(runs, tmp_path, lacks, line):
    path = runs / "iql" / "0" / "args.json"
    saved = json.loads(path.read_text())
    del saved[lacks]
    path.write_text(json.dumps(saved))
    assert_one_line(run_script(SCRIPT, str(runs), "--out", str(tmp_path / "out")), line)


def test_a_script_that_plays_ahead_says_how_many_steps_it_took(runs, tmp_path):
    write_run(runs / "cal_ql", [], algorithm="cal_ql", online_steps=400)
    rows = [(50, -900, ""), (100, -800, ""), (150, -700, 200), (300, -600, 200), (350, -500, 400)]
    lines = ["step,eval/return_mean,player/steps", *(",".join(map(str, row)) for row in rows)]
    (runs / "cal_ql" / "metrics.csv").write_text("\n".join(lines) + "\n")
    run = run_script(SCRIPT, str(runs), "--out", str(tmp_path / "out"))
    assert run.returncode == 0, run.stderr
    with (tmp_path / "out" / "pendulum.csv").open() as file:
        assert [int(row["steps"]) for row in csv.DictReader(file) if row["script"] == "cal_ql"] == [0, 200, 200, 400]


def test_runs_in_different_environments_are_refused(runs, tmp_path):
    write_run(runs / "awac", [(100, -300), (150, -200)], algorithm="awac", online_steps=100, env_id="Pendulum-v2")
    run = run_script(SCRIPT, str(runs), "--out", str(tmp_path / "out"))
    assert_one_line(run, "runs in Pendulum-v1 and Pendulum-v2; it must be one environment")


def test_returns_in_another_environment_than_the_datas_are_no_scores(tmp_path):
    rows, more = [(100, -300), (150, -200)], {"online_steps": 100, "env_id": "mine:Short-v0"}
    write_run(tmp_path / "short" / "iql", rows, **more)
    run = run_script(SCRIPT, str(tmp_path / "short"), "--out", str(tmp_path / "out"))
    assert run.returncode == 0, run.stderr
    with (tmp_path / "out" / "short.csv").open() as file:
        assert [(float(row["value"]), row["unit"]) for row in csv.DictReader(file)] == [
            (-300, "return"),
            (-200, "return"),
        ]


def test_two_runs_of_a_script_and_seed_are_refused(runs, tmp_path):
    write_run(runs / "iql-tau", [(100, -300), (150, -200)], online_steps=100)
    run = run_script(SCRIPT, str(runs), "--out", str(tmp_path / "out"))
    assert_one_line(run, "iql-tau and .*iql/0 are of one script and seed: take one away")


def test_older_runs_from_scratch_have_no_online_steps(runs, tmp_path):
    path = runs / "sac" / "args.json"
    saved = json.loads(path.read_text())
    del saved["online_steps"]
    path.write_text(json.dumps(saved))
    run = run_script(SCRIPT, str(runs), "--out", str(tmp_path / "out"))
    assert run.returncode == 0, run.stderr


def test_a_folder_without_runs_is_refused(tmp_path):
    assert_one_line(run_script(SCRIPT, str(tmp_path), "--out", str(tmp_path / "out")), "no finished run in it")


def test_the_page_has_the_table_of_the_results(tmp_path):
    folder = ROOT / "benchmarks" / "results" / "online"
    names = "pendulum", "hopper-medium", "halfcheetah-medium"
    words = [*(str(folder / f"{name}.csv") for name in names), "--out", str(tmp_path)]
    words += ["--dip", "2000", "--at", "1000", "2000", "5000", "20000", "50000"]
    assert run_script(SCRIPT, *words).returncode == 0
    written = (tmp_path / "table.md").read_text()
    assert written == (folder / "table.md").read_text()
    page = (ROOT / "benchmarks" / "results" / "README.md").read_text()
    tables = [part for part in written.split("\n\n") if part.startswith("|")]
    assert len(tables) == 3 and all(part in page for part in tables)
