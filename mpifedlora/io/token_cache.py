"""Tokens of texts, made once and kept in the cache folder: the number of each text's, then all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mpifedlora.io.array_cache import Int32, cached_values

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

    def make() -> Int32:
        tokens, lengths = tokenize(texts)
        return np.concatenate([lengths.astype(np.int32), tokens])

    if not len(texts):
        return tokenize(texts)
    values = cached_values("tokens", [settings.encode(), *(text.encode() for text in texts)], make)
    return values[len(texts) :], values[: len(texts)].astype(np.int64)
