# /// script
# requires-python = ">=3.11"
# dependencies = ["d3rlpy==2.8.1", "gymnasium[mujoco]==1.0.0", "h5py>=3", "torch==2.13.0", "tyro>=1"]
# ///
"""Scores of d3rlpy in our protocol (protocol.py): the same Minari data, updates, evaluations and seeds. Its pins clash
with ours, so it runs in an environment of its own, which `uv run` makes from the lines above; the datasets must be
local.

Batches of 256, observations normalised, actions scaled to [-1, 1], CQL with alpha 10 and three layers, and BCQ with 10
samples in the target, as ours; all else is d3rlpy's default. (Its BCQ then acts by the best of 10, ours by the best of
100; its AWAC has lambda 1, ours 2; its BEAR knows no Q for 40,000 updates, as the authors', ours for 2,000.) What
`predict` says is the deterministic policy.

Run: uv run benchmarks/peers/d3rlpy_scores.py --datasets anchorl/pendulum/mixed-v0 --out runs/d3rlpy
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import d3rlpy
import structlog
import tyro
from d3rlpy.preprocessing import MinMaxActionScaler, StandardObservationScaler
from protocol import Args as SharedArgs
from protocol import Cell, run

LAYERS = d3rlpy.models.VectorEncoderFactory(hidden_units=[256, 256, 256])
CONFIGS: dict[str, Any] = {
    "bc": d3rlpy.algos.BCConfig,
    "td3_bc": d3rlpy.algos.TD3PlusBCConfig,
    "iql": d3rlpy.algos.IQLConfig,
    "cql": d3rlpy.algos.CQLConfig,
    "bcq": d3rlpy.algos.BCQConfig,
    "bear": d3rlpy.algos.BEARConfig,
    "awac": d3rlpy.algos.AWACConfig,
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
class Args(SharedArgs):
    algorithms: tuple[Literal["bc", "td3_bc", "iql", "cql", "bcq", "bear", "awac"], ...] = (
        "td3_bc",
        "iql",
        "cql",
        "bcq",
    )
    """as our scripts are called"""
    out: Path = Path("runs/d3rlpy")
    """results go here"""


def train(algorithm: str, cell: Cell) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The cell's row of results.csv, and its rows of evaluations.csv."""
    d3rlpy.seed(cell.seed)
    data = cell.data
    dataset = d3rlpy.dataset.MDPDataset(
        data.observations, data.actions, data.rewards, data.terminations, data.truncations
    )
    config = CONFIGS[algorithm](
        batch_size=256,
        observation_scaler=StandardObservationScaler(),
        action_scaler=MinMaxActionScaler(minimum=cell.space.low, maximum=cell.space.high),
        **OPTIONS.get(algorithm, {}),
    )
    learner = config.create(device="cpu:0")
    for scaler in (learner.config.observation_scaler, learner.config.action_scaler):
        if not scaler.built:
            scaler.fit_with_transition_picker(dataset.episodes, dataset.transition_picker)
    learner.build_with_dataset(dataset)
    cell.start()
    for step in range(1, cell.args.num_updates + 1):
        learner.update(dataset.sample_transition_batch(learner.batch_size))
        if cell.due(step):
            cell.evaluate(step, learner.predict)
    return cell.finish(learner.predict, f"d3rlpy {d3rlpy.__version__}")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    run("d3rlpy", args.algorithms, args, train)


if __name__ == "__main__":
    main()
