"""Implicit Q-learning (IQL) for discrete actions: it never asks for the value of an action outside the data.

Expectile regression draws V(s) towards the value of the best actions that the data holds at s; Q(s, a) is fitted to
r + gamma V(s'), which needs no action at s' at all; the policy imitates the data's actions, each weighted by how much
better than V(s) it is. The policy is categorical, and the critic gives Q of every action at once, of which the losses
read the data's only. With Q' the target critic (a slow copy of Q) and A(s, a) = min_i Q'_i(s, a) - V(s):

    L_V  = E[ |expectile - 1(A < 0)| A^2 ]                                        (eq. 5)
    L_Q  = E[ sum_i (r + gamma (1 - termination) V(s') - Q_i(s, a))^2 ]           (eq. 6)
    L_pi = E[ -min(exp(beta A), clip) log pi(a | s) ]                             (eq. 7)

Paper: Kostrikov, Nair, Levine, "Offline Reinforcement Learning with Implicit Q-Learning", 2021, arXiv 2110.06169.
Differences: the paper's actions are continuous, and its policy is Gaussian. TorchRL's example of a discrete IQL plays
as it learns, with the same losses, expectile 0.8 and beta 100, copies the target critic at every tenth update and keeps
the actor's rate; here these two are the authors'. One optimiser step trains the three networks, each loss seeing
the others as they were before it (the authors update V first, then pi and Q with the new V). Observations are
normalised, which the authors do not do. Layers start as PyTorch's do (uniform within 1 / sqrt(inputs)); the authors'
start orthogonal.

Run: python algorithms/discrete_iql.py --dataset-id anchorl/cartpole/mixed-v0
"""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (authors' code)
    expectile: float = 0.9
    """0.5 makes V the mean of Q over the data's actions, towards 1 the maximum (paper: 0.7 locomotion, 0.9 antmaze)"""
    beta: float = 1.0  # inverse temperature of L_pi's weights: 0 is cloning (tried here; paper: 3 and 10)
    weight_clip: float = 100.0  # largest weight of a transition in L_pi (authors' code)
    tau: float = 0.005  # rate at which the target critic follows the critic (authors' code)
    actor_learning_rate: float = 3e-4  # of Adam (authors' code)
    cosine_decay: bool = True  # the actor's rate falls to 0 at --num-updates, which is then final (authors' code)
    critic_learning_rate: float = 3e-4  # of Adam (authors' code)
    value_learning_rate: float = 3e-4  # of Adam (authors' code)
    legal_actions: bool = False
    """an observation begins with a mask of the actions that are legal in it, 1 or 0 each; others are never taken"""
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of every network (paper)


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


class Actor(nn.Module):
    """pi(a | s) = softmax(net(s)): a probability for each action."""

    def __init__(self, observation_dim: int, num_actions: int, args: HyperParameters) -> None:
        super().__init__()
        self.net = nn.Sequential(*mlp(observation_dim, args.hidden_dims, num_actions))
        self.masked = args.legal_actions

    def forward(self, observations: Tensor) -> Tensor:
        """The logits of pi(. | s), of which the deterministic policy takes the highest: [batch, num_actions]."""
        return legal_only(self.net(observations), observations, self.masked)

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """log pi(a | s), [batch]."""
        return -cross_entropy(self(observations), actions, reduction="none")


class Value(nn.Module):
    """V(s)."""

    def __init__(self, observation_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.net = nn.Sequential(*mlp(observation_dim, args.hidden_dims, 1))

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(observations).squeeze(-1)  # [batch]


class EnsembleLinear(nn.Module):
    """Linear layers side by side: one batched product, [members, batch, in] -> [members, batch, out]."""

    def __init__(self, members: int, input_dim: int, output_dim: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(input_dim)  # nn.Linear's own initialisation
        self.weight = nn.Parameter(torch.empty(members, input_dim, output_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, output_dim).uniform_(-bound, bound))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.weight.shape[-1] == 1:  # one output: as a matrix product it takes four times as long
            return torch.linalg.vecdot(inputs, self.weight.mT).unsqueeze(-1) + self.bias
        return torch.baddbmm(self.bias, inputs, self.weight)


class Critic(nn.Module):
    """Q_1(s, a) and Q_2(s, a) of every action at once: twins, trained on the same target from different weights."""

    def __init__(self, observation_dim: int, num_actions: int, args: HyperParameters) -> None:
        super().__init__()
        widths = [observation_dim, *args.hidden_dims, num_actions]
        self.layers = nn.ModuleList(EnsembleLinear(2, *pair) for pair in pairwise(widths))

    def forward(self, observations: Tensor) -> Tensor:
        x = observations.expand(2, -1, -1)
        for layer in self.layers[:-1]:
            x = torch.relu_(layer(x))
        return self.layers[-1](x)  # [2, batch, num_actions]


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor
    critic: Critic
    target_critic: Critic
    value: Value
    optimizer: Any


def build(
    observation_dim: int,
    num_actions: int,
    args: HyperParameters,
    device: torch.device | str = "cpu",
    adam: Any = torch.optim.Adam,
) -> Learner:
    """Fresh networks and their optimiser: one Adam with a parameter group per network, the actor's first."""
    actor = Actor(observation_dim, num_actions, args).to(device)
    critic = Critic(observation_dim, num_actions, args).to(device)
    value = Value(observation_dim, args).to(device)
    groups = [
        {"params": actor.parameters(), "lr": args.actor_learning_rate},
        {"params": critic.parameters(), "lr": args.critic_learning_rate},
        {"params": value.parameters(), "lr": args.value_learning_rate},
    ]
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    return Learner(actor, critic, target_critic, value, adam(groups))


# --- Losses ---------------------------------------------------------------------------------------------------------


def q_of(actions: Tensor, q: Tensor) -> Tensor:
    """The entries of the twins' q [2, batch, num_actions] for `actions` [batch]: [2, batch]."""
    return q.gather(2, actions.expand(2, -1).unsqueeze(2)).squeeze(2)


def advantage(value: Value, target_critic: Critic, batch: Batch) -> Tensor:
    """A(s, a) = min_i Q'_i(s, a) - V(s), [batch]. Its gradient reaches V alone."""
    with torch.no_grad():
        q = q_of(batch.actions, target_critic(batch.observations)).min(dim=0).values  # [batch], the more careful twin's
    return q - value(batch.observations)


def value_loss(advantages: Tensor, expectile: float) -> tuple[Tensor, Metrics]:
    """L_V = E[ |expectile - 1(A < 0)| A^2 ]        (eq. 5)"""
    weight = torch.where(advantages > 0, expectile, 1 - expectile)  # V too low costs more: V rises above the mean
    loss = (weight * advantages.square()).mean()
    return loss, {"value/loss": loss.detach(), "value/advantage": advantages.detach().mean()}


def critic_loss(critic: Critic, value: Value, batch: Batch, gamma: float) -> tuple[Tensor, Metrics]:
    """L_Q = E[ sum_i (r + gamma (1 - termination) V(s') - Q_i(s, a))^2 ]        (eq. 6)"""
    with torch.no_grad():
        next_value = value(batch.next_observations)  # of s' itself: no action is needed
        target = batch.rewards + gamma * (1 - batch.terminations) * next_value  # a truncation bootstraps
    q = q_of(batch.actions, critic(batch.observations))  # [2, batch]
    loss = (target - q).square().mean(dim=1).sum()  # the mean over the batch, the sum over the twins
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


def effective_sample_size(weight: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2: as many transitions of equal weight say as much as the batch with its weights [batch]."""
    weight = weight / weight.max().clamp(min=1e-30)  # whose squares might be too small, or too large, for float32
    return weight.sum().square() / weight.square().sum().clamp(min=1e-30)


def actor_loss(
    actor: Actor, advantages: Tensor, batch: Batch, beta: float, weight_clip: float
) -> tuple[Tensor, Metrics]:
    """L_pi = E[ -min(exp(beta A), clip) log pi(a | s) ],  A a constant here        (eq. 7)"""
    weight = torch.exp(beta * advantages.detach()).clamp(max=weight_clip)
    log_prob = actor.log_prob(batch.observations, batch.actions)
    loss = -(weight * log_prob).mean()
    metrics = {"actor/loss": loss.detach(), "actor/log_prob": log_prob.detach().mean(), "actor/weight": weight.mean()}
    metrics["actor/weight_clipped"] = (weight == weight_clip).float().mean()  # a share of the batch
    metrics["actor/effective_sample_size"] = effective_sample_size(weight)  # of the batch's transitions
    return loss, metrics


# --- Update ---------------------------------------------------------------------------------------------------------


def total_loss(learner: Learner, batch: Batch, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_V + L_Q + L_pi. Each reaches the weights of one network only, so one backward pass serves all three."""
    advantages = advantage(learner.value, learner.target_critic, batch)
    loss_v, metrics_v = value_loss(advantages, args.expectile)
    loss_q, metrics_q = critic_loss(learner.critic, learner.value, batch, args.gamma)
    loss_pi, metrics_pi = actor_loss(learner.actor, advantages, batch, args.beta, args.weight_clip)
    return loss_v + loss_q + loss_pi, metrics_v | metrics_q | metrics_pi


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of the three networks, then the target critic follows the critic. `step` counts from 1."""
    loss, metrics = total_loss(learner, batch, args)
    loss.backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()

    with torch.no_grad():  # Q' <- Q' + tau (Q - Q')
        torch._foreach_lerp_(list(learner.target_critic.parameters()), list(learner.critic.parameters()), args.tau)
    return metrics


def cosine_decay(step: int, num_updates: int) -> float:
    """Half a cosine, from 1 at the first update to 0 after the last: the factor on the actor's learning rate."""
    return 0.5 * (1 + math.cos(math.pi * (step - 1) / num_updates))


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
        check_argument(self, "expectile", 0 < self.expectile < 1, "must be in (0, 1)")
        check_argument(self, "beta", self.beta >= 0, "must not be negative")
        check_argument(self, "weight_clip", self.weight_clip > 0, "must be positive")


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
        if args.cosine_decay:
            rate = args.actor_learning_rate * cosine_decay(step, args.num_updates)
            learner.optimizer.param_groups[0]["lr"].fill_(rate)
        metrics = train(learner, Batch(*buffer.sample(args.batch_size)), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
