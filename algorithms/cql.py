"""Conservative Q-learning (CQL): a critic that is made to doubt every action outside the data.

The actor-critic is SAC's, without entropy in the target. Its critic pays for high values at the actions that the policy
might choose and is paid for them at the data's. With a large enough cql_alpha its estimate of the policy's value is a
lower bound, and an error of extrapolation attracts nobody. With Q' the target critic and `temperature` SAC's entropy
coefficient:

    y    = r + gamma (1 - termination) min_i Q'_i(s', a'),  a' ~ pi(.|s')
    L_Q  = sum_i E[ (Q_i(s, a) - y)^2 + cql_alpha gap_i(s, a) ]                   (eq. 3; variant h: eq. 4)
    L_pi = E[ temperature log pi(a_pi | s) - min_i Q_i(s, a_pi) ],  a_pi ~ pi(.|s), differentiable
    L_temperature = E[ -temperature (log pi(a_pi | s) + target entropy) ]

The gap is max_mu E_mu[Q(s, .)] + R(mu) - Q(s, a), and the choice of R is the --variant:

    h     R = T entropy of mu:      T log integral exp(Q(s, .) / T) - Q(s, a),  T = --gap-softness
    rho   R = -KL(mu | rho):        E_rho[ Q exp(Q) / Z ] - Q(s, a),  Z = E_rho[ exp Q ]; R itself is left out, as in
                                    the paper, and the gradient is the same with it
    var   mu in a ball around pi:   E_pi[Q] + sqrt(Var_pi[Q] / (d(s) |D|)) - Q(s, a)
    mean  mu is uniform, R = 0:     E_mu[Q(s, .)] - Q(s, a), without the max                   (eq. 2, the basic form)

In the first --warm-start updates the actor clones: L_pi has log pi(a | s), of the data, in place of min_i Q_i(s, a_pi).
--max-backup has min_i max_k Q'_i(s', a'_k) in y, k = 1 .. num_samples; --entropy-in-backup subtracts
temperature log pi(a' | s') there, as SAC does. --lagrange tunes cql_alpha until the gap is --target-gap. --cql-alpha 0
leaves off-policy SAC: on narrow data, watch critic/q_policy rise above critic/q_data, and both above what the policy
scores.

Paper: Kumar, Zhou, Tucker, Levine, "Conservative Q-Learning for Offline Reinforcement Learning", 2020,
arXiv 2006.04779; SAC is arXiv 1812.05905.
Differences: the squared error has no factor 1/2, as in the authors' code. What the authors' code does otherwise:
- Its actor clones for its first 40,000 updates; ours for none unless asked.
- Its losses step in turn; here one optimiser step trains everything, each loss seeing the others as they were before.
- Its T divides the actions' log-densities, too; ours leaves these whole, so that any T has its own integral.
- Observations are as they come; ours are normalised.
- Last layers start within 0.003 (critics) and 0.001 (actor), first ones within 1 / sqrt(outputs), as in rlkit, hidden
  biases at 0.1; ours as PyTorch's do, uniform within 1 / sqrt(inputs). Its target critics start with weights of their
  own, ours as copies.
- The loss of the temperature has its logarithm; ours has the temperature.
- Cloning clips the data's actions at 1e-6 from the bounds; ours at 1e-3.
- It never acts. With --online-steps pi takes a step before each update, and L_Q stays as it is. Cal-QL's code
  (arXiv 2303.05479), whose baseline is CQL, plays an episode, then makes as many updates, on batches half of data.
rho is the policy of the last target update, which is the actor as this update finds it, or uniform. In a continuous
space no state of the data occurs twice: the count d(s) |D| is 1.

Run: python algorithms/cql.py --dataset-id anchorl/pendulum/mixed-v0          (README.md has faster arguments)
"""

import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (paper)
    variant: Literal["h", "rho", "var", "mean"] = "h"
    """regulariser of the adversary mu: CQL(H), CQL(rho) or CQL(var) (paper, section 3.2 and appendix A); mean: mu is
    uniform, not an adversary (paper, eq. 2)"""
    rho: Literal["policy", "uniform"] = "policy"
    """the prior of CQL(rho): the policy of the last target update (paper), or uniform"""
    gap_softness: float = 1.0
    """T of CQL(H): if small, the gap takes the largest Q(s, .), if large its mean and a constant (authors: temp, 1)"""
    cql_alpha: float = 10.0
    """weight of the gap in L_Q: 0 is SAC on fixed data; with --lagrange where it starts (authors' readme: 5 or 10,
    code: 1)"""
    num_samples: int = 10
    """actions drawn per state: uniform, from pi(.|s), and for CQL(H) from pi(.|s') (paper: the first two)"""
    lagrange: bool = False  # tune cql_alpha so that the gap becomes --target-gap (paper, eq. 30)
    target_gap: float = 5.0
    """gap to aim at with --lagrange (paper: tau, 5 or 10). The authors' code holds min_q_weight (gap +
    log(3 num_samples)) at lagrange_thresh: weight 1 and 5, its defaults, are a gap of 1.6; 1 and 10 are 6.6; 5 and 5,
    which its readme has for AntMaze, are -2.4"""
    max_backup: bool = False
    """the target takes the best of num_samples actions at s', the lower of the twins' bests (authors' max_q_backup)"""
    entropy_in_backup: bool = False
    """the target has SAC's entropy term (authors' code: deterministic_backup False, which is not their default)"""
    warm_start: int = 0  # updates for which the actor clones the data first (authors' code: policy_eval_start, 40,000)
    target_entropy: float | None = None  # the temperature holds the policy's entropy to it; default: -action_dim (SAC)
    tau: float = 0.005  # rate at which the target critic follows the critic (paper)
    actor_learning_rate: float = 1e-4  # of Adam, for the actor and the temperature (paper: 3e-5 to 3e-4)
    critic_learning_rate: float = 3e-4  # of Adam, also for cql_alpha under --lagrange (paper)
    hidden_dims: tuple[int, ...] = (256, 256, 256)  # hidden layers of every network (authors' code)


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

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """log pi(a | s), [batch], of actions of the data."""
        mean, std = self.distribution(observations)
        u = actions.clamp(-1 + 1e-3, 1 - 1e-3).atanh()  # clipped as in BRAC: tanh reaches no bound
        return squashed_log_prob((u - mean) / std, std, u)


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


# --- Losses ---------------------------------------------------------------------------------------------------------


def adversary_h(q: Tensor, log_density: Tensor, softness: float = 1.0) -> Tensor:
    """CQL(H): T log integral exp(Q(s, a) / T) da, estimated from actions [n, batch] of known density by importance
    sampling, where T is the `softness`.

    T log (1/n) sum_k exp(Q(s, a_k) / T - log density(a_k)): q [2, n, batch] -> [2, batch]. The sum goes over the
    actions of one state; its gradient is the softmax of Q / T, largest at the action that the critic believes in most.
    """
    return softness * (torch.logsumexp(q / softness - log_density, dim=1) - math.log(q.shape[1]))


def adversary_rho(q: Tensor) -> Tensor:
    """CQL(rho): E_rho[ Q exp(Q) / Z ] over actions drawn from rho, Z = E_rho[ exp Q ]: q [2, n, batch] -> [2, batch].

    The weights are mu itself, the adversary's best answer: constants of the loss (envelope theorem).
    """
    weight = (q.detach() - q.detach().amax(dim=1, keepdim=True)).exp()
    mu = weight / weight.sum(dim=1, keepdim=True)  # self-normalised: the mean over n cancels in exp(Q) / Z
    return (mu * q).sum(dim=1)


def adversary_var(q: Tensor) -> Tensor:
    """CQL(var): E_pi[Q] + sqrt(Var_pi[Q] / count) over actions drawn from pi, count = 1: q [2, n, batch] -> [2, batch].

    The largest E_mu[Q] over all mu in a ball of radius 1 / count around pi, to first order.
    """
    return q.mean(dim=1) + (q.var(dim=1) + 1e-6).sqrt()  # the square root has no slope at 0


def critic_loss(
    learner: Learner, policy: tuple[Tensor, Tensor], batch: Batch, uniform: Tensor, noise: Tensor, args: HyperParameters
) -> tuple[Tensor, Metrics]:
    """L_Q = sum_i E[ (Q_i(s, a) - y)^2 + cql_alpha gap_i(s, a) ]        (eq. 3; variant h: eq. 4)

    `policy`: actions [n, batch, action_dim] drawn from pi(.|s), and their log pi [n, batch]; `uniform`: as many on
    [-1, 1]; `noise`: standard normal, for as many from pi(.|s'). All actions are constants here.
    """
    with torch.no_grad():
        next_actions, next_log_prob = learner.actor.sample(batch.next_observations, noise)
        backup_actions = next_actions if args.max_backup else next_actions[:1]  # [n or 1, batch, action_dim]
        next_q = learner.target_critic(batch.next_observations, backup_actions)  # [2, n or 1, batch]
        next_q = next_q.amax(dim=1).min(dim=0).values  # [batch]: each twin's best action, then the lower twin
        if args.entropy_in_backup:
            next_q = next_q - learner.actor.log_temperature.exp() * next_log_prob[0]
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_q  # a truncation bootstraps
    actions, log_prob = policy[0].detach(), policy[1].detach()
    candidates = [batch.actions.unsqueeze(0), uniform, actions]
    if args.variant == "h":  # pi(.|s') at s, too: actions that a policy near by would choose
        candidates.append(next_actions)
    q = learner.critic(batch.observations, torch.cat(candidates))  # [2, 1 + 2n or 1 + 3n, batch]
    n = args.num_samples
    q_data, q_random, q_policy = q[:, 0], q[:, 1 : n + 1], q[:, n + 1 : 2 * n + 1]

    if args.variant == "h":
        log_uniform = torch.full_like(log_prob, -batch.actions.shape[-1] * math.log(2))  # density 1 / 2 per dimension
        expected = adversary_h(q[:, 1:], torch.cat([log_uniform, log_prob, next_log_prob]), args.gap_softness)
    elif args.variant == "rho":
        expected = adversary_rho(q_policy if args.rho == "policy" else q_random)
    elif args.variant == "var":
        expected = adversary_var(q_policy)
    else:  # no adversary
        expected = q_random.mean(dim=1)
    gap = (expected - q_data).mean(dim=1)  # [2]: pushes Q down where mu is, and up at the data
    cql_alpha = args.cql_alpha * learner.multiplier().clamp(max=1e6)
    bellman_error = (q_data - target).square().mean(dim=1)  # [2]
    loss = (bellman_error + cql_alpha.detach() * gap).sum()
    metrics = {
        "critic/loss": loss.detach(),
        "critic/bellman_error": bellman_error.detach().sum(),
        "critic/gap": gap.detach().mean(),
        "critic/q_data": q_data.detach().mean(),
        "critic/q_policy": q_policy.detach().mean(),
        "critic/q_random": q_random.detach().mean(),
        "critic/cql_alpha": cql_alpha.detach(),
    }
    if args.lagrange:  # max over cql_alpha of cql_alpha (gap - target): it grows while the gap is too large (eq. 30)
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


def cloning_loss(actor: Actor, temperature: Tensor, batch: Batch, log_prob: Tensor) -> tuple[Tensor, Metrics]:
    """L_pi of the warm start: E[ temperature log pi(a_pi | s) - log pi(a | s) ], a of the data"""
    data_log_prob = actor.log_prob(batch.observations, batch.actions)
    loss = (temperature.detach() * log_prob - data_log_prob).mean()
    return loss, {"actor/loss": loss.detach(), "actor/log_prob": data_log_prob.detach().mean()}


def temperature_loss(temperature: Tensor, log_prob: Tensor, target_entropy: float) -> tuple[Tensor, Metrics]:
    """L_temperature = E[ -temperature (log pi(a_pi | s) + target entropy) ]: it grows while the entropy is too low."""
    entropy = -log_prob.detach().mean()
    loss = temperature * (entropy - target_entropy)
    return loss, {"actor/temperature": temperature.detach(), "actor/entropy": entropy}


# --- Update ---------------------------------------------------------------------------------------------------------


def total_loss(
    learner: Learner, batch: Batch, step: int, uniform: Tensor, noise: Tensor, args: HyperParameters
) -> tuple[Tensor, Metrics]:
    """L_Q + L_pi + L_temperature. Each reaches the weights of one network only, so one backward pass serves all."""
    temperature = learner.actor.log_temperature.exp()
    actions, log_prob = learner.actor.sample(batch.observations, noise[0])  # n per state: all for L_Q, one for L_pi
    loss_q, metrics_q = critic_loss(learner, (actions, log_prob), batch, uniform, noise[1], args)
    if step <= args.warm_start:
        loss_pi, metrics_pi = cloning_loss(learner.actor, temperature, batch, log_prob[0])
    else:
        loss_pi, metrics_pi = actor_loss(learner.critic, temperature, batch.observations, actions[0], log_prob[0])
    target_entropy = -actions.shape[-1] if args.target_entropy is None else args.target_entropy
    loss_t, metrics_t = temperature_loss(temperature, log_prob[0], target_entropy)
    return loss_q + loss_pi + loss_t, metrics_q | metrics_pi | metrics_t


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of all networks, then the target critic follows the critic. `step` counts from 1."""
    shape = args.num_samples, *batch.actions.shape
    uniform = torch.rand(shape, device=batch.actions.device) * 2 - 1
    noise = torch.randn(2, *shape, device=batch.actions.device)
    loss, metrics = total_loss(learner, batch, step, uniform, noise, args)
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
from common.command_line import ExperimentArgs, check_argument, launch, warn
from common.data import ReplayBuffer, hold_out, load_dataset
from common.evaluation import Player, make_environments
from common.experiment import Run, set_up
from common.optim import Adam, compiled


@dataclass
class Args(HyperParameters, ExperimentArgs):
    reward_scale: float | Literal["return-range"] = 1.0  # multiplies rewards; return-range: their returns span 1,000
    reward_shift: float = 0.0  # added to rewards first
    normalize_observations: bool = True  # by the mean and standard deviation of the data
    online_steps: int = 0  # after the other updates, steps that the policy takes, by sampling, with an update each

    def validate(self) -> None:
        super().validate()
        check_argument(self, "cql_alpha", self.cql_alpha >= 0, "must not be negative")
        check_argument(self, "cql_alpha", self.cql_alpha > 0 or not self.lagrange, "--lagrange must start above 0")
        enough = self.num_samples > 1 or self.variant != "var"
        check_argument(self, "num_samples", enough, "must be at least 2 with --variant var, for a variance")
        check_argument(self, "gap_softness", self.gap_softness > 0, "must be positive")
        used = self.variant == "h" or self.gap_softness == Args.gap_softness
        check_argument(self, "gap_softness", used, "has a say with --variant h alone")
        used = self.variant == "rho" or self.rho == Args.rho
        check_argument(self, "rho", used, "has a say with --variant rho alone")
        used = self.lagrange or self.target_gap == Args.target_gap
        check_argument(self, "target_gap", used, "has a say with --lagrange alone")
        both = self.max_backup and self.entropy_in_backup
        check_argument(self, "entropy_in_backup", not both, "not with --max-backup, whose action is chosen, not drawn")


def main(args: Args) -> None:
    device = set_up(args)
    dataset = hold_out(load_dataset(args.dataset_id, args.env_id), args)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations, room=args.online_steps)
    buffer.scale_rewards(args.reward_scale, args.reward_shift)

    learner = build(buffer.observation_dim, buffer.action_dim, args, device, Adam)
    train = compiled(update, learner, args)
    player = Player(make_environments(dataset, 1)[0], buffer, args.seed) if args.online_steps else None
    run = Run(args, buffer, learner, update, player=player)  # makes the run folder, or goes back to its checkpoint
    if args.warm_start >= run.last_step:
        warn(f"--warm-start {args.warm_start}: the actor clones the data to the end of these {run.last_step} updates")

    def explore(observations: Tensor) -> Tensor:
        return learner.actor.sample(observations, torch.randn(1, buffer.action_dim, device=device))[0]

    for step in range(run.first_step, run.last_step + 1):
        if player and step > args.num_updates:  # a transition more, which counts as much as one of the data
            buffer.add(player.step(run.policy(player.observation[None], explore)[0]))
        metrics = train(learner, Batch(*buffer.sample(args.batch_size)), step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
