"""Nothing lost: kills, signals, damaged files, full disks, and a second process in the same folder."""

import contextlib
import errno
import importlib
import io
import json
import os
import pathlib
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time

import bc
import cql
import iql
import mopo
import pytest
import torch
import trained_run
from conftest import (
    MODEL,
    ROOT,
    SCRIPTS,
    SHORT,
    Started,
    assert_one_line,
    assert_same,
    assert_same_runs,
    checkpoint,
    run_script,
    what_it_needs,
)
from scratch import scratch_folder

from common.command_line import BadInput
from common.evaluation import evaluate, load_file, load_policy
from common.experiment import Run
from common.optim import Adam

every_script = pytest.mark.parametrize("algorithm", SCRIPTS)

# --- Kills ---


KILLED = "iql", "bcq", "mopo", "sac", "fqe"  # one of each kind of learner; the slow test below kills every script


@every_script
def test_a_run_that_crashed_resumes_to_the_same_bits(algorithm, tmp_path, monkeypatch):
    """Somewhere after a checkpoint nothing more is saved; compare with the run that was never stopped."""
    arguments = ["--num-updates", "60", "--checkpoint-every", "15", "--log-every", "7", "--eval-every", "40", *SHORT]
    arguments += ["--batch-size", "32", *what_it_needs(algorithm, tmp_path)]
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    assert run_script(algorithm, *arguments, "--run-dir", str(whole)).returncode == 0

    record = Run.record

    def crash(run, step, metrics):
        assert step < 50, "the crash"
        record(run, step, metrics)

    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="the crash"):
        patch.setattr(Run, "record", crash)
        run_script(algorithm, *arguments, "--run-dir", str(crashed))
    assert checkpoint(crashed)["step"] == 45
    with (crashed / "metrics.csv").open("a") as file:
        file.write("57,0.1,half a ro")  # as a kill in the middle of a write leaves it
    run = run_script(algorithm, *arguments, "--run-dir", str(crashed), "--resume")
    assert run.returncode == 0, run.stderr
    assert_same_runs(whole, crashed)


@pytest.mark.parametrize("algorithm", KILLED)
def test_a_killed_run_resumes_to_the_same_bits(algorithm, tmp_path):
    """Kill -9 somewhere after a checkpoint, in a process of its own."""
    arguments = ["--num-updates", "300", "--checkpoint-every", "30", "--log-every", "7", "--eval-every", "110", *SHORT]
    arguments += ["--batch-size", "32", *what_it_needs(algorithm, tmp_path)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_script(algorithm, *arguments, "--run-dir", str(whole)).returncode == 0
    process = Started(algorithm, *arguments, "--run-dir", str(killed))
    while not (killed / "metrics.csv").exists() or checkpoint(killed)["step"] == 0:
        assert process.poll() is None
        time.sleep(0.005)
    kill(process)
    assert checkpoint(killed)["step"] < 300
    with (killed / "metrics.csv").open("a") as file:
        file.write("291,0.1,half a ro")  # as a kill in the middle of a write leaves it
    run = run_script(algorithm, *arguments, "--run-dir", str(killed), "--resume")
    assert run.returncode == 0, run.stderr
    assert_same_runs(whole, killed)


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@every_script
def test_a_run_killed_seven_times_at_random_resumes_to_the_same_bits(algorithm, tmp_path):
    """Rows, evaluations, checkpoints and epochs of the model come so often that kills hit all of them."""
    arguments = ["--num-updates", "300", "--checkpoint-every", "3", "--log-every", "2", "--eval-every", "10", *SHORT]
    arguments += [
        *what_it_needs(algorithm, tmp_path),
        *(
            ["--max-dynamics-epochs", "10"]
            if algorithm in ("mopo", "combo", "mobile", "morel", "mve", "naf", "mbpo")
            else []
        ),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_script(algorithm, *arguments, "--run-dir", str(whole)).returncode == 0
    seconds = json.loads((whole / "result.json").read_text())["wall_seconds"]
    rng, moments = random.Random(algorithm), []
    for _ in range(7):
        begun = (killed / "checkpoint.pt").exists()
        before = (killed / "args.json").stat().st_mtime_ns if begun else 0
        words = [*arguments, "--resume"] if begun else arguments
        process = Started(algorithm, *words, "--run-dir", str(killed))
        while not (killed / "args.json").exists() or (killed / "args.json").stat().st_mtime_ns == before:
            assert process.poll() is None, process.wait()
            time.sleep(0.002)
        time.sleep(rng.uniform(0, seconds / 10))  # from here on it trains
        assert process.poll() is None, f"done before the kill after {moments}"
        kill(process)
        moments.append(checkpoint(killed)["step"] if (killed / "checkpoint.pt").exists() else None)
    words = [*arguments, "--resume"] if (killed / "checkpoint.pt").exists() else arguments
    assert run_script(algorithm, *words, "--run-dir", str(killed)).returncode == 0, moments
    assert_same_runs(whole, killed)


def test_a_run_killed_before_its_first_checkpoint_is_due_can_be_resumed(tmp_path):
    """While it lives, no second process may touch its folder."""
    folder = tmp_path / "run"
    process = Started("bc", "--num-updates", "100000", "--run-dir", str(folder), *SHORT)
    wait_for_row(process, folder, 100)
    files_before = {path.name for path in folder.iterdir()}
    for arguments in ([*SHORT, "--resume"], SHORT):
        run = run_script("bc", *arguments, "--num-updates", "20", "--run-dir", str(folder))
        assert_one_line(run, "--run-dir .*: another process is at work in it")
    assert process.poll() is None and {path.name for path in folder.iterdir()} == files_before
    kill(process)
    run = run_script("bc", "--num-updates", "20", *SHORT, "--resume", "--run-dir", str(folder))
    assert run.returncode == 0, run.stderr
    assert checkpoint(folder)["step"] == 20


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    """A kill between args.json and the checkpoint leaves nothing to resume, and nothing that stands in the way."""
    folder = tmp_path / "run"
    assert run_script("bc", "--num-updates", "3", "--run-dir", str(folder), *SHORT).returncode == 0
    for path in set(folder.iterdir()) - {folder / "args.json"}:
        path.unlink()
    assert_one_line(run_script("bc", "--resume", "--run-dir", str(folder)), "no checkpoint at .*or go without")
    assert run_script("bc", "--num-updates", "4", "--run-dir", str(folder), *SHORT).returncode == 0
    assert checkpoint(folder)["step"] == 4


# --- Signals ---


def stop(process, number):
    """Sends a signal and takes the seconds until the process has ended. Returns its last line."""
    began = time.monotonic()
    process.send_signal(number)
    code, errors = process.wait(timeout=60)
    assert time.monotonic() - began < 5
    assert code == 128 + number, errors
    assert "Traceback" not in errors
    return errors.splitlines()[-1]


def wait_for_row(process, folder, step):
    """Until metrics.csv has the row of that update."""
    while not (folder / "metrics.csv").exists() or f"\n{step}," not in (folder / "metrics.csv").read_text():
        assert process.poll() is None, process.wait()
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint(number, tmp_path):
    arguments = ["--num-updates", "1000000", "--checkpoint-every", "1000000", "--run-dir", str(tmp_path / "run")]
    process = Started("iql", *arguments, *SHORT)
    wait_for_row(process, tmp_path / "run", 100)
    step = checkpoint(tmp_path / "run")["step"]
    assert step == 0
    line = stop(process, number)
    step = checkpoint(tmp_path / "run")["step"]
    assert step >= 100 and line.startswith(f"interrupted at update {step}; to go on, add --resume --run-dir")


def test_a_signal_in_an_evaluation_loses_neither_update_nor_row(tmp_path, monkeypatch):
    """The evaluation is ended, and its row written, before the checkpoint."""
    arguments = ["--num-updates", "8", "--checkpoint-every", "100", "--log-every", "1", "--eval-every", "5", *SHORT]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert run_script("td3_bc", *arguments, "--run-dir", str(whole)).returncode == 0

    def interrupted(*evaluation, **options):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*evaluation, **options)

    with monkeypatch.context() as patch:
        patch.setattr("common.experiment.evaluate", interrupted)
        run = run_script("td3_bc", *arguments, "--run-dir", str(stopped))
    assert run.returncode == 128 + signal.SIGTERM
    line = run.stderr.splitlines()[-1]
    assert line.startswith("interrupted at update 5; to go on, add --resume") and checkpoint(stopped)["step"] == 5
    assert run_script("td3_bc", *arguments, "--resume", "--run-dir", str(stopped)).returncode == 0
    assert_same_runs(whole, stopped)


def test_a_second_signal_ends_a_long_evaluation(tmp_path):
    arguments = ["--num-updates", "8", "--eval-every", "5", "--log-every", "1", "--eval-episodes", "1500"]
    process = Started("td3_bc", *arguments, "--hidden-dims", "16", "--run-dir", str(tmp_path / "run"))
    wait_for_row(process, tmp_path / "run", 4)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait()[0] == -signal.SIGTERM and checkpoint(tmp_path / "run")["step"] == 0


def test_a_signal_before_the_first_update(tmp_path, monkeypatch):
    def load_dataset(*_):
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("bc.load_dataset", load_dataset)
    run = run_script("bc", "--run-dir", str(tmp_path / "run"))
    assert run == (143, "", "interrupted\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


SWALLOWED = """
import os, runpy, signal, sys
from common import data

class Gone:  # as an object of h5py is: what is raised in its finaliser is lost
    def __del__(self):
        os.kill(os.getpid(), signal.{name})

def load(self, *arguments):
    Gone()
    fill(self, *arguments)

fill, data.ReplayBuffer.__init__ = data.ReplayBuffer.__init__, load
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_data_load_is_not_lost(name, tmp_path):
    """It comes in a finaliser, from which no exception gets out: the run ends where it would begin."""
    words = [str(ROOT / "algorithms" / "bc.py"), "--num-updates", "100000", "--run-dir", str(tmp_path / "run"), *SHORT]
    code = f"import sys; sys.argv[:1] = []\n{SWALLOWED.format(name=name)}"
    run = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 128 + getattr(signal, name), run.stderr
    assert run.stderr.splitlines()[-1].startswith("interrupted at update 0; to go on")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1, 6, 15])
def test_a_signal_while_the_graph_is_made(seconds, tmp_path):
    """--compile takes about half a minute for its first calls."""
    words = ["--no-cosine-decay", *SHORT, "--run-dir", str(tmp_path / "run")]
    process = Started("iql", "--compile", "--num-updates", "100000", *words)
    while not (tmp_path / "run" / "args.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait()[0] in (-signal.SIGTERM, 128 + signal.SIGTERM)
    resumed = run_script("iql", "--resume", "--num-updates", "9", *words)
    assert resumed.returncode == 0, resumed.stderr


def test_a_run_goes_on_where_fewer_gpus_are_seen(tmp_path, pendulum, monkeypatch):
    """A checkpoint has the state of each, and a run is on the first."""
    monkeypatch.setattr("common.experiment.make_environments", lambda *_: None)
    run = small_run(tmp_path, pendulum)
    run.record(1, {"actor/loss": 1})
    run.lock.release()
    saved, states = torch.load(tmp_path / "checkpoint.pt"), [torch.full((16,), n, dtype=torch.uint8) for n in (1, 2)]
    torch.save(saved | {"random_state": [saved["random_state"][0], *states]}, tmp_path / "checkpoint.pt")
    found = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", found.extend)
    resumed = small_run(tmp_path, pendulum, resume=True)
    resumed.lock.release()
    assert len(found) == 1 and torch.equal(found[0], states[0])


# --- Threads ---


class Machine:
    """A clock and PyTorch's threads, of which an update takes `cost` seconds each."""

    def __init__(self, monkeypatch, cost):
        self.cost, self.now, self.threads = cost, 0.0, 4
        monkeypatch.setattr("common.experiment.time.perf_counter", lambda: self.now)
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.threads)
        monkeypatch.setattr(torch, "set_num_threads", lambda count: setattr(self, "threads", count))

    def update(self, run, step):
        self.now += self.cost[self.threads]
        run.record(step, {})


def quiet(**changes):
    """A run that records nothing but its updates."""
    every = dict.fromkeys(("num_updates", "eval_every", "log_every", "checkpoint_every"), 10**5)
    return every | changes


@pytest.mark.parametrize("before", [0, 114, 150])
def test_an_update_is_made_with_as_many_threads_as_are_fastest(before, tmp_path, pendulum, monkeypatch):
    """After `before` updates of an earlier process, which may have ended amid a trial, too."""
    monkeypatch.setattr("common.experiment.make_environments", lambda *_: None)
    monkeypatch.delenv("OMP_NUM_THREADS")
    machine = Machine(monkeypatch, {1: 1.0, 4: 0.5})
    run = small_run(tmp_path / "run", pendulum, **quiet())
    run.first_step, run.update_seconds = before + 1, 0.5 * before
    used = []
    for step in range(1, 9001):
        if step == 3000:
            machine.cost = {1: 1.1, 4: 30.0}  # another program takes one of the cores
        if step == 6000:
            machine.cost = {1: 1.0, 4: 0.5}
        used.append(machine.threads)
        machine.update(run, before + step)
    run.lock.release()
    assert used[:100] == [4] * 100 and used[100:130] == [1] * 30 and used[130:3100] == [4] * 2970
    assert used[3130:3160] == [4] * 30 and used[3160:6130] == [1] * 2970 and used[6160:] == [4] * 2840


@pytest.mark.parametrize("changes", [{"compile": True}, {"batch_size": 2048}, {}])
def test_threads_that_are_chosen_stay_and_where_sums_would_differ(changes, tmp_path, pendulum, monkeypatch):
    monkeypatch.setattr("common.experiment.make_environments", lambda *_: None)
    if changes:
        monkeypatch.delenv("OMP_NUM_THREADS")
    machine = Machine(monkeypatch, {1: 1.0, 4: 30.0})
    run = small_run(tmp_path / "run", pendulum, **quiet(**changes))
    for step in range(1, 201):
        machine.update(run, step)
    run.lock.release()
    assert machine.threads == 4


@pytest.mark.parametrize(
    ("hidden_dims", "batch_size", "threads"),
    [((200, 200), 256, 8), ((100, 100), 64, 8), ((64, 64), 32, 6), ((256, 256), 4, 2)],
)
def test_threads_stay_where_any_product_of_an_update_depends_on_them(
    hidden_dims, batch_size, threads, tmp_path, pendulum, monkeypatch
):
    """On some processors also a layer's output and its inputs' gradient do, and those of the critics, one to a twin."""
    monkeypatch.setattr("common.experiment.make_environments", lambda *_: None)
    monkeypatch.delenv("OMP_NUM_THREADS")
    args = iql.Args(run_dir=tmp_path / "run", hidden_dims=hidden_dims, batch_size=batch_size)
    before, weights = torch.get_num_threads(), []
    try:
        torch.set_num_threads(threads)
        run = Run(args, pendulum, iql.build(3, 1, args, torch.device("cpu"), Adam), iql.update)
        run.lock.release()
        run.progress.close()
        for count in (1, threads):
            torch.set_num_threads(count)
            torch.manual_seed(0)
            learner = iql.build(3, 1, args, torch.device("cpu"), Adam)
            for step in range(1, 6):
                iql.update(learner, pendulum.sample(batch_size), step, args)
            weights.append(torch.cat([weight.flatten() for weight in learner.critic.parameters()]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*weights) or run.threads == 1


def test_threads_stay_in_a_run_with_a_model(tmp_path, pendulum, monkeypatch):
    """The last bits of many SiLUs depend on where the threads divide them, and how many there are changes as rollouts
    end."""
    monkeypatch.setattr("common.experiment.make_environments", lambda *_: None)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for script, expected in ((mopo, 1), (bc, 2)):
        args = script.Args(run_dir=tmp_path / script.__name__, hidden_dims=(4,))
        run = Run(args, pendulum, script.build(3, 1, args, torch.device("cpu"), Adam), script.update)
        run.lock.release()
        run.progress.close()
        assert run.threads == expected


def test_the_number_of_threads_changes_no_bit_where_it_may_change(pendulum, tmp_path, monkeypatch):
    """The gradient of a layer with few outputs, [outputs, batch] @ [batch, width], has another order of sums with more
    threads on some processors: there the number stays."""
    monkeypatch.setattr("common.experiment.make_environments", lambda *_: None)
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for number, outputs in enumerate(range(1, 40)):
            args = bc.Args(run_dir=tmp_path / str(number), hidden_dims=(64,))
            run = Run(args, pendulum, bc.build(3, outputs, args, torch.device("cpu"), Adam), bc.update)
            assert torch.get_num_threads() == 2
            run.lock.release()
            run.progress.close()
            gradients = []
            for count in (1, 2):
                torch.set_num_threads(count)
                generator = torch.Generator().manual_seed(number)
                inputs, slopes = (torch.randn(256, size, generator=generator) for size in (64, outputs))
                gradients.append(slopes.T @ inputs)
            assert torch.equal(*gradients) or run.threads == 1, outputs
    finally:
        torch.set_num_threads(threads)


def test_the_sums_of_a_layer_with_few_outputs_are_the_same_with_one_thread_and_with_two():
    """On AMD's processors MKL split them by the number of threads, until it was told to keep their order. It is told
    before its first product, hence the process of its own."""
    lines = """
        import torch
        from algorithms.bc import Args
        from common.experiment import set_up
        set_up(Args(device="cpu"))
        for outputs in range(1, 40):
            slopes, inputs = (torch.arange(256 * size).sin().view(256, size) for size in (outputs, 256))
            gradients = []
            for count in (1, 2):
                torch.set_num_threads(count)
                gradients.append(slopes.T @ inputs)
            assert torch.equal(*gradients), outputs
    """
    cpu = pathlib.Path("/proc/cpuinfo")
    if not (torch.backends.mkl.is_available() and cpu.exists() and "AMD" in cpu.read_text()):
        pytest.skip("sums of another library or on another processor")
    environment = {name: value for name, value in os.environ.items() if name not in ("MKL_CBWR", "OMP_NUM_THREADS")}
    command = [sys.executable, "-c", textwrap.dedent(lines)]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_densities_and_weights_of_many_actions_have_the_same_bits_with_any_number_of_threads():
    """More than 32,768 numbers are divided. Softplus and softmax have other last bits where a share ends, which is no
    multiple of a register."""
    generator = torch.Generator().manual_seed(0)
    noise, u = (torch.randn(10, 256, 28, generator=generator) for _ in range(2))
    q, threads, found = torch.randn(2, 30, 1000, generator=generator), torch.get_num_threads(), []
    try:
        for count in (1, 3, 5, 7):
            torch.set_num_threads(count)
            found.append((cql.squashed_log_prob(noise, torch.ones(()), 3 * u), cql.adversary_rho(3 * q)))
    finally:
        torch.set_num_threads(threads)
    for density, weighted in found[1:]:
        assert torch.equal(density, found[0][0]) and torch.equal(weighted, found[0][1])


def learns_a_model(algorithm):
    return "dynamics" in importlib.import_module(algorithm).Learner._fields


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [name for name in SCRIPTS if name != "fqe"])
def test_an_update_has_the_same_bits_with_any_number_of_threads(algorithm):
    """With the default sizes, unless its run keeps the number of threads."""
    if "run.threads = 1" in (ROOT / "algorithms" / f"{algorithm}.py").read_text() or learns_a_model(algorithm):
        pytest.skip("its runs keep the number of threads")
    lines = f"""
        import os
        os.environ["MKL_CBWR"] = "AUTO"  # as a run does
        import torch
        from benchmarks.measurements import gpu
        torch.set_flush_denormal(True)
        weights = []
        for count in (1, 2, 3, 6):
            torch.set_num_threads(count)
            weights.append(gpu.trained("{algorithm}", "cpu", "eager", count=2)[1])
        assert all(torch.equal(weights[0], others) for others in weights[1:])
    """
    command = [sys.executable, "-c", textwrap.dedent(lines)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


# --- Damaged files ---


def small_run(folder, pendulum, **changes):
    every = {"num_updates": 9, "log_every": 1, "checkpoint_every": 1}
    args = bc.Args(run_dir=folder, hidden_dims=(4,), **(every | changes))
    return Run(args, pendulum, bc.build(3, 1, args, torch.device("cpu"), Adam), bc.update)


def test_a_damaged_checkpoint_is_refused(tmp_path, pendulum, monkeypatch):
    """50 cuts and 50 flipped bits at random places: no damage is taken for a checkpoint."""
    monkeypatch.setattr("common.experiment.make_environments", lambda *_: None)
    run = small_run(tmp_path, pendulum)
    for step in (1, 2):
        run.record(step, {"actor/loss": step})
    run.lock.release()
    newest, rows = (tmp_path / "checkpoint.pt").read_bytes(), (tmp_path / "metrics.csv").read_text()
    expected = checkpoint(tmp_path)["learner"]
    rng, unharmed = random.Random(0), 0
    for case in range(100):
        place = rng.randrange(len(newest))
        flipped = newest[:place] + bytes([newest[place] ^ 1 << rng.randrange(8)]) + newest[place + 1 :]
        (tmp_path / "checkpoint.pt").write_bytes(newest[:place] if case < 50 else flipped)
        (tmp_path / "metrics.csv").write_text(rows)
        try:
            run = small_run(tmp_path, pendulum, resume=True)
        except BadInput as error:
            assert re.match(r"--resume: .* start a new run: cannot read \S+/checkpoint.pt: ", str(error)), error
        else:  # a bit of the padding or of the time that zip files hold
            run.lock.release()
            unharmed += 1
            assert case >= 50 and run.step == 2
            assert_same({name: part.state_dict() for name, part in run.parts.items()}, expected)
        assert (tmp_path / "metrics.csv").read_text() == rows
    assert unharmed < 40
    (tmp_path / "checkpoint.pt").write_bytes(newest)
    (tmp_path / "metrics.csv").unlink()  # the checkpoint has its rows
    run = small_run(tmp_path, pendulum, resume=True)
    run.lock.release()
    assert (tmp_path / "metrics.csv").read_text() == rows


def test_a_part_that_is_marked_as_a_folder_is_damage(tmp_path):
    """One bit in the list of a file's parts: of such a part PyTorch reads nothing, and checksums do not tell."""
    torch.save({"weight": torch.ones(3)}, tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    places = [match.start() + 38 for match in re.finditer(b"PK\x01\x02", good)]
    assert len(places) > 2 and load_file(tmp_path / "good.pt")["weight"].sum() == 3
    for place in places:
        (tmp_path / "bad.pt").write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
        with pytest.raises(BadInput, match=r"bad\.pt: a part of it is damaged"):
            load_file(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    ("tool", "name", "content", "message"),
    [
        ("watch", "args.json", {"env_id": [1]}, "must be texts"),
        ("watch", "args.json", {"dataset_id": None}, "must be texts"),
        ("watch", "args.json", [], "cannot read .*args.json"),
        ("shift_report", "args.json", {"tau": 7}, "cannot read .*args.json: --tau 7: must be"),
        ("shift_report", "metrics.csv", "step,critic/q\nx,1\n", "cannot read the run .*could not convert"),
        ("shift_report", "metrics.csv", "critic/q\n1\n", "cannot read the run .*lacks its step"),
        ("shift_report", "metrics.csv", "step,critic/q\n1,2,3\n", "cannot read the run in"),
        ("shift_report", "checkpoint.pt", {"learner": None}, "cannot read the run in"),
        ("shift_report", "checkpoint.pt", {"learner": {"actor": {}, "critic": None}}, "checkpoint.pt does not fit"),
    ],
)
def test_a_damaged_run_is_one_line(tool, name, content, message, tmp_path):
    pytest.importorskip("pygame")
    folder = tmp_path / "run"
    assert run_script("iql", "--num-updates", "3", "--run-dir", str(folder), *SHORT).returncode == 0
    if name == "checkpoint.pt":
        torch.save(checkpoint(folder) | content, folder / name)
    elif isinstance(content, str):
        (folder / name).write_text(content)
    else:
        saved = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(saved | content if content else content))
    assert_one_line(
        run_script(tool, str(folder), "--out", str(tmp_path / ("a.gif" if tool == "watch" else "a.png"))), message
    )


# --- Disks ---


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_disk_that_takes_no_more_is_one_line(number, tmp_path, monkeypatch):
    """After the checkpoint of update 3 the disk fails: it is intact, alone, and can be resumed from."""

    def fsync(file):
        if any(path.exists() and checkpoint(tmp_path)["step"] == 3 for path in [tmp_path / "checkpoint.pt"]):
            raise OSError(number, os.strerror(number))

    arguments = ["--num-updates", "9", "--checkpoint-every", "3", "--log-every", "1", "--run-dir", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fsync)
        run = run_script("bc", *arguments, *SHORT)
    assert run.returncode == 1
    pattern = rf"^error: cannot write \S+ \({os.strerror(number)}\): make room; trainings go on with --resume --run-dir"
    assert re.search(pattern, run.stderr.splitlines()[-1]) and "Traceback" not in run.stderr
    assert checkpoint(tmp_path)["step"] == 3 and [path.name for path in tmp_path.glob(".*")] == [".lock"]
    assert run_script("bc", *arguments, *SHORT, "--resume").returncode == 0


@pytest.mark.parametrize("program", ["algorithms/bc.py", "benchmarks/inspect_dataset.py"])
def test_output_that_nobody_takes_is_one_line(program, tmp_path):
    """A full disk behind > and, of a tool, a pipe that is closed. What a run has saved is kept."""
    training = ["--num-updates", "3", "--run-dir", str(tmp_path / "run"), *SHORT]
    words = [sys.executable, program, *(training if "bc" in program else ["anchorl/pendulum/mixed-v0"])]
    with open("/dev/full", "w") as full:
        run = subprocess.run(words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 1 and run.stderr.splitlines()[-1] == "error: [Errno 28] No space left on device"
    assert "Traceback" not in run.stderr and "ignored" not in run.stderr
    if "bc" in program:
        assert (tmp_path / "run" / "result.json").exists()
    else:
        run = subprocess.run(f"{' '.join(words)} | head -1", shell=True, cwd=ROOT, capture_output=True, text=True)
        assert run.stderr == "error: [Errno 32] Broken pipe\n" and run.stdout.count("\n") == 1


@pytest.mark.parametrize("limit", [5_000, 40_000])
def test_a_quota_is_one_line(limit, tmp_path, pendulum):
    """The first checkpoint has more than 5,000 bytes; metrics.csv gets to 40,000 after some 800 rows."""
    folder = tmp_path / "run"
    arguments = ["--num-updates", "5000", "--log-every", "1", "--checkpoint-every", "100", "--run-dir", str(folder)]
    command = [sys.executable, str(ROOT / "algorithms" / "bc.py"), *arguments, "--eval-every", "5000", *SHORT]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stderr
    assert re.search(r"^error: cannot write \S+ \(File too large\)", run.stderr.splitlines()[-1]), run.stderr
    if limit > 5_000:
        step = checkpoint(folder)["step"]
        assert step >= 300 and step % 100 == 0
        again = run_script("bc", "--resume", "--num-updates", str(step + 2), *SHORT, "--run-dir", str(folder))
        assert again.returncode == 0, again.stderr


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    run = run_script("bc", "--run-dir", str(tmp_path / "file" / "run"))
    assert_one_line(run, r"--run-dir \S+/file/run: .*it cannot be written to.*Not a directory")


def grid_row(folder):
    """What benchmarks/run.py leaves of one cell."""
    folder.mkdir()
    row = "bc,anchorl/pendulum/mixed-v0,0,10,50,-300\n"
    (folder / "evaluations.csv").write_text(f"algorithm,dataset_id,seed,num_updates,score,return_mean\n{row}")
    return str(folder)


@pytest.mark.parametrize("place", ["full", "gone"])
@pytest.mark.parametrize("tool", ["report", "inspect_dataset", "watch", "shift_report", "run"])
def test_a_tool_on_a_disk_that_takes_no_more_is_one_line(tool, place, tmp_path, monkeypatch):
    """Its picture or table fails in the middle of a write or, on a disk that turned read-only, at the first one."""
    folder, runs = tmp_path / "out", tmp_path / "run"
    folder.mkdir()
    if tool in ("watch", "shift_report"):
        pytest.importorskip("pygame")
        assert run_script("bc", "--num-updates", "3", "--run-dir", str(runs), *SHORT).returncode == 0
    words = {
        "report": [grid_row(tmp_path / "grid"), "--out", str(folder)],
        "inspect_dataset": ["anchorl/pendulum/mixed-v0", "--out", str(folder / "a.png")],
        "watch": [str(runs), "--out", str(folder / "a.gif"), "--max-steps", "2"],
        "shift_report": [
            *(str(runs), "--out", str(folder / "a.png")),
            *("--num-states", "50", "--num-updates", "1", "--eval-episodes", "0"),
        ],
        "run": ["--algorithms", "bc", "--seeds", "1", "--out", str(folder)],
    }
    number = errno.ENOSPC if place == "full" else errno.EROFS
    open_file = pathlib.Path.open

    class Full(io.RawIOBase):
        def writable(self):
            return True

        def write(self, _):
            raise OSError(number, os.strerror(number))

    def open_full(path, mode="r", *arguments, **options):
        if folder not in path.parents or "w" not in mode:
            return open_file(path, mode, *arguments, **options)
        if place == "gone":
            raise OSError(number, os.strerror(number))
        open_file(path, mode).close()  # the name fits, what is in the file does not
        return io.BufferedWriter(Full())

    monkeypatch.setattr(pathlib.Path, "open", open_full)
    outcome = run_script(tool, *words[tool])
    assert outcome.returncode == 1, outcome
    pattern = rf"error: cannot write {folder}/\S+ \({os.strerror(number)}\): make room, or name another place\n"
    assert re.fullmatch(pattern, outcome.stderr), outcome.stderr
    assert [path.name for path in folder.iterdir() if path.name != ".lock"] == []


def test_what_a_killed_tool_left_is_gone_with_the_next(tmp_path):
    """Unless it is still at work: its folder aside has a lock, which ends with it."""
    (tmp_path / ".making-old").mkdir()
    (tmp_path / ".making-old" / "half").touch()
    code = f"import scratch, time, pathlib\nwith scratch.scratch_folder(pathlib.Path({str(tmp_path)!r})):\n"
    code += "    print('made', flush=True); time.sleep(60)"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout.read(5) == b"made\n"
        (killed,) = tmp_path.iterdir()  # the old one is gone
        with scratch_folder(tmp_path) as ours:
            assert {*tmp_path.iterdir()} == {killed, ours}
        assert [*tmp_path.iterdir()] == [killed]
        process.kill()
    with scratch_folder(tmp_path) as ours:
        assert [*tmp_path.iterdir()] == [ours]
    assert [*tmp_path.iterdir()] == []


# --- No code from files ---


class Payload:
    """Touches a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def write_pickle(path, content):
    path.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("write", [write_pickle, lambda path, content: torch.save(content, path)])
def test_a_payload_is_refused_and_not_run(write, tmp_path, pendulum):
    folder, touched = tmp_path / "run", tmp_path / "touched"
    assert run_script("bc", "--num-updates", "3", "--run-dir", str(folder), *SHORT).returncode == 0
    for name in ("checkpoint.pt", "policy.pt"):
        write(folder / name, {"actor": Payload(touched)})
    assert_one_line(run_script("bc", "--resume", "--run-dir", str(folder), *SHORT), "cannot read .*checkpoint.pt")
    with pytest.raises(BadInput, match=r"cannot read .*policy.pt"):
        load_policy(folder)
    arguments = ["--dynamics", str(folder), "--run-dir", str(tmp_path / "other")]
    assert_one_line(run_script("mopo", *arguments, *SHORT, *MODEL), "--dynamics .*cannot read .*checkpoint.pt")
    assert not touched.exists()
    with (folder / "policy.pt").open("rb") as file, contextlib.suppress(Exception):
        pickle.load(file) if write is write_pickle else torch.load(folder / "policy.pt", weights_only=False)
    assert touched.exists()  # the payload is a real one


@pytest.mark.parametrize("algorithm", ["bc", "sac"])  # which has an environment as default
def test_a_module_is_imported_only_if_the_command_line_names_it(algorithm, tmp_path):
    """A run folder from elsewhere must not be able to have one imported by a tool that reads it."""
    saved, args_class = {"env_id": "evil:Env-v0", "eval_every": 7}, importlib.import_module(algorithm).Args
    with pytest.raises(BadInput, match="give --env-id evil:Env-v0 again, or another one"):
        trained_run.arguments(args_class, saved, tmp_path, None)
    args = trained_run.arguments(args_class, saved, tmp_path, "CartPole-v1")
    assert args.eval_every == 7 and args.env_id == "CartPole-v1"
