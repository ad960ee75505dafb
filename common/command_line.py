"""From the command line to the exit code: the arguments every script shares, and how a program ends."""

import contextlib
import dataclasses
import io
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, TypeVar, get_type_hints

import torch
import tyro
from typeguard import TypeCheckError, check_type

from common.datasets import BUILT_IN_ID, BadInput, check, one_line
from common.files import CannotWrite

ArgsT = TypeVar("ArgsT", bound="ExperimentArgs")


@dataclass
class ExperimentArgs:
    """Arguments that are not science; each script adds its own."""

    algorithm: ClassVar[str]  # the script's name

    dataset_id: str = BUILT_IN_ID
    """built-in id, Minari id (local first, else downloaded), or path of an HDF5 file in D4RL's layout"""
    env_id: str | None = None
    """evaluation environment; default: the one in the dataset's metadata"""
    trust_dataset_env: bool = False
    """run the code that the dataset names as its environment, if that is other than what is installed under its id"""
    seed: int = 0
    """seed of networks, batches and noise"""
    num_updates: int = 10_000
    """gradient steps; papers take 1,000,000 on MuJoCo tasks"""
    batch_size: int = 256
    """transitions per update"""
    eval_every: int = 1_000
    """updates between evaluations"""
    eval_episodes: int = 10
    """episodes per evaluation, one per environment copy"""
    log_every: int = 100
    """updates between rows of metrics.csv"""
    checkpoint_every: int = 5_000
    """updates between checkpoints"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one"""
    compile: bool = False
    """make each update one graph with torch.compile; on a GPU with CUDA graphs"""
    precision: Literal["float32", "bf16"] = "float32"
    """of matrix products; bf16 is for GPUs and for processors with AVX512-BF16 or AMX, and slower elsewhere"""
    run_dir: Path | None = None
    """folder of the run; default: runs/<algorithm>/<dataset>/<seed>-<time>"""
    resume: bool = False
    """go on from the checkpoint in --run-dir, with the arguments of that run"""
    track: bool = False
    """log to Weights & Biases too (WANDB_MODE=offline needs no account)"""
    wandb_project: str = "anchorl"
    """W&B project"""
    wandb_group: str | None = None
    """W&B group"""
    wandb_entity: str | None = None
    """W&B user or team"""

    def validate(self) -> None:
        """Raises BadInput. For every argument, by its type and name: whole numbers at least 1 (but the seed), others
        finite (but a clip, where inf is none), gamma in [0, 1], tau in (0, 1], a learning_rate positive,
        hidden_dims not empty. A script's own `validate` checks the rest.
        """
        check_argument(self, "seed", 0 <= self.seed < 2**63, "must not be negative")
        for name in (field.name for field in dataclasses.fields(self) if field.name != "seed"):
            value = getattr(self, name)
            if isinstance(value, float):
                check_argument(self, name, math.isfinite(value) or name.endswith("clip"), "must be a finite number")
            if type(value) is int:
                check_argument(self, name, value >= 1, "must be at least 1")
            elif name == "gamma":
                check_argument(self, name, 0 <= value <= 1, "must be in [0, 1]")
            elif name == "tau":
                check_argument(self, name, 0 < value <= 1, "must be in (0, 1]")
            elif name.endswith("learning_rate"):
                check_argument(self, name, value > 0, "must be positive")
            elif name.endswith("hidden_dims"):
                check_argument(self, name, min(value, default=0) >= 1, "must be one or more positive sizes")
        if self.device == "cuda":
            check_argument(self, "device", torch.cuda.is_available(), "PyTorch finds no CUDA device; take cpu or auto")
        check(
            not self.resume or self.run_dir is not None, "--resume needs --run-dir: the folder of the run to go on with"
        )


def check_argument(args: Any, name: str, condition: bool, rule: str) -> None:
    """Raises BadInput, naming the argument as typed and its value, unless `condition` holds."""
    check(condition, f"--{name.replace('_', '-')} {getattr(args, name)}: {rule}")


class Diverged(RuntimeError):
    """A loss or a weight is no longer finite; the last checkpoint is from before."""


class Stopped(KeyboardInterrupt):
    """SIGINT (Ctrl-C) or SIGTERM (what schedulers send) ends the run."""

    def __init__(self, number: int, message: str = "interrupted", at_once: bool = False) -> None:
        super().__init__(message)
        self.number, self.at_once = number, at_once


def launch(main: Callable[[Any], None], args_class: type[Any]) -> None:
    """Runs a script. Exit codes: 0 done, 1 cannot write to its folder, 2 bad input, 3 diverged, 130 or 143 stopped by
    Ctrl-C or SIGTERM; one line on stderr says why.

    `args_class` is a dataclass of arguments: a subclass of ExperimentArgs, or one of a script that trains nothing.
    """
    try:
        with on_signals(_stop):
            main(parse_args(args_class) if issubclass(args_class, ExperimentArgs) else _parse(args_class))
    except BadInput as error:
        _exit(2, f"error: {error}")
    except Diverged as error:
        _exit(3, f"error: {error}")
    except CannotWrite as error:
        _exit(1, f"error: {error}")
    except Stopped as stopped:
        if stopped.at_once:  # after a compilation, Python and torch take seconds to take themselves down
            print(stopped, file=sys.stderr, flush=True)
            os._exit(128 + stopped.number)
        _exit(128 + stopped.number, str(stopped))


def _exit(code: int, message: str) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(code)


def _stop(number: int, _: Any) -> None:
    raise Stopped(number)


@contextlib.contextmanager
def on_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to `handler`."""
    previous: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # signals belong to the main thread; a sweep agent may use another
        previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, before in previous.items():
            if signal.getsignal(number) == handler:  # else those outside were put back before
                signal.signal(number, before)


def parse_args(args_class: type[ArgsT], command_line: list[str] | None = None) -> ArgsT:
    """The command line as `args_class`; with --resume, what it leaves open is as in the run of --run-dir.

    Raises BadInput for a command line that cannot be read, and for a --resume that would change what is learned.
    """
    args = _parse(args_class, command_line, default=args_class())
    path = (args.run_dir or Path()) / "args.json"
    if not args.resume or args.run_dir is None or not path.is_file():
        return args
    try:
        saved = json.loads(path.read_text())
        found = saved["algorithm"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadInput(f"--resume: cannot read {path}: {one_line(error)}") from None
    check(found == args.algorithm, f"--resume: {args.run_dir} is a run of {found}, not of {args.algorithm}")
    names = {field.name for field in dataclasses.fields(args_class)} & saved.keys()
    before, kinds = args_class(), get_type_hints(args_class)
    for name in names - {"run_dir", "trust_dataset_env"}:  # trust is never inherited
        value = tuple(saved[name]) if isinstance(saved[name], list) else saved[name]
        try:
            setattr(before, name, check_type(value, kinds[name]))
        except TypeCheckError as error:
            raise BadInput(f"--resume: {path} is damaged: {name}: {error}") from None
    args = _parse(args_class, command_line, default=before)
    learning = {"dataset_id", "seed", "batch_size", "precision"}  # the shared arguments that decide what is learned
    plumbing = {field.name for field in dataclasses.fields(ExperimentArgs)} - learning
    for name in sorted(names - plumbing):
        value = getattr(before, name)
        rule = f"the run in {args.run_dir} has {value}; start a new run to change it"
        check_argument(args, name, getattr(args, name) == value, rule)
    return args


def _parse(args_class: type[Any], command_line: list[str] | None = None, default: Any = None) -> Any:
    module = sys.modules[args_class.__module__]
    program = f"python -m {module.__spec__.name}" if module.__spec__ and module.__name__ == "__main__" else None
    defaults = {} if default is None else {"default": default}  # tyro has a mark of its own for none
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(args_class, prog=program, args=command_line, description=module.__doc__, **defaults)
    except SystemExit as stop:
        if stop.code == 0:  # --help
            raise
        # tyro puts what it says under a title and into a frame or, where the terminal has no Unicode, between rules
        _, *lines = (line.strip("│ ") for line in errors.getvalue().splitlines())
        rules = [set(line) <= set("─╰╯-") for line in lines] + [True]
        begin = rules.index(False)
        end = rules.index(True, begin)
        hint = "; those of the scripts come after `--`" if "script" in args_class.__annotations__ else ""
        raise BadInput(f"{' '.join(lines[begin:end])} (--help lists the arguments{hint})") from None
