# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[mujoco]==1.4.0", "h5py>=3", "numpy>=2", "torch==2.13.0", "tqdm>=4.66", "tyro>=1",
# ]
# ///
"""Scores of OfflineRL-Kit in our protocol (protocol.py): the same Minari data, updates, evaluations and seeds.

--kit is a checkout of github.com/yihaosun1124/OfflineRL-Kit (made for commit e3ce697; it need not be installed). Its
run_example/run_<algorithm>.py runs unchanged, with its networks, model, buffers, batches and trainer, on our
transitions and with our evaluation in place of its own; its environment packages and trackers are not needed. Its
arguments are its defaults and, of the table in its file, those for the dataset: zoo/hopper/medium-expert-v0 is
hopper-medium-expert-v2. Of these the seed, the updates, the evaluations and the device are ours, so the cosine decay of
MOPO's, COMBO's and IQL's actor is over --num-updates, in steps of 1,000.

What they say: batches of 256; observations as they are but for TD3+BC; rewards as they are but for IQL, which scales
them to a range of returns of 1,000; actor 1e-4 and critic 3e-4 (TD3+BC and IQL: 3e-4 both). MOPO: two layers; hopper
medium and medium-expert rollouts of 5 and a penalty of 5; walker2d medium-expert 1 and 2.5; halfcheetah medium-expert 5
and 2.5; 5% real data. COMBO: three layers, weight 5 (halfcheetah medium 0.5), rollouts of 5 (walker2d 1), half real
data. CQL: three layers, weight 5. EDAC: three layers, 50 critics and eta 1 on hopper, else 10 and 1, or 5 on
medium-expert. MOPO and COMBO know when walker2d, hopper and halfcheetah end, and are for these alone.

MOPO's and COMBO's model is the same: the first to need it, for a dataset and a seed, trains it (its time is in
wall_seconds) and leaves it in OUT/dynamics for the other. What --more says of it, and --max-dynamics-epochs, are in
its folder's name; in the name of the algorithm, as results have it, is all of --more.

Run: uv run benchmarks/peers/offlinerlkit_scores.py --kit ../OfflineRL-Kit --datasets zoo/hopper/medium-expert-v0
"""

import argparse
import os
import re
import sys
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any, Literal

os.environ["TQDM_DISABLE"] = "1"  # no bars; before torch, which imports tqdm
import numpy as np
import tyro
from protocol import Args as SharedArgs
from protocol import Cell, Environment, Policy, StandIn, commit_of, load, run, stop

ABSENT = ("d4rl", "gym", "gym.envs", "gym.envs.mujoco", "torch.utils.tensorboard")
SCRIPTS = {"td3_bc": "run_td3bc"}  # the others are called as ours
WITH_MODEL = ("mopo", "combo")
TASKS = ("halfcheetah", "hopper", "walker2d")
EPOCH = 1_000  # updates, as in run_example
OF_MODEL = "dynamics", "n-ensemble", "n-elites"  # arguments that begin so are the model's


@dataclass
class Args(SharedArgs):
    algorithms: tuple[Literal["mopo", "combo", "cql", "edac", "td3_bc", "iql"], ...] = ("mopo", "combo", "cql")
    """as our scripts are called"""
    datasets: tuple[str, ...] = ("zoo/hopper/medium-expert-v0",)
    """ids of local Minari datasets"""
    kit: Path = Path("../OfflineRL-Kit")
    """a checkout of OfflineRL-Kit"""
    more: tuple[str, ...] = ()
    """arguments of its script after those for the dataset, such as tau=0.02 actor-lr=1e-3"""
    max_dynamics_epochs: int | None = None
    """epochs of MOPO's and COMBO's model at most; default: as long as it improves, as in the kit"""
    out: Path = Path("runs/offlinerlkit")
    """results go here"""


def task_of(dataset_id: str) -> str:
    """D4RL's name: zoo/hopper/medium-expert-v0 is hopper-medium-expert-v2."""
    *_, task, level = ["", *dataset_id.split("/")]
    return f"{task}-{level.rpartition('-')[0]}-v2"


def suggested(text: str, task: str) -> list[str]:
    """Arguments from the line of a script that says, as "hopper-medium-v2: rollout-length=5, penalty-coef=5.0"."""
    found = re.search(rf"^{re.escape(task)}: (.*)$", text, flags=re.MULTILINE)
    return [f"--{pair.strip()}" for pair in found[1].split(",")] if found else []


def full_name(algorithm: str, args: Args) -> str:
    """With all arguments that are not the kit's own: mopo --tau 0.02. Cells of others are not the same cells."""
    epochs = args.max_dynamics_epochs if algorithm in WITH_MODEL else None
    words = [f"--{pair.replace('=', ' ')}" for pair in args.more]
    return " ".join([algorithm, *words, *([f"--max-dynamics-epochs {epochs}"] if epochs else [])])


def model_folder(cell: Cell, args: Args) -> Path:
    """Of the model for a dataset and a seed, as it is trained with these arguments."""
    words = [pair for pair in args.more if pair.startswith(OF_MODEL)]
    words += [f"epochs={args.max_dynamics_epochs}"] if args.max_dynamics_epochs else []
    return cell.args.out / "dynamics" / cell.data.dataset_id / " ".join([str(cell.seed), *words])


def arguments(module: Any, cell: Cell, model: Path) -> argparse.Namespace:
    """Those of `get_args`, with the cell's updates, evaluations and seed."""
    args = module.get_args()
    args.seed, args.device, args.eval_episodes = cell.seed, "cpu", cell.args.eval_episodes
    args.step_per_epoch = min(EPOCH, cell.args.eval_every)
    args.epoch = cell.args.num_updates // args.step_per_epoch
    args.load_dynamics_path = str(model) if (model / "std.npy").exists() else None  # the last file that is written
    return args


def trainer_of(base: Any, cell: Cell, policies: list[Policy]) -> Any:
    """The kit's trainer, with our evaluation where one is due."""

    class Trainer(base):
        step = 0

        def train(self) -> Any:
            cell.start()
            return super().train()

        def _evaluate(self) -> dict[str, list[float]]:
            self.step += self._step_per_epoch
            self.policy.eval()
            policies[:] = [lambda observations: cell.from_unit(self.policy.select_action(observations, True))]
            if cell.due(self.step):
                cell.evaluate(self.step, policies[0])
            mean = cell.rows[-1]["return_mean"] if cell.rows else np.nan
            return {"eval/episode_reward": [mean], "eval/episode_length": [0.0]}

    return Trainer


def train(algorithm: str, cell: Cell, args: Args) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The kit's `train` with the cell's environment, data and evaluation."""
    step, task = min(EPOCH, cell.args.eval_every), task_of(cell.data.dataset_id)
    if cell.args.eval_every % step or cell.args.num_updates % step:
        stop(f"--num-updates, --eval-every: must be multiples of {step}, an epoch of OfflineRL-Kit")
    if algorithm in WITH_MODEL and not task.startswith(TASKS):
        stop(f"--algorithms {algorithm}: OfflineRL-Kit does not know when {cell.data.dataset_id} ends")
    folder, script = args.kit / "run_example", SCRIPTS.get(algorithm, f"run_{algorithm}")
    path = folder / f"{script}.py"
    words = suggested(path.read_text(), task) if path.exists() else []
    words = ["--task", task, *words, *(f"--{pair}" for pair in args.more)]
    sys.argv = [str(path), *words]  # which `get_args` reads, when the module is imported too
    module = load(folder, script, f"--kit {args.kit}", ABSENT)
    model = model_folder(cell, args)
    model.mkdir(parents=True, exist_ok=True)
    logger = StandIn("logger")
    logger.model_dir = logger.checkpoint_dir = str(model)  # type: ignore[attr-defined]
    policies: list[Policy] = []
    module.gym.make = lambda name: Environment(cell)
    module.qlearning_dataset = module.d4rl.qlearning_dataset = lambda env: cell.data.d4rl(cell.space)
    module.Logger, module.make_log_dirs = (lambda *_: logger), StandIn("make_log_dirs")
    if algorithm in WITH_MODEL:
        fit = partialmethod(module.EnsembleDynamics.train, max_epochs=args.max_dynamics_epochs)
        module.EnsembleDynamics = type("EnsembleDynamics", (module.EnsembleDynamics,), {"train": fit})
    name = "MBPolicyTrainer" if algorithm in WITH_MODEL else "MFPolicyTrainer"
    base = getattr(module, name)
    setattr(module, name, trainer_of(base, cell, policies))
    try:
        module.train(arguments(module, cell, model))
    finally:
        setattr(module, name, base)
    return cell.finish(policies[0], f"OfflineRL-Kit {commit_of(args.kit)}")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    sys.path.append(str(args.kit))
    names = tuple(full_name(algorithm, args) for algorithm in args.algorithms)
    run("OfflineRL-Kit", names, args, lambda name, cell: train(name.split()[0], cell, args))


if __name__ == "__main__":
    main()
