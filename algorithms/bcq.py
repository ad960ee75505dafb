"""Batch-constrained deep Q-learning (BCQ): only actions that look like the data's are ever considered.

A conditional variational auto-encoder (VAE) learns which actions the data takes at s. A perturbation network moves each
action sampled from it by at most phi, towards a higher Q. The policy takes the best of many such candidates, and so
does the critic's target, which trusts the lower of the twins more. With Q' and xi' the target networks:

    a_i   = clip(u_i + phi tanh(xi(s, u_i)), -1, 1),  u_i = tanh(decoder(s, z_i)),  z_i = clip(noise_i, -c, c)
    pi(s) = argmax_{a_i} Q_1(s, a_i)
    L_VAE = E[ (tanh(decoder(s, mean + std noise)) - a)^2 ] + k KL(Normal(mean, std) || Normal(0, 1))
    y     = r + gamma (1 - termination) max_i [ mix min_j Q'_j(s', a'_i) + (1 - mix) max_j Q'_j(s', a'_i) ]
    L_Q   = E[ sum_j (y - Q_j(s, a))^2 ]
    L_xi  = E[ -Q_1(s, a_i) ]

with mean, std = encoder(s, a), and a'_i the actions at s' that xi' gives instead of xi.

Paper: Fujimoto, Meger, Precup, "Off-Policy Deep Reinforcement Learning without Exploration", 2019, arXiv 1812.02900.
Differences: the z_i of the policy's candidates are drawn once, at the start, so that it is a function of s; the authors
draw them anew at each step. One optimiser step trains the three networks, each loss seeing the others as they were
before it (the authors train them in turn). The networks are smaller, the batch is larger, observations are normalised.

Run: python algorithms/bcq.py --dataset-id anchorl/pendulum/mixed-v0
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
    phi: float = 0.05  # largest perturbation of a sampled action, whose range is [-1, 1] (paper)
    q_mix: float = 0.75  # weight of the lower twin in the target, 1 - that of the higher (paper)
    num_target_actions: int = 10  # actions sampled at s' for the target (paper)
    num_acting_actions: int = 100  # candidates among which the policy takes the best (authors' code)
    latent_clip: float = 0.5
    """c, the largest latent that is sampled: the smaller, the more typical of the data the actions (authors' code)"""
    kl_weight: float = 0.5  # k, the weight of the KL term in L_VAE (authors' code)
    tau: float = 0.005  # rate at which the target networks follow (paper)
    actor_learning_rate: float = 1e-3  # of Adam, for the perturbation network (paper)
    critic_learning_rate: float = 1e-3  # of Adam (paper)
    vae_learning_rate: float = 1e-3  # of Adam (paper)
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of critics and perturbation network (paper: 400 300)
    vae_hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of encoder and decoder (paper: 750 750)


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


def join(observations: Tensor, x: Tensor) -> Tensor:
    """Every x [..., batch, x_dim] beside its observation [batch, observation_dim], of which many x may share one."""
    return torch.cat([observations.expand(*x.shape[:-1], -1), x], dim=-1)


class Encoder(nn.Module):
    """q(z | s, a) = Normal(mean, std): the latents that stand for the action a at s."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        latent_dim = 2 * action_dim  # the authors' choice
        self.net = nn.Sequential(*mlp(observation_dim + action_dim, args.vae_hidden_dims, 2 * latent_dim))

    def forward(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The mean and the logarithm of the standard deviation, [batch, latent_dim] each."""
        mean, log_std = self.net(join(observations, actions)).chunk(2, dim=-1)
        return mean, log_std.clamp(-4, 15)  # the authors' range


class Decoder(nn.Module):
    """u = tanh(decoder(s, z)): the action that the latent z stands for at s."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        latent_dim = 2 * action_dim  # the authors' choice
        self.net = nn.Sequential(*mlp(observation_dim + latent_dim, args.vae_hidden_dims, action_dim), nn.Tanh())

    def forward(self, observations: Tensor, latents: Tensor) -> Tensor:
        return self.net(join(observations, latents))  # [..., batch, action_dim] in [-1, 1]


class Perturbation(nn.Module):
    """a = clip(u + phi tanh(xi(s, u)), -1, 1): an action close to u."""

    phi: Tensor

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.net = nn.Sequential(*mlp(observation_dim + action_dim, args.hidden_dims, action_dim), nn.Tanh())
        self.register_buffer("phi", torch.tensor(args.phi))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        return (actions + self.phi * self.net(join(observations, actions))).clamp(-1, 1)  # [..., batch, action_dim]


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
        """Observations [batch, observation_dim], actions [..., batch, action_dim]: values [twins, ..., batch]."""
        x = join(observations, actions).flatten(0, -2).expand(twins, -1, -1)
        for layer in self.layers[:-1]:
            x = torch.relu_(layer(x))
        return self.layers[-1](x).view(twins, *actions.shape[:-1])


class Actor(nn.Module):
    """pi(s) = argmax_{a_i} Q_1(s, a_i): a deterministic policy, since the latents of the candidates a_i are fixed."""

    latents: Tensor

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.decoder = Decoder(observation_dim, action_dim, args)
        self.perturbation = Perturbation(observation_dim, action_dim, args)
        self.critic = Critic(observation_dim, action_dim, args)
        latents = torch.randn(args.num_acting_actions, 2 * action_dim).clamp(-args.latent_clip, args.latent_clip)
        self.register_buffer("latents", latents)  # [candidates, latent_dim]

    def forward(self, observations: Tensor) -> Tensor:
        """The action: [batch, action_dim] in [-1, 1]."""
        latents = self.latents.unsqueeze(1).expand(-1, observations.shape[0], -1)  # [candidates, batch, latent_dim]
        candidates = self.perturbation(observations, self.decoder(observations, latents))
        q = self.critic(observations, candidates, twins=1)[0]  # [candidates, batch], Q_1 alone
        best = q.argmax(dim=0)[None, :, None].expand(-1, -1, candidates.shape[-1])  # [1, batch, action_dim]
        return candidates.gather(0, best)[0]


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor  # decoder, perturbation network and critic: acting needs all three
    encoder: Encoder
    target_perturbation: Perturbation
    target_critic: Critic
    optimizer: Any


def build(
    observation_dim: int,
    action_dim: int,
    args: HyperParameters,
    device: torch.device | str = "cpu",
    adam: Any = torch.optim.Adam,
) -> Learner:
    """Fresh networks and their optimiser: one Adam with a parameter group per network, the perturbation's first."""
    actor = Actor(observation_dim, action_dim, args).to(device)
    encoder = Encoder(observation_dim, action_dim, args).to(device)
    groups = [
        {"params": actor.perturbation.parameters(), "lr": args.actor_learning_rate},
        {"params": actor.critic.parameters(), "lr": args.critic_learning_rate},
        {"params": [*encoder.parameters(), *actor.decoder.parameters()], "lr": args.vae_learning_rate},
    ]
    target_perturbation = copy.deepcopy(actor.perturbation).requires_grad_(False)
    target_critic = copy.deepcopy(actor.critic).requires_grad_(False)
    return Learner(actor, encoder, target_perturbation, target_critic, adam(groups))


# --- Losses ---------------------------------------------------------------------------------------------------------


def vae_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_VAE = E[ (tanh(decoder(s, mean + std noise)) - a)^2 ] + k KL(Normal(mean, std) || Normal(0, 1))

    The square is averaged over the action's dimensions, KL over the latent's; both over the batch, as the authors do.
    `noise` [batch, latent_dim] is standard normal.
    """
    mean, log_std = learner.encoder(batch.observations, batch.actions)
    std = log_std.exp()
    decoded = learner.actor.decoder(batch.observations, mean + std * noise)
    reconstruction = (decoded - batch.actions).square().mean()
    kl = (0.5 * (mean.square() + std.square() - 1) - log_std).mean()
    loss = reconstruction + args.kl_weight * kl
    return loss, {"vae/loss": loss.detach(), "vae/reconstruction": reconstruction.detach(), "vae/kl": kl.detach()}


def critic_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_Q = E[ sum_j (y - Q_j(s, a))^2 ]
    y = r + gamma (1 - termination) max_i [ mix min_j Q'_j(s', a'_i) + (1 - mix) max_j Q'_j(s', a'_i) ]

    `noise` [num_target_actions, batch, latent_dim] is standard normal.
    """
    with torch.no_grad():
        latents = noise.clamp(-args.latent_clip, args.latent_clip)
        sampled = learner.actor.decoder(batch.next_observations, latents)  # [samples, batch, action_dim]
        next_actions = learner.target_perturbation(batch.next_observations, sampled)
        lower, higher = learner.target_critic(batch.next_observations, next_actions).aminmax(dim=0)  # over the twins
        next_q = (args.q_mix * lower + (1 - args.q_mix) * higher).amax(dim=0)  # [batch], of the best sample
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_q  # a truncation bootstraps
    q = learner.actor.critic(batch.observations, batch.actions)  # [2, batch]
    loss = (target - q).square().mean(dim=1).sum()  # the mean over the batch, the sum over the twins
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


def actor_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_xi = E[ -Q_1(s, clip(u + phi tanh(xi(s, u)), -1, 1)) ],  u sampled from the VAE

    `noise` [batch, latent_dim] is standard normal.
    """
    with torch.no_grad():
        sampled = learner.actor.decoder(batch.observations, noise.clamp(-args.latent_clip, args.latent_clip))
    actions = learner.actor.perturbation(batch.observations, sampled)
    # Q with its weights held constant: the gradient passes through Q to the actions and changes no weight of Q itself.
    # functional_call runs a network with the weights it is given in place of its own.
    critic = learner.actor.critic
    constants = {name: weight.detach() for name, weight in critic.named_parameters()}
    loss = -functional_call(critic, constants, (batch.observations, actions, 1)).mean()  # Q_1 alone
    return loss, {"actor/loss": loss.detach(), "actor/perturbation": (actions.detach() - sampled).abs().mean()}


# --- Update ---------------------------------------------------------------------------------------------------------


def total_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_VAE + L_Q + L_xi. Each reaches the weights of its own networks only, so one backward pass serves all."""
    loss_vae, metrics_vae = vae_loss(learner, batch, noise[0], args)
    loss_pi, metrics_pi = actor_loss(learner, batch, noise[1], args)
    loss_q, metrics_q = critic_loss(learner, batch, noise[2:], args)
    return loss_vae + loss_q + loss_pi, metrics_vae | metrics_q | metrics_pi


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of the three networks, then the targets follow. `step` counts from 1."""
    actor, _, target_perturbation, target_critic, optimizer = learner
    shape = 2 + args.num_target_actions, len(batch.rewards), actor.latents.shape[1]
    loss, metrics = total_loss(learner, batch, torch.randn(shape, device=batch.actions.device), args)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

    with torch.no_grad():  # target <- target + tau (network - target)
        torch._foreach_lerp_(list(target_perturbation.parameters()), list(actor.perturbation.parameters()), args.tau)
        torch._foreach_lerp_(list(target_critic.parameters()), list(actor.critic.parameters()), args.tau)
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
    reward_scale: float | Literal["return-range"] = 1.0  # multiplies rewards; return-range: their returns span 1,000
    reward_shift: float = 0.0  # added to rewards first
    normalize_observations: bool = True  # by the mean and standard deviation of the data

    def validate(self) -> None:
        super().validate()
        check_argument(self, "phi", self.phi >= 0, "must not be negative")
        check_argument(self, "q_mix", 0 <= self.q_mix <= 1, "must be in [0, 1]")
        check_argument(self, "latent_clip", self.latent_clip > 0, "must be positive")
        check_argument(self, "kl_weight", self.kl_weight >= 0, "must not be negative")


def main(args: Args) -> None:
    device = set_up(args)
    dataset = hold_out(load_dataset(args.dataset_id, args.env_id), args)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations)
    buffer.scale_rewards(args.reward_scale, args.reward_shift)

    learner = build(buffer.observation_dim, buffer.action_dim, args, device, Adam)
    train = compiled(update, learner, args)
    run = Run(args, buffer, learner, update)  # makes the run folder or, with --resume, goes back to its checkpoint
    for step in range(run.first_step, args.num_updates + 1):
        metrics = train(learner, Batch(*buffer.sample(args.batch_size)), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
