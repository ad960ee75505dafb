"""Batch-constrained Q-learning for discrete actions: Double DQN among those that the data would take.

A model beta of the data's actions says which of them are likely at a state. The policy takes the likely action of the
highest Q, and so does the target. With Q' the target network, a slow copy of Q:

    pi     = argmax_a Q(s, a)  over the a with  beta(a | s) / max_a' beta(a' | s) > threshold
    y      = r + gamma (1 - termination) Q'(s', pi(s'))
    L_Q    = E[ (y - Q(s, a))^2 ]
    L_beta = E[ -log beta(a | s) + logit_penalty mean_a' logit(a' | s)^2 ]

A threshold of 0 is Double DQN; towards 1 it is behaviour cloning.

Paper: Fujimoto, Conti, Ghavamzadeh, Pineau, "Benchmarking Batch Deep Reinforcement Learning Algorithms", 2019,
arXiv 1910.01708; BCQ for continuous actions is arXiv 1812.02900.
Differences: the error is squared, where the authors' code has Huber's loss: at the rare ends of episodes Q is far off
at first, and the square counts that in full. Observations are normalised, batches have 256 rows (theirs 64 outside
Atari). The penalty on logits is from the authors' code. So is the slow target network, which they take everywhere but
in Atari.

Run: python algorithms/discrete_bcq.py --dataset-id anchorl/cartpole/mixed-v0
"""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (paper)
    threshold: float = 0.3
    """an action may be taken if beta's probability, relative to the likeliest action's, is above it (paper)"""
    logit_penalty: float = 0.01  # weight of beta's squared logits in its loss (authors' code)
    tau: float = 0.005  # rate at which the target network follows the critic (authors' code)
    critic_learning_rate: float = 3e-4  # of Adam (authors' code)
    behaviour_learning_rate: float = 3e-4  # of Adam, for beta (authors' code)
    legal_actions: bool = False
    """an observation begins with a mask of the actions that are legal in it, 1 or 0 each; others are never taken"""
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of every network (authors' code)


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


class Behaviour(nn.Module):
    """beta(a | s): a model of the data's actions."""

    def __init__(self, observation_dim: int, num_actions: int, args: HyperParameters) -> None:
        super().__init__()
        self.net = nn.Sequential(*mlp(observation_dim, args.hidden_dims, num_actions))

    def forward(self, observations: Tensor) -> Tensor:
        """The logits of beta(. | s), [batch, num_actions]."""
        return self.net(observations)


class Actor(nn.Module):
    """pi(s) = argmax_a Q(s, a) over the actions that beta finds likely."""

    def __init__(self, observation_dim: int, num_actions: int, args: HyperParameters) -> None:
        super().__init__()
        self.critic = Critic(observation_dim, num_actions, args)
        self.behaviour = Behaviour(observation_dim, num_actions, args)
        self.threshold = nn.Buffer(torch.tensor(args.threshold))
        self.masked = args.legal_actions

    def forward(self, observations: Tensor) -> Tensor:
        """What the policy takes the highest of, -inf for unlikely actions: [batch, num_actions]."""
        logits = legal_only(self.behaviour(observations), observations, self.masked)
        ratio = (logits - logits.amax(dim=1, keepdim=True)).exp()  # beta / max beta: the softmax's denominators cancel
        return self.critic(observations).masked_fill(ratio <= self.threshold, -torch.inf)


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
    """Fresh networks and their optimiser: one Adam with a parameter group per network."""
    actor = Actor(observation_dim, num_actions, args).to(device)
    groups = [
        {"params": actor.critic.parameters(), "lr": args.critic_learning_rate},
        {"params": actor.behaviour.parameters(), "lr": args.behaviour_learning_rate},
    ]
    target_critic = copy.deepcopy(actor.critic).requires_grad_(False)
    return Learner(actor, target_critic, adam(groups))


# --- Losses ---------------------------------------------------------------------------------------------------------


def q_of(actions: Tensor, q: Tensor) -> Tensor:
    """The entries of q [batch, num_actions] for `actions` [batch]: [batch]."""
    return q.gather(1, actions.unsqueeze(1)).squeeze(1)


def critic_loss(learner: Learner, batch: Batch, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_Q = E[ (y - Q(s, a))^2 ],  y = r + gamma (1 - termination) Q'(s', pi(s'))"""
    with torch.no_grad():
        next_actions = learner.actor(batch.next_observations).argmax(dim=1)  # pi(s'), by Q and beta ...
        next_q = q_of(next_actions, learner.target_critic(batch.next_observations))  # ... and its value by Q', [batch]
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_q  # a truncation bootstraps
    q = q_of(batch.actions, learner.actor.critic(batch.observations))  # [batch]
    loss = (target - q).square().mean()
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


def behaviour_loss(behaviour: Behaviour, batch: Batch, logit_penalty: float) -> tuple[Tensor, Metrics]:
    """L_beta = E[ -log beta(a | s) + logit_penalty mean_a' logit(a' | s)^2 ]"""
    logits = behaviour(batch.observations)
    log_beta = -cross_entropy(logits, batch.actions)
    loss = -log_beta + logit_penalty * logits.square().mean()
    return loss, {"behaviour/loss": loss.detach(), "behaviour/log_prob": log_beta.detach()}


# --- Update ---------------------------------------------------------------------------------------------------------


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of critic and beta, then the target network follows the critic. `step` counts from 1."""
    loss, metrics = critic_loss(learner, batch, args)
    loss_beta, metrics_beta = behaviour_loss(learner.actor.behaviour, batch, args.logit_penalty)
    loss, metrics = loss + loss_beta, metrics | metrics_beta  # of other weights: one backward pass serves both
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

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, check_argument, launch
from common.data import BUILT_IN_DISCRETE_ID, ReplayBuffer, hold_out, load_dataset
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

    def validate(self) -> None:
        super().validate()
        check_argument(self, "threshold", 0 <= self.threshold < 1, "must be in [0, 1)")
        check_argument(self, "logit_penalty", self.logit_penalty >= 0, "must not be negative")


def main(args: Args) -> None:
    device = set_up(args)
    dataset = hold_out(load_dataset(args.dataset_id, args.env_id, discrete=True), args)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations)
    buffer.scale_rewards(args.reward_scale, args.reward_shift)

    args.legal_actions = buffer.num_legal > 0
    learner = build(buffer.observation_dim, buffer.num_actions, args, device, Adam)
    train = compiled(update, learner, args)
    run = Run(args, buffer, learner, update)  # makes the run folder or, with --resume, goes back to its checkpoint
    for step in range(run.first_step, args.num_updates + 1):
        metrics = train(learner, Batch(*buffer.sample(args.batch_size)), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
