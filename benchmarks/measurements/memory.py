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
from pathlib import Path

import tyro

sys.path.append(str(Path(__file__).resolve().parent))
from loading import DATASET_ID, Args, make_dataset

SCRIPT = str(Path(__file__).resolve().parents[2] / "algorithms" / "mopo.py")


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder
        make_dataset(args)
        few = ["--max-dynamics-epochs", "1", "--rollout-every", "1", "--num-updates", "6"]  # rollouts fill the buffer
        command = [sys.executable, SCRIPT, "--dataset-id", DATASET_ID, "--run-dir", f"{folder}/run", *few]
        subprocess.run(command, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # it counts in KiB
    print(f"{args.num_steps:,} transitions: peak {peak / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
