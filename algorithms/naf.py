"""Normalized advantage functions (NAF): Q-learning of continuous actions, by a Q whose best action is known at once.

Q is a parabola in the action, with its summit at mu(s): the maximum over all actions, for which others train an actor,
is V(s), and the policy is mu. With mu, V and L a network's outputs, and V' its slow copy's:

    Q(s, a) = V(s) - 1/2 (a - mu(s))^T P(s) (a - mu(s)),  P = L L^T
    L is lower-triangular, its diagonal exponentiated: P is positive definite
    y   = r + gamma (1 - termination) V'(s')
    L_Q = E[ (y - Q(s, a))^2 ]
    pi  = argmax_a Q(s, a) = mu(s)

Nothing holds mu to the data. Where they lack good actions, the parabola's summit lies beyond what was tried, V promises
what nobody saw, and the next target is made of that promise. With --online-steps the policy acts, with noise, after the
other updates: what it overestimates gets tried, and is corrected. A parabola has one summit only: where two
actions are good and those between them are not, Q cannot represent it.

With --imagined-ratio above 0, that share of each batch is imagined: short rollouts in a learned model, from states that
were seen. Once the policy acts, the model is trained further before each round of rollouts, on what was played, too:

    a = clip(mu(s) + noise, -1, 1),  (s' - s, r) = z ~ p_k(z | s, a),  k an elite, drawn anew at each step
    p_k(z | x) = Normal(mean_k(x), std_k(x)),  k = 1 .. num_models,  x = (s, a)
    L_model = sum_k E[ ((z - mean_k(x)) / std_k(x))^2 + 2 log std_k(x) ] + cross-entropy of ends, E over z's entries too

Paper: Gu, Lillicrap, Sutskever, Levine, "Continuous Deep Q-Learning with Model-based Acceleration", 2016,
arXiv 1603.00748; the model is that of MBPO, arXiv 1906.08253.
Differences: it begins with data, where the paper's agent begins with none. mu is sent through tanh, so that it is an
action. We know no code of the authors. V, L and mu share layers (paper: 200 x 200 each). Observations are normalised. A
step has one update, the paper's five. The paper's model is linear, another one at each step of an episode, and fitted
to the last five episodes alone; one network in its place took the gain away there. Rollouts start at any state that was
seen, the paper's at the newest, and iLQG, an option there, plans nothing here. With rollouts of l steps, l of its l + 1
batches are imagined, a ratio of 0.83 or more. On one task it stops imagining after 20,000 steps, as the gain is early
and a model's error stays: --imagined-until does that, and no more, as the paper has no rule for when.

Run: python algorithms/naf.py --dataset-id anchorl/pendulum/mixed-v0
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, silu, softplus

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    gamma: float = 0.99  # discount (usual)
    exploration_noise: float = 0.1  # std of the noise when mu acts and in rollouts, in half an action's range (TD3)
    imagined_ratio: float = 0.0  # share of a batch that is of rollouts in a model; 0 trains none (paper: 0.83, 0.91)
    imagined_until: int | None = None  # the last update with such a batch; default: all (paper: 20,000 steps, never)
    rollout_length: int = 5  # steps of a rollout, l (paper: 5 or 10)
    rollout_batch_size: int = 10_000  # rollouts at a time, each from a state that was seen (ours)
    rollout_every: int = 1_000  # updates between rollouts and, online, models (MOPO; of models the paper: 5 episodes)
    rollouts_kept: int = 5  # calls of rollouts that the model's buffer holds, more if some end early (MOPO)
    num_models: int = 7  # members of the ensemble (MBPO)
    num_elites: int = 5  # members that are used, the best on held-out data (MBPO)
    dynamics_hidden_dims: tuple[int, ...] = (200, 200, 200, 200)  # hidden layers of each member (MBPO)
    dynamics_learning_rate: float = 1e-3  # of Adam (MBPO)
    dynamics_batch_size: int = 256  # transitions per member and step (MBPO)
    dynamics_patience: int = 5  # epochs without 1% less held-out error until a member is done (MBPO: 6, all at once)
    max_dynamics_epochs: int = 200  # of a model, at most (ours)
    tau: float = 0.005  # rate at which the target critic follows the critic (usual)
    critic_learning_rate: float = 3e-4  # of Adam (paper: 1e-4, 1e-3 or 1e-2, by the task)
    hidden_dims: tuple[int, ...] = (256, 256)  # hidden layers of the network (usual)


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


class Critic(nn.Module):
    """Q(s, a) = V(s) - 1/2 |L(s)^T (a - mu(s))|^2, of one network with three kinds of outputs."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.sizes = 1, action_dim, action_dim**2  # V, mu, L; what of L is above its diagonal is not used
        self.net = nn.Sequential(*mlp(observation_dim, args.hidden_dims, sum(self.sizes)))

    def terms(self, observations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """V [batch], mu [batch, action_dim] in [-1, 1], and L [batch, action_dim, action_dim]."""
        value, mean, numbers = self.net(observations).split(self.sizes, dim=-1)
        matrix = numbers.unflatten(-1, (mean.shape[-1], mean.shape[-1]))
        triangle = matrix.tril(-1) + torch.diag_embed(matrix.diagonal(dim1=-2, dim2=-1).exp())
        return value.squeeze(-1), mean.tanh(), triangle

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        value, mean, triangle = self.terms(observations)
        away = (triangle.mT @ (actions - mean).unsqueeze(-1)).squeeze(-1)  # L^T (a - mu), [batch, action_dim]
        return (value - 0.5 * away.square().sum(dim=-1)).unsqueeze(0)  # [1, batch]: of one critic


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


class Actor(nn.Module):
    """pi(s) = argmax_a Q(s, a) = mu(s)."""

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        self.critic = Critic(observation_dim, action_dim, args)

    def forward(self, observations: Tensor) -> Tensor:
        """The action: [batch, action_dim] in [-1, 1]."""
        return self.critic.terms(observations)[1]


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


class PlainLearner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor
    target_critic: Critic
    optimizer: Any


class Learner(NamedTuple):
    """The same where rollouts are imagined."""

    actor: Actor
    target_critic: Critic
    dynamics: Dynamics  # each member as it was when its error on held-out data was least
    training_dynamics: Dynamics
    model_buffer: ModelBuffer
    dynamics_optimizer: Any
    optimizer: Any


def build(
    observation_dim: int, action_dim: int, args: HyperParameters, device: Any = "cpu", adam: Any = torch.optim.Adam
) -> Learner | PlainLearner:
    """Fresh networks and their optimisers, of the model with a parameter group per layer."""
    actor = Actor(observation_dim, action_dim, args).to(device)
    target_critic = copy.deepcopy(actor.critic).requires_grad_(False)
    optimizer = adam([{"params": actor.critic.parameters(), "lr": args.critic_learning_rate}])
    if args.imagined_ratio == 0:
        return PlainLearner(actor, target_critic, optimizer)
    dynamics = Dynamics(observation_dim, action_dim, args).to(device)
    layers, bounds = dynamics.layers, [dynamics.max_log_variance, dynamics.min_log_variance]
    decays = [*[2.5e-5, 5e-5, *[7.5e-5] * len(layers)][: len(layers) - 1], 1e-4]  # first to last layer (MBPO)
    groups_d = [{"params": [layer.weight], "weight_decay": d} for layer, d in zip(layers, decays, strict=True)]
    groups_d.append({"params": [*(layer.bias for layer in layers), *bounds]})
    best, optimizer_d = copy.deepcopy(dynamics).requires_grad_(False), adam(groups_d, args.dynamics_learning_rate)
    return Learner(actor, target_critic, best, dynamics, ModelBuffer(), optimizer_d, optimizer)


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
def begin_again(best: Dynamics, training: Dynamics) -> None:
    """Before the next model: training goes on from the best weights, whose errors on new held-out data are to come."""
    for kept, new in zip(best.parameters(), training.parameters(), strict=True):
        new.copy_(kept)
    best.holdout_error.fill_(1e30)
    best.best_epoch.zero_()
    best.epoch.zero_()


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


def model_step(elites: Dynamics, observations: Tensor, actions: Tensor, scale: Tensor, ending: str) -> Batch:
    """One transition of the model from each state, its member drawn anew. `scale`: mean and deviation of states."""
    mean, std, logit = elites.predict(observations, actions)
    rows = torch.arange(len(observations), device=observations.device)
    member = torch.randint(len(mean), (len(rows),), device=rows.device)
    z = mean[member, rows] + std[member, rows] * torch.randn_like(mean[0])
    next_observations, rewards = observations + z[:, :-1], z[:, -1]
    rule = TERMINATION_RULES.get(ending, lambda _: torch.bernoulli(torch.sigmoid(logit[member, rows])))  # else learned
    terminations = rule(scale[0] + scale[1] * next_observations).float()
    return Batch(observations, actions, rewards, next_observations, terminations)


@torch.no_grad()
def rollout(actor: Actor, elites: Dynamics, starts: Batch, scale: Tensor, ending: str, args: HyperParameters) -> Batch:
    """Rollouts of clip(mu(s) + noise, -1, 1) from `starts`. `ending`: a key of TERMINATION_RULES or "learned"."""
    rolled = []
    for observations in starts.observations.split(2_000):  # pieces for a cache
        for _ in range(args.rollout_length):
            noise = torch.randn(len(observations), starts.actions.shape[1], device=observations.device)
            actions = (actor(observations) + args.exploration_noise * noise).clamp(-1, 1)
            transitions = model_step(elites, observations, actions, scale, ending)
            observations = transitions.next_observations[transitions.terminations == 0]  # the others go on
            rolled.append(transitions)
    return Batch(*map(torch.cat, zip(*rolled, strict=True)))


# --- Losses ---------------------------------------------------------------------------------------------------------


def critic_loss(learner: Learner | PlainLearner, batch: Batch, args: HyperParameters) -> tuple[Tensor, Metrics]:
    """L_Q = E[ (y - Q(s, a))^2 ],  y = r + gamma (1 - termination) V'(s')"""
    with torch.no_grad():
        next_value = learner.target_critic.terms(batch.next_observations)[0]  # [batch], max_a' Q'(s', a')
        target = batch.rewards + args.gamma * (1 - batch.terminations) * next_value  # a truncation bootstraps
    q = learner.actor.critic(batch.observations, batch.actions).squeeze(0)  # [batch]
    loss = (target - q).square().mean()
    return loss, {"critic/loss": loss.detach(), "critic/q": q.detach().mean(), "critic/target": target.mean()}


# --- Update ---------------------------------------------------------------------------------------------------------


def update(learner: Learner | PlainLearner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of the critic, then the target critic follows it. `step` counts from 1."""
    loss, metrics = critic_loss(learner, batch, args)
    loss.backward()
    learner.optimizer.step()
    learner.optimizer.zero_grad()

    critic, target_critic = learner.actor.critic, learner.target_critic
    with torch.no_grad():  # Q' <- Q' + tau (Q - Q')
        torch._foreach_lerp_(list(target_critic.parameters()), list(critic.parameters()), args.tau)
    return {"actor/loss": loss.detach()} | metrics  # the actor is a part of the critic


# === The copy line: what is above needs PyTorch alone; below are command line, data, run folder and evaluation ========

import sys
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, check, check_argument, explain, launch, warn
from common.data import ReplayBuffer, hold_out, load_dataset
from common.evaluation import Player, make_environments
from common.experiment import Run, load_file, set_up
from common.optim import Adam, compiled


@dataclass
class Args(HyperParameters, ExperimentArgs):
    termination: Literal["auto", "rule", "learned", "never"] = "auto"  # what ends a rollout; auto: a rule that holds
    dynamics: str | None = None  # folder of an earlier run on the same data, whose model to take
    reward_scale: float | Literal["return-range"] = 1.0  # multiplies rewards; return-range: their returns span 1,000
    reward_shift: float = 0.0  # added to rewards first
    normalize_observations: bool = True  # by the mean and standard deviation of the data
    online_steps: int = 0  # after the other updates, steps that the policy takes, with noise, with an update each

    def validate(self) -> None:
        super().validate()
        check_argument(self, "exploration_noise", self.exploration_noise >= 0, "must not be negative")
        check_argument(self, "imagined_ratio", 0 <= self.imagined_ratio <= 1, "must be in [0, 1]")
        check_argument(self, "num_elites", 1 <= self.num_elites <= self.num_models, "must be in [1, --num-models]")
        used = self.dynamics is None or self.imagined_ratio > 0
        check_argument(self, "dynamics", used, "a model is used with an --imagined-ratio above 0 alone")


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
    buffer = ReplayBuffer(dataset, device, args.normalize_observations, room=args.online_steps)
    if args.imagined_ratio > 0:
        check(len(buffer.storage) > 1, f"{args.dataset_id}: one transition is too few to train a model and test it")
    ending = ending_of(args, buffer) if args.imagined_ratio > 0 else ""
    buffer.scale_rewards(args.reward_scale, args.reward_shift)

    learner = build(buffer.observation_dim, buffer.action_dim, args, device, Adam)
    if isinstance(learner, Learner) and args.dynamics is not None and not args.resume:  # else the checkpoint has it
        load_dynamics(args, buffer, learner)
    train, train_dynamics = (compiled(each, learner, args) for each in (update, dynamics_update))
    player = Player(make_environments(dataset, 1)[0], buffer, args.seed) if args.online_steps else None
    run = Run(args, buffer, learner, update, player=player)  # makes the run folder, or goes back to its checkpoint

    def explore(observations: Tensor) -> Tensor:
        return learner.actor(observations) + args.exploration_noise * torch.randn(1, buffer.action_dim, device=device)

    if isinstance(learner, Learner):
        print(f"terminations in the model: {ending}", flush=True)
        if args.dynamics is None and run.first_step == 1:  # later ones may be of more than the data
            for metrics in fit_dynamics(learner, Batch(*buffer.transitions), args, train_dynamics):
                run.log(0, {"dynamics/epoch": learner.dynamics.epoch} | metrics)
                run.save_checkpoint()
                run.progress.set_postfix_str(f"dynamics epoch {int(learner.dynamics.epoch)}")
    until = args.imagined_until or run.last_step
    for step in range(run.first_step, run.last_step + 1):
        if isinstance(learner, Learner) and step <= until and (step - 1) % args.rollout_every == 0:
            data, found = Batch(*buffer.transitions), Metrics()
            if len(buffer.storage) > buffer.num_loaded:  # it has acted: the model is trained further
                data = Batch(*buffer.take(torch.arange(len(buffer.storage), device=device)))
                begin_again(learner.dynamics, learner.training_dynamics)
                *_, found = fit_dynamics(learner, data, args, train_dynamics)  # of the last epoch
                found |= {"dynamics/epoch": learner.dynamics.epoch}
            starts, elites = Batch(*buffer.sample(args.rollout_batch_size)), learner.dynamics.elites(args.num_elites)
            transitions = rollout(learner.actor, elites, starts, buffer.normalization, ending, args)
            learner.model_buffer.add(transitions, args.rollouts_kept * args.rollout_batch_size * args.rollout_length)
            for source, rows in (("model", transitions), ("data", data)):
                found |= {f"{source}/{name}": getattr(rows, name).mean() for name in ("rewards", "terminations")}
            run.log(step, found)
        if player and step > args.num_updates:  # a transition more, which counts as much as one of the data
            buffer.add(player.step(run.policy(player.observation[None], explore)[0]))
        num_imagined = round(args.imagined_ratio * args.batch_size) if step <= until else 0
        batch = Batch(*buffer.sample(args.batch_size - num_imagined))
        if isinstance(learner, Learner):
            batch = Batch(*map(torch.cat, zip(batch, learner.model_buffer.sample(num_imagined), strict=True)))
        metrics = train(learner, batch, step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
