"""Runs algorithms x datasets x seeds, each cell the ordinary script in a process and a run folder of its own.

Stop the command and give it again: finished cells are skipped, others go on from their checkpoints. A cell that fails
is tried once more, then reported with its log; it never stops the others. At the end, and after each cell, there are

    OUT/results.csv       a row per cell: what its result.json holds, and its run folder
    OUT/evaluations.csv   a row per evaluation: the learning curves

--engine ray spreads the cells over a cluster (extra `cluster`): a cell whose machine dies starts again on another one,
from its checkpoint where OUT is a folder that all of them share. What follows `--` goes to every script.

Run: python -m benchmarks.run --algorithms bc iql --seeds 3 --out runs/first -- --num-updates 3000
"""

import csv
import ctypes
import json
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.command_line import ExperimentArgs, check_argument, launch
from common.datasets import BUILT_IN_ID, BadInput, check, load_dataset

SCRIPTS = Path(__file__).resolve().parents[1] / "algorithms"
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
    """share of a GPU of a cell, such as 0.25"""
    tries: int = 2
    """how often a cell may be started before it counts as failed"""
    script: tyro.conf.Positional[tuple[str, ...]] = ()
    """after `--`: arguments of the scripts"""

    def validate(self) -> None:
        for name in ("seeds", "threads", "tries"):
            check_argument(self, name, getattr(self, name) >= 1, "must be at least 1")
        check_argument(self, "workers", self.workers >= 0, "must not be negative")
        check_argument(self, "gpus", 0 <= self.gpus <= 1 or self.gpus == int(self.gpus), "must be in [0, 1], or whole")
        for algorithm in self.algorithms:
            known = sorted(path.stem for path in SCRIPTS.glob("*.py"))
            check(algorithm.split()[:1] in [[name] for name in known], f"--algorithms {algorithm}: there are {known}")


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

    def command(self, script_arguments: tuple[str, ...]) -> list[str]:
        """What runs the cell anew, as a user would type it."""
        script, *own = shlex.split(self.algorithm)
        command = [sys.executable, str(SCRIPTS / f"{script}.py"), "--run-dir", str(self.folder)]
        return [*command, "--dataset-id", self.dataset_id, "--seed", str(self.seed), *script_arguments, *own]

    def num_updates(self, script_arguments: tuple[str, ...]) -> int:
        found = re.findall(r"--num[-_]updates[ =](\d+)", " ".join(self.command(script_arguments)))
        return int(found[-1]) if found else ExperimentArgs.num_updates

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
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(args.tries):
        if (cell.folder / "result.json").exists():
            return None
        command = cell.command(args.script)
        if (cell.folder / "checkpoint.pt").exists():
            command = [*command[:4], "--resume"]
        with cell.log.open("a") as log:
            print("$", shlex.join(command), file=log, flush=True)
            code = _run_script(command, log, os.environ | {"OMP_NUM_THREADS": str(args.threads)} | environment)
        if code == 0:
            return None
        if code in (2, 130, 143):  # bad input will be bad the next time; stopped is stopped
            break
    last = (cell.log.read_text().strip().splitlines() or [""])[-1]
    return f"exit code {code}: {last} (see {cell.log})"


RUNNING: set[subprocess.Popen] = set()  # scripts, so that stopping this command can stop them


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
    RUNNING.add(process)
    try:
        return process.wait()
    finally:
        RUNNING.discard(process)


def stop_scripts() -> None:
    """Each saves a checkpoint and ends."""
    for process in list(RUNNING):
        process.send_signal(signal.SIGTERM)


# --- Engines --------------------------------------------------------------------------------------------------------

Outcomes = Iterator[tuple[Cell, str | None] | None]  # each cell and what went wrong as it ends; None every few seconds


def run_locally(cells: list[Cell], args: Args) -> Outcomes:
    """Cells on this machine, in threads that wait for processes. GPUs are handed out by shares."""
    import torch

    count = torch.cuda.device_count() if args.gpus else 0
    check(bool(count) or not args.gpus, f"--gpus {args.gpus}: PyTorch finds no GPU on this machine")
    per_gpu = int(1 / args.gpus) if args.gpus else 0
    workers = args.workers or (count * per_gpu if args.gpus else max(1, len(os.sched_getaffinity(0)) // args.threads))
    shares: queue.SimpleQueue[str] = queue.SimpleQueue()
    for index in range(count * per_gpu):
        shares.put(str(index % count))

    def run(cell: Cell) -> str | None:
        if not args.gpus:
            return run_cell(cell, args, {})
        gpu = shares.get()
        try:
            return run_cell(cell, args, {"CUDA_VISIBLE_DEVICES": gpu})
        finally:
            shares.put(gpu)

    with ThreadPoolExecutor(workers) as pool:
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
    task = ray.remote(num_cpus=args.threads, num_gpus=args.gpus, max_retries=-1)(run_cell)
    passed_on = {name: os.environ[name] for name in ("MINARI_DATASETS_PATH", "WANDB_MODE") if name in os.environ}
    jobs = {task.remote(cell, args, passed_on): cell for cell in cells}
    while jobs:
        done, _ = ray.wait(list(jobs), timeout=2)
        for job in done:
            try:
                outcome = ray.get(job)
            except ray.exceptions.RayError as error:
                outcome = f"Ray: {' '.join(str(error).split())[:200]}"
            yield jobs.pop(job), outcome
        yield None


ENGINES: dict[str, Callable[[list[Cell], Args], Outcomes]] = {"local": run_locally, "ray": run_on_ray}


# --- Results --------------------------------------------------------------------------------------------------------


def collect(cells: list[Cell], out: Path) -> None:
    """Writes results.csv and evaluations.csv of the cells that have ended well."""
    results: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    for cell in cells:
        if not (cell.folder / "result.json").exists():
            continue
        result = json.loads((cell.folder / "result.json").read_text())
        versions = " ".join(f"{name} {number}" for name, number in result.pop("versions").items())
        saved = json.loads((cell.folder / "args.json").read_text())
        protocol = {name: saved[name] for name in ("eval_every", "eval_episodes")}
        key = {"algorithm": cell.algorithm, "dataset_id": cell.dataset_id, "seed": cell.seed}
        results.append(result | key | protocol | {"versions": versions, "run_dir": str(cell.folder)})
        with (cell.folder / "metrics.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                if row.get("eval/return_mean"):
                    values = {"num_updates": row["step"], "score": row["eval/score"]}
                    evaluations.append(key | values | {"return_mean": row["eval/return_mean"]})
    for name, rows in (("results", results), ("evaluations", evaluations)):
        scratch = out / f".{name}.csv"
        with scratch.open("w", newline="") as file:
            columns = dict.fromkeys(name for row in rows for name in row)  # fqe.py's results have some of their own
            writer = csv.DictWriter(file, list(columns), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(scratch, out / f"{name}.csv")


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
        Cell(algorithm, dataset_id, seed, out / as_name(algorithm) / as_name(dataset_id.strip("/")) / str(seed))
        for algorithm, dataset_id, seed in product(args.algorithms, args.datasets, range(args.seeds))
    ]
    for dataset_id in args.datasets:
        load_dataset(dataset_id, discrete=None)  # once, before many processes ask for it at a time
    same_arguments(out, args.script)
    pending = [cell for cell in cells if not (cell.folder / "result.json").exists()]
    print(f"{len(cells)} cells, {len(cells) - len(pending)} of them done; the first to run:", flush=True)
    if pending:
        print(f"  {shlex.join(pending[0].command(args.script))}", flush=True)
    reporter = Reporter(pending, args.script)
    problems: dict[Cell, str] = {}
    for ended in ENGINES[args.engine](pending, args):
        if ended is not None:
            cell, problem = ended
            reporter.finished(cell, problem)
            problems |= {cell: problem} if problem else {}
            collect(cells, out)
        reporter.tick()
    collect(cells, out)
    print(f"{out}/results.csv: {len(cells) - len(problems)} of {len(cells)} cells", flush=True)
    if problems:
        raise SystemExit(1)


def as_name(text: str) -> str:
    """Of a folder: "bc --top-fraction 0.1" is bc-top-fraction-0.1."""
    return re.sub(r"[^\w.]+", "-", text)


def same_arguments(out: Path, script_arguments: tuple[str, ...]) -> None:
    """Raises BadInput if the folder's cells were run with other arguments: they would pass for this command's."""
    path, ours = out / "script_arguments.json", list(script_arguments)
    if path.exists():
        found = json.loads(path.read_text())
        check(found == ours, f"--out {out}: holds runs with {shlex.join(found) or 'no arguments'}; name another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(ours) + "\n")
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written: {error.strerror}") from None


if __name__ == "__main__":
    launch(main, Args)
