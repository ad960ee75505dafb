"""The course of an experiment: the run folder, logging, checkpoints and progress."""

import copy
import csv
import dataclasses
import itertools
import json
import math
import platform
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common import files
from common.command_line import Diverged, ExperimentArgs, Stopped, on_signals
from common.datasets import BadInput, check, one_line, warn
from common.evaluation import Policy, evaluate, make_environments, normalized_score, save_policy
from common.replay_buffer import ReplayBuffer
from common.tracking import Tracker

PREVIOUS = "previous_checkpoint.pt"
GRACE_SECONDS = 2  # after a signal, for the update, evaluation or epoch at work; what then remains of it is left undone

# A critic is suspect when its mean |Q| is this many times max |r| / (1 - gamma), which no policy's return exceeds: far
# more than an entropy, a model's penalty or conservatism adds, and far less than what is about to overflow.
SUSPECT_FACTOR = 100


def set_up(args: ExperimentArgs) -> torch.device:
    """Checks the arguments, seeds every random number of the run, and returns its device. Raises BadInput."""
    args.validate()
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)  # Adam's moments of dead units decay to denormals, which slow a CPU many times
    # Freed at once, so that glibc keeps later blocks of this size: their pages, handed to the system and back at every
    # update, cost BCQ and CQL up to a tenth of their speed.
    torch.empty(2**25 - 2**16, dtype=torch.uint8)
    return torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


class Summary(NamedTuple):
    """How a run went."""

    result: dict[str, Any]  # what result.json says of it
    outcome: str  # the same in words
    plot: Callable[[Path], object] | None  # writes the learning curve, if there is one


class Run:
    """A run folder: args.json, metrics.csv, checkpoint.pt, policy.pt, result.json and learning_curve.png; also, should
    checkpoint.pt be damaged, the one before it, previous_checkpoint.pt.

    `learner` is a NamedTuple of everything that training changes, networks and optimiser; its `actor` is the policy. A
    checkpoint holds their state_dicts and the random state, so that a resumed run goes on to the same bits. A script
    that learns no policy gives the `policy` that it is about, and sums its run up itself.

    Raises BadInput if the folder holds a run already or, with --resume, no checkpoint of this algorithm and dataset, or
    if another process is at work in it; while it is open, CannotWrite if the disk is full.
    """

    def __init__(self, args: ExperimentArgs, buffer: ReplayBuffer, learner: Any, policy: Policy | None = None) -> None:
        self.args, self.buffer, self.learner, self.dataset = args, buffer, learner, buffer.dataset
        self.device = buffer.storage.device
        default = f"{args.dataset_id.strip('/').replace('/', '-')}/{args.seed}-{datetime.now():%Y%m%d-%H%M%S-%f}"
        self.dir = args.run_dir or Path("runs", args.algorithm, default)
        actions = self.dataset.action_low, self.dataset.action_high, self.dataset.discrete
        self.policy = policy or Policy(learner.actor, buffer.observation_mean, buffer.observation_std, *actions)
        self.step, self.stopped_by, self.suspected, self.at = 0, 0, False, "update 0"
        # the checkpoint from before an update with an evaluation: a signal in the evaluation goes back to it
        self.before: dict[str, Any] = {}
        self.evaluations: list[dict[str, float]] = []
        self.columns: list[str] = []  # of metrics.csv
        self.num_rows = 0
        self.seconds_before, self.started = 0.0, time.perf_counter()
        self.update_seconds, self.pause_seconds = 0.0, 0.0  # spent in updates, and in the evaluation after the newest
        self.environments = None
        if policy is None:
            self.environments = make_environments(self.dataset, args.eval_episodes, args.trust_dataset_env)
        self._take_dir()
        wandb_id = self._restore() if args.resume else None
        wandb_run = {name: getattr(args, f"wandb_{name}") for name in ("project", "group", "entity")}
        wandb_run |= {"name": self.dir.name, "dir": self.dir.resolve(), "config": _plain(args)}
        self.tracker = Tracker(wandb_run if args.track else None, wandb_id)
        facts = {"dataset_fingerprint": buffer.fingerprint, "versions": _versions()}
        self._write_json("args.json", _plain(args) | facts)
        if not args.resume:
            (self.dir / "metrics.csv").unlink(missing_ok=True)
            self.save_checkpoint(0)  # from here on, a run that is killed can be resumed

    def steps(self) -> Iterator[int]:
        """The numbers of the updates still to do, under a progress bar. A signal ends them, with a checkpoint."""
        for step in self._interruptible("update", self.step, self.args.num_updates):
            evaluating = self.environments is not None and self.is_due(step, self.args.eval_every)
            self.before = copy.deepcopy(self._checkpoint(step - 1)) if evaluating else {}
            began, self.pause_seconds = time.perf_counter(), 0.0
            yield step
            self.update_seconds += time.perf_counter() - began - self.pause_seconds

    def epochs(self, name: str, done: int, total: int) -> Iterator[int]:
        """The numbers of the epochs still to do in a phase before the updates, under a progress bar of its own.

        The script saves a checkpoint after each. A signal ends them; an epoch cut short is done again.
        """
        yield from self._interruptible(f"{name} epoch", done, total)

    def _interruptible(self, unit: str, done: int, total: int) -> Iterator[int]:
        """The numbers after `done` up to `total`, until a signal."""
        interval = 0.1 if sys.stderr.isatty() else 10  # in a log file every refresh is a line
        name = self.args.algorithm if unit == "update" else f"{self.args.algorithm}, {unit}s"
        bar = tqdm(total=total, initial=done, desc=name, mininterval=interval)
        with on_signals(self._interrupt), bar as self.progress:
            for number in range(done + 1, total + 1):
                self.at = f"{unit} {number}"
                yield number
                self.progress.update()
                if self.stopped_by:
                    _set_alarm(0)
                    if unit == "update":
                        self.save_checkpoint(number)
                    raise self._stopped()

    def _interrupt(self, number: int, _: Any) -> None:
        """At the first signal, what is at work gets some time to end; at a second or the alarm after it, none."""
        if self.stopped_by:
            raise self._stopped(at_once=True)
        self.stopped_by = number
        _set_alarm(GRACE_SECONDS, self._interrupt)

    def _stopped(self, at_once: bool = False) -> Stopped:
        self.progress.close()
        message = f"interrupted at {self.at}; go on with --resume --run-dir {self.dir}"
        return Stopped(self.stopped_by, message, at_once)

    def is_due(self, step: int, every: int) -> bool:
        """True every `every` updates and after the last one."""
        return step % every == 0 or step == self.args.num_updates

    def evaluate(self, step: int, gamma: float | None = None) -> dict[str, float]:
        """Mean and standard deviation of the deterministic policy's returns, and its score; with `gamma` also the mean
        of the returns discounted by it, of the same episodes played again. No environment, nothing.
        """
        if self.environments is None:
            return {}
        self._check_weights()  # simulators fail in ways of their own on actions that are not numbers
        began = time.perf_counter()
        try:
            returns = evaluate(self.policy, self.environments)
            discounted = None if gamma is None else evaluate(self.policy, self.environments, gamma)
        except Stopped:  # this update is not over without its row: it will be done again
            if self.before:
                self._write_checkpoint(self.before)
            raise
        metrics = {"eval/return_mean": float(returns.mean()), "eval/return_std": float(returns.std())}
        score = normalized_score(metrics["eval/return_mean"], self.dataset)
        if score is not None:
            metrics["eval/score"] = score
        if discounted is not None:
            metrics["eval/discounted_return"] = float(discounted.mean())
        self.evaluations.append({"step": step} | metrics)
        self.progress.set_postfix_str(_headline(metrics))
        self.pause_seconds += time.perf_counter() - began
        return metrics

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Adds a row to metrics.csv (and W&B). Raises Diverged if a metric or a network's weight is not finite."""
        row = {"step": step, "seconds": round(self._seconds(), 2)}
        row |= {name: float(value) for name, value in metrics.items()}
        bad = [f"{name} is {value}" for name, value in row.items() if not math.isfinite(value)]
        if bad:
            raise self._diverged(min(bad, key=lambda reason: "loss" not in reason))  # a loss before the others
        self._check_weights()
        self._suspect(row)
        self._append(row)
        self.tracker.log(row)

    def save_checkpoint(self, step: int) -> None:
        """Writes checkpoint.pt and policy.pt, each renamed over the old; raises Diverged if any of it is not finite."""
        checkpoint = self._checkpoint(step)
        self._check_finite(checkpoint["learner"])
        self._write_checkpoint(checkpoint)

    def _checkpoint(self, step: int) -> dict[str, Any]:
        return {
            "algorithm": self.args.algorithm,
            "dataset_fingerprint": self.buffer.fingerprint,
            "step": step,
            "seconds": self._seconds(),
            "update_seconds": self.update_seconds,
            "num_rows": self.num_rows,
            "evaluations": self.evaluations,
            "learner": {name: part.state_dict() for name, part in self.learner._asdict().items()},
            "random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "wandb_id": self.tracker.id,
        }

    def _write_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # policy.pt first: a kill in between leaves the older checkpoint, which leads to this policy again
        self._replace("policy.pt", lambda path: save_policy(path, self.policy))
        if self.num_rows:
            with files.writing(self.dir / "metrics.csv"):
                files.sync(self.dir / "metrics.csv")  # the checkpoint says how many rows it has
        files.replace(self.dir / "checkpoint.pt", lambda path: files.save(checkpoint, path), keep_as=PREVIOUS)

    def save_part(self, name: str, file: str | None = None) -> None:
        """Writes one part of the learner to <file or name>.pt, for runs on the same data; load_part reads it."""
        content = {name: getattr(self.learner, name).state_dict(), "dataset_fingerprint": self.buffer.fingerprint}
        content["observation_scale"] = torch.stack([self.buffer.observation_mean, self.buffer.observation_std])
        self._replace(f"{file or name}.pt", lambda path: files.save(content, path))

    def finish(self, summary: Summary | None = None) -> None:
        """Writes result.json and the learning curve, and says on the last line how the run went."""
        found, outcome, plot = summary or self._summarize()
        result = {
            "algorithm": self.args.algorithm,
            "dataset_id": self.args.dataset_id,
            "seed": self.args.seed,
            "num_updates": self.args.num_updates,
            **found,
            "updates_per_second": self.args.num_updates / self.update_seconds,
            "wall_seconds": self._seconds(),
            "device": str(self.device),
            "versions": _versions(),
        }
        self._write_json("result.json", result)
        if plot:
            self._replace("learning_curve.png", plot)
        for environment in self.environments or ():
            environment.close()
        self.tracker.finish(result)
        self.release()
        print(
            f"{self.args.algorithm} on {self.args.dataset_id}: {outcome}, {self._seconds():.0f} s, {self.dir}",
            flush=True,
        )

    def _summarize(self) -> Summary:
        """The last evaluation, and all of them, beside the dataset's own returns."""
        dataset_return = self.buffer.mean_return
        dataset_score = normalized_score(dataset_return, self.dataset)
        average = {"eval/return_mean": dataset_return} | (
            {} if dataset_score is None else {"eval/score": dataset_score}
        )
        final = self.evaluations[-1] if self.evaluations else {}
        scores = [evaluation["eval/score"] for evaluation in self.evaluations if "eval/score" in evaluation]
        result = {
            "final_return_mean": final.get("eval/return_mean"),
            "final_return_std": final.get("eval/return_std"),
            "final_score": final.get("eval/score"),
            "last_5_score": float(np.mean(scores[-5:])) if scores else None,
            "best_score": max(scores, default=None),
            "dataset_return_mean": dataset_return,
            "dataset_score": dataset_score,
        }
        outcome = f"{_headline(final) if final else 'not evaluated'}, dataset average {_headline(average)}"
        plot = (lambda path: _plot(path, self.args, self.evaluations, average)) if final else None
        return Summary(result, outcome, plot)

    def _check_weights(self) -> None:
        parts = self.learner._asdict().items()
        self._check_finite({name: part.state_dict() for name, part in parts if isinstance(part, torch.nn.Module)})

    def _check_finite(self, state: dict[str, Any]) -> None:
        for name, part in state.items():
            pieces = (piece for tensor in _tensors(part) for piece in tensor.flatten().split(2**22))  # spares memory
            if not all(bool(piece.isfinite().all()) for piece in pieces):
                raise self._diverged(f"{name} is not finite")

    def _diverged(self, reason: str) -> Diverged:
        return Diverged(f"{reason} at {self.at}; the last checkpoint in {self.dir} is kept")

    def _suspect(self, row: dict[str, float]) -> None:
        """Warns once of a critic that says more than the rewards allow."""
        qs = {name: value for name, value in row.items() if name.startswith("critic/q")}
        if self.suspected or not qs:
            return
        gamma = self.args.gamma  # type: ignore[attr-defined]  # scripts with a critic have one
        horizon = 1 / (1 - gamma) if gamma < 1 else int(self.buffer.episode_lengths.max())
        bound = float(self.buffer.transitions.rewards.abs().max()) * horizon
        for name, value in qs.items():
            if abs(value) > SUSPECT_FACTOR * (1 + bound):  # 1: what fresh networks may say where every reward is 0
                self.suspected = True
                what = f"{name} is {value:.3g} at update {row['step']}, but no return exceeds {bound:.3g}"
                advice = "the critic may be exploding: try a smaller learning rate or a stronger anchor"
                return warn(f"{what}: {advice}")

    def _take_dir(self) -> None:
        """Makes the folder, unless it is there, and keeps other processes out of it while this one lives."""
        path = self.dir / "checkpoint.pt"
        if self.args.resume:
            check(self.dir.is_dir(), f"--resume: no checkpoint at {path}; start the run without --resume")
        try:
            self.dir.mkdir(parents=True, exist_ok=True)
            release = files.lock(self.dir)
        except OSError as error:
            raise BadInput(f"--run-dir {self.dir}: cannot be made: {error.strerror}") from None
        if release is None:
            raise BadInput(
                f"--run-dir {self.dir}: another process is at work in it; wait for it, or name another folder"
            )
        self.release = weakref.finalize(self, release)
        taken = path.exists() and not self.args.resume
        advice = "add --resume to go on with it, or name another folder"
        check(not taken, f"--run-dir {self.dir}: holds a run already; {advice}")

    def _load_checkpoint(self) -> tuple[Path, dict[str, Any]]:
        """The last checkpoint or, where that is damaged, the one before it."""
        path, previous = self.dir / "checkpoint.pt", self.dir / PREVIOUS
        check(
            path.is_file() or previous.is_file(), f"--resume: no checkpoint at {path}; start the run without --resume"
        )
        try:
            return path, files.load(path, self.device)
        except Exception as error:  # unpickling raises many kinds
            reason = f"cannot read {path}: {one_line(error)}"
        try:
            checkpoint = files.load(previous, self.device)
            warn(f"--resume: {reason}: going on from the checkpoint before it, of update {checkpoint['step']}")
            return previous, checkpoint
        except Exception:
            raise BadInput(f"--resume: {reason}") from None

    def _restore(self) -> str | None:
        """Puts learner, random state and metrics.csv back to the checkpoint; returns the id of the W&B run."""
        path, checkpoint = self._load_checkpoint()
        found = checkpoint.get("algorithm")
        check(
            found == self.args.algorithm, f"--resume: {path} is a checkpoint of {found}, not of {self.args.algorithm}"
        )
        same_data = checkpoint.get("dataset_fingerprint") == self.buffer.fingerprint
        check(same_data, f"--resume: {path} was trained on other data than {self.args.dataset_id} holds")
        try:
            for name, part in self.learner._asdict().items():
                part.load_state_dict(checkpoint["learner"][name])
            rows: list[list[str]] = []
            if checkpoint["num_rows"]:
                with (self.dir / "metrics.csv").open(newline="") as file:
                    lines = itertools.islice(csv.reader(file), 1 + checkpoint["num_rows"])  # later ones come again
                    self.columns, *rows = lines
            check(len(rows) == checkpoint["num_rows"], "metrics.csv lacks rows")
        except (RuntimeError, ValueError, OSError, csv.Error) as error:
            raise BadInput(f"--resume: {path} does not fit this run: {one_line(error)}") from None
        torch.set_rng_state(checkpoint["random_state"].cpu())
        if self.device.type == "cuda" and checkpoint["cuda_random_state"]:
            torch.cuda.set_rng_state_all([state.cpu() for state in checkpoint["cuda_random_state"]])
        self.step, self.seconds_before = checkpoint["step"], checkpoint["seconds"]
        self.update_seconds, self.evaluations = checkpoint["update_seconds"], checkpoint["evaluations"]
        if rows:
            self._rewrite(rows)
        else:
            (self.dir / "metrics.csv").unlink(missing_ok=True)
        return checkpoint["wandb_id"]

    def _append(self, row: dict[str, float]) -> None:
        """Adds a row to metrics.csv, widening the file if the row has a metric that the rows before it lack."""
        path = self.dir / "metrics.csv"
        if missing := [name for name in row if name not in self.columns]:
            with path.open("a+", newline="") as file:
                file.seek(0)
                rows = list(csv.reader(file))[1:]
            evaluation = [] if self.environments is None else ["eval/return_mean", "eval/return_std", "eval/score"]
            self.columns = [*dict.fromkeys([*self.columns, "step", "seconds", *evaluation, *missing])]
            self._rewrite(rows)
        with files.writing(path), path.open("a", newline="") as file:
            csv.writer(file).writerow([row.get(name, "") for name in self.columns])
        self.num_rows += 1

    def _rewrite(self, rows: list[list[str]]) -> None:
        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                padded = [row + [""] * (len(self.columns) - len(row)) for row in rows]
                csv.writer(file).writerows([self.columns, *padded])

        self._replace("metrics.csv", write)
        self.num_rows = len(rows)

    def _replace(self, name: str, write: Callable[[Path], object]) -> None:
        files.replace(self.dir / name, write)

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        self._replace(name, lambda path: path.write_text(json.dumps(content, indent=2) + "\n"))

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started


def load_part(name: str, path: str, buffer: ReplayBuffer, learner: Any) -> None:
    """Puts what `save_part` wrote into the learner. Raises BadInput if it is of other data or another shape."""
    try:
        saved = files.load(Path(path), buffer.storage.device)
        state, fingerprint, scale = saved[name], saved["dataset_fingerprint"], saved["observation_scale"]
    except Exception as error:  # unpickling raises many kinds
        raise BadInput(f"--{name} {path}: cannot be read: {one_line(error)}") from None
    same_data = fingerprint == buffer.fingerprint
    check(same_data, f"--{name} {path}: was trained on other data than {buffer.dataset.dataset_id} holds")
    same_scale = torch.equal(scale, torch.stack([buffer.observation_mean, buffer.observation_std]))
    check(same_scale, f"--{name} {path}: was trained with the other setting of --normalize-observations")
    try:
        getattr(learner, name).load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise BadInput(f"--{name} {path}: does not fit the arguments of this run: {one_line(error)}") from None


def _set_alarm(seconds: float, handler: Callable[[int, Any], None] | None = None) -> None:
    """`handler` is called in so many seconds; never at 0. Windows has no such alarm: there, work is always ended."""
    if hasattr(signal, "setitimer"):
        if handler:
            signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _tensors(state: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a state_dict."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for part in state.values() if isinstance(state, dict) else state:
            yield from _tensors(part)


def _plain(args: ExperimentArgs) -> dict[str, Any]:
    values = {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(args).items()
    }
    return {"algorithm": args.algorithm} | values


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        name: version(name) for name in ("torch", "numpy", "gymnasium", "minari")
    }


def _headline(metrics: dict[str, float]) -> str:
    return (
        f"score {metrics['eval/score']:.1f}" if "eval/score" in metrics else f"return {metrics['eval/return_mean']:.1f}"
    )


def _plot(path: Path, args: ExperimentArgs, evaluations: list[dict[str, float]], average: dict[str, float]) -> None:
    from matplotlib.figure import Figure  # slow to import, and needed once

    name = "eval/score" if "eval/score" in average else "eval/return_mean"
    label = "normalised score" if name == "eval/score" else "return"
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    steps, values = [row["step"] for row in evaluations], [row[name] for row in evaluations]
    axes.plot(steps, values, marker=".", label=f"{args.algorithm}, seed {args.seed}")
    axes.axhline(average[name], color="black", linestyle="--", linewidth=1, label="average of the dataset's episodes")
    axes.set(xlabel="updates", ylabel=f"{label}, {args.eval_episodes} episodes", title=args.dataset_id)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150, format="png")
