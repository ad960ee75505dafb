"""Extreme Q-learning (XQL): IQL with a value that is the soft maximum of Q, by regression with Gumbel's errors.

Errors of a maximum are not Gaussian: they follow Gumbel's distribution. Regression with these gives V the soft maximum
of Q over the data's actions, temperature log E[ exp(Q' / temperature) ], without an action outside the data, where IQL
has an expectile. With Q' the target critic (a slow copy of Q), A(s, a) = min_i Q'_i(s, a) - V(s) and
z = min(A / temperature, z_clip):

    L_V  = E[ exp(z) - z - 1 ]
    L_Q  = E[ sum_i huber(r + gamma (1 - termination) V(s') - Q_i(s, a)) ]
    L_pi = E[ -min(exp(beta A), clip) log pi(a | s) ]

The gradient of L_V in A is (exp(z) - 1) / temperature: a few large z rule it. Two things tame them. The L_V of a batch
is divided by exp(m), m = max(-1, max z), its numerically stable form: the largest exponential is at most 1, and each
batch's gradient has a scale of its own. And the clip hides what is beyond: an action better than V by more than z_clip
times the temperature no longer draws V up at all (`value/z_clipped` is the share).

Paper: Garg, Hejna, Geist, Ermon, "Extreme Q-Learning: MaxEnt RL without Entropy", 2023, arXiv 2301.02328.
Differences: one optimiser step trains the three networks, each loss seeing the others as they were before it (the
authors update V first, then pi and Q with the new V). The paper weights L_pi by exp(A / temperature); its beta is our
temperature. Its snippet (E.4), which has exp(m), clips z on both sides. The beta of L_pi, the clip on one side and the
Huber loss are the authors' code's, whose options are left out: random or noisy actions in L_V, the logarithm of L_V,
several updates of V a step, a single Q, and a penalty of Q's gradient. The batch is 256; the authors' default is 1,024,
which six of their nine scripts for locomotion data keep. Observations are normalised, which the authors do not do.
Rewards are rescaled by the range of returns everywhere, unless --reward-scale says otherwise; the authors do so in
locomotion. Layers start as PyTorch's do; the authors' start orthogonal, and their layer norms add 1e-6 to the variance,
these 1e-5.

Run: python algorithms/xql.py --dataset-id anchorl/pendulum/mixed-v0
"""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import huber_loss

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (authors' code)
    temperature: float = 2.0
    """of the soft maximum, in units of Q: small is the maximum, large the mean (authors' scripts: 1 to 10 by dataset in
    locomotion; 2 in mujoco_consistent.sh)"""
    z_clip: float = 7.0  # largest z in L_V (authors' code: 7, in some tasks 5)
    huber_delta: float = 20.0  # error beyond which L_Q grows linearly (authors' code)
    beta: float = 3.0  # inverse temperature of L_pi's weights: 0 is cloning (authors' code: 3 locomotion)
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


def advantage(value: Value, target_critic: Critic, batch: Batch) -> Tensor:
    """A(s, a) = min_i Q'_i(s, a) - V(s), [batch]. Its gradient reaches V alone."""
    with torch.no_grad():
        q = target_critic(batch.observations, batch.actions).min(dim=0).values  # [batch], the more careful twin's
    return q - value(batch.observations)


def value_loss(advantages: Tensor, temperature: float, z_clip: float) -> tuple[Tensor, Metrics]:
    """L_V = E[ exp(z) - z - 1 ] exp(-m),  m = max(-1, max z) a constant"""
    z = (advantages / temperature).clamp(max=z_clip)
    m = z.detach().max().clamp(min=-1)
    loss = (torch.exp(z - m) - (z + 1) * torch.exp(-m)).mean()
    metrics = {"value/loss": loss.detach(), "value/advantage": advantages.detach().mean()}
    return loss, metrics | {"value/z_clipped": (z.detach() == z_clip).float().mean()}


def critic_loss(critic: Critic, value: Value, batch: Batch, gamma: float, huber_delta: float) -> tuple[Tensor, Metrics]:
    """L_Q = E[ sum_i huber(r + gamma (1 - termination) V(s') - Q_i(s, a)) ]"""
    with torch.no_grad():
        next_value = value(batch.next_observations)  # of s' itself: no action is needed
        target = batch.rewards + gamma * (1 - batch.terminations) * next_value  # a truncation bootstraps
    q = critic(batch.observations, batch.actions)  # [2, batch]
    losses = huber_loss(q, target.expand_as(q), reduction="none", delta=huber_delta)  # half the square of small ones
    loss = losses.mean(dim=1).sum()  # the mean over the batch, the sum over the twins
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


def effective_sample_size(weight: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2: as many transitions of equal weight say as much as the batch with its weights [batch]."""
    weight = weight / weight.max().clamp(min=1e-30)  # whose squares might be too small, or too large, for float32
    return weight.sum().square() / weight.square().sum().clamp(min=1e-30)


def actor_loss(
    actor: Actor, advantages: Tensor, batch: Batch, beta: float, weight_clip: float
) -> tuple[Tensor, Metrics]:
    """L_pi = E[ -min(exp(beta A), clip) log pi(a | s) ],  A a constant here"""
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
    loss_v, metrics_v = value_loss(advantages, args.temperature, args.z_clip)
    loss_q, metrics_q = critic_loss(learner.critic, learner.value, batch, args.gamma, args.huber_delta)
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
        for name in ("temperature", "z_clip", "huber_delta"):
            check_argument(self, name, getattr(self, name) > 0, "must be positive")
        check_argument(self, "beta", self.beta >= 0, "must not be negative")
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
