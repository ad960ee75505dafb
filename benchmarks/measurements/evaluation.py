"""Seconds that an evaluation takes, beside the environments' own: the same actions, without policy or bookkeeping.

A policy of 256 x 256 with random weights, ten episodes at once. Both take turns; the ratio is the median over rounds.

Run: python -m benchmarks.measurements.evaluation
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "algorithms"))
import td3_bc

from common.command_line import check, explain, launch
from common.data import Dataset
from common.evaluation import EVALUATION_SEED, Policy, evaluate, make_environments


@dataclass
class Args:
    env_id: str = "HalfCheetah-v5"
    """with Box observations and actions; MuJoCo's need pip install -e '.[mujoco]'"""
    num_episodes: int = 10
    """at once"""
    rounds: int = 9
    """times that the two take turns"""


def main(args: Args) -> None:
    check(min(args.num_episodes, args.rounds) >= 1, "--num-episodes and --rounds: must be at least 1")
    with explain(f"--env-id {args.env_id}"):
        copies: list[Any] = [gym.make(args.env_id, disable_env_checker=True) for _ in range(args.num_episodes)]
        spaces = copies[0].observation_space, copies[0].action_space
        vectors = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in spaces)
        check(vectors, "observations and actions must be vectors")
    (observation_dim,), (action_dim,) = spaces[0].shape, spaces[1].shape
    low, high = spaces[1].low, spaces[1].high
    dataset = Dataset(
        "random", 0, list(map(str, range(observation_dim))), low, high, lambda: iter(()), env_id=args.env_id
    )
    environments = make_environments(dataset, args.num_episodes)
    torch.manual_seed(0)
    actor = td3_bc.Actor(observation_dim, action_dim, td3_bc.HyperParameters(hidden_dims=(256, 256)))
    normalization = torch.stack([torch.zeros(observation_dim), torch.ones(observation_dim)])
    policy = Policy(actor, normalization, (low, high), discrete=False, origin={})
    actions: list[np.ndarray] = []

    def recorded(observations: np.ndarray) -> np.ndarray:
        actions.append(policy(observations))
        return actions[-1]

    evaluate(recorded, environments)
    rows = []
    for _ in range(args.rounds):
        began = time.perf_counter()
        evaluate(policy, environments)
        evaluated = time.perf_counter() - began
        for index, copy in enumerate(copies):
            copy.reset(seed=EVALUATION_SEED + index)
        began = time.perf_counter()
        running = copies
        for step in actions:
            outcomes = [copy.step(action) for copy, action in zip(running, step, strict=True)]
            running = [copy for copy, (_, _, *ends, _) in zip(running, outcomes, strict=True) if not any(ends)]
        rows.append((evaluated, time.perf_counter() - began))
    ratio = statistics.median(evaluated / alone for evaluated, alone in rows)
    evaluated, alone = (statistics.median(column) for column in zip(*rows, strict=True))
    print(
        f"{args.num_episodes} episodes of {args.env_id}, {len(actions)} steps: evaluation {evaluated:.2f} s, "
        f"environments alone {alone:.2f} s, ratio {ratio:.2f} ({torch.get_num_threads()} threads)"
    )


if __name__ == "__main__":
    launch(main, Args)
