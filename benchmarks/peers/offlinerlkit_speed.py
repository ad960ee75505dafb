"""MOPO's two parts beside OfflineRL-Kit's, in one process and in turns: an epoch of the model, and 1,000 updates.

Both have the same sizes: 7 models of four layers of 200, batches of 256 a model; rollouts of 5 steps from 50,000 states
before the 1,000 updates, of networks of two layers of 256 with batches of 256. The data are random numbers of
HalfCheetah's size, whose rollouts never end. Ours is the script's own function for each part, eager, with --compile,
and with --precision bf16 as well; the kit's its run_example/run_mopo.py, unchanged, up to its dynamics' `train` with
one epoch, and its trainer's with 1,000 updates. Evaluations, and what the kit saves at the end of an epoch, are not in
either.

--kit is a checkout of github.com/yihaosun1124/OfflineRL-Kit (made for commit e3ce697). It needs nothing that ours does
not, so this runs in our environment.

Run: python benchmarks/peers/offlinerlkit_speed.py --kit ../OfflineRL-Kit --threads 2
"""

import csv
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # no bars; before torch, which imports tqdm
import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "measurements"))
import throughput
from offlinerlkit_scores import ABSENT
from protocol import StandIn, load, stop

from common.evaluation import load_script
from common.experiment import set_up
from common.optim import Adam, compiled

UPDATES = 1_000
TASK = "halfcheetah-medium-v2"  # the kit's rollouts of it have 5 steps, and no end


@dataclass
class Args:
    kit: Path = Path("../OfflineRL-Kit")
    """a checkout of OfflineRL-Kit"""
    csv: Path | None = None
    """write the table here"""
    episodes: int = 20
    """of 1,000 transitions each, in the data"""
    rounds: int = 3
    """times that the kit and ours take turns"""
    threads: int = 1
    """PyTorch's"""


Parts = dict[str, Callable[[], None]]  # an epoch of the model, and 1,000 updates


def ours(args: Args, **options: Any) -> Parts:
    """mopo.py's, on the same number of transitions."""
    mopo: Any = load_script("mopo")
    sizes = throughput.Args(threads=args.threads)
    buffer = throughput.random_buffer(sizes, "mopo", torch.device("cpu"), args.episodes)
    own = mopo.Args(max_dynamics_epochs=1, device="cpu", **options)
    device = set_up(own)
    learner = mopo.build(buffer.observation_dim, buffer.action_dim, own, device, Adam)
    train, train_dynamics = (compiled(each, learner, own) for each in (mopo.update, mopo.dynamics_update))
    num_real = round(own.real_ratio * own.batch_size)

    def epoch() -> None:
        learner.dynamics.epoch.zero_()
        learner.dynamics.best_epoch.zero_()
        for _ in mopo.fit_dynamics(learner, mopo.Batch(*buffer.transitions), own, train_dynamics):
            pass

    def updates() -> None:  # the body of mopo.main
        elites = learner.dynamics.elites(own.num_elites)
        for step in range(1, UPDATES + 1):
            if (step - 1) % own.rollout_every == 0:
                starts = mopo.Batch(*buffer.sample(own.rollout_batch_size))
                rolled, _ = mopo.rollout(learner.actor, elites, starts, buffer.normalization, "HalfCheetah", own)
                learner.model_buffer.add(rolled, own.rollouts_kept * own.rollout_batch_size * own.rollout_length)
            parts = buffer.sample(num_real), learner.model_buffer.sample(own.batch_size - num_real)
            train(learner, mopo.Batch(*map(torch.cat, zip(*parts, strict=True))), step, own)

    return {"epoch": epoch, "updates": updates}


def kits(args: Args) -> Parts:
    """The kit's, whose `train` builds all and stops where it would train."""
    size, rng = args.episodes * 1_000, np.random.default_rng(0)
    shape, sizes = (throughput.Args.observation_dim,), throughput.Args
    data: dict[str, Any] = {
        "observations": rng.normal(size=(size, *shape)),
        "next_observations": rng.normal(size=(size, *shape)),
    }
    data |= {"actions": rng.uniform(-1, 1, size=(size, sizes.action_dim)), "rewards": rng.normal(size=size)}
    data = {name: values.astype(np.float32) for name, values in data.items()} | {"terminals": np.zeros(size, bool)}
    environment = SimpleNamespace(
        observation_space=gym.spaces.Box(-np.inf, np.inf, shape, np.float32),
        action_space=gym.spaces.Box(-1, 1, (sizes.action_dim,), np.float32),
        get_normalized_score=float,
        seed=lambda seed: None,
    )
    sys.path.append(str(args.kit))
    sys.argv = ["run_mopo.py", "--task", TASK, "--rollout-length", "5", "--device", "cpu"]  # read at the import, too
    module = load(args.kit / "run_example", "run_mopo", f"--kit {args.kit}", ABSENT)
    found: dict[str, Any] = {}
    dynamics_class: Any = module.EnsembleDynamics
    trainer_class: Any = module.MBPolicyTrainer

    class Dynamics(dynamics_class):
        def train(self, data: Any, logger: Any, **_: Any) -> None:
            found["epoch"] = lambda: super(Dynamics, self).train(data, logger, max_epochs=1)

        def save(self, path: Any) -> None: ...

    class Trainer(trainer_class):
        def train(self) -> Any:
            found["updates"] = super().train

        def _evaluate(self) -> Any:
            return {"eval/episode_reward": [0.0], "eval/episode_length": [0.0]}

    logger = StandIn("logger")
    logger.model_dir = logger.checkpoint_dir = os.devnull  # type: ignore[attr-defined]
    module.EnsembleDynamics, module.MBPolicyTrainer = Dynamics, Trainer
    module.gym.make = lambda name: environment
    module.qlearning_dataset = module.d4rl.qlearning_dataset = lambda env: data
    module.Logger, module.make_log_dirs = (lambda *_: logger), StandIn("make_log_dirs")
    kit_args = module.get_args()
    kit_args.epoch, kit_args.step_per_epoch = 1, UPDATES
    module.train(kit_args)

    def updates() -> None:
        torch.save, saved = (lambda *_: None), torch.save
        found["updates"]()
        torch.save = saved

    return {"epoch": found["epoch"], "updates": updates}


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    if args.rounds < 1 or args.episodes < 1:
        stop("--rounds, --episodes: must be at least 1")
    torch.set_num_threads(args.threads)
    modes = {"kit": kits(args), "eager": ours(args), "compile": ours(args, compile=True)}
    modes["bf16"] = ours(args, compile=True, precision="bf16")
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(args.rounds + 1):  # the first, which compiles, is not counted
        for part in ("epoch", "updates"):
            for mode, parts in modes.items():
                began = time.perf_counter()
                parts[part]()
                if number:
                    seconds.setdefault((part, mode), []).append(time.perf_counter() - began)
    rows = []
    for part in ("epoch", "updates"):
        medians = {mode: statistics.median(seconds[part, mode]) for mode in modes}
        row: dict[str, Any] = {"part": part, "threads": args.threads}
        row |= {f"{mode}_s": round(value, 2) for mode, value in medians.items()}
        for mode in list(modes)[1:]:
            ratios = [a / b for a, b in zip(seconds[part, "kit"], seconds[part, mode], strict=True)]
            row[f"kit/{mode}"] = round(statistics.median(ratios), 2)
        rows.append(row)
        print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
