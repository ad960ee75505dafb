"""Fitted Q iteration (FQI): Q-learning on fixed data, with no anchor at all, the baseline that overestimates.

For discrete actions. Q is fitted to the reward and the value of the best action at the next state, which Q itself
names. The policy takes the best action everywhere. Where the data lack an action, nothing corrects what Q says of it,
and the maximum looks for just such errors. With Q' the target network, a slow copy of Q:

    y   = r + gamma (1 - termination) max_a' Q'(s', a'),  or with --double Q'(s', argmax_a' Q(s', a'))
    L_Q = E[ (y - Q(s, a))^2 ]
    pi  = argmax_a Q(s, a)

How much it overestimates is in metrics.csv. There critic/overestimate is what Q promises where the data's episodes
start, E[ max_a Q(s_0, a) ], less the discounted return that the policy earns when it is evaluated. Evaluations end at a
time limit, of which Q knows nothing.

Paper: Ernst, Geurts, Wehenkel, "Tree-Based Batch Mode Reinforcement Learning", 2005, JMLR 6; with networks: Riedmiller,
"Neural Fitted Q Iteration", 2005; --double: van Hasselt, Guez, Silver, "Deep Reinforcement Learning with Double
Q-learning", 2015, arXiv 1509.06461.
Differences: Adam takes steps on batches towards a slow target network, where the first two papers fit one regression
after the other to all data. Observations are normalised.

Run: python algorithms/fqi.py --dataset-id anchorl/cartpole/mixed-v0
"""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (usual)
    double: bool = False  # Double DQN: Q chooses the action at s', Q' tells its value: less overestimate
    tau: float = 0.05
    """rate at which the target network follows the critic: an error of Q fades within 1 / (tau (1 - gamma)) updates,
    2,000 here, and 20,000 with the 0.005 usual in control"""
    critic_learning_rate: float = 3e-4  # of Adam (usual)
    legal_actions: bool = False
    """an observation begins with a mask of the actions that are legal in it, 1 or 0 each; others are never taken"""
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of the network


class Batch(NamedTuple):
    """Transitions, in float32 but for the actions."""

    observations: Tensor  # [batch, observation_dim], normalised
    actions: Tensor  # [batch], int64, counted from 0
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


def legal_only(preferences: Tensor, observations: Tensor, masked: bool) -> Tensor:
    """`preferences` [batch, num_actions], with the lowest for each action that the mask of its state forbids."""
    if not masked:
        return preferences
    return preferences.masked_fill(observations[:, : preferences.shape[1]] < 0.5, -1e9)  # finite: times 0 it is 0


class Critic(nn.Module):
    """Q(s, a) of every action at once."""

    def __init__(self, observation_dim: int, num_actions: int, args: HyperParameters) -> None:
        super().__init__()
        self.net = nn.Sequential(*mlp(observation_dim, args.hidden_dims, num_actions))
        self.masked = args.legal_actions

    def forward(self, observations: Tensor) -> Tensor:
        return legal_only(self.net(observations), observations, self.masked)  # [batch, num_actions]


class Actor(nn.Module):
    """pi(s) = argmax_a Q(s, a)."""

    def __init__(self, observation_dim: int, num_actions: int, args: HyperParameters) -> None:
        super().__init__()
        self.critic = Critic(observation_dim, num_actions, args)

    def forward(self, observations: Tensor) -> Tensor:
        """What the policy takes the highest of: [batch, num_actions]."""
        return self.critic(observations)


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor
    target_critic: Critic
    optimizer: Any


def build(
    observation_dim: int,
    num_actions: int,
    args: HyperParameters,
    device: torch.device | str = "cpu",
    adam: Any = torch.optim.Adam,
) -> Learner:
    """Fresh networks and their optimiser."""
    actor = Actor(observation_dim, num_actions, args).to(device)
    groups = [{"params": actor.critic.parameters(), "lr": args.critic_learning_rate}]
    target_critic = copy.deepcopy(actor.critic).requires_grad_(False)
    return Learner(actor, target_critic, adam(groups))


# --- Losses ---------------------------------------------------------------------------------------------------------


def q_of(actions: Tensor, q: Tensor) -> Tensor:
    """The entries of q [batch, num_actions] for `actions` [batch]: [batch]."""
    return q.gather(1, actions.unsqueeze(1)).squeeze(1)


def critic_loss(learner: Learner, batch: Batch, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_Q = E[ (y - Q(s, a))^2 ],  y = r + gamma (1 - termination) Q'(s', a')"""
    with torch.no_grad():
        next_q = learner.target_critic(batch.next_observations)  # [batch, num_actions]
        next_actions = (learner.actor(batch.next_observations) if args.double else next_q).argmax(dim=1)  # a'
        next_value = q_of(next_actions, next_q)  # [batch]
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_value  # a truncation bootstraps
    q = q_of(batch.actions, learner.actor.critic(batch.observations))  # [batch]
    loss = (target - q).square().mean()
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


# --- Update ---------------------------------------------------------------------------------------------------------


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of the critic, then the target network follows it. `step` counts from 1."""
    loss, metrics = critic_loss(learner, batch, args)
    loss.backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()

    with torch.no_grad():  # Q' <- Q' + tau (Q - Q')
        target, critic = learner.target_critic.parameters(), learner.actor.critic.parameters()
        torch._foreach_lerp_(list(target), list(critic), args.tau)
    return metrics


# === The copy line: what is above needs PyTorch alone; below are command line, data, run folder and evaluation ========

import sys
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, launch
from common.data import BUILT_IN_DISCRETE_ID, ReplayBuffer, hold_out, load_dataset
from common.evaluation import evaluate
from common.experiment import Run, set_up
from common.optim import Adam, compiled


@dataclass
class Args(HyperParameters, ExperimentArgs):
    dataset_id: str = BUILT_IN_DISCRETE_ID  # built-in or Minari id, local first, else downloaded; of discrete actions
    reward_scale: float | Literal["return-range"] = 1.0  # multiplies rewards; return-range: their returns span 1,000
    reward_shift: float = 0.0  # added to rewards first
    normalize_observations: bool = True  # by the mean and standard deviation of the data
    legal_actions: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = (
        False  # set where the data's observations have an action_mask
    )


@torch.no_grad()
def overestimate(critic: Critic, initial_observations: Tensor, returns: np.ndarray | None) -> dict[str, float]:
    """E[ max_a Q(s_0, a) ] and, given the discounted `returns` [episodes] of the policy, how far it is above them."""
    promise = float(critic(initial_observations).amax(dim=1).mean())
    found = {"critic/q_initial": promise}
    if returns is not None:
        earned = float(returns.mean())
        found |= {"eval/discounted_return": earned, "critic/overestimate": promise - earned}
    return found


def main(args: Args) -> None:
    device = set_up(args)
    dataset = hold_out(load_dataset(args.dataset_id, args.env_id, discrete=True), args)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations)
    buffer.scale_rewards(args.reward_scale, args.reward_shift)
    initial_observations = buffer.transitions.observations[buffer.episode_starts.to(device)]

    args.legal_actions = buffer.num_legal > 0
    learner = build(buffer.observation_dim, buffer.num_actions, args, device, Adam)
    train = compiled(update, learner, args)
    run = Run(args, buffer, learner, update)  # makes the run folder or, with --resume, goes back to its checkpoint
    for step in range(run.first_step, args.num_updates + 1):
        metrics = train(learner, Batch(*buffer.sample(args.batch_size)), step, args)
        if run.is_due(step, args.eval_every):
            returns = None
            if run.environments is not None:
                returns, lengths = evaluate(run.policy, run.environments, gamma=args.gamma)
                shifts = args.reward_shift * np.array([(args.gamma ** np.arange(count)).sum() for count in lengths])
                returns = buffer.reward_scale * (returns + shifts)  # of the rewards that Q has learned from
            metrics |= overestimate(learner.actor.critic, initial_observations, returns)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
