"""Where data comes from: the built-in dataset, Minari (local or downloaded), and HDF5 files in D4RL's layout.

`load_dataset` turns an id or a path into a `Dataset`: checked metadata and an iterator over checked episodes, one at a
time, so that loading holds the training tensors and one episode, no more. Nothing that a dataset says is run as code.
"""

import contextlib
import functools
import json
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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

BUILT_IN_ID = "anchorl/pendulum/mixed-v0"


class BadInput(ValueError):
    """The user asked for something impossible. The message is one line: what is wrong, where, what to do."""


def check(condition: bool, message: str) -> None:
    """Raises BadInput with `message` unless `condition` holds."""
    if not condition:
        raise BadInput(message)


def one_line(error: Exception) -> str:
    """The message of somebody else's exception, fit for the one line of ours."""
    return " ".join(str(error).split())[:200] or type(error).__name__


class Episode(NamedTuple):
    """One episode of T steps, in the environment's own units."""

    observations: np.ndarray  # [T, observation_dim]
    actions: np.ndarray  # [T, action_dim]
    rewards: np.ndarray  # [T]
    next_observations: np.ndarray  # [T, observation_dim]
    terminations: np.ndarray  # [T], true where the environment ended the episode; a time limit does not


@dataclass(frozen=True)
class Dataset:
    """What is known of a dataset before its transitions are read."""

    dataset_id: str
    num_steps: int  # at least as many as the transitions that `read_episodes` yields
    observation_dim: int
    action_low: np.ndarray  # [action_dim], as is action_high
    action_high: np.ndarray
    read_episodes: Callable[[], Iterator[Episode]] = field(repr=False)
    env_id: str | None = None
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    max_episode_steps: int | None = None
    reference_returns: tuple[float, float] | None = None  # the returns of score 0 and of score 100


def load_dataset(dataset_id: str, env_id: str | None = None) -> Dataset:
    """Finds a built-in id, a Minari id (local first, else downloaded), or the path of an HDF5 file in D4RL's layout.

    `env_id` names the evaluation environment and overrides the one in the dataset's metadata.
    Raises BadInput if there is no such dataset, or if its spaces are not vectors of numbers with bounded actions.
    """
    if dataset_id.endswith((".hdf5", ".h5")):
        return _open_d4rl(Path(dataset_id), env_id)
    if dataset_id.startswith("anchorl/"):
        check(dataset_id == BUILT_IN_ID, f"unknown built-in dataset {dataset_id!r}: there is {BUILT_IN_ID}")
    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError):  # the latter for an id without version
        known = f"{BUILT_IN_ID}, a Minari id such as mujoco/hopper/medium-v0, or the path of an .hdf5 file"
        raise BadInput(f"no dataset {dataset_id!r}: give {known}") from None
    if not (get_dataset_path(dataset_id) / "data").exists():
        make = _make_pendulum if dataset_id == BUILT_IN_ID else functools.partial(_download_minari, dataset_id)
        try:
            make()
        except OSError as error:
            advice = "point MINARI_DATASETS_PATH to a folder that can be written"
            raise BadInput(f"cannot write {dataset_id} to {get_dataset_path()} ({one_line(error)}): {advice}") from None
    return _open_minari(dataset_id, env_id)


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
    return list(space)


def _action_bounds(space: gym.Space) -> tuple[np.ndarray, np.ndarray]:
    box = _vector_box(space, "actions")
    bounded = bool(np.isfinite(box.low).all() and np.isfinite(box.high).all() and (box.low < box.high).all())
    check(bounded, f"actions need finite bounds, to be scaled to [-1, 1] by them, not {box.low} to {box.high}")
    return box.low, box.high


def _check_finite(where: str, **fields: np.ndarray) -> None:
    for name, values in fields.items():
        finite = np.isfinite(values)
        if not finite.all():
            place = np.argwhere(~finite)[0]
            raise BadInput(
                f"{where}, step {place[0]}: {name} hold {values[tuple(place)]}; repair or remove that episode"
            )


# --- Minari ---------------------------------------------------------------------------------------------------------


def _download_minari(dataset_id: str) -> None:
    root = get_dataset_path()
    print(f"{dataset_id} is not in {root}: asking Minari to download it", flush=True)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # our one line says what its retries say
    try:
        with warnings.catch_warnings(action="ignore"):
            minari.download_dataset(dataset_id)
    except Exception as error:  # whatever the storage behind Minari raises
        shutil.rmtree(get_dataset_path(dataset_id), ignore_errors=True)  # half a download would pass for a dataset
        advice = "check the id (`minari list remote` has them) and the network"
        raise BadInput(
            f"{dataset_id} is not in {root}, and its download failed ({one_line(error)}): {advice}"
        ) from None


def _open_minari(dataset_id: str, env_id: str | None) -> Dataset:
    path = get_dataset_path(dataset_id) / "data"
    try:
        metadata = MinariStorage.read_raw_metadata(path)
        # lacking a space, Minari would make the environment from the entry point that the dataset names
        check({"observation_space", "action_space"} <= set(metadata), "its metadata lacks the spaces")
        dataset = minari.load_dataset(dataset_id)
        spec = json.loads(metadata.get("eval_env_spec") or metadata.get("env_spec") or "{}")
    except Exception as error:  # damaged files raise many kinds
        raise BadInput(f"cannot read dataset {dataset_id} in {path}: {one_line(error)}") from None
    try:
        low, high = _action_bounds(dataset.action_space)
        observation_dim = flat_observation_dim(dataset.observation_space)
    except BadInput as error:
        raise BadInput(f"{dataset_id}: {error}") from None
    if env_id:
        spec = {"id": env_id}
    return Dataset(
        dataset_id=dataset_id,
        num_steps=int(dataset.total_steps),
        observation_dim=observation_dim,
        action_low=low,
        action_high=high,
        read_episodes=lambda: _read_minari(dataset),
        env_id=spec.get("id"),
        env_kwargs=spec.get("kwargs", {}),
        max_episode_steps=spec.get("max_episode_steps"),
        reference_returns=(metadata["ref_min_score"], metadata["ref_max_score"])
        if "ref_max_score" in metadata
        else None,
    )


def _read_minari(dataset: minari.MinariDataset) -> Iterator[Episode]:
    for index, episode in enumerate(dataset.iterate_episodes()):
        where = f"{dataset.spec.dataset_id}, episode {index}"
        observations = flatten_observations(episode.observations, dataset.observation_space)
        arrays = {"actions": episode.actions, "rewards": episode.rewards, "terminations": episode.terminations}
        lengths = {name: len(values) for name, values in arrays.items()}
        matching = set(lengths.values()) == {len(observations) - 1}
        check(matching, f"{where}: {len(observations)} observations do not match {lengths}: they must be one more")
        _check_finite(where, observations=observations, actions=episode.actions, rewards=episode.rewards)
        yield Episode(observations[:-1], episode.actions, episode.rewards, observations[1:], episode.terminations)


# --- D4RL files -----------------------------------------------------------------------------------------------------


def _open_d4rl(path: Path, env_id: str | None) -> Dataset:
    """D4RL's flat layout: observations [N, dim], actions [N, dim], rewards [N], terminals [N], often timeouts [N] and
    next_observations [N, dim]. Action bounds are those of the environment, without one [-1, 1].
    """
    check(path.is_file(), f"no file {path}: give the path of an HDF5 file in D4RL's layout")
    try:
        with h5py.File(path) as file:
            missing = {"observations", "actions", "rewards", "terminals"} - set(file)
            check(not missing, f"{path} is not in D4RL's layout: it lacks {', '.join(sorted(missing))}")
            lengths = {
                key: len(values) for key, values in file.items() if isinstance(values, h5py.Dataset) and values.shape
            }
            observation_shape, action_shape = file["observations"].shape, file["actions"].shape
    except OSError as error:
        raise BadInput(f"cannot read {path} as HDF5: {one_line(error)}") from None
    check(len(set(lengths.values())) == 1, f"{path}: the arrays do not match in length: {lengths}")
    check(
        len(observation_shape) == 2,
        f"{path}: observations must be vectors, but the array has shape {observation_shape}",
    )
    check(len(action_shape) == 2, f"{path}: actions must be continuous vectors, but the array has shape {action_shape}")
    low, high = -np.ones(action_shape[1], np.float32), np.ones(action_shape[1], np.float32)
    if env_id in gym.registry:
        with contextlib.suppress(gym.error.Error), gym.make(env_id) as env:  # evaluation warns if it is not installed
            low, high = _action_bounds(env.action_space)
    return Dataset(str(path), lengths["rewards"], observation_shape[1], low, high, lambda: _read_d4rl(path), env_id)


def _read_d4rl(path: Path) -> Iterator[Episode]:
    with h5py.File(path) as file:
        terminals = file["terminals"][:].astype(bool).reshape(-1)
        timeouts = file["timeouts"][:].astype(bool).reshape(-1) if "timeouts" in file else np.zeros_like(terminals)
        ends = np.union1d(np.flatnonzero(terminals | timeouts) + 1, len(terminals))
        for index, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            names = ("observations", "actions", "rewards", "next_observations")
            arrays = {name: file[name][start:end] for name in names if name in file}
            _check_finite(f"{path}, episode {index}", **arrays)
            arrays["rewards"] = arrays["rewards"].reshape(-1)
            if "next_observations" not in arrays:
                # The row after a boundary is another episode's. What followed a termination is never looked at; what
                # followed a time limit would be, and is not known: that last step is no transition.
                following = np.concatenate([arrays["observations"][1:], arrays["observations"][-1:]])
                keep = end - start if terminals[end - 1] else end - start - 1
                arrays = {name: values[:keep] for name, values in (arrays | {"next_observations": following}).items()}
            yield Episode(**arrays, terminations=terminals[start : start + len(arrays["rewards"])])


# --- The built-in dataset -------------------------------------------------------------------------------------------


def _random_controller(observation: np.ndarray, rng: np.random.Generator) -> float:
    return rng.uniform(-2, 2)


def _good_controller(observation: np.ndarray, rng: np.random.Generator) -> float:
    """Swings up by bringing the pendulum to the energy it has at rest upright, then balances it with a PD law."""
    cos, sin, speed = map(float, observation)
    if cos > 0.8:
        return -10 * math.atan2(sin, cos) - 2 * speed  # the angle is 0 upright
    missing_energy = 15 - (speed**2 / 2 + 15 * cos)  # Pendulum-v1 accelerates by 15 sin(angle) + 3 torque
    return math.copysign(2, speed) * (1 if missing_energy > 0 else -1)


def _noisy_controller(observation: np.ndarray, rng: np.random.Generator) -> float:
    return _good_controller(observation, rng) + rng.normal(scale=0.4)


def _weak_controller(observation: np.ndarray, rng: np.random.Generator) -> float:
    """The good controller three times in ten, random torque otherwise: right on average, far too timid to imitate."""
    return (_good_controller if rng.random() < 0.3 else _random_controller)(observation, rng)


def _roll_out(env: gym.Env, controller: Callable[..., float], seed: int) -> EpisodeBuffer:
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed)
    episode = EpisodeBuffer(
        seed=seed, observations=[observation], actions=[], rewards=[], terminations=[], truncations=[]
    )
    truncated = False
    while not truncated:  # Pendulum-v1 never terminates: every episode is cut at 200 steps
        action = np.clip([controller(observation, rng)], -2, 2).astype(np.float32)
        observation, reward, terminated, truncated, _ = env.step(action)
        episode.observations.append(observation)
        episode.actions.append(action)
        episode.rewards.append(float(reward))
        episode.terminations.append(terminated)
        episode.truncations.append(truncated)
    return episode


def _make_pendulum() -> None:
    """Writes the built-in dataset: 30 good, 60 weak and 60 random episodes of Pendulum-v1, the same bits each time.

    It is made in a folder beside its place and renamed into it: a killed or a concurrent run never leaves half of it.
    """
    print(f"making {BUILT_IN_ID} in {get_dataset_path()} (once, a few seconds)", flush=True)
    with gym.make("Pendulum-v1") as env:
        plan = [(_noisy_controller, 30), (_weak_controller, 60), (_random_controller, 60)]
        controllers = [controller for controller, count in plan for _ in range(count)]
        episodes = [_roll_out(env, controller, seed) for seed, controller in enumerate(controllers)]
        random_return, good_return = (
            float(np.mean([sum(_roll_out(env, controller, seed).rewards) for seed in range(10_000, 10_050)]))
            for controller in (_random_controller, _good_controller)
        )
    root = get_dataset_path()
    with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as scratch, warnings.catch_warnings(action="ignore"):
        os.environ["MINARI_DATASETS_PATH"] = scratch  # Minari's only way to say where to write
        try:
            minari.create_dataset_from_buffers(
                BUILT_IN_ID,
                episodes,
                env="Pendulum-v1",
                ref_min_score=random_return,
                ref_max_score=good_return,
                num_episodes_average_score=50,
                algorithm_name="scripted controllers: 30 good, 60 weak and 60 random episodes",
                author="AnchoRL",
                description="Swing a pendulum up and hold it; scores: random torque 0, the good controller 100",
            )
        finally:
            os.environ["MINARI_DATASETS_PATH"] = str(root)
        for source in sorted(Path(scratch).rglob("namespace_metadata.json")):
            target = root / source.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
        with contextlib.suppress(OSError):  # another run was faster, and its dataset has the same bits
            os.rename(Path(scratch) / BUILT_IN_ID, root / BUILT_IN_ID)
