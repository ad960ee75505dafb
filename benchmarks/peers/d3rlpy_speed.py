"""Updates per second of d3rlpy, for throughput.py --peers, which runs this with the Python of d3rlpy's environment.

Each line on standard input asks for one measurement of that many seconds, and is answered by a line on standard output.
Batches of 256, three hidden layers in CQL and 10 samples per state in BCQ, as in our scripts; all else is d3rlpy's
default, its networks then of the size of ours and its CQL's samples as many. Its CQL tunes alpha, ours does not.
"""

import logging
import sys
import time

import d3rlpy
import numpy as np
import structlog
import torch

CONFIGS = {
    "bc": d3rlpy.algos.BCConfig,
    "td3_bc": d3rlpy.algos.TD3PlusBCConfig,
    "iql": d3rlpy.algos.IQLConfig,
    "bcq": d3rlpy.algos.BCQConfig,
    "cql": d3rlpy.algos.CQLConfig,
}
LAYERS = d3rlpy.models.VectorEncoderFactory(hidden_units=[256, 256, 256])
OPTIONS = {
    "bcq": {"n_action_samples": 10},
    "cql": {"actor_encoder_factory": LAYERS, "critic_encoder_factory": LAYERS},
}


def main(algorithm: str, observation_dim: int, action_dim: int, threads: int, num_steps: int = 10_000) -> None:
    torch.set_num_threads(threads)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    rng = np.random.default_rng(0)
    dataset = d3rlpy.dataset.MDPDataset(
        rng.normal(size=(num_steps, observation_dim)).astype(np.float32),
        rng.uniform(-1, 1, size=(num_steps, action_dim)).astype(np.float32),
        rng.normal(size=num_steps).astype(np.float32),
        np.zeros(num_steps),
        np.arange(num_steps) % 1000 == 999,
    )
    learner = CONFIGS[algorithm](batch_size=256, **OPTIONS.get(algorithm, {})).create(device="cpu:0")
    learner.build_with_dataset(dataset)
    for line in sys.stdin:
        began, calls = time.perf_counter(), 0
        while time.perf_counter() - began < float(line):
            learner.update(dataset.sample_transition_batch(learner.batch_size))
            calls += 1
        print(f"{calls / (time.perf_counter() - began):.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
