"""The grid: cells are the ordinary scripts, finished ones are skipped, failing ones are reported; also on a cluster."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import run
from conftest import ROOT, assert_one_line, run_script

FEW = [
    "--num-updates",
    "6",
    "--eval-every",
    "3",
    "--eval-episodes",
    "1",
    "--final-eval-episodes",
    "1",
    "--hidden-dims",
    "8",
]


FAKE = """
import json, sys, time
from pathlib import Path

folder = Path(sys.argv[2])

def try_number():
    starts = folder.parent / "starts"
    with starts.open("a") as file:
        file.write(".")
    return len(starts.read_text())

def end_well():
    folder.mkdir(exist_ok=True)
    (folder / "args.json").write_text('{"eval_every": 1, "eval_episodes": 1}')
    (folder / "metrics.csv").write_text("step,eval/return_mean,eval/score\\n1,-200,50\\n")
    (folder / "result.json").write_text('{"final_score": 50, "versions": {"torch": "2"}}')
"""


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A function that puts scripts of some lines in the place of algorithms/; they start at once, without torch."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    monkeypatch.setattr(run, "SCRIPTS", scripts)
    monkeypatch.setattr(run, "STOPPING", False)
    monkeypatch.setattr(run, "load_dataset", lambda *_, **__: None)

    def write(**bodies):
        for name, body in bodies.items():
            (scripts / f"{name}.py").write_text(FAKE + body)

    return write


def cell_of(folder):
    return run.Cell("fake", "some/data-v0", 0, folder / "fake" / "some-data-v0" / "0")


def test_a_grid_is_its_cells(tmp_path, pendulum, warm):
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
    assert len(json.loads(results[-1]["final_returns"])) == 1 and evaluations[-1]["score"]
    # the printed command gives the same result by itself
    command = next(line for line in ran.stdout.splitlines() if "bc.py" in line).split()
    command[command.index("--run-dir") + 1] = str(tmp_path / "by-hand")
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    by_hand = json.loads((tmp_path / "by-hand" / "result.json").read_text())
    assert by_hand["final_return_mean"] == float(results[0]["final_return_mean"])
    # again: nothing is run
    again = run_script("run", *arguments, "--", *FEW)
    assert again.returncode == 0 and "4 cells, 4 of them done" in again.stdout and "bc.py" not in again.stdout
    other = run_script("run", *arguments, "--", *FEW, "--log-every", "3")
    assert other.returncode == 2 and "holds runs with" in other.stderr


def test_an_algorithm_may_have_arguments_of_its_own(tmp_path, pendulum, warm):
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


def test_a_failing_cell_is_reported_with_its_log_and_stops_no_other(tmp_path, pendulum, warm):
    arguments = ["--algorithms", "bc", "iql", "--seeds", "1", "--out", str(tmp_path / "grid")]
    ran = run_script("run", *arguments, "--", *FEW, "--expectile", "0.8")  # which bc.py does not know
    assert ran.returncode == 1
    (line,) = (line for line in ran.stdout.splitlines() if line.startswith("bc ") and "exit code 2" in line)
    assert "--expectile" in line and ".log" in line
    bad, good = rows(tmp_path / "grid" / "results.csv")
    assert (bad["algorithm"], f"bc {bad['dataset_id']} 0: {bad['problem']}") == ("bc", line)
    assert (good["algorithm"], good["problem"]) == ("iql", "") and good["final_score"] and not bad["final_score"]
    assert {row["algorithm"] for row in rows(tmp_path / "grid" / "evaluations.csv")} == {"iql"}
    *_, failed, last = ran.stdout.splitlines()
    assert failed == f"failed: {line}" and last.endswith("results.csv: 1 of 2 cells ended well")


@pytest.mark.parametrize(
    ("body", "tries", "problem"),
    [
        ("end_well() if try_number() == 2 else sys.exit('oh')", 2, None),
        ("try_number(); sys.exit('oh')", 2, "exit code 1: oh (see "),
        ("try_number(); print('nan'); sys.exit(3)", 1, "exit code 3: nan (see "),  # the same bits would diverge again
        ("try_number(); sys.exit(2)", 1, "exit code 2"),
        ("try_number(); import os; os.kill(os.getpid(), 15)", 1, "exit code -15"),
        ("try_number(); import os, signal as s; s.signal(2, s.SIG_DFL); os.kill(os.getpid(), 2)", 1, "exit code -2"),
        ("try_number(); import os; os.kill(os.getpid(), 9)", 2, "exit code -9"),
        ("try_number(); print('--help')", 2, "exit code 0: --help"),  # it ended, but not with a result
        ("try_number(); end_well(); sys.exit('oh')", 1, None),
    ],
)
def test_a_failing_cell_is_tried_again_where_that_may_help(body, tries, problem, fake, tmp_path):
    fake(fake=body)
    cell = cell_of(tmp_path)
    found = run.run_cell(cell, run.Args(), {})
    assert found is None if problem is None else found.startswith(problem)
    assert len((cell.folder.parent / "starts").read_text()) == cell.log.read_text().count("$ ") == tries


def test_a_cell_has_the_threads_and_the_place_that_it_was_given(fake, tmp_path):
    fake(fake="import os; print(os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES']); end_well()")
    cell = cell_of(tmp_path)
    assert run.run_cell(cell, run.Args(threads=3), {"CUDA_VISIBLE_DEVICES": "1"}) is None
    assert cell.log.read_text().splitlines()[-1] == "3 1"


def test_a_cell_whose_folder_cannot_be_made_stops_no_other(fake, tmp_path, capsys):
    fake(bad="end_well()", good="time.sleep(0.5); end_well()")
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "bad").touch()
    with pytest.raises(SystemExit, match="1"):
        run.main(run.Args(("bad", "good"), seeds=1, out=tmp_path / "grid"))
    bad, good = rows(tmp_path / "grid" / "results.csv")
    assert "Not a directory" in bad["problem"] and good["problem"] == ""
    assert "Not a directory" in capsys.readouterr().out.splitlines()[-2]


@pytest.mark.parametrize("handler", ["", "import signal; signal.signal(15, lambda *_: sys.exit(1)); "])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_scripts_that_are_not_yet_at_work(number, handler, fake, tmp_path):
    """They die of it or fail, but there is no next try; nor a next cell."""
    fake(fake=f"{handler}try_number(); time.sleep(20)")
    out = tmp_path / "grid"
    starts = out / "fake" / "anchorl-pendulum-mixed-v0" / "starts"

    def send():
        while not (starts.exists() and starts.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send).start()
    began = time.monotonic()
    ran = run_script("run", "--algorithms", "fake", "--seeds", "3", "--workers", "1", "--out", str(out))
    assert ran.returncode == 128 + number and time.monotonic() - began < 10
    assert starts.read_text() == "." and starts.with_name("0.log").read_text().count("$ ") == 1


def test_a_script_that_starts_while_others_are_stopped_is_stopped_too(fake, tmp_path, monkeypatch):
    fake(fake="time.sleep(20); end_well()")
    start = subprocess.Popen

    def start_late(*args, **kwargs):
        run.stop_scripts()
        return start(*args, **kwargs)

    monkeypatch.setattr(run.subprocess, "Popen", start_late)
    assert run.run_cell(cell_of(tmp_path), run.Args(), {}).startswith("exit code -15")


def test_later_commands_add_to_the_results(fake, tmp_path):
    fake(one="end_well()", two="end_well()")
    out = tmp_path / "grid"
    for algorithms in (("one",), ("two --x 1", "two"), ("two",)):
        run.main(run.Args(algorithms, seeds=1, out=out))
        assert [row["algorithm"] for row in rows(out / "results.csv")][-len(algorithms) :] == list(algorithms)
    assert len(rows(out / "evaluations.csv")) == 3
    assert sorted(row["algorithm"] for row in rows(out / "results.csv")) == ["one", "two", "two --x 1"]
    shutil.rmtree(out / "one")  # a cell whose folder is gone is no result any more, and one that moved is
    moved = out.rename(tmp_path / "moved")
    run.main(run.Args(("two",), seeds=1, out=moved))
    assert [row["algorithm"] for row in rows(moved / "results.csv")] == ["two --x 1", "two"]
    assert rows(moved / "results.csv")[0]["run_dir"].startswith(str(moved))
    new = moved / "two-x--1" / "anchorl-pendulum-mixed-v0" / "0"  # before minus signs were kept it was another's folder
    text = (moved / "results.csv").read_text()
    (moved / "results.csv").write_text(text.replace("two --x 1", "two --x -1"))
    run.main(run.Args(("two --x -1",), seeds=1, out=moved))
    assert [row["run_dir"] for row in rows(moved / "results.csv")][1:] == [str(new)]
    (moved / "results.csv").write_text("a,b\n1,2\n")
    with pytest.raises(run.BadInput, match=r"results.csv: not of a grid"):
        run.main(run.Args(("two",), seeds=1, out=moved))


def test_a_folder_is_not_taken_for_another_datasets(fake, tmp_path):
    """anchorl/pendulum/mixed-v0 and anchorl-pendulum/mixed-v0 have the same folders."""
    fake(one="end_well()")
    run.main(run.Args(("one",), seeds=1, out=tmp_path))
    before = (tmp_path / "results.csv").read_text()
    (tmp_path / "results.csv").write_text(before.replace("anchorl/pendulum/", "anchorl-pendulum/"))
    with pytest.raises(
        run.BadInput, match="one/anchorl-pendulum-mixed-v0/0 holds a run of one on anchorl-pendulum/mixed-v0;"
    ):
        run.main(run.Args(("one",), seeds=1, out=tmp_path))


def test_a_folder_is_not_taken_for_another_algorithms(fake, tmp_path):
    """As names of folders 1e+1 and 1e-1 are the same; --x=1 is --x 1."""
    fake(one="end_well()")
    run.main(run.Args(("one --x 1e+1",), seeds=1, out=tmp_path))
    with pytest.raises(
        run.BadInput, match=r"one-x-1e-1/.*/0 holds a run of one --x 1e\+1 on anchorl/pendulum/mixed-v0;"
    ):
        run.main(run.Args(("one --x 1e-1",), seeds=1, out=tmp_path))
    run.main(run.Args(("one --x=1e+1",), seeds=1, out=tmp_path))


def test_a_damaged_result_is_no_row(fake, tmp_path, capsys):
    fake(fake="end_well()")
    run.main(run.Args(("fake",), seeds=2, out=tmp_path))
    folder = tmp_path / "fake" / "anchorl-pendulum-mixed-v0"
    (folder / "0" / "result.json").write_text("{")
    with pytest.raises(SystemExit, match="1"):
        run.main(run.Args(("fake",), seeds=2, out=tmp_path))
    *_, failed, last = capsys.readouterr().out.splitlines()
    assert failed == f"failed: fake anchorl/pendulum/mixed-v0 0: cannot read {folder}/0"
    assert last == f"{tmp_path}/results.csv: 1 of 2 cells ended well"
    assert [row["problem"] for row in rows(tmp_path / "results.csv")] == [f"cannot read {folder}/0", ""]
    assert len(rows(tmp_path / "evaluations.csv")) == 1


@pytest.mark.parametrize("content", ["[]", "1", "null", '{"versions": 1}', "\xff"])
@pytest.mark.parametrize("name", ["result.json", "args.json"])
def test_damage_of_any_kind_is_no_row(name, content, fake, tmp_path):
    fake(fake="end_well()", other="end_well()")
    run.main(run.Args(("fake",), seeds=1, out=tmp_path))
    (tmp_path / "fake" / "anchorl-pendulum-mixed-v0" / "0" / name).write_text(content, encoding="latin-1")
    run.main(run.Args(("other",), seeds=1, out=tmp_path))
    assert [row["algorithm"] for row in rows(tmp_path / "evaluations.csv")] == ["other"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("results.csv", "algorithm,dataset_id,seed,run_dir\nx,a,zero,b\n", "results.csv: invalid literal"),
        ("results.csv", "algorithm,dataset_id,seed,run_dir\nx,a\n", "results.csv: not of a grid, or damaged; rename"),
        ("results.csv", "algorithm,dataset_id\n\xff", "results.csv: 'utf-8' codec"),
        *(("script_arguments.json", content, "cannot read .*remove it") for content in ("", "{", "1", "null", "\xff")),
        ("script_arguments.json", "[1]", "holds runs with 1; name another"),
    ],
)
def test_a_damaged_table_is_one_line(name, content, message, fake, tmp_path):
    fake(fake="end_well()")
    (tmp_path / "an" / "other" / "0").mkdir(parents=True)
    (tmp_path / "an" / "other" / "0" / "result.json").touch()
    (tmp_path / name).write_text(content, encoding="latin-1")
    ran = run_script("run", "--algorithms", "fake", "--seeds", "1", "--out", str(tmp_path))
    assert_one_line(ran, message)


def test_a_problem_stays_in_the_results_until_the_cell_has_ended_well(fake, tmp_path):
    fake(good="end_well()", bad="end_well() if try_number() == 3 else sys.exit('oh')")
    for algorithm, problem in (("bad", "exit code 1: oh (see "), ("good", "exit code 1: oh (see "), ("bad", "")):
        with contextlib.suppress(SystemExit):
            run.main(run.Args((algorithm,), seeds=1, out=tmp_path))
        (found,) = (row["problem"] for row in rows(tmp_path / "results.csv") if row["algorithm"] == "bad")
        assert found.startswith(problem) and bool(found) == bool(problem)


def test_a_problem_goes_with_its_folder_and_is_told_of_until_then(fake, tmp_path, capsys):
    fake(good="end_well()", bad="sys.exit('oh')")
    with pytest.raises(SystemExit):
        run.main(run.Args(("bad",), seeds=2, out=tmp_path))
    run.main(run.Args(("good",), seeds=1, out=tmp_path))
    line = "2 cells of earlier commands have not ended well either: run them again, or delete their folders"
    assert line in capsys.readouterr().out
    shutil.rmtree(tmp_path / "bad")
    run.main(run.Args(("good",), seeds=1, out=tmp_path))
    assert [row["algorithm"] for row in rows(tmp_path / "results.csv")] == ["good"]
    assert "earlier" not in capsys.readouterr().out


def test_arguments_with_which_nothing_ran_do_not_bind(fake, tmp_path):
    fake(fake="sys.exit(2)")
    with pytest.raises(SystemExit):
        run.main(run.Args(("fake",), seeds=1, out=tmp_path, script=("--num-updats", "20")))
    fake(fake="end_well()")
    run.main(run.Args(("fake",), seeds=1, out=tmp_path, script=("--num-updates", "20")))
    assert rows(tmp_path / "results.csv")[0]["problem"] == ""
    with pytest.raises(run.BadInput, match="holds runs with --num-updates 20"):
        run.main(run.Args(("fake",), seeds=1, out=tmp_path, script=("--num-updates", "30")))


def test_cells_that_were_not_begun_are_in_the_results_as_not_finished(fake, tmp_path, monkeypatch):
    fake(fake="end_well()")
    monkeypatch.setitem(run.ENGINES, "local", lambda cells, args: iter(()))  # as if it were stopped at once
    with pytest.raises(SystemExit, match="1"):
        run.main(run.Args(("fake",), seeds=2, out=tmp_path))
    assert [row["problem"] for row in rows(tmp_path / "results.csv")] == ["not finished"] * 2


def test_two_commands_at_once_do_not_share_a_folder(tmp_path, pendulum):
    command = ["--algorithms", "bc", "--seeds", "1", "--out", str(tmp_path), "--", *FEW]
    with run.alone_in(tmp_path):
        assert_one_line(run_script("run", *command), f"--out {tmp_path}: another command is at work in it; wait")
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    assert run_script("run", *command).returncode == 0


@pytest.mark.parametrize(
    ("visible", "share", "workers", "expected"),
    [
        (None, 0.5, 0, ["0", "0", "1", "1"]),
        ("2,3", 0.5, 0, ["2", "2", "3", "3"]),
        ("GPU-a,GPU-b", 1, 0, ["GPU-a", "GPU-b"]),
        (None, 0.4, 3, ["0", "0", "1"]),
        (None, 0.5, 9, ["0", "0", "1", "1"]),
    ],
)
def test_cells_get_shares_of_the_gpus_that_are_visible(visible, share, workers, expected, tmp_path, monkeypatch):
    cells = [run.Cell("bc", "some/data-v0", seed, tmp_path / str(seed)) for seed in range(3 * len(expected))]
    together = threading.Barrier(len(expected), timeout=10)  # so many cells run side by side
    seen, most = [], []

    def run_cell(cell, args, environment):
        seen.append(environment["CUDA_VISIBLE_DEVICES"])
        together.wait()
        most.append(len(seen) - len(most))  # at work, this one too
        together.wait()

    monkeypatch.setattr(run, "run_cell", run_cell)
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    ended = [cell for cell in run.run_locally(cells, run.Args(gpus=share, workers=workers)) if cell]
    assert sorted(ended) == [(cell, None) for cell in cells]
    assert sorted(seen[: len(expected)]) == expected and sorted(seen) == sorted(3 * expected)
    assert max(most) == len(expected)


def test_cells_without_a_share_leave_the_gpus_alone(tmp_path, monkeypatch, capsys):
    """Else as many as there are processors would meet on the first one."""
    cell = cell_of(tmp_path)
    monkeypatch.setattr(
        run, "run_cell", lambda cell, args, environment: " ".join(cell.command(args)) + str(environment)
    )
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 2)
    (ended,) = (cell for cell in run.run_locally([cell], run.Args()) if cell)
    assert "--device cpu" in ended[1] and ended[1].endswith("{}")
    assert capsys.readouterr().out == "cells run on processors, not on the GPUs (2): --gpus 0.25 puts four on each\n"
    assert "--device" not in cell.command(run.Args(gpus=0.5))
    anew = cell.command(run.Args(script=("--x", "1")))
    cell.folder.mkdir(parents=True)
    (cell.folder / "checkpoint.pt").touch()
    assert cell.command(run.Args(script=("--x", "1"))) == [*anew, "--resume"]
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(run.BadInput, match=r"--gpus 0.5: PyTorch finds no GPU"):
        next(run.run_locally([cell], run.Args(gpus=0.5)))


def test_without_affinities_all_processors_are_used(tmp_path, monkeypatch):
    monkeypatch.delattr(run.os, "sched_getaffinity", raising=False)  # as on macOS
    monkeypatch.setattr(run.os, "cpu_count", lambda: 6)
    together, workers = threading.Barrier(3, timeout=10), set()

    def run_cell(*_):
        workers.add(threading.get_ident())
        time.sleep(0.1)
        together.wait()

    monkeypatch.setattr(run, "run_cell", run_cell)
    cells = [run.Cell("bc", "some/data-v0", seed, tmp_path / str(seed)) for seed in range(6)]
    assert len([ended for ended in run.run_locally(cells, run.Args(threads=2)) if ended]) == 6
    assert len(workers) == 3  # of two processors each


def test_folders_are_named_as_ever_but_for_minus_signs():
    names = {
        "bc": "bc",
        "bc --top-fraction 0.1": "bc-top-fraction-0.1",
        "edac --num_critics=10 --hidden-dims 128 128 --lr 1e-3": "edac-num_critics-10-hidden-dims-128-128-lr-1e-3",
        "sac/pendulum/medium-replay-v0": "sac-pendulum-medium-replay-v0",
        "/data/hopper v2.hdf5": "data-hopper-v2.hdf5",
        "edac --target-entropy 30": "edac-target-entropy-30",
        "edac --target-entropy -30": "edac-target-entropy--30",
        "edac --target-entropy=-.5 --no-x": "edac-target-entropy--.5-no-x",
    }
    assert {text: run.as_name(text) for text in names} == names


@pytest.mark.parametrize(
    ("script", "algorithm", "number"),
    [
        (("--num-updates", "600"), "bc", 600),
        (("--num-updates", "5_000"), "bc", 5000),
        (("--num_updates=+7",), "bc", 7),
        (("--num-updates", "600"), "bc --num-updates 1_000", 1000),
        ((), "bc", 10_000),
        (("--num-updates", "600"), "iql --online_steps 50", 650),
    ],
)
def test_the_number_of_updates_is_read_as_the_scripts_read_it(script, algorithm, number):
    cell = run.Cell(algorithm, "some/data-v0", 0, Path("x"))
    assert cell.num_updates(script) == number
    command = cell.command(run.Args(script=script))
    assert command[command.index("--seed") + 2 :] == [*script, *algorithm.split()[1:]]  # the last one counts


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
        (["--gpus", "2"], r"--gpus 2.0: must be 0, or a share in \[0.01, 1\]"),
        (["--gpus", "nan"], "--gpus nan"),
        (["--gpus", "1e-9"], "--gpus 1e-09"),
        (["--", "--seed", "3"], "--seed: set by the grid for each script: give --seeds, --datasets and --out"),
        (["--", "--num-updates", "3", "--dataset_id=x/y-v0"], "--dataset-id: set by the grid"),
        (["--", "--resume"], "--resume: set by the grid"),
        (["--algorithms", "iql", "bc --run-dir x"], "--run-dir: set by the grid"),
        (["--algorithms", "bc 'x"], "--algorithms bc 'x: No closing quotation"),
        (["--algorithms", ""], "--algorithms : there are"),
        (["--algorithms", "bc", "iql", "bc"], "--algorithms: two would share a folder: bc bc iql"),
        (["--algorithms", "bc --top-fraction 0.1", "bc --top-fraction=0.1"], "two would share a folder"),
        (["--datasets", "a/b-v0", "a/b-v0"], "--datasets: two would share a folder: a-b-v0 a-b-v0"),
        (["--", "--device", "cuda"], "--device: cells get GPUs by --gpus"),
        (["--algorithms", "bc --device=auto"], "--device: cells get GPUs by --gpus"),
        (["--datasets", "anchorl/unknown-v0"], "no dataset anchorl/unknown-v0"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    assert_one_line(run_script("run", *arguments, "--out", str(tmp_path / "grid")), message)
    assert not (tmp_path / "grid").exists()


def test_an_argument_of_the_scripts_before_the_two_hyphens_is_refused(tmp_path):
    ran = run_script("run", "--num-updates", "3", "--out", str(tmp_path / "grid"))
    assert ran.returncode == 2 and "--num-updates, 3" in ran.stderr
    assert not (tmp_path / "grid").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, pendulum):
    (tmp_path / "file").touch()
    assert_one_line(
        run_script("run", "--out", str(tmp_path / "file" / "grid")), "--out .*grid: cannot be made: Not a dir"
    )


def test_results_come_from_machines_with_other_disks(fake, tmp_path, monkeypatch, capsys):
    """Ray is not among the test's packages: here is what run.py uses of it, on a machine whose disk is out of reach."""
    fake(good="end_well()", bad="sys.exit('oh')", lost="end_well()")
    options = {}

    class RayError(Exception):
        pass

    class Job:
        def __init__(self, function, cell, args, environment):
            self.cell, self.outcome = cell, function(cell, args, environment)
            shutil.rmtree(cell.folder.parent)

    def remote(**kwargs):
        options.update(kwargs)
        return lambda function: types.SimpleNamespace(remote=lambda *task: Job(function, *task))

    def get(job):
        if job.cell.algorithm == "lost":
            raise RayError("the worker\nis dead")
        return job.outcome

    ray = types.SimpleNamespace(
        is_initialized=lambda: True,
        remote=remote,
        wait=lambda jobs, timeout: (jobs[:1], jobs[1:]),
        get=get,
        exceptions=types.SimpleNamespace(RayError=RayError),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    out = tmp_path / "grid"
    with pytest.raises(SystemExit, match="1"):
        run.main(run.Args(("good", "bad", "lost"), seeds=2, engine="ray", gpus=0.5, out=out))
    lines, folder = capsys.readouterr().out.splitlines(), out / "lost" / "anchorl-pendulum-mixed-v0"
    assert lines[-1] == f"{out}/results.csv: 2 of 6 cells ended well"
    assert "bad anchorl/pendulum/mixed-v0 1: exit code 1: oh (see " in lines[-4] and " on " in lines[-4]
    assert lines[-2] == f"failed: lost anchorl/pendulum/mixed-v0 1: Ray: the worker is dead (see {folder}/1.log)"
    assert [row["algorithm"] + row["seed"] for row in rows(out / "results.csv") if not row["problem"]] == [
        "good0",
        "good1",
    ]
    assert [row["score"] for row in rows(out / "evaluations.csv")] == ["50", "50"]
    assert options == {"num_cpus": 1, "num_gpus": 0.5, "max_retries": 3}
    run.main(run.Args(("good",), seeds=2, engine="ray", gpus=0.5, out=out))  # and the cells are done
    assert "2 cells, 2 of them done" in capsys.readouterr().out


@pytest.mark.slow
def test_a_cluster_loses_a_node_and_no_result(tmp_path, pendulum):
    """Two nodes of a Ray cluster on this machine, one killed in the middle: every cell ends as a local run's does."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    few = [
        "--num-updates",
        "1500",
        "--eval-every",
        "500",
        "--checkpoint-every",
        "100",
        "--eval-episodes",
        "1",
        "--final-eval-episodes",
        "1",
    ]
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
