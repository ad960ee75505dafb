# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[mujoco]==1.4.0", "h5py>=3", "numpy>=2", "torch==2.13.0", "tyro>=1",
# ]
# ///
"""Scores of the code of EDAC's authors in our protocol (protocol.py): the same data, updates, evaluations and seeds.

--edac is a checkout of github.com/snu-mllab/EDAC (made for commit 198d570; it need not be installed). Its
scripts/sac.py says the arguments, its get_config makes the networks and the trainer, and its buffer draws the batches;
all of that is unchanged, on our transitions and with our evaluation in place of its own. Its environment packages and
loggers are not needed.

What they say: batches of 256, three layers of 256, rates of 3e-4, tau 0.005, observations and rewards as they are. The
paper's critics and eta are 50 and 1 for Hopper; for the others 10 and 1, on medium-expert 10 and 5.

Run: uv run benchmarks/peers/edac_scores.py --edac ../EDAC --datasets zoo/hopper/medium-expert-v0
"""

import importlib
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
import tyro
from protocol import Args as SharedArgs
from protocol import Cell, Environment, StandIn, commit_of, load, run

ABSENT: tuple[str, ...] = ("d4rl", "dateutil", "dateutil.tz", "experiment_configs.base_experiment", "gtimer")
ABSENT += ("matplotlib", "matplotlib.pyplot", "tensorboardX")


@dataclass
class Args(SharedArgs):
    datasets: tuple[str, ...] = ("zoo/hopper/medium-expert-v0",)
    """ids of local Minari datasets"""
    edac: Path = Path("../EDAC")
    """a checkout of EDAC"""
    num_critics: int = 10
    """N, its --num_qs, whose default is 10, too"""
    eta: float = 1.0
    """weight of the diversity; its default, -1, is SAC-N"""
    out: Path = Path("runs/edac")
    """results go here"""


def full_name(args: Args) -> str:
    """With the arguments that are not the default: edac --num-critics 50. Cells of others are not the same cells."""
    words = {"--num-critics": args.num_critics, "--eta": f"{args.eta:g}"}
    default = {"--num-critics": Args.num_critics, "--eta": f"{Args.eta:g}"}
    return " ".join(["edac", *(f"{name} {value}" for name, value in words.items() if value != default[name])])


def variant_of(cell: Cell, args: Args) -> dict[str, Any]:
    """What the authors' command line makes of the arguments."""
    found: dict[str, Any] = {}
    launcher = load(args.edac, "experiment_utils.launch_experiment", f"--edac {args.edac}", ABSENT)
    launcher.launch_experiment = lambda **experiment: found.update(experiment)
    words = {"env_name": cell.data.dataset_id, "seed": cell.seed, "num_qs": args.num_critics, "eta": args.eta}
    sys.argv = ["sac", *(word for name, value in words.items() for word in (f"--{name}", str(value)))]
    runpy.run_path(str(args.edac / "scripts" / "sac.py"), run_name="__main__")
    return found


def train(cell: Cell, args: Args) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The authors' networks, buffer and trainer, one update after the other as in their OfflineRLAlgorithm."""
    sys.modules["gym"] = gymnasium
    experiment = variant_of(cell, args)
    prepare = importlib.import_module("experiment_utils.prepare_data")
    buffers = importlib.import_module("lifelong_rl.data_management.replay_buffers.env_replay_buffer")
    prepare.qlearning_dataset = lambda env: cell.data.d4rl(cell.space)  # type: ignore[attr-defined]
    prepare.print = StandIn("print")  # type: ignore[attr-defined]
    torch.manual_seed(cell.seed)
    np.random.seed(cell.seed)
    environment = Environment(cell)
    buffer = buffers.EnvReplayBuffer(1, environment)  # load_hdf5 gives it arrays of its own
    prepare.load_hdf5(environment, buffer, experiment["data_args"])
    dims = environment.observation_space.shape[0], environment.action_space.shape[0]
    config = experiment["get_config"](experiment["variant"], environment, environment, *dims, buffer)

    def policy(observations: np.ndarray) -> np.ndarray:
        return cell.from_unit(config["evaluation_policy"].stochastic_policy.get_actions(observations, True))

    batch_size = experiment["variant"]["offline_kwargs"]["batch_size"]
    cell.start()
    for step in range(1, cell.args.num_updates + 1):
        config["trainer"].train(*buffer.random_batch(batch_size, return_indices=True))
        if cell.due(step):
            cell.evaluate(step, policy)
    return cell.finish(policy, f"EDAC {commit_of(args.edac)}")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    sys.path.append(str(args.edac))
    run("snu-mllab", (full_name(args),), args, lambda _, cell: train(cell, args))


if __name__ == "__main__":
    main()
