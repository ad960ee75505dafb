"""benchmarks.measurements.gpu on a CPU: what it says without a GPU, and what it asks nvidia-smi."""

import csv
import os

import pytest
import torch
from conftest import assert_one_line, run_script

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
    found = {row["measurement"]: float(row["value"]) for row in csv.DictReader((tmp_path / "gpu.csv").open())}
    assert found["updates_per_second of 1"] > 0 and found["utilisation of 1"] == pytest.approx(50, abs=10)
    assert "utilization.gpu" in asked.read_text()
