"""Makes the three datasets that the repository brings along: scripted controllers of every skill, on small tasks.

They are written as Minari has them, compressed, the same bits each time. The folder has to be without them; to change
what is shipped, remove common/built_in and make it again.

Run: python -m benchmarks.built_in --out common/built_in
"""

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent))
import two_ways
from scratch import CannotWrite, check_room, scratch_folder

from common.command_line import check, launch, one_line
from common.data import BUILT_IN_DISCRETE_ID, BUILT_IN_ID, BUILT_IN_TWO_WAYS_ID

MINARI_VERSION = "0.5.3"  # the oldest that pyproject.toml allows: Minari reads no data of versions newer than itself


@dataclass
class Args:
    out: Path
    """folder to write to, as anchorl/<task>/mixed-v0/data"""


Controller = Callable[[np.ndarray, np.random.Generator], Any]  # an observation to the environment's action


# --- Pendulum -------------------------------------------------------------------------------------------------------


def good_controller(observation: np.ndarray) -> float:
    """Swings up by bringing the pendulum to the energy it has at rest upright, then balances it with a PD law."""
    cos, sin, speed = map(float, observation)
    if cos > 0.8:
        return -10 * math.atan2(sin, cos) - 2 * speed  # the angle is 0 upright
    missing_energy = 15 - (speed**2 / 2 + 15 * cos)  # Pendulum-v1 accelerates by 15 sin(angle) + 3 torque
    return math.copysign(2, speed) * (1 if missing_energy > 0 else -1)


def pendulum_controller(skill: float, noise: float = 0.0) -> Controller:
    """The good controller with probability `skill` at each step, else random torque."""

    def act(observation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        skilled, random = rng.random() < skill, rng.uniform(-2, 2)
        torque = good_controller(observation) + noise * rng.normal() if skilled else random
        return np.clip([torque], -2, 2).astype(np.float32)

    return act


def make_pendulum(out: Path) -> None:
    """30 good, 60 weak and 60 random episodes of Pendulum-v1."""
    good, weak, random = (pendulum_controller(*arguments) for arguments in ((1.0, 0.4), (0.3, 0.0), (0.0, 0.0)))
    what = "30 good, 60 weak and 60 random episodes"
    task = "Swing a pendulum up and hold it; scores: random torque 0, the good controller 100"
    controllers = [good] * 30 + [weak] * 60 + [random] * 60
    make(out, BUILT_IN_ID, "Pendulum-v1", controllers, pendulum_controller(1.0), what, task)


# --- CartPole -------------------------------------------------------------------------------------------------------


def cartpole_controller(skill: float, weights: tuple[float, ...] = (0.05, 0.1, 1.0, 0.3)) -> Controller:
    """With probability `skill` at each step a push to where the weighted sum of the cart's position and speed and the
    pole's angle and speed points, else a random one. The default weights balance without an end.
    """

    def act(observation: np.ndarray, rng: np.random.Generator) -> int:
        skilled, random = rng.random() < skill, rng.integers(2)
        return int(observation @ weights > 0) if skilled else int(random)

    return act


def make_cartpole(out: Path) -> None:
    """20 good, 60 weak, 60 short-sighted and 60 random episodes of CartPole-v1."""
    good, weak, random = (cartpole_controller(skill) for skill in (0.9, 0.3, 0.0))
    short_sighted = cartpole_controller(1.0, (0.0, 0.0, 1.0, 0.0))  # looks at the angle alone, and overshoots
    what = "20 good, 60 weak, 60 short-sighted and 60 random episodes"
    task = "Balance a pole on a cart; scores: random pushes 0, the longest episode, of 500 steps, 100"
    controllers = [good] * 20 + [weak] * 60 + [short_sighted] * 60 + [random] * 60
    make(out, BUILT_IN_DISCRETE_ID, "CartPole-v1", controllers, cartpole_controller(1.0), what, task)


# --- Two ways -------------------------------------------------------------------------------------------------------


def two_ways_controller(side: float, noise: float = 0.0, speed: float = 1.0, margin: float = 0.2) -> Controller:
    """Goes above the wall (`side` 1) or below it (-1), `margin` away from its corners: a small one cuts them. The
    larger part of an action is `speed`, noise is added to both.
    """
    (low_x, _), (high_x, high_y) = two_ways.WALL
    corners = [np.array([x, side * (high_y + margin)]) for x in (low_x, high_x)]

    def act(observation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        passed = sum(bool(observation[0] >= corner[0] - 0.1) for corner in corners)
        way = np.array([*corners, (two_ways.FIELD[0], 0)])[passed] - observation
        way *= speed / max(np.abs(way).max(), two_ways.STEP)
        return np.clip(way + noise * rng.normal(size=2), -1, 1).astype(np.float32)

    return act


def random_move(observation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(-1, 1, 2).astype(np.float32)


def make_two_ways(out: Path) -> None:
    """40 good, 20 slow, 20 clumsy and 20 random episodes of anchorl/TwoWays-v0, as many above the wall as below it."""
    good = [two_ways_controller(side, noise) for noise in (0.1, 0.2) for side in (1, -1) * 10]
    slow = [two_ways_controller(side, 0.2, speed=0.5) for side in (1, -1) * 10]
    clumsy = [two_ways_controller(side, 0.2, margin=-0.15) for side in (1, -1) * 10]  # they cut the corner
    what = "40 good, 20 slow and 20 clumsy episodes, every other one above the wall, and 20 random ones"
    task = "Reach the goal behind a wall, above it or below; scores: random moves 0, the good controller 100"
    controllers = [*good, *slow, *clumsy, *[random_move] * 20]
    make(out, BUILT_IN_TWO_WAYS_ID, "anchorl/TwoWays-v0", controllers, two_ways_controller(1), what, task)


# --- Any ------------------------------------------------------------------------------------------------------------


def make(
    out: Path, dataset_id: str, env_id: str, controllers: list[Controller], best: Controller, what: str, task: str
) -> None:
    """Writes a dataset with an episode of each of the controllers. The last one is random: its mean return is score 0.
    That of `best` is score 100.
    """
    path = out / dataset_id / "data"
    path.mkdir(parents=True)
    with gym.make(env_id) as env:
        episodes = [roll_out(env, seed, act) for seed, act in enumerate(controllers)]
        low, high = (mean_return(env, act) for act in (controllers[-1], best))
        storage = MinariStorage.new(path, env.observation_space, env.action_space, env.spec)
    check_room(out, dataset_id, episodes)
    storage.update_episodes(episodes)
    compress(path / "main_data.hdf5")
    storage.update_metadata(
        {
            "dataset_id": dataset_id,
            "author": {"AnchoRL"},
            "algorithm_name": f"scripted controllers: {what}",
            "description": task,
            "minari_version": MINARI_VERSION,
            "ref_max_score": high,
            "ref_min_score": low,
            "num_episodes_average_score": 50,
            "dataset_size": storage.get_size(),
        }
    )


def roll_out(env: gym.Env, seed: int, act: Controller) -> EpisodeBuffer:
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


def mean_return(env: gym.Env, act: Controller) -> float:
    return float(np.mean([sum(roll_out(env, seed, act).rewards) for seed in range(10_000, 10_050)]))


def compress(path: Path) -> None:
    """Writes an HDF5 file anew, its arrays compressed, in the layout of HDF5 1.10: for small arrays a third as big."""
    scratch = path.with_name("compressed.hdf5")
    with h5py.File(path) as source, h5py.File(scratch, "w", libver=("v110", "v110")) as target:
        copy(source, target)
    scratch.replace(path)


def copy(source: h5py.Group, target: h5py.Group) -> None:
    target.attrs.update(source.attrs)
    for name, item in source.items():
        if isinstance(item, h5py.Group):
            copy(item, target.create_group(name))
        else:
            target.create_dataset(name, data=item[()], chunks=item.shape, compression=9, shuffle=True)


def main(args: Args) -> None:
    datasets = {BUILT_IN_ID: make_pendulum, BUILT_IN_DISCRETE_ID: make_cartpole, BUILT_IN_TWO_WAYS_ID: make_two_ways}
    for path in (args.out / dataset_id for dataset_id in datasets):
        check(not path.exists(), f"--out: {path} exists: remove it, or give another folder")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with scratch_folder(args.out.resolve()) as scratch:
            for dataset_id, make_dataset in datasets.items():
                make_dataset(scratch)
                (args.out / dataset_id).parent.mkdir(parents=True, exist_ok=True)
                os.rename(scratch / dataset_id, args.out / dataset_id)
    except CannotWrite:
        raise
    except OSError as error:
        raise CannotWrite(f"cannot write to {args.out}: {one_line(error)}") from None
    print(f"built-in datasets: {args.out / 'anchorl'}")


if __name__ == "__main__":
    launch(main, Args)
