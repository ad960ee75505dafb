"""Conservative Q-learning for discrete actions: Double DQN whose Q is made to doubt every action outside the data.

The critic pays for high values of all actions and is paid for them at the data's. The actions are few: nothing has to
be sampled, and the logarithm of the sum over them is exact. With Q' the target network, a slow copy of Q:

    y   = r + gamma (1 - termination) Q'(s', pi(s'))                              (Double DQN)
    L_Q = E[ (y - Q(s, a))^2 + cql_alpha gap(s, a) ],  gap = log sum_a' exp Q(s, a') - Q(s, a)        (eq. 4)
    pi  = argmax_a Q(s, a) + bc_weight log beta(a | s)

The gap is also the cross-entropy of softmax(Q) on the data's actions: discrete CQL is Q-learning with a term of
behaviour cloning on Q itself. --bc-weight holds the policy in place of Q (DDQN+BC with --cql-alpha 0): beta is a model
of the data's actions, and the more rarely the data take an action, the more it must be worth:

    L_beta = E[ -log beta(a | s) ]

At weight 0 there is no beta; at a large weight the policy is a clone. --cql-alpha 0 alone is Double DQN.

Paper: Kumar, Zhou, Tucker, Levine, "Conservative Q-Learning for Offline Reinforcement Learning", 2020,
arXiv 2006.04779; Double DQN is arXiv 1509.06461; --bc-weight has the form of the regularised policy of Wu, Tucker,
Nachum, "Behavior Regularized Offline Reinforcement Learning", 2019, arXiv 1911.11361, made greedy.
Differences: Q is plain, and its squared error has no factor 1/2; the authors' code for Atari has quantiles. The target
is Double DQN's, and its network follows slowly; theirs takes the maximum of a network that is copied now and then.
Observations are normalised.

Run: python algorithms/discrete_cql.py --dataset-id anchorl/cartpole/mixed-v0
"""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (authors' code)
    cql_alpha: float = 1.0  # weight of the gap in L_Q (authors' code for Atari: 1; 4 on 1% of the data)
    bc_weight: float = 0.0  # weight of log beta in the policy, in units of the return
    tau: float = 0.005  # rate at which the target network follows the critic (usual)
    critic_learning_rate: float = 3e-4  # of Adam (usual)
    behaviour_learning_rate: float = 3e-4  # of Adam, for beta (usual)
    legal_actions: bool = False
    """an observation begins with a mask of the actions that are legal in it, 1 or 0 each; others are never taken"""
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of every network


class Batch(NamedTuple):
    """Transitions, in float32 but for the actions."""

    observations: Tensor  # [batch, observation_dim], normalised
    actions: Tensor  # [batch], int64, counted from 0
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


def legal_only(preferences: Tensor, observations: Tensor, masked: bool) -> Tensor:
    """`preferences` [batch, num_actions], with the lowest for each action that the mask of its state forbids."""
    if not masked:
        return preferences
    return preferences.masked_fill(observations[:, : preferences.shape[1]] < 0.5, -1e9)  # finite: times 0 it is 0


class Critic(nn.Module):
    """Q(s, a) of every action at once."""

    def __init__(self, observation_dim: int, num_actions: int, args: HyperParameters) -> None:
        super().__init__()
        self.net = nn.Sequential(*mlp(observation_dim, args.hidden_dims, num_actions))
        self.masked = args.legal_actions

    def forward(self, observations: Tensor) -> Tensor:
        return legal_only(self.net(observations), observations, self.masked)  # [batch, num_actions]


class Behaviour(nn.Module):
    """beta(a | s): a model of the data's actions."""

    def __init__(self, observation_dim: int, num_actions: int, args: HyperParameters) -> None:
        super().__init__()
        self.net = nn.Sequential(*mlp(observation_dim, args.hidden_dims, num_actions))
        self.masked = args.legal_actions

    def forward(self, observations: Tensor) -> Tensor:
        """log beta(. | s), [batch, num_actions]."""
        return legal_only(self.net(observations), observations, self.masked).log_softmax(dim=1)


class Actor(nn.Module):
    """pi(s) = argmax_a Q(s, a) + bc_weight log beta(a | s)."""

    def __init__(self, observation_dim: int, num_actions: int, args: HyperParameters) -> None:
        super().__init__()
        self.critic = Critic(observation_dim, num_actions, args)
        self.behaviour = Behaviour(observation_dim, num_actions, args) if args.bc_weight else None
        self.register_buffer("bc_weight", torch.tensor(args.bc_weight))

    def forward(self, observations: Tensor) -> Tensor:
        """What the policy takes the highest of: [batch, num_actions]."""
        q = self.critic(observations)
        return q if self.behaviour is None else q + self.bc_weight * self.behaviour(observations)


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor
    target_critic: Critic
    optimizer: Any


def build(
    observation_dim: int,
    num_actions: int,
    args: HyperParameters,
    device: torch.device | str = "cpu",
    adam: Any = torch.optim.Adam,
) -> Learner:
    """Fresh networks and their optimiser: one Adam with a parameter group per network."""
    actor = Actor(observation_dim, num_actions, args).to(device)
    groups = [{"params": actor.critic.parameters(), "lr": args.critic_learning_rate}]
    if actor.behaviour is not None:
        groups += [{"params": actor.behaviour.parameters(), "lr": args.behaviour_learning_rate}]
    target_critic = copy.deepcopy(actor.critic).requires_grad_(False)
    return Learner(actor, target_critic, adam(groups))


# --- Losses ---------------------------------------------------------------------------------------------------------


def q_of(actions: Tensor, q: Tensor) -> Tensor:
    """The entries of q [batch, num_actions] for `actions` [batch]: [batch]."""
    return q.gather(1, actions.unsqueeze(1)).squeeze(1)


def critic_loss(learner: Learner, batch: Batch, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_Q = E[ (y - Q(s, a))^2 + cql_alpha gap ],  y = r + gamma (1 - termination) Q'(s', pi(s'))        (eq. 4)"""
    with torch.no_grad():
        next_actions = learner.actor(batch.next_observations).argmax(dim=1)  # pi(s'), by Q ...
        next_q = q_of(next_actions, learner.target_critic(batch.next_observations))  # ... and its value by Q', [batch]
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_q  # a truncation bootstraps
    all_q = learner.actor.critic(batch.observations)  # [batch, num_actions]
    q = q_of(batch.actions, all_q)  # [batch]
    gap = (all_q.logsumexp(dim=1) - q).mean()  # over the actions of one state
    loss = (target - q).square().mean() + args.cql_alpha * gap
    metrics = {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}
    return loss, metrics | {"critic/gap": gap.detach()}


def behaviour_loss(behaviour: Behaviour, batch: Batch) -> tuple[Tensor, Metrics]:
    """L_beta = E[ -log beta(a | s) ]"""
    loss = nll_loss(behaviour(batch.observations), batch.actions)
    return loss, {"behaviour/loss": loss.detach()}


# --- Update ---------------------------------------------------------------------------------------------------------


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of critic and beta, then the target network follows the critic. `step` counts from 1."""
    loss, metrics = critic_loss(learner, batch, args)
    if learner.actor.behaviour is not None:
        loss_beta, metrics_beta = behaviour_loss(learner.actor.behaviour, batch)
        loss, metrics = loss + loss_beta, metrics | metrics_beta  # of other weights: one backward pass serves both
    loss.backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()

    with torch.no_grad():  # Q' <- Q' + tau (Q - Q')
        target, critic = learner.target_critic.parameters(), learner.actor.critic.parameters()
        torch._foreach_lerp_(list(target), list(critic), args.tau)
    return metrics


# === The copy line: what is above needs PyTorch alone; below are command line, data, run folder and evaluation ========

import sys
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, check_argument, launch
from common.data import BUILT_IN_DISCRETE_ID, ReplayBuffer, hold_out, load_dataset
from common.experiment import Run, set_up
from common.optim import Adam, compiled


@dataclass
class Args(HyperParameters, ExperimentArgs):
    dataset_id: str = BUILT_IN_DISCRETE_ID  # built-in or Minari id, local first, else downloaded; of discrete actions
    reward_scale: float | Literal["return-range"] = 1.0  # multiplies rewards; return-range: their returns span 1,000
    reward_shift: float = 0.0  # added to rewards first
    normalize_observations: bool = True  # by the mean and standard deviation of the data
    legal_actions: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = (
        False  # set where the data's observations have an action_mask
    )

    def validate(self) -> None:
        super().validate()
        check_argument(self, "cql_alpha", self.cql_alpha >= 0, "must not be negative")
        check_argument(self, "bc_weight", self.bc_weight >= 0, "must not be negative")


def main(args: Args) -> None:
    device = set_up(args)
    dataset = hold_out(load_dataset(args.dataset_id, args.env_id, discrete=True), args)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations)
    buffer.scale_rewards(args.reward_scale, args.reward_shift)

    args.legal_actions = buffer.num_legal > 0
    learner = build(buffer.observation_dim, buffer.num_actions, args, device, Adam)
    train = compiled(update, learner, args)
    run = Run(args, buffer, learner, update)  # makes the run folder or, with --resume, goes back to its checkpoint
    for step in range(run.first_step, args.num_updates + 1):
        metrics = train(learner, Batch(*buffer.sample(args.batch_size)), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
