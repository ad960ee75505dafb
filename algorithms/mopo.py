"""Model-based offline policy optimization (MOPO): practise in a learned model, and pay for what the model is unsure of.

An ensemble of networks learns the dynamics from the data. SAC then learns from short rollouts of the current policy in
that model, started at states of the data, and every reward in them is lowered by how uncertain the model was: the
return there is to be a lower bound of the true one. With x = (s, a), z = (s' - s, r) and SAC's entropy `temperature`:

    p_k(z | x) = Normal(mean_k(x), std_k(x)),  k = 1 .. num_models
    L_model = sum_k E[ ((z - mean_k(x)) / std_k(x))^2 + 2 log std_k(x) ]
    r~      = r - penalty_coefficient u(s, a),  (s', r) drawn from one of the elites           (section 4.2)
    y       = r~ + gamma (1 - termination) (min_i Q'_i(s', a') - temperature log pi(a'|s')),  a' ~ pi(.|s')
    L_Q     = E[ sum_i (y - Q_i(s, a))^2 ]
    L_pi    = E[ temperature log pi(a_pi | s) - min_i Q_i(s, a_pi) ],  a_pi ~ pi(.|s), differentiable
    L_temperature = E[ -temperature (log pi(a_pi | s) + target entropy) ]

The batches of L_Q and L_pi are rollouts but for the share --real-ratio, which is data (its r has no penalty). The
uncertainty u is the --penalty, in the units of (s' - s, r) as the policy sees them, over the elites k:

    max_std       max_k |std_k|                                          (section 4.3, as in the authors' code)
    ensemble_std  |sqrt(E_k[std_k^2] + Var_k[mean_k])|, the standard deviation of the elites' mixture
    disagreement  max_k |mean_k - E_k[mean_k]|, which ignores the noise of the environment itself

Paper: Yu, Thomas, Yu, Ermon, Zou, Levine, Finn, Ma, "MOPO: Model-based Offline Policy Optimization", 2020,
arXiv 2005.13239; the model is that of MBPO, arXiv 1906.08253; SAC is arXiv 1812.05905.
Differences: observations, and so u, are in standard deviations of the data, where the authors' u is in units of the
environment, and over all members; z is normalised; each member draws every batch anew (theirs keep one bootstrap each),
stops on its own and has its own bounds of variance; log std of pi >= -5 (-20); no factor 1/2; one step trains pi and Q.

Run: python algorithms/mopo.py --dataset-id anchorl/pendulum/mixed-v0
"""

import copy
import math
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss, silu, softplus

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, check_argument, launch
from common.compile import compiled
from common.datasets import check, load_dataset
from common.experiment import Run, load_part, set_up
from common.optim import Adam
from common.replay_buffer import Batch, ReplayBuffer, RingBuffer
from common.terminations import TERMINATION_RULES, termination_rule

Metrics = dict[str, Tensor]


@dataclass
class Args(ExperimentArgs):
    algorithm: ClassVar[str] = "mopo"

    gamma: float = 0.99
    """discount (authors' code)"""
    penalty: Literal["max_std", "ensemble_std", "disagreement"] = "max_std"
    """u(s, a) (authors: max_std, which ends at the learned bound of variance; ensemble_std grows beyond the data)"""
    penalty_coefficient: float = 1.0
    """lambda, the weight of u in the reward; 0 trusts the model (paper: 0.5 to 5, in other units of u)"""
    rollout_length: int = 5
    """steps of a rollout, h (paper: 1 or 5)"""
    rollout_batch_size: int = 50_000
    """rollouts at a time, each from a state of the data (authors' code)"""
    rollout_every: int = 1_000
    """updates between rollouts with the newest policy (authors' code)"""
    rollouts_kept: int = 5
    """calls of the rollouts that the model's buffer holds, the newest (authors' code)"""
    real_ratio: float = 0.05
    """share of a batch that is data (paper)"""
    termination: Literal["auto", "rule", "learned", "never"] = "auto"
    """what ends a rollout: the environment's known rule, a head of the model, or nothing; auto: the rule, if known"""
    dynamics: str | None = None
    """dynamics.pt of an earlier run on the same data, instead of training the model"""
    num_models: int = 7
    """members of the ensemble (paper)"""
    num_elites: int = 5
    """members that are used, the best on held-out data (paper)"""
    dynamics_hidden_dims: tuple[int, ...] = (200, 200, 200, 200)
    """hidden layers of each member (paper)"""
    dynamics_learning_rate: float = 1e-3
    """of Adam (authors' code)"""
    dynamics_batch_size: int = 256
    """transitions per member and step (authors' code)"""
    dynamics_patience: int = 5
    """epochs without being better by 1% on held-out data after which a member is done (MBPO: all members at once)"""
    max_dynamics_epochs: int = 200
    """epochs at most"""
    target_entropy: float | None = None
    """entropy that the temperature holds the policy to; default: -action_dim (SAC; authors: -3)"""
    tau: float = 0.005
    """rate at which the target critic follows the critic (authors' code)"""
    actor_learning_rate: float = 3e-4
    """also of the temperature (authors' code)"""
    cosine_decay: bool = False
    """the actor's learning rate falls to 0 over the run, so that it ends with a policy that has settled"""
    critic_learning_rate: float = 3e-4
    """of Adam (authors' code)"""
    hidden_dims: tuple[int, ...] = (256, 256)
    """hidden layers of actor and critics (authors' code)"""
    normalize_observations: bool = True
    """by the mean and standard deviation of the data"""

    def validate(self) -> None:
        super().validate()
        check_argument(self, "penalty_coefficient", self.penalty_coefficient >= 0, "must not be negative")
        check_argument(self, "real_ratio", 0 <= self.real_ratio <= 1, "must be in [0, 1]")
        check_argument(self, "num_elites", 1 <= self.num_elites <= self.num_models, "must be in [1, --num-models]")


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


class Dynamics(nn.Module):
    """p_k(s' - s, r | s, a) of each member k, and the logit of its termination."""

    x_scale: Tensor
    z_scale: Tensor
    holdout_error: Tensor
    best_epoch: Tensor
    epoch: Tensor

    def __init__(self, observation_dim: int, action_dim: int, args: Args) -> None:
        super().__init__()
        self.sizes = observation_dim + 1, observation_dim + 1, 1  # mean, log-variance, logit
        widths = [observation_dim + action_dim, *args.dynamics_hidden_dims, sum(self.sizes)]
        self.layers = nn.ModuleList(EnsembleLinear(args.num_models, *pair) for pair in pairwise(widths))
        self.max_log_variance = nn.Parameter(torch.full((args.num_models, 1, self.sizes[0]), 0.5))
        self.min_log_variance = nn.Parameter(torch.full((args.num_models, 1, self.sizes[0]), -10.0))
        for name, size in (("x_scale", widths[0]), ("z_scale", self.sizes[0])):
            self.register_buffer(name, torch.tensor([[0.0], [1.0]]).repeat(1, size))  # mean and standard deviation
        self.register_buffer("holdout_error", torch.full((args.num_models,), 1e30))  # the least so far
        self.register_buffer("best_epoch", torch.zeros(args.num_models, dtype=torch.long))  # when it was the least
        self.register_buffer("epoch", torch.zeros((), dtype=torch.long))  # trained so far

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x = (s, a) [members, batch, in] -> mean and log-variance of normalised z = (s' - s, r), [members, batch, out]
        each, and the logit of termination [members, batch].
        """
        x = (x - self.x_scale[0]) / self.x_scale[1]
        for layer in self.layers[:-1]:
            x = silu(layer(x))
        mean, log_variance, logit = self.layers[-1](x).split(self.sizes, dim=-1)
        log_variance = self.max_log_variance - softplus(self.max_log_variance - log_variance)  # softly between bounds
        log_variance = self.min_log_variance + softplus(log_variance - self.min_log_variance)  # that are learned, too
        return mean, log_variance, logit.squeeze(-1)

    def predict(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and standard deviation of (s' - s, r) as the buffer has them, and the logit of termination."""
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


def mlp(input_dim: int, hidden_dims: tuple[int, ...], output_dim: int) -> list[nn.Module]:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for width in hidden_dims:
        layers += [nn.Linear(input_dim, width), nn.ReLU(inplace=True)]
        input_dim = width
    return [*layers, nn.Linear(input_dim, output_dim)]


class Actor(nn.Module):
    """pi(a | s): a = tanh(u), u ~ Normal(mean(s), std(s))."""

    def __init__(self, observation_dim: int, action_dim: int, hidden_dims: tuple[int, ...]) -> None:
        super().__init__()
        self.net = nn.Sequential(*mlp(observation_dim, hidden_dims, action_dim), nn.Tanh())
        self.log_std = nn.Linear(hidden_dims[-1], action_dim)  # a second head on the last hidden layer
        self.log_temperature = nn.Parameter(torch.zeros(()))  # of SAC's entropy coefficient, trained beside pi

    def forward(self, observations: Tensor) -> Tensor:
        """The deterministic policy tanh(mean): [batch, action_dim] in [-1, 1]."""
        return self.net(observations)

    def sample(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions tanh(mean + std noise), [batch, action_dim], and their log pi(a | s), [batch].

        log pi = sum_j log Normal(u_j) - log(1 - tanh(u_j)^2), and log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u))
        where the left side would be log 0.
        """
        hidden = self.net[:-2](observations)
        log_std = self.log_std(hidden).clamp(-5, 2)  # CQL's range
        u = self.net[-2](hidden) + log_std.exp() * noise
        log_normal = -(0.5 * noise.square() + log_std + 0.5 * math.log(2 * math.pi))
        return u.tanh(), (log_normal - 2 * (math.log(2) - u - softplus(-2 * u))).sum(dim=-1)


class Critic(nn.Module):
    """Q_1(s, a) and Q_2(s, a): twins, trained on the same target from different initial weights."""

    def __init__(self, observation_dim: int, action_dim: int, hidden_dims: tuple[int, ...]) -> None:
        super().__init__()
        widths = [observation_dim + action_dim, *hidden_dims, 1]
        self.layers = nn.ModuleList(EnsembleLinear(2, *pair) for pair in pairwise(widths))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        x = torch.cat([observations, actions], dim=-1).expand(2, -1, -1)
        for layer in self.layers[:-1]:
            x = torch.relu_(layer(x))
        return self.layers[-1](x).squeeze(-1)  # [2, batch]


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor
    critic: Critic
    target_critic: Critic
    dynamics: Dynamics  # each member as it was when its error on held-out data was least
    training_dynamics: Dynamics
    model_buffer: RingBuffer
    dynamics_optimizer: Adam
    optimizer: Adam


def build(observation_dim: int, action_dim: int, args: Args, device: torch.device) -> Learner:
    """Fresh networks and their optimisers, with a parameter group per network, the actor's first, or per layer."""
    actor = Actor(observation_dim, action_dim, args.hidden_dims).to(device)
    critic = Critic(observation_dim, action_dim, args.hidden_dims).to(device)
    groups = [
        {"params": actor.parameters(), "lr": args.actor_learning_rate},
        {"params": critic.parameters(), "lr": args.critic_learning_rate},
    ]
    dynamics = Dynamics(observation_dim, action_dim, args).to(device)
    layers, bounds = dynamics.layers, [dynamics.max_log_variance, dynamics.min_log_variance]
    decays = [*[2.5e-5, 5e-5, *[7.5e-5] * len(layers)][: len(layers) - 1], 1e-4]  # first to last layer (MBPO)
    groups_d = [{"params": [layer.weight], "weight_decay": d} for layer, d in zip(layers, decays, strict=True)]
    groups_d.append({"params": [*(layer.bias for layer in layers), *bounds]})
    capacity = args.rollout_batch_size * args.rollout_length * args.rollouts_kept
    model_buffer = RingBuffer(capacity, observation_dim, action_dim, device)
    best = copy.deepcopy(dynamics).requires_grad_(False)
    target_critic = copy.deepcopy(critic).requires_grad_(False)
    optimizers = Adam(groups_d, args.dynamics_learning_rate), Adam(groups)
    return Learner(actor, critic, target_critic, best, dynamics, model_buffer, *optimizers)


# --- Dynamics -------------------------------------------------------------------------------------------------------


def dynamics_loss(dynamics: Dynamics, x: Tensor, z: Tensor, terminations: Tensor) -> tuple[Tensor, Metrics]:
    """L_model = sum_k E[ (z - mean_k)^2 / variance_k + log variance_k ] + cross-entropy of terminations

    x [members, batch, in], z [members, batch, out], normalised here, terminations [members, batch]. The bounds of the
    variance are drawn together a little, so that they end where the data needs them (MBPO).
    """
    mean, log_variance, logit = dynamics(x)
    known = (terminations == 0) | (z[..., :-1] != 0).any(dim=-1)  # D4RL files without next observations: s' = s there
    z = (z - dynamics.z_scale[0]) / dynamics.z_scale[1]
    nll = ((z - mean).square() * torch.exp(-log_variance) + log_variance).mean(dim=2)  # [members, batch]
    nll = (nll * known).mean(dim=1)  # [members]
    ends = binary_cross_entropy_with_logits(logit, terminations, reduction="none").mean(dim=1)  # [members]
    bounds = 0.01 * (dynamics.max_log_variance - dynamics.min_log_variance).sum()
    return (nll + ends).sum() + bounds, {"dynamics/nll": nll.detach().mean(), "dynamics/ends": ends.detach().mean()}


def dynamics_update(learner: Learner, x: Tensor, z: Tensor, terminations: Tensor) -> Metrics:
    """One gradient step of all members, each on its own transitions."""
    loss, metrics = dynamics_loss(learner.training_dynamics, x, z, terminations)
    loss.backward()
    learner.dynamics_optimizer.step()
    learner.dynamics_optimizer.zero_grad()
    return metrics


@torch.no_grad()
def keep_better(best: Dynamics, training: Dynamics, x: Tensor, z: Tensor, patience: int) -> Tensor:
    """After an epoch: copies the members into `best` that are now better by 1% on held-out x, z, but none that was not
    for `patience` epochs. Mean squared errors [members] of all.
    """
    z = (z - training.z_scale[0]) / training.z_scale[1]
    error = (training(x.expand(len(best.holdout_error), -1, -1))[0] - z).square().mean(dim=(1, 2))
    best.epoch += 1
    better = (error < 0.99 * best.holdout_error) & (best.epoch <= best.best_epoch + patience)
    for kept, new in zip(best.parameters(), training.parameters(), strict=True):
        kept[better] = new[better]
    best.holdout_error[better] = error[better]
    best.best_epoch[better] = best.epoch
    return error


def fit_dynamics(run: Run, buffer: ReplayBuffer, learner: Learner, args: Args) -> None:
    """Trains the model until every member is done: see --dynamics-patience.

    An epoch has as many batches as the data, less those transitions held out: a fifth, 1,000 at most.
    """
    observations, actions, rewards, next_observations, terminations = buffer.transitions
    x = torch.cat([observations, actions], dim=1)
    z = torch.cat([next_observations - observations, rewards.unsqueeze(1)], dim=1)
    best, training = learner.dynamics, learner.training_dynamics
    for dynamics in (best, training):
        dynamics.x_scale.copy_(torch.stack([x.mean(dim=0), x.std(dim=0) + 1e-6]))
        dynamics.z_scale.copy_(torch.stack([z.mean(dim=0), z.std(dim=0) + 1e-6]))
    rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(args.seed)).to(run.device)
    held_out, rows = rows.tensor_split([min(math.ceil(len(x) / 5), 1000)])
    check(len(rows) > 0, f"{args.dataset_id}: one transition is too few to train a model and test it")

    train = compiled(dynamics_update, args, run.device)
    for epoch in run.epochs("dynamics", int(best.epoch), args.max_dynamics_epochs):
        if epoch > best.best_epoch.max() + args.dynamics_patience:
            break
        losses = []
        for _ in range(math.ceil(len(rows) / args.dynamics_batch_size)):
            chosen = rows[torch.randint(len(rows), (args.num_models, args.dynamics_batch_size), device=run.device)]
            losses.append(train(learner, x[chosen], z[chosen], terminations[chosen]))
        error = keep_better(best, training, x[held_out], z[held_out], args.dynamics_patience)
        metrics = {f"dynamics/holdout_mse_{member}": value for member, value in enumerate(error)}
        metrics |= {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}
        run.log(0, {"dynamics/epoch": epoch} | metrics)
        run.save_checkpoint(0)
    run.save_part("dynamics")


# --- Rollouts -------------------------------------------------------------------------------------------------------


def uncertainty(mean: Tensor, std: Tensor, penalty: str) -> Tensor:
    """u(s, a) from the elites' mean and std of (s' - s, r) [elites, batch, out]: [batch]."""
    if penalty == "max_std":  # max_k |std_k|
        return std.norm(dim=-1).amax(dim=0)
    if penalty == "ensemble_std":  # |sqrt(E_k[std_k^2] + Var_k[mean_k])|
        return (std.square() + (mean - mean.mean(dim=0)).square()).mean(dim=0).sqrt().norm(dim=-1)
    return (mean - mean.mean(dim=0)).norm(dim=-1).amax(dim=0)  # max_k |mean_k - E_k[mean_k]|


def model_step(
    elites: Dynamics, buffer: ReplayBuffer, observations: Tensor, actions: Tensor, ending: str, args: Args
) -> tuple[Batch, Tensor]:
    """One transition of the model from each state, its member drawn anew, with r~ as reward; and u(s, a)."""
    mean, std, logit = elites.predict(observations, actions)
    u = uncertainty(mean, std, args.penalty)
    rows = torch.arange(len(observations), device=observations.device)
    member = torch.randint(len(mean), (len(rows),), device=rows.device)
    z = mean[member, rows] + std[member, rows] * torch.randn_like(mean[0])
    next_observations = observations + z[:, :-1]
    rewards = z[:, -1] - args.penalty_coefficient * u  # r~ = r - penalty_coefficient u(s, a)
    if ending == "learned":
        terminations = torch.bernoulli(torch.sigmoid(logit[member, rows]))
    else:
        raw = next_observations * buffer.observation_std + buffer.observation_mean
        terminations = TERMINATION_RULES[ending](raw)
    return Batch(observations, actions, rewards, next_observations, terminations.float()), u


@torch.no_grad()
def rollout(learner: Learner, elites: Dynamics, buffer: ReplayBuffer, ending: str, args: Args) -> Metrics:
    """Fills the model's buffer with rollouts of the current policy from states of the data."""
    us: list[Tensor] = []
    rolled: list[Batch] = []
    for observations in buffer.sample(args.rollout_batch_size).observations.split(2_000):  # pieces for a cache
        for _ in range(args.rollout_length):
            noise = torch.randn(len(observations), buffer.action_dim, device=observations.device)
            actions, _ = learner.actor.sample(observations, noise)
            transitions, u = model_step(elites, buffer, observations, actions, ending, args)
            learner.model_buffer.add(transitions)
            observations = transitions.next_observations[transitions.terminations == 0]  # the others go on
            us, rolled = [*us, u], [*rolled, transitions]
    data = buffer.sample(10_000)
    u_data = uncertainty(*elites.predict(data.observations, data.actions)[:2], args.penalty)
    rewards, ends = zip(*((transitions.rewards, transitions.terminations) for transitions in rolled), strict=True)
    metrics = {"model/rewards": torch.cat(rewards).mean(), "model/terminations": torch.cat(ends).mean()}
    for name, u in (("data", u_data), ("rollouts", torch.cat(us))):  # how far beyond the data the policy went
        metrics |= {f"u/{name}_mean": u.mean(), f"u/{name}_p95": u[: 2**24].quantile(0.95), f"u/{name}_max": u.max()}
    return metrics


# --- Losses ---------------------------------------------------------------------------------------------------------


def critic_loss(learner: Learner, batch: Batch, noise: Tensor, args: Args) -> tuple[Tensor, Metrics]:
    """L_Q = E[ sum_i (y - Q_i(s, a))^2 ],  y = r~ + gamma (1 - termination) (min_i Q'_i(s', a') - temperature log pi)

    `noise` [batch, action_dim] is standard normal.
    """
    with torch.no_grad():
        next_actions, next_log_prob = learner.actor.sample(batch.next_observations, noise)
        next_q = learner.target_critic(batch.next_observations, next_actions).min(dim=0).values  # [batch]
        next_value = next_q - learner.actor.log_temperature.exp() * next_log_prob
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_value  # a truncation bootstraps
    q = learner.critic(batch.observations, batch.actions)  # [2, batch]
    loss = 2 * mse_loss(q, target.expand_as(q))  # the mean over the twins, too, times two: their sum
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


def actor_loss(
    critic: Critic, temperature: Tensor, observations: Tensor, actions: Tensor, log_prob: Tensor
) -> tuple[Tensor, Metrics]:
    """L_pi = E[ temperature log pi(a_pi | s) - min_i Q_i(s, a_pi) ], `actions` a_pi differentiable in the actor."""
    constants = {name: weight.detach() for name, weight in critic.named_parameters()}  # through Q, but not into it
    q = functional_call(critic, constants, (observations, actions)).min(dim=0).values  # [batch]
    loss = (temperature.detach() * log_prob - q).mean()
    return loss, {"actor/loss": loss.detach(), "actor/q": q.detach().mean()}


def temperature_loss(temperature: Tensor, log_prob: Tensor, target_entropy: float) -> tuple[Tensor, Metrics]:
    """L_temperature = E[ -temperature (log pi(a_pi | s) + target entropy) ]: it grows while the entropy is too low."""
    entropy = -log_prob.detach().mean()
    loss = temperature * (entropy - target_entropy)
    return loss, {"actor/temperature": temperature.detach(), "actor/entropy": entropy}


# --- Update ---------------------------------------------------------------------------------------------------------


def total_loss(learner: Learner, batch: Batch, noise: Tensor, args: Args) -> tuple[Tensor, Metrics]:
    """L_Q + L_pi + L_temperature. Each reaches the weights of its own network only, so one backward pass serves all."""
    temperature = learner.actor.log_temperature.exp()
    loss_q, metrics_q = critic_loss(learner, batch, noise[0], args)
    actions, log_prob = learner.actor.sample(batch.observations, noise[1])
    loss_pi, metrics_pi = actor_loss(learner.critic, temperature, batch.observations, actions, log_prob)
    target_entropy = -actions.shape[-1] if args.target_entropy is None else args.target_entropy
    loss_t, metrics_t = temperature_loss(temperature, log_prob, target_entropy)
    return loss_q + loss_pi + loss_t, metrics_q | metrics_pi | metrics_t


def decay_learning_rate(learner: Learner, step: int, args: Args) -> None:
    """The actor's falls to zero along half a cosine."""
    rate = args.actor_learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / args.num_updates))
    learner.optimizer.param_groups[0]["lr"].fill_(rate)


def update(learner: Learner, batch: Batch, step: int, args: Args) -> Metrics:
    """One gradient step of all networks, then the target critic follows the critic. `step` counts from 1."""
    noise = torch.randn(2, *batch.actions.shape, device=batch.actions.device)
    loss, metrics = total_loss(learner, batch, noise, args)
    loss.backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()

    with torch.no_grad():  # Q' <- Q' + tau (Q - Q')
        torch._foreach_lerp_(list(learner.target_critic.parameters()), list(learner.critic.parameters()), args.tau)
    return metrics


# --- Main -----------------------------------------------------------------------------------------------------------


def main(args: Args) -> None:
    device = set_up(args)
    buffer = ReplayBuffer(load_dataset(args.dataset_id, args.env_id), device, args.normalize_observations)
    ending = termination_rule(args.termination, buffer.dataset.env_id)

    learner = build(buffer.observation_dim, buffer.action_dim, args, device)
    if args.dynamics is not None and not args.resume:  # else the checkpoint has it
        load_part("dynamics", args.dynamics, buffer, learner)
    train = compiled(update, args, device)
    run = Run(args, buffer, learner)
    print(f"terminations in the model: {ending}", flush=True)
    if args.dynamics is None:
        fit_dynamics(run, buffer, learner, args)
    elites = learner.dynamics.elites(args.num_elites)
    num_real = round(args.real_ratio * args.batch_size)
    for step in run.steps():
        if args.cosine_decay:
            decay_learning_rate(learner, step, args)
        rolled_out = (step - 1) % args.rollout_every == 0
        metrics_model = rollout(learner, elites, buffer, ending, args) if rolled_out else {}
        parts = buffer.sample(num_real), learner.model_buffer.sample(args.batch_size - num_real)
        batch = Batch(*map(torch.cat, zip(*parts, strict=True)))
        metrics = train(learner, batch, step, args) | metrics_model

        if evaluating := run.is_due(step, args.eval_every):
            metrics |= run.evaluate(step)
        if evaluating or rolled_out or run.is_due(step, args.log_every):
            run.log(step, metrics)
        if run.is_due(step, args.checkpoint_every):
            run.save_checkpoint(step)
    run.finish()


if __name__ == "__main__":
    launch(main, Args)
