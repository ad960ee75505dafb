"""Peak resident memory of the script that needs most, MOPO, on a dataset of a million transitions.

The run has all that takes memory: the data, an epoch of the model, the model's buffer full, and a checkpoint of it.
Linux only.

Run: python -m benchmarks.measurements.memory
"""

import os
import resource
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.append(str(Path(__file__).resolve().parent))
import loading

from common.command_line import launch

SCRIPT = str(Path(__file__).resolve().parents[2] / "algorithms" / "mopo.py")


@dataclass
class Args(loading.Args): ...


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder
        loading.make_dataset(args)
        few = ["--max-dynamics-epochs", "1", "--rollout-every", "1", "--num-updates", "6"]  # rollouts fill the buffer
        command = [sys.executable, SCRIPT, "--dataset-id", loading.DATASET_ID, "--run-dir", f"{folder}/run", *few]
        subprocess.run(command, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # it counts in KiB
    print(f"{args.num_steps:,} transitions: peak {peak / 2**30:.2f} GiB")


if __name__ == "__main__":
    launch(main, Args)
