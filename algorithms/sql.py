"""Sparse and exponential Q-learning (SQL and EQL): IQL with a value that a stated regulariser suggests.

Implicit value regularisation: every step costs alpha f(pi / mu), the price of leaving the data's policy mu. The best
policy then, and its V, are learned from the data's own actions alone, as in IQL. With Q' the target critic (a slow
copy of Q) and A(s, a) = min_i Q'_i(s, a) - V(s):

    sql    f = pi / mu - 1:  u = 1 + A / (2 alpha),  L_V = E[ 1(u > 0) u^2 + V(s) / alpha ],  w = max(A, 0)
    eql    f = log(pi / mu): u = min(A / alpha, 5),  L_V = E[ exp(u) + V(s) / alpha ],        w = exp(10 A / alpha)

    L_Q  = E[ sum_i (r + gamma (1 - termination) V(s') - Q_i(s, a))^2 ]
    L_pi = E[ -min(w, clip) log pi(a | s) ]

SQL's V leaves out what is worse than V by more than 2 alpha, and its pi whatever is worse than V, so pi learns from few
actions (`actor/weight_zero` is the share it ignores). While u < 5, EQL's V is alpha log E[ exp(Q' / alpha) ], the soft
maximum. An action that is clipped at 5 draws V down, however good it is (`value/u_clipped` is the share).

Paper: Xu, Jiang, Li, Yang, Wang, Chan, Zhan, "Offline RL with No OOD Actions: In-Sample Learning via Implicit Value
Regularization", 2023, arXiv 2303.15810.
Differences: one optimiser step trains the three networks, each loss seeing the others as they were before it (the
authors update V first, then pi and Q with the new V). SQL takes E_pi[ pi / mu ] as 1, so its V lies below the
regulariser's by alpha (E_pi[ pi / mu ] - 1). Its w is the authors' code's; the regulariser gives max(u, 0). EQL has the
factor of 10 in w, the clip of u at 5 and the factor exp(-m), m = max(-1, max u), of each batch's L_V from the authors'
code: the last keeps exp small, and scales each batch's gradient. Observations are normalised, which the authors do not
do. Rewards are rescaled by the range of returns everywhere, unless --reward-scale says otherwise; the authors do so in
locomotion. Layers start as PyTorch's do; the authors' start orthogonal, and their layer norms add 1e-6 to the variance,
these 1e-5.

Run: python algorithms/sql.py --dataset-id anchorl/pendulum/mixed-v0
"""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (authors' code)
    variant: Literal["sql", "eql"] = "sql"  # the regulariser
    alpha: float = 1.0
    """its weight, in units of Q: small takes the best action, with eql while u < 5 (authors' code in locomotion: 1 for
    sql, 2 for eql, which has to be asked for)"""
    weight_clip: float = 100.0  # largest weight of a transition in L_pi (authors' code)
    tau: float = 0.005  # rate at which the target critic follows the critic (authors' code)
    actor_learning_rate: float = 3e-4  # of Adam (authors' code)
    cosine_decay: bool = True  # the actor's rate falls to 0 at --num-updates, which is then final (authors' code)
    critic_learning_rate: float = 3e-4  # of Adam (authors' code)
    value_learning_rate: float = 3e-4  # of Adam (authors' code)
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of every network (paper)


class Batch(NamedTuple):
    """Transitions, in float32."""

    observations: Tensor  # [batch, observation_dim], normalised
    actions: Tensor  # [batch, action_dim] in [-1, 1]
    rewards: Tensor  # [batch]
    next_observations: Tensor  # [batch, observation_dim], normalised
    terminations: Tensor  # [batch], 1 where the environment ended the episode; a truncation bootstraps


# --- Networks -------------------------------------------------------------------------------------------------------


def mlp(input_dim: int, hidden_dims: tuple[int, ...], output_dim: int, layer_norm: bool = False) -> list[nn.Module]:
    """Linear layers with ReLU between them, each ReLU after a layer normalisation if `layer_norm`."""
    layers: list[nn.Module] = []
    for width in hidden_dims:
        normalization = [nn.LayerNorm(width)] if layer_norm else []
        layers += [nn.Linear(input_dim, width), *normalization, nn.ReLU(inplace=True)]
        input_dim = width
    return [*layers, nn.Linear(input_dim, output_dim)]


class Actor(nn.Module):
    """pi(a | s) = Normal(tanh(net(s)), std): a bounded mean, and one standard deviation per action dimension."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.net = nn.Sequential(*mlp(observation_dim, args.hidden_dims, action_dim), nn.Tanh())
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, observations: Tensor) -> Tensor:
        """The mean action, which is the deterministic policy: [batch, action_dim] in [-1, 1]."""
        return self.net(observations)

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """log pi(a | s), [batch]."""
        log_std = self.log_std.clamp(-5, 2)  # the authors' range
        z = (actions - self(observations)) * torch.exp(-log_std)
        return -(0.5 * z.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(dim=-1)

    def sample(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions mean + std noise, [..., batch, action_dim], of a standard normal `noise` of their shape, and
        log pi(a | s), [..., batch].
        """
        log_std = self.log_std.clamp(-5, 2)
        actions = self(observations) + log_std.exp() * noise
        return actions, -(0.5 * noise.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(dim=-1)


class Value(nn.Module):
    """V(s), with layer normalisation."""

    def __init__(self, observation_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.net = nn.Sequential(*mlp(observation_dim, args.hidden_dims, 1, layer_norm=True))

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
    value: Value
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
    value = Value(observation_dim, args).to(device)
    groups = [
        {"params": actor.parameters(), "lr": args.actor_learning_rate},
        {"params": critic.parameters(), "lr": args.critic_learning_rate},
        {"params": value.parameters(), "lr": args.value_learning_rate},
    ]
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    return Learner(actor, critic, target_critic, value, adam(groups))


# --- Losses ---------------------------------------------------------------------------------------------------------


def advantage(value: Tensor, target_critic: Critic, batch: Batch) -> Tensor:
    """A(s, a) = min_i Q'_i(s, a) - V(s), [batch], given `value` V(s), [batch]. Its gradient reaches V alone."""
    with torch.no_grad():
        q = target_critic(batch.observations, batch.actions).min(dim=0).values  # [batch], the more careful twin's
    return q - value


def value_loss(advantages: Tensor, value: Tensor, variant: str, alpha: float) -> tuple[Tensor, Metrics]:
    """L_V, of A and V(s), [batch].

    sql: E[ 1(u > 0) u^2 + V / alpha ],    u = 1 + A / (2 alpha)
    eql: E[ exp(u) + V / alpha ] exp(-m),  u = min(A / alpha, 5),  m = max(-1, max u) a constant
    """
    if variant == "sql":
        u = 1 + advantages / (2 * alpha)
        loss = (u.clamp(min=0).square() + value / alpha).mean()
    else:
        u = (advantages / alpha).clamp(max=5)  # the authors' range; beyond it only V / alpha acts, which draws V down
        largest = u.detach().max().clamp(min=-1)  # m, a constant: the factor changes the gradient's size alone
        loss = (torch.exp(u - largest) + torch.exp(-largest) * value / alpha).mean()
    metrics = {"value/loss": loss.detach(), "value/advantage": advantages.detach().mean()}
    if variant == "eql":
        metrics["value/u_clipped"] = (u.detach() == 5).float().mean()  # a share of the batch
    return loss, metrics


def critic_loss(critic: Critic, value: Value, batch: Batch, gamma: float) -> tuple[Tensor, Metrics]:
    """L_Q = E[ sum_i (r + gamma (1 - termination) V(s') - Q_i(s, a))^2 ]"""
    with torch.no_grad():
        next_value = value(batch.next_observations)  # of s' itself: no action is needed
        target = batch.rewards + gamma * (1 - batch.terminations) * next_value  # a truncation bootstraps
    q = critic(batch.observations, batch.actions)  # [2, batch]
    loss = (target - q).square().mean(dim=1).sum()  # the mean over the batch, the sum over the twins
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


def effective_sample_size(weight: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2: as many transitions of equal weight say as much as the batch with its weights [batch]."""
    weight = weight / weight.max().clamp(min=1e-30)  # whose squares might be too small, or too large, for float32
    return weight.sum().square() / weight.square().sum().clamp(min=1e-30)


def actor_loss(
    actor: Actor, advantages: Tensor, batch: Batch, variant: str, alpha: float, weight_clip: float
) -> tuple[Tensor, Metrics]:
    """L_pi = E[ -min(w, clip) log pi(a | s) ],  w = max(A, 0) or exp(10 A / alpha),  A a constant here"""
    advantages = advantages.detach()
    weight = advantages.clamp(min=0) if variant == "sql" else torch.exp(10 * advantages / alpha)
    weight = weight.clamp(max=weight_clip)
    log_prob = actor.log_prob(batch.observations, batch.actions)
    loss = -(weight * log_prob).mean()
    metrics = {"actor/loss": loss.detach(), "actor/log_prob": log_prob.detach().mean(), "actor/weight": weight.mean()}
    metrics["actor/weight_clipped"] = (weight == weight_clip).float().mean()  # a share of the batch
    metrics["actor/weight_zero"] = (weight == 0).float().mean()  # another one
    metrics["actor/effective_sample_size"] = effective_sample_size(weight)  # of the batch's transitions
    return loss, metrics


# --- Update ---------------------------------------------------------------------------------------------------------


def total_loss(learner: Learner, batch: Batch, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_V + L_Q + L_pi. Each reaches the weights of one network only, so one backward pass serves all three."""
    value = learner.value(batch.observations)
    advantages = advantage(value, learner.target_critic, batch)
    loss_v, metrics_v = value_loss(advantages, value, args.variant, args.alpha)
    loss_q, metrics_q = critic_loss(learner.critic, learner.value, batch, args.gamma)
    loss_pi, metrics_pi = actor_loss(learner.actor, advantages, batch, args.variant, args.alpha, args.weight_clip)
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, check_argument, launch
from common.data import ReplayBuffer, hold_out, load_dataset
from common.experiment import Run, set_up
from common.optim import Adam, compiled


@dataclass
class Args(HyperParameters, ExperimentArgs):
    reward_scale: float | Literal["return-range"] = "return-range"
    """multiplies rewards; return-range: their returns span 1,000 (authors' code in locomotion; elsewhere 1)"""
    reward_shift: float = 0.0  # added to rewards first (authors' code: -1 in antmaze)
    normalize_observations: bool = True  # by the mean and standard deviation of the data

    def validate(self) -> None:
        super().validate()
        check_argument(self, "alpha", self.alpha > 0, "must be positive")
        check_argument(self, "weight_clip", self.weight_clip > 0, "must be positive")


def main(args: Args) -> None:
    device = set_up(args)
    dataset = hold_out(load_dataset(args.dataset_id, args.env_id), args)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations)
    buffer.scale_rewards(args.reward_scale, args.reward_shift)

    learner = build(buffer.observation_dim, buffer.action_dim, args, device, Adam)
    train = compiled(update, learner, args)
    run = Run(args, buffer, learner, update)  # makes the run folder or, with --resume, goes back to its checkpoint
    run.threads = 1  # no trial of other numbers: they divide the sums of V's layer normalisation, and its bits differ
    for step in range(run.first_step, args.num_updates + 1):
        if args.cosine_decay:
            rate = args.actor_learning_rate * cosine_decay(step, args.num_updates)
            learner.optimizer.param_groups[0]["lr"].fill_(rate)
        metrics = train(learner, Batch(*buffer.sample(args.batch_size)), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
