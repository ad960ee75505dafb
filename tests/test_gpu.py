"""benchmarks.measurements.gpu on a CPU: what it says without a GPU, and what it asks nvidia-smi."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_one_line, run_script

from benchmarks.measurements import gpu

SHORT = ["--device", "cpu", "--parts", "sharing", "--modes", "eager", "--rounds", "1", "--seconds", "0.05"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(tmp_path):
    ran = run_script("benchmarks.measurements.gpu", "--out", str(tmp_path / "out"))
    assert_one_line(ran, "^error: PyTorch finds no CUDA device: this measures one$")
    assert not (tmp_path / "out").exists()


def test_how_much_of_the_time_the_gpu_is_at_work_is_beside_the_speed(tmp_path, monkeypatch):
    asked = tmp_path / "asked"
    script = f"#!/bin/sh\necho $@ >> {asked}\nwhile true; do echo 40; echo 60; sleep 0.1; done\n"
    (tmp_path / "nvidia-smi").write_text(script)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    words = [*SHORT, "--shared-algorithm", "bc", "--processes", "1", "--out", str(tmp_path)]
    ran = run_script("benchmarks.measurements.gpu", *words)
    assert ran.returncode == 0, ran.stderr
    found = {row["measurement"]: float(row["value"]) for row in rows_of(tmp_path)}
    assert found["updates_per_second of 1"] > 0 and found["utilisation of 1"] == pytest.approx(50, abs=10)
    assert "utilization.gpu" in asked.read_text()


def rows_of(folder):
    return list(csv.DictReader((folder / "gpu.csv").open()))


def test_rows_of_other_parts_and_machines_are_kept(tmp_path, monkeypatch):
    other = {("a GPU", "updates_per_second", "bc", "eager"): 10.0, ("a GPU", "resume", "bc", "eager"): 0.0}
    gpu.gpu_table.write(tmp_path / "gpu.csv", other)
    found = iter([[("bc", "eager", 20.0)], [("bc", "compile", 30.0)], [("bc", "eager", 40.0)]])
    monkeypatch.setattr(gpu, "together", lambda *_, **__: next(found))
    for _ in range(3):
        gpu.main(gpu.Args(device="cpu", parts=("speed",), out=tmp_path))
    rows = rows_of(tmp_path)
    assert [row["mode"] for row in rows] == ["eager", "eager", "eager", "compile"]
    assert [float(row["value"]) for row in rows] == [10, 0, 40, 30]
    assert {row["machine"] for row in rows[2:]} == {f"no GPU: a trial of the command, PyTorch {torch.__version__}"}
    page = (tmp_path / "gpu.md").read_text()
    assert page.index("# a GPU") < page.index("| bc | 10 |") < page.index("# no GPU") < page.index("| bc | 40 | 30 |")


def test_a_file_that_is_not_its_own_is_left_alone(tmp_path):
    (tmp_path / "gpu.csv").write_text("measurement,value\nspeed,1\n")
    ran = run_script("benchmarks.measurements.gpu", *SHORT, "--out", str(tmp_path))
    assert_one_line(ran, r"gpu\.csv, take another --out: its columns are not machine, measurement, ")
    assert (tmp_path / "gpu.csv").read_text() == "measurement,value\nspeed,1\n"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says which processes it has")
def test_a_process_that_is_killed_is_one_line_at_once(tmp_path):
    words = [*SHORT, "--shared-algorithm", "bc", "--processes", "2", "--seconds", "1000", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.measurements.gpu", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as running:
        try:
            while len(workers := children(running.pid)) < 3:  # and the process that counts what they share
                assert running.poll() is None
                time.sleep(0.05)
            os.kill(workers[-1], signal.SIGKILL)
            _, said = running.communicate(timeout=60)
        finally:
            running.kill()
    assert running.returncode == 2
    assert re.fullmatch(r"error: a process ended with \[-9\]; -9 is too little memory: .*\n", said), said


def children(process):
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_a_sum_over_processes_is_of_all_of_them(monkeypatch):
    found = [("bc", "compile", 10.0), ("bc", "compile", 20.0), ("", "utilisation", 50.0)]
    monkeypatch.setattr(gpu, "together", lambda *_, **__: found)
    args = gpu.Args(device="cpu", shared_algorithm="bc", processes=(2, 3))  # of three one failed
    assert [row[0::3] for row in gpu.sharing(args)] == [
        ("updates_per_second of 2", 30.0),
        ("utilisation of 2", 50.0),
        ("utilisation of 3", 50.0),
    ]


def test_too_few_updates_for_a_speed_are_one_line(tmp_path):
    words = [*SHORT, "--long-updates", "100", "--out", str(tmp_path / "out")]
    assert_one_line(run_script("benchmarks.measurements.gpu", *words), "--long-updates: must be at least 200")


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("eager", (False, "float32")), ("compile", (True, "float32")), ("compile bf16", (True, "bf16"))],
)
def test_runs_that_are_resumed_have_the_mode_that_the_row_names(monkeypatch, mode, expected):
    asked = []

    def note(words, **_):
        asked.append(("--compile" in words, words[words.index("--precision") + 1]))

    monkeypatch.setattr(gpu.subprocess, "run", note)
    monkeypatch.setattr(gpu, "largest_difference", lambda *folders: 0.0)
    assert gpu.resumed(gpu.Args(device="cpu"), "bc", mode) == [("resume", "bc", mode, 0.0)]
    assert asked == [expected] * 3


def test_a_whole_run_has_the_mode_that_the_row_names(monkeypatch):
    def run(words, **_):
        assert "--compile" in words and words[words.index("--precision") + 1] == "bf16"
        folder = Path(words[words.index("--run-dir") + 1])
        folder.mkdir()
        folder.joinpath("metrics.csv").write_text("step,seconds\n" + "".join(f"{n},{n}\n" for n in range(1, 101)))

    monkeypatch.setattr(gpu.subprocess, "run", run)
    args = gpu.Args(device="cpu", modes=("compile bf16",), long_algorithms=("bc",), long_updates=100)
    took, whole = gpu.long_runs(args)
    assert took[:3] == ("seconds of 100", "bc", "compile bf16") and whole[3] == pytest.approx(999_900, rel=1e-3)
