"""Implicit diffusion Q-learning (IDQL): IQL's values, and a policy that takes the best of many samples of a clone.

IQL's V is the value of a policy that weights the data's actions by |expectile - 1(A < 0)|. That policy can have several
modes; a Gaussian, as IQL's, would act between them. (IQL fits its own to other weights, exp(beta A).) Here a flow
clones the data's actions, however they are distributed, and Q chooses among its samples only when the policy acts: an
argmax, which is greedier than the policy that V belongs to. With Q' the target critic (a slow copy of Q),
A(s, a) = min_i Q'_i(s, a) - V(s), z standard normal and t uniform in [0, 1]:

    L_V    = E[ |expectile - 1(A < 0)| A^2 ]                                      (IQL, eq. 5)
    L_Q    = E[ sum_i (r + gamma (1 - termination) V(s') - Q_i(s, a))^2 ]         (IQL, eq. 6)
    L_flow = E[ (v(s, x, t) - (a - z))^2 ],  x = (1 - t) z + t a
    pi(s)  = argmax_{a_i} min_j Q'_j(s, a_i),  a_i = flow(s, z_i)

where flow(s, z) carries z along the velocity v from t = 0 to t = 1, in --flow-steps steps.

Paper: Hansen-Estruch, Kostrikov, Janner, Kuba, Levine, "IDQL: Implicit Q-Learning as an Actor-Critic Method with
Diffusion Policies", 2023, arXiv 2304.10573. With a flow: "IFQL" in Park, Li, Levine, 2025, arXiv 2502.02538.
Differences: the paper's clone is a diffusion model of 5 steps. A flow is simpler, without schedule or noise on the way,
and its 10 steps keep modes apart: of two narrow kinds of actions, about -0.5 and 0.5, the authors' sampler with a
perfect network puts a quarter of its samples nearer to 0 than to either, the flow one in a hundred. The clone is a
plain network, which sees t beside s and x; the authors' is twelve times as large, with residual blocks, layer norm,
dropout, weight decay and Fourier features of t, and a slow copy of it acts. The z_i are drawn once, at the start, and
the first of them is 0, so that the policy is a function of s; the authors draw anew at each step. The paper's policy
that draws one of the samples, by the weights above, and its other losses of V are left out. One optimiser step trains
the three networks, each loss seeing the others as they were before it (the authors train the clone, V, and then Q with
the new V). V has no layer norm, the batch is half the authors', and L_Q sums over the twins (theirs: mean).
Observations are normalised, which the authors do not do. Rewards are rescaled by the range of returns everywhere,
unless --reward-scale says otherwise; the authors do so in locomotion. Layers start as PyTorch's do (uniform within 1 /
sqrt(inputs)); the authors' by Xavier's rule.

Run: python algorithms/idql.py --dataset-id anchorl/pendulum/mixed-v0
"""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (authors' code)
    expectile: float = 0.7
    """0.5 makes V the mean of Q over the data's actions, towards 1 the maximum (authors' code: 0.9 in antmaze)"""
    flow_steps: int = 10  # steps from noise to an action (IFQL's code)
    num_acting_actions: int = 64  # samples among which the policy takes the best (authors' code: 16, 64 and 256)
    tau: float = 0.005  # rate at which the target critic follows the critic (authors' code)
    actor_learning_rate: float = 3e-4  # of Adam, for the flow (authors' code)
    cosine_decay: bool = True  # the actor's rate falls to 0 at --num-updates, which is then final (authors' code)
    critic_learning_rate: float = 3e-4  # of Adam (authors' code)
    value_learning_rate: float = 3e-4  # of Adam (authors' code)
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of critic and value (authors' code)
    flow_hidden_dims: tuple[int, ...] = (256, 256, 256)  # hidden layers of the flow (authors': 3 blocks, 256 to 1,024)


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


class Flow(nn.Module):
    """v(s, x, t): how fast and whither x moves at time t, on its way from noise at 0 to an action of the data at 1."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.steps = args.flow_steps
        self.net = nn.Sequential(*mlp(observation_dim + action_dim + 1, args.flow_hidden_dims, action_dim))

    def forward(self, observations: Tensor, x: Tensor, times: Tensor) -> Tensor:
        """The velocity, [batch, action_dim], of x [batch, action_dim] at `times` [batch, 1]."""
        return self.net(torch.cat([observations, x, times], dim=-1))

    def sample(self, observations: Tensor, x: Tensor) -> Tensor:
        """flow(s, z): the action to which noise x leads, [batch, action_dim] in [-1, 1], by Euler's method."""
        for step in range(self.steps):
            times = torch.full_like(x[:, :1], step / self.steps)
            x = x + self(observations, x, times) / self.steps
        return x.clamp(-1, 1)


class Value(nn.Module):
    """V(s)."""

    def __init__(self, observation_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.net = nn.Sequential(*mlp(observation_dim, args.hidden_dims, 1))

    def forward(self, observations: Tensor) -> Tensor:
        return self.net(observations).squeeze(-1)  # [batch]


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


class Actor(nn.Module):
    """pi(s) = argmax_{a_i} min_j Q'_j(s, a_i): a deterministic policy, since the noise of the samples a_i is fixed."""

    noise: Tensor

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.flow = Flow(observation_dim, action_dim, args)
        self.target_critic = Critic(observation_dim, action_dim, args)
        noise = torch.randn(args.num_acting_actions, action_dim)
        noise[0] = 0  # the middle of the clone's actions is the first sample
        self.register_buffer("noise", noise)

    def forward(self, observations: Tensor) -> Tensor:
        """The action: [batch, action_dim] in [-1, 1]."""
        count, batch = self.noise.shape[0], observations.shape[0]
        repeated = observations.expand(count, -1, -1).flatten(0, 1)  # [samples * batch, observation_dim]
        samples = self.flow.sample(repeated, self.noise.unsqueeze(1).expand(-1, batch, -1).flatten(0, 1))
        q = self.target_critic(repeated, samples).amin(dim=0).view(count, batch)  # the more careful twin's
        best = q.argmax(dim=0)[None, :, None].expand(-1, -1, samples.shape[-1])  # [1, batch, action_dim]
        return samples.view(count, batch, -1).gather(0, best)[0]


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor  # flow and target critic: acting needs both
    critic: Critic
    value: Value
    optimizer: Any


def build(
    observation_dim: int,
    action_dim: int,
    args: HyperParameters,
    device: torch.device | str = "cpu",
    adam: Any = torch.optim.Adam,
) -> Learner:
    """Fresh networks and their optimiser: one Adam with a parameter group per network, the flow's first."""
    actor = Actor(observation_dim, action_dim, args).to(device)
    critic = copy.deepcopy(actor.target_critic)
    actor.target_critic.requires_grad_(False)
    value = Value(observation_dim, args).to(device)
    groups = [
        {"params": actor.flow.parameters(), "lr": args.actor_learning_rate},
        {"params": critic.parameters(), "lr": args.critic_learning_rate},
        {"params": value.parameters(), "lr": args.value_learning_rate},
    ]
    return Learner(actor, critic, value, adam(groups))


# --- Losses ---------------------------------------------------------------------------------------------------------


def advantage(value: Value, target_critic: Critic, batch: Batch) -> Tensor:
    """A(s, a) = min_i Q'_i(s, a) - V(s), [batch]. Its gradient reaches V alone."""
    with torch.no_grad():
        q = target_critic(batch.observations, batch.actions).min(dim=0).values  # [batch], the more careful twin's
    return q - value(batch.observations)


def value_loss(advantages: Tensor, expectile: float) -> tuple[Tensor, Metrics]:
    """L_V = E[ |expectile - 1(A < 0)| A^2 ]        (IQL, eq. 5)"""
    weight = torch.where(advantages > 0, expectile, 1 - expectile)  # V too low costs more: V rises above the mean
    loss = (weight * advantages.square()).mean()
    return loss, {"value/loss": loss.detach(), "value/advantage": advantages.detach().mean()}


def critic_loss(critic: Critic, value: Value, batch: Batch, gamma: float) -> tuple[Tensor, Metrics]:
    """L_Q = E[ sum_i (r + gamma (1 - termination) V(s') - Q_i(s, a))^2 ]        (IQL, eq. 6)"""
    with torch.no_grad():
        next_value = value(batch.next_observations)  # of s' itself: no action is needed
        target = batch.rewards + gamma * (1 - batch.terminations) * next_value  # a truncation bootstraps
    q = critic(batch.observations, batch.actions)  # [2, batch]
    loss = (target - q).square().mean(dim=1).sum()  # the mean over the batch, the sum over the twins
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


def flow_loss(flow: Flow, batch: Batch, noise: Tensor, times: Tensor) -> tuple[Tensor, Metrics]:
    """L_flow = E[ (v(s, x, t) - (a - z))^2 ],  x = (1 - t) z + t a

    `noise` z [batch, action_dim] is standard normal, `times` t [batch, 1] are uniform in [0, 1].
    """
    x = (1 - times) * noise + times * batch.actions  # on the straight line from z to a
    velocity = batch.actions - noise  # which is the same all along it
    loss = (flow(batch.observations, x, times) - velocity).square().mean()  # over the action's dimensions, too
    return loss, {"actor/loss": loss.detach()}


# --- Update ---------------------------------------------------------------------------------------------------------


def total_loss(
    learner: Learner, batch: Batch, noise: Tensor, times: Tensor, args: HyperParameters
) -> tuple[Tensor, Metrics]:
    """L_V + L_Q + L_flow. Each reaches the weights of one network only, so one backward pass serves all three."""
    advantages = advantage(learner.value, learner.actor.target_critic, batch)
    loss_v, metrics_v = value_loss(advantages, args.expectile)
    loss_q, metrics_q = critic_loss(learner.critic, learner.value, batch, args.gamma)
    loss_pi, metrics_pi = flow_loss(learner.actor.flow, batch, noise, times)
    return loss_v + loss_q + loss_pi, metrics_v | metrics_q | metrics_pi


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of the three networks, then the target critic follows the critic. `step` counts from 1."""
    noise, times = torch.randn_like(batch.actions), torch.rand_like(batch.actions[:, :1])
    loss, metrics = total_loss(learner, batch, noise, times, args)
    loss.backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()

    target_critic = learner.actor.target_critic
    with torch.no_grad():  # Q' <- Q' + tau (Q - Q')
        torch._foreach_lerp_(list(target_critic.parameters()), list(learner.critic.parameters()), args.tau)
    return metrics


def cosine_decay(step: int, num_updates: int) -> float:
    """Half a cosine, from 1 at the first update to 0 after the last: the factor on the actor's learning rate."""
    return 0.5 * (1 + math.cos(math.pi * (step - 1) / num_updates))


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
    reward_scale: float | Literal["return-range"] = "return-range"
    """multiplies rewards; return-range: their returns span 1,000 (authors' code in locomotion; elsewhere 1)"""
    reward_shift: float = 0.0  # added to rewards first (authors' code: -1 in antmaze)
    normalize_observations: bool = True  # by the mean and standard deviation of the data

    def validate(self) -> None:
        super().validate()
        check_argument(self, "expectile", 0 < self.expectile < 1, "must be in (0, 1)")


def main(args: Args) -> None:
    device = set_up(args)
    dataset = hold_out(load_dataset(args.dataset_id, args.env_id), args)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations)
    buffer.scale_rewards(args.reward_scale, args.reward_shift)

    learner = build(buffer.observation_dim, buffer.action_dim, args, device, Adam)
    train = compiled(update, learner, args)
    run = Run(args, buffer, learner, update)  # makes the run folder or, with --resume, goes back to its checkpoint
    for step in range(run.first_step, args.num_updates + 1):
        if args.cosine_decay:
            rate = args.actor_learning_rate * cosine_decay(step, args.num_updates)
            learner.optimizer.param_groups[0]["lr"].fill_(rate)
        metrics = train(learner, Batch(*buffer.sample(args.batch_size)), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
