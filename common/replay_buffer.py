"""The replay buffer: every transition of a dataset as one tensor on the device, sampled by index."""

import hashlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.datasets import BadInput, Dataset, check


class Batch(NamedTuple):
    """Transitions, float32 (but for discrete actions), on the buffer's device."""

    observations: Tensor  # [batch, observation_dim], normalised as the buffer is
    actions: Tensor  # [batch, action_dim], scaled to [-1, 1]; discrete ones [batch], int64, counted from 0
    rewards: Tensor  # [batch]
    next_observations: Tensor  # [batch, observation_dim]
    terminations: Tensor  # [batch], 1 where the environment ended the episode; a truncation bootstraps


def _columns(rows: Tensor, observation_dim: int, action_dim: int) -> Batch:
    observations, actions, rewards, next_observations, terminations = rows.split(
        [observation_dim, action_dim, 1, observation_dim, 1], dim=1
    )
    return Batch(observations, actions, rewards.squeeze(1), next_observations, terminations.squeeze(1))


class ReplayBuffer:
    """All transitions of a dataset. A row of `storage` is one transition, so that a batch is a single gather.

    Attributes (N transitions, E episodes): `transitions`, a Batch of views [N, ...] on the storage; `episode_starts`
    and `episode_lengths` [E], in rows; `episode_returns` [E], undiscounted, in the environment's units; `mean_return`,
    that of the whole dataset; `observation_mean`, `observation_std` [observation_dim]; `fingerprint`, a hash of it all;
    `num_actions`, how many there are, if they are discrete. Those are one float32 column of the storage, and converted
    where they leave it; in `transitions` they are a copy.

    Raises BadInput if the dataset is empty or an episode holds a non-finite number, a discrete action that the space
    does not have, or arrays of different lengths.
    """

    def __init__(self, dataset: Dataset, device: torch.device, normalize_observations: bool = True) -> None:
        self.dataset = dataset
        self.observation_dim, self.action_dim = dataset.observation_dim, len(dataset.action_low)
        self.num_actions = int(dataset.action_high[0] - dataset.action_low[0]) + 1 if dataset.discrete else 0
        # a row is observation | action | reward | next observation | termination
        storage = torch.empty(dataset.num_steps, 2 * self.observation_dim + self.action_dim + 2)
        lengths, returns = self._fill(storage)
        self.episode_lengths = torch.tensor(lengths, dtype=torch.long)
        self.episode_starts = self.episode_lengths.cumsum(0) - self.episode_lengths
        self.episode_returns = torch.tensor(returns, dtype=torch.float64)
        self.mean_return = float(self.episode_returns.mean())
        storage = storage[: sum(lengths)]  # a view: D4RL files yield fewer transitions than rows
        self.fingerprint = hashlib.blake2b(storage.numpy().data, digest_size=16).hexdigest()

        self.storage = storage.to(device)
        self.transitions = self._split(self.storage)
        self.observation_mean = torch.zeros(self.observation_dim, device=device)
        self.observation_std = torch.ones(self.observation_dim, device=device)
        if normalize_observations:
            std, mean = torch.std_mean(self.transitions.observations, dim=0, correction=0)
            self.observation_mean, self.observation_std = mean, std + 1e-3  # a constant entry stays near zero
            for observations in (self.transitions.observations, self.transitions.next_observations):
                observations.sub_(self.observation_mean).div_(self.observation_std)

    def sample(self, batch_size: int) -> Batch:
        """A batch of transitions drawn uniformly with replacement."""
        index = torch.randint(len(self.storage), (batch_size,), device=self.storage.device)
        return self._split(self.storage.index_select(0, index))

    def keep_episodes(self, keep: Tensor) -> None:
        """Drops the transitions of episodes outside the mask `keep` [E]. The normalisation stays the whole data's."""
        rows = torch.repeat_interleave(keep, self.episode_lengths)
        self.storage = self.storage[rows.to(self.storage.device)]
        self.transitions = self._split(self.storage)
        self.episode_lengths, self.episode_returns = self.episode_lengths[keep], self.episode_returns[keep]
        self.episode_starts = self.episode_lengths.cumsum(0) - self.episode_lengths

    def _split(self, rows: Tensor) -> Batch:
        batch = _columns(rows, self.observation_dim, self.action_dim)
        return batch._replace(actions=batch.actions.squeeze(1).long()) if self.num_actions else batch

    def _fill(self, storage: Tensor) -> tuple[list[int], list[float]]:
        """Copies the episodes, actions mapped from the environment's range to [-1, 1], discrete ones counted from 0.
        Gives lengths and returns.
        """
        dataset = self.dataset
        columns = _columns(storage, self.observation_dim, self.action_dim)._asdict()
        if dataset.discrete:
            columns["actions"] = columns["actions"].squeeze(1)
        center = (dataset.action_high + dataset.action_low) / 2
        half_range = (dataset.action_high - dataset.action_low) / 2
        lengths, returns, end = [], [], 0
        for index, episode in enumerate(dataset.read_episodes()):
            where = f"{dataset.dataset_id}, episode {index}"
            start, end = end, end + len(episode.rewards)
            check(end <= len(storage), f"{where}: more steps than the metadata says ({dataset.num_steps})")
            for name, values in episode._asdict().items():
                check(not np.iscomplexobj(values), f"{where}: {name} are complex numbers")
                if name == "actions" and dataset.discrete:  # subtracted before the rounding to float32
                    values = np.asarray(values, dtype=np.float64) - int(dataset.action_low[0])
                with np.errstate(over="ignore"):
                    values = np.asarray(values, dtype=np.float32)
                target = columns[name][start:end]
                fits = f"{name} of shape {values.shape} where its {end - start} rewards ask for {tuple(target.shape)}"
                check(values.shape == target.shape, f"{where}: {fits}")
                finite = np.isfinite(values)
                if not finite.all():
                    place = tuple(np.argwhere(~finite)[0])
                    what = f"{name} hold {values[place]}; repair or remove that episode"
                    raise BadInput(f"{where}, step {place[0]}: {what}")
                if name == "actions" and dataset.discrete:
                    self._check_numbers(values, where)
                elif name == "actions":  # one beyond the bounds acted as if it were on them: environments clip
                    values = np.clip((values - center) / half_range, -1, 1)
                target.copy_(torch.from_numpy(values))
            lengths.append(end - start)
            returns.append(float(np.sum(episode.rewards, dtype=np.float64)))
        check(end > 0, f"{dataset.dataset_id}: the dataset is empty")
        return lengths, returns

    def _check_numbers(self, indices: np.ndarray, where: str) -> None:
        """Raises BadInput unless all of the `indices` [T] of discrete actions are such."""
        strangers = np.flatnonzero((indices < 0) | (indices >= self.num_actions) | (indices % 1 != 0))
        if len(strangers):
            low, high = int(self.dataset.action_low[0]), int(self.dataset.action_high[0])
            found = f"action {indices[strangers[0]] + low:g} is not a whole number from {low} to {high}"
            raise BadInput(f"{where}, step {strangers[0]}: {found}; repair or remove that episode")


class RingBuffer:
    """Up to `capacity` transitions that a script adds itself; the newest replace the oldest.

    Its state_dict holds them, so that it can be part of a checkpoint.
    """

    def __init__(self, capacity: int, observation_dim: int, action_dim: int, device: torch.device) -> None:
        self.observation_dim, self.action_dim = observation_dim, action_dim
        self.storage = torch.empty(capacity, 2 * observation_dim + action_dim + 2, device=device)
        self.num_added = 0

    def __len__(self) -> int:
        return min(self.num_added, len(self.storage))

    def add(self, transitions: Batch) -> None:
        """Adds `capacity` transitions at most."""
        rows = torch.column_stack(transitions)
        index = torch.arange(self.num_added, self.num_added + len(rows), device=rows.device) % len(self.storage)
        self.storage[index] = rows
        self.num_added += len(rows)

    def sample(self, batch_size: int) -> Batch:
        """A batch of the transitions held, drawn uniformly with replacement."""
        index = torch.randint(len(self), (batch_size,), device=self.storage.device)
        return _columns(self.storage.index_select(0, index), self.observation_dim, self.action_dim)

    def newest(self, count: int) -> Batch:
        """The `count` transitions added last, in the order in which they were; `capacity` at most."""
        index = torch.arange(self.num_added - count, self.num_added, device=self.storage.device) % len(self.storage)
        return _columns(self.storage[index], self.observation_dim, self.action_dim)

    def state_dict(self) -> dict[str, Any]:
        full = len(self) == len(self.storage)  # a part of the storage would be saved with all of it, unless copied
        return {"rows": self.storage if full else self.storage[: len(self)].clone(), "num_added": self.num_added}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.storage[: len(state["rows"])] = state["rows"]
        self.num_added = state["num_added"]
