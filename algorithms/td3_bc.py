"""TD3+BC: the smallest change that makes an online actor-critic work offline.

The critic is TD3's: clipped double Q-learning, its targets smoothed by noise on the target actor's actions. The actor
maximises Q_1 while a squared error holds it to the data's actions; dividing Q by its own mean magnitude makes one alpha
fit every scale of rewards. With Q' and pi' the target networks:

    y    = r + gamma (1 - termination) min_i Q'_i(s', clip(pi'(s') + clip(noise, -c, c), -1, 1))
    L_Q  = E[ sum_i (y - Q_i(s, a))^2 ]
    L_pi = E[ -lambda Q_1(s, pi(s)) + (pi(s) - a)^2 ],  lambda = alpha / E|Q_1(s, pi(s))|        (eq. 3, 5)

Paper: Fujimoto, Gu, "A Minimalist Approach to Offline Reinforcement Learning", 2021, arXiv 2106.06860; TD3 is
arXiv 1802.09477.
Differences: none from the authors' code, offline. As there, lambda's mean is at pi(s), where the paper has the data's
actions; (pi(s) - a)^2 is averaged over the action's dimensions; layers start as PyTorch's do; and the actor is
evaluated, not the target actor. Ours alone is --online-steps, with the noise of TD3's code and L_pi as it was; others
lessen the imitation then (arXiv 2211.11802).

Run: python algorithms/td3_bc.py --dataset-id anchorl/pendulum/mixed-v0
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
    gamma: float = 0.99  # discount (paper)
    alpha: float = 2.5  # weight of Q against imitation in L_pi: 0 is behaviour cloning (paper)
    policy_noise: float = 0.2  # standard deviation of the noise on the target actor's actions (paper)
    noise_clip: float = 0.5  # largest noise (paper)
    policy_every: int = 2  # critic updates per update of the actor and the target networks (paper)
    tau: float = 0.005  # rate at which the target networks follow (paper)
    actor_learning_rate: float = 3e-4  # of Adam (paper)
    critic_learning_rate: float = 3e-4  # of Adam (paper)
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of every network (paper)


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


class EnsembleLinear(nn.Module):
    """Linear layers side by side: one batched product, [members, batch, in] -> [members, batch, out]."""

    def __init__(self, members: int, input_dim: int, output_dim: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(input_dim)  # nn.Linear's own initialisation
        self.weight = nn.Parameter(torch.empty(members, input_dim, output_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, output_dim).uniform_(-bound, bound))

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) == 1:  # the first alone
            return torch.baddbmm(self.bias[:1], inputs, self.weight[:1])
        if self.weight.shape[-1] == 1:  # one output: as a matrix product it takes four times as long
            return torch.linalg.vecdot(inputs, self.weight.mT).unsqueeze(-1) + self.bias
        return torch.baddbmm(self.bias, inputs, self.weight)


class Critic(nn.Module):
    """Q_1(s, a) and Q_2(s, a): twins, trained on the same target from different initial weights."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        widths = [observation_dim + action_dim, *args.hidden_dims, 1]
        self.layers = nn.ModuleList(EnsembleLinear(2, *pair) for pair in pairwise(widths))

    def forward(self, observations: Tensor, actions: Tensor, twins: int = 2) -> Tensor:
        x = torch.cat([observations, actions], dim=-1).expand(twins, -1, -1)
        for layer in self.layers[:-1]:
            x = torch.relu_(layer(x))
        return self.layers[-1](x).squeeze(-1)  # [twins, batch]


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


# --- Losses ---------------------------------------------------------------------------------------------------------


def critic_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_Q = E[ sum_i (y - Q_i(s, a))^2 ],  y = r + gamma (1 - termination) min_i Q'_i(s', a')

    `noise` [batch, action_dim] is standard normal.
    """
    with torch.no_grad():
        clipped_noise = (noise * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        next_actions = (learner.target_actor(batch.next_observations) + clipped_noise).clamp(-1, 1)  # a', smoothed
        next_q = learner.target_critic(batch.next_observations, next_actions).min(dim=0).values  # [batch]
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_q  # a truncation bootstraps
    q = learner.critic(batch.observations, batch.actions)  # [2, batch]
    loss = (target - q).square().mean(dim=1).sum()  # the mean over the batch, the sum over the twins
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


def actor_loss(learner: Learner, batch: Batch, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_pi = E[ -lambda Q_1(s, pi(s)) + (pi(s) - a)^2 ],  lambda = alpha / E|Q_1(s, pi(s))|        (eq. 3, 5)"""
    actions = learner.actor(batch.observations)
    q = learner.critic(batch.observations, actions, twins=1)  # Q_1 alone
    lambda_ = args.alpha / q.detach().abs().mean()  # a constant of the loss: no gradient
    imitation = (actions - batch.actions).square().mean()  # over the batch and the action's dimensions
    loss = -lambda_ * q.mean() + imitation
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
from common.evaluation import Player, make_environments
from common.experiment import Run, set_up
from common.optim import Adam, compiled


@dataclass
class Args(HyperParameters, ExperimentArgs):
    reward_scale: float | Literal["return-range"] = 1.0  # multiplies rewards; return-range: their returns span 1,000
    reward_shift: float = 0.0  # added to rewards first
    normalize_observations: bool = True  # by the mean and standard deviation of the data (paper, eq. 4)
    online_steps: int = 0  # after the other updates, steps that the policy takes, with noise, with an update each
    exploration_noise: float = 0.1  # standard deviation of that noise, in half ranges of the actions (TD3's code)

    def validate(self) -> None:
        super().validate()
        check_argument(self, "alpha", self.alpha >= 0, "must not be negative")
        check_argument(self, "policy_noise", self.policy_noise >= 0, "must not be negative")
        check_argument(self, "noise_clip", self.noise_clip >= 0, "must not be negative")
        check_argument(self, "exploration_noise", self.exploration_noise >= 0, "must not be negative")


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
        noise = torch.randn(1, buffer.action_dim, device=device)
        return learner.actor(observations) + args.exploration_noise * noise

    for step in range(run.first_step, run.last_step + 1):
        if player and step > args.num_updates:  # a transition more, which counts as much as one of the data
            buffer.add(player.step(run.policy(player.observation[None], explore)[0]))
        metrics = train(learner, Batch(*buffer.sample(args.batch_size)), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
