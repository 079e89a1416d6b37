"""Which examples make a batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]

# Batches that are sorted by length together. More would pad little less, and leave less to chance.
WINDOW = 50


def batch_indices(
    num_examples: int,
    batch_size: int,
    local_steps: int | None,
    local_epochs: int | None,
    generator: np.random.Generator,
    lengths: Indices | None = None,
) -> Iterator[Indices]:
    """Draw the batches of one client in one round, without repetition within a pass.

    A client with fewer examples than a batch gives all of them in each step. With lengths, examples of
    similar length share a batch; a last batch that is not full is drawn from all lengths.

    Args:
        num_examples: of the client, at least 1.
        batch_size: examples a step; the last batch of a pass may hold fewer.
        local_steps: steps to take, over as many passes as that needs; or None.
        local_epochs: passes to make where local_steps is None; 1 if both are None.
        generator: of the client and round.
        lengths: tokens of each example (num_examples,), or None for batches drawn at random.
    """
    per_pass = -(-num_examples // batch_size)
    order = np.zeros(0, np.int64)
    num_steps = local_steps if local_steps is not None else per_pass * (local_epochs or 1)
    for step in range(num_steps):
        place = step % per_pass
        if place == 0:
            order = generator.permutation(num_examples)
            if lengths is not None:
                _group_by_length(order, lengths, batch_size, generator)
        yield order[place * batch_size : (place + 1) * batch_size]


def _group_by_length(
    order: Indices, lengths: Indices, batch_size: int, generator: np.random.Generator
) -> None:
    """Sort a drawn order by length within windows, and shuffle the full batches that this gives."""
    full = order[: len(order) // batch_size * batch_size]
    for start in range(0, len(full), WINDOW * batch_size):
        window = full[start : start + WINDOW * batch_size]
        # Stable: what is equally long stays in the order that was drawn.
        window[:] = window[np.argsort(lengths[window], kind="stable")]
    generator.shuffle(full.reshape(-1, batch_size))


def steps_of(num_examples: int, batch_size: int, local_steps: int | None, local_epochs: int | None) -> int:
    """Return the steps that a client takes in one round."""
    if local_steps is not None:
        return local_steps
    return -(-num_examples // batch_size) * (local_epochs or 1)


def length_batches(lengths: Indices, batch_size: int) -> list[Indices]:
    """Cut examples into batches of similar length, so that little is padded.

    Args:
        lengths: tokens of each example (num_examples,).
        batch_size: examples a batch; the last holds the rest.

    >>> [batch.tolist() for batch in length_batches(np.array([5, 2, 9]), 2)]
    [[1, 0], [2]]
    """
    order = np.argsort(lengths, kind="stable")
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
