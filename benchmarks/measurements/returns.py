"""Seconds for AWR's TD(lambda) returns of a large dataset, beside V's pass over it and a plain loop over time steps.

The loop takes all episodes at once, one time step after the other, which asks for episodes of one length, as here, or
for padding. The three take turns, and each time is the median over rounds.

Run: python -m benchmarks.measurements.returns
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parents[2] / "algorithms"))
import awr

from common.command_line import check, launch


@dataclass
class Args:
    num_episodes: int = 1_000
    """episodes"""
    episode_length: int = 1_000
    """transitions of each"""
    observation_dim: int = 17
    """HalfCheetah's"""
    threads: int = torch.get_num_threads()
    """PyTorch's threads"""
    rounds: int = 5
    """times that the three take turns"""


def loop_over_time(
    rewards: Tensor, terminations: Tensor, next_values: Tensor, gamma: float, td_lambda: float
) -> Tensor:
    """The returns of episodes of one length, from columns and to one [num_episodes, episode_length]."""
    discount = gamma * (1 - terminations)
    returns = rewards + discount * next_values  # right at the last step already
    for t in reversed(range(rewards.shape[1] - 1)):
        mixture = torch.lerp(next_values[:, t], returns[:, t + 1], td_lambda)
        returns[:, t] = rewards[:, t] + discount[:, t] * mixture
    return returns


@torch.no_grad()
def all_values(value: awr.Value, observations: Tensor) -> Tensor:
    """V of every state, in pieces as awr.compute_returns has it."""
    return torch.cat([value(rows) for rows in observations.split(4096)])


def main(args: Args) -> None:
    sizes = args.num_episodes, args.episode_length, args.observation_dim
    check(min(sizes) >= 1, "--num-episodes, --episode-length and --observation-dim: must be at least 1")
    check(min(args.threads, args.rounds) >= 1, "--threads and --rounds: must be at least 1")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape, defaults = (args.num_episodes, args.episode_length), awr.HyperParameters()
    lengths = torch.full((args.num_episodes,), args.episode_length)
    rewards, terminations = torch.randn(shape), torch.zeros(shape)
    terminations[::2, -1] = 1  # every second episode ends, the others are cut
    observations = torch.randn(rewards.numel(), args.observation_dim)
    value = awr.Value(args.observation_dim, defaults)
    next_values = all_values(value, observations)
    columns = rewards.flatten(), terminations.flatten(), next_values
    matrices = rewards, terminations, next_values.view(shape)
    measured: dict[str, Callable[[], Tensor]] = {
        "td_lambda_returns": lambda: awr.td_lambda_returns(*columns, lengths, defaults.gamma, defaults.td_lambda),
        "loop over time": lambda: loop_over_time(*matrices, defaults.gamma, defaults.td_lambda).flatten(),
        "V of every state": lambda: all_values(value, observations),
    }
    torch.testing.assert_close(measured["td_lambda_returns"](), measured["loop over time"](), atol=1e-4, rtol=1e-4)

    seconds: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(args.rounds):
        for name, compute in measured.items():
            began = time.perf_counter()
            compute()
            seconds[name].append(time.perf_counter() - began)
    own = statistics.median(seconds["td_lambda_returns"])
    print(f"{rewards.numel():,} transitions, {args.num_episodes:,} episodes, {args.threads} threads")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:>17}: {median:7.3f} s, {median / own:6.1f} times the first")


if __name__ == "__main__":
    launch(main, Args)
