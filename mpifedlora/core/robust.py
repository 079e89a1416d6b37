"""Combining client updates when some of them may be arbitrary: Krum, coordinate-wise median, trimmed mean.

Krum chooses whole clients by their distances, which come from a Gram matrix of the clients. Median and
trimmed mean combine coordinate by coordinate. What a client sends is its product b @ a, so both look at
products: factors are not unique, and their coordinates mean nothing across clients.
Tensors are on the CPU. nan counts as the largest value, so that no client can pull a result to nan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpifedlora.core.layout import Factors
from mpifedlora.core.lowrank import error_energy
from mpifedlora.errors import AggregationError

# Coordinates that are in memory a second time, for each client: a few tens of MB for a cohort.
CHUNK = 2**18

# (values of one shape per client, weights summing to 1, out) -> out
Combiner = Callable[[Sequence[Tensor], Sequence[float], Tensor], Tensor]


def gram_of_products(clients: Sequence[Sequence[Factors]]) -> Tensor:
    """Return the inner products of the clients' adapters, without forming a product b @ a.

    <B_i A_i, B_j A_j> = sum((B_i^T B_j) * (A_i A_j^T)), summed over the modules.

    Args:
        clients: per client, one `Factors` a module in the same order; lora_ranks may differ.

    Returns:
        (num_clients, num_clients), float64.
    """
    gram = torch.zeros(len(clients), len(clients), dtype=torch.float64)
    for factors in zip(*clients, strict=True):
        gram += _gram_of_module(factors)
    return gram


def _gram_of_module(factors: Sequence[Factors]) -> Tensor:
    a = torch.cat([factor.a for factor in factors]).double()
    b = torch.cat([factor.b for factor in factors], dim=1).double()
    by_direction = (b.mT @ b) * (a @ a.mT)
    owners = torch.arange(len(factors)).repeat_interleave(torch.tensor([f.lora_rank for f in factors]))
    # Added, not multiplied with an indicator matrix: 0 * nan would carry one client's nan to all.
    by_client = by_direction.new_zeros(len(factors), len(owners)).index_add_(0, owners, by_direction)
    return by_direction.new_zeros(len(factors), len(factors)).index_add_(1, owners, by_client)


def gram_of_values(values: Sequence[Tensor]) -> Tensor:
    """Return the inner products of flat vectors, chunk by chunk: no whole copy in float64.

    Args:
        values: per client (num_values,), float32.

    Returns:
        (num_clients, num_clients), float64.

    >>> gram_of_values([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])]).tolist()
    [[5.0, 3.0], [3.0, 9.0]]
    """
    gram = torch.zeros(len(values), len(values), dtype=torch.float64)
    for start in range(0, len(values[0]), CHUNK):
        chunk = torch.stack([value[start : start + CHUNK] for value in values]).double()
        gram.addmm_(chunk, chunk.mT)
    return gram


def squared_distances(gram: Tensor) -> Tensor:
    """Return ||x_i - x_j||^2 of all pairs from their inner products.

    Distances far below the norms drown in cancellation (noise of about 1e-16 times the squared norms, more
    for long vectors): before taking the Gram matrix, subtract the model that the clients received. For
    factors write B_i A_i - B A as [B_i - B, B] @ [A_i; A_i - A]: with [B_i, -B] @ [A_i; A] the same
    cancellation only happens inside the Gram matrix.

    Args:
        gram: (num_clients, num_clients), float64.

    Returns:
        (num_clients, num_clients), float64, symmetric to the bit, at least 0, and 0 on the diagonal.

    >>> squared_distances(torch.tensor([[5.0, 3.0], [3.0, 9.0]])).tolist()
    [[0.0, 8.0], [8.0, 0.0]]
    """
    energies = gram.diagonal()
    distances = energies[:, None] + energies - (gram + gram.mT)
    return distances.clamp_min(0).fill_diagonal_(0)


def smallest_cohort(num_byzantine: int) -> int:
    """Return how many clients Krum needs against num_byzantine arbitrary ones.

    >>> smallest_cohort(2)
    7
    """
    return 2 * num_byzantine + 3


def krum(distances: Tensor, num_byzantine: int, num_chosen: int) -> tuple[int, ...]:
    """Choose the clients that lie closest to their nearest neighbours.

    A client's score is the sum of the squared distances to its num_clients - num_byzantine - 2 nearest
    other clients. The smallest scores win, the lower index at ties.

    Args:
        distances: squared, (num_clients, num_clients), 0 on the diagonal.
        num_byzantine: arbitrary clients to stand, at least 0.
        num_chosen: 1 is Krum, more is Multi-Krum.

    Returns:
        indices of the chosen clients, rising.

    Raises:
        AggregationError: if there are too few clients, or num_chosen is not 1 to
            num_clients - num_byzantine.

    References:
        Blanchard et al. 2017, arXiv 1703.02757.

    >>> line = torch.tensor([0.0, 1.0, 2.0, 50.0, 4.0])
    >>> krum((line[:, None] - line).square(), num_byzantine=1, num_chosen=1)
    (1,)
    """
    num_clients = len(distances)
    if num_clients < smallest_cohort(num_byzantine):
        raise AggregationError(
            f"Krum against {num_byzantine} arbitrary clients must have at least "
            f"{smallest_cohort(num_byzantine)} updates (2 f + 3), got {num_clients}; "
            "take a larger cohort or stand fewer"
        )
    if not 1 <= num_chosen <= num_clients - num_byzantine:
        raise AggregationError(
            f"Krum must choose 1 to {num_clients - num_byzantine} of {num_clients} updates, "
            f"{num_byzantine} of them arbitrary, got {num_chosen}; choose fewer, at least one"
        )
    # Column 0 is the client itself, or one that equals it: 0 either way.
    nearest = distances.sort(dim=1).values[:, 1 : num_clients - num_byzantine - 1]
    order = nearest.sum(dim=1).argsort(stable=True)
    return tuple(sorted(order[:num_chosen].tolist()))


def coordinate_median(values: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> Tensor:
    """Write the median of each coordinate into `out`: of an even number, the mean of the middle two.

    Args:
        values: per client, of one shape, float32.
        weights: not used: an arbitrary client would report an arbitrary one.
        out: contiguous, of the shape of one value, overwritten and returned.

    References:
        Yin et al. 2018, arXiv 1803.01498, definition 1.

    >>> values = [torch.tensor([1.0, 5.0]), torch.tensor([2.0, -9.0]), torch.tensor([99.0, 4.0])]
    >>> coordinate_median(values, [0.1, 0.1, 0.8], torch.empty(2)).tolist()
    [2.0, 4.0]
    """
    return _mean_of_middle(values, (len(values) - 1) // 2, out)


def trimmed_mean(num_trimmed: int) -> Combiner:
    """Return the combiner that leaves out the extremes of each coordinate, then takes the plain mean.

    Args:
        num_trimmed: values to leave out at each end, at least 0. The combiner raises AggregationError
            unless there are more than 2 * num_trimmed clients; it does not use the weights.

    References:
        Yin et al. 2018, arXiv 1803.01498, definition 2, with beta = num_trimmed / num_clients.

    >>> trimmed_mean(1)([torch.tensor([value]) for value in (1.0, 3.0, 2.0, 99.0)], [], torch.empty(1))
    tensor([2.5000])
    """

    def combine(values: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> Tensor:
        if len(values) <= 2 * num_trimmed:
            raise AggregationError(
                f"a trimmed mean without the {num_trimmed} smallest and {num_trimmed} largest values must "
                f"have more than {2 * num_trimmed} updates, got {len(values)}; take a larger cohort or "
                "trim fewer"
            )
        return _mean_of_middle(values, num_trimmed, out)

    return combine


def _mean_of_middle(values: Sequence[Tensor], num_trimmed: int, out: Tensor) -> Tensor:
    flat, flat_out = [value.reshape(-1) for value in values], out.view(-1)
    for start in range(0, len(flat_out), CHUNK):
        chunk = torch.stack([value[start : start + CHUNK] for value in flat])
        # numpy sorts in place and several times as fast as torch, which makes int64 indices too.
        chunk.numpy().sort(axis=0)
        # Summed in float64, equal float32 values have that value as their mean, to the bit.
        middle = chunk[num_trimmed : len(flat) - num_trimmed].mean(dim=0, dtype=torch.float64)
        flat_out[start : start + CHUNK] = middle
    return out


def combine_products(clients: Sequence[Factors], weights: Sequence[float], combiner: Combiner) -> Tensor:
    """Combine the clients' products b @ a of one module, a block of rows at a time.

    Args:
        clients: per client, of one lora_rank or several.
        weights: one a client, summing to 1.
        combiner: what makes one matrix of the clients' matrices.

    Returns:
        (out_features, in_features), of the factors' dtype: in general of full rank.
    """
    out_features, in_features = clients[0].b.shape[0], clients[0].a.shape[1]
    combined = clients[0].b.new_empty(out_features, in_features)
    num_rows = max(1, CHUNK // in_features)
    for start in range(0, out_features, num_rows):
        rows = slice(start, start + num_rows)
        combiner([client.b[rows] @ client.a for client in clients], weights, combined[rows])
    return combined


def update_norm(
    client: Sequence[Factors], reference: Sequence[Factors], head: Tensor, reference_head: Tensor
) -> float:
    """Return the Frobenius norm of what a client changed: products b @ a of all modules, and the head.

    Args:
        client: what the client sent, one `Factors` a module.
        reference: what it received, in the same order; lora_ranks may differ.
        head: values sent beside the factors, of any shape.
        reference_head: the values received, of the same shape.
    """
    products = sum(error_energy(sent, got) for sent, got in zip(client, reference, strict=True))
    changed = torch.linalg.vector_norm(head - reference_head, dtype=torch.float64)
    return math.hypot(math.sqrt(products), float(changed))
