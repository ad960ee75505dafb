"""RL with prior data (RLPD): an agent that acts in the environment from the start, with half of each batch data.

Nothing is learned before it plays. It is SAC with three changes that let the data help: every batch is half of the data
and half of its own steps, layer norms keep the critics from growing beyond what they have seen, and many gradient steps
follow each step in the environment, for which there is an ensemble of critics: a few, drawn anew for every batch, give
the target, and all of them teach the actor. With M of the N target critics Q' in `drawn`:

    y    = r + gamma (1 - termination) (min_{i in drawn} Q'_i(s', a') - temperature log pi(a'|s')),  a' ~ pi(.|s')
    L_Q  = E[ sum_i (y - Q_i(s, a))^2 ]
    L_pi = E[ temperature log pi(a_pi | s) - mean_i Q_i(s, a_pi) ],  a_pi ~ pi(.|s), differentiable
    L_temperature = E[ -temperature (log pi(a_pi | s) + target entropy) ]

--num-updates counts the critics' gradient steps. A step in the environment comes before every --updates-per-step of
them, one of actor and temperature after them.

Paper: Ball, Smith, Kostrikov, Levine, "Efficient Online Reinforcement Learning with Offline Data", 2023,
arXiv 2302.02948 (algorithm 1); SAC is arXiv 1812.05905.
Differences: the authors' L_Q is the mean over the critics, which Adam turns into the same steps. Observations are
normalised, which the authors do not do. The log standard deviation of the action before tanh is at least -5, as in
CQL's code; theirs -20. Layers start as PyTorch's do (uniform within 1 / sqrt(inputs)); the authors' start as Glorot's,
with biases of 0, and their layer norms add 1e-6 to the variance, these 1e-5. The authors take one critic for the target
in AntMaze (--num-target-critics 1), and no entropy in AntMaze and Adroit (--no-entropy-in-backup). Their dropout,
weight decay and residual critics, off in their commands, are not here.

Run: python algorithms/rlpd.py --dataset-id anchorl/pendulum/mixed-v0
"""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import layer_norm

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (authors' code)
    num_critics: int = 10  # N (authors' code)
    num_target_critics: int = 2  # M, critics drawn for the target (authors' code: 2; 1 in antmaze)
    updates_per_step: int = 20
    """critic updates per step in the environment, and per update of actor and temperature (authors' code)"""
    entropy_in_backup: bool = True  # the target has SAC's entropy term (authors' code: in locomotion alone)
    target_entropy: float | None = None
    """the temperature holds the policy's entropy to it; default: -action_dim / 2 (authors' code)"""
    tau: float = 0.005  # rate at which the target critics follow the critics (authors' code)
    actor_learning_rate: float = 3e-4  # of Adam, for the actor and the temperature (authors' code)
    critic_learning_rate: float = 3e-4  # of Adam (authors' code)
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of every network (authors' code; 3 in antmaze, Adroit)


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


class EnsembleLayerNorm(nn.Module):
    """Layer norms side by side: each row of [members, batch, width] to mean 0, variance 1, then scaled and shifted."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(members, 1, width))
        self.bias = nn.Parameter(torch.zeros(members, 1, width))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.addcmul(self.bias, layer_norm(inputs, inputs.shape[-1:]), self.weight)


class Critic(nn.Module):
    """Q_1(s, a) to Q_N(s, a): an ensemble, trained on the same target from different initial weights."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        widths = [observation_dim + action_dim, *args.hidden_dims, 1]
        self.layers = nn.ModuleList(EnsembleLinear(args.num_critics, *pair) for pair in pairwise(widths))
        self.norms = nn.ModuleList(EnsembleLayerNorm(args.num_critics, width) for width in args.hidden_dims)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """[members, batch], of all members or of those whose weights stand in their place."""
        first: Any = self.layers[0]
        x = torch.cat([observations, actions], dim=-1).expand(len(first.weight), -1, -1)
        for layer, norm in zip(self.layers[:-1], self.norms, strict=True):
            x = torch.relu_(norm(layer(x)))
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


def critic_loss(
    learner: Learner, batch: Batch, noise: Tensor, drawn: Tensor, args: HyperParameters
) -> tuple[Tensor, Metrics]:
    """L_Q = E[ sum_i (y - Q_i(s, a))^2 ]
    y = r + gamma (1 - termination) (min_{i in drawn} Q'_i(s', a') - temperature log pi(a'|s'))

    `noise` [batch, action_dim] is standard normal; `drawn` [num_target_critics] are numbers of critics.
    """
    with torch.no_grad():
        next_actions, next_log_prob = learner.actor.sample(batch.next_observations, noise)
        # functional_call runs a network with the weights it is given in place of its own: here of the members drawn
        weights = {name: weight[drawn] for name, weight in learner.target_critic.named_parameters()}
        next_q = functional_call(learner.target_critic, weights, (batch.next_observations, next_actions))
        next_value = next_q.min(dim=0).values  # [batch]
        if args.entropy_in_backup:
            next_value = next_value - learner.actor.log_temperature.exp() * next_log_prob
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_value  # a truncation bootstraps
    q = learner.critic(batch.observations, batch.actions)  # [members, batch]
    loss = (target - q).square().mean(dim=1).sum()  # the mean over the batch, the sum over the members
    metrics = {
        "critic/loss": loss.detach(),
        "critic/q": q.detach().mean(),
        "critic/disagreement": q.detach().std(dim=0).mean(),
        "critic/target": target.mean(),
    }
    return loss, metrics


def actor_loss(
    critic: Critic, temperature: Tensor, observations: Tensor, actions: Tensor, log_prob: Tensor
) -> tuple[Tensor, Metrics]:
    """L_pi = E[ temperature log pi(a_pi | s) - mean_i Q_i(s, a_pi) ], `actions` a_pi differentiable in the actor"""
    # Q with its weights held constant: the gradient passes through Q to the actions and changes no weight of Q itself.
    constants = {name: weight.detach() for name, weight in critic.named_parameters()}
    q = functional_call(critic, constants, (observations, actions)).mean(dim=0)  # [batch]
    loss = (temperature.detach() * log_prob - q).mean()
    return loss, {"actor/loss": loss.detach(), "actor/q": q.detach().mean()}


def temperature_loss(temperature: Tensor, log_prob: Tensor, target_entropy: float) -> tuple[Tensor, Metrics]:
    """L_temperature = E[ -temperature (log pi(a_pi | s) + target entropy) ]: it grows while the entropy is too low."""
    entropy = -log_prob.detach().mean()
    loss = temperature * (entropy - target_entropy)
    return loss, {"actor/temperature": temperature.detach(), "actor/entropy": entropy}


# --- Update ---------------------------------------------------------------------------------------------------------


def policy_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_pi + L_temperature. Each reaches the weights of its own only, so one backward pass serves both."""
    temperature = learner.actor.log_temperature.exp()
    actions, log_prob = learner.actor.sample(batch.observations, noise)
    loss_pi, metrics_pi = actor_loss(learner.critic, temperature, batch.observations, actions, log_prob)
    target_entropy = -actions.shape[-1] / 2 if args.target_entropy is None else args.target_entropy
    loss_t, metrics_t = temperature_loss(temperature, log_prob, target_entropy)
    return loss_pi + loss_t, metrics_pi | metrics_t


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of the critics, which the target critics follow; every `updates_per_step`-th, also one of
    actor and temperature. `step` counts from 1.
    """
    noise = torch.randn(2, *batch.actions.shape, device=batch.actions.device)
    order = torch.rand(args.num_critics, device=batch.actions.device).argsort()
    loss, metrics = critic_loss(learner, batch, noise[0], order[: args.num_target_critics], args)
    loss.backward()
    learner.optimizer.step()  # the actor has no gradient, so Adam passes it over
    learner.optimizer.zero_grad()

    with torch.no_grad():  # Q' <- Q' + tau (Q - Q')
        torch._foreach_lerp_(list(learner.target_critic.parameters()), list(learner.critic.parameters()), args.tau)

    if step % args.updates_per_step == 0:
        loss, metrics_pi = policy_loss(learner, batch, noise[1], args)
        loss.backward()
        learner.optimizer.step()
        learner.optimizer.zero_grad()
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
    random_steps: int = 1_000  # uniformly random steps to begin with (authors' code: 5,000)
    data_ratio: float = 0.5  # share of a batch that is data; the rest are the policy's steps (authors' code)
    reward_scale: float | Literal["return-range"] = 1.0  # multiplies rewards; return-range: their returns span 1,000
    reward_shift: float = 0.0  # added to rewards first (authors' code: -1 in antmaze)
    normalize_observations: bool = True  # by the mean and standard deviation of the data

    def validate(self) -> None:
        super().validate()
        check_argument(self, "num_critics", self.num_critics >= 2, "must be at least 2")
        enough = self.num_target_critics <= self.num_critics
        check_argument(self, "num_target_critics", enough, f"must be at most --num-critics {self.num_critics}")
        check_argument(self, "data_ratio", 0 <= self.data_ratio <= 1, "must be in [0, 1]")
        both = 0 < round(self.data_ratio * self.batch_size) < self.batch_size or self.data_ratio in (0, 1)
        check_argument(self, "data_ratio", both, f"a batch of {self.batch_size} has no room for both")


def draw_both(buffer: ReplayBuffer, batch_size: int, data_ratio: float) -> Tensor:
    """Rows [batch]: that share of them the data's, the others of what was played; each uniformly, with replacement."""
    ends, from_data = [0, buffer.num_loaded, len(buffer.storage)], round(data_ratio * batch_size)
    sizes = from_data, batch_size - from_data
    device = buffer.storage.device
    rows = [torch.randint(*pair, (size,), device=device) for pair, size in zip(pairwise(ends), sizes, strict=True)]
    return torch.cat(rows)


def main(args: Args) -> None:
    device = set_up(args)
    dataset = hold_out(load_dataset(args.dataset_id, args.env_id), args)
    room = args.random_steps + math.ceil(args.num_updates / args.updates_per_step)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations, room)
    buffer.scale_rewards(args.reward_scale, args.reward_shift)

    learner = build(buffer.observation_dim, buffer.action_dim, args, device, Adam)
    train = compiled(update, learner, args)
    player = Player(make_environments(dataset, 1)[0], buffer, args.seed)
    run = Run(args, buffer, learner, update, player=player)  # makes the run folder, or goes back to its checkpoint

    def at_random(observations: Tensor) -> Tensor:
        return torch.rand(1, buffer.action_dim, device=device) * 2 - 1

    def explore(observations: Tensor) -> Tensor:
        return learner.actor.sample(observations, torch.randn(1, buffer.action_dim, device=device))[0]

    while len(buffer.storage) < buffer.num_loaded + args.random_steps:
        buffer.add(player.step(run.policy(player.observation[None], at_random)[0]))
    for step in range(run.first_step, args.num_updates + 1):
        if (step - 1) % args.updates_per_step == 0:
            buffer.add(player.step(run.policy(player.observation[None], explore)[0]))
        rows = draw_both(buffer, args.batch_size, args.data_ratio)
        metrics = train(learner, Batch(*buffer.take(rows)), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
