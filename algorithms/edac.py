"""Ensemble-diversified actor-critic (EDAC): many critics, of which the lowest is believed.

The agent is SAC, but with N critics instead of two. They agree at the data's actions, on which all of them were
trained, and differ elsewhere, more so the further away: the lowest of them doubts what is not in the data. Critics
whose slopes point the same way at the data agree beyond it, too. So a second term of their loss turns the slopes apart.
With Q' the target critics and g_i = dQ_i(s, a)/da / |dQ_i(s, a)/da| at the data's action:

    y    = r + gamma (1 - termination) (min_i Q'_i(s', a') - temperature log pi(a'|s')),  a' ~ pi(.|s')
    L_Q  = E[ sum_i (y - Q_i(s, a))^2 ] + eta E[ sum_{i != j} g_i . g_j ] / (N - 1)
    L_pi = E[ temperature log pi(a_pi | s) - min_i Q_i(s, a_pi) ],  a_pi ~ pi(.|s), differentiable
    L_temperature = E[ -temperature (log pi(a_pi | s) + target entropy) ]

--eta 0 is the paper's SAC-N, whose critics are diverse by their initial weights alone: it needs more of them. Where
actions have one dimension, as in the built-in data, slopes have no angle that could turn: there EDAC is SAC-N.

Paper: An, Moon, Kim, Song, "Uncertainty-Based Offline Reinforcement Learning with Diversified Q-Ensemble", 2021,
arXiv 2110.01548; SAC is arXiv 1812.05905.
Differences: the temperature's loss is SAC's (the authors': of its logarithm). Observations are normalised. Layers start
as PyTorch's do (uniform within 1 / sqrt(inputs)), and target critics as copies; the authors' biases start at 0.1, their
last layers within 0.003 (critics) and 0.001 (actor), the actor's first within 1 / sqrt(outputs), and target critics
with weights of their own. As in the authors' code each loss sees the others as they were before the step.

Run: python algorithms/edac.py --dataset-id anchorl/pendulum/mixed-v0
"""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import normalize

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (authors' code)
    num_critics: int = 10  # N (authors' code: 10; paper: 50 for Hopper, and SAC-N takes up to 500)
    eta: float = 1.0
    """weight of the diversity; 0 is SAC-N (paper: mostly 1 in Gym; in Adroit, rewards standardised, 10 to 1000)"""
    target_entropy: float | None = None  # the temperature holds the policy's entropy to it; default: -action_dim (SAC)
    tau: float = 0.005  # rate at which the target critics follow the critics (authors' code)
    actor_learning_rate: float = 3e-4  # of Adam, for the actor and the temperature (authors' code)
    critic_learning_rate: float = 3e-4  # of Adam (authors' code)
    hidden_dims: tuple[int, ...] = (256, 256, 256)  # hidden layers of every network (authors' code)


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
    """Q_1(s, a) to Q_N(s, a): an ensemble, trained on the same target from different initial weights."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.members = args.num_critics
        widths = [observation_dim + action_dim, *args.hidden_dims, 1]
        self.layers = nn.ModuleList(EnsembleLinear(self.members, *pair) for pair in pairwise(widths))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Observations [batch, observation_dim]; actions [batch, action_dim], or [members, batch, action_dim] if each
        member has its own: values [members, batch].
        """
        x = torch.cat([observations.expand(*actions.shape[:-1], -1), actions], dim=-1).expand(self.members, -1, -1)
        for layer in self.layers[:-1]:
            x = torch.relu_(layer(x))
        return self.layers[-1](x).squeeze(-1)


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


def diversity(q: Tensor, actions: Tensor) -> Tensor:
    """E[ sum_{i != j} g_i . g_j ] / (N - 1),  g_i = dQ_i(s, a)/da / |dQ_i(s, a)/da|

    `q` [members, batch] is of `actions` [members, batch, action_dim], which need a gradient. The result is N times the
    average cosine of two slopes: N where all of them point the same way, -N / (N - 1) at its least.
    """
    (slopes,) = torch.autograd.grad(q.sum(), actions, create_graph=True)  # differentiable in the weights
    g = normalize(slopes, dim=-1)  # [members, batch, action_dim]
    # |sum_i g_i|^2 has every pair twice and every g_i with itself: N rows instead of N^2 products
    pairs = g.sum(dim=0).square().sum(dim=-1) - g.square().sum(dim=(0, -1))  # [batch]
    return pairs.mean() / (len(q) - 1)


def critic_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_Q = E[ sum_i (y - Q_i(s, a))^2 ] + eta diversity,
    y = r + gamma (1 - termination) (min_i Q'_i(s', a') - temperature log pi(a'|s'))

    `noise` [batch, action_dim] is standard normal.
    """
    with torch.no_grad():
        next_actions, next_log_prob = learner.actor.sample(batch.next_observations, noise)
        next_q = learner.target_critic(batch.next_observations, next_actions).min(dim=0).values  # [batch], of all N
        next_value = next_q - learner.actor.log_temperature.exp() * next_log_prob
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_value  # a truncation bootstraps
    diverse = args.eta > 0 and batch.actions.shape[-1] > 1  # of one dimension, g_i is 1 or -1 and has no gradient
    actions = batch.actions.expand(args.num_critics, -1, -1).clone().requires_grad_(diverse)  # a copy for each member
    q = learner.critic(batch.observations, actions)  # [members, batch]
    loss = (target - q).square().mean(dim=1).sum()  # the mean over the batch, the sum over the members
    metrics = {
        "critic/q": q.detach().mean(),
        "critic/disagreement": q.detach().std(dim=0).mean(),
        "critic/target": target.mean(),
    }
    if diverse:
        similarity = diversity(q, actions)
        loss = loss + args.eta * similarity
        metrics["critic/diversity"] = similarity.detach()
    return loss, metrics | {"critic/loss": loss.detach()}


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
        check_argument(self, "num_critics", self.num_critics >= 2, "must be at least 2")
        check_argument(self, "eta", self.eta >= 0, "must not be negative")


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
