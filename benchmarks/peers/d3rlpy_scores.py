# /// script
# requires-python = ">=3.11"
# dependencies = ["d3rlpy==2.8.1", "gymnasium[mujoco]==1.0.0", "h5py>=3", "torch==2.13.0", "tyro>=1"]
# ///
"""Scores of d3rlpy in our protocol: the same Minari data, updates, evaluations and seeds. Its pins clash with ours, so
it runs in an environment of its own, which `uv run` makes from the lines above; the datasets must be local.

Batches of 256, observations normalised, actions scaled to [-1, 1], CQL with alpha 10 and three layers, and BCQ with 10
samples in the target, as ours; all else is d3rlpy's default. (Its BCQ then acts by the best of 10, ours by the best of
100.) An evaluation is one episode from each of --eval-episodes seeds, those of common/evaluation.py, with what
`predict` says; so is the final score, of 50 others. Cells run one after the other; those done are skipped.

    OUT/results.csv       a row per cell, and
    OUT/evaluations.csv   a row per evaluation, with the columns of benchmarks/run.py, for benchmarks/report.py

Run: uv run benchmarks/peers/d3rlpy_scores.py --datasets anchorl/pendulum/mixed-v0 --out runs/d3rlpy
"""

import csv
import json
import logging
import os
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

import d3rlpy
import gymnasium as gym
import h5py
import numpy as np
import structlog
import torch
import tyro
from d3rlpy.preprocessing import MinMaxActionScaler, StandardObservationScaler

EVALUATION_SEED = 10_000  # as in common/evaluation.py
FINAL_SEED, FINAL_EPISODES = 20_000, 50
LAYERS = d3rlpy.models.VectorEncoderFactory(hidden_units=[256, 256, 256])
CONFIGS: dict[str, Any] = {
    "bc": d3rlpy.algos.BCConfig,
    "td3_bc": d3rlpy.algos.TD3PlusBCConfig,
    "iql": d3rlpy.algos.IQLConfig,
    "cql": d3rlpy.algos.CQLConfig,
    "bcq": d3rlpy.algos.BCQConfig,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "cql": {
        "conservative_weight": 10.0,
        "alpha_learning_rate": 0.0,  # its dual variable stays where it begins, at 1
        "actor_encoder_factory": LAYERS,
        "critic_encoder_factory": LAYERS,
    },
    "bcq": {"n_action_samples": 10},
}


@dataclass
class Args:
    algorithms: tuple[Literal["bc", "td3_bc", "iql", "cql", "bcq"], ...] = ("td3_bc", "iql", "cql", "bcq")
    """as our scripts are called"""
    datasets: tuple[str, ...] = ("anchorl/pendulum/mixed-v0",)
    """ids of local Minari datasets"""
    seeds: int = 3
    """seeds of each: 0, 1, ..."""
    num_updates: int = 10_000
    """gradient steps"""
    eval_every: int = 1_000
    """updates between evaluations"""
    eval_episodes: int = 10
    """episodes per evaluation"""
    threads: int = 1
    """PyTorch's"""
    out: Path = Path("runs/d3rlpy")
    """results go here"""


def read(dataset_id: str) -> tuple[d3rlpy.dataset.MDPDataset, dict[str, Any]]:
    """The transitions, and what the dataset says of itself."""
    root = Path(os.environ.get("MINARI_DATASETS_PATH", Path.home() / ".minari" / "datasets"))
    built_in = Path(__file__).resolve().parents[2] / "common" / "built_in"
    folder = next((root for root in (root, built_in) if (root / dataset_id).exists()), root) / dataset_id / "data"
    metadata = json.loads((folder / "metadata.json").read_text())
    fields: dict[str, list[np.ndarray]] = {
        name: [] for name in ("observations", "actions", "rewards", "terminations", "truncations")
    }
    with h5py.File(folder / "main_data.hdf5") as file:
        for number in range(metadata["total_episodes"]):
            for name, values in fields.items():
                steps = file[f"episode_{number}"][name][:]
                values.append(steps[:-1] if name == "observations" else steps)
    fields["truncations"] = [  # an episode that stops short was cut, too
        np.concatenate([cut[:-1], [cut[-1] or not ended[-1]]])
        for cut, ended in zip(fields["truncations"], fields["terminations"], strict=True)
    ]
    arrays = {name: np.concatenate(values).astype(np.float32) for name, values in fields.items()}
    dataset = d3rlpy.dataset.MDPDataset(
        arrays["observations"], arrays["actions"], arrays["rewards"], arrays["terminations"], arrays["truncations"]
    )
    return dataset, metadata


def evaluate(learner: Any, environments: list[gym.Env], seed: int = EVALUATION_SEED) -> np.ndarray:
    """Returns [episodes], one episode of each environment, reset with `seed` and those after it."""
    observations = [environment.reset(seed=seed + index)[0] for index, environment in enumerate(environments)]
    returns, running = np.zeros(len(environments)), list(range(len(environments)))
    while running:
        actions = learner.predict(np.array([observations[index] for index in running], dtype=np.float32))
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


def train(algorithm: str, dataset_id: str, seed: int, args: Args) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The cell's row of results.csv, and its rows of evaluations.csv."""
    began = time.perf_counter()
    d3rlpy.seed(seed)
    dataset, metadata = read(dataset_id)
    spec = json.loads(metadata["env_spec"])
    kwargs = {name: value for name, value in spec["kwargs"].items() if name != "render_mode"}
    environments = [
        gym.make(spec["id"], max_episode_steps=spec["max_episode_steps"], **kwargs) for _ in range(args.eval_episodes)
    ]
    space = environments[0].action_space
    config = CONFIGS[algorithm](
        batch_size=256,
        observation_scaler=StandardObservationScaler(),
        action_scaler=MinMaxActionScaler(minimum=space.low, maximum=space.high),  # type: ignore[attr-defined]
        **OPTIONS.get(algorithm, {}),
    )
    learner = config.create(device="cpu:0")
    for scaler in (learner.config.observation_scaler, learner.config.action_scaler):
        if not scaler.built:
            scaler.fit_with_transition_picker(dataset.episodes, dataset.transition_picker)
    learner.build_with_dataset(dataset)
    if "ref_min_score" not in metadata:
        sys.exit(f"{dataset_id} has no reference scores, in which results are given")
    low, high = metadata["ref_min_score"], metadata["ref_max_score"]
    cell = {"algorithm": f"d3rlpy {algorithm}", "dataset_id": dataset_id, "seed": seed}
    rows: list[dict[str, Any]] = []
    update_seconds = 0.0
    for step in range(1, args.num_updates + 1):
        before = time.perf_counter()
        learner.update(dataset.sample_transition_batch(learner.batch_size))
        update_seconds += time.perf_counter() - before
        if step % args.eval_every == 0 or step == args.num_updates:
            mean = float(evaluate(learner, environments).mean())
            rows.append(cell | {"num_updates": step, "score": 100 * (mean - low) / (high - low), "return_mean": mean})
            print(f"{' '.join(map(str, cell.values()))}: {step:,} updates, score {rows[-1]['score']:.1f}", flush=True)
    seeds = range(FINAL_SEED, FINAL_SEED + FINAL_EPISODES, len(environments))
    returns = np.concatenate([evaluate(learner, environments, seed) for seed in seeds])[:FINAL_EPISODES]
    return cell | {
        "num_updates": args.num_updates,
        "final_return_mean": float(returns.mean()),
        "final_score": 100 * (float(returns.mean()) - low) / (high - low),
        "final_returns": returns.tolist(),
        "updates_per_second": args.num_updates / update_seconds,
        "wall_seconds": time.perf_counter() - began,
        "device": "cpu",
        "eval_every": args.eval_every,
        "eval_episodes": args.eval_episodes,
        "versions": f"d3rlpy {d3rlpy.__version__} torch {torch.__version__} gymnasium {gym.__version__}",
    }, rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """All of them, in place of what was there: a file is the old one or the new one, never half of one."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def cell_of(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["algorithm"], row["dataset_id"], int(row["seed"])


def check_arguments(path: Path, rows: list[dict[str, Any]], args: Args) -> None:
    """Exits where finished cells had other updates or evaluations: they would stand in for what is asked for."""
    for row in rows:
        for name in ("num_updates", "eval_every", "eval_episodes"):
            if int(row[name]) != getattr(args, name):
                sys.exit(f"{path} has {' '.join(map(str, cell_of(row)))} with {name} {row[name]}: give another --out")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    args.out.mkdir(parents=True, exist_ok=True)
    results, evaluations = read_rows(args.out / "results.csv"), read_rows(args.out / "evaluations.csv")
    check_arguments(args.out / "results.csv", results, args)
    done = set(map(cell_of, results))
    evaluations = [row for row in evaluations if cell_of(row) in done]  # not of a cell that was cut off between the two
    for algorithm, dataset_id, seed in product(args.algorithms, args.datasets, range(args.seeds)):
        if (f"d3rlpy {algorithm}", dataset_id, seed) not in done:
            result, rows = train(algorithm, dataset_id, seed, args)
            results, evaluations = [*results, result], [*evaluations, *rows]
            write_rows(args.out / "evaluations.csv", evaluations)
            write_rows(args.out / "results.csv", results)


if __name__ == "__main__":
    main()
