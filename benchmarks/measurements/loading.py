"""Time and peak memory of loading a local Minari dataset into the replay buffer, beside a bare h5py read of its file.

Makes a dataset of the given size in a temporary folder (1,000 steps an episode, float64 as MuJoCo's observations are),
and measures each of the two in a process of its own: the peak is what its resident memory grew by at most. Linux only.

Run: python -m benchmarks.measurements.loading
"""

import os
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import torch
from minari.data_collector import EpisodeBuffer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from common.command_line import check, launch
from common.data import ReplayBuffer, load_dataset

DATASET_ID = "benchmark/loading-v0"


@dataclass
class Args:
    num_steps: int = 1_000_000
    """transitions, a multiple of 1,000"""
    observation_dim: int = 17
    """HalfCheetah's"""
    action_dim: int = 6
    """HalfCheetah's"""


def make_dataset(args: Args) -> None:
    whole = args.num_steps >= 1000 and args.num_steps % 1000 == 0
    check(whole, f"--num-steps {args.num_steps}: must be a multiple of 1,000, the steps of an episode")
    check(min(args.observation_dim, args.action_dim) >= 1, "--observation-dim and --action-dim: must be at least 1")
    rng = np.random.default_rng(0)

    def episode() -> EpisodeBuffer:
        return EpisodeBuffer(
            observations=rng.normal(size=(1001, args.observation_dim)),
            actions=rng.uniform(-1, 1, size=(1000, args.action_dim)).astype(np.float32),
            rewards=rng.normal(size=1000),
            terminations=np.zeros(1000, bool),
            truncations=np.arange(1000) == 999,
        )

    with warnings.catch_warnings(action="ignore"):
        dataset = minari.create_dataset_from_buffers(
            DATASET_ID,
            [episode()],
            observation_space=gym.spaces.Box(-np.inf, np.inf, (args.observation_dim,), np.float64),
            action_space=gym.spaces.Box(-1, 1, (args.action_dim,), np.float32),
        )
        for _ in range(args.num_steps // 1000 - 1):
            dataset.update_dataset_from_buffer([episode()])


def resident_bytes(name: str) -> int:
    """VmRSS, what is resident now, or VmHWM, its peak: of this process alone, unlike getrusage's, which starts with the
    parent's. Linux only."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


def load_with_replay_buffer() -> int:
    """Bytes of the tensors."""
    return ReplayBuffer(load_dataset(DATASET_ID), torch.device("cpu")).storage.nbytes


def load_with_h5py() -> int:
    """Bytes of the arrays, all episodes kept in memory as they are in the file."""
    path = Path(os.environ["MINARI_DATASETS_PATH"]) / DATASET_ID / "data" / "main_data.hdf5"
    with h5py.File(path) as file:
        names = ("observations", "actions", "rewards", "terminations", "truncations")
        arrays = [episode[name][:] for episode in file.values() for name in names]
    return sum(array.nbytes for array in arrays)


LOADERS = {"replay buffer": load_with_replay_buffer, "bare h5py": load_with_h5py}


def measure(name: str) -> None:
    """What each of the two child processes does."""
    before, began = resident_bytes("VmRSS"), time.perf_counter()
    size = LOADERS[name]()
    seconds, peak = time.perf_counter() - began, resident_bytes("VmHWM") - before
    print(f"{name:>13}: {seconds:5.2f} s, {size / 2**20:4.0f} MiB held, peak {peak / size:.2f} times that")


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder
        make_dataset(args)
        for _ in range(2):  # the first round finds the file's pages in no particular state
            for name in LOADERS:
                subprocess.run([sys.executable, __file__, name], check=True)


if __name__ == "__main__":
    if sys.argv[1:] in [[name] for name in LOADERS]:
        measure(sys.argv[1])
    else:
        launch(main, Args)
