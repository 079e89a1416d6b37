"""Which examples belong to which client, and which are held out.

A kind of partition is a function that names the client of every example, so that a disjoint cover
holds by construction. A new kind is one more function in `_KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mpifedlora.core.seeding import numpy_generator
from mpifedlora.errors import ConfigError, DataError

IntArray = npt.NDArray[np.int64]


class _Request(NamedTuple):
    labels: IntArray
    num_clients: int
    generator: np.random.Generator
    alpha: float
    shards_per_client: int
    owners: IntArray | None


def partition(
    kind: str,
    labels: IntArray,
    num_clients: int,
    seed: int,
    *,
    alpha: float = 0.5,
    shards_per_client: int = 2,
    owners: IntArray | None = None,
) -> list[IntArray]:
    """Share out examples among clients.

    Args:
        kind: `iid` (sizes differ by at most 1), `dirichlet` (each label is shared out by proportions
            drawn from Dir(alpha)), `quantity` (all examples are, whatever their labels: the sizes
            differ), `shards` (label-sorted shards of equal size) or `column` (by owner).
        labels: Label number of every example, shape (num_examples,).
        num_clients: Number of clients, at most num_examples.
        seed: The run's seed; `column` does not draw.
        alpha: Concentration of `dirichlet` and `quantity`, above 0. Small values leave some clients
            with few examples, or none.
        shards_per_client: Number of shards a client gets under `shards`.
        owners: Owner number of every example under `column`, shape (num_examples,). More owners than
            clients are dealt out in sorted order, round robin.

    Returns:
        One sorted index array per client: together a disjoint cover of range(num_examples).

    Raises:
        ConfigError: The kind is unknown, or alpha or a count is not positive.
        DataError: There are too few examples or owners for the clients, or no owner numbers.

    References:
        Hsu et al. 2019, arXiv 1909.06335, introduce the Dirichlet partition, with a draw per client;
        the draw per label, which uses every example once, is the form of Yurochkin et al. 2019,
        arXiv 1905.12022. Quantity skew, one draw of all sizes: Li et al. 2022, arXiv 2102.02079.
        Shards: McMahan et al. 2017, arXiv 1602.05629, section 3.

    >>> [part.tolist() for part in partition("column", np.zeros(4, int), 2, 0, owners=np.array([7, 3, 3, 7]))]
    [[1, 2], [0, 3]]
    """
    if kind not in _KINDS:
        raise ConfigError(f"partition must be one of {', '.join(_KINDS)}, got {kind!r}; choose one of them")
    generator = numpy_generator(seed, "partition")
    request = _Request(labels, num_clients, generator, alpha, shards_per_client, owners)
    _check(request)
    return _group(_KINDS[kind](request), num_clients)


def split_stratified(labels: IntArray, fraction: float, seed: int, purpose: str) -> tuple[IntArray, IntArray]:
    """Hold out a share of the examples, each label in proportion.

    About `fraction * num_examples` examples are held out: per label its share rounded down, then one
    more where the remainders are largest. No label loses its last example, so fewer may be held out.

    Args:
        labels: Label number of every example, shape (num_examples,).
        fraction: Share to hold out, in [0, 1).
        seed: The run's seed.
        purpose: Names the random stream, so that two splits of one run are independent.

    Returns:
        The sorted indices of the rest and of the held-out examples.

    Raises:
        ConfigError: The fraction is outside [0, 1).

    >>> rest, held_out = split_stratified(np.array([0, 0, 0, 0, 1, 1, 1, 1]), 0.25, 0, "test-split")
    >>> len(rest), len(held_out)
    (6, 2)
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"the share to hold out must be in [0, 1), got {fraction}; choose such a share")
    generator = numpy_generator(seed, purpose)
    members = [generator.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    counts = _held_out_counts(np.array([len(m) for m in members], dtype=np.int64), fraction)
    is_held_out = np.zeros(len(labels), dtype=bool)
    for indices, count in zip(members, counts, strict=True):
        is_held_out[indices[:count]] = True
    return _indices(~is_held_out), _indices(is_held_out)


def split_by_owner(drawn: IntArray, sizes: Sequence[int]) -> list[IntArray]:
    """Give examples that were drawn of all clients' together back to their clients.

    Args:
        drawn: sorted indices into the clients' examples, one client's behind the other's.
        sizes: examples of each client.

    Returns:
        One sorted array per client, of indices into its own examples.

    >>> [part.tolist() for part in split_by_owner(np.array([0, 2, 3, 6]), [3, 0, 4])]
    [[0, 2], [], [0, 3]]
    """
    ends = np.cumsum(sizes)
    parts = np.split(drawn, np.searchsorted(drawn, ends[:-1]))
    return [part - (end - size) for part, end, size in zip(parts, ends, sizes, strict=True)]


def share_alike(table: IntArray, labels: IntArray, seed: int, purpose: str) -> list[IntArray]:
    """Share out other examples such that each client's labels are mixed as in its training part.

    The examples of a label are split among the clients in proportion to their training examples of
    it, by largest remainder (ties to the lower client_id); evenly, where no client has any.

    Args:
        table: Training examples by client and label, shape (num_clients, num_labels), as `label_table`
            returns them.
        labels: Label number of every example to share out, in [0, num_labels), shape (num_examples,).
        seed: The run's seed.
        purpose: Names the random stream that picks which examples of a label a client gets.

    Returns:
        One sorted index array per client: together a disjoint cover of range(num_examples).

    >>> parts = share_alike(np.array([[3, 0], [1, 0]]), np.array([0, 0, 0, 0, 1, 1]), 0, "client-test")
    >>> label_table(parts, np.array([0, 0, 0, 0, 1, 1]), 2).tolist()
    [[3, 1], [1, 1]]
    """
    generator = numpy_generator(seed, purpose)
    client_of = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        counts = _proportional_counts(table[:, label], len(members))
        client_of[members] = np.repeat(np.arange(len(table)), counts)
    return _group(client_of, len(table))


def label_table(parts: Sequence[IntArray], labels: IntArray, num_labels: int) -> IntArray:
    """Count the labels of every client.

    Args:
        parts: Index arrays, one per client, as `partition` returns them.
        labels: Label number of every example, shape (num_examples,).
        num_labels: Number of labels of the whole dataset.

    Returns:
        Counts of shape (num_clients, num_labels).

    >>> label_table([np.array([0, 2]), np.array([1])], np.array([1, 0, 1]), 3).tolist()
    [[0, 2, 0], [1, 0, 0]]
    """
    table = np.zeros((len(parts), num_labels), dtype=np.int64)
    for client_id, indices in enumerate(parts):
        table[client_id] = np.bincount(labels[indices], minlength=num_labels)
    return table


def _iid(request: _Request) -> IntArray:
    num_examples = len(request.labels)
    client_of = np.empty(num_examples, dtype=np.int64)
    client_of[request.generator.permutation(num_examples)] = np.arange(num_examples) % request.num_clients
    return client_of


def _dirichlet(request: _Request) -> IntArray:
    # numpy's sum of gammas overflows beyond 1e308; far below that the shares are equal to the last bit.
    concentration = np.full(request.num_clients, min(request.alpha, 1e100))
    client_of = np.empty(len(request.labels), dtype=np.int64)
    for label in np.unique(request.labels):
        members = request.generator.permutation(np.flatnonzero(request.labels == label))
        ends = np.rint(np.cumsum(request.generator.dirichlet(concentration)) * len(members))
        client_of[members] = np.searchsorted(ends[:-1], np.arange(len(members)), side="right")
    return client_of


def _quantity(request: _Request) -> IntArray:
    # With one label for all examples, what is drawn is the sizes, and labels fall at random.
    return _dirichlet(request._replace(labels=np.zeros_like(request.labels)))


def _shards(request: _Request) -> IntArray:
    num_examples, num_shards = len(request.labels), request.num_clients * request.shards_per_client
    if num_shards > num_examples:
        raise DataError(
            f"num_clients * shards_per_client must be at most the {num_examples} training examples, got "
            f"{request.num_clients} * {request.shards_per_client}; lower one of them"
        )
    # Shuffled before the stable sort, so that the order of the file within a label plays no part.
    order = request.generator.permutation(num_examples)
    order = order[np.argsort(request.labels[order], kind="stable")]
    client_of_shard = request.generator.permutation(num_shards) // request.shards_per_client
    client_of = np.empty(num_examples, dtype=np.int64)
    for client_id, members in zip(client_of_shard, np.array_split(order, num_shards), strict=True):
        client_of[members] = client_id
    return client_of


def _column(request: _Request) -> IntArray:
    if request.owners is None:
        raise DataError(
            'partition = "column" needs an owner per example, got none; set data.partition_column'
        )
    if len(request.owners) != len(request.labels):
        raise DataError(
            f"there must be one owner per example, got {len(request.owners)} owners of {len(request.labels)} "
            "examples; pass the owners of the same examples"
        )
    distinct, position = np.unique(request.owners, return_inverse=True)
    if len(distinct) < request.num_clients:
        raise DataError(
            f"num_clients must be at most the {len(distinct)} distinct owners in the partition column, got "
            f"{request.num_clients}; lower federation.num_clients"
        )
    return np.asarray(position % request.num_clients, dtype=np.int64)


_KINDS: dict[str, Callable[[_Request], IntArray]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "quantity": _quantity,
    "shards": _shards,
    "column": _column,
}


def _check(request: _Request) -> None:
    for name in ("num_clients", "shards_per_client", "alpha"):
        value = getattr(request, name)
        if not value > 0:
            raise ConfigError(f"{name} must be above 0, got {value}; raise it")
    if request.num_clients > len(request.labels):
        raise DataError(
            f"num_clients must be at most the number of training examples, got {request.num_clients} clients "
            f"and {len(request.labels)} examples; lower federation.num_clients or use more data"
        )


def _group(client_of: IntArray, num_clients: int) -> list[IntArray]:
    """Turn the client of every example into one sorted index array per client."""
    order = np.argsort(client_of, kind="stable").astype(np.int64)
    ends = np.cumsum(np.bincount(client_of, minlength=num_clients))
    parts: list[IntArray] = np.split(order, ends[:-1])
    return parts


def _held_out_counts(sizes: IntArray, fraction: float) -> IntArray:
    counts: IntArray = np.floor(sizes * fraction).astype(np.int64)
    missing = int(np.rint(sizes.sum() * fraction)) - int(counts.sum())
    by_remainder = np.argsort(counts - sizes * fraction, kind="stable")
    takers = by_remainder[counts[by_remainder] + 1 < sizes[by_remainder]][:missing]
    counts[takers] += 1
    return counts


def _proportional_counts(weights: IntArray, num_examples: int) -> IntArray:
    if not weights.any():
        weights = np.ones_like(weights)
    counts, remainders = np.divmod(weights * num_examples, weights.sum())
    takers = np.argsort(-remainders, kind="stable")[: num_examples - counts.sum()]
    counts[takers] += 1
    return counts


def _indices(is_chosen: npt.NDArray[np.bool_]) -> IntArray:
    indices: IntArray = np.flatnonzero(is_chosen).astype(np.int64)
    return indices
