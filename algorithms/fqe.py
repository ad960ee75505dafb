"""Fitted Q evaluation (FQE): what a policy would earn, estimated from logged data alone.

It trains no policy. Q(s, a) is fitted to what a saved one, pi (--policy-run-dir), earns after action a at state s, each
target asking pi for the action at s'; the estimate is Q where episodes start. An ensemble says how much of it hangs on
which episodes the data happen to hold: each member m has as many as there are, drawn anew with replacement (its
bootstrap sample D_m), and networks of its own. With Q'_m its target network, a slow copy of Q_m:

    L      = sum_m E_{D_m}[ (r + gamma (1 - termination) Q'_m(s', pi(s')) - Q_m(s, a))^2 ]
    J_m    = mean over the episodes of D_m of Q'_m(s_0, pi(s_0))
    J(pi)  = mean_m J_m  +- t sqrt(1 + 1/M) std_m J_m,  t the 97.5 % quantile of Student's law of M - 1 degrees

J is the return discounted by gamma over an endless horizon (a time limit is no end) from the data's initial states. It
ranks policies; the undiscounted returns that other runs report are another quantity.

The interval is of 95 % only for what differs between members: the noise of sampling and of training. What all of them
get wrong alike is not in it: where pi acts as the data never did, Q is extrapolation; before a few times
1 / (tau (1 - gamma)) updates, J_m knows the near future alone; and networks have a bias of their own. So the truth can
lie many times the width away: the doubt is at least this large.

Paper: Le, Voloshin, Yue, "Batch Policy Learning under Constraints", 2019, arXiv 1903.08738; the bootstrap of episodes
is from Hao, Ji, Duan, Lu, Szepesvari, Wang, "Bootstrapping Fitted Q-Evaluation for Off-Policy Inference", 2021, arXiv
2102.03607.
Differences: steps of Adam towards a slow target network, where the paper solves a regression to the end for each of its
iterations; costs are rewards; few members and Student's quantile, where Hao et al. take the quantiles of many; layer
normalisation in the critics (as in Ball et al., 2023, arXiv 2302.02948), without which Q can run away where pi leaves
the data.

Run: python algorithms/fqe.py --policy-run-dir runs/iql
"""

import copy
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, check_argument, launch
from common.compile import compiled
from common.datasets import BadInput, Dataset, check, load_dataset, warn
from common.evaluation import Policy, evaluate, load_policy, make_environments
from common.experiment import Run, Summary, set_up
from common.optim import Adam
from common.replay_buffer import Batch, ReplayBuffer

Metrics = dict[str, Tensor]


@dataclass
class Args(ExperimentArgs):
    algorithm: ClassVar[str] = "fqe"

    policy_run_dir: str | None = None
    """folder of the run whose policy is evaluated; its policy.pt is copied into this run's"""
    gamma: float = 0.99
    """discount of the return that is estimated"""
    num_members: int = 5
    """M, critics in the ensemble, each with a bootstrap sample of the episodes"""
    tau: float = 0.05
    """rate at which the target critics follow the critics: what Q lacks fades with 1 / (tau (1 - gamma)) updates, which
    with the 0.005 usual in control are 20,000"""
    critic_learning_rate: float = 3e-4
    """usual for Adam"""
    hidden_dims: tuple[int, ...] = (256, 256)
    """hidden layers of every critic"""
    normalize_observations: bool = True
    """by the mean and standard deviation of the data; the policy sees what it saw in its own training"""

    def validate(self) -> None:
        super().validate()
        check_argument(self, "gamma", 0 < self.gamma < 1, "must be in (0, 1)")
        check_argument(self, "num_members", self.num_members >= 2, "must be at least 2, for an interval")
        check(
            self.resume or self.policy_run_dir is not None,
            "--policy-run-dir is needed: the folder of the run to evaluate",
        )


# --- Networks -------------------------------------------------------------------------------------------------------


class EnsembleLinear(nn.Module):
    """A linear layer per member, side by side: one batched product, [members, batch, in] -> [members, batch, out]."""

    def __init__(self, num_members: int, input_dim: int, output_dim: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(input_dim)  # nn.Linear's own initialisation
        self.weight = nn.Parameter(torch.empty(num_members, input_dim, output_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_members, 1, output_dim).uniform_(-bound, bound))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, inputs, self.weight)


class Critic(nn.Module):
    """Q_1(s, a) to Q_M(s, a): the members, each with inputs of its own."""

    def __init__(self, num_members: int, observation_dim: int, action_dim: int, hidden_dims: tuple[int, ...]) -> None:
        super().__init__()
        widths = [observation_dim + action_dim, *hidden_dims, 1]
        self.layers = nn.ModuleList(EnsembleLinear(num_members, *pair) for pair in pairwise(widths))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        x = torch.cat([observations, actions], dim=-1)  # [members, batch, observation_dim + action_dim]
        for layer in self.layers[:-1]:
            x = layer(x)
            x = torch.relu(F.layer_norm(x, x.shape[-1:]))
        return self.layers[-1](x).squeeze(-1)  # [members, batch]


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    critic: Critic
    target_critic: Critic
    optimizer: Adam


def build(observation_dim: int, action_dim: int, args: Args, device: torch.device) -> Learner:
    """Fresh networks and their optimiser."""
    critic = Critic(args.num_members, observation_dim, action_dim, args.hidden_dims).to(device)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    return Learner(critic, target_critic, Adam([{"params": critic.parameters(), "lr": args.critic_learning_rate}]))


# --- Policy ---------------------------------------------------------------------------------------------------------


def load(args: Args, dataset: Dataset) -> Policy:
    """The policy to evaluate: of its own run or, resuming, the copy in this one. Raises BadInput if it is of another
    task than the data.
    """
    run_dir = args.run_dir if args.resume else args.policy_run_dir
    where = "--resume" if args.resume else f"--policy-run-dir {run_dir}"
    try:
        policy = load_policy(run_dir or "")
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None
    check(not policy.discrete, f"{where}: the policy's actions are discrete, and this script is for continuous ones")
    found = len(policy.observation_mean), len(policy.action_low)
    expected = dataset.observation_dim, len(dataset.action_low)
    sizes = f"{where}: the policy has observation and action sizes {found}, {dataset.dataset_id} has {expected}"
    check(found == expected, sizes)
    same = np.allclose(policy.action_low, dataset.action_low) and np.allclose(policy.action_high, dataset.action_high)
    check(same, f"{where}: the policy's range of actions is not that of {dataset.dataset_id}")
    return policy


@torch.no_grad()
def act(policy: Policy, observations: Tensor, buffer: ReplayBuffer) -> Tensor:
    """pi(s) of every row of `observations` [N, observation_dim], both as the buffer has them. [N, action_dim]"""
    actions = []
    for rows in observations.split(1024):  # some at a time, so that memory stays small
        raw = (rows * buffer.observation_std + buffer.observation_mean).cpu()  # in the environment's units
        actions.append(policy.actor((raw - policy.observation_mean) / policy.observation_std))
    return torch.cat(actions).to(observations.device)


# --- Bootstrap ------------------------------------------------------------------------------------------------------


class Bootstrap:
    """D_1 to D_M: for each member as many episodes as the data hold, drawn with replacement.

    `counts` [members, E] says how often each member has each of the E episodes.
    """

    def __init__(self, buffer: ReplayBuffer, num_members: int) -> None:
        device, num_episodes = buffer.storage.device, len(buffer.episode_lengths)
        drawn = torch.randint(num_episodes, (num_members, num_episodes))
        counts = torch.zeros(num_members, num_episodes, dtype=torch.float64)
        self.counts = counts.scatter_add_(1, drawn, torch.ones_like(counts)).to(device)
        self.starts, self.lengths = buffer.episode_starts.to(device), buffer.episode_lengths.to(device)

    def sample(self, batch_size: int) -> Tensor:
        """Rows of the buffer, [members, batch], uniform over the transitions of each D_m."""
        episodes = torch.multinomial(self.counts * self.lengths, batch_size, replacement=True)
        lengths = self.lengths[episodes]
        return self.starts[episodes] + (torch.rand(lengths.shape, device=lengths.device) * lengths).long()


# --- Losses ---------------------------------------------------------------------------------------------------------


def critic_loss(learner: Learner, batch: Batch, next_actions: Tensor, gamma: float) -> tuple[Tensor, Metrics]:
    """L = sum_m E_{D_m}[ (r + gamma (1 - termination) Q'_m(s', pi(s')) - Q_m(s, a))^2 ]

    Everything in `batch`, and pi(s'), is [members, batch, ...].
    """
    with torch.no_grad():
        next_q = learner.target_critic(batch.next_observations, next_actions)  # [members, batch], each its own
        target = batch.rewards + gamma * (1 - batch.terminations) * next_q  # a truncation bootstraps
    q = learner.critic(batch.observations, batch.actions)
    loss = len(q) * F.mse_loss(q, target)  # the mean over the members, too, times their number: their sum
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


# --- Update ---------------------------------------------------------------------------------------------------------


def update(learner: Learner, batch: Batch, next_actions: Tensor, step: int, args: Args) -> Metrics:
    """One gradient step of every member, then the target critics follow the critics. `step` counts from 1."""
    loss, metrics = critic_loss(learner, batch, next_actions, args.gamma)
    loss.backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()

    with torch.no_grad():  # Q' <- Q' + tau (Q - Q')
        torch._foreach_lerp_(list(learner.target_critic.parameters()), list(learner.critic.parameters()), args.tau)
    return metrics


# --- Estimate -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def estimates(critic: Critic, observations: Tensor, actions: Tensor, counts: Tensor) -> np.ndarray:
    """J_m = mean over the episodes of D_m of Q_m(s_0, pi(s_0)), [members], given every s_0 and pi(s_0), [E, ...]"""
    chunks = zip(observations.split(4096), actions.split(4096), strict=True)
    q = torch.cat([critic(s.expand(len(counts), -1, -1), a.expand(len(counts), -1, -1)) for s, a in chunks], dim=1)
    return ((counts * q).sum(dim=1) / counts.sum(dim=1)).cpu().numpy()


def student_quantile(probability: float, degrees: int) -> float:
    """Student's t is sqrt(degrees) tan(angle), an angle of density proportional to cos(angle)^(degrees - 1)."""
    edges = np.linspace(-np.pi / 2, np.pi / 2, 10_001)
    below = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (degrees - 1))
    return math.sqrt(degrees) * math.tan(np.interp(probability, below / below[-1], edges[1:]))


def interval(members: Sequence[float] | np.ndarray) -> dict[str, float]:
    """mean_m J_m and, around it, +- t sqrt(1 + 1/M) std_m J_m. The truth is off the estimate from all the data as far
    as a bootstrap's draw is: where a further draw would lie in 95 of 100 cases, there the truth does.
    """
    num_members, mean = len(members), float(np.mean(members))
    quantile = student_quantile(0.975, num_members - 1)
    half_width = quantile * math.sqrt(1 + 1 / num_members) * float(np.std(members, ddof=1))
    return {"fqe/estimate": mean, "fqe/low": mean - half_width, "fqe/high": mean + half_width}


def headline(found: dict[str, float]) -> str:
    return f"estimate {found['fqe/estimate']:.1f} ({found['fqe/low']:.1f} to {found['fqe/high']:.1f})"


def true_returns(policy: Policy, dataset: Dataset, args: Args) -> np.ndarray | None:
    """The policy's discounted returns in the dataset's environment, [eval_episodes]; without one, None."""
    if dataset.env_id is None:
        return None
    horizon = math.ceil(math.log(0.001) / math.log(args.gamma))  # Q knows of no time limit: here gamma^t is the limit
    endless = replace(dataset, max_episode_steps=horizon)
    environments = make_environments(endless, args.eval_episodes, args.trust_dataset_env)
    return None if environments is None else evaluate(policy, environments, args.gamma)


def summarize(run: Run, args: Args, members: np.ndarray, truth: np.ndarray | None) -> Summary:
    """The estimate and, where there is an environment, the truth."""
    final = interval(members)
    result = {
        "policy_run_dir": args.policy_run_dir,
        "gamma": args.gamma,
        "estimate": final["fqe/estimate"],
        "interval": [final["fqe/low"], final["fqe/high"]],
        "member_estimates": members.tolist(),
        "true_return_mean": None if truth is None else float(truth.mean()),
        "true_return_std": None if truth is None else float(truth.std()),
    }
    outcome = f"{headline(final)}, no environment to compare with"
    if truth is not None:
        error = truth.std() / math.sqrt(len(truth))
        outcome = f"{headline(final)}, in the environment {truth.mean():.1f} (standard error {error:.1f})"
    return Summary(result, outcome, lambda path: plot(path, args, run.evaluations, truth))


def plot(path: Path, args: Args, evaluations: list[dict[str, float]], truth: np.ndarray | None) -> None:
    from matplotlib.figure import Figure  # slow to import, and needed once

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    names = "step", "fqe/estimate", "fqe/low", "fqe/high"
    steps, estimate, low, high = ([row[name] for row in evaluations] for name in names)
    axes.plot(steps, estimate, marker=".", label=f"fqe, seed {args.seed}")
    axes.fill_between(steps, low, high, alpha=0.2, label=f"95 % interval of {args.num_members} members")
    if truth is not None:
        label = f"in the environment, {len(truth)} episodes"
        axes.axhline(float(truth.mean()), color="black", linestyle="--", linewidth=1, label=label)
    axes.set(xlabel="updates", ylabel=f"return, discounted by {args.gamma:g}", title=args.dataset_id)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150, format="png")


# --- Main -----------------------------------------------------------------------------------------------------------


def warn_of_too_few_updates(args: Args) -> None:
    """An update moves Q' by tau towards gamma times its own error, at best: of that, exp(-tau (1 - gamma)) is left."""
    needed = math.ceil(3 / (args.tau * (1 - args.gamma)))
    if args.num_updates < needed:
        what = f"--num-updates {args.num_updates}: the estimate will know the near future alone"
        warn(f"{what}; this tau and gamma ask for {needed:,} or more")


def main(args: Args) -> None:
    device = set_up(args)
    dataset = load_dataset(args.dataset_id, args.env_id)
    policy = load(args, dataset)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations)
    several = f"{args.dataset_id} holds one episode: a bootstrap needs several; cut the log into episodes"
    check(len(buffer.episode_lengths) > 1, several)
    # rewards of size 1, times 1 - gamma: Q is then an average of the rewards to come, of a size that it learns soon
    scale = (1 - args.gamma) / (float(buffer.transitions.rewards.square().mean().sqrt()) or 1.0)
    buffer.transitions.rewards.mul_(scale)

    bootstrap = Bootstrap(buffer, args.num_members)  # a resumed run draws the same: the seed is the same
    learner = build(buffer.observation_dim, buffer.action_dim, args, device)
    train = compiled(update, args, device)
    truth = true_returns(policy, dataset, args)
    run = Run(args, buffer, learner, policy)
    warn_of_too_few_updates(args)
    next_actions = act(policy, buffer.transitions.next_observations, buffer)  # once: pi does not change
    initial_observations = buffer.transitions.observations[buffer.episode_starts.to(device)]
    initial_actions = act(policy, initial_observations, buffer)

    def members() -> np.ndarray:  # J_1 to J_M, in the environment's units
        return estimates(learner.target_critic, initial_observations, initial_actions, bootstrap.counts) / scale

    for step in run.steps():
        rows = bootstrap.sample(args.batch_size)
        batch = Batch(*(part[rows] for part in buffer.transitions))
        metrics = train(learner, batch, next_actions[rows], step, args)

        if evaluating := run.is_due(step, args.eval_every):
            found = interval(members())
            run.evaluations.append({"step": step} | found)
            run.progress.set_postfix_str(headline(found))
            metrics |= found
        if evaluating or run.is_due(step, args.log_every):
            run.log(step, metrics)
        if run.is_due(step, args.checkpoint_every):
            run.save_checkpoint(step)
    run.finish(summarize(run, args, members(), truth))


if __name__ == "__main__":
    launch(main, Args)
