"""Arrays that are dear to make, made once and kept as memory-mapped files in the cache folder.

A file is an .npy array of int32: a CRC-32 of its name and of what follows, then the values. Its name is a
digest of everything that the values depend on, so it is never out of date. Processes that share the folder
share the file, and on one node its pages.
"""

from __future__ import annotations

import hashlib
import io
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from tokenize import TokenError

import numpy as np
import numpy.typing as npt

from mpifedlora.io.atomic import replace_file
from mpifedlora.io.data_fetch import cache_folder

Int32 = npt.NDArray[np.int32]


def cached_values(kind: str, sources: Sequence[bytes], make: Callable[[], Int32]) -> Int32:
    """Return values from the cache folder, if they have been made before.

    A file that is damaged is made again. Where the folder cannot be written, the values stay in memory.

    Args:
        kind: of the values, the name of their subfolder.
        sources: all that they depend on.
        make: makes them (num_values,); called at most once.

    Returns:
        The values (num_values,), read-only where they lie in a file.
    """
    path = _path(kind, sources)
    if path is None:
        return make()
    found = _read(path)
    if found is None:
        made = make()
        found = _written(path, made)
        found = made if found is None else found
    return found


def _path(kind: str, sources: Sequence[bytes]) -> Path | None:
    try:
        folder = cache_folder() / kind
    except RuntimeError:  # a user without a home folder
        return None
    # Lengths first, so that no two lists spell the same bytes.
    digest = hashlib.sha256(np.array([len(source) for source in sources], "<i8").tobytes())
    for source in sources:
        digest.update(source)
    return folder / f"{digest.hexdigest()[:40]}.npy"


def _written(path: Path, made: Int32) -> Int32 | None:
    """Write values unless another process has, and return them as they lie in the file."""
    # A file that others have mapped is not replaced: on some network file systems that pulls it from
    # under them.
    if (found := _read(path)) is None:
        body = made.astype("<i4", copy=False)
        content = io.BytesIO()
        np.save(content, np.concatenate([_checksum(path, body), body]))
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content.getvalue())
            found = _read(path)
    return found


def _read(path: Path) -> Int32 | None:
    """Map a file; None if it is missing or not as it was written."""
    try:
        values = np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except (OSError, ValueError, TokenError):  # the last from a header that is no Python literal
        return None
    if values.dtype != np.dtype("<i4") or values.ndim != 1 or not len(values):
        return None
    if values[0] != _checksum(path, values[1:]):
        return None
    return values[1:]


def _checksum(path: Path, body: Int32) -> Int32:
    # The name goes in, so that no file passes for another. It is one pass over the file: a small part of
    # what the digest of its sources has taken.
    return np.array([zlib.crc32(body.data, zlib.crc32(path.name.encode()))], "<u4").view("<i4")
