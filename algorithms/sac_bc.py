"""SAC+BC: soft actor-critic whose actor also pays for making the data's actions unlikely.

TD3+BC is one member of a family, AC+BC: take any actor-critic, leave its critic as it is, and add imitation to its
actor's loss. Imitation is -log pi(a | s), the forward KL from the data to pi; where pi is a normal distribution of
fixed width, that is TD3+BC's squared error. Here the actor-critic is SAC, without entropy in the target. As in TD3+BC,
its actor's loss is divided by the mean magnitude of Q, so that one alpha fits every scale of rewards. With Q' the
target critic and `temperature` SAC's entropy coefficient:

    y    = r + gamma (1 - termination) min_i Q'_i(s', a'),  a' ~ pi(.|s')
    L_Q  = E[ sum_i (y - Q_i(s, a))^2 ]
    L_pi = E[ lambda (temperature log pi(a_pi | s) - min_i Q_i(s, a_pi)) - alpha log pi(a | s) ],
           lambda = 1 / E|min_i Q_i(s, a_pi)|,  a_pi ~ pi(.|s), differentiable
    L_temperature = E[ -temperature (log pi(a_pi | s) + target entropy) ]

alpha weighs imitation: at 0 this is SAC on fixed data, but for lambda and the target. TD3+BC's alpha weighs Q instead.
A larger alpha learns faster and ends lower: on the built-in data 0.01, 0.1, 1 and 10 score 102.4, 100.1, 95.6 and 94.1
after 4,000 updates, but 60, 74, 91 and 92 on average over the evaluations after 1,000, 2,000, 3,000 and 4,000 (three
seeds).

Paper: SAC is Haarnoja and others, 2018, arXiv 1812.05905; its sum with imitation follows Fujimoto, Gu, "A Minimalist
Approach to Offline Reinforcement Learning", 2021, arXiv 2106.06860.
Differences from SAC are those of sac.py: no factor 1/2, PyTorch's initial weights, a log standard deviation of at least
-5, and one optimiser step that trains everything, each loss seeing the others as they were before it. The target lacks
SAC's -temperature log pi(a'|s'), as it does in CQL's code. With it, a run on halfcheetah saw a temperature of 186,000:
imitation held the entropy below its target, so the temperature rose; Q fell with it, to -6,700,000, and lambda = 1 /
E|Q| took back what the actor paid, without end. Observations are normalised, as in TD3+BC. The log density of a tanh
policy is not finite at the bounds of the actions: actions of the data there are moved 1e-3 inside them.

Run: python algorithms/sac_bc.py --dataset-id anchorl/pendulum/mixed-v0
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
    gamma: float = 0.99  # discount (SAC)
    alpha: float = 0.1  # weight of imitation against Q in L_pi: 0 is SAC on fixed data (tried here)
    target_entropy: float | None = None  # the temperature holds the policy's entropy to it; default: -action_dim (SAC)
    tau: float = 0.005  # rate at which the target critic follows the critic (SAC)
    actor_learning_rate: float = 3e-4  # of Adam, for the actor and the temperature (SAC)
    critic_learning_rate: float = 3e-4  # of Adam (SAC)
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of every network (SAC)


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


def critic_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_Q = E[ sum_i (y - Q_i(s, a))^2 ],  y = r + gamma (1 - termination) min_i Q'_i(s', a')

    `noise` [batch, action_dim] is standard normal.
    """
    with torch.no_grad():
        next_actions, _ = learner.actor.sample(batch.next_observations, noise)
        next_q = learner.target_critic(batch.next_observations, next_actions).min(dim=0).values  # [batch]
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_q  # a truncation bootstraps
    q = learner.critic(batch.observations, batch.actions)  # [2, batch]
    loss = (target - q).square().mean(dim=1).sum()  # the mean over the batch, the sum over the twins
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


def imitation_loss(mean: Tensor, std: Tensor, actions: Tensor) -> tuple[Tensor, Metrics]:
    """E[ -log pi(a | s) ] of the data's `actions` [batch, action_dim], given mean and std of pi(.|s) before tanh."""
    u = actions.clamp(-1 + 1e-3, 1 - 1e-3).atanh()  # tanh reaches no bound
    loss = -squashed_log_prob((u - mean) / std, std, u).mean()
    return loss, {"actor/imitation": loss.detach()}


def actor_loss(
    critic: Critic, temperature: Tensor, observations: Tensor, actions: Tensor, log_prob: Tensor
) -> tuple[Tensor, Metrics]:
    """E[ lambda (temperature log pi(a_pi | s) - min_i Q_i(s, a_pi)) ],  lambda = 1 / E|min_i Q_i(s, a_pi)|

    `actions` a_pi and their `log_prob` are differentiable in the actor.
    """
    # Q with its weights held constant: the gradient passes through Q to the actions and changes no weight of Q itself.
    # functional_call runs a network with the weights it is given in place of its own.
    constants = {name: weight.detach() for name, weight in critic.named_parameters()}
    q = functional_call(critic, constants, (observations, actions)).min(dim=0).values  # [batch]
    lambda_ = 1 / q.detach().abs().mean()  # a constant of the loss: no gradient
    loss = lambda_ * (temperature.detach() * log_prob - q).mean()
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
    mean, std = learner.actor.distribution(batch.observations)  # once, for Q and for imitation
    u = mean + std * noise[1]
    actions, log_prob = u.tanh(), squashed_log_prob(noise[1], std, u)
    loss_ac, metrics_ac = actor_loss(learner.critic, temperature, batch.observations, actions, log_prob)
    loss_bc, metrics_bc = imitation_loss(mean, std, batch.actions)
    loss_pi = loss_ac + args.alpha * loss_bc  # AC+BC
    target_entropy = -actions.shape[-1] if args.target_entropy is None else args.target_entropy
    loss_t, metrics_t = temperature_loss(temperature, log_prob, target_entropy)
    return loss_q + loss_pi + loss_t, metrics_q | metrics_ac | metrics_bc | metrics_t


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
        check_argument(self, "alpha", self.alpha >= 0, "must not be negative")


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
