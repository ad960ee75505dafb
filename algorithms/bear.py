"""Bootstrapping error accumulation reduction (BEAR): any policy whose actions the data might have held.

A second policy, b, is fitted to the data. The actor maximises Q while its samples could be samples of b: a price alpha
holds their maximum mean discrepancy (MMD) below a threshold, by rising while it is above. A few samples tell where two
policies act better than how often. So the actor is free to choose among what the data did. With Q' and pi' the target
networks, samples u before tanh and u_b those of b:

    L_b     = E[ -log b(a | s) ]
    y       = r + gamma (1 - termination) max_i [ mix min_j Q'_j(s', a'_i) + (1 - mix) max_j Q'_j(s', a'_i) ],
              a'_i ~ pi'(.|s')
    L_Q     = E[ sum_j (y - Q_j(s, a))^2 ]
    L_pi    = E[ -min_j mean_i Q_j(s, a_i) + alpha D(s) ],  a_i ~ pi(.|s), differentiable
    L_alpha = E[ -alpha (D(s) - threshold) ]

--divergence chooses D. With n samples each and a --kernel k(x, y) = exp(-|x - y| / (2 bandwidth)), where |.| sums
absolute differences (laplacian) or squared ones (gaussian):

    mmd  MMD(s)^2 = mean_ij k(u_i, u_j) - 2 mean_ij k(u_i, u_bj) + mean_ij k(u_bi, u_bj)
    kl   KL(pi(.|s) || b(.|s)), BRAC's default: two normal distributions have it in closed form, and tanh keeps it

Paper: Kumar, Fu, Tucker, Levine, "Stabilizing Off-Policy Q-Learning via Bootstrapping Error Reduction", 2019,
arXiv 1906.00949; BRAC is Wu, Tucker, Nachum, "Behavior Regularized Offline Reinforcement Learning", 2019,
arXiv 1911.11361.
Differences from the authors' code (BEAR, not the later one in d4rl_evaluations): b is a squashed Gaussian like the
actor, as in BRAC, where theirs is a VAE; the actor maximises Q from the start. Their MMD compares samples that are
clipped to half a standard deviation; ours does not clip. Samples of two equal policies then have an MMD of 0.04 to 0.3,
which grows with their width and with the dimensions of actions; the threshold must lie above it. Acting takes tanh of
the mean, where theirs takes the best of 10 samples by Q_1. One optimiser step trains everything, each loss seeing the
others as they were before it. Of BRAC this is the actor's penalty with an adaptive weight; its authors also subtract
alpha D in the target (BRAC-v), and keep alpha fixed by default. Networks are smaller, the batch larger, observations
normalised.

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
from torch.nn.functional import softplus

Metrics = dict[str, Tensor]

THRESHOLDS = {"mmd": 0.2, "kl": 2.0}  # where none is given


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (authors' code)
    divergence: Literal["mmd", "kl"] = "mmd"  # D, what holds the policy to the data's: BEAR's or BRAC's
    kernel: Literal["laplacian", "gaussian"] = "laplacian"  # of the MMD (paper: either)
    bandwidth: float = 20.0  # sigma of the kernel (authors' code: 10 or 20)
    num_samples: int = 10
    """n, actions drawn per state of each policy: few compare supports, many densities (authors' code; its readme: 5)"""
    threshold: float | None = None
    """largest mean of D; default: 0.2 for mmd (authors: 0.05, of samples they clip), 2 for kl (both tried here)"""
    num_target_actions: int = 10  # actions sampled at s' for the target (authors' code)
    q_mix: float = 0.75  # weight of the lower twin in the target, 1 - that of the higher (authors' code, from BCQ)
    tau: float = 0.005  # rate at which the target networks follow (authors' code)
    actor_learning_rate: float = 1e-3  # of Adam (authors' code)
    critic_learning_rate: float = 1e-3  # of Adam (authors' code)
    behaviour_learning_rate: float = 1e-3  # of Adam, for b (authors' code, of the VAE)
    alpha_learning_rate: float = 1e-3  # of Adam, for the logarithm of alpha (authors' code)
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of every network (authors' code: 400 300)


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


def squashed_log_prob(noise: Tensor, std: Tensor, u: Tensor) -> Tensor:
    """log pi(a | s) of a = tanh(u), where u = mean + std noise: [..., action_dim] -> [...].

    log pi = sum_j log Normal(u_j) - log(1 - tanh(u_j)^2), and log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u)): this
    stays finite where tanh(u) is rounded to 1.
    """
    log_normal = -(0.5 * noise.square() + std.log() + 0.5 * math.log(2 * math.pi))
    return (log_normal - 2 * (math.log(2) - u - softplus(-2 * u))).sum(dim=-1)


class Actor(nn.Module):
    """pi(a | s), or b(a | s): a = tanh(u), u ~ Normal(mean(s), std(s))."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        *hidden, mean = mlp(observation_dim, args.hidden_dims, action_dim)
        self.trunk, self.mean = nn.Sequential(*hidden), mean
        self.log_std = nn.Linear(args.hidden_dims[-1], action_dim)  # a second head on the last hidden layer

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

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """log pi(a | s), [batch], of actions of the data."""
        mean, std = self.distribution(observations)
        u = actions.clamp(-1 + 1e-3, 1 - 1e-3).atanh()  # clipped as in BRAC: tanh reaches no bound
        return squashed_log_prob((u - mean) / std, std, u)


class EnsembleLinear(nn.Module):
    """Linear layers side by side: one batched product, [members, batch, in] -> [members, batch, out]."""

    def __init__(self, members: int, input_dim: int, output_dim: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(input_dim)  # nn.Linear's own initialisation
        self.weight = nn.Parameter(torch.empty(members, input_dim, output_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, output_dim).uniform_(-bound, bound))

    def forward(self, inputs: Tensor) -> Tensor:
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


class Coefficient(nn.Module):
    """A positive number that is learned through its logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        return self.log.exp()


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor
    behaviour: Actor
    critic: Critic
    target_actor: Actor
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
    """Fresh networks and their optimiser: one Adam with a parameter group per network, the actor's first."""
    actor = Actor(observation_dim, action_dim, args).to(device)
    behaviour = Actor(observation_dim, action_dim, args).to(device)
    critic = Critic(observation_dim, action_dim, args).to(device)
    alpha = Coefficient().to(device)
    groups = [
        {"params": actor.parameters(), "lr": args.actor_learning_rate},
        {"params": critic.parameters(), "lr": args.critic_learning_rate},
        {"params": behaviour.parameters(), "lr": args.behaviour_learning_rate},
        {"params": alpha.parameters(), "lr": args.alpha_learning_rate},
    ]
    target_actor = copy.deepcopy(actor).requires_grad_(False)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    return Learner(actor, behaviour, critic, target_actor, target_critic, alpha, adam(groups))


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


def kl(policy: tuple[Tensor, Tensor], behaviour: tuple[Tensor, Tensor]) -> Tensor:
    """KL(pi || b) of two squashed Gaussians by mean and std [batch, action_dim] each: [batch]. It is that of the
    Gaussians: a map that can be undone, such as tanh, changes both densities alike.
    """
    (mean, std), (mean_b, std_b) = policy, behaviour
    ratio, distance = std / std_b, (mean - mean_b) / std_b
    return (0.5 * (ratio.square() + distance.square() - 1) - ratio.log()).sum(dim=-1)


def behaviour_loss(behaviour: Actor, batch: Batch) -> tuple[Tensor, Metrics]:
    """L_b = E[ -log b(a | s) ]"""
    loss = -behaviour.log_prob(batch.observations, batch.actions).mean()
    return loss, {"behaviour/loss": loss.detach()}


def critic_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_Q = E[ sum_j (y - Q_j(s, a))^2 ]
    y = r + gamma (1 - termination) max_i [ mix min_j Q'_j(s', a'_i) + (1 - mix) max_j Q'_j(s', a'_i) ]

    `noise` [num_target_actions, batch, action_dim] is standard normal.
    """
    with torch.no_grad():
        next_actions, _ = learner.target_actor.sample(batch.next_observations, noise)  # [samples, batch, action_dim]
        lower, higher = learner.target_critic(batch.next_observations, next_actions).aminmax(dim=0)  # over the twins
        next_q = (args.q_mix * lower + (1 - args.q_mix) * higher).amax(dim=0)  # [batch], of the best sample
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_q  # a truncation bootstraps
    q = learner.critic(batch.observations, batch.actions)  # [2, batch]
    loss = (target - q).square().mean(dim=1).sum()  # the mean over the batch, the sum over the twins
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


def actor_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_pi + L_alpha = E[ -min_j mean_i Q_j(s, a_i) + alpha D(s) ] + E[ -alpha (D(s) - threshold) ]

    The first reaches the actor alone, the second alpha. `noise` [2, num_samples, batch, action_dim] is standard normal,
    for pi and for b.
    """
    mean, std = learner.actor.distribution(batch.observations)
    with torch.no_grad():
        mean_b, std_b = learner.behaviour.distribution(batch.observations)
    u = mean + std * noise[0]  # [num_samples, batch, action_dim], before tanh: it would hide differences near its ends
    if args.divergence == "mmd":
        divergence = mmd(u, mean_b + std_b * noise[1], args).mean()
    else:
        divergence = kl((mean, std), (mean_b, std_b)).mean()

    # Q with its weights held constant: the gradient passes through Q to the actions and changes no weight of Q itself.
    # functional_call runs a network with the weights it is given in place of its own.
    constants = {name: weight.detach() for name, weight in learner.critic.named_parameters()}
    q = functional_call(learner.critic, constants, (batch.observations, u.tanh()))  # [2, num_samples, batch]
    q = q.mean(dim=1).amin(dim=0)  # [batch]
    alpha, threshold = learner.alpha(), THRESHOLDS[args.divergence] if args.threshold is None else args.threshold
    loss = alpha.detach() * divergence - q.mean()
    loss_alpha = -alpha * (divergence.detach() - threshold)  # alpha grows while D is above the threshold
    return loss + loss_alpha, {
        "actor/loss": loss.detach(),
        "actor/q": q.detach().mean(),
        "actor/divergence": divergence.detach(),
        "actor/alpha": alpha.detach(),
        "actor/std": std.detach().mean(),
    }


# --- Update ---------------------------------------------------------------------------------------------------------


def total_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_b + L_Q + L_pi + L_alpha. Each reaches the weights of one network only, so one backward pass serves all."""
    loss_b, metrics_b = behaviour_loss(learner.behaviour, batch)
    loss_q, metrics_q = critic_loss(learner, batch, noise[: args.num_target_actions], args)
    samples = noise[args.num_target_actions :].unflatten(0, (2, args.num_samples))
    loss_pi, metrics_pi = actor_loss(learner, batch, samples, args)
    return loss_b + loss_q + loss_pi, metrics_b | metrics_q | metrics_pi


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of the three networks and alpha, then the targets follow. `step` counts from 1."""
    shape = args.num_target_actions + 2 * args.num_samples, *batch.actions.shape
    loss, metrics = total_loss(learner, batch, torch.randn(shape, device=batch.actions.device), args)
    loss.backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()

    with torch.no_grad():
        learner.alpha.log.clamp_(-5, 10)  # the authors' range
        # target <- target + tau (network - target)
        torch._foreach_lerp_(list(learner.target_actor.parameters()), list(learner.actor.parameters()), args.tau)
        torch._foreach_lerp_(list(learner.target_critic.parameters()), list(learner.critic.parameters()), args.tau)
    return metrics


# === The copy line: what is above needs PyTorch alone; below are command line, data, run folder and evaluation ========

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, check_argument, launch
from common.data import ReplayBuffer, load_dataset
from common.experiment import Run, set_up
from common.optim import Adam, compiled


@dataclass
class Args(HyperParameters, ExperimentArgs):
    normalize_observations: bool = True  # by the mean and standard deviation of the data

    def validate(self) -> None:
        super().validate()
        check_argument(self, "bandwidth", self.bandwidth > 0, "must be positive")
        check_argument(self, "num_samples", self.num_samples >= 2, "must be at least 2")
        threshold = THRESHOLDS[self.divergence] if self.threshold is None else self.threshold
        check_argument(self, "threshold", threshold >= 0, "must not be negative")
        check_argument(self, "q_mix", 0 <= self.q_mix <= 1, "must be in [0, 1]")


def main(args: Args) -> None:
    device = set_up(args)
    buffer = ReplayBuffer(load_dataset(args.dataset_id, args.env_id), device, args.normalize_observations)

    learner = build(buffer.observation_dim, buffer.action_dim, args, device, Adam)
    train = compiled(update, learner, args)
    run = Run(args, buffer, learner)  # makes the run folder or, with --resume, puts the learner back to its checkpoint
    for step in range(run.first_step, args.num_updates + 1):
        metrics = train(learner, Batch(*buffer.sample(args.batch_size)), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
