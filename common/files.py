"""Files that outlive crashes: written whole or not at all, loaded without running what they hold."""

import contextlib
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from common.datasets import check, one_line

try:
    import fcntl
except ImportError:  # Windows has none: there, nothing stops a second process
    fcntl = None  # type: ignore[assignment]


class CannotWrite(RuntimeError):
    """The disk is full, the quota used up or the folder read-only. The message is one line."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what goes wrong while `path` is written into CannotWrite."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save raises the latter, on its way from the former
        reason = next((e.strerror for e in (error, error.__context__) if isinstance(e, OSError)), one_line(error))
        advice = f"make room, and go on with --resume --run-dir {path.parent}; what was saved before is kept"
        raise CannotWrite(f"cannot write {path} ({reason}): {advice}") from None


def replace(path: Path, write: Callable[[Path], object], keep_as: str | None = None) -> None:
    """Lets `write` fill a file beside `path` and, once the disk has it, renames it over `path`; raises CannotWrite.

    With `keep_as`, the old file stays in the folder under that name.
    """
    scratch, old = path.with_name(f".{path.name}"), path.with_name(f".old-{path.name}")
    with writing(path):
        try:
            write(scratch)
            sync(scratch)
            if keep_as and path.exists():
                old.unlink(missing_ok=True)
                try:
                    os.link(path, old)  # so that `path` is there at any time
                except OSError:  # some file systems have no links
                    shutil.copyfile(path, old)
                os.replace(old, path.with_name(keep_as))
            os.replace(scratch, path)
            sync(path.parent)
        except BaseException:
            for rest in (scratch, old):
                with contextlib.suppress(OSError):
                    rest.unlink(missing_ok=True)
            raise


def save(content: dict[str, Any], path: Path) -> None:
    """torch.save, through a file of Python's: given a path, it hides why it cannot write."""
    with path.open("wb") as file:
        torch.save(content, file)


def sync(path: Path) -> None:
    """Waits until the disk has a file's content, or which files a folder holds."""
    if path.is_dir() and os.name == "nt":  # Windows does not open folders
        return
    file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What torch.save wrote, with tensors on `device`. Nothing in it is run.

    Raises BadInput or one of many other exceptions for a file that is cut, has a wrong bit, or holds more than data.
    """
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()  # torch.load does not look at the checksums
    check(damaged is None, f"its part {damaged} is damaged")
    return torch.load(path, map_location=device, weights_only=True)


def lock(directory: Path) -> Callable[[], None] | None:
    """Takes the folder for this process, until its death or a call of what is returned; None if another has it."""
    if fcntl is None:
        return lambda: None
    file = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except OSError:  # a file system that knows no locks
        pass
    return lambda: os.close(file)
