"""Normalized advantage functions (NAF): Q-learning of continuous actions, by a Q whose best action is known at once.

Q is a parabola in the action, with its summit at mu(s): the maximum over all actions, for which others train an actor,
is V(s), and the policy is mu. With mu, V and L a network's outputs, and V' its slow copy's:

    Q(s, a) = V(s) - 1/2 (a - mu(s))^T P(s) (a - mu(s)),  P = L L^T
    L is lower-triangular, its diagonal exponentiated: P is positive definite
    y   = r + gamma (1 - termination) V'(s')
    L_Q = E[ (y - Q(s, a))^2 ]
    pi  = argmax_a Q(s, a) = mu(s)

Nothing holds mu to the data. Where they lack good actions, the parabola's summit lies beyond what was tried, V promises
what nobody saw, and the next target is made of that promise. With --online-steps the policy acts, with noise, after the
other updates: what it overestimates gets tried, and is corrected. One summit is all that a parabola has: where two
actions are good and what lies between them is not, Q can say so nowhere.

Paper: Gu, Lillicrap, Sutskever, Levine, "Continuous Deep Q-Learning with Model-based Acceleration", 2016,
arXiv 1603.00748.
Differences: it begins with data, where the paper's agent begins with none; no imagined rollouts (mbpo.py has some). mu
is sent through tanh, so that it is an action. No code of the authors is known to us: rates are usual ones.
Observations are normalised.

Run: python algorithms/naf.py --dataset-id anchorl/pendulum/mixed-v0
"""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (usual)
    tau: float = 0.005  # rate at which the target critic follows the critic (usual)
    critic_learning_rate: float = 3e-4  # of Adam (usual)
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of the network (usual)


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


class Critic(nn.Module):
    """Q(s, a) = V(s) - 1/2 |L(s)^T (a - mu(s))|^2, of one network with three kinds of outputs."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.sizes = 1, action_dim, action_dim**2  # V, mu, L; what of L is above its diagonal is not used
        self.net = nn.Sequential(*mlp(observation_dim, args.hidden_dims, sum(self.sizes)))

    def terms(self, observations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """V [batch], mu [batch, action_dim] in [-1, 1], and L [batch, action_dim, action_dim]."""
        value, mean, numbers = self.net(observations).split(self.sizes, dim=-1)
        matrix = numbers.unflatten(-1, (mean.shape[-1], mean.shape[-1]))
        triangle = matrix.tril(-1) + torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1).exp())
        return value.squeeze(-1), mean.tanh(), triangle

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        value, mean, triangle = self.terms(observations)
        away = (triangle.mT @ (actions - mean).unsqueeze(-1)).squeeze(-1)  # L^T (a - mu), [batch, action_dim]
        return (value - 0.5 * away.square().sum(dim=-1)).unsqueeze(0)  # [1, batch]: of one critic


class Actor(nn.Module):
    """pi(s) = argmax_a Q(s, a) = mu(s)."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.critic = Critic(observation_dim, action_dim, args)

    def forward(self, observations: Tensor) -> Tensor:
        """The action: [batch, action_dim] in [-1, 1]."""
        return self.critic.terms(observations)[1]


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor
    target_critic: Critic
    optimizer: Any


def build(
    observation_dim: int,
    action_dim: int,
    args: HyperParameters,
    device: torch.device | str = "cpu",
    adam: Any = torch.optim.Adam,
) -> Learner:
    """Fresh networks and their optimiser."""
    actor = Actor(observation_dim, action_dim, args).to(device)
    groups = [{"params": actor.critic.parameters(), "lr": args.critic_learning_rate}]
    target_critic = copy.deepcopy(actor.critic).requires_grad_(False)
    return Learner(actor, target_critic, adam(groups))


# --- Losses ---------------------------------------------------------------------------------------------------------


def critic_loss(learner: Learner, batch: Batch, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_Q = E[ (y - Q(s, a))^2 ],  y = r + gamma (1 - termination) V'(s')"""
    with torch.no_grad():
        next_value = learner.target_critic.terms(batch.next_observations)[0]  # [batch], max_a' Q'(s', a')
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_value  # a truncation bootstraps
    q = learner.actor.critic(batch.observations, batch.actions).squeeze(0)  # [batch]
    loss = (target - q).square().mean()
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


# --- Update ---------------------------------------------------------------------------------------------------------


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of the critic, then the target critic follows it. `step` counts from 1."""
    loss, metrics = critic_loss(learner, batch, args)
    loss.backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()

    critic, target_critic = learner.actor.critic, learner.target_critic
    with torch.no_grad():  # Q' <- Q' + tau (Q - Q')
        torch._foreach_lerp_(list(target_critic.parameters()), list(critic.parameters()), args.tau)
    return {"actor/loss": loss.detach()} | metrics  # the actor is a part of the critic


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
    reward_scale: float | Literal["return-range"] = 1.0  # multiplies rewards; return-range: their returns span 1,000
    reward_shift: float = 0.0  # added to rewards first
    normalize_observations: bool = True  # by the mean and standard deviation of the data
    online_steps: int = 0  # after the other updates, steps that the policy takes, with noise, with an update each
    exploration_noise: float = 0.1  # standard deviation of that noise, in half an action's range (TD3)

    def validate(self) -> None:
        super().validate()
        check_argument(self, "exploration_noise", self.exploration_noise >= 0, "must not be negative")


def main(args: Args) -> None:
    device = set_up(args)
    dataset = hold_out(load_dataset(args.dataset_id, args.env_id), args)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations, room=args.online_steps)
    buffer.scale_rewards(args.reward_scale, args.reward_shift)

    learner = build(buffer.observation_dim, buffer.action_dim, args, device, Adam)
    train = compiled(update, learner, args)
    player = Player(make_environments(dataset, 1)[0], buffer, args.seed) if args.online_steps else None
    run = Run(args, buffer, learner, update, player=player)  # makes the run folder, or goes back to its checkpoint

    def explore(observations: Tensor) -> Tensor:
        return learner.actor(observations) + args.exploration_noise * torch.randn(1, buffer.action_dim, device=device)

    for step in range(run.first_step, run.last_step + 1):
        if player and step > args.num_updates:  # a transition more, which counts as much as one of the data
            buffer.add(player.step(run.policy(player.observation[None], explore)[0]))
        metrics = train(learner, Batch(*buffer.sample(args.batch_size)), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
