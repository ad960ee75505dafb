"""What the peers' scripts share, so that all are scored in one way, which is ours: the transitions of a local Minari
dataset, the evaluations and their seeds, and the rows of two files, with the columns of benchmarks/run.py:

    OUT/results.csv       a row per cell: one algorithm on one dataset with one seed
    OUT/evaluations.csv   a row per evaluation

An evaluation is one episode from each of --eval-episodes seeds, those of common/evaluation.py, with the deterministic
policy; so is the final score, of 50 others. Cells run one after the other; those done are skipped. Several commands may
share an OUT, such as one with --seeds 2 and one with --first-seed 2 --seeds 1.
"""

import csv
import fcntl
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import gymnasium as gym
import h5py
import numpy as np
import torch

EVALUATION_SEED = 10_000  # as in common/evaluation.py
FINAL_SEED, FINAL_EPISODES = 20_000, 50
PROTOCOL = ("num_updates", "eval_every", "eval_episodes")  # arguments that all cells of a folder have in common
Policy = Callable[[np.ndarray], np.ndarray]  # actions of observations, as the dataset has them: [n, dim] both


@dataclass
class Args:
    datasets: tuple[str, ...] = ("anchorl/pendulum/mixed-v0",)
    """ids of local Minari datasets"""
    seeds: int = 3
    """seeds of each: --first-seed and those after it"""
    first_seed: int = 0
    """the first of them"""
    num_updates: int = 10_000
    """gradient steps"""
    eval_every: int = 1_000
    """updates between evaluations"""
    eval_episodes: int = 10
    """episodes per evaluation"""
    threads: int = 1
    """PyTorch's"""
    out: Path = Path("runs/peers")
    """results go here"""


def stop(problem: str) -> NoReturn:
    """Ends the command as bad input ends our scripts."""
    print(problem, file=sys.stderr)
    raise SystemExit(2)


# --- Data -----------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """All transitions of a dataset, float32 and in order, and what the dataset says of itself."""

    dataset_id: str
    observations: np.ndarray  # [steps, observation_dim]
    actions: np.ndarray  # [steps, action_dim], within the environment's bounds
    rewards: np.ndarray  # [steps]
    next_observations: np.ndarray  # [steps, observation_dim], at a cut too
    terminations: np.ndarray  # [steps], 1 where the environment ended the episode
    truncations: np.ndarray  # [steps], 1 where the episode was cut, or stops short, and did not end
    metadata: dict[str, Any]

    def environments(self, count: int) -> list[gym.Env]:
        """Those that ours are evaluated in."""
        spec = json.loads(self.metadata.get("eval_env_spec") or self.metadata.get("env_spec") or "{}")
        kwargs = {name: value for name, value in (spec.get("kwargs") or {}).items() if name != "render_mode"}
        limit = spec.get("max_episode_steps")
        try:
            return [gym.make(spec["id"], max_episode_steps=limit, **kwargs) for _ in range(count)]
        except Exception as error:  # none is named, or it is not installed
            why = " ".join(repr(error).split())[:200]
            stop(f"--datasets {self.dataset_id}: its environment cannot be made ({why})")

    def score(self, mean: float) -> float:
        low, high = self.metadata["ref_min_score"], self.metadata["ref_max_score"]
        return 100 * (mean - low) / (high - low)

    def d4rl(self, space: gym.spaces.Box) -> dict[str, np.ndarray]:
        """A copy as D4RL's `qlearning_dataset` names it, with the actions of `space` scaled to [-1, 1]. D4RL's leaves
        out the step to a cut, whose next observation it does not have; here it is there.
        """
        return {
            "observations": self.observations.copy(),
            "actions": 2 * (self.actions - space.low) / (space.high - space.low) - 1,
            "rewards": self.rewards.copy(),
            "next_observations": self.next_observations.copy(),
            "terminals": self.terminations.astype(bool),
        }


def read(dataset_id: str) -> Data:
    root = Path(os.environ.get("MINARI_DATASETS_PATH", Path.home() / ".minari" / "datasets"))
    built_in = Path(__file__).resolve().parents[2] / "common" / "built_in"
    folder = next((root for root in (root, built_in) if (root / dataset_id).exists()), root) / dataset_id / "data"
    if not (folder / "main_data.hdf5").exists():
        stop(f"--datasets {dataset_id}: no {folder}/main_data.hdf5; set MINARI_DATASETS_PATH, or download it before")
    metadata = json.loads((folder / "metadata.json").read_text())
    if "ref_min_score" not in metadata:
        stop(f"--datasets {dataset_id}: has no reference scores, in which results are given")
    names = ("observations", "actions", "rewards", "next_observations", "terminations", "truncations")
    fields: dict[str, list[np.ndarray]] = {name: [] for name in names}
    with h5py.File(folder / "main_data.hdf5") as file:
        stored = [file["episode_0"][name] for name in ("observations", "actions")]
        if any(getattr(values, "ndim", None) != 2 for values in stored):  # a group has none
            stop(f"--datasets {dataset_id}: its observations and actions must be vectors")
        for number in range(metadata["total_episodes"]):
            episode = {name: file[f"episode_{number}"][name][:] for name in names if name != "next_observations"}
            observations = episode["observations"]
            episode |= {"observations": observations[:-1], "next_observations": observations[1:]}
            last = not episode["terminations"][-1]  # one that stops short was cut, too; an end is no cut
            episode["truncations"] = np.append(episode["truncations"][:-1], last)
            for name, values in episode.items():
                fields[name].append(values)
    arrays = {name: np.concatenate(values).astype(np.float32) for name, values in fields.items()}
    return Data(dataset_id, **arrays, metadata=metadata)


# --- Evaluation -----------------------------------------------------------------------------------------------------


def evaluate(policy: Policy, environments: list[gym.Env], seed: int = EVALUATION_SEED) -> np.ndarray:
    """Returns [episodes], one episode of each environment, reset with `seed` and those after it."""
    observations = [environment.reset(seed=seed + index)[0] for index, environment in enumerate(environments)]
    returns, running = np.zeros(len(environments)), list(range(len(environments)))
    while running:
        actions = policy(np.array([observations[index] for index in running], dtype=np.float32))
        ended = []
        for index, action in zip(running, actions, strict=True):
            space = environments[index].action_space
            action = np.clip(action, space.low, space.high)  # type: ignore[attr-defined]
            observations[index], reward, terminated, truncated, _ = environments[index].step(action)
            returns[index] += float(reward)
            if terminated or truncated:
                ended.append(index)
        running = [index for index in running if index not in ended]
    return returns


class Cell:
    """One training: `start` it, `evaluate` where `due`, and `finish`. Evaluations do not count as time of updates."""

    def __init__(self, algorithm: str, dataset_id: str, seed: int, args: Args) -> None:
        self.began = time.perf_counter()
        self.args, self.seed, self.data = args, seed, read(dataset_id)
        self.environments = self.data.environments(args.eval_episodes)
        self.space: gym.spaces.Box = self.environments[0].action_space  # type: ignore[assignment]
        self.names = {"algorithm": algorithm, "dataset_id": dataset_id, "seed": seed}
        self.rows: list[dict[str, Any]] = []
        self.update_seconds = 0.0

    def start(self) -> None:
        """Updates begin; what came before, such as the training of a model, is in `wall_seconds` alone."""
        self.resumed = time.perf_counter()

    def due(self, step: int) -> bool:
        return step % self.args.eval_every == 0 or step == self.args.num_updates

    def evaluate(self, step: int, policy: Policy) -> None:
        self.update_seconds += time.perf_counter() - self.resumed
        mean = float(evaluate(policy, self.environments).mean())
        self.rows.append(self.names | {"num_updates": step, "score": self.data.score(mean), "return_mean": mean})
        print(
            f"{' '.join(map(str, self.names.values()))}: {step:,} updates, score {self.rows[-1]['score']:.1f}",
            flush=True,
        )
        self.resumed = time.perf_counter()

    def finish(self, policy: Policy, versions: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The cell's row of results.csv, and its rows of evaluations.csv."""
        seeds = range(FINAL_SEED, FINAL_SEED + FINAL_EPISODES, len(self.environments))
        returns = [evaluate(policy, self.environments, seed) for seed in seeds]
        final = np.concatenate(returns)[:FINAL_EPISODES]
        return self.names | {
            "num_updates": self.args.num_updates,
            "final_return_mean": float(final.mean()),
            "final_score": self.data.score(float(final.mean())),
            "final_returns": final.tolist(),
            "updates_per_second": self.args.num_updates / self.update_seconds,
            "wall_seconds": time.perf_counter() - self.began,
            "device": "cpu",
            "eval_every": self.args.eval_every,
            "eval_episodes": self.args.eval_episodes,
            "versions": f"{versions.strip()} torch {torch.__version__} gymnasium {gym.__version__}",
        }, self.rows

    def from_unit(self, actions: np.ndarray) -> np.ndarray:
        """The environment's actions of those in [-1, 1]."""
        return self.space.low + (np.clip(actions, -1, 1) + 1) / 2 * (self.space.high - self.space.low)


# --- A checkout's code ----------------------------------------------------------------------------------------------


class StandIn(ModuleType):
    """Takes the place of a package that training does not need. Every name in it can be called, gives back what it was
    called with, and does nothing else.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else self


def load(folder: Path, name: str, argument: str, absent: tuple[str, ...]) -> Any:
    """The module `name` in `folder` of a checkout, with stand-ins for the packages `absent`."""
    path = folder / f"{name.replace('.', '/')}.py"
    if not path.exists():
        stop(f"{argument}: no {path}; give the folder of a checkout")
    sys.modules.update({package: StandIn(package) for package in absent})
    sys.modules.pop(name, None)  # of another folder
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def commit_of(checkout: Path) -> str:
    """Its short name, or nothing where it is a folder without history."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return (
        subprocess.run(command, capture_output=True, text=True).stdout.strip() if (checkout / ".git").exists() else ""
    )


class Environment:
    """A cell's environment as a checkout's training sees it: its spaces, and no episodes, which `evaluate` runs."""

    def __init__(self, cell: Cell) -> None:
        dimension = cell.data.observations.shape[1]
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (dimension,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, cell.space.shape, np.float32)
        self.get_normalized_score = lambda returns: cell.data.score(returns) / 100

    def seed(self, seed: int) -> None:
        """Nothing: evaluations have seeds of their own."""


# --- Results --------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """All of them, in place of what was there: a file is the old one or the new one, never half of one."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        columns = list(dict.fromkeys(chain.from_iterable(rows)))  # another version's rows may lack some
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def cell_of(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["algorithm"], row["dataset_id"], int(row["seed"])


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Other commands wait until this one has read the files or written them."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def done_cells(args: Args) -> set[tuple[str, str, int]]:
    """Stops where they had other updates or evaluations: they would stand in for what is asked for."""
    path = args.out / "results.csv"
    with alone_in(args.out):
        rows = read_rows(path)
    for row in rows:
        for name in PROTOCOL:
            if row.get(name) != str(getattr(args, name)):
                stop(f"{path} has {' '.join(map(str, cell_of(row)))} with {name} {row.get(name)}: give another --out")
    return set(map(cell_of, rows))


def add(out: Path, result: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """A cell's rows to the two files, in place of those of a command that was cut off between them."""
    result = {
        name: json.dumps(value) if isinstance(value, list) else value for name, value in result.items()
    }  # NaN, too
    with alone_in(out):
        results, evaluations = read_rows(out / "results.csv"), read_rows(out / "evaluations.csv")
        others = set(map(cell_of, results)) - {cell_of(result)}
        write_rows(out / "evaluations.csv", [row for row in evaluations if cell_of(row) in others] + rows)
        write_rows(out / "results.csv", [row for row in results if cell_of(row) in others] + [result])


def run(library: str, algorithms: tuple[str, ...], args: Args, train: Callable[[str, Cell], tuple]) -> None:
    """Trains all cells that are not done: `train` takes the algorithm and the cell, and gives what `finish` gives."""
    for name in ("seeds", *PROTOCOL, "threads"):
        if getattr(args, name) < 1:
            stop(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.first_seed < 0:
        stop(f"--first-seed {args.first_seed}: must not be negative")
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for algorithm, dataset_id, seed in product(algorithms, args.datasets, seeds):
        if (f"{library} {algorithm}", dataset_id, seed) not in done_cells(args):
            add(args.out, *train(algorithm, Cell(f"{library} {algorithm}", dataset_id, seed, args)))
