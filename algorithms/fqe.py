"""Fitted Q evaluation (FQE): an estimate, from logged data alone, of what a trained policy would earn.

FQE trains no policy. It fits Q(s, a) to what a saved policy pi (that of --policy-run-dir) earns after action a at state
s; each target asks pi for the action at s'. The estimate is the mean of Q where episodes start. An ensemble shows how
much it depends on which episodes the data happen to hold. Each member m learns from a bootstrap sample D_m: as many
episodes as the data hold, drawn anew with replacement. With Q'_m the member's target network, a slow copy of its Q_m:

    L      = sum_m E_{D_m}[ (r + gamma (1 - termination) Q'_m(s', pi(s')) - Q_m(s, a))^2 ]
    J_m    = mean over the episodes of D_m of Q'_m(s_0, pi(s_0))
    J(pi)  = mean_m J_m  +- t sqrt(1 + 1/M) std_m J_m,  t the 97.5 % quantile of Student's law of M - 1 degrees

J is the return discounted by gamma over an endless horizon (a time limit is no end) from the data's initial states. It
ranks policies. The undiscounted returns that other runs report are another quantity.

The interval is of 95 % for the errors that differ between members: the noise of sampling and of training. It knows
nothing of the errors that all members share. Where pi acts as the data never did, Q is extrapolated. Before a few times
1 / (tau (1 - gamma)) updates, J_m knows the near future alone. Networks have a bias of their own. So the truth can lie
many widths away: the doubt is at least as large as the interval.

Paper: Le, Voloshin, Yue, "Batch Policy Learning under Constraints", 2019, arXiv 1903.08738; the bootstrap of episodes
is from Hao, Ji, Duan, Lu, Szepesvari, Wang, "Bootstrapping Fitted Q-Evaluation for Off-Policy Inference", 2021, arXiv
2102.03607.
Differences: steps of Adam towards a slow target network, where the paper solves each of its regressions to the end;
rewards, where the paper has costs; few members and Student's quantile, where Hao et al. take the quantiles of many
members; layer normalisation in the critics (as in Ball et al., 2023, arXiv 2302.02948), without which Q can run away
where pi leaves the data.

Run: python algorithms/fqe.py --policy-run-dir runs/iql
"""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount of the return that is estimated
    num_members: int = 5  # M, critics in the ensemble, each with a bootstrap sample of the episodes
    tau: float = 0.05
    """rate at which the target critics follow the critics. Q needs 3 / (tau (1 - gamma)) updates to know the far
    future: 6,000 here, and 60,000 with the 0.005 usual in control"""
    critic_learning_rate: float = 3e-4  # of Adam (the usual one)
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of every critic


class Batch(NamedTuple):
    """Transitions, in float32: some for each member, and the policy's actions at s'."""

    observations: Tensor  # [members, batch, observation_dim], normalised
    actions: Tensor  # [members, batch, action_dim] in [-1, 1]; discrete ones as one-hot vectors
    rewards: Tensor  # [members, batch]
    next_observations: Tensor  # [members, batch, observation_dim], normalised
    terminations: Tensor  # [members, batch], 1 where the environment ended the episode; a truncation bootstraps
    next_actions: Tensor  # [members, batch, action_dim] in [-1, 1], pi(s')


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


class Critic(nn.Module):
    """Q_1(s, a) to Q_M(s, a): the members, each with inputs of its own."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        widths = [observation_dim + action_dim, *args.hidden_dims, 1]
        self.layers = nn.ModuleList(EnsembleLinear(args.num_members, *pair) for pair in pairwise(widths))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        x = torch.cat([observations, actions], dim=-1)  # [members, batch, observation_dim + action_dim]
        for layer in self.layers[:-1]:
            x = layer(x)
            x = torch.relu_(layer_norm(x, x.shape[-1:]))
        return self.layers[-1](x).squeeze(-1)  # [members, batch]


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    critic: Critic
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
    critic = Critic(observation_dim, action_dim, args).to(device)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    return Learner(critic, target_critic, adam([{"params": critic.parameters(), "lr": args.critic_learning_rate}]))


# --- Bootstrap ------------------------------------------------------------------------------------------------------


class Bootstrap:
    """D_1 to D_M: for each member as many episodes as the data hold, drawn with replacement.

    Episodes are rows of the data: each of the E has a first row, in `starts` [E], and a number of rows, in `lengths`
    [E]. `counts` [members, E] says how often each member has each episode.
    """

    def __init__(self, starts: Tensor, lengths: Tensor, num_members: int) -> None:
        drawn = torch.randint(len(starts), (num_members, len(starts)))
        counts = torch.zeros(drawn.shape, dtype=torch.float64)
        self.counts = counts.scatter_add_(1, drawn, torch.ones_like(counts)).to(starts.device)
        self.starts, self.lengths = starts, lengths

    def sample(self, batch_size: int) -> Tensor:
        """Rows of the data, [members, batch], uniform over the transitions of each D_m."""
        episodes = torch.multinomial(self.counts * self.lengths, batch_size, replacement=True)
        lengths = self.lengths[episodes]
        return self.starts[episodes] + (torch.rand(lengths.shape, device=lengths.device) * lengths).long()


# --- Losses ---------------------------------------------------------------------------------------------------------


def critic_loss(learner: Learner, batch: Batch, gamma: float) -> tuple[Tensor, Metrics]:
    """L = sum_m E_{D_m}[ (r + gamma (1 - termination) Q'_m(s', pi(s')) - Q_m(s, a))^2 ]"""
    with torch.no_grad():
        next_q = learner.target_critic(batch.next_observations, batch.next_actions)  # [members, batch], each its own
        target = batch.rewards + gamma * (1 - batch.terminations) * next_q  # a truncation bootstraps
    q = learner.critic(batch.observations, batch.actions)  # [members, batch]
    loss = (target - q).square().mean(dim=1).sum()  # the mean over the batch, the sum over the members
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


# --- Update ---------------------------------------------------------------------------------------------------------


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of every member, then the target critics follow the critics. `step` counts from 1."""
    loss, metrics = critic_loss(learner, batch, args.gamma)
    loss.backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()

    with torch.no_grad():  # Q' <- Q' + tau (Q - Q')
        torch._foreach_lerp_(list(learner.target_critic.parameters()), list(learner.critic.parameters()), args.tau)
    return metrics


# --- Estimate -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def estimates(critic: Critic, observations: Tensor, actions: Tensor, counts: Tensor) -> Tensor:
    """J_m = mean over the episodes of D_m of Q_m(s_0, pi(s_0)), [members], given every s_0 and pi(s_0), [E, ...]."""
    chunks = zip(observations.split(4096), actions.split(4096), strict=True)
    q = torch.cat([critic(s.expand(len(counts), -1, -1), a.expand(len(counts), -1, -1)) for s, a in chunks], dim=1)
    return (counts * q).sum(dim=1) / counts.sum(dim=1)


def student_quantile(probability: float, degrees: int) -> float:
    """Student's t is sqrt(degrees) tan(angle), an angle of density proportional to cos(angle)^(degrees - 1)."""
    edges = torch.linspace(-math.pi / 2, math.pi / 2, 10_001, dtype=torch.float64)
    below = ((edges[1:] + edges[:-1]) / 2).cos().pow(degrees - 1).cumsum(0)  # what lies below each edge but the first
    below = below / below[-1]
    i = int(torch.searchsorted(below, probability))  # the angle is between edges i and i + 1
    part = (probability - below[i - 1]) / (below[i] - below[i - 1])
    return math.sqrt(degrees) * math.tan(torch.lerp(edges[i], edges[i + 1], part))


def interval(members: Tensor) -> dict[str, float]:
    """mean_m J_m and, around it, +- t sqrt(1 + 1/M) std_m J_m: where one more member would lie in 95 of 100 cases.

    The bootstrap's assumption is that the truth is as far from the estimate as that member would be.
    """
    num_members, mean = len(members), float(members.mean())
    quantile = student_quantile(0.975, num_members - 1)
    half_width = quantile * math.sqrt(1 + 1 / num_members) * float(members.std())
    return {"fqe/estimate": mean, "fqe/low": mean - half_width, "fqe/high": mean + half_width}


# === The copy line: what is above needs PyTorch alone; below are command line, data, run folder and evaluation ========

import sys
from pathlib import Path
from typing import IO

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import BadInput, ExperimentArgs, check, check_argument, launch, warn
from common.data import Dataset, ReplayBuffer, load_dataset
from common.evaluation import Policy, evaluate, load_policy, make_environments
from common.experiment import Run, replace, set_up
from common.optim import Adam, compiled


@dataclass
class Args(HyperParameters, ExperimentArgs):
    policy_run_dir: str | None = None  # folder of the run whose policy is evaluated; policy.pt is copied from it
    policy_script: Path | None = None  # path of the script that trained the policy, if it is not in algorithms/
    normalize_observations: bool = True
    """by the mean and standard deviation of the data; the policy sees what it saw in its own training"""

    def hyper_parameters(self) -> dict[str, Any]:
        """Without the path of a script, which may be another one when a run is resumed; a run's as `Path` writes it."""
        found = {name: value for name, value in super().hyper_parameters().items() if name != "policy_script"}
        return found | {"policy_run_dir": str(Path(self.policy_run_dir or ""))}

    def validate(self) -> None:
        super().validate()
        check_argument(self, "gamma", 0 < self.gamma < 1, "must be in (0, 1)")
        check_argument(self, "num_members", self.num_members >= 2, "must be at least 2, for an interval")
        check_argument(self, "validation_fraction", self.validation_fraction == 0, "FQE holds nothing out")
        check(bool(self.policy_run_dir), "--policy-run-dir is needed: the folder of the run to evaluate")


def load(args: Args, dataset: Dataset) -> Policy:
    """The policy to evaluate: of its own run or, resuming, the copy in this one. Raises BadInput if it is of another
    task than the data.
    """
    folder, where = args.policy_run_dir or "", f"--policy-run-dir {args.policy_run_dir}"
    if args.resume and (Path(args.run_dir or "") / "policy.pt").is_file():
        folder, where = str(args.run_dir), "--resume"
    try:
        policy = load_policy(folder, args.policy_script)
    except BadInput as error:
        raise BadInput(f"{where}: {error}".replace("(--script)", "(--policy-script)")) from None
    history = f"{where}: its Actor needs its episode's history (`follow`), which only playing gives it"
    check(not getattr(policy.actor, "needs_history", False), history)
    kinds = [f"{'discrete' if discrete else 'continuous'} actions" for discrete in (policy.discrete, dataset.discrete)]
    check(kinds[0] == kinds[1], f"{where}: the policy has {kinds[0]}, {dataset.dataset_id} has {kinds[1]}")
    found = policy.normalization.shape[1], policy.action_range.shape[1]
    expected = len(dataset.observation_names), len(dataset.action_low)
    sizes = f"{where}: the policy has observation and action sizes {found}, {dataset.dataset_id} has {expected}"
    check(found == expected, sizes)
    same = np.allclose(policy.action_range.cpu(), [dataset.action_low, dataset.action_high])
    check(same, f"{where}: the policy's range of actions is not that of {dataset.dataset_id}")
    for kind, names in (("observation", dataset.observation_names), ("action", dataset.action_names)):
        known, numbers = policy.origin[f"{kind}_names"] or names, [str(number) for number in range(len(names))]
        same = known == names or numbers in (known, names)  # these are of data that do not say
        check(same, f"{where}: its {kind}s are {known}, those of {dataset.dataset_id} {names}")
    return policy


def encode(actions: Tensor, num_actions: int) -> Tensor:
    """Discrete actions [N] as one-hot vectors [N, num_actions]; others as they are."""
    return torch.nn.functional.one_hot(actions, num_actions).float() if num_actions else actions


def act(policy: Policy, observations: Tensor, buffer: ReplayBuffer) -> Tensor:
    """pi(s) of every row of `observations` [N, observation_dim], as the buffer has them: [N, action_dim], encoded."""
    actions = []
    for rows in observations.split(1024):  # some at a time, so that memory stays small
        raw = (rows * buffer.normalization[1] + buffer.normalization[0]).cpu()  # in the environment's units
        outputs = policy.act(((raw - policy.normalization[0]) / policy.normalization[1]).float())
        actions.append(encode(outputs.argmax(dim=1), buffer.num_actions) if policy.discrete else outputs)
    return torch.cat(actions).to(observations.device)


def true_returns(policy: Policy, dataset: Dataset, args: Args) -> np.ndarray | None:
    """The policy's discounted returns in the dataset's environment, [eval_episodes]; without one, None."""
    if dataset.env_id is None:  # nothing to warn of: FQE is for where there is none
        return None
    try:
        environments = make_environments(dataset, args.eval_episodes)
    except BadInput as reason:
        check(args.env_id is None, f"--env-id: {reason}")
        warn(f"the estimate is compared with nothing: {reason}")
        return None
    horizon = math.ceil(math.log(0.001) / math.log(args.gamma))  # Q knows of no time limit: here gamma^t is the limit
    for environment in environments:
        environment.set_wrapper_attr("_max_episode_steps", horizon)  # of Gymnasium's TimeLimit
    return evaluate(policy, environments, gamma=args.gamma)[0]


def warn_of_too_few_updates(args: Args) -> None:
    """An update leaves at best exp(-tau (1 - gamma)) of the error of Q', which moves by tau towards a target that has
    gamma times this error.
    """
    needed = math.ceil(3 / (args.tau * (1 - args.gamma)))
    if args.num_updates < needed:
        what = f"--num-updates {args.num_updates}: the estimate will know the near future alone"
        warn(f"{what}; this tau and gamma ask for {needed:,} or more")


def summarize(args: Args, members: Tensor, truth: np.ndarray | None) -> tuple[dict[str, Any], str]:
    """The estimate and, where there is an environment, the truth: for result.json, and in words."""
    mean, low, high = interval(members).values()
    result = {
        "policy_run_dir": args.policy_run_dir,
        "gamma": args.gamma,
        "estimate": mean,
        "interval": [low, high],
        "member_estimates": members.tolist(),
        "true_return_mean": None if truth is None else float(truth.mean()),
        "true_return_std": None if truth is None else float(truth.std()),
    }
    compared = "no environment to compare with"
    if truth is not None:
        error = truth.std() / math.sqrt(max(len(truth) - 1, 1))
        compared = f"in the environment {truth.mean():.1f} (standard error {error:.1f})"
    return result, f"estimate {mean:.1f} ({low:.1f} to {high:.1f}), {compared}"


def plot(file: IO[bytes], run: Run, args: Args, truth: np.ndarray | None) -> None:
    from matplotlib.figure import Figure  # slow to import, and needed once

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    rows = [row for row in run.rows() if row.get("fqe/estimate")]
    names = "step", "fqe/estimate", "fqe/low", "fqe/high"
    steps, estimate, low, high = ([float(row[name]) for row in rows] for name in names)
    axes.plot(steps, estimate, marker=".", label=f"fqe, seed {args.seed}")
    axes.fill_between(steps, low, high, alpha=0.2, label=f"95 % interval of {args.num_members} members")
    if truth is not None:
        label = f"in the environment, {len(truth)} episodes"
        axes.axhline(float(truth.mean()), color="black", linestyle="--", linewidth=1, label=label)
    axes.set(xlabel="updates", ylabel=f"return, discounted by {args.gamma:g}", title=args.dataset_id)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150, format="png")


def main(args: Args) -> None:
    device = set_up(args)
    dataset = load_dataset(args.dataset_id, args.env_id, discrete=None)
    policy = load(args, dataset)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations)
    several = f"{args.dataset_id} holds one episode: a bootstrap needs several; cut the log into episodes"
    check(len(buffer.episode_lengths) > 1, several)
    # rewards of size 1, times 1 - gamma: Q is then an average of the rewards to come, of a size that it learns soon
    scale = (1 - args.gamma) / (float(buffer.transitions.rewards.square().mean().sqrt()) or 1.0)
    buffer.transitions.rewards.mul_(scale)

    episodes = buffer.episode_starts.to(device), buffer.episode_lengths.to(device)
    bootstrap = Bootstrap(*episodes, args.num_members)  # a resumed run draws the same: the seed is the same
    learner = build(buffer.observation_dim, buffer.num_actions or buffer.action_dim, args, device, Adam)
    train = compiled(update, learner, args)
    truth = true_returns(policy, dataset, args)
    run = Run(args, buffer, learner, update)  # makes the run folder or, with --resume, goes back to its checkpoint
    replace(run.dir / "policy.pt", policy.save)  # a resumed run needs it, and its own run may be gone by then
    warn_of_too_few_updates(args)
    data = buffer.transitions._replace(actions=encode(buffer.transitions.actions, buffer.num_actions))
    transitions = *data, act(policy, data.next_observations, buffer)  # pi does not change
    initial_observations = buffer.transitions.observations[bootstrap.starts]
    initial_actions = act(policy, initial_observations, buffer)

    def members() -> Tensor:  # J_1 to J_M, in the environment's units
        return estimates(learner.target_critic, initial_observations, initial_actions, bootstrap.counts) / scale

    for step in range(run.first_step, args.num_updates + 1):
        rows = bootstrap.sample(args.batch_size)
        metrics = train(learner, Batch(*(part[rows] for part in transitions)), step, args)
        if run.is_due(step, args.eval_every):
            metrics = metrics | interval(members())
        run.record(step, metrics)  # logs and saves, each when it is due
    result, outcome = summarize(args, members(), truth)
    run.finish(result, outcome, lambda file: plot(file, run, args, truth))


if __name__ == "__main__":
    launch(main, Args)
