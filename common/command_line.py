"""From the command line to the exit code: the arguments every script shares, and how a program ends."""

import contextlib
import math
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from tqdm import tqdm

BUILT_IN_ID = "anchorl/pendulum/mixed-v0"
TRACKER = Path(__file__).resolve().parents[1] / "benchmarks" / "track.py"  # what --track starts


class BadInput(ValueError): ...  # something impossible was asked for: one line, what, where, what to do. Exit code 2


class Diverged(RuntimeError): ...  # a loss or a weight is no longer finite; the last checkpoint is older. Exit code 3


def check(condition: bool, message: str) -> None:  # raises BadInput unless it holds
    if not condition:
        raise BadInput(message)


def check_argument(args: Any, name: str, condition: bool, rule: str) -> None:  # likewise, naming it as it is typed
    check(condition, f"--{name.replace('_', '-')} {getattr(args, name)}: {rule}")


def one_line(error: BaseException) -> str:  # the message of somebody else's, fit for the one line of ours
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextlib.contextmanager
def explain(problem: str) -> Iterator[None]:
    """Turns what goes wrong inside, of which files from elsewhere raise many kinds, into BadInput: problem, reason."""
    try:
        yield
    except (Exception, SystemExit) as error:  # a missing simulator raises whatever its binding raises
        raise BadInput(f"{problem}: {one_line(error)}") from None


def warn(message: str) -> None:  # one line on stderr, above a progress bar
    tqdm.write(f"warning: {message}", file=sys.stderr)


@dataclass
class ExperimentArgs:  # what is not science; each script adds its hyper-parameters
    dataset_id: str = BUILT_IN_ID  # built-in id or Minari id (local first, else downloaded)
    validation_fraction: float = 0.0  # share of the episodes held out of training, to measure the losses on them
    validation_seed: int = 0  # chooses these episodes
    env_id: str | None = None  # environment to evaluate and act in; module:Id imports yours first; default: the data's
    seed: int = 0  # seed of networks, batches and noise
    num_updates: int = 10_000  # gradient steps; papers take 1,000,000 on MuJoCo tasks
    online_steps: tyro.conf.Suppress[tyro.conf.Fixed[int]] = 0  # updates after those, some scripts': see there
    batch_size: int = 256  # transitions per update
    eval_every: int = 1_000  # updates between evaluations
    eval_episodes: int = 10  # episodes per evaluation, one per environment copy, always from the same states
    final_eval_episodes: int = 50  # episodes of the last policy, from other states: the final score
    keep_policies: bool = False  # keep the policy of each evaluation, as policy-<update>.pt
    log_every: int = 100  # updates between rows of metrics.csv
    checkpoint_every: int = 5_000  # updates between checkpoints
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    compile: bool = False  # make each update one graph with torch.compile; on a GPU with CUDA graphs
    precision: Literal["float32", "bf16"] = "float32"  # of matrix products; bf16 pays with hardware for it, such as AMX
    run_dir: Path | None = None  # folder of the run; default: runs/<algorithm>/<dataset>/<seed>-<time>
    resume: bool = False  # added to the same command: go on from the checkpoint in --run-dir
    track: bool = False  # log to Weights & Biases too (WANDB_MODE=offline needs no account)
    wandb_project: str = "anchorl"  # W&B project
    wandb_group: str | None = None  # W&B group
    wandb_entity: str | None = None  # W&B user or team

    @property
    def algorithm(self) -> str:  # the script that defines the arguments: iql, or a user's own, my_iql
        return Path(str(sys.modules[type(self).__module__].__file__)).stem

    def hyper_parameters(self) -> dict[str, Any]:  # what the script adds to the arguments above
        return {name: value for name, value in vars(self).items() if name not in ExperimentArgs.__dataclass_fields__}

    def validate(self) -> None:  # raises BadInput by rules for types and names; a script's `validate` checks the rest
        for name, value in vars(self).items():
            least = 0 if name.endswith(("seed", "warm_start", "online_steps")) else 1
            for broken, rule in [
                (isinstance(value, float) and not name.endswith("clip") and not math.isfinite(value), "must be finite"),
                (type(value) is int and not least <= value < 2**63, f"must be at least {least}"),
                (name in ("gamma", "validation_fraction") and not 0 <= value <= 1, "must be in [0, 1]"),
                (name == "validation_seed" and value and not self.validation_fraction, "needs --validation-fraction"),
                (name == "track" and value and not TRACKER.is_file(), f"there is no {TRACKER}: copy it, too"),
                (name == "tau" and not 0 < value <= 1, "must be in (0, 1]"),
                (type(value) is float and name.endswith(("rate", "reward_scale")) and value <= 0, "must be positive"),
                (name.endswith("dims") and not 1 <= min(value, default=0) <= max(value) <= 10**5, "1 to 100,000 each"),
                (name == "run_dir" and value == Path(), "must name a folder"),
                (name.endswith(("size", "episodes")) and value > 10**7, "must be at most 10,000,000"),
            ]:
                check_argument(self, name, not broken, rule)


class Interruption:  # SIGINT or SIGTERM ends the program, or waits as `number` for a run's update; the second kills
    number, waiting = 0, False
    close: Callable[[], object] = staticmethod(lambda: None)  # of a progress bar, before the last line

    def __call__(self, number: int, _: Any) -> None:
        self.number = number
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_DFL)
        if not self.waiting:
            raise KeyboardInterrupt("interrupted")


interruption = Interruption()


def launch(main: Callable[[Any], None], args_class: type[Any]) -> None:
    """Runs `main` with its arguments. What stops it becomes the exit code, and one line on stderr that says why."""
    with contextlib.suppress(ValueError, AttributeError):  # in a sweep agent's thread; of a closed output
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interruption)
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        return main(tyro.cli(args_class, description=sys.modules[args_class.__module__].__doc__))  # exit code 2, too
    except (OSError, BadInput, MemoryError, RuntimeError) as error:  # OSError: a full disk, a closed output
        code, words = 1 if isinstance(error, OSError) else 2 if isinstance(error, BadInput) else 3, f"error: {error}"
        if code == 3 and not isinstance(error, Diverged):
            if "allocate" not in str(error):  # as NumPy and PyTorch say it, on all devices
                raise
            code, words = 2, f"error: the memory is too small, ask for less: {one_line(error)}"
    except KeyboardInterrupt as stopped:
        code, words = 128 + interruption.number, str(stopped)
    interruption.close()
    try:
        sys.stdout.flush()
    except (OSError, AttributeError):  # it is closed, or its disk full: what it has not taken would fail again
        sys.stdout = None  # type: ignore[assignment]
    print(words, file=sys.stderr, flush=True)
    raise SystemExit(code)
