"""Probabilistic ensembles with trajectory sampling (PETS): learn a model of the data, and plan in it at every step.

An ensemble of networks learns the dynamics, and nothing else need be learned: no policy, no value. To act, the
cross-entropy method (CEM) looks for the sequence of actions whose return in the model is best. Its first action is
taken; from the others, the search of the next step begins. With x = (s, a), z = (s' - s, r) and members k:

    p_k(z | x) = Normal(mean_k(x), std_k(x)),  k = 1 .. num_models
    L_model = sum_k E[ ((z - mean_k(x)) / std_k(x))^2 + 2 log std_k(x) ] + cross-entropy of d, E over z's entries too
    J(a_0 .. a_{H-1}) = E[ sum_t reach_t (r_t - penalty_coefficient u(s_t, a_t)) + reach_H V(s_H) ],  E over particles
    reach_t = gamma^t prod_{j<t} (1 - d_j);  gamma = 1 and V = 0 without --value-run-dir
    (s_{t+1} - s_t, r_t) ~ p_k(. | s_t, a_t) in each particle,  termination d_t by a rule, or its probability in k
    u(s, a) = |sqrt(Var_k[mean_k(s, a)])|
    L_V = E[ (V(s) - mean_i Q'_i(s, pi(s)))^2 ]

A particle has one member k for the whole plan with --propagation TSinf, and one drawn anew at each step with TS1. CEM
draws `population` candidates with each number a = m + min(sqrt(v), (m + 1) / 2, (1 - m) / 2) noise. The noise is normal
and cut off at -2 and 2, so that a is in [-1, 1]. Of the num_best candidates of the highest J:

    m <- cem_alpha m + (1 - cem_alpha) mean(best),  v <- cem_alpha v + (1 - cem_alpha) variance(best)

It begins at v = 1/4 and m = 0, or at the last plan moved by one step; after cem_iterations, m is the plan. What pays
later than H steps is not seen, unless V says it. --value-run-dir names a run of fqe.py, which has target critics Q'_i
of a policy pi, and gamma; V is fitted to them before all else. Offline, most plans leave the data, and the best J may
be an error of the model. There the members disagree: with the penalty, which PETS does not have, a plan pays for that.

Paper: Chua, Calandra, McAllister, Levine, "Deep Reinforcement Learning in a Handful of Trials using Probabilistic
Dynamics Models", 2018, arXiv 1805.12114; a penalty in a model's rewards is MOPO's idea, arXiv 2005.13239, a value after
a plan's end that of Lowrey et al., 2019, arXiv 1811.01848.
Differences: theirs plays from the start, and learns again after each episode; here data come first. --online-steps adds
steps of the planner, with an update after each; the scales of s, a and z, the rule of d and V stay as the data alone
made them. r is learned, theirs is known. Fewer candidates, particles and steps and smaller networks, so that an
evaluation takes minutes on a CPU. Members draw rows anew from each batch, theirs keep one bootstrap each. z is
normalised, and each member has its own bounds of variance. All plans share the random numbers of CEM, all candidates
those of the model; theirs are drawn anew. CEM makes all its iterations, theirs stops at a small v. Layers start as
PyTorch's do, the authors' as truncated normal. Their plans have no ends, and their batches are of 32 (here 256).

Run: python algorithms/pets.py --dataset-id anchorl/pendulum/mixed-v0
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, silu, softplus

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    horizon: int = 15  # H, steps of a plan (authors' code: 25 to 30)
    population: int = 64  # candidates of an iteration (authors' code: 400 or 500)
    num_best: int = 8  # of these, those that the next iteration follows (authors' code: 40 or 50)
    cem_iterations: int = 3  # of a plan (authors' code: 5)
    cem_alpha: float = 0.1  # share of the last mean and variance in the next (authors' code)
    num_particles: int = 5  # trajectories of a candidate, as many of each member (authors' code: 20)
    propagation: Literal["TSinf", "TS1"] = "TSinf"  # what a particle's member lasts for: the plan, or a step (paper)
    penalty_coefficient: float = 0.0  # weight of the members' disagreement u; 0 is PETS, above it takes longer to plan
    num_models: int = 5  # members of the ensemble (authors' code)
    hidden_dims: tuple[int, ...] = (128, 128)  # hidden layers of each member (authors' code: 3 or 4 of 200 or 500)
    learning_rate: float = 1e-3  # of Adam (authors' code; reacher 7.5e-4)
    value_run_dir: str | None = None  # folder of a run of fqe.py on the same data, whose V follows a plan (PETS: none)
    value_updates: int = 5_000  # gradient steps, of batches of 256, that fit V to it before all others (ours)

    @property
    def dynamics_hidden_dims(self) -> tuple[int, ...]:  # as scripts call it that have other networks, too
        return self.hidden_dims


class Batch(NamedTuple):
    """Transitions, in float32."""

    observations: Tensor  # [batch, observation_dim], normalised
    actions: Tensor  # [batch, action_dim] in [-1, 1]
    rewards: Tensor  # [batch]
    next_observations: Tensor  # [batch, observation_dim], normalised
    terminations: Tensor  # [batch], 1 where the environment ended the episode


# --- Networks -------------------------------------------------------------------------------------------------------


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


class Value(nn.Module):
    """V(s) of a policy, in the units of the rewards, and the discount that it has."""

    def __init__(self, observation_dim: int, args: HyperParameters) -> None:
        super().__init__()
        pairs = pairwise([observation_dim, *args.hidden_dims, 1])
        self.layers = nn.Sequential(*[layer for pair in pairs for layer in (nn.SiLU(), nn.Linear(*pair))][1:])
        self.scale = nn.Buffer(torch.tensor([0.0, 1.0]))  # mean and standard deviation of V in the data
        self.gamma = nn.Buffer(torch.tensor(1.0))

    def forward(self, observations: Tensor) -> Tensor:
        return self.scale[0] + self.scale[1] * self.layers(observations).squeeze(-1)


class Actor(nn.Module):
    """The planner, and the model it plans in. Each call plans from scratch, and the same for the same observations.

    After `follow` the next call begins at the plans of these episodes. A loop over the steps of one episode calls
    follow([0], [None]) before the first action, follow([0], [reward]) before each other: the number of the episode, and
    the last reward, of which a planner has no use.
    """

    cem_noise: Tensor
    noise: Tensor
    order: Tensor

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.args, self.dynamics = args, Dynamics(observation_dim, action_dim, args)
        self.value = Value(observation_dim, args) if args.value_run_dir is not None else None
        self.scale = nn.Buffer(torch.tensor([[0.0], [1.0]]).double().repeat(1, observation_dim))
        self.rule = nn.Buffer(torch.tensor(-1))  # its place in TERMINATION_RULES; -1: learned
        self.plans: dict[int, Tensor] = {}  # where the search goes on, [horizon, action_dim], by episode
        self.episodes: list[int] | None = None  # of the next call's rows
        self.played = nn.Buffer(torch.zeros(1, args.horizon, action_dim))  # likewise, of the episode that `play` is in
        generator = torch.Generator().manual_seed(0)
        cem_noise = torch.empty(args.cem_iterations, args.population, args.horizon, action_dim)
        nn.init.trunc_normal_(cem_noise, a=-2, b=2, generator=generator)
        noise = torch.randn(args.horizon, args.num_particles, 1, observation_dim + 1, generator=generator)
        order = torch.rand(args.horizon, args.num_particles, generator=generator).argsort(dim=1)  # members of TS1
        for name, value in {"cem_noise": cem_noise, "noise": noise, "order": order}.items():
            self.register_buffer(name, value, persistent=False)

    def take(self, data: Batch, scale: Tensor, ending: str) -> None:
        """Before training: the numbers' means and deviations in the data, those of states, and what ends an episode."""
        x = torch.cat([data.observations, data.actions], dim=1)
        z = torch.cat([data.next_observations - data.observations, data.rewards.unsqueeze(1)], dim=1)
        std = x.std(dim=0)
        self.dynamics.x_scale.copy_(torch.stack([x.mean(dim=0), std.where(std > 1e-6, 1)]))  # 1 if it never varied
        self.dynamics.z_scale.copy_(torch.stack([z.mean(dim=0), z.std(dim=0) + 1e-6]))
        self.scale.copy_(scale)
        self.rule.fill_(-1 if ending == "learned" else list(TERMINATION_RULES).index(ending))

    def follow(self, episodes: list[int], rewards: list[float | None]) -> None:
        """Whose the rows of the next call are. An episode whose last reward is None begins: its plan is forgotten."""
        self.episodes = list(episodes)
        for episode, reward in zip(episodes, rewards, strict=True):
            if reward is None:
                self.plans.pop(episode, None)

    @torch.no_grad()
    def forward(self, observations: Tensor) -> Tensor:
        """The first action of each plan: [batch, action_dim] in [-1, 1]."""
        episodes, self.episodes = self.episodes, None
        mean = observations.new_zeros(len(observations), *self.cem_noise.shape[2:])
        if episodes is not None:
            if len(episodes) != len(mean):
                raise ValueError(f"follow was told of {len(episodes)} episodes, and {len(mean)} observations came")
            mean = torch.stack([self.plans.get(i, mean[row]) for row, i in enumerate(episodes)])
        rows = max(1, 20_000 // (self.args.population * self.args.num_particles))  # pieces for a cache
        pieces = zip(observations.split(rows), mean.split(rows), strict=True)
        plans = torch.cat([plan(self, *piece) for piece in pieces]) if len(mean) else mean
        for i, row in zip(episodes or [], plans, strict=False):
            self.plans[i] = shifted(row)
        return plans[:, 0]

    @torch.no_grad()
    def play(self, observations: Tensor, begins: bool) -> Tensor:
        """As forward, of one episode, to learn from: [1, action_dim]. A checkpoint holds where the search goes on."""
        steps = plan(self, observations, self.played * (not begins))
        self.played.copy_(shifted(steps[0]))
        return steps[:, 0]


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor
    dynamics: Dynamics  # the actor's
    optimizer: Any


def build(
    observation_dim: int, action_dim: int, args: HyperParameters, device: Any = "cpu", adam: Any = torch.optim.Adam
) -> Learner:
    """A fresh model and its optimiser, with a parameter group per layer."""
    actor = Actor(observation_dim, action_dim, args).to(device)
    layers, bounds = actor.dynamics.layers, [actor.dynamics.max_log_variance, actor.dynamics.min_log_variance]
    decays = [*[2.5e-5, 5e-5, *[7.5e-5] * len(layers)][: len(layers) - 1], 1e-4]  # first to last (authors' halfcheetah)
    groups = [{"params": [layer.weight], "weight_decay": d} for layer, d in zip(layers, decays, strict=True)]
    groups.append({"params": [*(layer.bias for layer in layers), *bounds]})
    return Learner(actor, actor.dynamics, adam(groups, args.learning_rate))


# --- Planning -------------------------------------------------------------------------------------------------------


# which states s [N, observation_dim], as the environment has them, end an episode: by the environment's documentation
TERMINATION_RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "Hopper": lambda s: ~((s[:, 0] > 0.7) & (s[:, 1].abs() < 0.2) & (s[:, 1:].abs() < 100).all(dim=1)),
    "Walker2d": lambda s: ~((s[:, 0] > 0.8) & (s[:, 0] < 2) & (s[:, 1].abs() < 1)),
    "Ant": lambda s: ~((s[:, 0] >= 0.2) & (s[:, 0] <= 1) & s.isfinite().all(dim=1)),
    **dict.fromkeys(("HalfCheetah", "Pendulum", "never"), lambda s: torch.zeros_like(s[:, 0], dtype=torch.bool)),
}


def disagreement(dynamics: Dynamics, observations: Tensor, actions: Tensor) -> Tensor:
    """u(s, a) = |sqrt(Var_k[mean_k(s, a)])|, over all members: [batch], in the units of (s' - s, r) as the data are."""
    mean, _, _ = dynamics.predict(observations, actions)
    return mean.std(dim=0, correction=0).norm(dim=-1)


def plan_returns(actor: Actor, observations: Tensor, candidates: Tensor) -> Tensor:
    """J of `candidates` [batch, population, horizon, action_dim] from `observations`: [batch, population]."""
    dynamics, args = actor.dynamics, actor.args
    batch, population, horizon, _ = candidates.shape
    states = observations.unsqueeze(1).expand(-1, population, -1).flatten(0, 1).repeat(args.num_particles, 1, 1)
    reach = states.new_ones(states.shape[:2])  # [particles, batch * population]
    total, members = torch.zeros_like(reach), args.num_models
    gamma = actor.value.gamma if actor.value is not None else 1.0
    rule = list(TERMINATION_RULES.values())[int(actor.rule)] if actor.rule >= 0 else None
    for t in range(horizon):
        if args.propagation == "TS1":  # in another order they are of other members, of each as many as before
            states, reach, total = (column[actor.order[t]] for column in (states, reach, total))
        actions = candidates[:, :, t].flatten(0, 1).expand(args.num_particles, -1, -1)
        inputs = (column.reshape(members, -1, column.shape[-1]) for column in (states, actions))  # by member
        mean, std, logit = (part.view(*reach.shape, -1) for part in dynamics.predict(*inputs))
        z = mean + std * actor.noise[t]
        rewards = z[..., -1]
        if args.penalty_coefficient > 0:
            u = disagreement(dynamics, states.flatten(0, 1), actions.flatten(0, 1)).view_as(reach)
            rewards = rewards - args.penalty_coefficient * u
        states = states + z[..., :-1]
        total = total + reach * rewards
        if rule is None:
            ends = logit.squeeze(-1).sigmoid()
        else:  # of states as the environment has them
            ends = rule((actor.scale[0] + actor.scale[1] * states).flatten(0, 1)).view_as(reach).to(reach.dtype)
        reach = gamma * reach * (1 - ends)
    if actor.value is not None:
        total = total + reach * actor.value(states)
    return total.mean(dim=0).view(batch, population)


def refit(
    mean: Tensor, variance: Tensor, candidates: Tensor, returns: Tensor, args: HyperParameters
) -> tuple[Tensor, Tensor]:
    """CEM's next mean and variance, [batch, horizon, action_dim], from those and the best of the candidates."""
    rows = returns.topk(args.num_best, dim=1).indices  # [batch, num_best]
    best = candidates[torch.arange(len(rows), device=rows.device).unsqueeze(1), rows]
    share = 1 - args.cem_alpha
    return mean.lerp(best.mean(dim=1), share), variance.lerp(best.var(dim=1, correction=0), share)


def shifted(steps: Tensor) -> Tensor:
    """A plan, [horizon, action_dim], after its first step is taken; the last one is to be found."""
    return torch.cat([steps[1:], torch.zeros_like(steps[:1])])


def plan(actor: Actor, observations: Tensor, mean: Tensor) -> Tensor:
    """The plans from `observations`, [batch, horizon, action_dim], of a search that begins at `mean`, of that shape."""
    variance = torch.full_like(mean, 0.25)  # (2 / 4)^2, of actions between -1 and 1 (authors' code)
    for noise in actor.cem_noise:
        std = torch.minimum(variance.sqrt(), torch.minimum(1 + mean, 1 - mean) / 2)  # 2 of them are within bounds
        candidates = (mean.unsqueeze(1) + std.unsqueeze(1) * noise).clamp(-1, 1)  # which rounding may pass
        returns = plan_returns(actor, observations, candidates)
        mean, variance = refit(mean, variance, candidates, returns, actor.args)
    return mean


# --- Losses ---------------------------------------------------------------------------------------------------------


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


def value_loss(value: Value, observations: Tensor, targets: Tensor) -> Tensor:
    """L_V = E[ (V(s) - mean_i Q'_i(s, pi(s)))^2 ] / variance of the latter"""
    return ((value(observations) - targets) / value.scale[1]).square().mean()


# --- Update ---------------------------------------------------------------------------------------------------------


def fit_value(value: Value, observations: Tensor, targets: Tensor, gamma: float, args: HyperParameters) -> float:
    """Before training: V by regression to `targets` [N], mean_i Q'_i(s, pi(s)) at the data's states. Gives L_V."""
    value.scale.copy_(torch.stack([targets.mean(), targets.std() + 1e-6]))
    value.gamma.fill_(gamma)
    optimizer = torch.optim.Adam(value.parameters(), args.learning_rate)
    for _ in range(args.value_updates):
        rows = torch.randint(len(targets), (256,), device=targets.device)
        value_loss(value, observations[rows], targets[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    rows = torch.randint(len(targets), (10_000,), device=targets.device)
    return value_loss(value.requires_grad_(False), observations[rows], targets[rows]).item()


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of all members, each on rows that it draws from the batch. `step` counts from 1."""
    x = torch.cat([batch.observations, batch.actions], dim=1)
    z = torch.cat([batch.next_observations - batch.observations, batch.rewards.unsqueeze(1)], dim=1)
    z[:, :-1].masked_fill_(((batch.terminations == 1) & (z[:, :-1] == 0).all(dim=1)).unsqueeze(1), math.nan)
    rows = torch.randint(len(x), (args.num_models, len(x)), device=x.device)  # with replacement
    loss, metrics = dynamics_loss(learner.dynamics, x[rows], z[rows], batch.terminations[rows])
    loss.backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    return {"actor/loss": loss.detach()} | metrics


# === The copy line: what is above needs PyTorch alone; below are command line, data, run folder and evaluation ========

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, check, check_argument, explain, launch, warn
from common.data import ReplayBuffer, hold_out, load_dataset
from common.evaluation import Player, load_policy, load_script, make_environments
from common.experiment import Run, load_file, set_up
from common.optim import Adam, compiled


@dataclass
class Args(HyperParameters, ExperimentArgs):
    termination: Literal["auto", "rule", "learned", "never"] = "auto"  # what ends a plan; auto: a rule that holds
    dynamics: str | None = None  # folder of a run on the same data, whose model to take, and learn nothing more of them
    policy_script: str | None = None  # path of the script of the policy that FQE evaluated, if not in algorithms/
    reward_scale: float | Literal["return-range"] = 1.0  # multiplies rewards; return-range: their returns span 1,000
    reward_shift: float = 0.0  # added to rewards first
    normalize_observations: bool = True  # by the mean and standard deviation of the data
    online_steps: int = 0  # after the other updates, steps that the planner takes, with an update each

    def validate(self) -> None:
        super().validate()
        check_argument(self, "penalty_coefficient", self.penalty_coefficient >= 0, "must not be negative")
        check_argument(self, "cem_alpha", 0 <= self.cem_alpha < 1, "must be in [0, 1)")
        check_argument(self, "num_best", self.num_best < self.population, "must be below --population")
        shared = self.num_particles % self.num_models == 0
        check_argument(self, "num_particles", shared, f"must be a multiple of --num-models, {self.num_models}")


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


@torch.no_grad()
def load_value(args: Args, buffer: ReplayBuffer) -> tuple[Tensor, float]:
    """mean_i Q'_i(s, pi(s)) at the states of the data, [N], in the units of the buffer's rewards, and gamma, by the FQE
    run in --value-run-dir. Raises BadInput if it does not suit."""
    folder, device, states = Path(args.value_run_dir or ""), buffer.storage.device, buffer.transitions.observations
    with explain(f"--value-run-dir {folder}"):
        saved = load_file(folder / "checkpoint.pt", device)
        check(saved["arguments"]["algorithm"] == "fqe", f"is a run of {saved['arguments']['algorithm']}, not of fqe")
        other = f"was trained on other data than {args.dataset_id}, or some were held out of these"
        check(saved["dataset_fingerprint"] == buffer.fingerprint, other)
        check((folder / "result.json").is_file(), "has not finished; go on with that run first")
        check(args.reward_shift == 0, "knows rewards without a shift alone; leave out --reward-shift")
        fqe = load_script("fqe")
        known = fqe.HyperParameters(**{name: saved["arguments"][name] for name in vars(fqe.HyperParameters())})
        critic = fqe.build(buffer.observation_dim, buffer.action_dim, known, device).target_critic
        critic.load_state_dict(saved["learner"]["target_critic"])
    with explain(f"--value-run-dir {folder}, --policy-script {args.policy_script}"):
        policy = load_policy(folder, args.policy_script)
    mean, std = saved["normalization"]  # FQE's own
    inputs = ((buffer.normalization[0] + buffer.normalization[1] * states - mean) / std).float()
    pieces = zip(inputs.split(4096), fqe.act(policy, states, buffer).split(4096), strict=True)
    q = [critic(*(x.expand(known.num_members, -1, -1) for x in piece)).mean(dim=0) for piece in pieces]
    scale = float(buffer.transitions.rewards.square().mean().sqrt()) or 1.0  # FQE has rewards of size 1 - gamma
    return torch.cat(q) * scale / (1 - known.gamma), known.gamma


def main(args: Args) -> None:
    device = set_up(args)
    dataset = hold_out(load_dataset(args.dataset_id, args.env_id), args)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations, room=args.online_steps)
    check(len(buffer.storage) > 1, f"{args.dataset_id}: one transition is too few to train a model and test it")
    ending = ending_of(args, buffer)
    buffer.scale_rewards(args.reward_scale, args.reward_shift)

    learner = build(buffer.observation_dim, buffer.action_dim, args, device, Adam)
    learner.actor.take(Batch(*buffer.transitions), buffer.normalization, ending)
    if args.dynamics is not None and not args.resume:  # else the checkpoint has it
        load_dynamics(args, buffer, learner)
    if learner.actor.value is not None and not args.resume:
        targets, gamma = load_value(args, buffer)
        error = fit_value(learner.actor.value, buffer.transitions.observations, targets, gamma, args)
        print(f"V: of the variance of FQE's values in the data, its fit leaves {error:.2%}", flush=True)
    train = compiled(update, learner, args)
    player = Player(make_environments(dataset, 1)[0], buffer, args.seed) if args.online_steps else None
    run = Run(args, buffer, learner, update, player=player)  # makes the run folder, or goes back to its checkpoint
    print(f"terminations in the model: {ending}", flush=True)
    if args.dynamics is not None and run.first_step <= args.num_updates:
        run.record(args.num_updates, {})  # the evaluation alone: of the data, nothing is left to learn
        run.first_step = args.num_updates + 1
    for step in range(run.first_step, run.last_step + 1):
        if player and step > args.num_updates:  # a transition more, which counts as much as one of the data
            act = partial(learner.actor.play, begins=not player.actions)
            buffer.add(player.step(run.policy(player.observation[None], act)[0]))
        metrics = train(learner, Batch(*buffer.sample(args.batch_size)), step, args)
        learner.dynamics.epoch.fill_(step >= args.num_updates)  # 1 where finished, as --dynamics asks
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
