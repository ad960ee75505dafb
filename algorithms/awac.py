"""Advantage-weighted actor-critic (AWAC): a policy that imitates the actions which its own critic thinks better.

The critic is learned by one-step targets with the current policy's action at s'; the actor imitates the data's actions,
each weighted by how much better it is than what the policy would do itself. The gradient of Q never moves the policy.
So an error of Q outside the data reaches it only through the targets and the baseline V. With Q' the target critic (a
slow copy of Q) and actions drawn from pi:

    y    = r + gamma (1 - termination) min_i Q'_i(s', a'),  a' ~ pi(.|s')
    L_Q  = E[ sum_i (y - Q_i(s, a))^2 ]
    A    = min_i Q_i(s, a) - V(s),  V(s) = mean over a_k ~ pi(.|s) of min_i Q_i(s, a_k)
    L_pi = E[ -w(s, a) log pi(a | s) ],  w = exp(A / beta), over the batch's mean of it; beta is the paper's lambda

Paper: Nair, Gupta, Dalal, Levine, "AWAC: Accelerating Online Reinforcement Learning with Offline Datasets", 2020,
arXiv 2006.09359.
Differences: as in the authors' code, weights are divided by their mean over the batch (the paper has a factor 1 / Z(s)
and then leaves it out), and each loss sees the other network as it was before the step. The authors' actor has four
hidden layers (MuJoCo), a weight decay of 1e-4 and a standard deviation between exp(-6) and 1, at first exp(-3); here
the actor is iql.py's, whose starts at 1. Their batches have 128 rows offline and 1,024 online. Actions drawn from pi
are clipped to the environment's range. Observations are normalised. Layers start as PyTorch's do, and target critics as
copies; the authors' start with biases of 0, with last layers near 0 (uniform within 1e-3 in the actor, 3e-3 in the
critics), first ones within 1 / sqrt(outputs), and target critics with weights of their own. With --online-steps pi
takes a step before each update; the authors take 1,000 steps, and then as many updates. Theirs, too, draw from data and
new steps alike.

Run: python algorithms/awac.py --dataset-id anchorl/pendulum/mixed-v0
"""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (authors' code)
    beta: float = 2.0
    """temperature of pi's weights, in units of Q: larger clones more (authors' code: 2; hands 0.5, A cut at 0.5)"""
    num_value_samples: int = 1  # actions of pi over which V averages Q (authors' code)
    tau: float = 0.005  # rate at which the target critic follows the critic (authors' code)
    actor_learning_rate: float = 3e-4  # of Adam (authors' code)
    critic_learning_rate: float = 3e-4  # of Adam (authors' code)
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of every network (authors' code: of the critics)


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
        log_std = self.log_std.clamp(-5, 2)  # IQL's range
        z = (actions - self(observations)) * torch.exp(-log_std)
        return -(0.5 * z.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(dim=-1)

    def sample(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions mean + std noise, [..., batch, action_dim], of a standard normal `noise` of their shape, clipped, and
        log pi of them before they are clipped, [..., batch].
        """
        log_std = self.log_std.clamp(-5, 2)
        actions = (self(observations) + log_std.exp() * noise).clamp(-1, 1)
        return actions, -(0.5 * noise.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(dim=-1)


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
        """Observations [batch, observation_dim], actions [..., batch, action_dim]: values [2, ..., batch]."""
        observations = observations.expand(*actions.shape[:-1], -1)
        x = torch.cat([observations, actions], dim=-1).flatten(0, -2).expand(2, -1, -1)
        for layer in self.layers[:-1]:
            x = torch.relu_(layer(x))
        return self.layers[-1](x).view(2, *actions.shape[:-1])


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


def advantage(actor: Actor, critic: Critic, batch: Batch, noise: Tensor) -> Tensor:
    """A(s, a) = min_i Q_i(s, a) - V(s),  V(s) = mean over a_k ~ pi(.|s) of min_i Q_i(s, a_k): constants, [batch].

    `noise` [num_value_samples, batch, action_dim] is standard normal.
    """
    with torch.no_grad():
        samples, _ = actor.sample(batch.observations, noise)  # a_k
        actions = torch.cat([batch.actions.unsqueeze(0), samples])
        q = critic(batch.observations, actions).min(dim=0).values  # [1 + num_value_samples, batch], the data's first
        return q[0] - q[1:].mean(dim=0)


def critic_loss(learner: Learner, batch: Batch, noise: Tensor, gamma: float) -> tuple[Tensor, Metrics]:
    """L_Q = E[ sum_i (y - Q_i(s, a))^2 ],  y = r + gamma (1 - termination) min_i Q'_i(s', a'),  a' ~ pi(.|s')

    `noise` [batch, action_dim] is standard normal.
    """
    with torch.no_grad():
        next_actions, _ = learner.actor.sample(batch.next_observations, noise)  # what pi would do now, not the data
        next_q = learner.target_critic(batch.next_observations, next_actions).min(dim=0).values  # [batch]
        target = batch.rewards + gamma * (1 - batch.terminations) * next_q  # a truncation bootstraps
    q = learner.critic(batch.observations, batch.actions)  # [2, batch]
    loss = (target - q).square().mean(dim=1).sum()  # the mean over the batch, the sum over the twins
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


def effective_sample_size(weight: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2: as many transitions of equal weight say as much as the batch with its weights [batch]."""
    weight = weight / weight.max().clamp(min=1e-30)  # whose squares might be too small, or too large, for float32
    return weight.sum().square() / weight.square().sum().clamp(min=1e-30)


def actor_loss(actor: Actor, advantages: Tensor, batch: Batch, beta: float) -> tuple[Tensor, Metrics]:
    """L_pi = E[ -w log pi(a | s) ],  w = exp(A / beta) over the batch's mean of it"""
    weight = len(advantages) * torch.softmax(advantages / beta, dim=0)  # [batch]: however large A is, their mean is 1
    log_prob = actor.log_prob(batch.observations, batch.actions)
    loss = -(weight * log_prob).mean()
    metrics = {"actor/loss": loss.detach(), "actor/log_prob": log_prob.detach().mean()}
    metrics |= {"actor/advantage": advantages.mean(), "actor/weight_max": weight.max()}
    metrics["actor/effective_sample_size"] = effective_sample_size(weight)  # of the batch's transitions
    return loss, metrics


# --- Update ---------------------------------------------------------------------------------------------------------


def total_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_Q + L_pi. Each reaches the weights of one network only, so one backward pass serves both."""
    advantages = advantage(learner.actor, learner.critic, batch, noise[1:])
    loss_q, metrics_q = critic_loss(learner, batch, noise[0], args.gamma)
    loss_pi, metrics_pi = actor_loss(learner.actor, advantages, batch, args.beta)
    return loss_q + loss_pi, metrics_q | metrics_pi


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of both networks, then the target critic follows the critic. `step` counts from 1."""
    noise = torch.randn(1 + args.num_value_samples, *batch.actions.shape, device=batch.actions.device)
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
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, check_argument, launch
from common.data import ReplayBuffer, hold_out, load_dataset
from common.evaluation import Player, make_environments
from common.experiment import Run, set_up
from common.optim import Adam, compiled


@dataclass
class Args(HyperParameters, ExperimentArgs):
    reward_scale: float | Literal["return-range"] = 1.0  # multiplies rewards; return-range: their returns span 1,000
    reward_shift: float = 0.0  # added to rewards first
    normalize_observations: bool = True  # by the mean and standard deviation of the data
    online_steps: int = 0  # after the other updates, steps that the policy takes, by sampling, with an update each

    def validate(self) -> None:
        super().validate()
        check_argument(self, "beta", self.beta > 0, "must be positive")


def main(args: Args) -> None:
    device = set_up(args)
    dataset = hold_out(load_dataset(args.dataset_id, args.env_id), args)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations, room=args.online_steps)
    buffer.scale_rewards(args.reward_scale, args.reward_shift)

    learner = build(buffer.observation_dim, buffer.action_dim, args, device, Adam)
    train = compiled(update, learner, args)
    player = Player(make_environments(dataset, 1)[0], buffer, args.seed) if args.online_steps else None
    run = Run(args, buffer, learner, update, player=player)  # makes the run folder, or goes back to its checkpoint

    def explore(observations: Tensor) -> Tensor:
        return learner.actor.sample(observations, torch.randn(1, buffer.action_dim, device=device))[0]

    for step in range(run.first_step, run.last_step + 1):
        if player and step > args.num_updates:  # a transition more, which counts as much as one of the data
            buffer.add(player.step(run.policy(player.observation[None], explore)[0]))
        metrics = train(learner, Batch(*buffer.sample(args.batch_size)), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
