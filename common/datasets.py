"""Where data comes from: the built-in datasets, Minari (local or downloaded), and HDF5 files in D4RL's layout.

`load_dataset` turns an id or a path into a `Dataset`: checked metadata and an iterator over checked episodes, one at a
time, so that loading holds the training tensors and one episode, no more. Nothing that a dataset says is run as code.
"""

import contextlib
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import h5py
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.dataset.minari_storage import MinariStorage
from minari.storage.datasets_root_dir import get_dataset_path
from tqdm import tqdm

BUILT_IN_ID = "anchorl/pendulum/mixed-v0"
BUILT_IN_DISCRETE_ID = "anchorl/cartpole/mixed-v0"


class BadInput(ValueError):
    """The user asked for something impossible. The message is one line: what is wrong, where, what to do."""


def check(condition: bool, message: str) -> None:
    """Raises BadInput with `message` unless `condition` holds."""
    if not condition:
        raise BadInput(message)


def one_line(error: Exception) -> str:
    """The message of somebody else's exception, fit for the one line of ours."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def warn(message: str) -> None:
    """One line on stderr, above a progress bar."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turns what goes wrong while `what` is read, of which damaged files raise many kinds, into BadInput."""
    try:
        yield
    except Exception as error:
        raise BadInput(f"cannot read {what}: {one_line(error)}") from None


class Episode(NamedTuple):
    """One episode of T steps, in the environment's own units."""

    observations: np.ndarray  # [T, observation_dim]
    actions: np.ndarray  # [T, action_dim], or [T] where they are discrete
    rewards: np.ndarray  # [T]
    next_observations: np.ndarray  # [T, observation_dim]
    terminations: np.ndarray  # [T], true where the environment ended the episode; a time limit does not


@dataclass(frozen=True)
class Dataset:
    """What is known of a dataset before its transitions are read."""

    dataset_id: str
    num_steps: int  # at least as many as the transitions that `read_episodes` yields
    observation_dim: int
    action_low: np.ndarray  # [action_dim], as is action_high; of discrete actions [1], the first and the last number
    action_high: np.ndarray
    read_episodes: Callable[[], Iterator[Episode]] = field(repr=False)
    env_id: str | None = None
    env_entry_point: str | None = None  # the code behind it, as the dataset has it
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    max_episode_steps: int | None = None
    reference_returns: tuple[float, float] | None = None  # the returns of score 0 and of score 100
    discrete: bool = False  # actions are whole numbers


def load_dataset(dataset_id: str, env_id: str | None = None, discrete: bool | None = False) -> Dataset:
    """Finds a built-in id, a Minari id (local first, else downloaded), or the path of an HDF5 file in D4RL's layout.

    `env_id` names the evaluation environment and overrides the one in the dataset's metadata.
    Raises BadInput if there is no such dataset, if its observations are not vectors of numbers, or if its actions are
    not bounded vectors or, with `discrete`, not the numbers of a Discrete space; None takes either.
    """
    if dataset_id.endswith((".hdf5", ".h5")):
        todo = "write discrete actions as a Minari dataset (minari.create_dataset_from_buffers)"
        check(not discrete, f"{dataset_id}: files in D4RL's layout are for continuous actions: {todo}")
        return _open_d4rl(Path(dataset_id), env_id)
    if dataset_id.startswith("anchorl/"):
        known = f"there are {' and '.join(_MAKERS)}"
        check(dataset_id in _MAKERS, f"unknown built-in dataset {dataset_id!r}: {known}")
    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError):  # the latter for an id without version
        known = f"{BUILT_IN_ID}, a Minari id such as mujoco/hopper/medium-v0, or the path of an .hdf5 file"
        raise BadInput(f"no dataset {dataset_id!r}: give {known}") from None
    try:
        if not (get_dataset_path(dataset_id) / "data").exists():
            with scratch_root(dataset_id, same_data=True):
                _MAKERS[dataset_id]() if dataset_id in _MAKERS else _download(dataset_id)
    except OSError as error:
        advice = "point MINARI_DATASETS_PATH to a folder that can be written"
        raise BadInput(f"cannot write {dataset_id} to the datasets folder ({one_line(error)}): {advice}") from None
    return _open_minari(dataset_id, env_id, discrete)


@contextlib.contextmanager
def scratch_root(dataset_id: str, same_data: bool) -> Iterator[None]:
    """Minari writes to a folder aside, which is renamed into place: killed or concurrent runs leave no half dataset.

    `same_data` says that whoever else makes `dataset_id` meanwhile makes it of the same data, so that theirs will do.
    Raises OSError if the folder cannot be written or, without `same_data`, if the dataset has come to exist.
    """
    root = get_dataset_path()
    with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as scratch:
        os.environ["MINARI_DATASETS_PATH"] = scratch  # Minari's only way to say where
        try:
            with warnings.catch_warnings(action="ignore"):
                yield
        finally:
            os.environ["MINARI_DATASETS_PATH"] = str(root)
        for source in sorted(Path(scratch).rglob("namespace_metadata.json")):
            target = root / source.relative_to(scratch)
            if not target.exists():  # what the user wrote of a namespace stays
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target)
        (root / dataset_id).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(Path(scratch) / dataset_id, root / dataset_id)
        except OSError:  # another run was faster
            if not same_data:
                raise


def flatten_observations(observations: Any, space: gym.Space) -> np.ndarray:
    """[N, dim]: of a Box itself; of a Dict its entries side by side, in goal-conditioned tasks not achieved_goal."""
    if not isinstance(space, gym.spaces.Dict):
        return observations
    return np.concatenate([observations[key] for key in _flat_keys(space)], axis=-1)


def flat_observation_dim(space: gym.Space) -> int:
    """Length of a flattened observation. Raises BadInput unless the space is a vector Box or a Dict of such."""
    boxes = [space[key] for key in _flat_keys(space)] if isinstance(space, gym.spaces.Dict) else [space]
    return sum(_vector_box(box, "observations").shape[0] for box in boxes)


def _vector_box(space: gym.Space, what: str) -> gym.spaces.Box:
    if not isinstance(space, gym.spaces.Box):
        raise BadInput(f"{what} must be vectors of real numbers (a Box), not {space}")
    check(len(space.shape) == 1, f"{what} must be vectors, not of shape {space.shape}: images are not supported")
    return space


def _flat_keys(space: gym.spaces.Dict) -> list[str]:
    if set(space) == {"observation", "achieved_goal", "desired_goal"}:
        return ["observation", "desired_goal"]  # achieved_goal repeats what the observation says
    return sorted(space)  # the order in which Minari stores them


def action_bounds(space: gym.Space, discrete: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest action, [action_dim] each. Raises BadInput unless the space is a Box of finite extent or, with
    `discrete`, a Discrete one, whose first and last number are given as [1] each.
    """
    if discrete:
        if not isinstance(space, gym.spaces.Discrete):
            raise BadInput(f"actions must be numbered (a Discrete), not {space}: the other scripts take these")
        check(space.n <= 2**24, f"{space.n} actions are more than float32, in which they are stored, can tell apart")
        return np.array([space.start]), np.array([space.start + space.n - 1])
    if isinstance(space, gym.spaces.Discrete):
        discrete_scripts = "fqi, discrete_cql and discrete_bcq take these"
        raise BadInput(f"actions must be vectors of real numbers (a Box), not {space}: {discrete_scripts}")
    box = _vector_box(space, "actions")
    with np.errstate(over="ignore"):
        bounded = bool(np.isfinite(box.high - box.low).all() and (box.low < box.high).all())
    check(bounded, f"actions need finite bounds, to be scaled to [-1, 1] by them, not {box.low} to {box.high}")
    return box.low, box.high


# --- Minari ---------------------------------------------------------------------------------------------------------


def _download(dataset_id: str) -> None:
    print(f"{dataset_id} is not in the local datasets folder: asking Minari to download it", flush=True)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # our one line says what its retries say
    try:
        minari.download_dataset(dataset_id)
    except Exception as error:  # whatever the storage behind Minari raises
        advice = "check the id (`minari list remote` has them) and the network"
        raise BadInput(f"{dataset_id} is not local, and its download failed ({one_line(error)}): {advice}") from None


def _open_minari(dataset_id: str, env_id: str | None, discrete: bool | None) -> Dataset:
    path = get_dataset_path(dataset_id) / "data"
    with _reading(f"dataset {dataset_id} in {path}"):
        metadata = MinariStorage.read_raw_metadata(path)
        # lacking a space, Minari would make the environment from the entry point that the dataset names
        check({"observation_space", "action_space"} <= set(metadata), "its metadata lacks the spaces")
        dataset = minari.load_dataset(dataset_id)
        num_steps = int(dataset.total_steps)
        spec = dict(json.loads(metadata.get("eval_env_spec") or metadata.get("env_spec") or "{}"))
        kwargs = dict(spec.get("kwargs") or {})
        low_score, high_score = (float(metadata.get(f"ref_{end}_score", math.nan)) for end in ("min", "max"))
    if discrete is None:
        discrete = isinstance(dataset.action_space, gym.spaces.Discrete)
    try:
        low, high = action_bounds(dataset.action_space, discrete)
        observation_dim = flat_observation_dim(dataset.observation_space)
    except BadInput as error:
        raise BadInput(f"{dataset_id}: {error}") from None
    known = math.isfinite(high_score - low_score) and low_score != high_score and env_id in (None, spec.get("id"))
    if env_id:
        spec, kwargs = {"id": env_id}, {}
    return Dataset(
        dataset_id=dataset_id,
        num_steps=num_steps,
        observation_dim=observation_dim,
        action_low=low,
        action_high=high,
        read_episodes=lambda: _read_minari(dataset),
        env_id=spec.get("id"),
        env_entry_point=spec.get("entry_point"),
        env_kwargs=kwargs,
        max_episode_steps=spec.get("max_episode_steps"),
        reference_returns=(low_score, high_score) if known else None,
        discrete=discrete,
    )


def _read_minari(dataset: minari.MinariDataset) -> Iterator[Episode]:
    with _reading(f"dataset {dataset.spec.dataset_id}"):
        for episode in dataset.iterate_episodes():
            observations = flatten_observations(episode.observations, dataset.observation_space)  # one more than steps
            yield Episode(observations[:-1], episode.actions, episode.rewards, observations[1:], episode.terminations)


# --- D4RL files -----------------------------------------------------------------------------------------------------


def _open_d4rl(path: Path, env_id: str | None) -> Dataset:
    """D4RL's flat layout: observations [N, dim], actions [N, dim], rewards [N], terminals [N], often timeouts [N] and
    next_observations [N, dim]. Action bounds are those of the environment, without one [-1, 1].
    """
    check(path.is_file(), f"no file {path}: give the path of an HDF5 file in D4RL's layout")
    with _reading(f"{path} as HDF5"), h5py.File(path) as file:
        arrays = {name: values.shape for name, values in file.items() if isinstance(values, h5py.Dataset)}
        kinds = {name: file[name].dtype for name in arrays}
    missing = {"observations", "actions", "rewards", "terminals"} - set(arrays)
    check(not missing, f"{path} is not in D4RL's layout: it lacks {', '.join(sorted(missing))}")
    lengths = {name: shape[0] if shape else 0 for name, shape in arrays.items() if name in D4RL_ARRAYS}
    check(len(set(lengths.values())) == 1, f"{path}: the arrays do not match in length: {lengths}")
    check(lengths["rewards"] > 0, f"{path}: the dataset is empty")
    for name in ("observations", "actions"):
        what = f"{path}: {name} must be vectors of real numbers, not an array of {kinds[name]} and shape {arrays[name]}"
        check(len(arrays[name]) == 2 and kinds[name].kind == "f", what)
    dim = arrays["actions"][1]
    low, high = -np.ones(dim, np.float32), np.ones(dim, np.float32)
    known_bounds = False
    if env_id in gym.registry:
        with contextlib.suppress(gym.error.Error, ImportError), gym.make(env_id) as env:  # evaluation warns of these
            low, high = action_bounds(env.action_space)
            known_bounds = True
            check(len(low) == dim, f"{env_id} has actions of size {len(low)}, {path} of size {dim}")

    def read_episodes() -> Iterator[Episode]:
        with _reading(str(path)), h5py.File(path) as file:
            data = {name: file[name][:] for name in D4RL_ARRAYS if name in file}
        beyond = np.abs(data["actions"]).max(initial=0) > 1.001 and not known_bounds
        check(not beyond, f"{path}: actions reach beyond [-1, 1]: name an environment that bounds them with --env-id")
        return _split_d4rl(data)

    return Dataset(str(path), lengths["rewards"], arrays["observations"][1], low, high, read_episodes, env_id)


D4RL_ARRAYS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")


def _split_d4rl(data: dict[str, np.ndarray]) -> Iterator[Episode]:
    observations, actions, rewards = data["observations"], data["actions"], data["rewards"].reshape(-1)
    terminals = data["terminals"].astype(bool).reshape(-1)
    timeouts = data["timeouts"].astype(bool).reshape(-1) if "timeouts" in data else np.zeros_like(terminals)
    ends = np.union1d(np.flatnonzero(terminals | timeouts) + 1, len(terminals))
    for start, end in pairwise([0, *ends]):
        if "next_observations" in data:
            following = data["next_observations"][start:end]
        else:
            # The row after a boundary is another episode's. What followed a termination is never looked at; what
            # followed a time limit would be, and is not known: that last step is no transition.
            following = np.concatenate([observations[start + 1 : end], observations[end - 1 : end]])
            end = end if terminals[end - 1] else end - 1
        if end > start:
            rows = slice(start, end)
            yield Episode(observations[rows], actions[rows], rewards[rows], following[: end - start], terminals[rows])


# --- The built-in datasets ------------------------------------------------------------------------------------------

Controller = Callable[[np.ndarray, np.random.Generator], Any]  # an observation to the environment's action


def _good_controller(observation: np.ndarray) -> float:
    """Swings up by bringing the pendulum to the energy it has at rest upright, then balances it with a PD law."""
    cos, sin, speed = map(float, observation)
    if cos > 0.8:
        return -10 * math.atan2(sin, cos) - 2 * speed  # the angle is 0 upright
    missing_energy = 15 - (speed**2 / 2 + 15 * cos)  # Pendulum-v1 accelerates by 15 sin(angle) + 3 torque
    return math.copysign(2, speed) * (1 if missing_energy > 0 else -1)


def _pendulum_controller(skill: float, noise: float = 0.0) -> Controller:
    """The good controller with probability `skill` at each step, else random torque."""

    def act(observation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        skilled, random = rng.random() < skill, rng.uniform(-2, 2)
        torque = _good_controller(observation) + noise * rng.normal() if skilled else random
        return np.clip([torque], -2, 2).astype(np.float32)

    return act


def _cartpole_controller(skill: float, weights: tuple[float, ...] = (0.05, 0.1, 1.0, 0.3)) -> Controller:
    """With probability `skill` at each step a push to where the weighted sum of the cart's position and speed and the
    pole's angle and speed points, else a random one. The default weights balance without an end.
    """

    def act(observation: np.ndarray, rng: np.random.Generator) -> int:
        skilled, random = rng.random() < skill, rng.integers(2)
        return int(observation @ weights > 0) if skilled else int(random)

    return act


def _roll_out(env: gym.Env, seed: int, act: Controller) -> EpisodeBuffer:
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    lists: dict[str, list] = {"actions": [], "rewards": [], "terminations": [], "truncations": []}
    episode = EpisodeBuffer(seed=seed, observations=[observation], **lists)
    terminated = truncated = False
    while not (terminated or truncated):
        action = act(observation, rng)
        observation, reward, terminated, truncated, _ = env.step(action)
        values = observation, action, float(reward), terminated, truncated
        for name, value in zip(("observations", *lists), values, strict=True):
            getattr(episode, name).append(value)
    return episode


def _make_pendulum() -> None:
    """30 good, 60 weak and 60 random episodes of Pendulum-v1."""
    good, weak, random = (_pendulum_controller(*arguments) for arguments in ((1.0, 0.4), (0.3, 0.0), (0.0, 0.0)))
    what = "30 good, 60 weak and 60 random episodes"
    task = "Swing a pendulum up and hold it; scores: random torque 0, the good controller 100"
    _make(BUILT_IN_ID, "Pendulum-v1", [good] * 30 + [weak] * 60 + [random] * 60, what, task, _pendulum_controller(1.0))


def _make_cartpole() -> None:
    """20 good, 60 weak, 60 short-sighted and 60 random episodes of CartPole-v1."""
    good, weak, random = (_cartpole_controller(skill) for skill in (0.9, 0.3, 0.0))
    short_sighted = _cartpole_controller(1.0, (0.0, 0.0, 1.0, 0.0))  # looks at the angle alone, and overshoots
    what = "20 good, 60 weak, 60 short-sighted and 60 random episodes"
    task = "Balance a pole on a cart; scores: random pushes 0, the longest episode, of 500 steps, 100"
    controllers = [good] * 20 + [weak] * 60 + [short_sighted] * 60 + [random] * 60
    _make(BUILT_IN_DISCRETE_ID, "CartPole-v1", controllers, what, task, _cartpole_controller(1.0))


def _make(dataset_id: str, env_id: str, controllers: list[Controller], what: str, task: str, best: Controller) -> None:
    """Writes a built-in dataset, the same bits each time: an episode of each of the controllers, of which the last is
    random, which is score 0. Score 100 is the mean return of `best`.
    """
    print(f"making {dataset_id} (once, a few seconds)", flush=True)
    with gym.make(env_id) as env:
        episodes = [_roll_out(env, seed, act) for seed, act in enumerate(controllers)]
        low, high = (
            float(np.mean([sum(_roll_out(env, seed, act).rewards) for seed in range(10_000, 10_050)]))
            for act in (controllers[-1], best)
        )
    minari.create_dataset_from_buffers(
        dataset_id,
        episodes,
        env=env_id,
        ref_min_score=low,
        ref_max_score=high,
        num_episodes_average_score=50,
        algorithm_name=f"scripted controllers: {what}",
        author="AnchoRL",
        description=task,
    )


_MAKERS = {BUILT_IN_ID: _make_pendulum, BUILT_IN_DISCRETE_ID: _make_cartpole}
