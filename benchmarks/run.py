"""Runs algorithms x datasets x seeds, each cell the ordinary script in a process and a run folder of its own.

Stop the command and give it again: finished cells are skipped, others go on from their checkpoints. A cell that fails
is tried once more, unless it diverged, then reported with its log; it never stops the others. After each cell there are

    OUT/results.csv       a row per cell: what its result.json holds, its run folder or, as `problem`, what went wrong
    OUT/evaluations.csv   a row per evaluation of the cells that ended well: the learning curves

of all cells in OUT, earlier commands' too. The last lines name those that did not end well, which report.py counts as
failed, and the exit code is 1; of earlier commands' they say how many. What follows `--` goes to every script.

--engine ray spreads the cells over a cluster (extra `cluster`): a cell whose machine dies starts again on another one,
from its checkpoint where OUT is a folder that all of them share. Where it is not, the rows come to this machine's OUT,
but logs and policies stay where the cells ran.

Run: python -m benchmarks.run --algorithms bc iql --seeds 3 --out runs/first -- --num-updates 3000
"""

import csv
import ctypes
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO, Literal, NamedTuple

import torch
import tyro
from filelock import FileLock, Timeout

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent))
from grid_results import cells_in, collect, run_of
from scratch import replace

from common.command_line import BUILT_IN_ID, BadInput, ExperimentArgs, check, check_argument, explain, launch, one_line
from common.data import load_dataset

SCRIPTS = Path(__file__).resolve().parents[1] / "algorithms"
SET_BY_GRID = {"--seed", "--dataset-id", "--run-dir", "--resume"}  # of the scripts' arguments
NEEDED = ("args.json", "metrics.csv", "result.json")  # what rows are made of; the last one says that the cell is done
FINAL = (2, 3, 130, 143, -signal.SIGINT, -signal.SIGTERM)  # bad input, diverged, stopped: so would be the next try
PR_SET_PDEATHSIG = 1  # of Linux's prctl: a signal when the parent dies


@dataclass
class Args:
    algorithms: tuple[str, ...] = ("bc", "td3_bc", "iql", "awr")
    """scripts in algorithms/, without .py; with arguments of its own in quotes: "bc --top-fraction 0.1\""""
    datasets: tuple[str, ...] = (BUILT_IN_ID,)
    """dataset ids"""
    seeds: int = 3
    """seeds of each: 0, 1, ..."""
    engine: Literal["local", "ray"] = "local"
    """this machine, or a Ray cluster"""
    address: str = "auto"
    """of the Ray cluster; auto finds the one this machine belongs to, local starts one"""
    out: Path = Path("runs/grid")
    """results go here, run folders to <out>/<algorithm>/<dataset>/<seed>"""
    workers: int = 0
    """cells side by side on this machine; 0: as many as there are processors, or shares of a GPU"""
    threads: int = 1
    """processors, and PyTorch's threads, of a cell"""
    gpus: float = 0.0
    """share of a GPU of a cell, such as 0.25 for four on each; 0: on processors, even where there are GPUs"""
    tries: int = 2
    """how often a cell may be started before it counts as failed"""
    script: tyro.conf.Positional[tuple[str, ...]] = ()
    """after `--`: arguments of the scripts"""

    def validate(self) -> None:
        for name in ("seeds", "threads", "tries"):
            check_argument(self, name, getattr(self, name) >= 1, "must be at least 1")
        check_argument(self, "workers", self.workers >= 0, "must not be negative")
        check_argument(self, "gpus", self.gpus == 0 or 0.01 <= self.gpus <= 1, "must be 0, or a share in [0.01, 1]")
        known = sorted(path.stem for path in SCRIPTS.glob("*.py"))
        words = list(self.script)
        for algorithm in self.algorithms:
            try:
                script, *own = shlex.split(algorithm) or [""]
            except ValueError as error:  # a quotation without end
                raise BadInput(f"--algorithms {algorithm}: {error}") from None
            check(script in known, f"--algorithms {algorithm}: there are {known}")
            words += own
        ours = sorted(SET_BY_GRID & {word.split("=")[0].replace("_", "-") for word in words})
        check(not ours, f"{' '.join(ours)}: set by the grid for each script: give --seeds, --datasets and --out")
        on_gpu = re.search(r"--device[ =](cuda|auto)", " ".join(words))
        check(self.gpus > 0 or not on_gpu, "--device: cells get GPUs by --gpus, such as --gpus 0.25 for four on each")
        for name in ("algorithms", "datasets"):
            folders = [as_name(text) for text in getattr(self, name)]
            check(len({*folders}) == len(folders), f"--{name}: two would share a folder: {' '.join(sorted(folders))}")


class Cell(NamedTuple):
    algorithm: str  # the script's name, and arguments of its own
    dataset_id: str
    seed: int
    folder: Path  # the run folder

    @property
    def name(self) -> str:
        return f"{self.algorithm} {self.dataset_id} {self.seed}"

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def done(self) -> bool:
        return (self.folder / "result.json").exists()

    def command(self, args: Args) -> list[str]:
        """What runs the cell, or goes on with it, as a user would type it."""
        script, *own = shlex.split(self.algorithm)
        command = [sys.executable, str(SCRIPTS / f"{script}.py"), "--run-dir", str(self.folder)]
        if not args.gpus:
            command += ["--device", "cpu"]  # else each would take the first GPU there is
        command += ["--dataset-id", self.dataset_id, "--seed", str(self.seed), *args.script, *own]
        return [*command, "--resume"] if (self.folder / "checkpoint.pt").exists() else command

    def num_updates(self, script_arguments: tuple[str, ...]) -> int:
        """In all, with those online."""
        words = " ".join([*script_arguments, self.algorithm])
        total = 0
        for name, default in (("num[-_]updates", ExperimentArgs.num_updates), ("online[-_]steps", 0)):
            found = re.findall(rf"--{name}[ =]\+?(\d+(?:_\d+)*)", words)  # 5_000 is a number
            total += int(found[-1]) if found else default
        return total

    def updates_done(self) -> int:
        """The newest row's update."""
        try:
            with (self.folder / "metrics.csv").open(newline="") as file:
                return max((int(float(row["step"])) for row in csv.DictReader(file)), default=0)
        except (OSError, KeyError, TypeError, ValueError):  # none yet, or it is being written
            return 0


# --- One cell -------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, args: Args, environment: dict[str, str]) -> str | None:
    """Runs or resumes the cell's script until it ends well; returns what went wrong, or None. Runs on any machine."""
    code = None
    try:
        cell.folder.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(args.tries):
            if cell.done or STOPPING or code in FINAL:
                break
            command = cell.command(args)
            with cell.log.open("a") as log:
                print("$", shlex.join(command), file=log, flush=True)
                code = _run_script(command, log, os.environ | {"OMP_NUM_THREADS": str(args.threads)} | environment)
        if cell.done:
            return None
        return f"exit code {code}: {last_words(cell.log)} (see {cell.log})"
    except OSError as error:  # a full disk, a folder that is not ours
        return one_line(error)


def last_words(log: Path) -> str:
    """The last line or, if that is the edge of the frame that tyro draws around bad input, what is in the frame."""
    text = log.read_text(errors="replace").strip()
    if text.endswith("╯"):
        return " ".join(re.sub("[─│╮╰╯]", " ", text.rpartition("╭")[2]).split())
    return (text.splitlines() or [""])[-1]


STARTED: list[subprocess.Popen] = []  # scripts, so that stopping this command can stop them
STOPPING = False  # then no script is started any more


def _run_script(command: list[str], log: IO[str], environment: dict[str, str]) -> int:
    """The script's exit code. In a session of its own: Ctrl-C comes to it from `stop_scripts`, once. On Linux it dies
    with its parent: a worker that is killed must not leave it at work in a folder that another one takes over.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def die_with_parent() -> None:
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    process = subprocess.Popen(
        command, stdout=log, stderr=log, env=environment, start_new_session=True, preexec_fn=die_with_parent
    )
    STARTED.append(process)
    if STOPPING:  # since `run_cell` looked
        process.terminate()
    return process.wait()


def stop_scripts() -> None:
    """Each saves a checkpoint and ends, or just ends, where it is not yet at work."""
    global STOPPING
    STOPPING = True
    for process in STARTED:
        process.terminate()  # nothing, if it has ended


# --- Engines --------------------------------------------------------------------------------------------------------

Outcomes = Iterator[tuple[Cell, str | None] | None]  # each cell and what went wrong as it ends; None every few seconds


def run_locally(cells: list[Cell], args: Args) -> Outcomes:
    """Cells on this machine, in threads that wait for processes. GPUs are handed out by shares."""
    count, named = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",")[:count] if named else [str(index) for index in range(count)]
    check(count > 0 or not args.gpus, f"--gpus {args.gpus}: PyTorch finds no GPU on this machine")
    if args.gpus:  # places are environments of cells that run side by side
        places = [{"CUDA_VISIBLE_DEVICES": gpu} for _ in range(int(1 / args.gpus)) for gpu in gpus]
        places = places[: args.workers or None]
    else:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        places = [{}] * (args.workers or max(1, usable // args.threads))
        if count:
            print(f"cells run on processors, not on the GPUs ({count}): --gpus 0.25 puts four on each", flush=True)

    def run(cell: Cell) -> str | None:
        place = places.pop(0)  # there is one: as many as threads
        try:
            return run_cell(cell, args, place)
        finally:
            places.append(place)

    with ThreadPoolExecutor(len(places)) as pool:
        jobs = {pool.submit(run, cell): cell for cell in cells}
        try:
            while jobs:
                done, _ = wait(jobs, timeout=2, return_when="FIRST_COMPLETED")
                yield from ((jobs.pop(job), job.result()) for job in done)
                yield None
        except BaseException:  # Ctrl-C
            pool.shutdown(wait=False, cancel_futures=True)
            stop_scripts()
            raise


def run_on_ray(cells: list[Cell], args: Args) -> Outcomes:
    """Cells as Ray tasks; one whose machine dies is started again elsewhere. This repository and its virtual
    environment are to be found at the same place on every machine.
    """
    try:
        import ray
    except ImportError:
        raise BadInput("--engine ray: Ray is not installed; pip install -e '.[cluster]'") from None
    if not ray.is_initialized():
        try:
            where = None if args.address == "local" else args.address
            environment = {"PYTHONPATH": str(SCRIPTS.parent)}  # for `common`
            ray.init(where, log_to_driver=False, runtime_env={"env_vars": environment})
        except ConnectionError:
            raise BadInput(f"--address {args.address}: no Ray cluster answers; start one with `ray start`") from None

    def run(cell: Cell, args: Args, environment: dict[str, str]) -> tuple[str | None, dict[str, bytes]]:
        if problem := run_cell(cell, args, environment):
            return f"{problem} on {platform.node()}", {}
        return None, {name: (cell.folder / name).read_bytes() for name in NEEDED}  # this disk may not be the driver's

    # a cell may lose its machine three times: one that takes its worker down with it would go on for ever
    task = ray.remote(num_cpus=args.threads, num_gpus=args.gpus, max_retries=3)(run)
    passed_on = {name: os.environ[name] for name in ("MINARI_DATASETS_PATH", "WANDB_MODE") if name in os.environ}
    jobs = {task.remote(cell, args, passed_on): cell for cell in cells}
    while jobs:
        done, _ = ray.wait(list(jobs), timeout=2)
        for job in done:
            cell = jobs.pop(job)
            try:
                problem, contents = ray.get(job)
                for name, content in contents.items() if not cell.done else ():
                    cell.folder.mkdir(parents=True, exist_ok=True)
                    replace(cell.folder / name, content)
            except (ray.exceptions.RayError, OSError) as error:
                problem = f"Ray: {one_line(error)} (see {cell.log})"
            yield cell, problem
        yield None


ENGINES: dict[str, Callable[[list[Cell], Args], Outcomes]] = {"local": run_locally, "ray": run_on_ray}


# --- Main -----------------------------------------------------------------------------------------------------------


class Reporter:
    """Every so often, a line for each running cell and one with the time that is left, by the updates so far."""

    def __init__(self, cells: list[Cell], script_arguments: tuple[str, ...], every: float = 30.0) -> None:
        self.left = {cell: cell.num_updates(script_arguments) for cell in cells}  # cells that have not ended
        self.planned, self.num_cells, self.every = sum(self.left.values()), len(cells), every
        self.began = self.last = time.monotonic()
        self.done_before = sum(cell.updates_done() for cell in cells)

    def finished(self, cell: Cell, problem: str | None) -> None:
        planned = self.left.pop(cell)
        if problem:  # what it lacks was not gained
            self.planned -= planned - cell.updates_done()
        print(f"{cell.name}: {problem or 'done'}", flush=True)

    def tick(self) -> None:
        now = time.monotonic()
        if now - self.last < self.every or not self.left:
            return
        self.last = now
        done = {cell: cell.updates_done() for cell in self.left}
        for cell, updates in done.items():
            if updates:
                print(f"  {cell.name}: {updates:,} of {self.left[cell]:,} updates", flush=True)
        remaining = sum(self.left.values()) - sum(done.values())
        gained = self.planned - remaining - self.done_before
        minutes = f", about {remaining / gained * (now - self.began) / 60:.0f} min left" if gained > 0 else ""
        print(f"{self.num_cells - len(self.left)} of {self.num_cells} cells ended{minutes}", flush=True)


def main(args: Args) -> None:
    args.validate()
    out = args.out.resolve()
    cells = [
        Cell(algorithm, dataset_id, seed, out / as_name(algorithm) / as_name(dataset_id) / str(seed))
        for algorithm, dataset_id, seed in product(args.algorithms, args.datasets, range(args.seeds))
    ]
    for dataset_id in args.datasets:
        load_dataset(dataset_id, discrete=None)  # once, before many processes ask for it at a time
    with alone_in(out):
        inside = {cell[3]: run_of(*cell[:2]) for cell, _ in cells_in(out / "results.csv")}
        for cell in cells:
            other = inside.get(cell.folder, own := run_of(*cell[:2]))
            check(other == own, f"--out {out}: {cell.folder} holds a run of {other}; name another folder")
        run_grid(cells, args, out)


def alone_in(out: Path) -> AbstractContextManager:
    """Makes the folder, and keeps other commands out of it: two would start the same cells."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        return FileLock(out / ".lock").acquire(timeout=0)
    except Timeout:
        raise BadInput(f"--out {out}: another command is at work in it; wait for it, or name another folder") from None
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be made: {error.strerror}") from None


def run_grid(cells: list[Cell], args: Args, out: Path) -> None:
    """Runs the cells that are left to run, and exits with 1 if one has not ended well then."""
    same_arguments(out, args.script)
    problems = {cell: f"cannot read {cell.folder}" if cell.done else "not finished" for cell in cells}
    collect(problems, out)
    pending = [cell for cell in cells if not cell.done]
    print(f"{len(cells)} cells, {len(cells) - len(pending)} of them done; the first to run:", flush=True)
    if pending:
        print(f"  {shlex.join(pending[0].command(args))}", flush=True)
    reporter = Reporter(pending, args.script)
    for ended in ENGINES[args.engine](pending, args):
        if ended is not None:
            cell, problem = ended
            reporter.finished(cell, problem)
            problems[cell] = problem or f"cannot read {cell.folder}"
            collect(problems, out)
        reporter.tick()
    written = collect(problems, out)
    failed = [cell for cell in cells if cell not in written]
    for cell in failed:
        print(f"failed: {cell.name}: {problems[cell]}")
    if earlier := sum(bool(problem) and cell not in problems for cell, problem in cells_in(out / "results.csv")):
        print(
            f"{earlier} cells of earlier commands have not ended well either: run them again, or delete their folders"
        )
    print(f"{out}/results.csv: {len(cells) - len(failed)} of {len(cells)} cells ended well", flush=True)
    if failed:
        raise SystemExit(1)


def as_name(text: str) -> str:
    """Of a folder: "bc --top-fraction 0.1" is bc-top-fraction-0.1; a value's minus sign is one more."""
    return re.sub(r"[^\w.]*[\s=,](?=-[\w.])|[^\w.]+", "-", text.strip("/"))


def same_arguments(out: Path, script_arguments: tuple[str, ...]) -> None:
    """Raises BadInput if the folder's cells were run with other arguments: they would pass for this command's."""
    path, ours = out / "script_arguments.json", list(script_arguments)
    if path.exists() and (any(out.glob("*/*/*/checkpoint.pt")) or any(out.glob("*/*/*/result.json"))):
        with explain(f"cannot read {path}: remove it if the arguments are the same"):
            found = [str(word) for word in list(json.loads(path.read_text()))]
        check(found == ours, f"--out {out}: holds runs with {shlex.join(found) or 'no arguments'}; name another folder")
    replace(path, json.dumps(ours).encode() + b"\n")


if __name__ == "__main__":
    launch(main, Args)
