"""Model-based value expansion (MVE): TD3+BC whose targets are first unrolled some steps in a learned model.

An ensemble learns the dynamics from the data. A target follows the target actor pi' for H steps in that model before it
asks the target critic Q'. The critic's error then enters with weight gamma^H, and the model's errors take its place.
H = 0 is td3_bc.py. Here c = noise_clip, noise ~ Normal(0, policy_noise^2), and elites are the members best on held-out
data. After the data's s_-1, a_-1, r_-1, d_-1, s_0 come t = 0 .. H - 1, for each row of a batch in one elite k:

    a_t = pi'(s_t),  (s_{t+1} - s_t, r_t) = mean_k(s_t, a_t),  termination d_t by a rule, or its probability in k
    y_t = r_t + gamma (1 - d_t) y_{t+1},  y_H = min_i Q'_i(s_H, clip(pi'(s_H) + clip(noise, -c, c), -1, 1))
    L_Q = sum_t E[ reach_t sum_i (y_t - Q_i(s_t, a_t))^2 ] / (H + 1),  t = -1 .. H - 1,  reach_t = prod_{j<t} (1 - d_j)
    L_pi = E[ -lambda Q_1(s, pi(s)) + (pi(s) - a)^2 ],  lambda = alpha / E|Q_1(s, pi(s))|        (TD3+BC, eq. 3, 5)
    L_model = sum_k E[ ((z - mean_k) / std_k)^2 + 2 log std_k ] + cross-entropy of ends,  at x = (s, a), z = (s' - s, r)

The terms from t = 0 on, the TD-k trick, teach Q at the model's states, where y_H asks it. --expansion last has the term
t = -1 alone, undivided. So has steve, which mixes horizons. With T_hik the y_-1 of h steps by Q'_i in elite k:

    y   = sum_h w_h E_k[ min_i T_hik ],  w_h = 1 / Var_ik[T_hik] over their sum,  h = 0 .. H

Paper: Feinberg, Wan, Stoica, Jordan, Gonzalez, Levine, "Model-Based Value Expansion for Efficient Model-Free
Reinforcement Learning", 2018, arXiv 1803.00101; STEVE is 1807.01675, TD3+BC 2106.06860, MBPO, of the model, 1906.08253.
Differences: both are online, on DDPG; here TD3+BC holds pi, and with it rollouts, to the data, and smooths pi' where Q'
is asked. MVE has one network for s', knows r, ends no rollout, divides by H, and takes the later means over the rows
that the data did not end. STEVE has pi for pi', the mean of four critics for min_i, and each of four members' rewards
on each of four paths. Neither's model has a variance; rollouts here follow the means, too.

Run: python algorithms/mve.py --dataset-id anchorl/pendulum/mixed-v0
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, silu, softplus

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (TD3+BC)
    horizon: int = 3  # H, steps that a target unrolls the model; 0 is TD3+BC (STEVE: 3; MVE's code: 5)
    expansion: Literal["td_k", "last", "steve"] = "td_k"  # td_k: Q learns at the model's states, too (paper)
    num_models: int = 7  # members of the ensemble (MOPO; STEVE: 4, MVE: 1)
    num_elites: int = 5  # members that are used, the best on held-out data (MOPO)
    dynamics_hidden_dims: tuple[int, ...] = (200, 200, 200, 200)  # hidden layers of each member (MOPO)
    dynamics_learning_rate: float = 1e-3  # of Adam (MOPO)
    dynamics_batch_size: int = 256  # transitions per member and step (MOPO)
    dynamics_patience: int = 5  # epochs without 1% less held-out error after which a member is done (MBPO: all at once)
    max_dynamics_epochs: int = 200  # epochs at most (ours)
    alpha: float = 2.5  # weight of Q against imitation in L_pi: 0 is behaviour cloning (TD3+BC)
    policy_noise: float = 0.2  # standard deviation of the noise on the target actor's actions (TD3+BC)
    noise_clip: float = 0.5  # largest noise (TD3+BC)
    policy_every: int = 2  # critic updates per update of the actor and the target networks (TD3+BC)
    tau: float = 0.005  # rate at which the target networks follow (TD3+BC)
    actor_learning_rate: float = 3e-4  # of Adam (TD3+BC)
    critic_learning_rate: float = 3e-4  # of Adam (TD3+BC)
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of every network (TD3+BC)


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


class Actor(nn.Module):
    """pi(s): a deterministic policy."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.net = nn.Sequential(*mlp(observation_dim, args.hidden_dims, action_dim), nn.Tanh())

    def forward(self, observations: Tensor) -> Tensor:
        """The action: [batch, action_dim] in [-1, 1]."""
        return self.net(observations)


class EnsembleLinear(nn.Module):
    """Linear layers side by side: one batched product, [members, batch, in] -> [members, batch, out]."""

    def __init__(self, members: int, input_dim: int, output_dim: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(input_dim)  # nn.Linear's own initialisation
        self.weight = nn.Parameter(torch.empty(members, input_dim, output_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, output_dim).uniform_(-bound, bound))

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) == 1:  # the first alone
            return torch.baddbmm(self.bias[:1], inputs, self.weight[:1])
        if self.weight.shape[-1] == 1:  # one output: as a matrix product it takes four times as long
            return torch.linalg.vecdot(inputs, self.weight.mT).unsqueeze(-1) + self.bias
        return torch.baddbmm(self.bias, inputs, self.weight)


class Critic(nn.Module):
    """Q_1(s, a) and Q_2(s, a): twins, trained on the same target from different initial weights."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        widths = [observation_dim + action_dim, *args.hidden_dims, 1]
        self.layers = nn.ModuleList(EnsembleLinear(2, *pair) for pair in pairwise(widths))

    def forward(self, observations: Tensor, actions: Tensor, twins: int = 2) -> Tensor:
        x = torch.cat([observations, actions], dim=-1).expand(twins, -1, -1)
        for layer in self.layers[:-1]:
            x = torch.relu_(layer(x))
        return self.layers[-1](x).squeeze(-1)  # [twins, batch]


class Dynamics(nn.Module):
    """p_k(s' - s, r | s, a) of each member k, and the logit of its termination."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.sizes = observation_dim + 1, observation_dim + 1, 1  # mean, log-variance, logit
        widths = [observation_dim + action_dim, *args.dynamics_hidden_dims, sum(self.sizes)]
        self.layers = nn.ModuleList(EnsembleLinear(args.num_models, *pair) for pair in pairwise(widths))
        self.max_log_variance = nn.Parameter(torch.full((args.num_models, 1, self.sizes[0]), 0.5))
        self.min_log_variance = nn.Parameter(torch.full((args.num_models, 1, self.sizes[0]), -10.0))
        self.x_scale = nn.Buffer(torch.tensor([[0.0], [1.0]]).repeat(1, widths[0]))  # mean and standard deviation
        self.z_scale = nn.Buffer(torch.tensor([[0.0], [1.0]]).repeat(1, self.sizes[0]))
        self.holdout_error = nn.Buffer(torch.full((args.num_models,), 1e30))  # the least so far
        self.best_epoch = nn.Buffer(torch.zeros(args.num_models, dtype=torch.long))  # when it was the least
        self.epoch = nn.Buffer(torch.zeros((), dtype=torch.long))  # trained so far

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x = (s, a) [members, batch, in] -> mean and log-variance of normalised z = (s' - s, r), logit of the end."""
        x = (x - self.x_scale[0]) / self.x_scale[1]
        for layer in self.layers[:-1]:
            x = silu(layer(x))
        mean, log_variance, logit = self.layers[-1](x).split(self.sizes, dim=-1)
        upper = torch.maximum(self.max_log_variance, self.min_log_variance)  # however far they are drawn together
        log_variance = upper - softplus(upper - log_variance)  # softly between bounds
        log_variance = self.min_log_variance + softplus(log_variance - self.min_log_variance)  # that are learned, too
        return mean, log_variance, logit.squeeze(-1)

    def predict(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation of (s' - s, r) as the data have them, and the logit of termination."""
        x = torch.cat([observations, actions], dim=-1).expand(len(self.max_log_variance), -1, -1)
        mean, log_variance, logit = self(x)
        mean = mean.clamp(-100, 100)  # standard deviations of the data's: a rollout gone astray stays finite
        return self.z_scale[0] + self.z_scale[1] * mean, self.z_scale[1] * torch.exp(0.5 * log_variance), logit

    def elites(self, count: int) -> "Dynamics":
        """The `count` members of least error on held-out data as an ensemble of their own."""
        ensemble = copy.deepcopy(self).requires_grad_(False)
        for parameter in ensemble.parameters():
            parameter.data = parameter.data[self.holdout_error.argsort()[:count]]
        return ensemble


class Model(nn.Module):
    """What targets are unrolled in: the elites, and what ends an episode."""

    def __init__(self, dynamics: Dynamics, observation_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.elites, self.ending = dynamics.elites(args.num_elites), "learned"  # or a key of TERMINATION_RULES
        self.scale = nn.Buffer(torch.tensor([[0.0], [1.0]]).double().repeat(1, observation_dim))

    def take(self, dynamics: Dynamics, scale: Tensor, ending: str) -> None:
        """Takes over the elites of trained members. `scale`: mean and deviation of states."""
        self.elites.load_state_dict(dynamics.elites(len(self.elites.max_log_variance)).state_dict())
        self.scale.copy_(scale)
        self.ending = ending


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor
    critic: Critic
    target_actor: Actor
    target_critic: Critic
    model: Model
    dynamics: Dynamics  # each member as it was when its error on held-out data was least
    training_dynamics: Dynamics
    dynamics_optimizer: Any
    optimizer: Any


def build(
    observation_dim: int, action_dim: int, args: HyperParameters, device: Any = "cpu", adam: Any = torch.optim.Adam
) -> Learner:
    """Fresh networks and their optimisers, with a parameter group per network, the actor's first, or per layer."""
    sizes = observation_dim, action_dim, args
    actor, critic, dynamics = Actor(*sizes).to(device), Critic(*sizes).to(device), Dynamics(*sizes).to(device)
    groups = [{"params": actor.parameters(), "lr": args.actor_learning_rate}]
    groups.append({"params": critic.parameters(), "lr": args.critic_learning_rate})
    layers, bounds = dynamics.layers, [dynamics.max_log_variance, dynamics.min_log_variance]
    decays = [*[2.5e-5, 5e-5, *[7.5e-5] * len(layers)][: len(layers) - 1], 1e-4]  # first to last layer (MBPO)
    groups_d = [{"params": [layer.weight], "weight_decay": d} for layer, d in zip(layers, decays, strict=True)]
    groups_d.append({"params": [*(layer.bias for layer in layers), *bounds]})
    best, target_critic = copy.deepcopy(dynamics).requires_grad_(False), copy.deepcopy(critic).requires_grad_(False)
    target_actor = copy.deepcopy(actor).requires_grad_(False)
    model = Model(best, observation_dim, args).to(device)
    optimizers = adam(groups_d, args.dynamics_learning_rate), adam(groups)
    return Learner(actor, critic, target_actor, target_critic, model, best, dynamics, *optimizers)


# --- Dynamics -------------------------------------------------------------------------------------------------------


def dynamics_loss(dynamics: Dynamics, x: Tensor, z: Tensor, terminations: Tensor) -> tuple[Tensor, Metrics]:
    """L_model = sum_k E[ (z - mean_k)^2 / variance_k + log variance_k ] + cross-entropy of terminations
    All are [members, batch, ...]; z is normalised here. The bounds of the variance attract each other (MBPO)."""
    mean, log_variance, logit = dynamics(x)
    known, z = z.isfinite(), (z.nan_to_num() - dynamics.z_scale[0]) / dynamics.z_scale[1]  # NaN: a log lacks s' there
    nll = (z - mean).square() * torch.exp(-log_variance) + log_variance  # [members, batch, numbers of s' and r]
    nll = (nll * known).mean(dim=(1, 2))
    ends = binary_cross_entropy_with_logits(logit, terminations, reduction="none").mean(dim=1)  # [members]
    bounds = 0.01 * (dynamics.max_log_variance - dynamics.min_log_variance).relu().mean(dim=0).sum()  # as if shared
    return (nll + ends).sum() + bounds, {"dynamics/nll": nll.detach().mean(), "dynamics/ends": ends.detach().mean()}


def dynamics_update(learner: Learner, x: Tensor, z: Tensor, terminations: Tensor) -> Metrics:
    """One gradient step of all members, each on its own transitions."""
    loss, metrics = dynamics_loss(learner.training_dynamics, x, z, terminations)
    loss.backward()
    learner.dynamics_optimizer.step()
    learner.dynamics_optimizer.zero_grad()
    return metrics


@torch.no_grad()
def keep_better(best: Dynamics, training: Dynamics, x: Tensor, z: Tensor, patience: int) -> Metrics:
    """After an epoch: `best` takes the members that are better on held-out x, z. Gives all mean squared errors."""
    z = (z - training.z_scale[0]) / training.z_scale[1]
    error = (training(x.expand(len(best.holdout_error), -1, -1))[0] - z).square().nanmean(dim=(1, 2))
    best.epoch.add_(1)
    better = (error < 0.99 * best.holdout_error) & (best.epoch <= best.best_epoch + patience)  # by 1%, and not done
    for kept, new in zip(best.parameters(), training.parameters(), strict=True):
        kept[better] = new[better]
    best.holdout_error[better], best.best_epoch[better] = error[better], best.epoch
    return {f"dynamics/holdout_mse_{member}": value for member, value in enumerate(error)}


def forecast_errors(elites: Dynamics, data: Batch, rows: Tensor) -> Metrics:
    """Root mean squared errors at `rows`, of s' in standard deviations of the data and of r; and of naive forecasts."""
    known = (data.terminations[rows] == 0) | (data.next_observations[rows] != data.observations[rows]).any(dim=1)
    s, a, r, next_s, _ = (column[rows[known]] for column in data)
    mean, scale = elites.predict(s, a)[0].mean(dim=0), data.observations.std(dim=0) + 1e-3
    errors = {"error": (s + mean[:, :-1] - next_s) / scale, "error_nothing_changes": (s - next_s) / scale}
    errors |= {"reward_error": mean[:, -1] - r, "reward_error_mean": data.rewards.mean() - r}
    return {f"dynamics/{name}": (error.square().sum() / max(1, error.numel())).sqrt() for name, error in errors.items()}


def fit_dynamics(learner: Learner, data: Batch, args: HyperParameters, train: Any = dynamics_update) -> Iterator:
    """Trains until every member is done; yields each epoch's metrics. Held out: a fifth, at most 1,000 transitions."""
    x = torch.cat([data.observations, data.actions], dim=1)
    z = torch.cat([data.next_observations - data.observations, data.rewards.unsqueeze(1)], dim=1)
    best, training = learner.dynamics, learner.training_dynamics
    for model in (best, training):
        model.x_scale.copy_(torch.stack([x.mean(dim=0), (std := x.std(dim=0)).where(std > 1e-6, 1)]))  # 1 if all equal
        model.z_scale.copy_(torch.stack([z.mean(dim=0), z.std(dim=0) + 1e-6]))
    z[:, :-1].masked_fill_(((data.terminations == 1) & (z[:, :-1] == 0).all(dim=1)).unsqueeze(1), math.nan)  # no s'
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(torch.initial_seed())).to(x.device)
    held_out, rows = rows.tensor_split([min(math.ceil(len(x) / 5), 1000)])
    while best.epoch < min(args.max_dynamics_epochs, int(best.best_epoch.max()) + args.dynamics_patience):
        losses = []
        for _ in range(math.ceil(len(rows) / args.dynamics_batch_size)):
            chosen = rows[torch.randint(len(rows), (args.num_models, args.dynamics_batch_size), device=x.device)]
            metrics = train(learner, x[chosen], z[chosen], data.terminations[chosen])
            losses.append(torch.stack(list(metrics.values())))  # a copy: the next update may overwrite its metrics
        errors = keep_better(best, training, x[held_out], z[held_out], args.dynamics_patience)
        means = dict(zip(metrics, torch.stack(losses).mean(dim=0), strict=True))
        yield means | errors | forecast_errors(best.elites(args.num_elites), data, held_out)


# which states s [N, observation_dim], as the environment has them, end an episode: by the environment's documentation
TERMINATION_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "Hopper": lambda s: ~((s[:, 0] > 0.7) & (s[:, 1].abs() < 0.2) & (s[:, 1:].abs() < 100).all(dim=1)),
    "Walker2d": lambda s: ~((s[:, 0] > 0.8) & (s[:, 0] < 2) & (s[:, 1].abs() < 1)),
    "Ant": lambda s: ~((s[:, 0] >= 0.2) & (s[:, 0] <= 1) & s.isfinite().all(dim=1)),
    **dict.fromkeys(("HalfCheetah", "Pendulum", "never"), lambda s: torch.zeros_like(s[:, 0], dtype=torch.bool)),
}


def model_step(model: Model, observations: Tensor, actions: Tensor, member: Tensor | None) -> Batch:
    """The means of one transition: of each row's `member` or, if that is None, of all elites, [elites, batch, ...]."""
    mean, _, logit = model.elites.predict(observations, actions)  # of each elite's own states, or of the same for all
    if member is not None:
        rows = torch.arange(len(member), device=member.device)
        mean, logit = mean[member, rows], logit[member, rows]
    next_observations = observations + mean[..., :-1]
    rule = TERMINATION_RULES.get(model.ending, lambda _: torch.sigmoid(logit))  # else learned
    states = (model.scale[0] + model.scale[1] * next_observations).flatten(0, -2)  # as the environment has them
    terminations = rule(states).view_as(logit).to(logit.dtype)
    return Batch(observations, actions, mean[..., -1], next_observations, terminations)


def unroll(learner: Learner, batch: Batch, member: Tensor | None, args: HyperParameters) -> list[Batch]:
    """The data's transitions, and those of pi' in the model that follow: t = -1 .. H - 1."""
    steps = [batch]
    for _ in range(args.horizon):
        observations = steps[-1].next_observations
        steps.append(model_step(learner.model, observations, learner.target_actor(observations), member))
    return steps


# --- Losses ---------------------------------------------------------------------------------------------------------


def target_q(learner: Learner, observations: Tensor, noise: Tensor, args: HyperParameters) -> Tensor:
    """Q'_i(s, clip(pi'(s) + clip(noise, -c, c), -1, 1)), [2, ..., batch], of a standard normal `noise`."""
    clipped_noise = (noise * args.policy_noise).clamp(-args.noise_clip, args.noise_clip)
    actions = (learner.target_actor(observations) + clipped_noise).clamp(-1, 1)  # smoothed
    return learner.target_critic(observations.flatten(0, -2), actions.flatten(0, -2)).view(2, *actions.shape[:-1])


def back_up(steps: list[Batch], value: Tensor, gamma: float) -> list[Tensor]:
    """y_t = r_t + gamma (1 - d_t) y_{t+1} of each step, from the `value` after the last one."""
    targets = []
    for step in reversed(steps):
        value = step.rewards + gamma * (1 - step.terminations) * value  # a truncation bootstraps
        targets.append(value)
    return targets[::-1]


def weigh(candidates: list[Tensor]) -> tuple[Tensor, Tensor]:
    """sum_h w_h E_k[ min_i T_h,ik ], [batch], and w_h = 1 / Var_ik[ T_h,ik ] over their sum, [H + 1, batch]

    A candidate T_h is [2, elites, batch]; that of h = 0, the same in all elites, is [2, batch].
    """
    columns = [candidate.view(2, -1, candidate.shape[-1]) for candidate in candidates]
    means = torch.stack([column.amin(dim=0).mean(dim=0) for column in columns])
    variances = torch.stack([column.var(dim=(0, 1), correction=0) for column in columns])  # 0 where an episode ended
    weights = 1 / (variances + 1e-8) / (1 / (variances + 1e-8)).sum(dim=0)  # 1e-8: as the authors' code
    return (weights * means).sum(dim=0), weights


@torch.no_grad()
def expand(learner: Learner, batch: Batch, noise: Tensor, member: Tensor | None, args: HyperParameters) -> tuple:
    """The steps at which Q learns, t = -1 and perhaps 0 .. H - 1, a list of Batch; their y_t, [batch]; metrics."""
    steps = unroll(learner, batch, member, args)
    if args.expansion == "steve":
        values = [target_q(learner, step.next_observations, noise, args) for step in steps]
        target, weights = weigh([back_up(steps[: h + 1], q, args.gamma)[0] for h, q in enumerate(values)])
        return steps[:1], [target], {f"expansion/weight_{h}": weight.mean() for h, weight in enumerate(weights)}
    value = target_q(learner, steps[-1].next_observations, noise, args).min(dim=0).values  # y_H
    count = len(steps) if args.expansion == "td_k" else 1
    return steps[:count], back_up(steps, value, args.gamma)[:count], {}


def critic_loss(learner: Learner, batch: Batch, noise: Tensor, member: Tensor | None, args: HyperParameters) -> tuple:
    """L_Q = sum_t E[ reach_t sum_i (y_t - Q_i(s_t, a_t))^2 ] / (H + 1), t = -1 .. H - 1, or t = -1 alone, undivided"""
    steps, targets, metrics = expand(learner, batch, noise, member, args)
    going_on = torch.stack([torch.ones_like(batch.rewards), *(1 - step.terminations for step in steps[:-1])])
    reach = going_on.cumprod(dim=0).flatten()  # the probability that the episode has not ended before the step
    observations, actions = (torch.cat(column) for column in list(zip(*steps, strict=True))[:2])
    q = learner.critic(observations, actions)  # [2, steps * batch]
    loss = (reach * (torch.cat(targets) - q).square()).mean(dim=1).sum()  # the sum over the twins
    q_data = q.detach()[:, : len(batch.rewards)].mean()
    return loss, metrics | {"critic/loss": loss.detach(), "critic/q": q_data, "critic/target": targets[0].mean()}


def actor_loss(learner: Learner, batch: Batch, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_pi = E[ -lambda Q_1(s, pi(s)) + (pi(s) - a)^2 ],  lambda = alpha / E|Q_1(s, pi(s))|        (eq. 3, 5)"""
    actions = learner.actor(batch.observations)
    q = learner.critic(batch.observations, actions, twins=1)  # Q_1 alone
    lambda_ = args.alpha / q.detach().abs().mean()  # a constant of the loss: no gradient
    imitation = (actions - batch.actions).square().mean()  # over the batch and the action's dimensions
    loss = -lambda_ * q.mean() + imitation
    return loss, {"actor/loss": loss.detach(), "actor/q": q.detach().mean(), "actor/imitation": imitation.detach()}


# --- Update ---------------------------------------------------------------------------------------------------------


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of the critic; every `policy_every`-th, also of actor and targets. `step` counts from 1."""
    actor, critic, target_actor, target_critic, *_, optimizer = learner
    noise, member = torch.randn_like(batch.actions), None  # [batch, action_dim]; [batch], a number of the elites
    if args.horizon > 0 and args.expansion != "steve":  # each row follows one elite, of STEVE all
        member = torch.randint(args.num_elites, batch.rewards.shape, device=noise.device)
    loss, metrics = critic_loss(learner, batch, noise, member, args)
    loss.backward()
    optimizer.step()  # the actor has no gradient, so Adam passes it over
    optimizer.zero_grad()

    if step % args.policy_every == 0:
        loss, metrics_pi = actor_loss(learner, batch, args)
        loss.backward(inputs=list(actor.parameters()))  # through the critic, but not into it
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # target <- target + tau (network - target)
            torch._foreach_lerp_(list(target_actor.parameters()), list(actor.parameters()), args.tau)
            torch._foreach_lerp_(list(target_critic.parameters()), list(critic.parameters()), args.tau)
        metrics |= metrics_pi
    return metrics


# === The copy line: what is above needs PyTorch alone; below are command line, data, run folder and evaluation ========

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, check, check_argument, explain, launch, warn
from common.data import ReplayBuffer, hold_out, load_dataset
from common.experiment import Run, load_file, set_up
from common.optim import Adam, compiled


@dataclass
class Args(HyperParameters, ExperimentArgs):
    termination: Literal["auto", "rule", "learned", "never"] = "auto"  # what ends a rollout; auto: a rule that holds
    dynamics: str | None = None  # folder of an earlier run on the same data, whose model to take
    reward_scale: float | Literal["return-range"] = 1.0  # multiplies rewards; return-range: their returns span 1,000
    reward_shift: float = 0.0  # added to rewards first
    normalize_observations: bool = True  # by the mean and standard deviation of the data (TD3+BC)

    def validate(self) -> None:
        ExperimentArgs.validate(replace(self, horizon=max(self.horizon, 1)))  # whose rule for whole numbers forbids 0
        for name in ("horizon", "alpha", "policy_noise", "noise_clip"):
            check_argument(self, name, getattr(self, name) >= 0, "must not be negative")
        check_argument(self, "num_elites", 1 <= self.num_elites <= self.num_models, "must be in [1, --num-models]")


def load_dynamics(args: Args, buffer: ReplayBuffer, learner: Learner) -> None:
    """Takes the model of the run in --dynamics. Raises BadInput if it does not suit this one."""
    with explain(f"--dynamics {args.dynamics}"):
        saved = load_file(Path(args.dynamics or "", "checkpoint.pt"), buffer.storage.device)
        check(saved["dataset_fingerprint"] == buffer.fingerprint, f"was trained on other data than {args.dataset_id}")
        check(saved["step"] and saved["learner"].get("dynamics", {}).get("epoch"), "has no finished model; finish it")
        check(len(saved["learner"].get("player", {}).get("added", ())) == 0, "has a model of steps that it played, too")
        for name in ("normalize_observations", "reward_scale", "reward_shift"):
            check(saved["arguments"][name] == getattr(args, name), f"has another {name}: {saved['arguments'][name]}")
        learner.dynamics.load_state_dict(saved["learner"]["dynamics"])


def ending_of(args: Args, buffer: ReplayBuffer) -> str:
    """What ends a rollout: a key of TERMINATION_RULES or "learned", also in place of a rule that data contradict."""
    name, forced = (buffer.dataset.env_id or "").split("-")[0], args.termination == "rule"  # Hopper of Hopper-v5
    check_argument(args, "termination", name in TERMINATION_RULES or not forced, "none is known; take learned or never")
    if args.termination in ("learned", "never") or name not in TERMINATION_RULES:
        return "never" if args.termination == "never" else "learned"
    missed, false = 0, 0
    for s, _, _, next_s, ended in zip(*(column.split(100_000) for column in buffer.transitions), strict=True):
        ends = TERMINATION_RULES[name](buffer.normalization[0] + buffer.normalization[1] * next_s)
        missed += int((~ends & (ended == 1) & (next_s != s).any(dim=1)).sum())  # where s' is s, it may not be known
        false += int((ends & (ended == 0)).sum())
    if missed + false <= min(5, len(buffer.storage) / 1000):  # float32 may round a state past a threshold
        return name
    found = f"the rule for the ends of {name} misses {missed:,} ends in {len(buffer.storage):,} transitions"
    then = "used all the same" if forced else "replaced by a learned one; --termination rule uses it all the same"
    warn(f"{found} of the data, and would end {false:,} that went on; it is {then}")
    return name if forced else "learned"


def main(args: Args) -> None:
    device = set_up(args)
    dataset = hold_out(load_dataset(args.dataset_id, args.env_id), args)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations)
    check(len(buffer.storage) > 1, f"{args.dataset_id}: one transition is too few to train a model and test it")
    ending = ending_of(args, buffer)
    buffer.scale_rewards(args.reward_scale, args.reward_shift)

    learner = build(buffer.observation_dim, buffer.action_dim, args, device, Adam)
    if args.dynamics is not None and not args.resume:  # else the checkpoint has it
        load_dynamics(args, buffer, learner)
    train, train_dynamics = (compiled(each, learner, args) for each in (update, dynamics_update))
    run = Run(args, buffer, learner, update)  # makes the run folder or, with --resume, goes back to its checkpoint
    print(f"terminations in the model: {ending}", flush=True)
    if args.dynamics is None and args.horizon:
        for metrics in fit_dynamics(learner, Batch(*buffer.transitions), args, train_dynamics):
            run.log(0, {"dynamics/epoch": learner.dynamics.epoch} | metrics)
            run.save_checkpoint()
            run.progress.set_postfix_str(f"dynamics epoch {int(learner.dynamics.epoch)}")
    learner.model.take(learner.dynamics, buffer.normalization, ending)
    for step in range(run.first_step, args.num_updates + 1):
        metrics = train(learner, Batch(*buffer.sample(args.batch_size)), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
