"""Soft actor-critic (SAC): the online agent beneath the offline ones, and the one that makes their data.

It plays in the environment and learns from its own episodes: an action that its critic overestimates gets tried, and
the estimate is corrected. Offline nothing corrects it, which is what most files here are about. The policy is
also paid for its entropy; the price, `temperature`, is tuned to hold it at a target. With Q' the target critic:

    y    = r + gamma (1 - termination) (min_i Q'_i(s', a') - temperature log pi(a'|s')),  a' ~ pi(.|s')      (eq. 5, 6)
    L_Q  = E[ sum_i (y - Q_i(s, a))^2 ]
    L_pi = E[ temperature log pi(a_pi | s) - min_i Q_i(s, a_pi) ],  a_pi ~ pi(.|s), differentiable           (eq. 9)
    L_temperature = E[ -temperature (log pi(a_pi | s) + target entropy) ]                                    (eq. 18)

Paper: Haarnoja, Zhou, Hartikainen, Tucker, Ha, Tan, Kumar, Zhu, Gupta, Abbeel, Levine, "Soft Actor-Critic Algorithms
and Applications", 2018, arXiv 1812.05905.
Differences: the squared error has no factor 1/2; one optimiser step trains everything, each loss seeing the others as
they were before it. Layers start as PyTorch's do (uniform within 1 / sqrt(inputs)); the authors' start as Glorot's.
Every update follows one step in the environment. There is no dataset: the first --random-steps, whose actions are
uniformly random, take its place in the run folder, and their average return is the dashed line of the learning curve.
Every transition is kept; the authors keep the newest million. The log standard deviation of the action before tanh is
at least -5, as in CQL's code; theirs -20.

Run: python algorithms/sac.py --env-id Pendulum-v1
"""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (paper)
    target_entropy: float | None = None  # temperature holds the policy's entropy to it; default: -action_dim (paper)
    tau: float = 0.005  # rate at which the target critic follows the critic (paper)
    actor_learning_rate: float = 3e-4  # of Adam, for the actor and the temperature (paper)
    critic_learning_rate: float = 3e-4  # of Adam (paper)
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of every network (paper)


class Batch(NamedTuple):
    """Transitions, in float32."""

    observations: Tensor  # [batch, observation_dim]
    actions: Tensor  # [batch, action_dim] in [-1, 1]
    rewards: Tensor  # [batch]
    next_observations: Tensor  # [batch, observation_dim]
    terminations: Tensor  # [batch], 1 where the environment ended the episode; a truncation bootstraps


# --- Networks -------------------------------------------------------------------------------------------------------


def mlp(input_dim: int, hidden_dims: tuple[int, ...], output_dim: int) -> list[nn.Module]:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for width in hidden_dims:
        layers += [nn.Linear(input_dim, width), nn.ReLU(inplace=True)]
        input_dim = width
    return [*layers, nn.Linear(input_dim, output_dim)]


def squashed_log_prob(noise: Tensor, std: Tensor, u: Tensor) -> Tensor:
    """log pi(a | s) of a = tanh(u), where u = mean + std noise: [..., action_dim] -> [...].

    log pi = sum_j log Normal(u_j) - log(1 - tanh(u_j)^2), and log(1 - tanh(u)^2) = 2 (log 2 - |u| - log(1 + e^-2|u|)):
    this stays finite where tanh(u) is rounded to 1.
    """
    log_normal = -(0.5 * noise.square() + std.log() + 0.5 * math.log(2 * math.pi))
    return (log_normal - 2 * (math.log(2) - u.abs() - (-2 * u.abs()).exp().log1p())).sum(dim=-1)


class Actor(nn.Module):
    """pi(a | s): a = tanh(u), u ~ Normal(mean(s), std(s))."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        *hidden, mean = mlp(observation_dim, args.hidden_dims, action_dim)
        self.trunk, self.mean = nn.Sequential(*hidden), mean
        self.log_std = nn.Linear(args.hidden_dims[-1], action_dim)  # a second head on the last hidden layer
        self.log_temperature = nn.Parameter(torch.zeros(()))  # of SAC's entropy coefficient, trained beside pi

    def forward(self, observations: Tensor) -> Tensor:
        """The deterministic policy tanh(mean): [batch, action_dim] in [-1, 1]."""
        return self.mean(self.trunk(observations)).tanh()

    def distribution(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of u, the action before tanh: [batch, action_dim] each."""
        hidden = self.trunk(observations)
        return self.mean(hidden), self.log_std(hidden).clamp(-5, 2).exp()  # CQL's range; SAC's begins at -20

    def sample(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions tanh(mean + std noise), [..., batch, action_dim], of a standard normal `noise` of their shape, and
        log pi(a | s), [..., batch].
        """
        mean, std = self.distribution(observations)
        u = mean + std * noise
        return u.tanh(), squashed_log_prob(noise, std, u)


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
    """Q_1(s, a) and Q_2(s, a): twins, trained on the same target from different initial weights."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        widths = [observation_dim + action_dim, *args.hidden_dims, 1]
        self.layers = nn.ModuleList(EnsembleLinear(2, *pair) for pair in pairwise(widths))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        x = torch.cat([observations, actions], dim=-1).expand(2, -1, -1)
        for layer in self.layers[:-1]:
            x = torch.relu_(layer(x))
        return self.layers[-1](x).squeeze(-1)  # [2, batch]


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor
    critic: Critic
    target_critic: Critic
    optimizer: Any


def build(
    observation_dim: int,
    action_dim: int,
    args: HyperParameters,
    device: torch.device | str = "cpu",
    adam: Any = torch.optim.Adam,
) -> Learner:
    """Fresh networks and their optimiser: one Adam with a parameter group per network, the actor's first."""
    actor = Actor(observation_dim, action_dim, args).to(device)
    critic = Critic(observation_dim, action_dim, args).to(device)
    groups = [
        {"params": actor.parameters(), "lr": args.actor_learning_rate},
        {"params": critic.parameters(), "lr": args.critic_learning_rate},
    ]
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    return Learner(actor, critic, target_critic, adam(groups))


# --- Losses ---------------------------------------------------------------------------------------------------------


def critic_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_Q = E[ sum_i (y - Q_i(s, a))^2 ],  y = r + gamma (1 - termination) (min_i Q'_i(s', a') - temperature log pi)

    `noise` [batch, action_dim] is standard normal.
    """
    with torch.no_grad():
        next_actions, next_log_prob = learner.actor.sample(batch.next_observations, noise)
        next_q = learner.target_critic(batch.next_observations, next_actions).min(dim=0).values  # [batch]
        next_value = next_q - learner.actor.log_temperature.exp() * next_log_prob
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_value  # a truncation bootstraps
    q = learner.critic(batch.observations, batch.actions)  # [2, batch]
    loss = (target - q).square().mean(dim=1).sum()  # the mean over the batch, the sum over the twins
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


def actor_loss(
    critic: Critic, temperature: Tensor, observations: Tensor, actions: Tensor, log_prob: Tensor
) -> tuple[Tensor, Metrics]:
    """L_pi = E[ temperature log pi(a_pi | s) - min_i Q_i(s, a_pi) ], `actions` a_pi differentiable in the actor"""
    # Q with its weights held constant: the gradient passes through Q to the actions and changes no weight of Q itself.
    # functional_call runs a network with the weights it is given in place of its own.
    constants = {name: weight.detach() for name, weight in critic.named_parameters()}
    q = functional_call(critic, constants, (observations, actions)).min(dim=0).values  # [batch]
    loss = (temperature.detach() * log_prob - q).mean()
    return loss, {"actor/loss": loss.detach(), "actor/q": q.detach().mean()}


def temperature_loss(temperature: Tensor, log_prob: Tensor, target_entropy: float) -> tuple[Tensor, Metrics]:
    """L_temperature = E[ -temperature (log pi(a_pi | s) + target entropy) ]: it grows while the entropy is too low."""
    entropy = -log_prob.detach().mean()
    loss = temperature * (entropy - target_entropy)
    return loss, {"actor/temperature": temperature.detach(), "actor/entropy": entropy}


# --- Update ---------------------------------------------------------------------------------------------------------


def total_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_Q + L_pi + L_temperature. Each reaches the weights of one network only, so one backward pass serves all."""
    temperature = learner.actor.log_temperature.exp()
    loss_q, metrics_q = critic_loss(learner, batch, noise[0], args)
    actions, log_prob = learner.actor.sample(batch.observations, noise[1])
    loss_pi, metrics_pi = actor_loss(learner.critic, temperature, batch.observations, actions, log_prob)
    target_entropy = -actions.shape[-1] if args.target_entropy is None else args.target_entropy
    loss_t, metrics_t = temperature_loss(temperature, log_prob, target_entropy)
    return loss_q + loss_pi + loss_t, metrics_q | metrics_pi | metrics_t


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of all networks, then the target critic follows the critic. `step` counts from 1."""
    noise = torch.randn(2, *batch.actions.shape, device=batch.actions.device)
    loss, metrics = total_loss(learner, batch, noise, args)
    loss.backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()

    with torch.no_grad():  # Q' <- Q' + tau (Q - Q')
        torch._foreach_lerp_(list(learner.target_critic.parameters()), list(learner.critic.parameters()), args.tau)
    return metrics


# === The copy line: what is above needs PyTorch alone; below are command line, data, run folder and evaluation ========

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, check_argument, launch
from common.data import Batch as Episode
from common.data import Dataset, ReplayBuffer, action_bounds, observation_names
from common.evaluation import Player, make_environment
from common.experiment import Run, set_up
from common.optim import Adam, compiled


@dataclass
class Args(HyperParameters, ExperimentArgs):
    dataset_id: tyro.conf.Suppress[str] = ""  # the environment's id stands for it
    env_id: str = "Pendulum-v1"  # environment to play in
    random_steps: int = 1_000  # uniformly random steps to begin with, to the end of an episode (in haarnoja/sac)

    def validate(self) -> None:
        super().validate()
        check_argument(self, "validation_fraction", self.validation_fraction == 0, "there are no data to hold out")
        self.dataset_id = self.env_id


def random_dataset(environment: gym.Env, args: Args) -> Dataset:
    """What the agent begins with: whole episodes of uniformly random actions, `random_steps` steps or more."""
    low, high = action_bounds(environment.action_space)
    player, rng, episodes = Player(environment, None, args.seed, 0), np.random.default_rng(args.seed), list[Episode]()
    while sum(player.lengths) < args.random_steps:
        transitions, number = [], len(player.lengths)
        while len(player.lengths) == number:
            transitions.append(player.step(rng.uniform(low, high).astype(np.float32)))
        episodes.append(Episode(*map(np.array, zip(*transitions, strict=True))))
    names = observation_names(environment.observation_space)
    return Dataset(args.env_id, sum(player.lengths), names, low, high, lambda: iter(episodes), args.env_id)


def main(args: Args) -> None:
    device = set_up(args)
    environment = make_environment(args.env_id, users=True)
    buffer = ReplayBuffer(random_dataset(environment, args), device, False, room=args.num_updates)

    learner = build(buffer.observation_dim, buffer.action_dim, args, device, Adam)
    train = compiled(update, learner, args)
    player = Player(environment, buffer, args.seed, 1)
    run = Run(args, buffer, learner, update, player=player)  # makes the run folder or, with --resume, goes back

    def explore(observations: Tensor) -> Tensor:
        return learner.actor.sample(observations, torch.randn(1, buffer.action_dim, device=device))[0]

    for step in range(run.first_step, args.num_updates + 1):
        buffer.add(player.step(run.policy(player.observation[None], explore)[0]))
        metrics = train(learner, Batch(*buffer.sample(args.batch_size)), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    environment.close()
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
