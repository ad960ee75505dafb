"""Off-policy evaluation (OPE): what would trained policies earn, by logged episodes alone, and how far to trust that?

No estimator is right by itself, so several stand side by side. Episode i of n has s_0, a_0, r_0, ...; pi(a | s) is 1
for the action that the policy takes, as it acts without noise; beta is what chose the data's actions:

    return    mean_i G_i,  G_i = sum_t gamma^t r_it, of the data themselves
    fqe       mean_i V(s_i0),  V(s) = Q(s, pi(s)),  Q = mean_m Q'_m, where Q'_m slowly follow the Q_m of
              L = sum_m E[ (r + gamma (1 - termination) Q'_m(s', pi(s')) - Q_m(s, a))^2
                           + conservative (Q_m(s, pi(s)) - Q_m(s, a)) ]
    is        mean_i sum_t gamma^t rho_it r_it,  rho_it = prod_{k <= t} pi(a_k | s_k) / beta(a_k | s_k)
    wis       sum_t gamma^t sum_i w_it r_it,  w_it = rho_it / sum_j rho_jt
    wdr       sum_t gamma^t sum_i [ w_it (r_it - Q(s_it, a_it)) + w_i,t-1 V(s_it) ],  w_i,-1 = 1 / n
    model     mean_i of the return of a rollout from s_i0 in each of several learned dynamics

An episode that has ended keeps its last weight, with rewards of 0: else a step's mean would be over the survivors.
After a termination Q and V are 0. At a cut fqe, wdr and model go on by what they learned; the others cannot, and
`beyond` says how much they miss: mean_i gamma^T_i, 0 where an episode terminated. So the data have an fqe, too, with
their own next action as pi(s'); a policy's fqe is compared with that. Weights of few episodes say nothing: the
effective sample size (ESS) of the last weights, (sum_i rho_i)^2 / sum_i rho_i^2, is how many episodes of equal weight
they are worth, and below --least-effective there is no number. Two doubts are kept apart: the 95 % interval is of which
episodes the data happen to hold, by a bootstrap with the networks as they are; `seeds` are what networks of other seeds
say. Neither knows of errors that all networks share.

beta is logged, or a network fitted to four fifths of the episodes, with the temperature that suits the fifth best:
L_beta = E[ -log beta(a | s) ]. Where beta is wrong, is and wis are, and wdr is right only as far as Q is. A policy of
continuous actions that acts without noise has no density to weigh by: it has fqe and model alone. conservative > 0
pushes Q down where pi leaves the data and up at their actions: with weight enough, fqe is a lower bound in the mean.

Papers: Precup, Sutton, Singh, "Eligibility Traces for Off-Policy Policy Evaluation", 2000 (is, wis); Thomas, Brunskill,
"Data-Efficient Off-Policy Policy Evaluation for Reinforcement Learning", 2016, arXiv 1604.00923 (wdr); Le, Voloshin,
Yue, 2019, arXiv 1903.08738 (fqe); Kumar, Zhou, Tucker, Levine, 2020, arXiv 2006.04779 (the penalty, in learning).
Differences: steps of Adam towards slow targets and layer normalisation, as in fqe.py, but all members see all episodes.
The dynamics forecast means, whose rollouts lack the spread of noise; states are held to the range of the data.

Run: python algorithms/ope.py runs/iql runs/bc
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, layer_norm, one_hot, pad

Pair = tuple[Tensor, Tensor]  # a policy's actions at s and at s'


@dataclass
class HyperParameters:
    num_members: int = 3  # M, networks of different seeds: of the critic, and of the dynamics
    num_updates: int = 10_000  # gradient steps of each network
    batch_size: int = 256  # transitions per network and update
    tau: float = 0.05  # rate at which the target critics follow; Q needs several 1 / (tau (1 - gamma)) updates
    learning_rate: float = 3e-4  # of Adam (usual)
    conservative: float = 0.0  # weight of the penalty that makes fqe a lower bound
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of every network


class Batch(NamedTuple):
    """Transitions, in float32. Discrete actions are one-hot, so that action_dim is their number."""

    observations: Tensor  # [..., observation_dim], normalised
    actions: Tensor  # [..., action_dim]
    rewards: Tensor  # [...], of size 1
    next_observations: Tensor  # [..., observation_dim], normalised
    terminations: Tensor  # [...], 1 where the environment ended the episode; a truncation bootstraps

    def take(self, rows: Tensor) -> "Batch":
        return Batch(*(column[rows] for column in self))


# --- Networks -------------------------------------------------------------------------------------------------------


class EnsembleLinear(nn.Module):
    """Linear layers side by side: one batched product, [members, batch, in] -> [members, batch, out]."""

    def __init__(self, members: int, input_dim: int, output_dim: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(input_dim)  # nn.Linear's own initialisation
        self.weight = nn.Parameter(torch.empty(members, input_dim, output_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, output_dim).uniform_(-bound, bound))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, inputs, self.weight)


class Ensemble(nn.Module):
    """Networks side by side, each with inputs of its own, [members, batch, dim], or all with the same, [batch, dim]."""

    def __init__(self, members: int, input_dim: int, hidden_dims: tuple[int, ...], output_dim: int) -> None:
        super().__init__()
        widths = [input_dim, *hidden_dims, output_dim]
        self.members, self.layers = members, nn.ModuleList(EnsembleLinear(members, *pair) for pair in pairwise(widths))

    def forward(self, *inputs: Tensor) -> Tensor:
        x = torch.cat(inputs, dim=-1).expand(self.members, -1, -1)
        for layer in self.layers[:-1]:
            x = layer(x)
            x = torch.relu_(layer_norm(x, x.shape[-1:]))
        return self.layers[-1](x)  # [members, batch, output_dim]


# --- Losses ---------------------------------------------------------------------------------------------------------


def critic_loss(
    critic: Ensemble, target_critic: Ensemble, batch: Batch, pi: Pair, gamma: float, args: HyperParameters
) -> Tensor:
    """L, of a batch [members, batch], with rewards times 1 - gamma: Q is then an average of the rewards to come, of a
    size that it learns soon. `pi` are the policy's actions at s and at s', [members, batch, action_dim].
    """
    with torch.no_grad():
        next_q = target_critic(batch.next_observations, pi[1]).squeeze(-1)  # [members, batch]
        target = (1 - gamma) * batch.rewards + gamma * (1 - batch.terminations) * next_q  # a truncation bootstraps
    q = critic(batch.observations, batch.actions).squeeze(-1)
    loss = (target - q).square().mean(dim=1).sum()  # the mean over the batch, the sum over the members
    if args.conservative:
        loss = loss + args.conservative * (critic(batch.observations, pi[0]).squeeze(-1) - q).mean(dim=1).sum()
    return loss


def log_beta(logits: Tensor, actions: Tensor, temperature: float = 1.0) -> Tensor:
    """log beta(a | s) of the actions taken, [batch],  beta = softmax(logits / temperature)"""
    return ((logits / temperature).log_softmax(dim=-1) * actions).sum(dim=-1)


def forecast(dynamics: Ensemble, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s', r and the logit of an end, [members, batch, ...]"""
    outputs = dynamics(observations, actions)
    return observations + outputs[..., :-2], outputs[..., -2], outputs[..., -1]


def dynamics_loss(dynamics: Ensemble, batch: Batch, scale: Tensor) -> Tensor:
    """sum_m E[ mean_j ((s'_j - s'_mj) / scale_j)^2 + (r - r_m)^2 + cross-entropy of an end ], j a number of s'"""
    following, rewards, logit = forecast(dynamics, batch.observations, batch.actions)
    # imported logs may repeat s where an end has no s'
    known = (batch.terminations == 0) | (batch.next_observations != batch.observations).any(dim=-1)
    errors = ((following - batch.next_observations) / scale).square().mean(dim=-1) * known
    ends = binary_cross_entropy_with_logits(logit, batch.terminations, reduction="none")
    return (errors + (rewards - batch.rewards).square() + ends).mean(dim=1).sum()


# --- Fitting --------------------------------------------------------------------------------------------------------


def descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """One gradient step."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def fit_critic(batch: Batch, pi: Pair, rows: Tensor, gamma: float, args: HyperParameters) -> Ensemble:
    """fqe's target critics, fitted to the `rows` of `batch`; `pi` are the policy's actions at all s and s'."""
    dims = batch.observations.shape[1] + batch.actions.shape[1]
    critic = Ensemble(args.num_members, dims, args.hidden_dims, 1)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    optimizer = torch.optim.Adam(critic.parameters(), args.learning_rate, fused=True)
    for _ in range(args.num_updates):
        drawn = rows[torch.randint(len(rows), (args.num_members, args.batch_size))]
        actions = pi[0][drawn], pi[1][drawn]
        descend(critic_loss(critic, target_critic, batch.take(drawn), actions, gamma, args), optimizer)
        with torch.no_grad():  # Q' <- Q' + tau (Q - Q')
            torch._foreach_lerp_(list(target_critic.parameters()), list(critic.parameters()), args.tau)
    return target_critic


def fit_behaviour(batch: Batch, held_out: Tensor, args: HyperParameters) -> tuple[Tensor, dict[str, float]]:
    """log beta of all actions [N], by a network that is fitted to the rows that are not `held_out` [N] until it gets
    worse on those; their mean log-likelihood, and that by their own frequencies alone: beta's should be higher.
    """
    behaviour = Ensemble(1, batch.observations.shape[1], args.hidden_dims, batch.actions.shape[1])
    optimizer = torch.optim.Adam(behaviour.parameters(), args.learning_rate, fused=True)
    rows, taken = (~held_out).nonzero()[:, 0], batch.actions[held_out]
    best: tuple[float, float, Any] = (-math.inf, 1.0, None)  # likelihood, temperature, log beta
    for step in range(1, args.num_updates + 1):
        drawn = batch.take(rows[torch.randint(len(rows), (args.batch_size,))])
        descend(-log_beta(behaviour(drawn.observations)[0], drawn.actions).mean(), optimizer)
        if step % max(1, args.num_updates // 20) == 0:
            with torch.no_grad():
                logits = behaviour(batch.observations)[0]  # once, for all temperatures
                for temperature in torch.logspace(-1, 1, 41).tolist():
                    likelihood = float(log_beta(logits[held_out], taken, temperature).mean())
                    if likelihood > best[0]:
                        best = likelihood, temperature, log_beta(logits, batch.actions, temperature)
    alone = float((taken * taken.mean(dim=0).clamp(min=1e-9).log()).sum(dim=1).mean())
    return best[2], {"temperature": best[1], "log_likelihood": best[0], "of_frequencies": alone}


def fit_dynamics(batch: Batch, args: HyperParameters) -> Ensemble:
    """The dynamics, each a network of another seed."""
    dims = batch.observations.shape[1] + batch.actions.shape[1]
    dynamics = Ensemble(args.num_members, dims, args.hidden_dims, batch.observations.shape[1] + 2)
    optimizer = torch.optim.Adam(dynamics.parameters(), args.learning_rate, fused=True)
    scale = (batch.next_observations - batch.observations).square().mean(dim=0).sqrt() + 1e-3
    for _ in range(args.num_updates):
        drawn = batch.take(torch.randint(len(batch.rewards), (args.num_members, args.batch_size)))
        descend(dynamics_loss(dynamics, drawn, scale), optimizer)
    return dynamics


@torch.no_grad()
def rollouts(dynamics: Ensemble, starts: Tensor, act: Callable, batch: Batch, gamma: float) -> Tensor:
    """Discounted returns [members, E] of rollouts of `act` from `starts` [E, observation_dim], until gamma^t < 0.01 or
    for 500 steps; an end of probability p leaves 1 - p of what follows.
    """
    states, returns, alive = starts.expand(dynamics.members, -1, -1), torch.zeros(()), torch.ones(())
    for t in range(500 if gamma > 0.99 else math.ceil(math.log(0.01) / math.log(max(gamma, 0.01)))):
        actions = act(states.flatten(0, 1)).unflatten(0, states.shape[:2])
        states, rewards, logit = forecast(dynamics, states, actions)
        returns, alive = returns + gamma**t * alive * rewards, alive * (1 - torch.sigmoid(logit))
        states = states.clamp(batch.observations.amin(dim=0), batch.observations.amax(dim=0))
    return returns.double()


# --- Estimators -----------------------------------------------------------------------------------------------------
# `counts` [draws, episodes] says how often each episode counts: ones for the estimate itself, else a bootstrap's draws.
# What is of steps is [episodes, steps], with zeros after an episode's end. All is in double precision.


def cumulative_ratios(log_ratios: Tensor) -> Tensor:
    """rho_it = prod_{k <= t} pi(a_k | s_k) / beta(a_k | s_k); the zeros after an end keep the last one."""
    return log_ratios.cumsum(dim=1).exp()


def discounts(gamma: float, steps: int) -> Tensor:
    return torch.tensor(gamma, dtype=torch.float64) ** torch.arange(steps)


def weigh(counts: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """sum_i w_it x_it,  w_it = c_i rho_it / sum_j c_j rho_jt, of each step: [draws, steps]; 0 where all weights are."""
    return counts @ (weights * values) / (counts @ weights).clamp(min=1e-300)


def mean_estimate(counts: Tensor, values: Tensor) -> Tensor:
    """The mean of values [episodes], such as G_i or V(s_i0): [draws]."""
    return counts @ values / counts.sum(dim=1)


def is_estimate(counts: Tensor, rho: Tensor, rewards: Tensor, gamma: float) -> Tensor:
    """mean_i sum_t gamma^t rho_it r_it, [draws]"""
    return mean_estimate(counts, rho * rewards @ discounts(gamma, rewards.shape[1]))


def wis_estimate(counts: Tensor, rho: Tensor, rewards: Tensor, gamma: float) -> Tensor:
    """sum_t gamma^t sum_i w_it r_it, [draws]"""
    return weigh(counts, rho, rewards) @ discounts(gamma, rewards.shape[1])


def wdr_estimate(counts: Tensor, rho: Tensor, rewards: Tensor, gamma: float, q: Tensor, v: Tensor) -> Tensor:
    """sum_t gamma^t sum_i [ w_it (r_it - Q_it) + w_i,t-1 V_it ], [draws]; V [episodes, steps + 1] goes on at a cut."""
    before = torch.cat([torch.ones_like(rho[:, :1]), rho], dim=1)
    corrections = weigh(counts, rho, rewards - q) @ discounts(gamma, rho.shape[1])
    return corrections + weigh(counts, before, v) @ discounts(gamma, v.shape[1])


def effective_sample_size(weights: Tensor) -> float:
    """(sum w)^2 / sum w^2 of weights [episodes]: as many of equal weight are worth as much."""
    weights = weights / weights.max().clamp(min=1e-300)
    return float(weights.sum().square() / weights.square().sum().clamp(min=1e-300))


def bootstrap(episodes: int, draws: int) -> Tensor:
    """How often each of the episodes is among as many that are drawn with replacement, [draws, episodes]."""
    drawn = torch.randint(episodes, (draws, episodes))
    ones = torch.ones(drawn.shape, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(1, drawn, ones)


def summary(of_seeds: Tensor, draws: Tensor) -> dict[str, Any]:
    """The mean over seeds [M or 1], each of them, and the deviation and 95 % interval of the bootstrap's `draws`."""
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    found = {"estimate": float(of_seeds.mean()), "low": low, "high": high, "std": float(draws.std())}
    return found | ({"seeds": of_seeds.tolist()} if len(of_seeds) > 1 else {})


@torch.no_grad()
def q_of(critic: Ensemble, observations: Tensor, actions: Tensor) -> Tensor:
    """Q'_m of rows, [members, rows], some at a time, so that memory stays small."""
    pairs = zip(observations.split(4096), actions.split(4096), strict=True)
    return torch.cat([critic(*pair).squeeze(-1) for pair in pairs], dim=1).double()


# === The copy line: what is above needs PyTorch alone; below are command line, data, policies and the result ==========

import json
import sys
from functools import partial
from pathlib import Path

import minari
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, check, check_argument, explain, launch, warn
from common.data import Dataset, ReplayBuffer, find_dataset, hold_out, load_dataset
from common.evaluation import Policy, load_policy
from common.experiment import replace


@dataclass
class Args(HyperParameters):
    policies: tyro.conf.Positional[tuple[Path, ...]] = ()
    """run folders, or kept policies in them: runs/iql/policy-5000.pt"""
    gamma: float = 0.0  # discount of the returns; 0: that of the runs
    held_out: bool = False  # judge by the episodes alone that the runs held out of training (--validation-fraction)
    least_effective: float = 10.0  # episodes of equal weight that importance sampling needs for a number
    draws: int = 1_000  # of the bootstrap over episodes
    script: Path | None = None  # path of the script that trained the policies, if it is not in algorithms/
    seed: int = 0  # of networks, batches and draws
    out: Path = Path("runs/ope.json")  # file of all numbers


class Evidence(NamedTuple):
    """The data as they are weighed: N transitions of E episodes of at most T steps."""

    buffer: ReplayBuffer
    batch: Batch  # [N, ...]
    size: float  # of a reward, by which the batch's are divided
    rewards: Tensor  # [E, T], in the environment's units
    log_beta: Tensor | None  # [E, T], of the actions taken
    counts: Tensor  # [draws, E], of the bootstrap
    gamma: float

    def summarize(self, estimate: Callable, of_seeds: Tensor | None = None) -> dict[str, Any]:
        ones = torch.ones(1, len(self.rewards), dtype=torch.float64)
        return summary(estimate(ones) if of_seeds is None else of_seeds, estimate(self.counts))

    def mean(self, values: Tensor) -> dict[str, Any]:  # of values [members, E]
        return self.summarize(partial(mean_estimate, values=values.mean(dim=0)), values.mean(dim=1))


def read_runs(args: Args) -> tuple[dict[str, Any], list[Policy]]:
    """What the runs were trained on, and the policies. Raises BadInput for policies that do not compare."""
    check(bool(args.policies), "name the runs whose policies are to be evaluated: runs/iql runs/bc")
    runs, policies = [], []
    for path in args.policies:
        folder, file = (path.parent, path.name) if path.suffix == ".pt" else (path, "policy.pt")
        policies.append(load_policy(folder, args.script, file))
        with explain(f"cannot read {folder / 'args.json'}"):
            runs.append({"gamma": 0.99} | json.loads((folder / "args.json").read_text()))
            runs[-1]["gamma"] = float(args.gamma or runs[-1]["gamma"])
        for name in ("dataset_id", "dataset_fingerprint", "gamma"):
            first, own = (run.get(name) for run in (runs[0], runs[-1]))
            check(own is not None, f"{folder / 'args.json'} lacks {name}: give the folder of a run on a dataset")
            advice = "give --gamma" if name == "gamma" else "policies compare on the same episodes of the same data"
            check(first == own, f"{name} is {first} in {args.policies[0]}, {own} in {path}: {advice}")
    return runs[0], policies


def load_buffer(args: Args, run: dict[str, Any], policies: list[Policy]) -> ReplayBuffer:
    """The data of the runs; with --held-out what they did not learn from. Raises BadInput for data unlike theirs."""
    split = ExperimentArgs(**{name: run[name] for name in ("validation_fraction", "validation_seed") if name in run})
    buffer = ReplayBuffer(hold_out(load_dataset(run["dataset_id"], discrete=None), split), torch.device("cpu"))
    same = buffer.fingerprint == run["dataset_fingerprint"]
    check(same, f"{args.policies[0]} was trained on other data than {run['dataset_id']} holds")
    task: Any = buffer.dataset.discrete, buffer.observation_dim, buffer.dataset.action_low, buffer.dataset.action_high
    for path, policy in zip(args.policies, policies, strict=True):
        own = policy.discrete, policy.normalization.shape[1], *policy.action_range.numpy()
        same = all(np.array_equal(*pair) for pair in zip(own, task, strict=True))
        check(same, f"{path}: its observations or actions are not {run['dataset_id']}'s")
    check(not args.held_out or bool(buffer.validation), "--held-out: the runs held no episodes out of training")
    return buffer.validation if args.held_out else buffer


def logged_probabilities(dataset: Dataset) -> Tensor | None:
    """log beta(a | s) [N] by the infos' log_prob; None without any. Raises BadInput where it lacks or cannot be."""
    found: list[Any] = []
    with explain(f"{dataset.dataset_id}: cannot read the infos' log_prob"):
        for index, episode in enumerate(minari.MinariDataset(find_dataset(dataset.dataset_id)).iterate_episodes()):
            if dataset.kept is None or index in dataset.kept:
                found.append(np.full(len(episode.rewards) + 1, np.nan))
                found[-1][:] = (episode.infos or {}).get("log_prob", np.nan)  # raises for another shape
    values = np.concatenate([each[:-1] for each in found])
    bad = int((np.isnan(values) | (values == -np.inf) | (values > 1e-6)).sum())
    what = f"{bad} of {len(values)} logged probabilities are missing, 0 or above 1"
    check(not bad or bool(np.isnan(values).all()), f"{dataset.dataset_id}: {what}: give all of them, or none")
    return None if bad else torch.from_numpy(values)


def act(policy: Policy, observations: Tensor, buffer: ReplayBuffer) -> Tensor:
    """pi(s), one-hot if discrete, of rows `observations` [N, observation_dim], as the buffer has them."""
    actions = []
    for rows in observations.split(1024):  # some at a time, so that memory stays small
        raw = rows * buffer.normalization[1] + buffer.normalization[0]  # in the environment's units
        outputs = policy.act(((raw - policy.normalization[0]) / policy.normalization[1]).float())
        actions.append(one_hot(outputs.argmax(1), buffer.num_actions).float() if policy.discrete else outputs)
    return torch.cat(actions)


def table(values: Tensor, buffer: ReplayBuffer) -> Tensor:
    """Values [N] as [E, T], with zeros after each episode's end."""
    return torch.nn.utils.rnn.pad_sequence(list(values.double().split(buffer.episode_lengths.tolist())), True)


def gather(buffer: ReplayBuffer, args: Args, gamma: float) -> tuple[Evidence, dict[str, Any]]:
    """The evidence, and what is to be said of beta."""
    data, lengths = buffer.transitions, buffer.episode_lengths
    size = float(data.rewards.square().mean().sqrt()) or 1.0
    actions = one_hot(data.actions, buffer.num_actions).float() if buffer.num_actions else data.actions
    batch = Batch(data.observations, actions, data.rewards / size, data.next_observations, data.terminations)
    told: dict[str, Any] = {"beta": "logged" if buffer.num_actions else "none"}
    log_probs = logged_probabilities(buffer.dataset) if buffer.num_actions else None
    if buffer.num_actions and log_probs is None:
        chosen = torch.randperm(len(lengths)) < len(lengths) / 5
        log_probs, likelihoods = fit_behaviour(batch, chosen.repeat_interleave(lengths), args)
        told = {"beta": "fitted"} | likelihoods
    beta = None if log_probs is None else table(log_probs, buffer)
    counts = bootstrap(len(lengths), args.draws)
    return Evidence(buffer, batch, size, table(data.rewards, buffer), beta, counts, gamma), told


def judge_data(evidence: Evidence, args: Args) -> dict[str, Any]:
    """The returns that were recorded, the share of the discount beyond them, and fqe of the data's own actions."""
    buffer, batch, gamma = evidence.buffer, evidence.batch, evidence.gamma
    starts, lengths = buffer.episode_starts, buffer.episode_lengths
    ended = batch.terminations[starts + lengths - 1] == 1
    followed = torch.ones(len(batch.rewards), dtype=torch.bool)
    followed[starts + lengths - 1] = ended  # where a cut is, nobody knows the next action
    check(bool(followed.any()), "all episodes are one step and cut: what follows is unknown; if they ended, say so")
    pi = batch.actions, batch.actions.roll(-1, dims=0)
    critic = fit_critic(batch, pi, followed.nonzero()[:, 0], gamma, args)
    v = q_of(critic, batch.observations[starts], batch.actions[starts]) * evidence.size / (1 - gamma)
    returns = evidence.rewards @ discounts(gamma, evidence.rewards.shape[1])
    found = {"return": evidence.mean(returns[None]), "fqe": evidence.mean(v)}
    return found | {"beyond": float((gamma ** lengths.double() * ~ended).mean())}


def judge(policy: Policy, evidence: Evidence, dynamics: Ensemble, args: Args) -> dict[str, Any]:
    """All estimates of a policy, in the environment's units."""
    buffer, batch, gamma, unit = evidence.buffer, evidence.batch, evidence.gamma, evidence.size / (1 - evidence.gamma)
    starts, ends = buffer.episode_starts, buffer.episode_starts + buffer.episode_lengths - 1
    pi = act(policy, batch.observations, buffer), act(policy, batch.next_observations, buffer)
    critic = fit_critic(batch, pi, torch.arange(len(batch.rewards)), gamma, args)
    v = q_of(critic, batch.observations, pi[0]) * unit  # [members, N]
    returns = rollouts(dynamics, batch.observations[starts], lambda s: act(policy, s, buffer), batch, gamma)
    found: dict[str, Any] = {"fqe": evidence.mean(v[:, starts]), "model": evidence.mean(returns * evidence.size)}
    if evidence.log_beta is None:
        return found
    agreement = (pi[0] * batch.actions).sum(dim=1).log()  # log pi(a | s): 0 or -inf
    rho = cumulative_ratios(table(agreement, buffer) - evidence.log_beta)
    found["ess"] = effective_sample_size(rho[:, -1])
    if found["ess"] < args.least_effective:
        return found
    q = q_of(critic, batch.observations, batch.actions) * unit
    last = q_of(critic, batch.next_observations[ends], pi[1][ends]) * unit * (1 - batch.terminations[ends])
    tables = []  # of each member Q and V; V [E, T + 1] has after the last step that of s', 0 if that terminated
    for member in range(len(q)):
        with_last = pad(table(v[member], buffer), (0, 1))
        with_last[torch.arange(len(ends)), buffer.episode_lengths] = last[member]
        tables.append((table(q[member], buffer), with_last))
    known: dict[str, Any] = {"rho": rho, "rewards": evidence.rewards, "gamma": gamma}
    of_seeds = torch.cat([wdr_estimate(torch.ones(1, len(ends)).double(), **known, q=q, v=v) for q, v in tables])
    known_q = known | {"q": sum(q for q, _ in tables) / len(tables), "v": sum(v for _, v in tables) / len(tables)}
    found["is"] = evidence.summarize(partial(is_estimate, **known))
    found["wis"] = evidence.summarize(partial(wis_estimate, **known))
    return found | {"wdr": evidence.summarize(partial(wdr_estimate, **known_q), of_seeds)}


def describe(name: str, found: dict[str, Any]) -> str:
    form = "{} {estimate:.3g} ({low:.3g} to {high:.3g})"
    return f"{name}: " + ", ".join(form.format(key, **each) for key, each in found.items() if isinstance(each, dict))


def main(args: Args) -> None:
    ExperimentArgs.validate(args)  # type: ignore[arg-type]
    for name, least in (("num_members", 2), ("draws", 2), ("conservative", 0)):
        check_argument(args, name, getattr(args, name) >= least, f"must be at least {least}")
    run, policies = read_runs(args)
    check(0 < (gamma := run["gamma"]) < 1, f"--gamma {gamma}: must be in (0, 1)")
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    buffer = load_buffer(args, run, policies)
    count = len(buffer.episode_lengths)
    check(count > 1, f"{run['dataset_id']} holds one episode: intervals need several; cut the log into episodes")
    if count < 20:
        warn(f"{count} episodes are few: no interval of fewer than 20 can be trusted")
    if args.num_updates < (needed := math.ceil(3 / (args.tau * (1 - gamma)))):
        warn(f"--num-updates {args.num_updates}: fqe will know the near future alone; tau and gamma ask for {needed:,}")
    evidence, told = gather(buffer, args, gamma)
    result = {"dataset_id": run["dataset_id"], "gamma": gamma, "episodes": count} | told
    result |= {"data": judge_data(evidence, args), "policies": {}}
    print(describe(f"data, {count} episodes, beta {told['beta']}", result["data"]), flush=True)
    dynamics = fit_dynamics(evidence.batch, args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for path, policy in zip(args.policies, policies, strict=True):
        found = result["policies"][str(path)] = judge(policy, evidence, dynamics, args)
        print(describe(str(path), found) + (f", ESS {found['ess']:.1f}" if "ess" in found else ""), flush=True)
        replace(args.out, lambda file: file.write(json.dumps(result, indent=2).encode()))


if __name__ == "__main__":
    launch(main, Args)
