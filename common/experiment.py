"""The course of an experiment: the run folder, evaluations, rows of metrics, checkpoints and progress."""

import contextlib
import copy
import csv
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from subprocess import Popen
from typing import IO, Any, cast

import numpy as np
import torch
from filelock import FileLock
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

from common.command_line import TRACKER, BadInput, Diverged, ExperimentArgs, check, explain, interruption, warn
from common.data import ReplayBuffer
from common.evaluation import FINAL_SEED, Policy, evaluate, load_file, make_environments


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:  # what goes wrong inside becomes an OSError of one line
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises the latter, on its way from the former
        reason = next((e.strerror for e in (error, error.__context__) if isinstance(e, OSError)), repr(error))
        raise OSError(f"cannot write {path} ({reason}): make room; trainings go on with --resume --run-dir") from None


def replace(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Lets `write` fill a file beside and, once the disk has it, renames it to `path`: all of it is there, or none."""
    scratch = path.with_name(f".{path.name}")
    with writing(path):
        try:
            with scratch.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)


def set_up(args: ExperimentArgs) -> torch.device:
    """Checks the arguments, seeds every random number of the run, and returns its device. Raises BadInput."""
    args.validate()
    check(args.device != "cuda" or torch.cuda.is_available(), "--device cuda: PyTorch finds no CUDA device; take cpu")
    torch.manual_seed(args.seed)
    os.environ.setdefault("MKL_CBWR", "AUTO")  # its products then have the same bits with one thread and with more
    torch.set_flush_denormal(True)  # Adam's moments of dead units decay to denormals, which slow a CPU many times
    torch.empty(2**25 - 2**16, dtype=torch.uint8)  # freed: glibc then keeps blocks of this size, a tenth of BCQ's time
    return torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")


class Run:
    """A run folder. A resumed run goes on to the same bits at update `first_step`, and so does its `player`. `learner`
    is a NamedTuple of what training changes; its `actor`, if any, is the policy. What `update` finds of
    make_batch(buffer.validation, rows) goes to metrics. Raises BadInput for a folder it cannot take, and OSError."""

    def __init__(self, args: Any, buffer: Any, learner: Any, update: Any, make_batch: Any = None, player: Any = None):
        self.learner, self.update, self.make_batch = learner, update, make_batch or ReplayBuffer.take
        self.args, self.buffer, self.dataset, self.device = args, buffer, buffer.dataset, buffer.storage.device
        self.parts: dict[str, Any] = learner._asdict() | ({"player": player} if player else {})
        self.last_step, self.policy = args.num_updates + args.online_steps, cast(Any, None)
        self.environments, self.step, self.update_seconds, self.columns = None, 0, 0.0, list[str]()
        if actor := self.parts.get("actor"):
            data, more = self.dataset, {"script": args.algorithm, "hyper_parameters": args.hyper_parameters()}
            more |= {"observation_names": data.observation_names, "action_names": data.action_names}
            self.policy = Policy(actor, buffer.normalization, (data.action_low, data.action_high), data.discrete, more)
            try:
                self.environments = make_environments(self.dataset, args.eval_episodes)
            except BadInput as reason:
                check(args.env_id is None, f"--env-id: {reason}")
                warn(f"training goes on without evaluation: {reason}")
        names = ["algorithm", "dataset_id", "seed", "batch_size", "precision", "validation_fraction", "validation_seed"]
        names += ["env_id", "eval_episodes"] if self.environments or player else []  # of one curve
        self.learning_arguments = {name: getattr(args, name) for name in names} | args.hyper_parameters()
        self.learning_arguments |= {"updates in all": args.num_updates} if getattr(args, "cosine_decay", 0) else {}
        default = f"{args.dataset_id.replace('/', '-').replace(':', '-')}/{args.seed}-{datetime.now():%Y%m%d-%H%M%S-%f}"
        self.dir = args.run_dir or Path("runs", args.algorithm, default)
        self.metrics_path = self.dir / "metrics.csv"
        self._take_dir()
        self.started = self.began = time.perf_counter()
        if args.resume:
            with explain(f"--resume: the checkpoint in {self.dir} does not fit, start a new run"):
                metrics = self._restore(load_file(self.dir / "checkpoint.pt", self.device))
            replace(self.metrics_path, lambda file: file.write(metrics.encode()))  # without the rows that come again
        (self.dir / "result.json").unlink(missing_ok=True)  # of fewer updates: until its end, this run has none
        self._write_json("args.json", vars(args) | {"dataset_fingerprint": buffer.fingerprint})
        shapes = {w.shape for each in learner if hasattr(each, "parameters") for w in each.parameters() if w.ndim > 1}
        threads, found, n = torch.get_num_threads(), list[Any](), args.batch_size
        fixed = "OMP_NUM_THREADS" in os.environ or args.compile or n > 1024 or "dynamics" in self.parts  # SiLUs' differ
        for count, rng in [] if fixed else zip((1, threads), (torch.Generator(), torch.Generator()), strict=True):
            torch.set_num_threads(count)  # have the products of layers of these shapes the same bits with all?
            sides = ([torch.randn(*m, *s, generator=rng) for s in ((a, b), (n, b), (n, a))] for *m, a, b in shapes)
            found.append([product for w, x, slopes in sides for product in (x @ w.mT, slopes @ w, slopes.mT @ x)])
        self.threads = 1 if fixed or not all(map(torch.equal, *found)) else threads
        self.first_step, self.marks = self.step + 1, [0.0, 0.0]
        interval = 0.1 if sys.stderr.isatty() else 10  # in a log file every refresh is a line
        self.progress = tqdm(total=self.last_step, initial=self.step, desc=args.algorithm, mininterval=interval)
        interruption.close, interruption.waiting = self.progress.close, True
        if not args.resume:
            self.metrics_path.unlink(missing_ok=True)
            self.save_checkpoint()  # from here on, a run that is killed can be resumed
        track = [TRACKER, self.dir, "--skip", len([*self.rows()])]  # a process of its own, which Ctrl-C does not reach
        self.tracker = Popen([sys.executable, *map(str, track)], start_new_session=True) if args.track else None

    def is_due(self, step: int, every: int) -> bool:  # after the last update, too
        return step % every == 0 or step == self.last_step

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """What follows an update: evaluation, a row of metrics and a checkpoint, each when it is due and at the end."""
        self.step = step
        if self.device.type == "cuda" and self.is_due(step, self.args.log_every):
            torch.cuda.synchronize()  # else its updates are still to come, and their time is taken for the log's
        self.update_seconds += time.perf_counter() - self.began
        # beside other programs one thread is faster than two that wait: now and then 30 updates try one, and 30 all
        if self.threads > 1 and (trial := (step - self.first_step) % 3000 - 99) in (0, 30, 60):
            self.marks = [*self.marks[-2:], self.update_seconds]
            alone = trial == 0 or (trial == 60 and 2 * self.marks[-2] < self.marks[-3] + self.marks[-1])
            torch.set_num_threads(1 if alone else self.threads)
        if evaluating := self.is_due(step, self.args.eval_every):
            metrics = metrics | (self._validate() if self.buffer.validation else {}) | self._evaluate()
        if evaluating or self.is_due(step, self.args.log_every):
            self.log(step, metrics)
        self.progress.update()
        if interruption.number or self.is_due(step, self.args.checkpoint_every):
            self.save_checkpoint()
        self.began = time.perf_counter()

    def _validate(self) -> dict[str, Any]:  # what `update` finds of held-out transitions, and nothing learns from them
        learner, held_out, args = copy.deepcopy(self.learner), self.buffer.validation, self.args
        torch._foreach_zero_([group["lr"] for part in learner for group in getattr(part, "param_groups", [])])
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):  # the same rows every time
            torch.manual_seed(args.validation_seed)
            found = self.update(learner, self.make_batch(held_out, held_out.draw(8 * args.batch_size)), self.step, args)
        return {f"validation/{name}": value for name, value in found.items()}

    def _evaluate(self) -> dict[str, float]:  # mean and standard deviation of the policy's returns, and its score
        self._check_finite(self.parts)  # simulators fail in ways of their own on actions that are not numbers
        if self.policy and self.args.keep_policies:
            replace(self.dir / f"policy-{self.step}.pt", self.policy.save)
        if self.environments is None:
            return {}
        returns, _ = evaluate(self.policy, self.environments)
        found = {"eval/return_mean": float(returns.mean()), "eval/return_std": float(returns.std())}
        found |= {"eval/score": self.dataset.score(returns.mean())} if self.dataset.reference_returns else {}
        self.progress.set_postfix(found, refresh=False)
        return found

    def log(self, step: int, metrics: dict[str, Any]) -> None:  # a row of metrics.csv (and W&B); may raise Diverged
        row = {"step": step, "seconds": round(time.perf_counter() - self.started, 2)} | tree_map(float, metrics)
        self._check_finite(dict(sorted(row.items(), key=lambda item: "loss" not in item[0])))  # losses first
        self.columns += (missing := [name for name in row if name not in self.columns])
        writer = csv.DictWriter(text := io.StringIO(), self.columns, lineterminator="\n")
        if missing:  # the file gets wider
            writer.writeheader()
            writer.writerows([*self.rows(), row])
            replace(self.metrics_path, lambda file: file.write(text.getvalue().encode()))
        else:
            writer.writerow(row)
            with writing(self.metrics_path), self.metrics_path.open("a", newline="") as file:
                file.write(text.getvalue())

    def rows(self) -> Iterator[dict[str, str]]:  # of metrics.csv so far
        return csv.DictReader((self.metrics_path.read_text() if self.metrics_path.exists() else "").splitlines())

    def save_checkpoint(self) -> None:  # and policy.pt. Raises Diverged for a number that is not finite
        self._check_finite(self.parts)
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        arguments = self.learning_arguments | {"num_updates": min(self.step, self.args.num_updates)}
        checkpoint = {"arguments": arguments, "dataset_fingerprint": self.buffer.fingerprint, "step": self.step}
        checkpoint |= {"seconds": [time.perf_counter() - self.started, self.update_seconds]}
        checkpoint |= {"learner": {name: part.state_dict() for name, part in self.parts.items()}}
        checkpoint |= {"random_state": [torch.get_rng_state(), *cuda], "normalization": self.buffer.normalization}
        checkpoint |= {"metrics": self.metrics_path.read_text() if self.columns else ""}
        if self.policy:  # first: a kill in between leaves the older checkpoint, which leads to this policy again
            replace(self.dir / "policy.pt", self.policy.save)
        replace(self.dir / "checkpoint.pt", lambda file: torch.save(checkpoint, file))
        self.began = time.perf_counter()
        if interruption.number:
            raise KeyboardInterrupt(f"interrupted at update {self.step}; to go on, add --resume --run-dir {self.dir}")

    def finish(self, result: dict[str, Any] | None = None, outcome: str = "", plot: Callable | None = None) -> None:
        """Writes result.json and the curve, and the last line. A script without policy gives its own of the three."""
        if result is None:
            result, outcome, plot = self._final_score()
        args, seconds = self.args, time.perf_counter() - self.started
        known = {name: getattr(args, name) for name in ("dataset_id", "seed", "num_updates")} | result
        known |= {"updates_per_second": self.last_step / max(self.update_seconds, 1e-9), "wall_seconds": seconds}
        self._write_json("result.json", known | {"device": str(self.device)})
        if plot:
            replace(self.dir / "learning_curve.png", plot)
        self.progress.close()
        self.lock.release()
        print(f"{args.algorithm} on {args.dataset_id}: {outcome}, {seconds:.0f} s, {self.dir}", flush=True)
        _ = self.tracker and self.tracker.wait()  # at most two minutes: it gives up on W&B by itself

    def _final_score(self) -> tuple[dict[str, Any], str, Callable | None]:  # of the last policy, in fresh episodes
        dataset, mean = self.dataset, float(self.buffer.episode_returns.mean())
        unit, scale = ("score", dataset.score) if dataset.reference_returns else ("return", np.float64)
        result = {"final_score": None, "dataset_return_mean": mean, "dataset_score": dataset.score(mean)}
        if self.environments is None:
            return result, f"not evaluated, dataset average {unit} {scale(mean):.1f}", None
        returns, lengths = evaluate(self.policy, self.environments, self.args.final_eval_episodes, FINAL_SEED)
        final, error = float(scale(returns).mean()), float(scale(returns).std()) / max(len(returns) - 1, 1) ** 0.5
        result |= {"final_score": final if dataset.reference_returns else None, "final_standard_error": error}
        result |= {"final_return_mean": float(returns.mean()), "final_return_std": float(returns.std())}
        result |= {"final_returns": returns.tolist(), "final_lengths": lengths.tolist()}
        outcome = f"{unit} {final:.1f} +- {error:.1f} in {len(returns)} episodes, dataset average {scale(mean):.1f}"
        rows = [row for row in self.rows() if row.get("eval/return_mean")]
        curve = [int(row["step"]) for row in rows], [scale(float(row["eval/return_mean"])) for row in rows]
        return result, outcome, lambda file: self._plot(file, curve, scale(mean), unit)

    def _plot(self, file: IO[bytes], curve: Any, level: float, unit: str) -> None:
        from matplotlib.figure import Figure  # slow to import, and needed once

        axes, args = (figure := Figure(figsize=(6.4, 4), layout="constrained")).subplots(), self.args
        axes.plot(*curve, marker=".", label=f"{args.algorithm}, seed {args.seed}")
        axes.axhline(level, color="black", linestyle="--", linewidth=1, label="average of the dataset's episodes")
        axes.axvspan(args.num_updates, self.last_step, color="0.93", linewidth=0)  # here it acts, too
        axes.set(xlabel="updates", ylabel=f"{unit}, {args.eval_episodes} episodes", title=args.dataset_id)
        axes.legend()
        figure.savefig(file, dpi=150, format="png")

    def _check_finite(self, values: dict[str, Any]) -> None:  # Diverged for the first number, or part, that is not
        for name, value in values.items():
            leaves = tree_leaves(value if isinstance(value, (int, float)) else value.state_dict())
            tensors = (torch.as_tensor(leaf) for leaf in leaves if isinstance(leaf, (float, torch.Tensor)))
            if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                problem = f"{name} is {value if isinstance(value, float) else 'not finite'} at update {self.step}"
                raise Diverged(f"{problem}; the last checkpoint in {self.dir} is kept")

    def _take_dir(self) -> None:  # makes it, unless it is there, and keeps other processes out while this one lives
        where, begun, resume = f"--run-dir {self.dir}", (self.dir / "checkpoint.pt").exists(), self.args.resume
        check(begun or not resume, f"--resume: no checkpoint at {self.dir}; name a run's --run-dir, or go without")
        with explain(f"{where}: another process is at work in it, or it cannot be written to; name another one"):
            self.dir.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.dir / ".lock", timeout=0).acquire().lock
        check(resume or not begun, f"{where}: holds a run already; add --resume to go on with it, or name another one")
        check(begun or not (self.dir / "result.json").exists(), f"{where}: holds a run that ended; name another one")

    def _restore(self, checkpoint: dict[str, Any]) -> str:  # learner and random state; gives the rows of metrics
        self.step, (seconds, self.update_seconds) = int(checkpoint["step"]), map(float, checkpoint["seconds"])
        check(0 <= self.step <= self.last_step, f"it has made {self.step:,} updates already")
        for name, value in (self.learning_arguments | {"num_updates": min(self.step, self.args.num_updates)}).items():
            before = checkpoint["arguments"].get(name, value)
            check(before == value, f"{name} is {before} in it, not {value}")
        check(checkpoint["dataset_fingerprint"] == self.buffer.fingerprint, "it was trained on other data")
        for name, part in self.parts.items():
            if name != "player" or name in checkpoint["learner"]:  # it begins after the other updates
                part.load_state_dict(checkpoint["learner"][name])
        self._check_finite(self.parts)
        state, *cuda_states = (state.cpu() for state in checkpoint["random_state"])
        torch.set_rng_state(state)
        torch.cuda.set_rng_state_all(cuda_states[: torch.cuda.device_count()])  # a run is on the first
        self.columns = next(csv.reader(checkpoint["metrics"].splitlines()), [])
        self.started -= seconds
        return checkpoint["metrics"]

    def _write_json(self, name: str, content: dict[str, Any]) -> None:
        versions = {package: version(package) for package in ("torch", "numpy", "gymnasium", "minari")}
        whole = {"algorithm": self.args.algorithm} | content | {"versions": versions}
        replace(self.dir / name, lambda file: file.write(json.dumps(whole, indent=2, default=str).encode()))
