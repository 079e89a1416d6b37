"""Aggregators as values: how the cohort's adapters become one, and how that one is cut.

An aggregator works on one module at a time. It returns the directions that stay trainable
(*active*) and those that go out once more and stay fixed (*frozen*, empty under `drop`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpifedlora.core.layout import Factors
from mpifedlora.core.lowrank import (
    Svd,
    energy,
    error_energy,
    factors_of,
    stack_weighted,
    svd_of_product,
)
from mpifedlora.errors import AggregationError


@dataclass(frozen=True)
class ModuleAggregate:
    """One module after a round: new factors, and energies (squared Frobenius norms of b @ a).

    Args:
        active: factors that are trained on, lora_rank b(t+1).
        frozen: factors that stay fixed from now on, lora_rank 0 under `drop`.
        exact_energy: of the exact weighted sum.
        error_energy: of what is sent (active and frozen) minus the exact weighted sum.
        dropped_energy: of the directions that the cut discards.
    """

    active: Factors
    frozen: Factors
    exact_energy: float
    error_energy: float
    dropped_energy: float


Aggregator = Callable[[Sequence[Factors], Sequence[float], int, int], ModuleAggregate]


def normalise(weights: Sequence[float]) -> list[float]:
    """Scale weights to sum 1.

    Raises:
        AggregationError: if there is none, or their sum is not positive and finite.
    """
    total = float(sum(weights))
    if not 0 < total < float("inf"):
        raise AggregationError(
            f"the clients' weights must have a positive finite sum, got {list(weights)}; "
            "leave out clients without examples"
        )
    return [float(weight) / total for weight in weights]


def weighted_mean(values: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> Tensor:
    """Write the weighted mean of flat tensors into `out`, summed in the given order.

    Args:
        values: per client (num_values,), in client order: the order fixes the bits.
        weights: one a client, summing to 1.
        out: (num_values,), overwritten and returned.

    References:
        FedAvg, arXiv 1602.05629, algorithm 1.
    """
    torch.mul(values[0], weights[0], out=out)
    for value, weight in zip(values[1:], weights[1:], strict=True):
        out.add_(value, alpha=weight)
    return out


def _cut(svd: Svd, kept_rank: int, active_rank: int) -> tuple[Factors, Factors]:
    return factors_of(svd, 0, active_rank), factors_of(svd, active_rank, kept_rank)


def product(
    factors: Sequence[Factors], weights: Sequence[float], kept_rank: int, active_rank: int
) -> ModuleAggregate:
    """Sum w_k B_k A_k exactly, then keep the best approximation of rank kept_rank (Eckart-Young).

    One SVD does the aggregation and the annealed cut.

    Args:
        factors: per client, of one lora_rank or several.
        weights: one a client, summing to 1.
        kept_rank: rank of what goes out, at least active_rank.
        active_rank: rank of what is trained on.

    References:
        FlexLoRA, arXiv 2402.11505, section 3 (sum of products, then SVD); here without ever
        forming the (out, in) matrix.
    """
    svd = svd_of_product(stack_weighted(factors, weights))
    active, frozen = _cut(svd, kept_rank, active_rank)
    squares = svd.s.square()
    dropped = float(squares[kept_rank:].sum())
    return ModuleAggregate(active, frozen, float(squares.sum()), dropped, dropped)


def factors(
    factors: Sequence[Factors], weights: Sequence[float], kept_rank: int, active_rank: int
) -> ModuleAggregate:
    """Average A and B apart: FedAvg on the adapter, biased since mean(B) mean(A) is not mean(B A).

    Where the rank is cut, the product of the means is refactored, so that the strongest directions
    are kept. Arguments as `product`.

    References:
        FedIT, arXiv 2305.05644; the bias: FLoRA, arXiv 2409.05976, equation 2.
    """
    exact = stack_weighted(factors, weights)
    mean = Factors(
        weighted_mean([factor.a for factor in factors], weights, torch.empty_like(factors[0].a)),
        weighted_mean([factor.b for factor in factors], weights, torch.empty_like(factors[0].b)),
    )
    if active_rank == mean.lora_rank:
        nothing = Factors(mean.a[:0], mean.b[:, :0])
        return ModuleAggregate(mean, nothing, energy(exact), error_energy(exact, mean), 0.0)
    svd = svd_of_product(mean)
    active, frozen = _cut(svd, kept_rank, active_rank)
    error = error_energy(exact, factors_of(svd, 0, kept_rank))
    dropped = float(svd.s[kept_rank:].square().sum())
    return ModuleAggregate(active, frozen, energy(exact), error, dropped)


AGGREGATORS: dict[str, Aggregator] = {"product": product, "factors": factors}
