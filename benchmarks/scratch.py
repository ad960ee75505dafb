"""Where the tools write: aside first, so that nobody ever finds half of a file or of a dataset."""

import contextlib
import csv
import io
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from filelock import FileLock
from minari.data_collector import EpisodeBuffer
from minari.storage.datasets_root_dir import get_dataset_path
from torch.utils._pytree import tree_leaves


class CannotWrite(OSError):
    """The disk is full, the quota used up or the folder read-only. The message is one line. Exit code 1."""


def replace(path: Path, content: bytes | Callable[[IO[bytes]], object]) -> None:
    """Writes bytes, or what a function writes to a file, which is then renamed to `path`: whole or not at all. Raises
    CannotWrite.
    """
    scratch = path.with_name(f".{path.name}")
    try:
        try:
            with scratch.open("wb") as file:
                file.write(content) if isinstance(content, bytes) else content(file)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise CannotWrite(
            f"cannot write {path} ({error.strerror or error}): make room, or name another place"
        ) from None


def replace_table(path: Path, rows: list[tuple]) -> None:
    """Likewise of a CSV file, whose first row are the columns' names."""
    csv.writer(text := io.StringIO(), lineterminator="\n").writerows(rows)
    replace(path, text.getvalue().encode())


@contextlib.contextmanager
def scratch_folder(root: Path) -> Iterator[Path]:
    """A folder in `root` that is gone at the end, as are now those of commands that were killed: their locks are free.
    Raises OSError.
    """
    for left in root.glob(".making-*"):
        with contextlib.suppress(OSError), FileLock(left / ".lock", timeout=0):
            shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as scratch, FileLock(Path(scratch, ".lock")):
        yield Path(scratch)


@contextlib.contextmanager
def scratch_root(dataset_id: str, episodes: list[EpisodeBuffer]) -> Iterator[None]:
    """Minari writes a dataset of the episodes to a folder aside. It is renamed into place at the end: it is there as a
    whole or not at all. Raises CannotWrite if the datasets folder cannot be written, or if the dataset has come to
    exist meanwhile.
    """
    try:
        root = get_dataset_path().resolve()
        with scratch_folder(root) as scratch:
            check_room(scratch, dataset_id, episodes)
            os.environ["MINARI_DATASETS_PATH"] = str(scratch)  # Minari's only way to say where
            try:
                with warnings.catch_warnings(action="ignore"):
                    yield
            finally:
                os.environ["MINARI_DATASETS_PATH"] = str(root)
            (root / dataset_id).parent.mkdir(parents=True, exist_ok=True)
            os.rename(scratch / dataset_id, root / dataset_id)
    except CannotWrite:
        raise
    except OSError as error:
        advice = "point MINARI_DATASETS_PATH to a folder that can be written"
        raise CannotWrite(f"cannot write {dataset_id} to the datasets folder ({error}): {advice}") from None


def check_room(folder: Path, dataset_id: str, episodes: list[EpisodeBuffer]) -> None:
    """Raises CannotWrite unless the disk takes a dataset of the episodes: where one fills up, HDF5 crashes."""
    size = 2**15 * (len(episodes) + 1)  # what HDF5 adds
    for episode in episodes:
        columns = tree_leaves([episode.observations, episode.actions, episode.rewards, episode.infos or {}])
        size += 2 * sum(np.asarray(column).nbytes for column in columns)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):  # which macOS lacks
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        where = f"the {size / 2**20:.1f} MiB of {dataset_id} in {folder.parent} ({error.strerror})"
        raise CannotWrite(f"no room for {where}: make some, or take a larger disk") from None
