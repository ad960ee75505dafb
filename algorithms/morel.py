"""Model-based offline reinforcement learning (MOReL): practise in a learned model that stops where it is not known.

An ensemble learns the dynamics from the data. SAC learns from short rollouts of the policy in it, from states of the
data. Where two members foretell too different states, (s, a) is unknown: after its reward comes HALT, never left, which
pays -kappa a step: the return is to be a lower bound. With x = (s, a), z = (s' - s, r), SAC's entropy `temperature`:

    p_k(z|x) = Normal(mean_k, std_k), L_model = sum_k E[ ((z - mean_k)/std_k)^2 + 2 log std_k ] + cross-entropy of ends
    disc(s, a) = max_ij |f_i(s, a) - f_j(s, a)|,  f_k: mean_k(x)'s part of s';  unknown: > threshold max_data disc
    V(HALT) = -kappa / (1 - gamma),  -kappa = min(0, min_data r) - halt_penalty
    r~      = r + gamma V(HALT) and termination = 1 where unknown, else r,  (s', r) drawn from one of the elites
    y       = r~ + gamma (1 - termination) (min_i Q'_i(s', a') - temperature log pi(a'|s')),  a' ~ pi(.|s')
    L_Q     = E[ sum_i (y - Q_i(s, a))^2 ]
    L_pi    = E[ temperature log pi(a_pi | s) - min_i Q_i(s, a_pi) ],  a_pi ~ pi(.|s), differentiable
    L_temperature = E[ -temperature (log pi(a_pi | s) + target entropy) ]

Paper: Kidambi, Rajeswaran, Netrapalli, Joachims, "MOReL: Model-Based Offline Reinforcement Learning", 2020,
arXiv 2005.05951; the model is that of MBPO, arXiv 1906.08253; SAC is arXiv 1812.05905.
Differences: the authors plan by natural policy gradients, on rollouts of 500 or 700 steps from first states, each in
one member, from a cloned policy; SAC has short ones here, bootstraps where they end, and starts at random. kappa is
R_max in theory. V(HALT) has no entropy, so it does not bound SAC's values. Where unknown, their code pays r +
truncate_reward (0 in its settings) and cuts the rollout; advantages bootstrap there. It has four networks of 2 x 512,
no variances, known rewards, and in disc velocities times 0.02; here disc is of the elites, of the scaled s'.

Run: python algorithms/morel.py --dataset-id anchorl/pendulum/mixed-v0
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits, silu, softplus

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount, below 1 (authors' code: 0.999)
    threshold: float = 1.0  # disc above which (s, a) is unknown, by the data's largest (authors' code: 2 or 1/3)
    halt_penalty: float = 0.0  # what a step in HALT pays below the lower of 0 and the data's least reward (ours)
    rollout_length: int = 20  # steps of a rollout, h (tried here; MOPO: 1 or 5; authors' code: 500 or 700)
    rollout_batch_size: int = 10_000  # rollouts at a time, each from a state of the data (MOPO's code: 50,000)
    rollout_every: int = 1_000  # updates between rollouts with the newest policy (MOPO's code)
    rollouts_kept: int = 5  # calls of rollouts that the model's buffer holds, more if some end early (MOPO's code)
    num_models: int = 7  # members of the ensemble (MOPO; authors' code: 4)
    num_elites: int = 5  # members that are used, the best on held-out data (MOPO)
    dynamics_hidden_dims: tuple[int, ...] = (200, 200, 200, 200)  # hidden layers of each member (MOPO)
    dynamics_learning_rate: float = 1e-3  # of Adam (authors' code)
    dynamics_batch_size: int = 256  # transitions per member and step (authors' code)
    dynamics_patience: int = 5  # epochs without 1% less held-out error after which a member is done (MBPO: all at once)
    max_dynamics_epochs: int = 200  # epochs at most (ours)
    target_entropy: float | None = None  # temperature holds pi's entropy to it; default: -action_dim (SAC)
    tau: float = 0.005  # rate at which the target critic follows the critic (MOPO's code)
    actor_learning_rate: float = 3e-4  # of Adam, for the actor and the temperature (MOPO's code)
    critic_learning_rate: float = 3e-4  # of Adam (MOPO's code)
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of actor and critics (MOPO's code)


class Batch(NamedTuple):
    """Transitions, in float32."""

    observations: Tensor  # [batch, observation_dim], normalised
    actions: Tensor  # [batch, action_dim] in [-1, 1]
    rewards: Tensor  # [batch]
    next_observations: Tensor  # [batch, observation_dim], normalised
    terminations: Tensor  # [batch], 1 where the environment ended the episode; a truncation bootstraps


# --- Networks -------------------------------------------------------------------------------------------------------


class Actor(nn.Module):
    """pi(a | s): a = tanh(u), u ~ Normal(mean(s), std(s))."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        widths = [observation_dim, *args.hidden_dims]
        hidden = [layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU(inplace=True))]
        self.trunk, self.mean = nn.Sequential(*hidden), nn.Linear(widths[-1], action_dim)
        self.log_std = nn.Linear(args.hidden_dims[-1], action_dim)  # a second head on the last hidden layer
        self.log_temperature = nn.Parameter(torch.zeros(()))  # of SAC's entropy coefficient, trained beside pi

    def forward(self, observations: Tensor) -> Tensor:
        """The deterministic policy tanh(mean): [batch, action_dim] in [-1, 1]."""
        return self.mean(self.trunk(observations)).tanh()

    def sample(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions tanh(mean + std noise), [batch, action_dim], of a standard normal `noise`; log pi(a | s), [batch]."""
        hidden = self.trunk(observations)
        log_std = self.log_std(hidden).clamp(-5, 2)  # CQL's range; SAC's begins at -20
        u = self.mean(hidden) + log_std.exp() * noise
        log_normal = -(0.5 * noise.square() + log_std + 0.5 * math.log(2 * math.pi))
        log_slope = 2 * (math.log(2) - u.abs() - (-2 * u.abs()).exp().log1p())  # log(1 - tanh(u)^2), never log 0
        return u.tanh(), (log_normal - log_slope).sum(dim=-1)


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


class ModelBuffer(dict[str, Tensor]):
    """The newest transitions of the model: the columns of a Batch, by name, and how many were ever "added"."""

    def add(self, transitions: Batch, capacity: int) -> None:
        added = int(self.get("added", 0))
        rows = torch.arange(added, added + len(transitions.rewards), device=transitions.rewards.device) % capacity
        for name, new in transitions._asdict().items():
            self.setdefault(name, new.new_zeros(capacity, *new.shape[1:]))[rows] = new
        self["added"] = torch.tensor(added + len(rows))

    def sample(self, count: int) -> Batch:
        rows = torch.randint(min(int(self["added"]), len(self["rewards"])), (count,), device=self["rewards"].device)
        return Batch(*(self[name][rows] for name in Batch._fields))  # uniformly, with replacement

    state_dict, load_state_dict = dict.copy, dict.update  # for checkpoints


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor
    critic: Critic
    target_critic: Critic
    dynamics: Dynamics  # each member as it was when its error on held-out data was least
    training_dynamics: Dynamics
    model_buffer: ModelBuffer
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
    optimizers = adam(groups_d, args.dynamics_learning_rate), adam(groups)
    return Learner(actor, critic, target_critic, best, dynamics, ModelBuffer(), *optimizers)


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


def discrepancy(mean: Tensor) -> Tensor:
    """disc(s, a) = max_ij |f_i(s, a) - f_j(s, a)|, [batch], by the elites' mean of (s' - s, r) [elites, batch, out]."""
    return (mean.unsqueeze(1) - mean)[..., :-1].norm(dim=-1).amax(dim=(0, 1))  # s is the same for all, r is left out


def find_halt(elites: Dynamics, data: Batch, args: HyperParameters) -> Tensor:
    """By the whole of the data: disc above which (s, a) is unknown, and V(HALT)."""
    pieces = zip(data.observations.split(2_000), data.actions.split(2_000), strict=True)
    largest = torch.stack([discrepancy(elites.predict(*piece)[0]).amax() for piece in pieces]).amax()
    kappa = args.halt_penalty - data.rewards.amin().clamp(max=0)  # an end is worth 0: HALT is not to be worth more
    return torch.stack([args.threshold * largest, -kappa / (1 - args.gamma)])


def model_step(
    elites: Dynamics, observations: Tensor, actions: Tensor, scale: Tensor, ending: str, halt: Tensor, gamma: float
) -> tuple[Batch, Tensor]:
    """One transition of a random member from each state, or HALT; and disc. `scale`: mean, deviation of states."""
    mean, std, logit = elites.predict(observations, actions)
    disc, rows = discrepancy(mean), torch.arange(len(observations), device=observations.device)
    member = torch.randint(len(mean), (len(rows),), device=rows.device)
    z = mean[member, rows] + std[member, rows] * torch.randn_like(mean[0])
    next_observations = observations + z[:, :-1]
    unknown = ~(disc <= halt[0])  # NaN is unknown, too
    rewards = z[:, -1] + gamma * halt[1] * unknown  # r~ = r + gamma V(HALT) where unknown
    rule = TERMINATION_RULES.get(ending, lambda _: torch.bernoulli(torch.sigmoid(logit[member, rows])))  # else learned
    terminations = rule(scale[0] + scale[1] * next_observations).logical_or(unknown).float()
    return Batch(observations, actions, rewards, next_observations, terminations), disc


@torch.no_grad()
def rollout(
    actor: Actor, elites: Dynamics, starts: Batch, scale: Tensor, ending: str, halt: Tensor, args: HyperParameters
) -> tuple[Batch, Tensor]:
    """Rollouts of the policy from `starts`, and disc. `ending`: a key of TERMINATION_RULES or "learned"."""
    rolled = []
    for observations in starts.observations.split(2_000):  # pieces for a cache
        for _ in range(args.rollout_length):
            noise = torch.randn(len(observations), starts.actions.shape[1], device=observations.device)
            actions, _ = actor.sample(observations, noise)
            transitions, disc = model_step(elites, observations, actions, scale, ending, halt, args.gamma)
            observations = transitions.next_observations[transitions.terminations == 0]  # the others go on
            rolled.append((*transitions, disc))
    *columns, discs = map(torch.cat, zip(*rolled, strict=True))
    return Batch(*columns), discs


# --- Losses ---------------------------------------------------------------------------------------------------------


def critic_loss(learner: Learner, batch: Batch, noise: Tensor, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_Q = E[ sum_i (y - Q_i(s, a))^2 ], y = r~ + gamma (1 - termination) (min_i Q'_i(s', a') - temperature log pi)"""
    with torch.no_grad():
        next_actions, next_log_prob = learner.actor.sample(batch.next_observations, noise)
        next_q = learner.target_critic(batch.next_observations, next_actions).min(dim=0).values  # [batch]
        next_value = next_q - learner.actor.log_temperature.exp() * next_log_prob
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_value  # a truncation bootstraps
    q = learner.critic(batch.observations, batch.actions)  # [2, batch]
    loss = (target - q).square().mean(dim=1).sum()  # the mean over the batch, the sum over the twins
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


def actor_loss(critic: Critic, temperature: Tensor, observations: Tensor, actions: Tensor, log_prob: Tensor) -> tuple:
    """L_pi = E[ temperature log pi(a_pi | s) - min_i Q_i(s, a_pi) ], `actions` a_pi differentiable in the actor"""
    # functional_call runs Q with constant weights: the gradient passes through Q to the actions, and changes no weight
    constants = {name: weight.detach() for name, weight in critic.named_parameters()}
    q = functional_call(critic, constants, (observations, actions)).min(dim=0).values  # [batch]
    loss = (temperature.detach() * log_prob - q).mean()
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
    actions, log_prob = learner.actor.sample(batch.observations, noise[1])
    loss_pi, metrics_pi = actor_loss(learner.critic, temperature, batch.observations, actions, log_prob)
    target_entropy = -actions.shape[-1] if args.target_entropy is None else args.target_entropy
    loss_t, metrics_t = temperature_loss(temperature, log_prob, target_entropy)
    return loss_q + loss_pi + loss_t, metrics_q | metrics_pi | metrics_t


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of all networks, then the target critic follows the critic. `step` counts from 1."""
    noise = torch.randn(2, *batch.actions.shape, device=batch.actions.device)  # of a' and a_pi
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
    normalize_observations: bool = True  # by the mean and standard deviation of the data

    def validate(self) -> None:
        super().validate()
        check_argument(self, "gamma", self.gamma < 1, "must be less than 1: HALT pays for ever")
        check_argument(self, "threshold", self.threshold > 0, "must be positive")
        check_argument(self, "halt_penalty", self.halt_penalty >= 0, "must not be negative")
        check_argument(self, "num_elites", 2 <= self.num_elites <= self.num_models, "must be in [2, --num-models]")


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
    if args.dynamics is None:
        for metrics in fit_dynamics(learner, Batch(*buffer.transitions), args, train_dynamics):
            run.log(0, {"dynamics/epoch": learner.dynamics.epoch} | metrics)
            run.save_checkpoint()
            run.progress.set_postfix_str(f"dynamics epoch {int(learner.dynamics.epoch)}")
    elites = learner.dynamics.elites(args.num_elites)
    halt = find_halt(elites, Batch(*buffer.transitions), args)
    data = {f"data/{name}": getattr(buffer.transitions, name).mean() for name in ("rewards", "terminations")}
    for step in range(run.first_step, args.num_updates + 1):
        if (step - 1) % args.rollout_every == 0:
            starts = Batch(*buffer.sample(args.rollout_batch_size))
            rolled, disc = rollout(learner.actor, elites, starts, buffer.normalization, ending, halt, args)
            learner.model_buffer.add(rolled, args.rollouts_kept * args.rollout_batch_size * args.rollout_length)
            found = {f"model/{name}": getattr(rolled, name).mean() for name in ("rewards", "terminations")} | data
            found["model/raw_rewards"] = (rolled.rewards - args.gamma * halt[1] * (disc > halt[0])).mean()
            run.log(step, found | {"halt/share": (disc > halt[0]).float().mean(), "halt/disc": disc.mean() / halt[0]})
        metrics = train(learner, learner.model_buffer.sample(args.batch_size), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
