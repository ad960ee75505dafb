"""Off-policy evaluation (OPE): what would trained policies earn, by logged episodes alone, and how far to trust that?

Several estimators stand side by side, for none is right by itself. Episode i of n has s_0, a_0, r_0, ...; beta chose
the data's actions; pi(a | s) is 1 for the discrete action that the policy takes, or a density, with --noise:

    return    mean_i G_i,  G_i = sum_t gamma^t r_it, of the data themselves
    fqe       mean_i V(s_i0),  V(s) = Q(s, pi(s)),  Q = mean_m Q'_m, where Q'_m slowly follow the Q_m of
              L = sum_m E[ (r + gamma (1 - termination) Q'_m(s', pi(s')) - Q_m(s, a))^2
                           + conservative (Q_m(s, pi(s)) - Q_m(s, a)) ],  r and Q in units of rms(r) / (1 - gamma)
    is        mean_i sum_t gamma^t rho_it r_it,  rho_it = prod_{k <= t} pi(a_k | s_k) / beta(a_k | s_k)
    wis       sum_t gamma^t sum_i w_it r_it,  w_it = rho_it / sum_j rho_jt
    wdr       sum_t gamma^t sum_i [ w_it (r_it - Q(s_it, a_it)) + w_i,t-1 V(s_it) ],  w_i,-1 = 1 / n
    model     mean_i of the return of a rollout from s_i0 in each of several learned dynamics

An episode that has ended keeps its last weight, with rewards of 0: else a step's mean would be over the survivors.
After a termination Q and V are 0. At a cut fqe, wdr and model go on by what they learned; the others cannot, and
`beyond` says how much they miss: mean_i gamma^T_i, 0 where an episode terminated. So the data have an fqe, too, with
their own next action as pi(s'); a policy's fqe is compared with that. The effective sample size (ESS) of the last
weights, (sum_i rho_i)^2 / sum_i rho_i^2, is how many episodes of equal weight they are worth; below --least-effective
there is no number. The 95 % interval is a bootstrap of the episodes, with fixed networks; `seeds` are the estimates of
each network. Neither knows of errors that all networks share.

beta is logged, or fitted to four fifths of the episodes, L_beta = E[ -log beta(a | s) ], at the temperature that suits
the others best. If beta is wrong, or 0 where pi is not, `is` and `wis` err (mean_i rho_i, `weight`, is not 1), and wdr
is as right as Q. Continuous actions, in [-1, 1], need --noise sigma: then all is of clip(pi(s) + sigma epsilon), whose
density has at its ends the mass of what is clipped; beta is a mixture of such, if logged at the ends alone.
conservative > 0 pushes Q down where pi leaves the data: enough of it makes fqe a lower bound in the mean.

Papers: Precup, Sutton, Singh, "Eligibility Traces for Off-Policy Policy Evaluation", 2000 (is); Thomas, Brunskill,
"Data-Efficient Off-Policy Policy Evaluation for Reinforcement Learning", 2016, arXiv 1604.00923 (wis, wdr); Le,
Voloshin, Yue, 2019, arXiv 1903.08738 (fqe); Kumar, Zhou, Tucker, Levine, 2020, arXiv 2006.04779 (the penalty).
Differences: slow targets and layer normalisation, as in fqe.py, but all members see all episodes. The dynamics forecast
means, whose rollouts lack the spread of noise; states are held to the range of the data.

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
    gamma: float = 0.99  # discount
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


class Ensemble(nn.Module):
    """Networks side by side, each with inputs of its own, [members, batch, dim], or all with the same, [batch, dim]."""

    def __init__(self, members: int, input_dim: int, hidden_dims: tuple[int, ...], output_dim: int) -> None:
        super().__init__()
        self.members, self.weights, self.biases = members, nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in pairwise([input_dim, *hidden_dims, output_dim]):
            bound = 1 / math.sqrt(inputs)  # nn.Linear's own initialisation
            self.weights.append(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
            self.biases.append(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, *inputs: Tensor) -> Tensor:
        x = torch.cat(inputs, dim=-1).expand(self.members, -1, -1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = torch.baddbmm(bias, x, weight)  # one batched product for all members
            x = torch.relu_(layer_norm(x, x.shape[-1:]))
        return torch.baddbmm(self.biases[-1], x, self.weights[-1])  # [members, batch, output_dim]


# --- Losses ---------------------------------------------------------------------------------------------------------


def critic_loss(critic: Ensemble, target_critic: Ensemble, batch: Batch, pi: Pair, args: HyperParameters) -> Tensor:
    """L, of a batch [members, batch], with rewards times 1 - gamma: Q is then an average of the rewards to come, of a
    size that it learns soon. `pi` are the policy's actions at s and at s', [members, batch, action_dim].
    """
    with torch.no_grad():
        next_q = target_critic(batch.next_observations, pi[1]).squeeze(-1)  # [members, batch]
        target = (1 - args.gamma) * batch.rewards + args.gamma * (1 - batch.terminations) * next_q  # cuts bootstrap
    q = critic(batch.observations, batch.actions).squeeze(-1)
    loss = (target - q).square().mean(dim=1).sum()  # the mean over the batch, the sum over the members
    if args.conservative:
        loss = loss + args.conservative * (critic(batch.observations, pi[0]).squeeze(-1) - q).mean(dim=1).sum()
    return loss


def log_clipped_normal(actions: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log density of clip(mean + std epsilon, -1, 1) at `actions` [..., action_dim]; at -1 and 1 the log of a mass"""
    inside = -0.5 * ((actions - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    beyond = torch.special.log_ndtr((mean * actions.sign() - 1) / std)
    return torch.where(actions.abs() < 1, inside, beyond).sum(dim=-1)


def log_beta(outputs: Tensor, actions: Tensor, temperature: float = 1.0) -> Tensor:
    """log beta(a | s) of the actions taken, [batch]. Discrete: beta = softmax(outputs / temperature). Continuous:
    beta = sum_k softmax(w)_k clipped_normal(mean_k, sqrt(temperature) std_k)
    """
    if outputs.shape[-1] == actions.shape[-1]:
        return ((outputs / temperature).log_softmax(dim=-1) * actions).sum(dim=-1)
    components = outputs.unflatten(-1, (-1, 2 * actions.shape[-1] + 1))  # [batch, k, w and means and log stds]
    mean, log_std = components[..., 1:].chunk(2, dim=-1)
    std = log_std.clamp(-4, 2).exp() * math.sqrt(temperature)
    log_prob = log_clipped_normal(actions.unsqueeze(-2), mean, std)  # [batch, k]
    return (components[..., 0].log_softmax(dim=-1) + log_prob).logsumexp(dim=-1)


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


def fit_critic(batch: Batch, pi: Pair, rows: Tensor, args: HyperParameters) -> Ensemble:
    """fqe's target critics, fitted to the `rows` of `batch`; `pi` are the policy's actions at all s and s'."""
    critic = Ensemble(args.num_members, batch.observations.shape[1] + batch.actions.shape[1], args.hidden_dims, 1)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    optimizer = torch.optim.Adam(critic.parameters(), args.learning_rate, fused=True)
    for _ in range(args.num_updates):
        drawn = rows[torch.randint(len(rows), (args.num_members, args.batch_size))]
        descend(critic_loss(critic, target_critic, batch.take(drawn), (pi[0][drawn], pi[1][drawn]), args), optimizer)
        with torch.no_grad():  # Q' <- Q' + tau (Q - Q')
            torch._foreach_lerp_(list(target_critic.parameters()), list(critic.parameters()), args.tau)
    return target_critic


def fit_behaviour(batch: Batch, held_out: Tensor, dims: int, legal: int, args: HyperParameters) -> tuple[Tensor, Any]:
    """log beta [N], by a network of `dims` outputs, fitted to rows that are not `held_out` [N] until it gets worse on
    those; their likelihood, and that by one distribution for all s. The first `legal` numbers of s are the mask."""
    behaviour = Ensemble(1, batch.observations.shape[1], args.hidden_dims, dims)
    optimizer = torch.optim.Adam(behaviour.parameters(), args.learning_rate, fused=True)
    rows, taken, temperatures = (~held_out).nonzero()[:, 0], batch.actions[held_out], torch.logspace(-1, 1, 41)
    best: tuple[float, float, Any] = (-math.inf, 1.0, None)  # likelihood, temperature, log beta
    for step in range(1, args.num_updates + 1):
        drawn = batch.take(rows[torch.randint(len(rows), (args.batch_size,))])
        outputs = behaviour(drawn.observations)[0]
        outputs[:, :legal] -= 1e9 * (drawn.observations[:, :legal] == 0)
        descend(-log_beta(outputs, drawn.actions).mean(), optimizer)
        if step % max(1, args.num_updates // 20) == 0:
            with torch.no_grad():
                outputs = behaviour(batch.observations)[0]  # once, for all temperatures
                outputs[:, :legal] -= 1e9 * (batch.observations[:, :legal] == 0)
                found = max((float(log_beta(outputs[held_out], taken, t).mean()), float(t)) for t in temperatures)
                best = max(best, (*found, log_beta(outputs, batch.actions, found[1])), key=lambda each: each[0])
    mean, std = taken.mean(dim=0), taken.std(dim=0, correction=0) + 1e-3
    alone = log_clipped_normal(taken, mean, std) if dims > len(mean) else (taken * mean.log().nan_to_num()).sum(dim=1)
    return best[2], {"temperature": best[1], "log_likelihood": best[0], "of_frequencies": float(alone.mean())}


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
    """Discounted returns [members, E] of rollouts of `act` from `starts` [E, observation_dim], until gamma^t < 0.001.
    An end of probability p leaves 1 - p of what follows."""
    states, returns, alive = starts.expand(dynamics.members, -1, -1), torch.zeros(()), torch.ones(())
    for t in range(math.ceil(math.log(0.001) / math.log(max(gamma, 0.001)))):
        actions = act(states.flatten(0, 1)).unflatten(0, states.shape[:2])
        states, rewards, logit = forecast(dynamics, states, actions)
        returns, alive = returns + gamma**t * alive * rewards, alive * (1 - torch.sigmoid(logit))
        states = states.clamp(batch.observations.amin(dim=0), batch.observations.amax(dim=0))
    return returns.double()


# --- Estimators -----------------------------------------------------------------------------------------------------
# counts [draws, episodes] tell how often each episode counts: ones for the estimate itself, else a bootstrap's draws.
# What is of steps is [episodes, steps], with zeros after an episode's end. All is in double precision.


def cumulative_ratios(log_ratios: Tensor) -> Tensor:
    """rho_it = prod_{k <= t} pi(a_k | s_k) / beta(a_k | s_k); the zeros after an end keep the last one."""
    return log_ratios.cumsum(dim=1).exp()


def discounts(gamma: float, steps: int) -> Tensor:
    return torch.tensor(gamma, dtype=torch.float64) ** torch.arange(steps)


def weigh(counts: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """sum_i w_it x_it,  w_it = c_i rho_it / sum_j c_j rho_jt, of each step: [draws, steps]; 0 where all weights are."""
    return counts @ (weights * values) / (counts @ weights).clamp(min=1e-300)


def is_estimate(counts: Tensor, rho: Tensor, rewards: Tensor, gamma: float) -> Tensor:
    """mean_i sum_t gamma^t rho_it r_it, [draws]"""
    return counts @ (rho * rewards) @ discounts(gamma, rewards.shape[1]) / counts.sum(dim=1)


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
    return float((2 * weights.log().logsumexp(dim=0) - (2 * weights.log()).logsumexp(dim=0)).exp().nan_to_num())


def bootstrap(episodes: int, draws: int) -> Tensor:
    """How often each of the episodes is among as many that are drawn with replacement, [draws, episodes], in bytes."""
    return torch.stack([torch.randint(episodes, (episodes,)).bincount(minlength=episodes).byte() for _ in range(draws)])


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
    policies: tyro.conf.Positional[tuple[Path, ...]] = ()  # run folders, or policies in them: runs/iql/policy-5000.pt
    gamma: float = 0.0  # discount; 0: that of the runs
    noise: float = 0.0  # sigma, with which policies of continuous actions act, in half ranges of an action
    held_out: bool = False  # judge by the episodes alone that the runs held out of training (--validation-fraction)
    least_effective: float = 10.0  # ESS from which on is, wis and wdr are shown
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
    counts: Tensor  # [draws, E], of the bootstrap, in bytes

    def summarize(self, estimate: Callable, of_seeds: Tensor | None = None) -> dict[str, Any]:
        draws = torch.cat([estimate(counts.double()) for counts in self.counts.split(50)])  # so that memory stays small
        return summary(estimate(torch.ones(1, len(self.rewards)).double()) if of_seeds is None else of_seeds, draws)

    def mean(self, values: Tensor) -> dict[str, Any]:  # of values [members, E], such as V(s_i0)
        return self.summarize(lambda counts: counts @ values.mean(dim=0) / counts.sum(dim=1), values.mean(dim=1))


def read_runs(args: Args) -> tuple[dict[str, Any], list[Policy]]:
    """What the runs were trained on, and the policies. Raises BadInput for policies that do not compare."""
    check(bool(args.policies), "name the runs whose policies are to be evaluated: runs/iql runs/bc")
    runs, policies = [], []
    for path in args.policies:
        policies.append(load_policy(path, args.script))
        history = f"{path}: its Actor needs its episode's history (`follow`), which only playing gives it"
        check(not getattr(policies[-1].actor, "needs_history", False), history)
        told = (path.parent if path.suffix == ".pt" else path) / "args.json"
        with explain(f"cannot read {told}"):
            runs.append({"gamma": 0.99} | json.loads(told.read_text()))
            runs[-1]["gamma"] = float(args.gamma or runs[-1]["gamma"])
        for name in ("dataset_id", "dataset_fingerprint", "gamma"):
            first, own = (run.get(name) for run in (runs[0], runs[-1]))
            check(own is not None, f"{told} lacks {name}: give the folder of a run on a dataset")
            advice = "give --gamma" if name == "gamma" else "policies compare on the same episodes of the same data"
            check(first == own, f"{name} is {first} in {args.policies[0]}, {own} in {path}: {advice}")
    return runs[0], policies


def load_buffer(args: Args, run: dict[str, Any]) -> ReplayBuffer:
    """The data of the runs; with --held-out what they did not learn from. Raises BadInput for data unlike theirs."""
    split = ExperimentArgs(**{name: run[name] for name in ("validation_fraction", "validation_seed") if name in run})
    buffer = ReplayBuffer(hold_out(load_dataset(run["dataset_id"], discrete=None), split), torch.device("cpu"))
    other = f"{args.policies[0]} was trained on other data than {run['dataset_id']} holds"
    check(buffer.fingerprint == run["dataset_fingerprint"], other)
    check(not (args.noise and buffer.num_actions), "--noise is for continuous actions")
    check(not args.held_out or bool(buffer.validation), "--held-out: the runs held no episodes out of training")
    return buffer.validation if args.held_out else buffer


def logged_probabilities(dataset: Dataset) -> Tensor | None:
    """log beta(a | s) [N] by the infos' log_prob, of actions in [-1, 1]; None without. Raises BadInput for a part."""
    with explain(f"{dataset.dataset_id}: cannot read the infos' log_prob"):
        stored, found = minari.MinariDataset(find_dataset(dataset.dataset_id)), []
        for episode in stored.iterate_episodes(dataset.kept and sorted(dataset.kept)):
            log_prob = (episode.infos or {}).get("log_prob", np.nan)
            found.append(np.broadcast_to(log_prob, len(episode.rewards) + 1)[:-1])  # raises for another shape
    values = np.concatenate(found)
    bad = int((np.isnan(values) | np.isinf(values) | (dataset.discrete & (values > 1e-6))).sum())
    what = f"{bad} of {len(values)} logged probabilities are missing, 0 or above 1"
    check(not bad or bool(np.isnan(values).all()), f"{dataset.dataset_id}: {what}: give all of them, or none")
    scale = 0.0 if dataset.discrete else np.log((dataset.action_high - dataset.action_low) / 2).sum()
    return None if bad else torch.from_numpy(values + scale)


def act(policy: Policy, observations: Tensor, buffer: ReplayBuffer, noise: float = 0.0) -> Tensor:
    """pi(s), one-hot if discrete, of rows `observations` [N, observation_dim], as the buffer has them; with noise."""
    actions = []
    for rows in observations.split(1024):  # some at a time, so that memory stays small
        raw = rows * buffer.normalization[1] + buffer.normalization[0]  # in the environment's units
        outputs = policy.act(((raw - policy.normalization[0]) / policy.normalization[1]).float())
        actions.append(one_hot(outputs.argmax(1), buffer.num_actions).float() if policy.discrete else outputs)
    mean = torch.cat(actions)
    return (mean + noise * torch.randn_like(mean)).clamp(-1, 1) if noise else mean


def table(values: Tensor, buffer: ReplayBuffer) -> Tensor:
    """Values [N] as [E, T], with zeros after each episode's end."""
    return torch.nn.utils.rnn.pad_sequence(list(values.double().split(buffer.episode_lengths.tolist())), True)


def gather(buffer: ReplayBuffer, args: Args) -> tuple[Evidence, dict[str, Any]]:
    """The evidence, and what is to be said of beta."""
    data, lengths = buffer.transitions, buffer.episode_lengths
    size = float(data.rewards.square().mean().sqrt()) or 1.0
    actions = one_hot(data.actions, buffer.num_actions).float() if buffer.num_actions else data.actions
    batch = Batch(data.observations, actions, data.rewards / size, data.next_observations, data.terminations)
    beta, told = None, {"beta": "none"}
    if buffer.num_actions or args.noise:
        log_probs, told = logged_probabilities(buffer.dataset), {"beta": "logged"}
        ends = (actions.abs() == 1).any(dim=1) & (not buffer.num_actions)  # a mass is there, and logged is a density
        if log_probs is None or ends.any():
            chosen = (torch.randperm(len(lengths)) < len(lengths) / 5).repeat_interleave(lengths)
            dims = buffer.num_actions or 5 * (2 * actions.shape[1] + 1)  # w, means and log stds of five components
            fitted, likelihoods = fit_behaviour(batch, chosen, dims, buffer.num_legal, args)
            check_argument(args, "learning_rate", fitted is not None, "is too high: beta diverged")
            told = {"beta": "fitted" if log_probs is None else "logged, fitted at bounds"} | likelihoods
            log_probs = fitted if log_probs is None else torch.where(ends, fitted, log_probs)
        beta = table(log_probs, buffer)
    return Evidence(buffer, batch, size, table(data.rewards, buffer), beta, bootstrap(len(lengths), args.draws)), told


def judge_data(evidence: Evidence, args: Args) -> dict[str, Any]:
    """The returns that were recorded, the share of the discount beyond them, and fqe of the data's own actions."""
    buffer, batch, gamma = evidence.buffer, evidence.batch, args.gamma
    starts, lengths = buffer.episode_starts, buffer.episode_lengths
    ended = batch.terminations[starts + lengths - 1] == 1
    followed = torch.ones(len(batch.rewards), dtype=torch.bool)
    followed[starts + lengths - 1] = ended  # where a cut is, nobody knows the next action
    check(bool(followed.any()), "all episodes are one step and cut: what follows is unknown; if they ended, say so")
    critic = fit_critic(batch, (batch.actions, batch.actions.roll(-1, dims=0)), followed.nonzero()[:, 0], args)
    v = q_of(critic, batch.observations[starts], batch.actions[starts]) * evidence.size / (1 - gamma)
    returns = evidence.rewards @ discounts(gamma, evidence.rewards.shape[1])
    found = {"return": evidence.mean(returns[None]), "fqe": evidence.mean(v)}
    return found | {"beyond": float((gamma ** lengths.double() * ~ended).mean())}


def judge(policy: Policy, evidence: Evidence, dynamics: Ensemble, args: Args) -> dict[str, Any]:
    """All estimates of a policy, in the environment's units."""
    buffer, batch, unit = evidence.buffer, evidence.batch, evidence.size / (1 - args.gamma)
    starts, ends = buffer.episode_starts, buffer.episode_starts + buffer.episode_lengths - 1
    pi: Any = tuple(act(policy, states, buffer, args.noise) for states in (batch.observations, batch.next_observations))
    critic = fit_critic(batch, pi, torch.arange(len(batch.rewards)), args)
    v = q_of(critic, batch.observations, pi[0]) * unit  # [members, N]
    play = partial(act, policy, buffer=buffer, noise=args.noise)
    returns = rollouts(dynamics, batch.observations[starts], play, batch, args.gamma)
    found: dict[str, Any] = {"fqe": evidence.mean(v[:, starts]), "model": evidence.mean(returns * evidence.size)}
    if evidence.log_beta is None:
        return found
    log_pi = (pi[0] * batch.actions).sum(dim=1).log()  # 0 or -inf, of discrete actions
    if args.noise:
        log_pi = log_clipped_normal(batch.actions, act(policy, batch.observations, buffer), torch.tensor(args.noise))
    rho = cumulative_ratios(table(log_pi, buffer) - evidence.log_beta)
    found |= {"ess": effective_sample_size(rho[:, -1]), "weight": float(rho[:, -1].mean())}
    if found["ess"] < args.least_effective:
        return found
    q = q_of(critic, batch.observations, batch.actions) * unit
    last = q_of(critic, batch.next_observations[ends], pi[1][ends]) * unit * (1 - batch.terminations[ends])
    known: dict[str, Any] = {"rho": rho, "rewards": evidence.rewards, "gamma": args.gamma}
    found["is"] = evidence.summarize(partial(is_estimate, **known))
    found["wis"] = evidence.summarize(partial(wis_estimate, **known))
    of_seeds = []  # by Q and V of each member and, at the end, by their mean
    for own_q, own_v, own_last in zip(*(torch.cat([x, x.mean(0, keepdim=True)]) for x in (q, v, last)), strict=True):
        own_v = pad(table(own_v, buffer), (0, 1))  # [E, T + 1]: after the last step V of s', 0 if that terminated
        own_v[torch.arange(len(ends)), buffer.episode_lengths] = own_last
        estimate: Any = partial(wdr_estimate, **known, q=table(own_q, buffer), v=own_v)
        of_seeds.append(estimate(torch.ones(1, len(ends)).double()))
    return found | {"wdr": evidence.summarize(estimate, torch.cat(of_seeds[:-1]))}


def describe(found: dict[str, Any]) -> str:
    interval = "{estimate:.3g} ({low:.3g} to {high:.3g})".format_map
    return ", ".join(f"{name} {interval(x) if isinstance(x, dict) else f'{x:.3g}'}" for name, x in found.items())


def main(args: Args) -> None:
    ExperimentArgs.validate(args)  # type: ignore[arg-type]
    for name, least in (("num_members", 2), ("draws", 2), ("conservative", 0), ("noise", 0)):
        check_argument(args, name, getattr(args, name) >= least, f"must be at least {least}")
    run, policies = read_runs(args)
    args.gamma = gamma = run["gamma"]
    check(0 < gamma < 1, f"--gamma {gamma}: must be in (0, 1)")
    check(not args.out.is_dir(), f"--out {args.out}: is a folder; name a file in it")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    count = len((buffer := load_buffer(args, run)).episode_lengths)
    check(count > 1, f"{run['dataset_id']} holds one episode: intervals need several; cut the log into episodes")
    if count < 20:
        warn(f"{count} episodes are few: no interval of fewer than 20 can be trusted")
    if args.num_updates < (needed := math.ceil(3 / (args.tau * (1 - gamma)))):
        warn(f"--num-updates {args.num_updates}: fqe will know the near future alone; tau and gamma ask for {needed:,}")
    evidence, told = gather(buffer, args)
    result = {"dataset_id": run["dataset_id"], "gamma": gamma, "episodes": count} | told
    result |= {"data": judge_data(evidence, args), "policies": {}}
    print(f"data, {count} episodes, beta {told['beta']}: {describe(result['data'])}", flush=True)
    dynamics = fit_dynamics(evidence.batch, args)
    for path, policy in zip(args.policies, policies, strict=True):
        torch.manual_seed(args.seed)  # so that an estimate is the same whatever others are asked for
        found = result["policies"][str(path)] = judge(policy, evidence, dynamics, args)
        check_argument(args, "learning_rate", math.isfinite(found["fqe"]["estimate"]), "is too high: Q diverged")
        print(f"{path}: {describe(found)}", flush=True)
        replace(args.out, lambda file: file.write(json.dumps(result, indent=2).encode()))


if __name__ == "__main__":
    launch(main, Args)
