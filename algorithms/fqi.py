"""Fitted Q iteration (FQI): Q-learning on fixed data, with no anchor at all, the baseline that overestimates.

For discrete actions. Q is fitted to the reward and the value of the best action at the next state, which Q itself
names; the policy takes the best action everywhere. Where the data lack an action, nothing corrects what Q says of it,
and the maximum looks for just such errors. With Q' the target network, a slow copy of Q:

    y   = r + gamma (1 - termination) max_a' Q'(s', a'),  or with --double Q'(s', argmax_a' Q(s', a'))
    L_Q = E[ (y - Q(s, a))^2 ]
    pi  = argmax_a Q(s, a)

How much it overestimates is in metrics.csv: critic/overestimate is what Q promises where the data's episodes start,
E[ max_a Q(s_0, a) ], less the discounted return that the policy then earns in the evaluations (until their time limit,
which Q knows nothing of).

Paper: Ernst, Geurts, Wehenkel, "Tree-Based Batch Mode Reinforcement Learning", 2005, JMLR 6; with networks: Riedmiller,
"Neural Fitted Q Iteration", 2005; --double: van Hasselt, Guez, Silver, "Deep Reinforcement Learning with Double
Q-learning", 2015, arXiv 1509.06461.
Differences: steps of Adam on batches towards a slow target network, where the first two papers fit one regression after
the other to all data; observations are normalised.

Run: python algorithms/fqi.py --dataset-id anchorl/cartpole/mixed-v0
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, launch
from common.compile import compiled
from common.datasets import BUILT_IN_DISCRETE_ID, load_dataset
from common.experiment import Run, set_up
from common.optim import Adam
from common.replay_buffer import Batch, ReplayBuffer

Metrics = dict[str, Tensor]


@dataclass
class Args(ExperimentArgs):
    algorithm: ClassVar[str] = "fqi"

    dataset_id: str = BUILT_IN_DISCRETE_ID
    """built-in id or Minari id (local first, else downloaded), with discrete actions"""
    gamma: float = 0.99
    """discount (usual)"""
    double: bool = False
    """Double DQN: Q chooses the action at s', Q' tells its value, which lowers the overestimate (van Hasselt et al.)"""
    tau: float = 0.05
    """rate at which the target network follows: what Q lacks fades with 1 / (tau (1 - gamma)) updates, which with the
    0.005 usual in control are 20,000"""
    critic_learning_rate: float = 3e-4
    """usual for Adam"""
    hidden_dims: tuple[int, ...] = (256, 256)
    """hidden layers of the network"""
    normalize_observations: bool = True
    """by the mean and standard deviation of the data"""


# --- Networks -------------------------------------------------------------------------------------------------------


def mlp(input_dim: int, hidden_dims: tuple[int, ...], output_dim: int) -> list[nn.Module]:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for width in hidden_dims:
        layers += [nn.Linear(input_dim, width), nn.ReLU(inplace=True)]
        input_dim = width
    return [*layers, nn.Linear(input_dim, output_dim)]


class Critic(nn.Module):
    """Q(s, a) of every action at once."""

    def __init__(self, observation_dim: int, num_actions: int, hidden_dims: tuple[int, ...]) -> None:
        super().__init__()
        self.net = nn.Sequential(*mlp(observation_dim, hidden_dims, num_actions))

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(observations)  # [batch, num_actions]


class Actor(nn.Module):
    """pi(s) = argmax_a Q(s, a)."""

    def __init__(self, observation_dim: int, num_actions: int, args: Args) -> None:
        super().__init__()
        self.critic = Critic(observation_dim, num_actions, args.hidden_dims)

    def forward(self, observations: Tensor) -> Tensor:
        """What the policy takes the highest of: [batch, num_actions]."""
        return self.critic(observations)


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor
    target_critic: Critic
    optimizer: Adam


def build(observation_dim: int, num_actions: int, args: Args, device: torch.device) -> Learner:
    """Fresh networks and their optimiser."""
    actor = Actor(observation_dim, num_actions, args).to(device)
    groups = [{"params": actor.critic.parameters(), "lr": args.critic_learning_rate}]
    target_critic = copy.deepcopy(actor.critic).requires_grad_(False)
    return Learner(actor, target_critic, Adam(groups))


# --- Losses ---------------------------------------------------------------------------------------------------------


def q_of(actions: Tensor, q: Tensor) -> Tensor:
    """The entries of q [batch, num_actions] for `actions` [batch]: [batch]."""
    return q.gather(1, actions.unsqueeze(1)).squeeze(1)


def critic_loss(learner: Learner, batch: Batch, args: Args) -> tuple[Tensor, Metrics]:
    """L_Q = E[ (y - Q(s, a))^2 ],  y = r + gamma (1 - termination) Q'(s', a')"""
    with torch.no_grad():
        next_q = learner.target_critic(batch.next_observations)  # [batch, num_actions]
        next_actions = (learner.actor(batch.next_observations) if args.double else next_q).argmax(dim=1)  # a'
        next_value = q_of(next_actions, next_q)  # [batch]
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_value  # a truncation bootstraps
    q = q_of(batch.actions, learner.actor.critic(batch.observations))  # [batch]
    loss = F.mse_loss(q, target)
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


# --- Update ---------------------------------------------------------------------------------------------------------


def update(learner: Learner, batch: Batch, step: int, args: Args) -> Metrics:
    """One gradient step of the critic, then the target network follows it. `step` counts from 1."""
    loss, metrics = critic_loss(learner, batch, args)
    loss.backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()

    with torch.no_grad():  # Q' <- Q' + tau (Q - Q')
        target, critic = learner.target_critic.parameters(), learner.actor.critic.parameters()
        torch._foreach_lerp_(list(target), list(critic), args.tau)
    return metrics


# --- Overestimate ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def overestimate(learner: Learner, initial_observations: Tensor, evaluation: dict[str, float]) -> dict[str, float]:
    """E[ max_a Q(s_0, a) ] and, where the policy was evaluated, how far that is above its discounted return."""
    promise = float(learner.actor.critic(initial_observations).amax(dim=1).mean())
    found = {"critic/q_initial": promise}
    if evaluation:
        found["critic/overestimate"] = promise - evaluation["eval/discounted_return"]
    return found


# --- Main -----------------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    device = set_up(args)
    dataset = load_dataset(args.dataset_id, args.env_id, discrete=True)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations)
    initial_observations = buffer.transitions.observations[buffer.episode_starts.to(device)]

    learner = build(buffer.observation_dim, buffer.num_actions, args, device)
    train = compiled(update, args, device)
    run = Run(args, buffer, learner)
    for step in run.steps():
        metrics = train(learner, buffer.sample(args.batch_size), step, args)

        if evaluating := run.is_due(step, args.eval_every):
            evaluation = run.evaluate(step, args.gamma)
            metrics |= evaluation | overestimate(learner, initial_observations, evaluation)
        if evaluating or run.is_due(step, args.log_every):
            run.log(step, metrics)
        if run.is_due(step, args.checkpoint_every):
            run.save_checkpoint(step)
    run.finish()


if __name__ == "__main__":
    launch(main, Args)
