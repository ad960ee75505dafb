"""Flow Q-learning (FQL): a flow imitates the data, and a policy of one step imitates the flow while it maximises Q.

A flow carries noise z to an action of the data along a learned velocity, so that it can hold any number of different
actions at one state. To maximise Q through its many steps would be slow and unstable. So a second network mu goes from
z to the action in one step, and a squared error holds it to where the flow ends from the same z: not to the average of
the data's actions, but to one of them. With Q' the target network, z standard normal and t uniform in [0, 1]:

    L_flow = E[ (v(s, x, t) - (a - z))^2 ],  x = (1 - t) z + t a
    L_pi   = E[ alpha (mu(s, z) - flow(s, z))^2 - lambda mean_i Q_i(s, clip(mu(s, z), -1, 1)) ]
    y      = r + gamma (1 - termination) mean_i Q'_i(s', clip(mu(s', z), -1, 1))
    L_Q    = E[ sum_i (y - Q_i(s, a))^2 ]
    pi(s)  = argmax_{a_i} mean_j Q_j(s, a_i),  a_i = clip(mu(s, z_i), -1, 1)

flow(s, z) follows v from z at t = 0 to t = 1 in --flow-steps steps, and is then clipped to [-1, 1]. lambda is
1 / E|mean_i Q_i(s, clip(mu(s, z), -1, 1))|, or 1 with --no-normalize-q. --q-aggregation min puts the lower twin in y.

Paper: Park, Li, Levine, "Flow Q-Learning", 2025, arXiv 2502.02538.
Differences: the z_i of the policy's candidates are drawn once, at the start, and the first of them is 0, by default the
only one, so that the policy is a function of s; the authors act by one z, drawn anew at each step. lambda is an option
of their code, which they advise for new tasks; the paper's results are without. Squares are averaged over the action's
dimensions, as in their code; the critics' are summed over the twins, where theirs are averaged. The target follows the
critic as it is after the step, theirs as it was before. Networks are smaller, layers start as PyTorch's do (theirs with
Glorot's weights and biases of 0), layer norms add 1e-5 to the variance (theirs 1e-6), observations are normalised.

Run: python algorithms/fql.py --dataset-id anchorl/pendulum/mixed-v0
"""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import layer_norm

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (paper; 0.995 in some mazes and in antsoccer)
    alpha: float = 1.0  # weight of imitation in L_pi: large is cloning (tried here; authors' advice: 0.03 to 10)
    normalize_q: bool = True  # whether lambda makes alpha fit every scale of rewards (authors' advice; paper: not)
    q_aggregation: Literal["mean", "min"] = "mean"  # of the twins in y (paper; min in some tasks)
    flow_steps: int = 10  # steps from noise to the flow's action (paper)
    num_acting_actions: int = 1
    """candidates among which the policy takes the best, the first mu(s, 0): 1 is that alone (tried here)"""
    tau: float = 0.005  # rate at which the target network follows (paper)
    actor_learning_rate: float = 3e-4  # of Adam (paper)
    critic_learning_rate: float = 3e-4  # of Adam (paper)
    flow_learning_rate: float = 3e-4  # of Adam (paper)
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of every network (paper: 512 512 512 512)


class Batch(NamedTuple):
    """Transitions, in float32."""

    observations: Tensor  # [batch, observation_dim], normalised
    actions: Tensor  # [batch, action_dim] in [-1, 1]
    rewards: Tensor  # [batch]
    next_observations: Tensor  # [batch, observation_dim], normalised
    terminations: Tensor  # [batch], 1 where the environment ended the episode; a truncation bootstraps


# --- Networks -------------------------------------------------------------------------------------------------------


def gelu(x: Tensor) -> Tensor:
    """x (1 + tanh(u)) / 2 = x sigmoid(2u),  u = sqrt(2 / pi) (x + 0.044715 x^3): the authors' form of GELU

    Compiled for a CPU, PyTorch's own, approximate="tanh", takes twice as long.
    """
    return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))


class GELU(nn.Module):
    """gelu, as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return gelu(x)


def mlp(input_dim: int, hidden_dims: tuple[int, ...], output_dim: int) -> list[nn.Module]:
    """Linear layers with GELU between them."""
    layers: list[nn.Module] = []
    for width in hidden_dims:
        layers += [nn.Linear(input_dim, width), GELU()]
        input_dim = width
    return [*layers, nn.Linear(input_dim, output_dim)]


def join(observations: Tensor, x: Tensor) -> Tensor:
    """Every x [..., batch, x_dim] beside its observation [batch, observation_dim], of which many x may share one."""
    return torch.cat([observations.expand(*x.shape[:-1], -1), x], dim=-1)


class Flow(nn.Module):
    """v(s, x, t): how fast and whither x moves at time t, on its way from noise at 0 to an action of the data at 1."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.steps = args.flow_steps
        self.net = nn.Sequential(*mlp(observation_dim + action_dim + 1, args.hidden_dims, action_dim))

    def forward(self, observations: Tensor, x: Tensor, times: Tensor) -> Tensor:
        """The velocity, [batch, action_dim], of x [batch, action_dim] at `times` [batch, 1]."""
        return self.net(torch.cat([observations, x, times], dim=-1))

    def sample(self, observations: Tensor, x: Tensor) -> Tensor:
        """flow(s, z): the action to which noise x leads, [batch, action_dim] in [-1, 1], by Euler's method."""
        for step in range(self.steps):
            times = torch.full_like(x[:, :1], step / self.steps)
            x = x + self(observations, x, times) / self.steps
        return x.clamp(-1, 1)


class OneStepPolicy(nn.Module):
    """mu(s, z): the action that noise z stands for at s, in one step."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.net = nn.Sequential(*mlp(observation_dim + action_dim, args.hidden_dims, action_dim))

    def forward(self, observations: Tensor, z: Tensor) -> Tensor:
        return self.net(join(observations, z))  # [..., batch, action_dim], not bounded


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
    """Q_1(s, a) and Q_2(s, a): twins, trained on the same target from different initial weights."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        widths = [observation_dim + action_dim, *args.hidden_dims, 1]
        self.layers = nn.ModuleList(EnsembleLinear(2, *pair) for pair in pairwise(widths))
        self.norms = nn.ModuleList(EnsembleLayerNorm(2, width) for width in args.hidden_dims)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Observations [batch, observation_dim], actions [..., batch, action_dim]: values [2, ..., batch]."""
        x = join(observations, actions).flatten(0, -2).expand(2, -1, -1)
        for layer, norm in zip(self.layers[:-1], self.norms, strict=True):
            x = norm(gelu(layer(x)))  # in this order: the authors' code
        return self.layers[-1](x).view(2, *actions.shape[:-1])


class Actor(nn.Module):
    """pi(s) = argmax_{a_i} mean_j Q_j(s, a_i): a deterministic policy, since the candidates' noise is fixed."""

    noise: Tensor

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.policy = OneStepPolicy(observation_dim, action_dim, args)
        self.critic = Critic(observation_dim, action_dim, args)
        noise = torch.randn(args.num_acting_actions, 1, action_dim)  # [candidates, 1, action_dim]
        noise[0] = 0  # mu(s, 0) is the first
        self.register_buffer("noise", noise)

    def forward(self, observations: Tensor) -> Tensor:
        """The action: [batch, action_dim] in [-1, 1]."""
        noise = self.noise.expand(-1, observations.shape[0], -1)  # [candidates, batch, action_dim]
        candidates = self.policy(observations, noise).clamp(-1, 1)
        q = self.critic(observations, candidates).mean(dim=0)  # [candidates, batch]
        best = q.argmax(dim=0)[None, :, None].expand(-1, -1, candidates.shape[-1])  # [1, batch, action_dim]
        return candidates.gather(0, best)[0]


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor  # one-step policy and critic: acting needs both
    flow: Flow
    target_critic: Critic
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
    flow = Flow(observation_dim, action_dim, args).to(device)
    groups = [
        {"params": actor.policy.parameters(), "lr": args.actor_learning_rate},
        {"params": actor.critic.parameters(), "lr": args.critic_learning_rate},
        {"params": flow.parameters(), "lr": args.flow_learning_rate},
    ]
    target_critic = copy.deepcopy(actor.critic).requires_grad_(False)
    return Learner(actor, flow, target_critic, adam(groups))


# --- Losses ---------------------------------------------------------------------------------------------------------


def flow_loss(flow: Flow, batch: Batch, noise: Tensor, times: Tensor) -> tuple[Tensor, Metrics]:
    """L_flow = E[ (v(s, x, t) - (a - z))^2 ],  x = (1 - t) z + t a

    `noise` z [batch, action_dim] is standard normal, `times` t [batch, 1] are uniform in [0, 1].
    """
    x = (1 - times) * noise + times * batch.actions  # on the straight line from z to a
    velocity = batch.actions - noise  # which is the same all along it
    loss = (flow(batch.observations, x, times) - velocity).square().mean()  # over the action's dimensions, too
    return loss, {"flow/loss": loss.detach()}


def critic_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_Q = E[ sum_i (y - Q_i(s, a))^2 ],  y = r + gamma (1 - termination) mean_i Q'_i(s', clip(mu(s', z), -1, 1))

    `noise` z [batch, action_dim] is standard normal.
    """
    with torch.no_grad():
        next_actions = learner.actor.policy(batch.next_observations, noise).clamp(-1, 1)
        next_qs = learner.target_critic(batch.next_observations, next_actions)  # [2, batch]
        next_q = next_qs.mean(dim=0) if args.q_aggregation == "mean" else next_qs.min(dim=0).values  # [batch]
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_q  # a truncation bootstraps
    q = learner.actor.critic(batch.observations, batch.actions)  # [2, batch]
    loss = (target - q).square().mean(dim=1).sum()  # the mean over the batch, the sum over the twins
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


def actor_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_pi = E[ alpha (mu(s, z) - flow(s, z))^2 - lambda mean_i Q_i(s, clip(mu(s, z), -1, 1)) ]

    `noise` z [batch, action_dim] is standard normal.
    """
    with torch.no_grad():
        flow_actions = learner.flow.sample(batch.observations, noise)
    actions = learner.actor.policy(batch.observations, noise)
    distillation = (actions - flow_actions).square().mean()  # over the batch and the action's dimensions
    # Q with its weights held constant: the gradient passes through Q to the actions and changes no weight of Q itself.
    # functional_call runs a network with the weights it is given in place of its own.
    critic = learner.actor.critic
    constants = {name: weight.detach() for name, weight in critic.named_parameters()}
    q = functional_call(critic, constants, (batch.observations, actions.clamp(-1, 1))).mean(dim=0)  # [batch]
    lambda_ = 1 / q.detach().abs().mean() if args.normalize_q else 1.0  # a constant of the loss: no gradient
    loss = args.alpha * distillation - lambda_ * q.mean()
    metrics = {"actor/loss": loss.detach(), "actor/q": q.detach().mean(), "actor/distillation": distillation.detach()}
    return loss, metrics | {"actor/imitation": (actions.detach() - batch.actions).square().mean()}


# --- Update ---------------------------------------------------------------------------------------------------------


def total_loss(
    learner: Learner, batch: Batch, noise: Tensor, times: Tensor, args: HyperParameters
) -> tuple[Tensor, Metrics]:
    """L_flow + L_Q + L_pi. Each reaches the weights of its own network only, so one backward pass serves all."""
    loss_flow, metrics_flow = flow_loss(learner.flow, batch, noise[0], times)
    loss_pi, metrics_pi = actor_loss(learner, batch, noise[1], args)
    loss_q, metrics_q = critic_loss(learner, batch, noise[2], args)
    return loss_flow + loss_q + loss_pi, metrics_flow | metrics_q | metrics_pi


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of the three networks, then the target follows. `step` counts from 1."""
    actor, _, target_critic, optimizer = learner
    noise = torch.randn((3, *batch.actions.shape), device=batch.actions.device)
    times = torch.rand_like(batch.actions[:, :1])
    loss, metrics = total_loss(learner, batch, noise, times, args)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

    with torch.no_grad():  # target <- target + tau (network - target)
        torch._foreach_lerp_(list(target_critic.parameters()), list(actor.critic.parameters()), args.tau)
    return metrics


# === The copy line: what is above needs PyTorch alone; below are command line, data, run folder and evaluation ========

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, check_argument, launch
from common.data import ReplayBuffer, hold_out, load_dataset
from common.experiment import Run, set_up
from common.optim import Adam, compiled


@dataclass
class Args(HyperParameters, ExperimentArgs):
    reward_scale: float | Literal["return-range"] = 1.0  # multiplies rewards; return-range: their returns span 1,000
    reward_shift: float = 0.0  # added to rewards first (authors' code: -1 in D4RL's antmaze)
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
    run.threads = 1  # no trial of other numbers: where they divide a layer, its GELUs have other last bits
    for step in range(run.first_step, args.num_updates + 1):
        metrics = train(learner, Batch(*buffer.sample(args.batch_size)), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
