"""Calibrated Q-learning (Cal-QL): CQL that lowers the policy's Q only down to the data's return, then goes online.

CQL's critic lies below every value that the environment will show. Where its actor goes on in the environment, the
first new actions seem better than the old ones, and what the data taught is unlearned. So here the push on the policy's
actions ends where their Q has come down to the return R that followed the state in the data: the scale is right when
the policy begins to act. With Q' the target critic and `temperature` SAC's entropy coefficient:

    y    = r + gamma (1 - termination) max_k min_i Q'_i(s', a'_k),  a'_k ~ pi(.|s'), k = 1 .. num_samples
    L_Q  = sum_i E[ (Q_i(s, a) - y)^2 + cql_alpha gap_i(s, a) ]
    gap  = log integral exp(B(s, .)) - Q(s, a),  B = max(Q(s, a~), R) at a~ ~ pi, Q(s, a~) at a~ that is uniform
    L_pi = E[ temperature log pi(a_pi | s) - min_i Q_i(s, a_pi) ],  a_pi ~ pi(.|s), differentiable
    L_temperature = E[ -temperature (log pi(a_pi | s) + target entropy) ]
    R_t  = r_t + gamma (1 - termination_t) R_{t+1}

A time limit leaves no R_{t+1} to its step, and plain returns do not bootstrap: the last reward stands for all that
would come, R_t = r_t / (1 - gamma). --lagrange tunes cql_alpha until the gap is --target-gap. After --num-updates on
the data alone, --online-steps alternate whole episodes of the policy and as many updates, --data-ratio of whose batches
is data.

Paper: Nakamoto, Zhai, Singh, Sobol Mark, Ma, Finn, Kumar, Levine, "Cal-QL: Calibrated Offline RL Pre-Training for
Efficient Online Fine-Tuning", 2023, arXiv 2303.05479; CQL is arXiv 2006.04779, SAC arXiv 1812.05905.
Differences: as in the authors' code, the squared error has no factor 1/2, and each loss sees the others as they were
before the step. The gap's actions serve y (at s') and L_pi (one of them, at s), too; the authors draw these anew. The
log standard deviation of the action before tanh is at least -5, as in CQL's code; theirs -20. The gap lacks their log(3
num_samples), which is constant. The temperature's loss is SAC's (theirs: of its logarithm). Their R goes on after a cut
only in kitchen, and in AntMaze and Adroit where an episode failed; after other cuts it ends, as it would in tasks with
dense rewards, and is then too high where rewards are negative. Entropy in y, off in their scripts, and a gap without
the actions' densities are not here. Their loader leaves out the last transition of an episode that a time limit cut.
Observations are normalised. Layers start as PyTorch's do (uniform within 1 / sqrt(inputs)); theirs start orthogonal,
the last ones near 0, and the standard deviation of u smaller by exp(-1).

Run: python algorithms/cal_ql.py --dataset-id anchorl/pendulum/mixed-v0       (README.md has faster ones, cql.py's)
"""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (authors' code)
    cql_alpha: float = 5.0
    """weight of the gap in L_Q; with --lagrange where it starts (authors' code: 5; 1 in Adroit; in antmaze 5e)"""
    num_samples: int = 10  # actions drawn per state: uniform, from pi(.|s), and from pi(.|s') (authors' code)
    lagrange: bool = False  # tune cql_alpha so that the gap becomes --target-gap (authors' code: in antmaze)
    target_gap: float = -2.6
    """gap to aim at with --lagrange (authors' code in antmaze: 0.8, of a gap that has log(3 num_samples) in it)"""
    max_backup: bool = True
    """the target takes the best of num_samples actions at s', by the lower of the twins (authors' code)"""
    target_entropy: float | None = None  # the temperature holds the policy's entropy to it; default: -action_dim (SAC)
    tau: float = 0.005  # rate at which the target critic follows the critic (authors' code)
    actor_learning_rate: float = 1e-4  # of Adam, for the actor and the temperature (authors' code)
    critic_learning_rate: float = 3e-4  # of Adam, also for cql_alpha under --lagrange (authors' code)
    hidden_dims: tuple[int, ...] = (256, 256)
    """hidden layers of each network (authors' code; antmaze: critics 4; Adroit 3 of 512, actors 2; kitchen 3 of 512)"""


class Batch(NamedTuple):
    """Transitions, in float32."""

    observations: Tensor  # [batch, observation_dim], normalised
    actions: Tensor  # [batch, action_dim] in [-1, 1]
    rewards: Tensor  # [batch]
    next_observations: Tensor  # [batch, observation_dim], normalised
    terminations: Tensor  # [batch], 1 where the environment ended the episode; a truncation bootstraps
    returns: Tensor  # [batch], R: what the episode earned from here on, discounted


# --- Networks -------------------------------------------------------------------------------------------------------


def mlp(input_dim: int, hidden_dims: tuple[int, ...], output_dim: int) -> list[nn.Module]:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for width in hidden_dims:
        layers += [nn.Linear(input_dim, width), nn.ReLU(inplace=True)]
        input_dim = width
    return [*layers, nn.Linear(input_dim, output_dim)]


def squashed_log_prob(noise: Tensor, std: Tensor, u: Tensor) -> Tensor:
    """log pi(a | s) of a = tanh(u), where u = mean + std noise: [..., action_dim] -> [...].

    log pi = sum_j log Normal(u_j) - log(1 - tanh(u_j)^2), and log(1 - tanh(u)^2) = 2 (log 2 - |u| - log(1 + e^-2|u|)):
    this stays finite where tanh(u) is rounded to 1.
    """
    log_normal = -(0.5 * noise.square() + std.log() + 0.5 * math.log(2 * math.pi))
    return (log_normal - 2 * (math.log(2) - u.abs() - (-2 * u.abs()).exp().log1p())).sum(dim=-1)


class Actor(nn.Module):
    """pi(a | s): a = tanh(u), u ~ Normal(mean(s), std(s))."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        *hidden, mean = mlp(observation_dim, args.hidden_dims, action_dim)
        self.trunk, self.mean = nn.Sequential(*hidden), mean
        self.log_std = nn.Linear(args.hidden_dims[-1], action_dim)  # a second head on the last hidden layer
        self.log_temperature = nn.Parameter(torch.zeros(()))  # of SAC's entropy coefficient, trained beside pi

    def forward(self, observations: Tensor) -> Tensor:
        """The deterministic policy tanh(mean): [batch, action_dim] in [-1, 1]."""
        return self.mean(self.trunk(observations)).tanh()

    def distribution(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of u, the action before tanh: [batch, action_dim] each."""
        hidden = self.trunk(observations)
        return self.mean(hidden), self.log_std(hidden).clamp(-5, 2).exp()  # CQL's range; SAC's begins at -20

    def sample(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions tanh(mean + std noise), [..., batch, action_dim], of a standard normal `noise` of their shape, and
        log pi(a | s), [..., batch].
        """
        mean, std = self.distribution(observations)
        u = mean + std * noise
        return u.tanh(), squashed_log_prob(noise, std, u)


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
        observations = observations.expand(*actions.shape[:-1], -1)
        x = torch.cat([observations, actions], dim=-1).flatten(0, -2).expand(2, -1, -1)
        for layer in self.layers[:-1]:
            x = torch.relu_(layer(x))
        return self.layers[-1](x).view(2, *actions.shape[:-1])


class Coefficient(nn.Module):
    """A positive number that is learned through its logarithm."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(()))

    def forward(self) -> Tensor:
        return self.log.exp()


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor
    critic: Critic
    target_critic: Critic
    multiplier: Coefficient  # of cql_alpha: 1 unless --lagrange trains it
    optimizer: Any


def build(
    observation_dim: int,
    action_dim: int,
    args: HyperParameters,
    device: torch.device | str = "cpu",
    adam: Any = torch.optim.Adam,
) -> Learner:
    """Fresh networks and their optimiser: one Adam with a parameter group per network, the actor's first."""
    actor = Actor(observation_dim, action_dim, args).to(device)
    critic = Critic(observation_dim, action_dim, args).to(device)
    multiplier = Coefficient().to(device)
    groups = [
        {"params": actor.parameters(), "lr": args.actor_learning_rate},
        {"params": [*critic.parameters(), *multiplier.parameters()], "lr": args.critic_learning_rate},
    ]
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    return Learner(actor, critic, target_critic, multiplier, adam(groups))


# --- Returns --------------------------------------------------------------------------------------------------------


def returns_to_go(rewards: Tensor, terminations: Tensor, episode_lengths: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + gamma (1 - termination_t) R_{t+1} of every transition, [N].

    The last step of an episode has no R_{t+1}: cut by a time limit, its reward goes on for ever, r_t / (1 - gamma).
    `rewards` and `terminations` [N] hold the episodes of `episode_lengths` [E] one after the other.
    """
    last = episode_lengths.to(rewards.device).cumsum(0) - 1
    factor = gamma * (1 - terminations)
    returns = rewards.clone()
    returns[last] += factor[last] * rewards[last] / (1 - gamma)
    factor[last] = 0
    # R_t = returns_t + factor_t R_{t+1}, and R_{t+1} obeys the same equation. Put into each other, they give
    # R_t = (returns_t + factor_t returns_{t+1}) + factor_t factor_{t+1} R_{t+2}. So each pass over all steps doubles
    # the reach, and log2 of the longest episode's length passes do what a loop backwards through time would. At the end
    # of an episode the factor is 0: nothing of the next episode enters.
    reach, longest = 1, int(episode_lengths.max())
    while reach < longest:
        returns[:-reach] += factor[:-reach] * returns[reach:]
        factor[:-reach] *= factor[reach:].clone()
        reach *= 2
    return returns


# --- Losses ---------------------------------------------------------------------------------------------------------


def adversary(q: Tensor, log_density: Tensor) -> Tensor:
    """log integral exp(Q(s, a)) da, estimated from actions [n, batch] of known density by importance sampling.

    log (1/n) sum_k exp(Q(s, a_k) - log density(a_k)): q [2, n, batch] -> [2, batch]. The sum goes over the actions of
    one state; its gradient is the softmax of Q, largest at the action that the critic believes in most.
    """
    return torch.logsumexp(q - log_density, dim=1) - math.log(q.shape[1])


def critic_loss(
    learner: Learner, policy: tuple[Tensor, Tensor], batch: Batch, uniform: Tensor, noise: Tensor, args: HyperParameters
) -> tuple[Tensor, Metrics]:
    """L_Q = sum_i E[ (Q_i(s, a) - y)^2 + cql_alpha gap_i(s, a) ]

    `policy`: actions [n, batch, action_dim] drawn from pi(.|s), and their log pi [n, batch]; `uniform`: as many on
    [-1, 1]; `noise`: standard normal, for as many from pi(.|s'). All actions are constants here.
    """
    with torch.no_grad():
        next_actions, next_log_prob = learner.actor.sample(batch.next_observations, noise)
        backup_actions = next_actions if args.max_backup else next_actions[:1]  # [n or 1, batch, action_dim]
        next_q = learner.target_critic(batch.next_observations, backup_actions)  # [2, n or 1, batch]
        next_q = next_q.min(dim=0).values.amax(dim=0)  # [batch]: the lower twin of each action, then the best action
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_q  # a truncation bootstraps
    actions, log_prob = policy[0].detach(), policy[1].detach()
    candidates = [batch.actions.unsqueeze(0), uniform, actions, next_actions]  # those of pi(.|s') at s, too
    q = learner.critic(batch.observations, torch.cat(candidates))  # [2, 1 + 3n, batch]
    n = args.num_samples
    q_data, q_random, q_policy = q[:, 0], q[:, 1 : n + 1], q[:, n + 1 :]

    bounded = q_policy.maximum(batch.returns)  # below what the data earned, nothing pushes Q down
    log_uniform = torch.full_like(log_prob, -batch.actions.shape[-1] * math.log(2))  # density 1 / 2 per dimension
    expected = adversary(torch.cat([q_random, bounded], dim=1), torch.cat([log_uniform, log_prob, next_log_prob]))
    gap = (expected - q_data).mean(dim=1)  # [2]: pushes Q down at the policy's and uniform actions, and up at the data
    cql_alpha = args.cql_alpha * learner.multiplier().clamp(max=1e6)
    bellman_error = (q_data - target).square().mean(dim=1)  # [2]
    loss = (bellman_error + cql_alpha.detach() * gap).sum()
    metrics = {
        "critic/loss": loss.detach(),
        "critic/bellman_error": bellman_error.detach().sum(),
        "critic/gap": gap.detach().mean(),
        "critic/q_data": q_data.detach().mean(),
        "critic/q_policy": q_policy[:, :n].detach().mean(),
        "critic/q_random": q_random.detach().mean(),
        "critic/returns": batch.returns.mean(),
        "critic/bounded": (q_policy.detach() < batch.returns).float().mean(),  # a share of the policy's actions
        "critic/cql_alpha": cql_alpha.detach(),
    }
    if args.lagrange:  # max over cql_alpha of cql_alpha (gap - target): it grows while the gap is too large
        loss = loss - cql_alpha * (gap.detach() - args.target_gap).mean()
    return loss, metrics


def actor_loss(
    critic: Critic, temperature: Tensor, observations: Tensor, actions: Tensor, log_prob: Tensor
) -> tuple[Tensor, Metrics]:
    """L_pi = E[ temperature log pi(a_pi | s) - min_i Q_i(s, a_pi) ], `actions` a_pi differentiable in the actor"""
    # Q with its weights held constant: the gradient passes through Q to the actions and changes no weight of Q itself.
    # functional_call runs a network with the weights it is given in place of its own.
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


def total_loss(
    learner: Learner, batch: Batch, uniform: Tensor, noise: Tensor, args: HyperParameters
) -> tuple[Tensor, Metrics]:
    """L_Q + L_pi + L_temperature. Each reaches the weights of one network only, so one backward pass serves all."""
    temperature = learner.actor.log_temperature.exp()
    actions, log_prob = learner.actor.sample(batch.observations, noise[0])  # n per state: all for L_Q, one for L_pi
    loss_q, metrics_q = critic_loss(learner, (actions, log_prob), batch, uniform, noise[1], args)
    loss_pi, metrics_pi = actor_loss(learner.critic, temperature, batch.observations, actions[0], log_prob[0])
    target_entropy = -actions.shape[-1] if args.target_entropy is None else args.target_entropy
    loss_t, metrics_t = temperature_loss(temperature, log_prob[0], target_entropy)
    return loss_q + loss_pi + loss_t, metrics_q | metrics_pi | metrics_t


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of all networks, then the target critic follows the critic. `step` counts from 1."""
    shape = args.num_samples, *batch.actions.shape
    uniform = torch.rand(shape, device=batch.actions.device) * 2 - 1
    noise = torch.randn(2, *shape, device=batch.actions.device)
    loss, metrics = total_loss(learner, batch, uniform, noise, args)
    loss.backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()

    with torch.no_grad():  # Q' <- Q' + tau (Q - Q')
        torch._foreach_lerp_(list(learner.target_critic.parameters()), list(learner.critic.parameters()), args.tau)
    return metrics


# === The copy line: what is above needs PyTorch alone; below are command line, data, run folder and evaluation ========

import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, check_argument, launch
from common.data import ReplayBuffer, hold_out, load_dataset
from common.evaluation import Player, make_environments
from common.experiment import Run, set_up
from common.optim import Adam, compiled


@dataclass
class Args(HyperParameters, ExperimentArgs):
    reward_scale: float | Literal["return-range"] = 1.0
    """multiplies rewards; return-range: their returns span 1,000 (authors' code: 10 in antmaze and Adroit)"""
    reward_shift: float = 0.0  # added to rewards first (authors' code: -0.5 in antmaze, 0.5 in Adroit)
    normalize_observations: bool = True  # by the mean and standard deviation of the data
    online_steps: int = 0
    """after the other updates, steps that the policy takes, by sampling, with an update each: whole episodes first,
    then as many updates (authors' code). The last episode goes to its end"""
    data_ratio: float = 0.5
    """share of a batch that is data, online; the rest are the policy's steps (authors' code; kitchen: 0.25)"""

    def validate(self) -> None:
        super().validate()
        check_argument(self, "gamma", 0 <= self.gamma < 1, "must be in [0, 1)")
        check_argument(self, "cql_alpha", self.cql_alpha >= 0, "must not be negative")
        check_argument(self, "cql_alpha", self.cql_alpha > 0 or not self.lagrange, "--lagrange must start above 0")
        used = self.lagrange or self.target_gap == Args.target_gap
        check_argument(self, "target_gap", used, "has a say with --lagrange alone")
        check_argument(self, "data_ratio", 0 <= self.data_ratio <= 1, "must be in [0, 1]")
        both = 0 < round(self.data_ratio * self.batch_size) < self.batch_size or self.data_ratio in (0, 1)
        check_argument(self, "data_ratio", both, f"a batch of {self.batch_size} has no room for both")


def draw_both(buffer: ReplayBuffer, batch_size: int, data_ratio: float) -> Tensor:
    """Rows [batch]: that share of them the data's, the others of what was played; each uniformly, with replacement."""
    ends, from_data = [0, buffer.num_loaded, len(buffer.storage)], round(data_ratio * batch_size)
    sizes = from_data, batch_size - from_data
    device = buffer.storage.device
    rows = [torch.randint(*pair, (size,), device=device) for pair, size in zip(pairwise(ends), sizes, strict=True)]
    return torch.cat(rows)


def main(args: Args) -> None:
    device = set_up(args)
    dataset = hold_out(load_dataset(args.dataset_id, args.env_id), args)
    environment, room = None, args.online_steps
    if args.online_steps:
        environment = make_environments(dataset, 1)[0]
        assert environment.spec is not None and environment.spec.max_episode_steps is not None  # make_environments'
        room += environment.spec.max_episode_steps  # at most: the last episode goes to its end
    buffer = ReplayBuffer(dataset, device, args.normalize_observations, room=room)
    buffer.scale_rewards(args.reward_scale, args.reward_shift)

    learner = build(buffer.observation_dim, buffer.action_dim, args, device, Adam)
    train = compiled(update, learner, args)
    player = Player(environment, buffer, args.seed) if environment else None

    def make_batch(held_out: ReplayBuffer, rows: Tensor) -> Batch:
        _, _, rewards, _, terminations = held_out.transitions
        returns = returns_to_go(rewards, terminations, held_out.episode_lengths, args.gamma)
        return Batch(*held_out.take(rows), returns[rows])

    run = Run(args, buffer, learner, update, make_batch, player)  # makes the run folder or goes back to its checkpoint

    def explore(observations: Tensor) -> Tensor:
        return learner.actor.sample(observations, torch.randn(1, buffer.action_dim, device=device))[0]

    _, _, rewards, _, terminations = buffer.transitions
    of_data = returns_to_go(rewards, terminations, buffer.episode_lengths, args.gamma)

    def compute_returns() -> Tensor:  # of the data and of the episodes that were played, which are whole
        if not player or not player.lengths:
            return of_data
        rows = torch.arange(buffer.num_loaded, len(buffer.storage), device=device)
        _, _, rewards, _, terminations = buffer.take(rows)
        return torch.cat([of_data, returns_to_go(rewards, terminations, torch.tensor(player.lengths), args.gamma)])

    returns = compute_returns()
    for step in range(run.first_step, run.last_step + 1):
        online_step = step - args.num_updates
        if player and len(buffer.storage) - buffer.num_loaded < online_step:
            episodes = len(player.lengths)
            while len(player.lengths) == episodes:
                buffer.add(player.step(run.policy(player.observation[None], explore)[0]))
            returns = compute_returns()
        online = online_step > 0
        rows = draw_both(buffer, args.batch_size, args.data_ratio) if online else buffer.draw(args.batch_size)
        metrics = train(learner, Batch(*buffer.take(rows), returns[rows]), step, args)
        metrics |= {"player/steps": len(buffer.storage) - buffer.num_loaded} if online else {}  # to an episode's end
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
