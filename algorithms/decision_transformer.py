"""Decision Transformer (DT): offline RL as the prediction of sequences, with no value and no bootstrapping.

A transformer reads an episode as R_1, s_1, a_1, R_2, s_2, a_2, ..., where the return-to-go R_t sums the rewards from
step t to the episode's end. It learns which action the data took in s_t after that history, given what was still to be
earned. Asked for a high return, it acts as the data's good episodes did; each reward it earns is taken off R:

    R_t  = r_t + r_{t+1} + ... + r_T                                                       (section 3)
    L_pi = E[ |pi(R_i, s_i, a_i, ..., R_t, s_t) - a_t|^2 ],  over all t = i, ..., i + K - 1 of a window that begins at i
    acting:  R_1 = target return,  R_{t+1} = R_t - r_t                                     (algorithm 1)

The three tokens of a step share an embedding of its number in the episode. A token attends to itself and to earlier
ones of its window. A batch's windows begin at any step, all as likely, and end with their episode, if that is sooner.
So the policy sees all K steps only at the last step of a full window, and when it acts.

The policy has a memory: before each call `Actor.follow` is told which episodes the rows belong to, and what they earned
since. Without it, an observation counts as an episode's first. A loaded policy acts in an episode so:

    reward = None  # a new episode begins, of which the target return is asked
    while ...:
        policy.actor.follow([0], [reward])
        action = policy(observation[None])[0]  # the environment then gives the next observation and reward

Paper: Chen et al., "Decision Transformer: Reinforcement Learning via Sequence Modeling", 2021, arXiv 2106.01345.
Differences: returns-to-go are divided by the largest |return-to-go| of the data, theirs by 1,000 (reacher: 10); the
target is the best return of the data, theirs is written down for each task, too (hopper: 3,600 and 1,800). An embedding
stands for each step up to the data's longest episode, at most --max-timestep of them, and later steps share the last;
theirs has 1,000 (reacher: 100). It starts with a standard deviation of 0.02, as CORL's, theirs of 1. Layers start as
PyTorch's do; those of the authors' GPT-2 with 0.02, and biases of 0. The embeddings' dropout is an argument, theirs
always 0.1. Observations are divided by their deviation + 1e-3, theirs + 1e-6. The warm-up is a tenth of this
repository's 10,000 updates, theirs of 100,000. Heads for states and returns, which they do not train, are left out.

Run: python algorithms/decision_transformer.py --dataset-id anchorl/pendulum/mixed-v0
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

Metrics = dict[str, Tensor]


@dataclass
class HyperParameters:
    context_length: int = 20  # K, steps that the policy sees (authors' code)
    hidden_dims: tuple[int, ...] = (128, 128, 128)  # width of each block, all the same (authors' code)
    num_heads: int = 1  # heads of attention per block (authors' code)
    dropout: float = 0.1  # of embeddings, attention and what blocks add (authors' code)
    max_timestep: int = 1_000  # embeddings of step numbers, at most as many as are used (authors' code)
    learning_rate: float = 1e-4  # of Adam, after the warm-up (authors' code)
    warmup_updates: int = 1_000  # in which the learning rate grows linearly (authors' code: 10,000 of 100,000)
    weight_decay: float = 1e-4  # of all weights, decoupled as in AdamW (authors' code)
    gradient_clip: float = 0.25  # largest norm of the gradient (authors' code)


class Batch(NamedTuple):
    """Windows of episodes, in float32, padded on the left with zeros."""

    returns_to_go: Tensor  # [batch, context_length], in the data's units
    observations: Tensor  # [batch, context_length, observation_dim], normalised
    actions: Tensor  # [batch, context_length, action_dim] in [-1, 1]
    timesteps: Tensor  # [batch, context_length], long, from 0
    mask: Tensor  # [batch, context_length], True for steps, False for padding


# --- Networks -------------------------------------------------------------------------------------------------------


class Dropout(nn.Module):
    """nn.Dropout, written out: torch.compile makes it a part of the kernels around it, PyTorch's would stand alone."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """In training a number becomes 0 with probability p, and is else divided by 1 - p."""
        if not self.training or self.p == 0:
            return x
        return x * (torch.rand(x.shape, device=x.device) >= self.p) / (1 - self.p)


class Block(nn.Module):
    """Attention and a two-layer network, each added to its input, which it sees normalised (GPT-2)."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.net = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(inplace=True), nn.Linear(4 * width, width))
        self.dropout = Dropout(dropout)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Tokens [batch, length, width]; `visible` [batch, length, length]: may the row's token see the column's?"""
        tokens = tokens + self.dropout(self.attention(self.norm1(tokens), visible))
        return tokens + self.dropout(self.net(self.norm2(tokens)))

    def attention(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """softmax(Q K^T / sqrt(d)) V over what is visible, of each head, [batch, length, width]."""
        parts = self.query_key_value(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts[0], parts[1], parts[2]  # [batch, head, length, width of a head]
        scores = (query @ key.transpose(-1, -2)) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(dim=-1)
        return self.output((self.dropout(weights) @ value).transpose(1, 2).flatten(2))


class Actor(nn.Module):
    """pi(R, s, a, ..., R_t, s_t): a deterministic policy with a memory, which is no part of its state."""

    needs_history = True  # of a lone state it makes something else: tools that ask about such states refuse it

    def __init__(self, observation_dim: int, action_dim: int, args: HyperParameters) -> None:
        super().__init__()
        width, self.context_length, self.action_dim = args.hidden_dims[0], args.context_length, action_dim
        self.embed_return, self.embed_observation = nn.Linear(1, width), nn.Linear(observation_dim, width)
        self.embed_action, self.embed_timestep = nn.Linear(action_dim, width), nn.Embedding(args.max_timestep, width)
        nn.init.normal_(self.embed_timestep.weight, std=0.02)  # with PyTorch's 1, states are lost in it for long
        self.norm, self.last_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = Dropout(args.dropout)
        self.blocks = nn.ModuleList(Block(width, args.num_heads, args.dropout) for _ in args.hidden_dims)
        self.head = nn.Sequential(nn.Linear(width, action_dim), nn.Tanh())
        # of the data: `main` fills them in, and they are saved with the weights
        self.target_return, self.return_scale = nn.Buffer(torch.zeros(())), nn.Buffer(torch.ones(()))
        self.last_timestep = nn.Buffer(torch.tensor(args.max_timestep - 1))
        self.memory: dict[int, deque[list[Any]]] = {}  # by episode: [R, s, a, timestep, r] of its last steps
        self.followed: list[int] | None = None  # the episodes of the next call's rows

    def predict(self, batch: Batch) -> Tensor:
        """The action of every step, from the tokens up to its state: [batch, context_length, action_dim]."""
        returns = self.embed_return((batch.returns_to_go / self.return_scale).unsqueeze(-1))
        parts = returns, self.embed_observation(batch.observations), self.embed_action(batch.actions)
        time = self.embed_timestep(batch.timesteps.minimum(self.last_timestep))
        tokens = torch.stack([part + time for part in parts], dim=2).flatten(1, 2)  # R_1, s_1, a_1, R_2, ...
        tokens, visible = self.dropout(self.norm(tokens)), self.visible(batch.mask)
        for block in self.blocks:
            tokens = block(tokens, visible)
        return self.head(self.last_norm(tokens[:, 1::3]))  # what follows s_t

    def visible(self, mask: Tensor) -> Tensor:
        """[batch, 3 K, 3 K]: a token sees itself and earlier ones of real steps. (Softmax over nothing is nan.)"""
        real = mask.repeat_interleave(3, dim=1)
        itself = torch.eye(real.shape[1], dtype=torch.bool, device=mask.device)
        return (torch.ones_like(itself).tril() & real[:, None]) | itself

    def follow(self, episodes: list[int], rewards: list[float | None]) -> None:
        """The next call's rows are of these episodes, which earned `rewards`, in the environment's units, by their
        last actions. None: a new episode begins, of which the target return is asked.
        """
        for episode, reward in zip(episodes, rewards, strict=True):
            if reward is None:
                self.memory[episode] = deque(maxlen=self.context_length)
            elif history := self.memory.get(episode):
                history[-1][4] = reward
            else:
                raise ValueError(f"episode {episode} has no step yet: its first reward is None")
        self.followed = list(episodes)

    def forward(self, observations: Tensor) -> Tensor:
        """The action after each row's history: [batch, action_dim] in [-1, 1]. Without `follow`, a first step's."""
        if self.followed is None:
            histories = [deque[list[Any]]() for _ in observations]
        else:
            histories, self.followed = [self.memory[episode] for episode in self.followed], None
        if len(histories) != len(observations):
            raise ValueError(f"follow was told of {len(histories)} episodes, and {len(observations)} observations came")
        if not histories:
            return observations.new_zeros(0, self.action_dim)
        nothing = observations.new_zeros(self.action_dim)
        for history, observation in zip(histories, observations, strict=True):
            last = history[-1] if history else None
            to_go = float(self.target_return) if last is None else last[0] - last[4]
            history.append([to_go, observation.clone(), nothing, 0 if last is None else last[3] + 1, 0.0])
        actions = self.predict(self.contexts(histories))[:, -1]
        for history, action in zip(histories, actions, strict=True):
            history[-1][2] = action.detach()
        return actions

    def contexts(self, histories: list[deque[list[Any]]]) -> Batch:
        """The histories as a Batch, padded on the left as in training, to the longest of them."""
        longest, like, rows = max(map(len, histories)), histories[0][0][1], []
        for history in histories:
            empty = longest - len(history)
            to_go, observations, actions, timesteps, _ = zip(*history, strict=True)
            rows.append(
                (
                    nn.functional.pad(torch.tensor(to_go).to(like), (empty, 0)),
                    nn.functional.pad(torch.stack(observations), (0, 0, empty, 0)),
                    nn.functional.pad(torch.stack(actions), (0, 0, empty, 0)),
                    nn.functional.pad(torch.tensor(timesteps, device=like.device), (empty, 0)),
                    torch.arange(longest, device=like.device) >= empty,
                )
            )
        return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))


class Learner(NamedTuple):
    """Everything that training changes; a checkpoint holds the state_dict of each."""

    actor: Actor
    optimizer: Any


def build(
    observation_dim: int,
    action_dim: int,
    args: HyperParameters,
    device: torch.device | str = "cpu",
    adam: Any = torch.optim.Adam,
) -> Learner:
    """A fresh network and its optimiser."""
    actor = Actor(observation_dim, action_dim, args).to(device)
    rate = torch.tensor(args.learning_rate, dtype=torch.float32, device=device)  # a tensor, which `update` fills anew
    return Learner(actor, adam([{"params": actor.parameters(), "lr": rate}]))


# --- Sequences ------------------------------------------------------------------------------------------------------


def returns_to_go(rewards: Tensor, episode_lengths: Tensor) -> Tensor:
    """R_t = r_t + ... + r_T of every transition, [N], of episodes of `episode_lengths` [E] one after the other."""
    parts = rewards.double().split(episode_lengths.tolist())
    return torch.cat([part.flip(0).cumsum(0).flip(0) for part in parts]).to(rewards.dtype)


def windows(
    rows: Tensor, starts: Tensor, ends: Tensor, columns: tuple[Tensor, Tensor, Tensor], context_length: int
) -> Batch:
    """The windows that begin at `rows` [batch] of episodes from `starts` to before `ends` [batch]: `context_length`
    steps or what is left of the episode, padded on the left. `columns`: returns-to-go, observations, actions [N, ...]
    """
    length = (ends - rows).clamp(max=context_length)
    steps = rows[:, None] + torch.arange(context_length, device=rows.device) - (context_length - length)[:, None]
    mask = steps >= rows[:, None]
    steps = steps.maximum(rows[:, None])  # padding takes a row of its own episode, which the mask then empties
    to_go, observations, actions = (column[steps] for column in columns)
    filled, timesteps = mask[..., None], (steps - starts[:, None]) * mask
    return Batch(to_go * mask, observations * filled, actions * filled, timesteps, mask)


# --- Losses ---------------------------------------------------------------------------------------------------------


def actor_loss(actor: Actor, batch: Batch) -> tuple[Tensor, Metrics]:
    """L_pi = E[ |pi(R, s, a, ..., R_t, s_t) - a_t|^2 ] over the real steps, averaged over the action's dimensions"""
    error = (actor.predict(batch) - batch.actions).square().mean(dim=-1)
    loss = (error * batch.mask).sum() / batch.mask.sum()
    return loss, {"actor/loss": loss.detach()}


# --- Update ---------------------------------------------------------------------------------------------------------


def update(learner: Learner, batch: Batch, step: int, args: HyperParameters) -> Metrics:
    """One gradient step of the actor. `step` counts from 1."""
    loss, metrics = actor_loss(learner.actor, batch)
    loss.backward()
    metrics["actor/gradient_norm"] = clip_grad_norm_(learner.actor.parameters(), args.gradient_clip)
    rate = learner.optimizer.param_groups[0]["lr"]
    with torch.no_grad():
        rate.copy_((torch.ones_like(rate) * step / args.warmup_updates).clamp(max=1) * args.learning_rate)
        # AdamW's decay, of which Adam's moments know nothing
        torch._foreach_mul_(list(learner.actor.parameters()), 1 - rate * args.weight_decay)
    learner.optimizer.step()
    learner.optimizer.zero_grad()
    return metrics


# === The copy line: what is above needs PyTorch alone; below are command line, data, run folder and evaluation ========

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that common/ is found from anywhere
from common.command_line import ExperimentArgs, check_argument, launch
from common.data import ReplayBuffer, hold_out, load_dataset
from common.experiment import Run, set_up
from common.optim import Adam, compiled


@dataclass
class Args(HyperParameters, ExperimentArgs):
    batch_size: int = 64  # windows per update (authors' code)
    target_return: float | None = None
    """the return that the policy is asked for, undiscounted, in the environment's units; default: the data's best"""
    return_scale: float | None = None  # divides returns-to-go; default: the largest of the data, without its sign
    normalize_observations: bool = True  # by the mean and standard deviation of the data (authors' code)

    def validate(self) -> None:
        super().validate()
        check_argument(self, "hidden_dims", len(set(self.hidden_dims)) == 1, "blocks must be of one width")
        check_argument(self, "num_heads", self.hidden_dims[0] % self.num_heads == 0, "must divide the blocks' width")
        check_argument(self, "dropout", 0 <= self.dropout < 1, "must be in [0, 1)")
        check_argument(self, "weight_decay", self.weight_decay >= 0, "must not be negative")
        check_argument(self, "gradient_clip", self.gradient_clip > 0, "must be positive")
        check_argument(self, "return_scale", self.return_scale is None or self.return_scale > 0, "must be positive")


def main(args: Args) -> None:
    device = set_up(args)
    dataset = hold_out(load_dataset(args.dataset_id, args.env_id), args)
    buffer = ReplayBuffer(dataset, device, args.normalize_observations)

    def prepare(part: ReplayBuffer) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
        observations, actions, rewards, *_ = part.transitions
        lengths, starts = part.episode_lengths.to(device), part.episode_starts.to(device)
        columns = returns_to_go(rewards, part.episode_lengths), observations, actions
        return columns, starts.repeat_interleave(lengths), (starts + lengths).repeat_interleave(lengths)

    columns, starts, ends = prepare(buffer)
    learner = build(buffer.observation_dim, buffer.action_dim, args, device, Adam)
    best, largest = float(buffer.episode_returns.max()), float(columns[0].abs().max()) or 1.0
    learner.actor.target_return.fill_(best if args.target_return is None else args.target_return)
    learner.actor.return_scale.fill_(args.return_scale or largest)
    learner.actor.last_timestep.clamp_(max=int(buffer.episode_lengths.max()) - 1)
    train = compiled(update, learner, args)

    def make_batch(held_out: ReplayBuffer, rows: Tensor) -> Batch:
        columns, starts, ends = prepare(held_out)
        return windows(rows, starts[rows], ends[rows], columns, args.context_length)

    run = Run(args, buffer, learner, update, make_batch)  # makes the run folder or goes back to its checkpoint
    run.threads = 1  # no trial of other numbers: sums over thousands of tokens would not be the same bits
    for step in range(run.first_step, args.num_updates + 1):
        rows = buffer.draw(args.batch_size)  # an episode by its length, and a start in it uniformly
        batch = windows(rows, starts[rows], ends[rows], columns, args.context_length)
        metrics = train(learner, batch, step, args)
        run.record(step, metrics)  # evaluates, logs and saves, each when it is due
    run.finish()  # result.json and the learning curve


if __name__ == "__main__":
    launch(main, Args)
