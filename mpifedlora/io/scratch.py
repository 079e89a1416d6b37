"""Folders for a while, and what a folder is good for."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_MOUNTS = Path("/proc/self/mounts")


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give an empty folder of the system's, which is removed behind this block with all that is in it."""
    with tempfile.TemporaryDirectory(prefix="mpifedlora-") as folder:
        yield Path(folder)


def scratch_place() -> Path:
    """Return the folder that the system makes such folders in: TMPDIR, or /tmp."""
    return Path(tempfile.gettempdir())


class Room(NamedTuple):
    """What a folder is good for.

    Args:
        folder: that was tried: the nearest one that exists.
        problem: why it cannot be written, or an empty text.
        has_locks: whether locks on its files work, as those that keep two jobs from one folder.
        free_bytes: on its file system.
        kind: of its file system, such as `ext4` or `nfs4`; `?` where the system does not tell.
    """

    folder: Path
    problem: str
    has_locks: bool
    free_bytes: int
    kind: str


def try_folder(folder: Path) -> Room:
    """Write a file where a folder is or would be, lock it, and remove it."""
    nearest = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    problem, has_locks = "", False
    try:
        with tempfile.NamedTemporaryFile(dir=nearest, prefix=".mpifedlora-") as file:
            file.write(b"x")
            file.flush()
            has_locks = _locks(file.fileno())
    except OSError as error:
        problem = error.strerror or str(error)
    return Room(nearest, problem, has_locks, shutil.disk_usage(nearest).free, _kind_of(nearest))


def _locks(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _kind_of(folder: Path) -> str:
    try:
        lines = [line.split() for line in _MOUNTS.read_text().splitlines()]
    except OSError:
        return "?"
    path = os.path.realpath(folder)
    holding = [(len(place), kind) for _, place, kind, *_ in lines if _is_below(path, place)]
    return max(holding, default=(0, "?"))[1]


def _is_below(path: str, place: str) -> bool:
    return path == place or path.startswith(place.rstrip("/") + "/")
