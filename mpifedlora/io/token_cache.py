"""Tokens of texts, made once and kept as memory-mapped files in the cache folder.

A file is an .npy array of int32: a CRC-32 of its name and of what follows, the number of tokens of each
text, and all tokens. Its name is a digest of everything that the tokens depend on, so it is never out of
date. Processes that share the folder share the file, and on one node its pages.
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
Tokens = tuple[Int32, npt.NDArray[np.int64]]


def cached_tokens(texts: Sequence[str], settings: str, tokenize: Callable[[Sequence[str]], Tokens]) -> Tokens:
    """Return the tokens of texts, from the cache folder if they have been made before.

    A file that is damaged is made again. Where the folder cannot be written, the tokens stay in memory.

    Args:
        texts: in their order.
        settings: all else that the tokens depend on, as text.
        tokenize: makes the tokens; called at most once.

    Returns:
        All tokens (total tokens,) int32, read-only where they lie in a file, and the number of each
        text's (num_texts,) int64.
    """
    path = _path(texts, settings)
    if path is None:
        return tokenize(texts)
    found = _read(path, len(texts))
    if found is None:
        made = tokenize(texts)
        found = _written(path, made) or made
    return found


def _path(texts: Sequence[str], settings: str) -> Path | None:
    """Name the file; None where there is nothing to keep, or no folder for it."""
    if not len(texts):
        return None
    try:
        folder = cache_folder() / "tokens"
    except RuntimeError:  # a user without a home folder
        return None
    parts = [settings.encode(), *(text.encode() for text in texts)]
    # Lengths first, so that no two lists of texts spell the same bytes.
    digest = hashlib.sha256(np.array([len(part) for part in parts], "<i8").tobytes())
    for part in parts:
        digest.update(part)
    return folder / f"{digest.hexdigest()[:40]}.npy"


def _written(path: Path, made: Tokens) -> Tokens | None:
    """Write tokens unless another process has, and return them as they lie in the file."""
    tokens, lengths = made
    # A file that others have mapped is not replaced: on some network file systems that pulls it from
    # under them.
    if (found := _read(path, len(lengths))) is None:
        body = np.concatenate([lengths.astype("<i4"), tokens.astype("<i4")])
        content = io.BytesIO()
        np.save(content, np.concatenate([_checksum(path, body), body]))
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, content.getvalue())
            found = _read(path, len(lengths))
    return found


def _read(path: Path, num_texts: int) -> Tokens | None:
    """Map a file; None if it is missing or not as it was written."""
    try:
        values = np.asarray(np.lib.format.open_memmap(path, mode="r"))
    except (OSError, ValueError, TokenError):  # the last from a header that is no Python literal
        return None
    if values.dtype != np.dtype("<i4") or values.ndim != 1 or not len(values):
        return None
    if values[0] != _checksum(path, values[1:]):
        return None
    lengths = values[1 : 1 + num_texts].astype(np.int64)
    return values[1 + num_texts :], lengths


def _checksum(path: Path, body: Int32) -> Int32:
    # The name goes in, so that no file passes for another. It is one pass over the file: a small part of
    # what the digest of its texts has taken.
    return np.array([zlib.crc32(body.data, zlib.crc32(path.name.encode()))], "<u4").view("<i4")
