# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gymnasium[mujoco]==1.4.0", "h5py>=3", "numpy>=2", "pyyaml>=6", "torch==2.13.0", "tqdm>=4.66", "tyro>=1",
# ]
# ///
"""Scores of CORL in our protocol (protocol.py): the same Minari data, updates, evaluations and seeds.

CORL is no package: --corl is a checkout of github.com/corl-team/CORL (made for commit eeeeef2). Its `train` runs
unchanged, with its networks, buffer, batches and updates, on our transitions and with our evaluation in place of its
own; its environment packages and trackers are not needed. It reads what it wants of the configuration that CORL has for
the dataset: zoo/hopper/medium-expert-v0 is hopper/medium_expert_v2.yaml (without such a file, TrainConfig's values).
Of these the seed, the updates, the evaluations, the device and the buffer's size are ours, so IQL's cosine decay is
over --num-updates.

What they say: batches of 256, tau 0.005, observations normalised. TD3+BC: alpha 2.5. AWAC: lambda 1/3, three layers.
CQL: alpha 10, three layers, actor 3e-5, rewards scaled to a range of returns of 1,000 on hopper/medium alone. IQL: beta
3, expectile 0.7, rewards as they are, but for hopper: on medium-expert beta 6 and expectile 0.5; on medium a
deterministic actor, tau 0.001 and rewards scaled as CQL's. Where the bounds are not [-1, 1] actions are scaled to them.

Run: uv run benchmarks/peers/corl_scores.py --corl ../CORL --datasets zoo/hopper/medium-expert-v0 --out runs/corl
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

os.environ["TQDM_DISABLE"] = "1"  # no bars; before torch, which imports tqdm
import numpy as np
import torch
import tyro
import yaml
from protocol import Args as SharedArgs
from protocol import Cell, Environment, Policy, StandIn, commit_of, load, run, stop

ABSENT = ("d4rl", "gym", "pyrallis", "wandb")
# of CORL's configuration, what AWAC calls otherwise
NAMES = {"max_timesteps": "num_train_ops", "eval_freq": "eval_frequency", "n_episodes": "n_test_episodes"}


@dataclass
class Args(SharedArgs):
    algorithms: tuple[Literal["td3_bc", "iql", "cql", "awac"], ...] = ("td3_bc", "iql", "cql", "awac")
    """as our scripts are called"""
    corl: Path = Path("../CORL")
    """a checkout of CORL"""
    out: Path = Path("runs/corl")
    """results go here"""


def configuration(module: Any, algorithm: str, cell: Cell, corl: Path) -> Any:
    """CORL's TrainConfig for the dataset, with the cell's updates, evaluations and seed."""
    values: dict[str, Any] = {}
    *_, task, level = ["", *cell.data.dataset_id.split("/")]
    path = corl / "configs" / "offline" / algorithm / task / f"{level.rpartition('-')[0].replace('-', '_')}_v2.yaml"
    if path.exists():
        values = yaml.safe_load(path.read_text())
    args, fields = cell.args, {field.name: field for field in dataclasses.fields(module.TrainConfig)}
    ours = {"max_timesteps": args.num_updates, "eval_freq": args.eval_every, "n_episodes": args.eval_episodes}
    values |= {name if name in fields else NAMES[name]: value for name, value in ours.items()}
    values |= {"seed": cell.seed, "device": "cpu", "buffer_size": len(cell.data.rewards)}
    for name, value in values.items():
        if fields[name].type is float:
            values[name] = float(value)  # YAML takes 3e-4 for a word
    return module.TrainConfig(**values)


def policy_of(actor: Any, mean: Any, std: Any, cell: Cell) -> Policy:
    """CORL's `act`, which takes one state, as in its `eval_actor`."""

    @torch.no_grad()
    def policy(observations: np.ndarray) -> np.ndarray:
        actor.eval()
        actions = np.stack([actor.act(state, "cpu") for state in (observations - mean) / std])
        actor.train()
        return cell.from_unit(actions)

    return policy


def train(algorithm: str, cell: Cell, args: Args) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """CORL's `train` with the cell's environment, data and evaluation."""
    if cell.args.num_updates % cell.args.eval_every:
        stop("--num-updates: must be a multiple of --eval-every, where CORL evaluates")
    module = load(args.corl / "algorithms" / "offline", algorithm, f"--corl {args.corl}", ABSENT)
    scaling: dict[str, Any] = {}
    policies: list[Policy] = []

    def wrap_env(env: Environment, state_mean: Any, state_std: Any) -> Environment:
        scaling.update(mean=state_mean, std=state_std)
        return env

    def eval_actor(env: Environment, actor: Any, *_: Any, **__: Any) -> np.ndarray:
        policies[:] = [policy_of(actor, **scaling, cell=cell)]
        cell.evaluate((len(cell.rows) + 1) * cell.args.eval_every, policies[0])
        return np.array([cell.rows[-1]["return_mean"]])

    def wandb_init(*_: Any) -> None:  # the last step before the updates
        cell.start()

    module.gym.make = lambda name: Environment(cell)
    module.d4rl.qlearning_dataset = lambda env: cell.data.d4rl(cell.space)
    module.wrap_env, module.eval_actor, module.wandb_init = wrap_env, eval_actor, wandb_init
    module.print = StandIn("print")  # its lines would repeat ours
    module.train(configuration(module, algorithm, cell, args.corl))
    return cell.finish(policies[0], f"CORL {commit_of(args.corl)}")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    run("CORL", args.algorithms, args, lambda algorithm, cell: train(algorithm, cell, args))


if __name__ == "__main__":
    main()
