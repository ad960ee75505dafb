"""Behaviour cloning (BC): supervised learning of the data's actions, the baseline that offline RL has to beat.

    L_pi = E[ |pi(s) - a|^2 ]

This is maximum likelihood for a Gaussian policy of fixed variance. --top-fraction 0.1 imitates a tenth of the
transitions, the episodes with the highest returns ("10% BC"): a filter that is hard to beat where a few are good.

Paper: Pomerleau, "ALVINN: An Autonomous Land Vehicle in a Neural Network", 1988; 10% BC: Chen et al., "Decision
Transformer", 2021, arXiv 2106.01345.
Differences: the loss is averaged over the action's dimensions. Of 10% BC the filter is here: the authors' network sees
the last 20 observations, has three layers of 128 with dropout, and AdamW trains it on batches of 64.

Run: python algorithms/bc.py --dataset-id anchorl/pendulum/mixed-v0
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    learning_rate: float = 3e-4  # of Adam
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of the policy


class Batch(NamedTuple):
    """Transitions, in float32."""

    observations: Tensor  # [batch, observation_dim], normalised
    actions: Tensor  # [batch, action_dim] in [-1, 1]
    rewards: Tensor  # [batch]
    next_observations: Tensor  # [batch, observation_dim], normalised
    terminations: Tensor  # [batch], 1 where the environment ended the episode; a truncation bootstraps


# --- Networks -------------------------------------------------------------------------------------------------------


def mlp(input_dim: int, hidden_dims: tuple[int, ...], output_dim: int) -> list[nn.Module]:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for width in hidden_dims:
        layers += [nn.Linear(input_dim, width), nn.ReLU(inplace=True)]
        input_dim = width
    return [*layers, nn.Linear(input_dim, output_dim)]


class Actor(nn.Module):
    """pi(s): a deterministic policy."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.net = nn.Sequential(*mlp(observation_dim, args.hidden_dims, action_dim), nn.Tanh())

    def forward(self, observations: Tensor) -> Tensor:
        """The action: [batch, action_dim] in [-1, 1]."""
        return self.net(observations)


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor
    optimizer: Any


def build(
    observation_dim: int,
    action_dim: int,
    args: HyperParameters,
    device: torch.device | str = "cpu",
    adam: Any = torch.optim.Adam,
) -> Learner:
    """A fresh network and its optimiser."""
    actor = Actor(observation_dim, action_dim, args).to(device)
    return Learner(actor, adam([{"params": actor.parameters(), "lr": args.learning_rate}]))


# --- Losses ---------------------------------------------------------------------------------------------------------


def actor_loss(actor: Actor, batch: Batch) -> tuple[Tensor, Metrics]:
    """L_pi = E[ |pi(s) - a|^2 ], averaged over the action's dimensions"""
    loss = (actor(batch.observations) - batch.actions).square().mean()
    return loss, {"actor/loss": loss.detach()}


# --- Update ---------------------------------------------------------------------------------------------------------


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of the actor. `step` counts from 1."""
    loss, metrics = actor_loss(learner.actor, batch)
    loss.backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    return metrics


# === The copy line: what is above needs PyTorch alone; below are command line, data, run folder and evaluation ========

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, check_argument, launch
from common.data import ReplayBuffer, hold_out, load_dataset
from common.experiment import Run, set_up
from common.optim import Adam, compiled


@dataclass
class Args(HyperParameters, ExperimentArgs):
    top_fraction: float = 1.0
    """share of the transitions to imitate: the episodes of highest undiscounted return (Decision Transformer: 0.1)"""
    normalize_observations: bool = True  # by the mean and standard deviation of the data

    def validate(self) -> None:
        super().validate()
        check_argument(self, "top_fraction", 0 < self.top_fraction <= 1, "must be in (0, 1]")


def best_rows(returns: Tensor, lengths: Tensor, fraction: float) -> Tensor:
    """The rows of the episodes with the highest `returns` [episodes] that hold `fraction` of all rows; one at least."""
    order = returns.argsort(descending=True)
    count = int((lengths[order].cumsum(0) <= round(fraction * int(lengths.sum()))).sum())
    kept = torch.zeros_like(returns, dtype=torch.bool).index_fill(0, order[: max(1, count)], True)
    return kept.repeat_interleave(lengths).nonzero().squeeze(1)


def main(args: Args) -> None:
    device = set_up(args)
    dataset = hold_out(load_dataset(args.dataset_id, args.env_id), args)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations)
    rows = best_rows(buffer.episode_returns, buffer.episode_lengths, args.top_fraction).to(device)

    learner = build(buffer.observation_dim, buffer.action_dim, args, device, Adam)
    train = compiled(update, learner, args)

    def make_batch(held_out: ReplayBuffer, rows: Tensor) -> Batch:  # of the best of these episodes, too
        best = best_rows(held_out.episode_returns, held_out.episode_lengths, args.top_fraction).to(device)
        return Batch(*held_out.take(best[torch.randint(len(best), rows.shape, device=device)]))

    run = Run(args, buffer, learner, update, make_batch)  # makes the run folder or goes back to its checkpoint
    for step in range(run.first_step, args.num_updates + 1):
        drawn = rows[torch.randint(len(rows), (args.batch_size,), device=device)]
        metrics = train(learner, Batch(*buffer.take(drawn)), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
