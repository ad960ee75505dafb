"""ReBRAC: TD3+BC whose critic, too, is charged for leaving the data, with the networks that later work settled on.

The actor is TD3+BC's, its squared error weighed by actor_beta. The critic's target pays critic_beta for the distance
between the target actor's action at s' and the one that the data took there. So the critic learns the value of a policy
that is charged for leaving the data. Layer norm in the critic bounds what it says of actions far away. With Q' and pi'
the target networks and a'_data the data's action at s':

    a'   = clip(pi'(s') + clip(noise, -c, c), -1, 1)
    y    = r + gamma (1 - termination) (min_i Q'_i(s', a') - critic_beta |a' - a'_data|^2)
    L_Q  = E[ sum_i (y - Q_i(s, a))^2 ]
    L_pi = E[ -lambda min_i Q_i(s, pi(s)) + actor_beta |pi(s) - a|^2 ],  lambda = 1 / E|min_i Q_i(s, pi(s))|

Paper: Tarasov, Kurenkov, Nikulin, Kolesnikov, "Revisiting the Minimalist Approach to Offline Reinforcement Learning",
2023, arXiv 2305.09836, where the two prices are beta_1 and beta_2; TD3 is arXiv 1802.09477.
Differences: |.|^2 is a sum over the action's dimensions, as in the authors' code. At the last step of an episode that a
time limit cut, the data hold no action at s': the target of that step has no price (the authors drop the step). The
import of D4RL files that lack next observations drops it, too; then the step before it has no price. Observations are
normalised, and layer norms add 1e-5 to the variance (theirs 1e-6). Layers start as PyTorch's do; the authors' start
with biases of 0.1 and with last layers near 0 (uniform within 1e-3 in the actor, 3e-3 in the critic). Their target
actor follows the actor as it was before the step. As theirs, evaluations are of the actor, not of the target actor.

Run: python algorithms/rebrac.py --dataset-id anchorl/pendulum/mixed-v0
"""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (paper; 0.999 antmaze)
    actor_beta: float = 0.01  # weight of imitation in L_pi (paper, D4RL: 0.001 to 0.1, chosen for each dataset)
    critic_beta: float = 0.01
    """price in y of leaving the data's action, in units of reward (paper: 0 to 0.5, chosen for each dataset)"""
    policy_noise: float = 0.2  # standard deviation of the noise on the target actor's actions (paper)
    noise_clip: float = 0.5  # largest noise (paper)
    policy_every: int = 2  # critic updates per update of the actor and the target networks (paper)
    tau: float = 0.005  # rate at which the target networks follow (paper)
    actor_learning_rate: float = 1e-3  # of Adam (paper, locomotion)
    critic_learning_rate: float = 1e-3  # of Adam (paper, locomotion)
    hidden_dims: tuple[int, ...] = (256, 256, 256)  # hidden layers of every network (paper)


class Batch(NamedTuple):
    """Transitions, in float32."""

    observations: Tensor  # [batch, observation_dim], normalised
    actions: Tensor  # [batch, action_dim] in [-1, 1]
    rewards: Tensor  # [batch]
    next_observations: Tensor  # [batch, observation_dim], normalised
    terminations: Tensor  # [batch], 1 where the environment ended the episode; a truncation bootstraps
    next_actions: Tensor  # [batch, action_dim], the data's at s'; NaN at the last step of an episode


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


class EnsembleLayerNorm(nn.Module):
    """Layer norms side by side: each row of [members, batch, width] to mean 0, variance 1, then scaled and shifted."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, 1, width))
        self.bias = nn.Parameter(torch.zeros(members, 1, width))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.addcmul(self.bias, layer_norm(inputs, inputs.shape[-1:]), self.weight)


class Critic(nn.Module):
    """Q_1(s, a) and Q_2(s, a): twins, trained on the same target from different initial weights."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        widths = [observation_dim + action_dim, *args.hidden_dims, 1]
        self.layers = nn.ModuleList(EnsembleLinear(2, *pair) for pair in pairwise(widths))
        self.norms = nn.ModuleList(EnsembleLayerNorm(2, width) for width in args.hidden_dims)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        x = torch.cat([observations, actions], dim=-1).expand(2, -1, -1)
        for layer, norm in zip(self.layers[:-1], self.norms, strict=True):
            x = norm(torch.relu_(layer(x)))  # in this order: the authors' code
        return self.layers[-1](x).squeeze(-1)  # [2, batch]


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor
    critic: Critic
    target_actor: Actor
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
    target_actor = copy.deepcopy(actor).requires_grad_(False)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    return Learner(actor, critic, target_actor, target_critic, adam(groups))


# --- Next actions ---------------------------------------------------------------------------------------------------


def following_actions(actions: Tensor, episode_lengths: Tensor) -> Tensor:
    """The data's action at s' of every transition, [N, action_dim]: the next row's, and NaN at an episode's last.

    `actions` [N, action_dim] hold the episodes of `episode_lengths` [E] one after the other.
    """
    last = episode_lengths.to(actions.device).cumsum(0) - 1
    return actions.roll(-1, dims=0).index_fill(0, last, math.nan)


# --- Losses ---------------------------------------------------------------------------------------------------------


def critic_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_Q = E[ sum_i (y - Q_i(s, a))^2 ]
    y = r + gamma (1 - termination) (min_i Q'_i(s', a') - critic_beta |a' - a'_data|^2)

    `noise` [batch, action_dim] is standard normal.
    """
    with torch.no_grad():
        clipped_noise = (noise * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        next_actions = (learner.target_actor(batch.next_observations) + clipped_noise).clamp(-1, 1)  # a', smoothed
        next_q = learner.target_critic(batch.next_observations, next_actions).min(dim=0).values  # [batch]
        # where the data hold no action at s', a' itself stands for it: nothing to pay
        data_actions = torch.where(batch.next_actions.isnan(), next_actions, batch.next_actions)
        penalty = (next_actions - data_actions).square().sum(dim=-1)  # [batch]
        next_value = next_q - args.critic_beta * penalty
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_value  # a truncation bootstraps
    q = learner.critic(batch.observations, batch.actions)  # [2, batch]
    loss = (target - q).square().mean(dim=1).sum()  # the mean over the batch, the sum over the twins
    metrics = {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}
    return loss, metrics | {"critic/penalty": penalty.mean()}


def actor_loss(learner: Learner, batch: Batch, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_pi = E[ -lambda min_i Q_i(s, pi(s)) + actor_beta |pi(s) - a|^2 ],  lambda = 1 / E|min_i Q_i(s, pi(s))|"""
    actions = learner.actor(batch.observations)
    q = learner.critic(batch.observations, actions).min(dim=0).values  # [batch]
    lambda_ = 1 / q.detach().abs().mean()  # a constant of the loss: no gradient
    imitation = (actions - batch.actions).square().sum(dim=-1).mean()
    loss = -lambda_ * q.mean() + args.actor_beta * imitation
    return loss, {"actor/loss": loss.detach(), "actor/q": q.detach().mean(), "actor/imitation": imitation.detach()}


# --- Update ---------------------------------------------------------------------------------------------------------


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of the critic; every `policy_every`-th, also of actor and targets. `step` counts from 1."""
    actor, critic, target_actor, target_critic, optimizer = learner
    loss, metrics = critic_loss(learner, batch, torch.randn_like(batch.actions), args)
    loss.backward()
    optimizer.step()  # the actor has no gradient, so Adam passes it over
    optimizer.zero_grad()

    if step % args.policy_every == 0:
        loss, metrics_pi = actor_loss(learner, batch, args)
        loss.backward(inputs=list(actor.parameters()))  # through the critic, but not into it
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # target <- target + tau (network - target)
            torch._foreach_lerp_(list(target_actor.parameters()), list(actor.parameters()), args.tau)
            torch._foreach_lerp_(list(target_critic.parameters()), list(critic.parameters()), args.tau)
        metrics |= metrics_pi
    return metrics


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
    batch_size: int = 1024  # transitions per update (paper: 1024 locomotion, 256 the rest)
    reward_scale: float | Literal["return-range"] = 1.0
    """multiplies rewards (authors' code: 100 in antmaze); return-range: their returns span 1,000"""
    reward_shift: float = 0.0  # added to rewards first
    normalize_observations: bool = True  # by the mean and standard deviation of the data

    def validate(self) -> None:
        super().validate()
        check_argument(self, "actor_beta", self.actor_beta >= 0, "must not be negative")
        check_argument(self, "critic_beta", self.critic_beta >= 0, "must not be negative")
        check_argument(self, "policy_noise", self.policy_noise >= 0, "must not be negative")
        check_argument(self, "noise_clip", self.noise_clip >= 0, "must not be negative")


def main(args: Args) -> None:
    device = set_up(args)
    dataset = hold_out(load_dataset(args.dataset_id, args.env_id), args)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations)
    buffer.scale_rewards(args.reward_scale, args.reward_shift)
    next_actions = following_actions(buffer.transitions.actions, buffer.episode_lengths)

    learner = build(buffer.observation_dim, buffer.action_dim, args, device, Adam)
    train = compiled(update, learner, args)

    def make_batch(held_out: ReplayBuffer, rows: Tensor) -> Batch:
        next_actions = following_actions(held_out.transitions.actions, held_out.episode_lengths)
        return Batch(*held_out.take(rows), next_actions[rows])

    run = Run(args, buffer, learner, update, make_batch)  # makes the run folder or goes back to its checkpoint
    for step in range(run.first_step, args.num_updates + 1):
        rows = buffer.draw(args.batch_size)
        metrics = train(learner, Batch(*buffer.take(rows), next_actions[rows]), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
