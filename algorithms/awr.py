"""Advantage-weighted regression (AWR): imitate the data's actions, the more the better things went after them.

There is no Q and no bootstrapping from actions. V is fitted to the returns R that followed each state in the data, and
the policy imitates the data's actions, each weighted by how much better than V(s) it turned out. With A = R - V(s):

    R_t  = r_t + gamma (1 - termination_t) ((1 - lambda) V'(s_{t+1}) + lambda R_{t+1})        (TD(lambda))
    L_V  = E[ A^2 ]                                                               (algorithm 1, line 5)
    L_pi = E[ -min(exp(A / beta), clip) log pi(a | s) ]                           (algorithm 1, line 6)

The last step of an episode has no R_{t+1}: where a time limit cut it, R = r + gamma V'(s'). Every --returns-every
updates the returns of all the data are computed anew, with V' the V of that moment. Rewards are multiplied by
1 - gamma, so that R and V are of the size of a reward; the authors normalise V in the same way.

Paper: Peng, Kumar, Zhang, Levine, "Advantage-Weighted Regression: Simple and Scalable Off-Policy Reinforcement
Learning", 2019, arXiv 1910.00177.
Differences: the data are given, where the paper adds episodes of its own as it learns. --online-steps adds steps, one
before each update, to data that stay; the authors play 2,048 steps, to an episode's end, before each 1,200 updates, and
keep the newest 50,000. Actions are stored clipped; theirs as they were drawn. What is played counts from the next
computation of the returns on, which cuts the episode that goes on. Observations stay normalised as the data are; the
authors' normaliser learns on, up to 300,000 steps. One optimiser step trains both networks; the authors take 200 steps
of V and then 1,000 of pi, each on returns computed anew. Each step computes A with its own V and standardises it over
the batch; their code does so once for all of the data. We have Adam, a mean action bounded by tanh and a learned
standard deviation; they have SGD with momentum, a penalty on the mean and a fixed one. Layers start as PyTorch's do;
the authors' start by Xavier's rule with biases of 0, and the mean's last layer near 0.

Run: python algorithms/awr.py --dataset-id anchorl/pendulum/mixed-v0
"""

import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (authors' code)
    td_lambda: float = 0.95
    """lambda of the returns: 1 sums the data's own rewards (Monte Carlo), 0 takes one reward and V (authors' code)"""
    beta: float = 1.0
    """temperature of the policy's weights: large is behaviour cloning. Its unit is the standard deviation of A
    (authors' code) or, with --no-standardize-advantage, 1 - gamma times the unit of the rewards"""
    standardize_advantage: bool = True
    """A to mean 0 and standard deviation 1, so that one beta fits every scale of rewards (authors' code)"""
    weight_clip: float = 20.0  # largest weight of a transition in L_pi (authors' code)
    actor_learning_rate: float = 3e-4  # usual for Adam (authors' code: SGD)
    value_learning_rate: float = 3e-4  # usual for Adam (authors' code: SGD)
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of every network (authors' code: 128, 64)


class Batch(NamedTuple):
    """States and actions of the data with their returns, in float32."""

    observations: Tensor  # [batch, observation_dim], normalised
    actions: Tensor  # [batch, action_dim] in [-1, 1]
    returns: Tensor  # [batch], R


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
        """Actions mean + std noise, [..., batch, action_dim], of a standard normal `noise` of their shape, and
        log pi(a | s), [..., batch].
        """
        log_std = self.log_std.clamp(-5, 2)
        actions = self(observations) + log_std.exp() * noise
        return actions, -(0.5 * noise.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(dim=-1)


class Value(nn.Module):
    """V(s)."""

    def __init__(self, observation_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.net = nn.Sequential(*mlp(observation_dim, args.hidden_dims, 1))

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(observations).squeeze(-1)  # [batch]


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor
    value: Value
    target_value: Value  # V as it was when the returns were last computed: a resumed run computes the same ones
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
    value = Value(observation_dim, args).to(device)
    groups = [
        {"params": actor.parameters(), "lr": args.actor_learning_rate},
        {"params": value.parameters(), "lr": args.value_learning_rate},
    ]
    target_value = copy.deepcopy(value).requires_grad_(False)
    return Learner(actor, value, target_value, adam(groups))


# --- Returns --------------------------------------------------------------------------------------------------------


def td_lambda_returns(
    rewards: Tensor,
    terminations: Tensor,
    next_values: Tensor,
    episode_lengths: Tensor,
    gamma: float,
    td_lambda: float,
) -> Tensor:
    """R_t = r_t + gamma (1 - termination_t) ((1 - lambda) V'(s_{t+1}) + lambda R_{t+1}) of every transition, [N].

    The last step of an episode has no R_{t+1} and takes lambda = 0: cut by a time limit, it bootstraps from V' alone.
    `rewards`, `terminations` and `next_values` [N] hold the episodes of `episode_lengths` [E] one after the other.
    """
    decay = torch.full_like(rewards, td_lambda)
    decay[episode_lengths.to(rewards.device).cumsum(0) - 1] = 0
    discount = gamma * (1 - terminations)
    # R_t = returns_t + factor_t R_{t+1}, and R_{t+1} obeys the same equation. Put into each other, they give
    # R_t = (returns_t + factor_t returns_{t+1}) + factor_t factor_{t+1} R_{t+2}. So each pass over all steps doubles
    # the reach, and log2 of the longest episode's length passes do what a loop backwards through time would. At the end
    # of an episode the factor is 0: nothing of the next episode enters.
    returns = rewards + discount * (1 - decay) * next_values
    factor = discount * decay
    reach, longest = 1, int(episode_lengths.max())
    while reach < longest:
        returns[:-reach] += factor[:-reach] * returns[reach:]
        factor[:-reach] *= factor[reach:].clone()
        reach *= 2
    return returns


@torch.no_grad()
def compute_returns(
    target_value: Value,
    rewards: Tensor,
    next_observations: Tensor,
    terminations: Tensor,
    episode_lengths: Tensor,
    args: HyperParameters,
) -> Tensor:
    """R of every transition, [N]. Tensors [N, ...] hold the episodes of `episode_lengths` [E] one after the other.

    V' sees a few thousand rows at a time, so that memory stays small, and nearly as many each time: the bits of a last
    piece of two or three rows would depend on the number of threads.
    """
    pieces = next_observations.tensor_split(1 + len(next_observations) // 4096)
    next_values = torch.cat([target_value(rows) for rows in pieces])
    return td_lambda_returns(rewards, terminations, next_values, episode_lengths, args.gamma, args.td_lambda)


# --- Losses ---------------------------------------------------------------------------------------------------------


def advantage(value: Value, batch: Batch) -> Tensor:
    """A = R - V(s), [batch]. Its gradient reaches V alone."""
    return batch.returns - value(batch.observations)


def value_loss(advantages: Tensor) -> tuple[Tensor, Metrics]:
    """L_V = E[ A^2 ]"""
    loss = advantages.square().mean()
    return loss, {"value/loss": loss.detach(), "value/advantage": advantages.detach().mean()}


def effective_sample_size(weight: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2: as many transitions of equal weight say as much as the batch with its weights [batch]."""
    weight = weight / weight.max().clamp(min=1e-30)  # whose squares might be too small, or too large, for float32
    return weight.sum().square() / weight.square().sum().clamp(min=1e-30)


def actor_loss(
    actor: Actor, advantages: Tensor, batch: Batch, beta: float, weight_clip: float, standardize: bool
) -> tuple[Tensor, Metrics]:
    """L_pi = E[ -min(exp(A / beta), clip) log pi(a | s) ],  A a constant here"""
    advantages = advantages.detach()
    if standardize:
        advantages = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-6)
    weight = torch.exp(advantages / beta).clamp(max=weight_clip)
    log_prob = actor.log_prob(batch.observations, batch.actions)
    loss = -(weight * log_prob).mean()
    metrics = {"actor/loss": loss.detach(), "actor/log_prob": log_prob.detach().mean(), "actor/weight": weight.mean()}
    metrics["actor/weight_clipped"] = (weight == weight_clip).float().mean()  # a share of the batch
    metrics["actor/effective_sample_size"] = effective_sample_size(weight)  # of the batch's transitions
    return loss, metrics


# --- Update ---------------------------------------------------------------------------------------------------------


def total_loss(learner: Learner, batch: Batch, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_V + L_pi. Each reaches the weights of one network only, so one backward pass serves both."""
    advantages = advantage(learner.value, batch)
    loss_v, metrics_v = value_loss(advantages)
    standardize = args.standardize_advantage
    loss_pi, metrics_pi = actor_loss(learner.actor, advantages, batch, args.beta, args.weight_clip, standardize)
    return loss_v + loss_pi, metrics_v | metrics_pi


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of the two networks. `step` counts from 1."""
    loss, metrics = total_loss(learner, batch, args)
    loss.backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()
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
    returns_every: int = 1_000
    """updates between computations of the returns with the newest V (authors' code: 1,000 of the policy). Each is a
    pass of V over all data. For 1,000,000 transitions it takes as long as several hundred updates: there, take 5,000"""
    reward_scale: float | Literal["return-range"] = 1.0  # multiplies rewards; return-range: their returns span 1,000
    reward_shift: float = 0.0  # added to rewards first
    normalize_observations: bool = True  # by the mean and standard deviation of the data (authors' code)
    online_steps: int = 0  # after the other updates, steps that the policy takes, by sampling, with an update each

    def validate(self) -> None:
        super().validate()
        enough = self.batch_size >= 2 or not self.standardize_advantage
        check_argument(self, "batch_size", enough, "must be at least 2 to standardise the advantage over it")
        check_argument(self, "gamma", 0 <= self.gamma < 1, "must be in [0, 1)")
        check_argument(self, "td_lambda", 0 <= self.td_lambda <= 1, "must be in [0, 1]")
        check_argument(self, "beta", self.beta > 0, "must be positive")
        check_argument(self, "weight_clip", self.weight_clip > 0, "must be positive")
        last, every = self.num_updates + self.online_steps - 1, self.returns_every
        counts = self.online_steps == 0 or last // every > self.num_updates // every
        rule = "these updates take no returns of the steps; act longer, or lower --returns-every in a new run"
        check_argument(self, "online_steps", counts, rule)


def main(args: Args) -> None:
    device = set_up(args)
    dataset = hold_out(load_dataset(args.dataset_id, args.env_id), args)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations, room=args.online_steps)
    buffer.scale_rewards(args.reward_scale, args.reward_shift)
    for part in filter(None, (buffer, buffer.validation)):
        part.transitions.rewards.mul_(1 - args.gamma)  # R and V are then averages of the rewards to come, soon learned
    buffer.reward_scale *= 1 - args.gamma  # what is added, too

    learner = build(buffer.observation_dim, buffer.action_dim, args, device, Adam)
    train = compiled(update, learner, args)
    player = Player(make_environments(dataset, 1)[0], buffer, args.seed) if args.online_steps else None

    def compute(step: int) -> Tensor:
        """R, with V' as it is, of the data and of the steps that were played until update `step`."""
        returns = compute_returns(learner.target_value, *buffer.transitions[2:], buffer.episode_lengths, args)
        if not player or step <= args.num_updates:
            return returns
        played = buffer.take(torch.arange(len(returns), len(returns) + step - args.num_updates, device=device))
        ends = torch.tensor([*player.lengths, len(player.actions)]).cumsum(0).clamp(max=len(played.rewards))
        lengths = ends.diff(prepend=torch.zeros(1, dtype=torch.long))  # 0 of episodes that came later
        return torch.cat([returns, compute_returns(learner.target_value, *played[2:], lengths, args)])

    def make_batch(held_out: ReplayBuffer, rows: Tensor) -> Batch:
        episodes = *held_out.transitions[2:], held_out.episode_lengths
        returns = compute_returns(learner.target_value, *episodes, args)
        return Batch(*(column[rows] for column in (*held_out.transitions[:2], returns)))

    run = Run(args, buffer, learner, update, make_batch, player)  # makes the run folder or goes back to its checkpoint

    def explore(observations: Tensor) -> Tensor:
        return learner.actor.sample(observations, torch.randn(1, buffer.action_dim, device=device))[0]

    returns = compute(run.step - run.step % args.returns_every)  # with the fresh V or, resuming, the checkpoint's
    for step in range(run.first_step, run.last_step + 1):
        if player and step > args.num_updates:
            buffer.add(player.step(run.policy(player.observation[None], explore)[0]))
        rows = torch.randint(len(returns), (args.batch_size,), device=device)  # of what has returns
        observations, actions, *_ = buffer.take(rows)
        metrics = train(learner, Batch(observations, actions, returns[rows]), step, args)
        if step % args.returns_every == 0:  # before a checkpoint of the same step, which then holds this V
            learner.target_value.load_state_dict(learner.value.state_dict())
            returns = compute(step)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
