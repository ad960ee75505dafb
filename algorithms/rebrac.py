"""ReBRAC: TD3+BC with a price for leaving the data in the critic, too, and the networks that later work settled on.

The actor is TD3+BC's, its squared error weighed by actor_beta. The critic's target pays critic_beta for the distance
between the target actor's action at s' and the one that the data took there, so that it learns the value of a policy
which is charged for where it leaves the data. Layer norm in the critic bounds what it says of actions far away. With Q'
and pi' the target networks and a'_data the data's action at s':

    a'   = clip(pi'(s') + clip(noise, -c, c), -1, 1)
    y    = r + gamma (1 - termination) (min_i Q'_i(s', a') - critic_beta |a' - a'_data|^2)
    L_Q  = E[ sum_i (y - Q_i(s, a))^2 ]
    L_pi = E[ -lambda min_i Q_i(s, pi(s)) + actor_beta |pi(s) - a|^2 ],  lambda = 1 / E|min_i Q_i(s, pi(s))|

Paper: Tarasov, Kurenkov, Nikulin, Kolesnikov, "Revisiting the Minimalist Approach to Offline Reinforcement Learning",
2023, arXiv 2305.09836, where the two prices are beta_1 and beta_2; TD3 is arXiv 1802.09477.
Differences: |.|^2 is a sum over the action's dimensions, as in the authors' code. At the last step of an episode that a
time limit cut, the data hold no action at s': the step stays in the data, its target without a price (the authors drop
it; so does the reader of D4RL's files that lack next observations, and the step before goes unpriced). Layers begin as
PyTorch's do (the authors': biases of 0.1, last layers near 0), and observations are normalised.

Run: python algorithms/rebrac.py --dataset-id anchorl/pendulum/mixed-v0
"""

import copy
import math
import sys
from dataclasses import dataclass
from itertools import pairwise
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
    algorithm: ClassVar[str] = "rebrac"

    batch_size: int = 1024
    """transitions per update (paper: 1024 locomotion, 256 the rest)"""
    gamma: float = 0.99
    """discount (paper; 0.999 antmaze)"""
    actor_beta: float = 0.01
    """weight of imitation against Q in L_pi (paper, D4RL: 0.001 to 0.1, chosen for each dataset)"""
    critic_beta: float = 0.01
    """price in y of leaving the data's action, in units of reward (paper: 0 to 0.5, chosen for each dataset)"""
    policy_noise: float = 0.2
    """standard deviation of the noise on the target actor's actions (paper)"""
    noise_clip: float = 0.5
    """largest noise (paper)"""
    policy_every: int = 2
    """critic updates per update of the actor and the target networks (paper)"""
    tau: float = 0.005
    """rate at which the target networks follow (paper)"""
    actor_learning_rate: float = 1e-3
    """paper, locomotion"""
    critic_learning_rate: float = 1e-3
    """paper, locomotion"""
    hidden_dims: tuple[int, ...] = (256, 256, 256)
    """hidden layers of every network (paper)"""
    normalize_observations: bool = True
    """by the mean and standard deviation of the data"""

    def validate(self) -> None:
        super().validate()
        check_argument(self, "actor_beta", self.actor_beta >= 0, "must not be negative")
        check_argument(self, "critic_beta", self.critic_beta >= 0, "must not be negative")
        check_argument(self, "policy_noise", self.policy_noise >= 0, "must not be negative")
        check_argument(self, "noise_clip", self.noise_clip >= 0, "must not be negative")


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


class TwinLinear(nn.Module):
    """Two linear layers side by side: one batched product, [2, batch, in] -> [2, batch, out]."""

    def __init__(self, input_dim: int, output_dim: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(input_dim)  # nn.Linear's own initialisation
        self.weight = nn.Parameter(torch.empty(2, input_dim, output_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(2, 1, output_dim).uniform_(-bound, bound))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, inputs, self.weight)


class TwinLayerNorm(nn.Module):
    """Two layer norms side by side: each row of [2, batch, width] to mean 0 and variance 1, then scaled and shifted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 1, width))
        self.bias = nn.Parameter(torch.zeros(2, 1, width))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.layer_norm(inputs, inputs.shape[-1:]), self.weight)


class Critic(nn.Module):
    """Q_1(s, a) and Q_2(s, a): twins, trained on the same target from different initial weights."""

    def __init__(self, observation_dim: int, action_dim: int, hidden_dims: tuple[int, ...]) -> None:
        super().__init__()
        widths = [observation_dim + action_dim, *hidden_dims, 1]
        self.layers = nn.ModuleList(TwinLinear(*pair) for pair in pairwise(widths))
        self.norms = nn.ModuleList(TwinLayerNorm(width) for width in hidden_dims)

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
    optimizer: Adam


def build(observation_dim: int, action_dim: int, args: Args, device: torch.device) -> Learner:
    """Fresh networks and their optimiser: one Adam with a parameter group per network, the actor's first."""
    actor = Actor(observation_dim, action_dim, args.hidden_dims).to(device)
    critic = Critic(observation_dim, action_dim, args.hidden_dims).to(device)
    groups = [
        {"params": actor.parameters(), "lr": args.actor_learning_rate},
        {"params": critic.parameters(), "lr": args.critic_learning_rate},
    ]
    target_actor = copy.deepcopy(actor).requires_grad_(False)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    return Learner(actor, critic, target_actor, target_critic, Adam(groups))


# --- Next actions ---------------------------------------------------------------------------------------------------


def following_actions(buffer: ReplayBuffer) -> Tensor:
    """The data's action at s' of every transition, [N, action_dim]: the next row's, and NaN at an episode's last."""
    actions = buffer.transitions.actions.roll(-1, dims=0)
    ends = buffer.episode_starts + buffer.episode_lengths - 1
    return actions.index_fill(0, ends.to(actions.device), math.nan)


# --- Losses ---------------------------------------------------------------------------------------------------------


def critic_loss(
    learner: Learner, batch: Batch, data_actions: Tensor, noise: Tensor, args: Args
) -> tuple[Tensor, Metrics]:
    """L_Q = E[ sum_i (y - Q_i(s, a))^2 ]
    y = r + gamma (1 - termination) (min_i Q'_i(s', a') - critic_beta |a' - a'_data|^2)

    `data_actions` [batch, action_dim]: a'_data, NaN where there is none; `noise` [batch, action_dim]: standard normal.
    """
    with torch.no_grad():
        clipped_noise = (noise * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
        next_actions = (learner.target_actor(batch.next_observations) + clipped_noise).clamp(-1, 1)  # a', smoothed
        next_q = learner.target_critic(batch.next_observations, next_actions).min(dim=0).values  # [batch]
        known = torch.where(data_actions.isnan(), next_actions, data_actions)  # where there is none, nothing to pay
        penalty = (next_actions - known).square().sum(dim=-1)  # [batch]
        next_value = next_q - args.critic_beta * penalty
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_value  # a truncation bootstraps
    q = learner.critic(batch.observations, batch.actions)  # [2, batch]
    loss = 2 * F.mse_loss(q, target.expand_as(q))  # the mean over the twins, too, times two: their sum
    metrics = {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}
    return loss, metrics | {"critic/penalty": penalty.mean()}


def actor_loss(learner: Learner, batch: Batch, args: Args) -> tuple[Tensor, Metrics]:
    """L_pi = E[ -lambda min_i Q_i(s, pi(s)) + actor_beta |pi(s) - a|^2 ],  lambda = 1 / E|min_i Q_i(s, pi(s))|"""
    actions = learner.actor(batch.observations)
    q = learner.critic(batch.observations, actions).min(dim=0).values  # [batch]
    lambda_ = 1 / q.detach().abs().mean()  # a constant of the loss: no gradient
    imitation = (actions - batch.actions).square().sum(dim=-1).mean()
    loss = -lambda_ * q.mean() + args.actor_beta * imitation
    return loss, {"actor/loss": loss.detach(), "actor/q": q.detach().mean(), "actor/imitation": imitation.detach()}


# --- Update ---------------------------------------------------------------------------------------------------------


def update(learner: Learner, batch: Batch, step: int, args: Args, data_actions: Tensor | None = None) -> Metrics:
    """One gradient step of the critic; every `policy_every`-th, also of actor and targets. `step` counts from 1.

    `data_actions` [batch, action_dim]: what the data did at s'; None where nobody knows.
    """
    actor, critic, target_actor, target_critic, optimizer = learner
    if data_actions is None:
        data_actions = torch.full_like(batch.actions, math.nan)
    loss, metrics = critic_loss(learner, batch, data_actions, torch.randn_like(batch.actions), args)
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


# --- Main -----------------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    device = set_up(args)
    buffer = ReplayBuffer(load_dataset(args.dataset_id, args.env_id), device, args.normalize_observations)

    learner = build(buffer.observation_dim, buffer.action_dim, args, device)
    train = compiled(update, args, device)
    data_actions = following_actions(buffer)  # at s', which a Batch does not hold
    run = Run(args, buffer, learner)
    for step in run.steps():
        rows = torch.randint(len(data_actions), (args.batch_size,), device=device)
        batch = Batch(*(column[rows] for column in buffer.transitions))
        metrics = train(learner, batch, step, args, data_actions[rows])

        if evaluating := run.is_due(step, args.eval_every):
            metrics |= run.evaluate(step)
        if evaluating or run.is_due(step, args.log_every):
            run.log(step, metrics)
        if run.is_due(step, args.checkpoint_every):
            run.save_checkpoint(step)
    run.finish()


if __name__ == "__main__":
    launch(main, Args)
