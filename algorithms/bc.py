"""Behaviour cloning (BC): supervised learning of the data's actions, the baseline that offline RL has to beat.

    L_pi = E[ |pi(s) - a|^2 ]

which is maximum likelihood for a Gaussian policy of fixed variance. --top-fraction 0.1 imitates only the tenth of the
episodes with the highest returns ("10% BC"), a filter that is hard to beat where a few episodes are good.

Paper: Pomerleau, "ALVINN: An Autonomous Land Vehicle in a Neural Network", 1988; 10% BC: Chen et al., "Decision
Transformer", 2021, arXiv 2106.01345. Differences: the loss is averaged over the action's dimensions.

Run: python algorithms/bc.py --dataset-id anchorl/pendulum/mixed-v0
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, check_argument, launch
from common.compile import compiled
from common.datasets import load_dataset
from common.experiment import Run, set_up
from common.optim import Adam
from common.replay_buffer import Batch, ReplayBuffer

Metrics = dict[str, Tensor]


@dataclass
class Args(ExperimentArgs):
    algorithm: ClassVar[str] = "bc"

    top_fraction: float = 1.0
    """share of the episodes to imitate, the best by their undiscounted return (Decision Transformer's 10% BC: 0.1)"""
    learning_rate: float = 3e-4
    """Adam's"""
    hidden_dims: tuple[int, ...] = (256, 256)
    """hidden layers of the policy"""
    normalize_observations: bool = True
    """by the mean and standard deviation of the data"""

    def validate(self) -> None:
        super().validate()
        check_argument(self, "top_fraction", 0 < self.top_fraction <= 1, "must be in (0, 1]")


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

    def __init__(self, observation_dim: int, action_dim: int, hidden_dims: tuple[int, ...]) -> None:
        super().__init__()
        self.net = nn.Sequential(*mlp(observation_dim, hidden_dims, action_dim), nn.Tanh())

    def forward(self, observations: Tensor) -> Tensor:
        """The action: [batch, action_dim] in [-1, 1]."""
        return self.net(observations)


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor
    optimizer: Adam


def build(observation_dim: int, action_dim: int, args: Args, device: torch.device) -> Learner:
    """A fresh network and its optimiser."""
    actor = Actor(observation_dim, action_dim, args.hidden_dims).to(device)
    groups = [{"params": actor.parameters(), "lr": args.learning_rate}]
    return Learner(actor, Adam(groups))


# --- Losses ---------------------------------------------------------------------------------------------------------


def actor_loss(learner: Learner, batch: Batch) -> tuple[Tensor, Metrics]:
    """L_pi = E[ |pi(s) - a|^2 ], averaged over the action's dimensions"""
    loss = F.mse_loss(learner.actor(batch.observations), batch.actions)
    return loss, {"actor/loss": loss.detach()}


# --- Update ---------------------------------------------------------------------------------------------------------


def update(learner: Learner, batch: Batch, step: int, args: Args) -> Metrics:
    """One gradient step of the actor. `step` counts from 1."""
    loss, metrics = actor_loss(learner, batch)
    loss.backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    return metrics


# --- Main -----------------------------------------------------------------------------------------------------------


def best_episodes(returns: Tensor, fraction: float) -> Tensor:
    """A mask [episodes] of the `fraction` (at least one) with the highest returns."""
    count = max(1, round(fraction * len(returns)))
    keep = torch.zeros(len(returns), dtype=torch.bool)
    keep[returns.argsort(descending=True)[:count]] = True
    return keep


def main(args: Args) -> None:
    device = set_up(args)
    buffer = ReplayBuffer(load_dataset(args.dataset_id, args.env_id), device, args.normalize_observations)
    if args.top_fraction < 1:
        buffer.keep_episodes(best_episodes(buffer.episode_returns, args.top_fraction))

    learner = build(buffer.observation_dim, buffer.action_dim, args, device)
    train = compiled(update, args, device)
    run = Run(args, buffer, learner)
    for step in run.steps():
        metrics = train(learner, buffer.sample(args.batch_size), step, args)

        if evaluating := run.is_due(step, args.eval_every):
            metrics |= run.evaluate(step)
        if evaluating or run.is_due(step, args.log_every):
            run.log(step, metrics)
        if run.is_due(step, args.checkpoint_every):
            run.save_checkpoint(step)
    run.finish()


if __name__ == "__main__":
    launch(main, Args)
