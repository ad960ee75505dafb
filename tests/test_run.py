"""The grid: cells are the ordinary scripts, finished ones are skipped, failing ones are reported; also on a cluster."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import run
from conftest import ROOT, assert_one_line, run_script

FEW = ["--num-updates", "6", "--eval-every", "3", "--eval-episodes", "1", "--hidden-dims", "8"]


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_grid_is_its_cells(tmp_path, pendulum):
    out = tmp_path / "grid"
    arguments = ["--algorithms", "bc", "iql", "--seeds", "2", "--out", str(out)]
    ran = run_script("run", *arguments, "--", *FEW)
    assert ran.returncode == 0, ran.stderr
    results = rows(out / "results.csv")
    assert [row["algorithm"] + row["seed"] for row in results] == ["bc0", "bc1", "iql0", "iql1"]
    for row in results:
        folder = out / row["algorithm"] / "anchorl-pendulum-mixed-v0" / row["seed"]
        assert row["run_dir"] == str(folder)
        result = json.loads((folder / "result.json").read_text())
        assert float(row["final_score"]) == result["final_score"] and row["num_updates"] == "6"
        assert row["eval_episodes"] == "1" and "torch" in row["versions"]
    evaluations = rows(out / "evaluations.csv")
    assert [row["num_updates"] for row in evaluations] == ["3", "6"] * 4
    assert float(evaluations[-1]["score"]) == float(results[-1]["final_score"])
    # the printed command gives the same result by itself
    command = next(line for line in ran.stdout.splitlines() if "bc.py" in line).split()
    command[command.index("--run-dir") + 1] = str(tmp_path / "by-hand")
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    by_hand = json.loads((tmp_path / "by-hand" / "result.json").read_text())
    assert by_hand["final_return_mean"] == float(results[0]["final_return_mean"])
    # again: nothing is run
    again = run_script("run", *arguments, "--", *FEW)
    assert again.returncode == 0 and "4 cells, 4 of them done" in again.stdout and "bc.py" not in again.stdout
    other = run_script("run", *arguments, "--", *FEW, "--seed", "3")
    assert other.returncode == 2 and "holds runs with" in other.stderr


def test_an_algorithm_may_have_arguments_of_its_own(tmp_path, pendulum):
    best = "bc --top-fraction 0.1"
    arguments = ["--algorithms", "bc", best, "--seeds", "1", "--out", str(tmp_path), "--", *FEW]
    assert run_script("run", *arguments).returncode == 0
    assert [row["algorithm"] for row in rows(tmp_path / "evaluations.csv")] == ["bc", "bc", best, best]
    folder = tmp_path / "bc-top-fraction-0.1" / "anchorl-pendulum-mixed-v0" / "0"
    assert json.loads((folder / "args.json").read_text())["top_fraction"] == 0.1
    assert [row["run_dir"] for row in rows(tmp_path / "results.csv")][1] == str(folder)


def test_progress_is_a_line_per_running_cell_and_the_time_that_is_left(tmp_path, capsys, monkeypatch):
    cells = [run.Cell("bc", "some/data-v0", seed, tmp_path / str(seed)) for seed in range(3)]
    times = iter([100.0, 160.0, 700.0])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(times))
    reporter = run.Reporter(cells, ("--num-updates", "600"), every=30)
    reporter.finished(cells[0], None)
    cells[1].folder.mkdir()
    (cells[1].folder / "metrics.csv").write_text("step,seconds\n100,1\n300,2\n")
    reporter.tick()  # 600 and 300 updates took a minute; as many are left
    assert capsys.readouterr().out.splitlines() == [
        "bc some/data-v0 0: done",
        "  bc some/data-v0 1: 300 of 600 updates",
        "1 of 3 cells ended, about 1 min left",
    ]
    reporter.finished(cells[2], "exit code 1")  # its 600 updates are neither left nor gained
    reporter.tick()  # 900 took ten minutes
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 3 cells ended, about 3 min left"


def test_a_failing_cell_is_reported_with_its_log_and_stops_no_other(tmp_path, pendulum):
    arguments = ["--algorithms", "bc", "iql", "--seeds", "1", "--out", str(tmp_path / "grid")]
    ran = run_script("run", *arguments, "--", *FEW, "--expectile", "0.8")  # which bc.py does not know
    assert ran.returncode == 1
    (line,) = (line for line in ran.stdout.splitlines() if line.startswith("bc ") and "exit code 2" in line)
    assert "--expectile" in line and ".log" in line
    assert [row["algorithm"] for row in rows(tmp_path / "grid" / "results.csv")] == ["iql"]


def test_a_cell_that_was_killed_goes_on(tmp_path, pendulum):
    out = tmp_path / "grid"
    long = ["--num-updates", "3000", "--eval-every", "1500", "--checkpoint-every", "100", *FEW[4:]]
    command = [sys.executable, "-m", "benchmarks.run", "--algorithms", "bc", "--seeds", "1", "--out", str(out), "--"]
    command += long
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    metrics = out / "bc" / "anchorl-pendulum-mixed-v0" / "0" / "metrics.csv"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)  # the script dies with it
    process.wait()
    time.sleep(0.2)
    length = metrics.stat().st_size
    time.sleep(0.3)
    assert metrics.stat().st_size == length
    ran = run_script("run", *command[3:])
    assert ran.returncode == 0, ran.stdout
    log = (out / "bc" / "anchorl-pendulum-mixed-v0" / "0.log").read_text()
    assert log.count("$ ") == 2 and "--resume" in log
    assert [row["num_updates"] for row in rows(out / "evaluations.csv")] == ["1500", "3000"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--algorithms", "nosuch"], "--algorithms nosuch: there are .*iql"),
        (["--datasets", "nosuch"], "no dataset 'nosuch'"),
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--gpus", "1.5"], "--gpus 1.5"),
        (["--num-updates", "3"], r"--num-updates, 3 \(--help .*those of the scripts come after `--`"),
        (["--datasets", "anchorl/unknown-v0"], "unknown built-in dataset"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    assert_one_line(run_script("run", *arguments, "--out", str(tmp_path / "grid")), message)
    assert not (tmp_path / "grid").exists()


@pytest.mark.slow
def test_a_cluster_loses_a_node_and_no_result(tmp_path, pendulum):
    """Two nodes of a Ray cluster on this machine, one killed in the middle: every cell ends as a local run's does."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    few = ["--num-updates", "1500", "--eval-every", "500", "--checkpoint-every", "100", "--eval-episodes", "1"]
    grid = ["--algorithms", "bc", "iql", "--seeds", "2"]
    local = run_script("run", *grid, "--out", str(tmp_path / "local"), "--", *few)
    assert local.returncode == 0, local.stderr
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        node = cluster.add_node(num_cpus=1)
        command = [sys.executable, "-m", "benchmarks.run", *grid, "--engine", "ray", "--address", cluster.address]
        command += ["--out", str(tmp_path / "ray"), "--", *few]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while len(list((tmp_path / "ray").rglob("metrics.csv"))) < 2:  # both nodes are at work
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)
        cluster.remove_node(node, allow_graceful=False)
        output, _ = process.communicate(timeout=300)
    finally:
        cluster.shutdown()
    assert process.returncode == 0, output
    for name in ("evaluations.csv",):
        assert (tmp_path / "ray" / name).read_text() == (tmp_path / "local" / name).read_text()
    logs = "".join(path.read_text() for path in (tmp_path / "ray").rglob("*.log"))
    assert "--resume" in logs  # a cell went on where the lost node had left it
