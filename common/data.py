"""From a dataset's id to batches: Minari's datasets in a replay buffer. Nothing that a dataset says is run as code."""

import hashlib
import json
import math
import os
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import torch
from minari.dataset import minari_dataset, minari_storage
from minari.storage.datasets_root_dir import get_dataset_path
from torch import Tensor

from common.command_line import BUILT_IN_ID, BadInput, ExperimentArgs, check, check_argument, explain, warn

BUILT_IN_DISCRETE_ID = "anchorl/cartpole/mixed-v0"
BUILT_IN_TWO_WAYS_ID = "anchorl/two-ways/mixed-v0"  # with continuous actions, two of them good at the start
MASK = "action_mask"  # key of an observation that says which discrete actions are legal, 1 or 0 each: comes first
BUILT_IN = Path(__file__).parent / "built_in"  # a Minari root, as benchmarks.built_in makes it

# a buffer's are float32 tensors (discrete actions int64, from 0), an episode's NumPy arrays in the environment's units
Batch = namedtuple("Batch", "observations actions rewards next_observations terminations")


@dataclass(frozen=True)
class Dataset:  # what is known of it before its transitions are read
    dataset_id: str
    num_steps: int  # of the transitions that `read_episodes` yields, or more
    observation_names: list[str]  # [observation_dim]: what the numbers of an observation are
    action_low: np.ndarray  # [action_dim], as is action_high; of discrete actions [1], the first and the last number
    action_high: np.ndarray
    read_episodes: Callable[[], Iterator[Batch]] = field(repr=False)
    env_id: str | None = None  # of the evaluation environment
    env_spec: dict[str, Any] | None = None  # what the dataset says of it; None where the user named it
    reference_returns: tuple[float, float] | None = None  # the returns of score 0 and of score 100
    discrete: bool = False  # actions are whole numbers
    action_names: list[str] = field(default_factory=list)  # of the choices or a vector's numbers, where the data say
    num_episodes: int = 0
    kept: frozenset[int] | None = None  # numbers of the episodes that count; default: all
    held_out: Any = None  # a Dataset of episodes that nothing is learned from

    def score(self, returns: Any) -> Any:  # 100 (return - low) / (high - low), as D4RL has it; or None, without the two
        low, high = self.reference_returns or (0.0, 0.0)
        return 100 * (returns - low) / (high - low) if self.reference_returns else None


def load_dataset(dataset_id: str, env_id: str | None = None, discrete: bool | None = False) -> Dataset:
    """Finds or downloads a dataset. `env_id` overrides its own; `discrete` None takes any actions. Raises BadInput."""
    path = find_dataset(dataset_id)
    with explain(f"cannot read dataset {dataset_id} in {path}"):
        metadata = minari_storage.MinariStorage.read_raw_metadata(path)
        # lacking a space, Minari would make the environment from the entry point that the dataset names
        check({"observation_space", "action_space"} <= set(metadata), "its metadata lacks the spaces")
        dataset = minari.MinariDataset(path)
        num_steps, num_episodes = int(dataset.spec.total_steps), int(dataset.spec.total_episodes)  # looks at the id
        spec = dict(json.loads(metadata.get("eval_env_spec") or metadata.get("env_spec") or "{}"))
        spec["kwargs"] = dict(spec.get("kwargs") or {})
        low, high = (float(metadata.get(f"ref_{end}_score", math.nan)) for end in ("min", "max"))
    with explain(dataset_id):
        discrete = isinstance(dataset.action_space, gym.spaces.Discrete) if discrete is None else discrete
        bounds = action_bounds(dataset.action_space, discrete)
        names, told = observation_names(dataset.observation_space), metadata.get("observation_names") or []
        masks = [name for name in names if discrete and f"{MASK}/" in name]
        whole = not masks or (masks[0].startswith(MASK) and len(masks) == np.ptp(bounds) + 1)
        check(whole, f"{MASK} must be a key of the observation itself, with a number for each action: repair it")
        names = told if [*map(type, told)] == [str] * len(names) and (not masks or MASK in told[0]) else names
        choices = [str(name) for name in metadata.get("action_names") or []]
    same_task = env_id is None or env_id.rpartition(":")[2] == spec.get("id") or "id" not in spec  # of module:Id
    scale = (low, high) if same_task and math.isfinite(high - low) and low != high else None
    more: Any = env_id or spec.get("id"), None if env_id else spec, scale, discrete, choices, num_episodes
    return Dataset(dataset_id, num_steps, names, *bounds, lambda: _read_episodes(dataset), *more)


def hold_out(dataset: Dataset, args: ExperimentArgs) -> Dataset:
    """Without a --validation-fraction of its episodes, the same ones for all seeds, which are its `held_out`."""
    count, of = math.ceil(args.validation_fraction * dataset.num_episodes), dataset.num_episodes
    check_argument(args, "validation_fraction", count < max(of, 1), f"leaves none of {of} episodes to learn from")
    order = np.random.default_rng(args.validation_seed).permutation(of).tolist()
    kept, held_out = (replace(dataset, kept=frozenset(numbers)) for numbers in (order[count:], order[:count]))
    return replace(kept, held_out=held_out) if count else dataset


def find_dataset(dataset_id: str) -> Path:
    """The dataset's folder `data`: the user's or the built-in one, or a download's. Raises BadInput without any."""
    known = f"{BUILT_IN_ID}, {BUILT_IN_DISCRETE_ID}, {BUILT_IN_TWO_WAYS_ID} or a Minari id, mujoco/hopper/medium-v0"
    with explain(f"no dataset {dataset_id!r}: give {known}, or make one of a file: python -m benchmarks.import_logs"):
        valid = minari_dataset.DATASET_ID_RE.fullmatch(dataset_id) and dataset_id.rpartition("-v")[2].isdecimal()
        check(bool(valid), "ids are [namespace/]name-v0: letters, digits, - and _, and a namespace has two or more")
    with explain("no datasets folder: point MINARI_DATASETS_PATH to one"):
        path, built_in = get_dataset_path(dataset_id) / "data", BUILT_IN / dataset_id / "data"
        if len(list(path.glob("*"))) > 1 or built_in.exists():  # metadata alone are a download that broke off
            return path if path.exists() else built_in
    check(dataset_id.split("/")[0] not in ("anchorl", *gym.registry), f"no dataset {dataset_id}: give {known}")
    print(f"{dataset_id} is not in the local datasets folder: asking Minari to download it", flush=True)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # our one line says what its retries say
    with explain(f"{dataset_id} is not local, and its download failed; check id (`minari list remote`) and network"):
        minari.download_dataset(dataset_id)
    return path


def _read_episodes(dataset: minari.MinariDataset) -> Iterator[Batch]:
    with explain(f"cannot read dataset {dataset.spec.dataset_id}"):
        for episode in dataset.iterate_episodes():
            states = flatten_observations(episode.observations, dataset.observation_space)  # one more than steps
            yield Batch(states[:-1], episode.actions, episode.rewards, states[1:], episode.terminations)


def flatten_observations(observations: Any, space: gym.Space) -> np.ndarray:
    """[N, dim], or [dim] of one: parts of Dicts and Tuples side by side, Discretes one-hot, arrays row by row."""
    if parts := _parts(space):
        return np.concatenate([flatten_observations(observations[key], part) for key, part in parts], axis=-1)
    values = np.asarray(observations)
    if isinstance(space, gym.spaces.Discrete):
        return torch.nn.functional.one_hot(torch.as_tensor(values - space.start).long(), int(space.n)).numpy()
    return values.reshape(*values.shape[: values.ndim - len(space.shape or ())], -1)


def observation_names(space: Any, name: str = "") -> list[str]:
    """[dim], a name for each number of a flattened observation: goal/kettle/2. Raises BadInput for images and texts."""
    if parts := _parts(space):
        return [each for key, part in parts for each in observation_names(part, f"{name}{key}/")]
    if isinstance(space, gym.spaces.Discrete) and space.n <= 10**4:
        return [f"{name}{value}" for value in range(space.start, space.start + space.n)]
    arrays = gym.spaces.Box | gym.spaces.MultiBinary | gym.spaces.MultiDiscrete
    usable = isinstance(space, arrays) and len(space.shape) < 3
    check(usable, f"observation {name.strip('/')} must hold numbers, no images or texts, not {space}")
    return [f"{name}{index}" for index in range(math.prod(space.shape))]


def _parts(space: gym.Space) -> list[tuple[Any, gym.Space]]:  # of a Tuple or Dict, in a fixed order
    if isinstance(space, gym.spaces.Dict):  # of a goal task, too: AntMaze's achieved_goal alone says where the ant is
        return [(key, space[key]) for key in sorted(space, key=lambda key: (key != MASK, key))]
    return list(enumerate(space)) if isinstance(space, gym.spaces.Tuple) else []


def action_bounds(space: Any, discrete: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest action, [action_dim], or [1] with `discrete`. Raises BadInput for a space of another kind."""
    kind = "numbered (a Discrete)" if discrete else "vectors of real numbers (a Box)"
    others = "fqi and the discrete_... take a Discrete (of 2^24 at most, for float32), other scripts a Box"
    number = isinstance(space, gym.spaces.Discrete) and space.n <= 2**24
    check(number if discrete else isinstance(space, gym.spaces.Box), f"actions must be {kind}, not {space}: {others}")
    if discrete:
        return np.array([space.start]), np.array([space.start + space.n - 1])
    extent = np.subtract(space.high, space.low, dtype=np.float64)
    vectors = len(space.shape) == 1 and np.issubdtype(space.dtype, np.floating)
    usable = vectors and extent.size > 0 and bool(np.all((extent > 0) & (extent < 1e38)))
    check(usable, f"actions are {space}: they must be real vectors with finite bounds, each low below its high")
    return space.low, space.high


class ReplayBuffer:
    """All N transitions, in E episodes, of a dataset: the rows of `storage`, so that a batch is a single gather.
    Attributes: `transitions`, a Batch of views [N, ...] (of discrete actions a copy); `episode_starts`,
    `episode_lengths` [E], in rows; `episode_returns` [E], in the environment's units; `normalization`, mean and std
    [2, observation_dim] in float64; `fingerprint`, a hash; `num_actions` and `num_legal` (how many first numbers of an
    observation say what is legal), or 0; `validation`, held-out episodes. Added rows change none. Raises BadInput."""

    def __init__(self, dataset: Dataset, device: Any, normalize_observations: Any = True, room: int = 0) -> None:
        self.dataset, self.num_clipped = dataset, 0
        self.observation_dim, self.action_dim = len(dataset.observation_names), len(dataset.action_low)
        self.num_actions = int(dataset.action_high[0] - dataset.action_low[0]) + 1 if dataset.discrete else 0
        masks = sum(name.startswith(f"{MASK}/") for name in dataset.observation_names)
        self.num_legal = masks if masks == self.num_actions else 0
        no_room = f"{dataset.dataset_id}: {device} has no room for {dataset.num_steps + room} steps: give it fewer"
        with explain(no_room):
            storage = torch.empty(dataset.num_steps + room, 2 * self.observation_dim + self.action_dim + 2)
        given = normalize_observations if isinstance(normalize_observations, Tensor) else None
        self.origin = np.zeros(self.observation_dim) if given is None else given[0].cpu().numpy()  # subtracted first
        self.episode_lengths, self.episode_returns = self._fill(storage, normalize_observations is True)
        self.episode_starts = self.episode_lengths.cumsum(0) - self.episode_lengths
        self.num_loaded = int(self.episode_lengths.sum())
        with explain(no_room):
            self.with_room = storage[: self.num_loaded + room].to(device)
        self.storage = self.with_room[: self.num_loaded]
        self.transitions = self._columns(self.storage)
        if self.num_legal:
            observations, actions, _, next_observations, ends = self.transitions
            forbidden = int((observations.gather(1, actions[:, None]) != 1).sum())
            stuck = int(((next_observations[:, : self.num_legal] != 1).all(dim=1) & (ends == 0)).sum())
            found = f"{forbidden} of the actions that were taken" if forbidden else f"all after {stuck} that go on"
            check(forbidden + stuck == 0, f"{dataset.dataset_id}: {MASK} forbids {found}")
        self.std = torch.ones(self.observation_dim, device=device) if given is None else given[1].float()
        self.mean, self.reward_scale, self.reward_shift = torch.zeros_like(self.std), 1.0, 0.0
        if normalize_observations is True:
            self.std, self.mean = torch.std_mean(self.transitions.observations, dim=0, correction=0)
            self.std += 1e-3  # a constant entry stays near zero
            self.mean[: self.num_legal], self.std[: self.num_legal] = 0, 1
        for observations in (self.transitions.observations, self.transitions.next_observations):
            observations.sub_(self.mean).div_(self.std)
        self.normalization = torch.stack([torch.from_numpy(self.origin).to(device) + self.mean, self.std.double()])
        self.validation = dataset.held_out and ReplayBuffer(dataset.held_out, device, self.normalization)

    def scale_rewards(self, scale: float | str, shift: float) -> None:
        """Rewards become scale (reward + shift); with "return-range" as scale the returns of the data span 1,000."""
        span = float(np.ptp((self.episode_returns + shift * self.episode_lengths).numpy()))
        least = 1e-7 * float((self.transitions.rewards.abs().max() + abs(shift)) * self.episode_lengths.max())
        check(span > least or scale != "return-range", f"--reward-scale {scale}: all returns are equal; give a number")
        self.reward_scale, self.reward_shift = 1000 / span if scale == "return-range" else float(scale), shift
        for buffer in filter(None, (self, self.validation)):
            buffer.transitions.rewards.add_(shift).mul_(self.reward_scale)
        if span and not 30 < (span := span * self.reward_scale) < 30_000:  # learning rates and weights suit about 1,000
            warn(f"the data's returns span {span:.3g}, losses and rates suit 1,000: try --reward-scale return-range")

    def draw(self, batch_size: int) -> Tensor:  # rows [batch], uniformly with replacement
        return torch.randint(len(self.storage), (batch_size,), device=self.storage.device)

    def take(self, rows: Tensor) -> Batch:
        return self._columns(self.storage.index_select(0, rows))

    def sample(self, batch_size: int) -> Batch:
        return self.take(self.draw(batch_size))

    def add(self, transition: Batch) -> None:
        """One more, as an environment that is played gives it. Raises BadInput for another shape, and without room."""
        columns = self._columns(self.with_room[len(self.storage) : len(self.storage) + 1], integers=False)
        for name, values, column in zip(Batch._fields, map(np.array, zip(transition)), columns, strict=True):
            check(values.shape == column.shape, f"{name} of shape {values.shape} in a room of {tuple(column.shape)}")
            column.copy_(torch.from_numpy(self._checked(name, values)))
        for observations in (columns.observations, columns.next_observations):
            observations.sub_(self.mean).div_(self.std)
        columns.rewards.add_(self.reward_shift).mul_(self.reward_scale)
        self.storage = self.with_room[: len(self.storage) + 1]

    def _columns(self, rows: Tensor, integers: bool = True) -> Batch:
        """Rows [N, observation | action | reward | next observation | termination] as views; `integers` are a copy."""
        parts = rows.split([self.observation_dim, self.action_dim, 1, self.observation_dim, 1], dim=1)
        actions = parts[1].squeeze(1).to(torch.long if integers else rows.dtype) if self.num_actions else parts[1]
        return Batch(parts[0], actions, parts[2].squeeze(1), parts[3], parts[4].squeeze(1))

    def _fill(self, storage: Tensor, relative: bool) -> tuple[Tensor, Tensor]:  # the episodes' lengths, returns
        dataset, lengths, returns, end, merged = self.dataset, [], [], 0, np.zeros(self.observation_dim)
        digest = hashlib.blake2b(digest_size=16)
        kept = filter(lambda pair: dataset.kept is None or pair[0] in dataset.kept, enumerate(dataset.read_episodes()))
        for index, episode in kept:
            with explain(f"{dataset.dataset_id}, episode {index} (repair or remove it)"), np.errstate(all="ignore"):
                start, end = end, end + len(episode.rewards)
                check(end <= len(storage), f"more steps than the metadata says ({dataset.num_steps})")
                columns = self._columns(storage[start:end], integers=False)
                for name, values, column in zip(Batch._fields, map(np.asarray, episode), columns, strict=True):
                    check(values.shape == column.shape, f"{name} of shape {values.shape}, not {tuple(column.shape)}")
                    if relative and start == 0 and name == "observations" and len(values):
                        self.origin[self.num_legal :] = values[0, self.num_legal :]
                    column.copy_(torch.from_numpy(self._checked(name, values)))
                    digest.update(np.ascontiguousarray(values, np.float64).data)
                    if name == "observations":  # neighbours that are apart, but not in float32
                        merged += ((np.diff(values, axis=0) != 0) & (np.diff(column, axis=0) == 0)).sum(axis=0)
                lengths += [end - start] if end > start else []
                returns += [float(np.sum(episode.rewards, dtype=np.float64))] if end > start else []
        check(end > 0, f"{dataset.dataset_id}: the dataset is empty")
        self.fingerprint = digest.hexdigest()
        if names := [name for name, count in zip(dataset.observation_names, merged, strict=True) if count > 0.01 * end]:
            warn(f"float32 merges different values of observation {', '.join(names)}: subtract something or split them")
        if self.num_clipped > 0.01 * end:
            warn(f"{self.num_clipped} of {end} actions lie beyond their bounds: they are taken as on them")
        return torch.tensor(lengths, dtype=torch.long), torch.tensor(returns, dtype=torch.float64)

    def _checked(self, name: str, values: np.ndarray) -> np.ndarray:  # float32; actions in [-1, 1], or counted from 0
        low, high, numbered = self.dataset.action_low, self.dataset.action_high, name == "actions" and self.num_actions
        check(not np.iscomplexobj(values), f"{name} are complex numbers")
        if numbered or name.endswith("observations"):  # subtracted before the rounding to float32
            values = values.astype(np.float64) - (int(low[0]) if numbered else self.origin)
        wrong = ~np.isfinite(values := values.astype(np.float32, copy=False))
        least, most = (0, 1) if name == "terminations" else (low[0], high[0])
        if whole := numbered or name == "terminations":
            wrong |= (values < 0) | (values > most - least) | (values % 1 != 0)
        if wrong.any():
            step, value = np.argwhere(wrong)[0, 0], values[wrong][0] + (least if whole else 0)
            rule = f", which is not a whole number from {least} to {most}" if whole else ""
            raise BadInput(f"step {step}: {name} hold {value:g}{rule}")
        if name == "actions" and not numbered:  # a bound becomes 1 exactly; beyond it is on it: environments clip
            values = (values - np.add(high, low, dtype=float) / 2) / (np.subtract(high, low, dtype=float) / 2)
            self.num_clipped += int((np.abs(values) > 1.001).any(axis=1).sum())
            values = np.clip(values, -1, 1)
        return values
