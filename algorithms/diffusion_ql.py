"""Diffusion Q-learning (Diffusion-QL): a diffusion model imitates the data, and Q's gradient draws its samples upwards.

A diffusion model learns to find the noise in a noisy action of the data. From noise alone it then makes an action, by
taking some noise away in each of T steps, so that it can hold any number of different actions at one state. T is small
enough for Q's gradient at that action to go back through all of the steps. With Q' and eps' the target networks, slow
copies of the critic and the model, z standard normal and t uniform in 1, ..., T:

    L_d   = E[ (eps(s, x, t) - z)^2 ],  x = sqrt(alpha_bar_t) a + sqrt(1 - alpha_bar_t) z
    L_pi  = -eta E[ Q_i(s, a_0) ] / E|Q_j(s, a_0)|,  (i, j) = (1, 2) or (2, 1) at random
    y     = r + gamma (1 - termination) min_i max_k Q'_i(s', a'_k)
    L_Q   = E[ sum_i (y - Q_i(s, a))^2 ]
    pi(s) = argmax_{a_k} min_i Q'_i(s, a_k)

where a_0 is one sample of the model, a_k are --num-acting-actions of them, and a'_k are --num-target-actions (by
default one) of its copy. Of the action's variance, x has the share alpha_bar_t = exp(-0.1 u - 4.95 u^2), u = t / T. A
sample begins with x_T, which is standard normal, as is every z_t; for t = T, ..., 1

    e_t     = clip((x_t - sqrt(1 - alpha_bar_t) eps(s, x_t, t)) / sqrt(alpha_bar_t), -1, 1)
    x_{t-1} = w e_t + v x_t + std z_t

of which the last, e_1, is the action. With its w, v and std, x_{t-1} is what x was before the t-th step of noise, if it
began as the action e_t and became x_t.

Paper: Wang, Hunt, Zhou, "Diffusion Policies as an Expressive Policy Class for Offline Reinforcement Learning", 2022,
arXiv 2208.06193.
Differences: the noise of the policy's samples is drawn once, at the start, and it takes the best of them, so that it is
a function of s; the authors draw anew at each step, and choose one with probabilities softmax(min_i Q'_i). The copy of
the model follows from the first update on, at each; theirs from the 1,000th, at every fifth, five times as fast. One
optimiser step trains critic and model, each loss seeing the other as it was before it (the authors train the critic
first). As in their code, and not in the paper, E|Q| is over samples, and std is as above, not sqrt(1 - alpha_bar_t /
alpha_bar_{t-1}). Their --lr-decay is left out: as they call it, once per evaluation, it takes 0.1 % off the rates in a
whole run. Gradients are shortened to one length for all tasks. Observations are normalised, which the authors do not
do.

Run: python algorithms/diffusion_ql.py --dataset-id anchorl/pendulum/mixed-v0
"""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import clip_grad_norm_

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (authors' code)
    eta: float = 1.0
    """weight of Q against imitation: 0 is cloning (authors' code in Gym; from 0.005 in kitchen to 4.5 in antmaze)"""
    diffusion_steps: int = 5  # T, from noise to an action (paper)
    num_target_actions: int = 1
    """samples at s', of which each twin's highest value is in y (authors' code: 10 in antmaze, but for umaze-v0)"""
    num_acting_actions: int = 50  # samples among which the policy takes the best (authors' code)
    gradient_clip: float = 5.0  # largest norm of each network's gradient (authors' code in Gym: 1 to 9, by dataset)
    tau: float = 0.005  # rate at which the target critic follows (authors' code)
    actor_tau: float = 0.001  # rate at which the copy of the model follows (authors' code: 0.005 every fifth update)
    actor_learning_rate: float = 3e-4  # of Adam (authors' code in Gym)
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


def mish(x: Tensor) -> Tensor:
    """x tanh(log(1 + e^x)), by one exponential: tanh(log(1 + e^x)) = n / (n + 2),  n = e^x (e^x + 2)

    Compiled for a CPU, PyTorch's own takes three times as long.
    """
    e = x.clamp(max=20).exp()  # from about 9 on, n / (n + 2) is rounded to 1
    n = e * (e + 2)
    return x * (n / (n + 2))


class Mish(nn.Module):
    """mish, as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return mish(x)


def mlp(input_dim: int, hidden_dims: tuple[int, ...], output_dim: int) -> list[nn.Module]:
    """Linear layers with Mish between them."""
    layers: list[nn.Module] = []
    for width in hidden_dims:
        layers += [nn.Linear(input_dim, width), Mish()]
        input_dim = width
    return [*layers, nn.Linear(input_dim, output_dim)]


def join(observations: Tensor, x: Tensor) -> Tensor:
    """Every x [..., batch, x_dim] beside its observation [batch, observation_dim], of which many x may share one."""
    return torch.cat([observations.expand(*x.shape[:-1], -1), x], dim=-1)


class Diffusion(nn.Module):
    """eps(s, x, t): the noise in x, a noisy action. Times t count from 0 here, so that they are indices."""

    sinusoids: Tensor
    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor
    w: Tensor
    v: Tensor
    std: Tensor

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.steps = args.diffusion_steps
        self.time_net = nn.Sequential(*mlp(16, (32,), 16))  # the authors' widths
        self.net = nn.Sequential(*mlp(observation_dim + action_dim + 16, args.hidden_dims, action_dim))

        times = torch.arange(self.steps)[:, None]
        angles = times * torch.exp(-math.log(10_000) * torch.arange(8) / 7)  # [steps, 8], from fast to slow
        sinusoids = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [steps, 16]

        u = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
        alpha_bars = torch.exp(-0.1 * u - 0.5 * (10 - 0.1) * u**2)  # alpha_bar_0, ..., alpha_bar_T
        before, alpha_bar = alpha_bars[:-1], alpha_bars[1:]  # at t - 1 and at t
        alpha = alpha_bar / before
        constants = {
            "sinusoids": sinusoids,
            "sqrt_alpha_bar": alpha_bar.sqrt(),  # [steps], as those that follow
            "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
            "w": before.sqrt() * (1 - alpha) / (1 - alpha_bar),
            "v": alpha.sqrt() * (1 - before) / (1 - alpha_bar),
            "std": ((1 - alpha) * (1 - before) / (1 - alpha_bar)).sqrt(),
        }
        for name, values in constants.items():
            self.register_buffer(name, values.to(torch.get_default_dtype()), persistent=False)

    def forward(self, observations: Tensor, x: Tensor, times: Tensor | int) -> Tensor:
        """The noise in x [..., batch, action_dim], at one of the times or at `times` [batch]: of the shape of x."""
        embedded = self.time_net(self.sinusoids[times]).expand(*x.shape[:-1], -1)
        return self.net(torch.cat([join(observations, x), embedded], dim=-1))

    def estimate(self, observations: Tensor, x: Tensor, t: int) -> Tensor:
        """The action that x [..., batch, action_dim] comes from, if the noise in it is as found."""
        noise = self(observations, x, t)
        return ((x - self.sqrt_one_minus_alpha_bar[t] * noise) / self.sqrt_alpha_bar[t]).clamp(-1, 1)

    def sample(self, observations: Tensor, noise: Tensor) -> Tensor:
        """An action [..., batch, action_dim] in [-1, 1]. `noise` [steps, ..., batch, action_dim] is standard normal."""
        x = noise[0]
        for t in range(self.steps - 1, 0, -1):
            x = self.w[t] * self.estimate(observations, x, t) + self.v[t] * x + self.std[t] * noise[t]
        return self.estimate(observations, x, 0)


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
        """Observations [batch, observation_dim], actions [..., batch, action_dim]: values [2, ..., batch]."""
        x = join(observations, actions).flatten(0, -2).expand(2, -1, -1)
        for layer in self.layers[:-1]:
            x = mish(layer(x))
        return self.layers[-1](x).view(2, *actions.shape[:-1])


class Actor(nn.Module):
    """pi(s) = argmax_{a_k} min_i Q'_i(s, a_k): a deterministic policy, since the noise of the samples a_k is fixed."""

    noise: Tensor

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.diffusion = Diffusion(observation_dim, action_dim, args)
        self.target_critic = Critic(observation_dim, action_dim, args)
        noise = torch.randn(args.diffusion_steps, args.num_acting_actions, 1, action_dim)
        self.register_buffer("noise", noise)  # [steps, samples, 1, action_dim]

    def forward(self, observations: Tensor) -> Tensor:
        """The action: [batch, action_dim] in [-1, 1]."""
        noise = self.noise.expand(-1, -1, observations.shape[0], -1)  # [steps, samples, batch, action_dim]
        samples = self.diffusion.sample(observations, noise)
        q = self.target_critic(observations, samples).amin(dim=0)  # [samples, batch], the more careful twin's
        best = q.argmax(dim=0)[None, :, None].expand(-1, -1, samples.shape[-1])  # [1, batch, action_dim]
        return samples.gather(0, best)[0]


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor  # diffusion model and target critic: acting needs both
    critic: Critic
    target_diffusion: Diffusion
    optimizer: Any


def build(
    observation_dim: int,
    action_dim: int,
    args: HyperParameters,
    device: torch.device | str = "cpu",
    adam: Any = torch.optim.Adam,
) -> Learner:
    """Fresh networks and their optimiser: one Adam with a parameter group per network, the diffusion model's first."""
    actor = Actor(observation_dim, action_dim, args).to(device)
    critic = copy.deepcopy(actor.target_critic)
    actor.target_critic.requires_grad_(False)
    groups = [
        {"params": actor.diffusion.parameters(), "lr": args.actor_learning_rate},
        {"params": critic.parameters(), "lr": args.critic_learning_rate},
    ]
    target_diffusion = copy.deepcopy(actor.diffusion).requires_grad_(False)
    return Learner(actor, critic, target_diffusion, adam(groups))


# --- Losses ---------------------------------------------------------------------------------------------------------


def diffusion_loss(diffusion: Diffusion, batch: Batch, noise: Tensor, times: Tensor) -> tuple[Tensor, Metrics]:
    """L_d = E[ (eps(s, x, t) - z)^2 ],  x = sqrt(alpha_bar_t) a + sqrt(1 - alpha_bar_t) z

    `noise` z [batch, action_dim] is standard normal, `times` t [batch] are uniform in 0, ..., steps - 1.
    """
    x = diffusion.sqrt_alpha_bar[times, None] * batch.actions + diffusion.sqrt_one_minus_alpha_bar[times, None] * noise
    loss = (diffusion(batch.observations, x, times) - noise).square().mean()  # over the action's dimensions, too
    return loss, {"diffusion/loss": loss.detach()}


def critic_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_Q = E[ sum_i (y - Q_i(s, a))^2 ],  y = r + gamma (1 - termination) min_i max_k Q'_i(s', a'_k)

    `noise` [steps, num_target_actions, batch, action_dim] is standard normal.
    """
    with torch.no_grad():
        next_actions = learner.target_diffusion.sample(batch.next_observations, noise)  # a'_k
        next_qs = learner.actor.target_critic(batch.next_observations, next_actions)  # [2, samples, batch]
        next_q = next_qs.amax(dim=1).amin(dim=0)  # [batch], of the more careful twin, its best sample
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_q  # a truncation bootstraps
    q = learner.critic(batch.observations, batch.actions)  # [2, batch]
    loss = (target - q).square().mean(dim=1).sum()  # the mean over the batch, the sum over the twins
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


def actor_loss(
    learner: Learner, batch: Batch, noise: Tensor, swapped: Tensor, args: HyperParameters
) -> tuple[Tensor, Metrics]:
    """L_pi = -eta E[ Q_i(s, a_0) ] / E|Q_j(s, a_0)|,  (i, j) = (1, 2), or (2, 1) where swapped

    `noise` [steps, batch, action_dim] is standard normal, `swapped` [] is a bool.
    """
    actions = learner.actor.diffusion.sample(batch.observations, noise)  # a_0
    # Q with its weights held constant: the gradient passes through Q to the actions and changes no weight of Q itself.
    # functional_call runs a network with the weights it is given in place of its own.
    constants = {name: weight.detach() for name, weight in learner.critic.named_parameters()}
    q = functional_call(learner.critic, constants, (batch.observations, actions))  # [2, batch]
    q_i, q_j = torch.where(swapped, q.flip(0), q)
    loss = -args.eta * q_i.mean() / q_j.detach().abs().mean()  # divided by a constant of the loss: no gradient
    return loss, {"actor/loss": loss.detach(), "actor/q": q.detach().mean()}


# --- Update ---------------------------------------------------------------------------------------------------------


def total_loss(
    learner: Learner, batch: Batch, noise: Tensor, times: Tensor, swapped: Tensor, args: HyperParameters
) -> tuple[Tensor, Metrics]:
    """L_d + L_pi + L_Q. Each reaches the weights of one network only, so one backward pass serves all three."""
    steps = args.diffusion_steps
    loss_d, metrics_d = diffusion_loss(learner.actor.diffusion, batch, noise[0], times)
    loss_pi, metrics_pi = actor_loss(learner, batch, noise[1 : 1 + steps], swapped, args)
    loss_q, metrics_q = critic_loss(learner, batch, noise[1 + steps :].unflatten(0, (steps, -1)), args)
    return loss_d + loss_pi + loss_q, metrics_d | metrics_pi | metrics_q


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of critic and diffusion model, then the targets follow. `step` counts from 1."""
    actor, critic, target_diffusion, optimizer = learner
    device, steps = batch.actions.device, args.diffusion_steps
    noise = torch.randn((1 + steps + steps * args.num_target_actions, *batch.actions.shape), device=device)
    times = torch.randint(steps, (len(batch.rewards),), device=device)
    swapped = torch.rand((), device=device) < 0.5
    loss, metrics = total_loss(learner, batch, noise, times, swapped, args)
    loss.backward()
    for network in (actor.diffusion, critic):
        clip_grad_norm_(network.parameters(), args.gradient_clip)
    optimizer.step()
    optimizer.zero_grad()

    with torch.no_grad():  # target <- target + tau (network - target)
        torch._foreach_lerp_(list(actor.target_critic.parameters()), list(critic.parameters()), args.tau)
        torch._foreach_lerp_(list(target_diffusion.parameters()), list(actor.diffusion.parameters()), args.actor_tau)
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
    reward_scale: float | Literal["return-range"] = 1.0
    """multiplies rewards (authors' code: 4 in antmaze); return-range: their returns span 1,000"""
    reward_shift: float = 0.0  # added to rewards first (authors' code: -0.5 in antmaze)
    normalize_observations: bool = True  # by the mean and standard deviation of the data

    def validate(self) -> None:
        super().validate()
        check_argument(self, "eta", self.eta >= 0, "must not be negative")
        check_argument(self, "gradient_clip", self.gradient_clip > 0, "must be positive")
        check_argument(self, "actor_tau", 0 < self.actor_tau <= 1, "must be in (0, 1]")


def main(args: Args) -> None:
    device = set_up(args)
    dataset = hold_out(load_dataset(args.dataset_id, args.env_id), args)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations)
    buffer.scale_rewards(args.reward_scale, args.reward_shift)

    learner = build(buffer.observation_dim, buffer.action_dim, args, device, Adam)
    train = compiled(update, learner, args)
    run = Run(args, buffer, learner, update)  # makes the run folder or, with --resume, goes back to its checkpoint
    run.threads = 1  # no trial of other numbers: where they divide a layer, its Mishes have other last bits
    for step in range(run.first_step, args.num_updates + 1):
        metrics = train(learner, Batch(*buffer.sample(args.batch_size)), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
