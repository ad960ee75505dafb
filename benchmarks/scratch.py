"""Where the tools write datasets: aside first, so that nobody ever finds half of one."""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from minari.storage.datasets_root_dir import get_dataset_path


@contextlib.contextmanager
def scratch_root(dataset_id: str) -> Iterator[None]:
    """Minari writes to a folder aside. The dataset is renamed into place at the end: it is there as a whole or not at
    all. Raises OSError if the datasets folder cannot be written, or if the dataset has come to exist meanwhile.
    """
    root = get_dataset_path()
    with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as scratch:
        os.environ["MINARI_DATASETS_PATH"] = scratch  # Minari's only way to say where
        try:
            with warnings.catch_warnings(action="ignore"):
                yield
        finally:
            os.environ["MINARI_DATASETS_PATH"] = str(root)
        (root / dataset_id).parent.mkdir(parents=True, exist_ok=True)
        os.rename(Path(scratch) / dataset_id, root / dataset_id)
