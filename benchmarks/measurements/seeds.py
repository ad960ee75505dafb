"""Is it worth training several seeds at once? A step of TD3+BC's critics for N seeds, batched and one after the other.

Twins are two members of one batched layer; N seeds could be 2 N of them. What that can win is what an update spends
outside its matrix products, since those are as large per seed as before. Both ways take turns, and the ratio is the
median over rounds.

Run: python -m benchmarks.measurements.seeds
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "algorithms"))
import td3_bc

from common.command_line import check, launch
from common.optim import Adam


@dataclass
class Args:
    num_seeds: tuple[int, ...] = (1, 2, 4, 8)
    """seeds at once"""
    rounds: int = 7
    """times that both ways take turns"""
    steps: int = 100
    """of each measurement, for all seeds"""
    threads: int = 1
    """PyTorch's threads: a process for each seed has one"""
    batch_size: int = 256
    """transitions for each seed"""
    hidden_dims: tuple[int, ...] = (256, 256)
    """hidden layers"""
    observation_dim: int = 17
    """HalfCheetah's"""
    action_dim: int = 6
    """HalfCheetah's"""


def critic_step(args: Args, num_seeds: int) -> Callable[[], None]:
    """A function that takes one step of the critics of so many seeds, [2 num_seeds, ...]: loss, backward, Adam."""
    input_dim = args.observation_dim + args.action_dim
    widths = [input_dim, *args.hidden_dims, 1]
    layers = nn.ModuleList(td3_bc.EnsembleLinear(2 * num_seeds, *pair) for pair in pairwise(widths))
    optimizer = Adam([{"params": layers.parameters()}], 3e-4)
    inputs = torch.randn(num_seeds, args.batch_size, input_dim).repeat_interleave(2, dim=0)
    target = torch.randn(2 * num_seeds, args.batch_size)

    def q(x: Tensor) -> Tensor:
        for layer in layers[:-1]:
            x = torch.relu_(layer(x))
        return layers[-1](x).squeeze(-1)

    def step() -> None:
        (q(inputs) - target).square().mean(dim=1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(steps: list[Callable[[], None]], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        for step in steps:
            step()
    return time.perf_counter() - began


def main(args: Args) -> None:
    numbers = *args.num_seeds, args.rounds, args.steps, args.threads, args.batch_size
    check(min(numbers) >= 1, "--num-seeds, --rounds, --steps, --threads and --batch-size: must be at least 1")
    torch.set_num_threads(args.threads)
    print("seeds  steps of a seed per second: batched  one after the other  ratio")
    for num_seeds in args.num_seeds:
        ways = [critic_step(args, num_seeds)], [critic_step(args, 1) for _ in range(num_seeds)]
        count = max(1, args.steps // num_seeds)
        times = np.array([[seconds(way, count) for way in ways] for _ in range(args.rounds + 1)])[1:]  # after a warm-up
        rates = num_seeds * count / np.median(times, axis=0)
        ratio = np.median(times[:, 1] / times[:, 0])
        print(f"{num_seeds:5d} {rates[0]:36.0f} {rates[1]:20.0f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    launch(main, Args)
