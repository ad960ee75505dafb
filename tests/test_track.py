"""W&B is shown a run by a process of its own: every row once, whatever W&B does."""

import csv
import json
import os
import struct
import subprocess
import sys
import threading
import time

import pytest
import track
from conftest import ROOT, SHORT, assert_one_line, run_script
from filelock import FileLock
from wandb.proto import wandb_internal_pb2

from common.command_line import TRACKER


def wandb_records(path):
    """The protobuf records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    data, offset, parts = path.read_bytes(), 7, b""
    while offset + 7 <= len(data):
        if 32768 - offset % 32768 < 7:  # too short for a header: padding
            offset += 32768 - offset % 32768
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def test_tracking_offline_holds_config_and_metrics(tmp_path):
    arguments = ["--num-updates", "20", "--log-every", "10", "--track", "--run-dir", str(tmp_path / "run")]
    run = run_script("iql", *arguments, *SHORT, WANDB_MODE="offline")
    assert run.returncode == 0, run.stderr
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    config, history, summary = {}, [], {}
    for record in wandb_records(file):
        updates = [*record.run.config.update, *record.config.update]  # it comes with the run, or on its own
        config |= {item.key: json.loads(item.value_json) for item in updates}
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        history += [row] if row else []
        summary |= {item.key: json.loads(item.value_json) for item in record.summary.update if item.key}
    assert config["algorithm"] == "iql" and config["expectile"] == 0.7
    assert summary["final_return_mean"] == json.loads((tmp_path / "run/result.json").read_text())["final_return_mean"]
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [row["step"] for row in history] == [10, 20]
    assert history[1]["critic/loss"] == pytest.approx(float(rows[1]["critic/loss"]))
    assert history[1]["eval/score"] == pytest.approx(float(rows[1]["eval/score"]))


class Recorder:
    """Stands for wandb's run."""

    def __init__(self):
        self.settings, self.rows, self.summary, self.finished, self.resumed = {}, [], {}, 0, True
        self.axes = {}

    def init(self, **settings):
        self.settings = settings
        return self

    def define_metric(self, names, step_metric=None):
        self.axes[names] = step_metric

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished += 1


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr("wandb.init", recorder.init)
    return recorder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("tracked") / "run"
    words = ["--num-updates", "30", "--log-every", "10", "--run-dir", str(run_dir), "--wandb-project", "mine"]
    assert run_script("bc", *words, *SHORT).returncode == 0
    return run_dir


def test_a_finished_run_is_shown_whole(run_dir, recorder, monkeypatch):
    monkeypatch.chdir(run_dir.parent)
    assert run_script("track", "run").returncode == 0
    assert [row["step"] for row in recorder.rows] == [10, 20, 30] and recorder.finished == 1
    assert recorder.summary["num_updates"] == 30 and "final_returns" not in recorder.summary
    assert recorder.axes == {"*": "step", "dynamics/*": "seconds"}  # all epochs of a model are of step 0
    assert recorder.settings["config"]["algorithm"] == "bc" and recorder.settings["project"] == "mine"
    assert recorder.settings["dir"] == run_dir and recorder.settings["name"] == "bc-run"  # from wherever W&B writes


def test_a_resumed_run_goes_on_with_what_is_new(run_dir, recorder):
    assert run_script("track", str(run_dir), "--skip", "2").returncode == 0
    assert [row["step"] for row in recorder.rows] == [30]


def test_what_is_new_to_wandb_gets_all_rows(run_dir, recorder):
    """A training that was killed alone let its tracker end the run of W&B's: resumed, it is another one."""
    recorder.resumed = False
    assert run_script("track", str(run_dir), "--skip", "2").returncode == 0
    assert [row["step"] for row in recorder.rows] == [10, 20, 30]


def test_the_result_of_a_shorter_run_is_not_this_ones(run_dir, recorder):
    arguments = json.loads((run_dir / "args.json").read_text()) | {"num_updates": 60}
    track.follow(run_dir, arguments, 0)
    assert len(recorder.rows) == 3 and not recorder.summary


def test_rows_are_shown_as_they_come(tmp_path, recorder):
    def shown(count):
        began = time.monotonic()
        while len(recorder.rows) < count and time.monotonic() - began < 20:
            time.sleep(0.02)
        return [row["step"] for row in recorder.rows]

    arguments = dict.fromkeys(("algorithm", "wandb_project", "wandb_group", "wandb_entity", "num_updates"))
    metrics = tmp_path / "metrics.csv"
    with FileLock(tmp_path / ".lock"):
        thread = threading.Thread(target=track.follow, args=(tmp_path, arguments, 0))
        thread.start()
        metrics.write_text("step,loss\n1,0.5\n2,0.2")  # the last line is still being written
        assert shown(1) == [1]
        metrics.write_text("step,loss,eval/score\n1,0.5,\n2,0.25,\n3,0.125,7\n")
        assert shown(3) == [1, 2, 3] and thread.is_alive() and not recorder.finished
        with metrics.open("a") as file:
            file.write("4,0.1,\n")
    thread.join(20)
    assert not thread.is_alive() and recorder.finished == 1
    assert recorder.rows[1:] == [
        {"step": 2, "loss": 0.25},
        {"step": 3, "loss": 0.125, "eval/score": 7},
        {"step": 4, "loss": 0.1},
    ]


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_an_outage_is_one_warning(where, run_dir, recorder, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no server")

    monkeypatch.setattr(recorder, where, fail)
    monkeypatch.setattr("wandb.init", recorder.init)
    run = run_script("track", str(run_dir))
    assert run.returncode == 0 and run.stderr.count("\n") == 1
    assert "warning: W&B failed (ConnectionError('no server')): training goes on without it" in run.stderr
    assert bool(recorder.summary) == (where == "finish")


def stand_in(folder, body):
    """The environment of a process that imports this as wandb."""
    folder.mkdir()
    (folder / "wandb.py").write_text(f"import time\ndef init(**settings):\n    {body}\n")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def test_it_gives_up_on_what_hangs(run_dir, tmp_path):
    environment = os.environ | stand_in(tmp_path / "wandb", "time.sleep(600)")
    command = [sys.executable, track.__file__, str(run_dir), "--patience", "0.3"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and run.stderr.count("\n") == 1
    assert "W&B failed (no answer in 0.3 s): the run is complete without it" in run.stderr


def test_it_gives_up_on_nothing_that_is_done(run_dir, recorder, monkeypatch):
    ended = []
    monkeypatch.setattr("os._exit", ended.append)
    assert run_script("track", str(run_dir), "--patience", "0.2").returncode == 0
    time.sleep(0.6)
    assert recorder.finished == 1 and not ended


def test_an_outage_does_not_reach_the_training(tmp_path, capfd):
    environment = stand_in(tmp_path / "wandb", "raise OSError('no network')")
    words = ["--num-updates", "10", "--track", "--run-dir", str(tmp_path / "run")]
    run = run_script("bc", *words, *SHORT, **environment)
    assert run.returncode == 0 and "warning" not in run.stderr
    assert (tmp_path / "run" / "result.json").exists()
    assert capfd.readouterr().err.count("warning: W&B failed (OSError('no network')): training goes on") == 1


def test_no_tracker_is_one_line_before_the_run(tmp_path, monkeypatch):
    """As beside a copy of a script and common/ alone."""
    assert track.__file__ == str(TRACKER)
    monkeypatch.setattr("common.command_line.TRACKER", tmp_path / "track.py")
    run = run_script("bc", "--track", "--run-dir", str(tmp_path / "run"))
    assert_one_line(run, f"--track True: there is no {tmp_path}/track.py: copy it, too")
    assert not (tmp_path / "run").exists()


def test_no_run_is_one_line(tmp_path):
    assert_one_line(run_script("track", str(tmp_path / "none")), "no run in .*none: .*No such file")
    (tmp_path / "args.json").write_text("{}")
    assert_one_line(run_script("track", str(tmp_path)), "args.json is not of a run")
