"""Bootstrapping error accumulation reduction (BEAR): any policy whose actions the data might have held.

A conditional variational auto-encoder (VAE) learns which actions the data takes at s. The actor maximises Q while its
samples could be samples of the VAE: a price alpha holds their maximum mean discrepancy (MMD) below a threshold, by
rising while it is above. A few samples tell where two policies act better than how often, so the actor is free to
choose among what the data did. With Q' the target networks, and u the samples of an action before tanh:

    L_VAE   = E[ (tanh(decoder(s, mean + std noise)) - a)^2 ] + k KL(Normal(mean, std) || Normal(0, 1))
    y       = r + gamma (1 - termination) max_i [ mix min_j Q'_j(s', a'_i) + (1 - mix) max_j Q'_j(s', a'_i) ],
              a'_i ~ pi(.|s')
    L_Q     = E[ sum_j (y - Q_j(s, a))^2 ]
    L_pi    = E[ -min_j Q_j(s, a_1) + alpha MMD(s) ],  a_1 = tanh(u_1), differentiable
    L_alpha = E[ -alpha (MMD(s) - threshold) ]
    MMD^2   = mean_ij k(u_i, u_j) - 2 mean_ij k(u_i, v_j) + mean_ij k(v_i, v_j),
              u_i ~ pi(.|s), v_i = decoder(s, z_i), z_i = clip(noise_i, -c, c)
    pi(s)   = argmax_{a_i} Q_1(s, a_i),  a_i ~ pi(.|s)

with mean, std = encoder(s, a) and a --kernel k(x, y) = exp(-|x - y| / (2 bandwidth)), where |.| sums absolute
differences (laplacian) or squared ones (gaussian). Q enters L_pi after --warm-start updates: until then the actor
learns to act as the VAE does.

Paper: Kumar, Fu, Tucker, Levine, "Stabilizing Off-Policy Q-Learning via Bootstrapping Error Reduction", 2019,
arXiv 1906.00949.
Differences from the authors' later code (d4rl_evaluations, tuned for D4RL): the noise of the policy's candidates a_i is
drawn once, at the start, so that it is a function of s, and the first of them is tanh(mean); they draw all anew at each
step. One optimiser step trains everything, each loss seeing the others as they were before it. Layers start as
PyTorch's do, and target critics as copies; theirs as rlkit's, targets with weights of their own. The VAE is smaller,
the warm start shorter, observations are normalised. Their first code differs from the later one: a target actor in y, Q
averaged over all samples in L_pi, noise of the actor's samples clipped to 0.5 there (--noise-clip), 10 candidates,
rates of 1e-3, larger networks.

Run: python algorithms/bear.py --dataset-id anchorl/pendulum/mixed-v0
"""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (authors' code)
    kernel: Literal["laplacian", "gaussian"] = "laplacian"  # of the MMD (authors' readme; gaussian for halfcheetah)
    bandwidth: float = 20.0  # sigma of the kernel (authors' readme)
    num_samples: int = 4  # actions drawn per state of each policy: few compare supports, many densities (authors' code)
    threshold: float = 0.05  # largest mean MMD (paper)
    log_alpha_max: float = 10.0  # largest logarithm of alpha: 4.6 makes 100 the highest price (authors' code)
    warm_start: int = 2_000  # updates of the MMD alone, before Q counts (authors' code: 40,000, in longer training)
    num_target_actions: int = 10  # actions sampled at s' for the target (authors' code)
    num_acting_actions: int = 100
    """candidates among which the policy takes the best, the first tanh(mean): 1 is the mean alone (authors' code)"""
    noise_clip: float = math.inf  # largest noise of the actor's samples (authors' code: none; in their first 0.5)
    q_mix: float = 0.75  # weight of the lower twin in the target, 1 - that of the higher (authors' code, from BCQ)
    latent_clip: float = 0.5
    """c, the largest latent that is sampled: the smaller, the more typical of the data the actions (authors' code)"""
    kl_weight: float = 0.5  # k, the weight of the KL term in L_VAE (authors' code)
    tau: float = 0.005  # rate at which the target networks follow (authors' code)
    actor_learning_rate: float = 1e-4  # of Adam (authors' code)
    critic_learning_rate: float = 3e-4  # of Adam (authors' code)
    vae_learning_rate: float = 3e-4  # of Adam (authors' code)
    alpha_learning_rate: float = 1e-3  # of Adam, for the logarithm of alpha (authors' code)
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of actor and critics (authors' code)
    vae_hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of encoder and decoder (authors' code: 750 750)


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
    """v = decoder(s, z): the action, before tanh, that the latent z stands for at s."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        latent_dim = 2 * action_dim  # the authors' choice
        self.net = nn.Sequential(*mlp(observation_dim + latent_dim, args.vae_hidden_dims, action_dim))

    def forward(self, observations: Tensor, latents: Tensor) -> Tensor:
        return self.net(join(observations, latents))  # [..., batch, action_dim]


class SquashedGaussian(nn.Module):
    """pi(a | s): a = tanh(u), u ~ Normal(mean(s), std(s))."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        *hidden, mean = mlp(observation_dim, args.hidden_dims, action_dim)
        self.trunk, self.mean = nn.Sequential(*hidden), mean
        self.log_std = nn.Linear(args.hidden_dims[-1], action_dim)  # a second head on the last hidden layer

    def forward(self, observations: Tensor, noise: Tensor) -> Tensor:
        """u = mean + std noise: [samples, batch, action_dim], of a standard normal `noise` of this shape."""
        hidden = self.trunk(observations)
        return self.mean(hidden) + self.log_std(hidden).clamp(-5, 2).exp() * noise  # the authors' range


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
    """pi(s) = argmax_{a_i} Q_1(s, a_i): a deterministic policy, since the noise of the candidates a_i is fixed."""

    noise: Tensor

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.policy = SquashedGaussian(observation_dim, action_dim, args)
        self.critic = Critic(observation_dim, action_dim, args)
        noise = torch.randn(args.num_acting_actions, 1, action_dim)  # [candidates, 1, action_dim]
        noise[0] = 0  # tanh(mean) is the first
        self.register_buffer("noise", noise)

    def forward(self, observations: Tensor) -> Tensor:
        """The action: [batch, action_dim] in [-1, 1]."""
        candidates = self.policy(observations, self.noise).tanh()  # [candidates, batch, action_dim]
        q = self.critic(observations, candidates, twins=1)[0]  # [candidates, batch], Q_1 alone
        best = q.argmax(dim=0)[None, :, None].expand(-1, -1, candidates.shape[-1])  # [1, batch, action_dim]
        return candidates.gather(0, best)[0]


class Coefficient(nn.Module):
    """A positive number that is learned through its logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        return self.log.exp()


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor  # policy and critic: acting needs both
    encoder: Encoder
    decoder: Decoder
    target_critic: Critic
    alpha: Coefficient
    optimizer: Any


def build(
    observation_dim: int,
    action_dim: int,
    args: HyperParameters,
    device: torch.device | str = "cpu",
    adam: Any = torch.optim.Adam,
) -> Learner:
    """Fresh networks and their optimiser: one Adam with a parameter group per network, the policy's first."""
    actor = Actor(observation_dim, action_dim, args).to(device)
    encoder = Encoder(observation_dim, action_dim, args).to(device)
    decoder = Decoder(observation_dim, action_dim, args).to(device)
    alpha = Coefficient().to(device)
    groups = [
        {"params": actor.policy.parameters(), "lr": args.actor_learning_rate},
        {"params": actor.critic.parameters(), "lr": args.critic_learning_rate},
        {"params": [*encoder.parameters(), *decoder.parameters()], "lr": args.vae_learning_rate},
        {"params": alpha.parameters(), "lr": args.alpha_learning_rate},
    ]
    target_critic = copy.deepcopy(actor.critic).requires_grad_(False)
    return Learner(actor, encoder, decoder, target_critic, alpha, adam(groups))


# --- Losses ---------------------------------------------------------------------------------------------------------


def kernel_mean(x: Tensor, y: Tensor, args: HyperParameters) -> Tensor:
    """mean_ij k(x_i, y_j) of samples [n, batch, action_dim] each: [batch]."""
    difference = x.unsqueeze(0) - y.unsqueeze(1)  # [n, n, batch, action_dim]
    distance = difference.abs() if args.kernel == "laplacian" else difference.square()
    return (-distance.sum(dim=-1) / (2 * args.bandwidth)).exp().mean(dim=(0, 1))


def mmd(x: Tensor, y: Tensor, args: HyperParameters) -> Tensor:
    """The maximum mean discrepancy of samples [n, batch, action_dim] of two policies: [batch]."""
    squared = kernel_mean(x, x, args) - 2 * kernel_mean(x, y, args) + kernel_mean(y, y, args)
    return (squared + 1e-6).sqrt()  # the square root has no slope at 0


def vae_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_VAE = E[ (tanh(decoder(s, mean + std noise)) - a)^2 ] + k KL(Normal(mean, std) || Normal(0, 1))

    The square is averaged over the action's dimensions, KL over the latent's; both over the batch, as the authors do.
    `noise` [batch, latent_dim] is standard normal.
    """
    mean, log_std = learner.encoder(batch.observations, batch.actions)
    std = log_std.exp()
    decoded = learner.decoder(batch.observations, mean + std * noise).tanh()
    reconstruction = (decoded - batch.actions).square().mean()
    kl = (0.5 * (mean.square() + std.square() - 1) - log_std).mean()
    loss = reconstruction + args.kl_weight * kl
    return loss, {"vae/loss": loss.detach(), "vae/reconstruction": reconstruction.detach(), "vae/kl": kl.detach()}


def critic_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_Q = E[ sum_j (y - Q_j(s, a))^2 ]
    y = r + gamma (1 - termination) max_i [ mix min_j Q'_j(s', a'_i) + (1 - mix) max_j Q'_j(s', a'_i) ]

    `noise` [num_target_actions, batch, action_dim] is standard normal.
    """
    with torch.no_grad():
        next_actions = learner.actor.policy(batch.next_observations, noise).tanh()  # [samples, batch, action_dim]
        lower, higher = learner.target_critic(batch.next_observations, next_actions).aminmax(dim=0)  # over the twins
        next_q = (args.q_mix * lower + (1 - args.q_mix) * higher).amax(dim=0)  # [batch], of the best sample
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_q  # a truncation bootstraps
    q = learner.actor.critic(batch.observations, batch.actions)  # [2, batch]
    loss = (target - q).square().mean(dim=1).sum()  # the mean over the batch, the sum over the twins
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


def actor_loss(
    learner: Learner, batch: Batch, latents: Tensor, noise: Tensor, warm: bool, args: HyperParameters
) -> tuple[Tensor, Metrics]:
    """L_pi + L_alpha = E[ -min_j Q_j(s, a_1) + alpha MMD(s) ] + E[ -alpha (MMD(s) - threshold) ]

    The first reaches the policy alone, the second alpha; without Q while the start is `warm`. `latents` [num_samples,
    batch, latent_dim] and `noise` [num_samples, batch, action_dim] are standard normal.
    """
    with torch.no_grad():
        v = learner.decoder(batch.observations, latents.clamp(-args.latent_clip, args.latent_clip))
    # before tanh, which would hide differences near its ends: [num_samples, batch, action_dim]
    u = learner.actor.policy(batch.observations, noise.clamp(-args.noise_clip, args.noise_clip))
    divergence, alpha = mmd(u, v, args).mean(), learner.alpha()
    loss = alpha.detach() * divergence
    loss_alpha = -alpha * (divergence.detach() - args.threshold)  # alpha grows while the MMD is above the threshold
    metrics = {"actor/mmd": divergence.detach(), "actor/alpha": alpha.detach()}
    if not warm:
        # Q with its weights held constant: the gradient passes through Q to the actions and changes no weight of Q
        # itself. functional_call runs a network with the weights it is given in place of its own.
        critic = learner.actor.critic
        constants = {name: weight.detach() for name, weight in critic.named_parameters()}
        q = functional_call(critic, constants, (batch.observations, u[0].tanh())).amin(dim=0)  # [batch]
        loss = loss - q.mean()
        metrics["actor/q"] = q.detach().mean()
    return loss + loss_alpha, {"actor/loss": loss.detach()} | metrics


# --- Update ---------------------------------------------------------------------------------------------------------


def total_loss(
    learner: Learner, batch: Batch, latents: Tensor, noise: Tensor, warm: bool, args: HyperParameters
) -> tuple[Tensor, Metrics]:
    """L_VAE + L_Q + L_pi + L_alpha. Each reaches its own networks only, so one backward pass serves all."""
    loss_vae, metrics_vae = vae_loss(learner, batch, latents[0], args)
    loss_pi, metrics_pi = actor_loss(learner, batch, latents[1:], noise[: args.num_samples], warm, args)
    loss_q, metrics_q = critic_loss(learner, batch, noise[args.num_samples :], args)
    return loss_vae + loss_q + loss_pi, metrics_vae | metrics_q | metrics_pi


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of the networks and alpha, then the target follows. `step` counts from 1."""
    actor, _, _, target_critic, alpha, optimizer = learner
    batch_size, action_dim = batch.actions.shape
    latents = torch.randn((1 + args.num_samples, batch_size, 2 * action_dim), device=batch.actions.device)
    shape = args.num_samples + args.num_target_actions, batch_size, action_dim
    noise = torch.randn(shape, device=batch.actions.device)
    loss, metrics = total_loss(learner, batch, latents, noise, step <= args.warm_start, args)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

    with torch.no_grad():
        alpha.log.clamp_(-5, args.log_alpha_max)  # the authors' range
        # target <- target + tau (network - target)
        torch._foreach_lerp_(list(target_critic.parameters()), list(actor.critic.parameters()), args.tau)
    return metrics


# === The copy line: what is above needs PyTorch alone; below are command line, data, run folder and evaluation ========

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, check_argument, launch, warn
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
        check_argument(self, "bandwidth", self.bandwidth > 0, "must be positive")
        check_argument(self, "num_samples", self.num_samples >= 2, "must be at least 2")
        check_argument(self, "threshold", self.threshold >= 0, "must not be negative")
        check_argument(self, "log_alpha_max", self.log_alpha_max > -5, "must be more than -5, alpha's lowest logarithm")
        check_argument(self, "noise_clip", self.noise_clip > 0, "must be positive")
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
    if args.warm_start >= run.last_step:
        warn(f"--warm-start {args.warm_start}: the actor clones the data to the end of these {run.last_step} updates")
    for step in range(run.first_step, args.num_updates + 1):
        metrics = train(learner, Batch(*buffer.sample(args.batch_size)), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
