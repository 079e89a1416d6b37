"""How the cohort's adapters become one, and how that one is cut, module by module.

The exact sum of the clients' products is `sum of w_k B_k A_k`. An aggregator says which factors are
trained on (*active*) and whether the rest of the exact sum is added to the base weights. What is
added to the base weights is called *frozen*: it goes out once and is trained no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from mpifedlora.core.layout import Factors
from mpifedlora.core.lowrank import (
    Svd,
    concatenate,
    energy,
    error_energy,
    factors_of,
    stack_weighted,
    svd_of_matrix,
    svd_of_product,
    svds_of_matrices,
    svds_of_products,
)
from mpifedlora.core.server_optimizer import CutMap, cut_map
from mpifedlora.errors import AggregationError


@dataclass(frozen=True)
class Aggregator:
    """One way to combine adapters.

    Args:
        active: where the next factors come from: the SVD of the exact sum (`svd`), the means of A and
            of B apart (`mean`), or a fresh draw (`restart`).
        folds: whether what the active factors lack of the exact sum is added to the base weights.

    References:
        `product`: FlexLoRA, arXiv 2402.11505. `factors`: FedIT, arXiv 2305.05644.
        `zero-pad`: HetLoRA, arXiv 2401.06432: means of factors that were padded with zero directions.
        `stack`: FLoRA, arXiv 2409.05976. `residual`: FedEx-LoRA, arXiv 2410.09432.
    """

    active: Literal["svd", "mean", "restart"]
    folds: bool = False


AGGREGATORS: dict[str, Aggregator] = {
    "product": Aggregator("svd"),
    "factors": Aggregator("mean"),
    "zero-pad": Aggregator("mean"),
    "stack": Aggregator("restart", folds=True),
    "residual": Aggregator("mean", folds=True),
}


@dataclass(frozen=True)
class ModuleAggregate:
    """One module after a round: new factors, and energies (squared Frobenius norms of b @ a).

    Args:
        active: factors that are trained on; none where they restart.
        frozen: factors that are added to the base weight, lora_rank 0 where nothing is.
        exact_energy: of the exact weighted sum.
        error_energy: of what is sent (active and frozen) minus the exact weighted sum.
        dropped_energy: of the directions that the cut discards.
    """

    active: Factors
    frozen: Factors
    exact_energy: float
    error_energy: float
    dropped_energy: float


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
    """Write the weighted mean of tensors of one shape into `out`, summed in the given order.

    Args:
        values: per client, in client order: the order fixes the bits.
        weights: one a client, summing to 1.
        out: overwritten and returned.

    References:
        FedAvg, arXiv 1602.05629, algorithm 1.
    """
    torch.mul(values[0], weights[0], out=out)
    for value, weight in zip(values[1:], weights[1:], strict=True):
        out.add_(value, alpha=weight)
    return out


def frobenius_weights(clients: Sequence[Sequence[Factors]]) -> list[float]:
    """Weigh each client by the norm of its adapter, sqrt(sum over modules of ||B_k A_k||^2).

    Args:
        clients: per client, the factors of every module.

    Returns:
        Weights of sum 1; equal ones where every norm is 0.

    References:
        HetLoRA, arXiv 2401.06432, sparsity-weighted aggregation, with one weight for the whole adapter.
    """
    norms = [sum(energy(factors) for factors in client) ** 0.5 for client in clients]
    return normalise(norms if sum(norms) > 0 else [1.0] * len(norms))


def residual(clients: Sequence[Factors], weights: Sequence[float], mean: Factors) -> Factors:
    """Return what the product of the means lacks: `sum of w_k B_k A_k - mean(B) mean(A)`, exactly.

    Since the weighted deviations from a mean add up to 0, it is the sum over all clients but the last
    of w_k (B_k - mean(B)) (A_k - A_last): K - 1 clients' directions hold it, not K.

    Args:
        clients: factors of one lora_rank.
        weights: one a client, summing to 1.
        mean: the weighted means of `a` and of `b`.

    Returns:
        Factors of lora_rank (K - 1) * r.

    References:
        FedEx-LoRA, arXiv 2410.09432: the residual that is added to the frozen weights.
    """
    last = clients[-1].a
    parts = [Factors(client.a - last, client.b - mean.b) for client in clients[:-1]]
    if not parts:
        return Factors(mean.a[:0], mean.b[:, :0])
    return stack_weighted(parts, weights[:-1])


class ModuleSum:
    """One module's combined update, before its cut.

    Args:
        clients: the module's factors, per client.
        weights: one a client, summing to 1.
        aggregator: how they are combined.
        mean: the means of `a` and of `b`, where the aggregator or the server's optimiser made them.
        dense: in place of the exact sum, a robust combination of the products, (out, in).
    """

    def __init__(
        self,
        clients: Sequence[Factors],
        weights: Sequence[float],
        aggregator: Aggregator,
        mean: Factors | None = None,
        dense: Tensor | None = None,
    ) -> None:
        self.clients, self.weights, self.aggregator = clients, weights, aggregator
        self.mean, self.dense = mean, dense
        self.exact = stack_weighted(clients, weights)

    @cached_property
    def svd(self) -> Svd:
        """Singular triplets of what is cut."""
        if self.dense is not None:
            return svd_of_matrix(self.dense)
        return svd_of_product(self.product)

    @property
    def product(self) -> Factors:
        """The factors that are cut, where no dense matrix stands in for them."""
        return self.exact if self.mean is None else self.mean

    def needs_svd(self, active_rank: int) -> bool:
        """Tell whether `cut` and `map` at this active rank look at the singular triplets."""
        keeps_mean = self.mean is not None and active_rank == self.mean.lora_rank
        return self.aggregator.active != "restart" and not keeps_mean

    def cut(self, kept_rank: int, active_rank: int) -> ModuleAggregate:
        """Keep the strongest directions (Eckart-Young); one SVD is both sum and cut.

        Args:
            kept_rank: directions that go out, at least active_rank; an aggregator that folds keeps all.
            active_rank: directions that stay trainable.
        """
        if self.aggregator.active == "restart":
            return ModuleAggregate(self._nothing(), self.exact, energy(self.exact), 0.0, 0.0)
        if self.mean is not None and active_rank == self.mean.lora_rank:
            active, beyond, dropped = self.mean, self._nothing(), 0.0
        else:
            kept = None if self.aggregator.folds else kept_rank
            active, beyond = factors_of(self.svd, 0, active_rank), factors_of(self.svd, active_rank, kept)
            dropped = 0.0 if kept is None else float(self.svd.s[kept:].square().sum())
        return self._aggregate(active, beyond, dropped)

    def _aggregate(self, active: Factors, beyond: Factors, dropped: float) -> ModuleAggregate:
        if self.mean is None and self.dense is None:
            exact = float(self.svd.s.square().sum())
            return ModuleAggregate(active, beyond, exact, dropped, dropped)
        frozen = beyond
        if self.aggregator.folds and self.mean is not None:
            frozen = concatenate([beyond, residual(self.clients, self.weights, self.mean)])
        error = error_energy(self.exact, concatenate([active, frozen]))
        return ModuleAggregate(active, frozen, energy(self.exact), error, dropped)

    def map(self, active_rank: int) -> CutMap:
        """Return how `cut` maps the mean factors to the active ones: as they are, unless the rank falls."""
        assert self.mean is not None, "only means keep a basis"
        if active_rank == self.mean.lora_rank:
            same = torch.eye(active_rank)
            return CutMap(same, same)
        return cut_map(self.mean, self.svd, active_rank)

    def _nothing(self) -> Factors:
        return Factors(self.exact.a[:0], self.exact.b[:, :0])


def decompose(sums: Sequence[ModuleSum], active_ranks: Sequence[int], device: str = "cpu") -> None:
    """Find the singular triplets that the cuts of these sums look at, all in one call.

    A sum that has its triplets keeps them. What is not found here is found at its first use, on the CPU.

    Args:
        sums: of the round's modules, or of some of them: on the CPU that changes no bit.
        active_ranks: per sum, the rank of its coming `cut` and `map`; 0 for one that is not known yet.
        device: where to work, as torch names it.
    """
    pairs = zip(sums, active_ranks, strict=True)
    missing = [part for part, active_rank in pairs if part.needs_svd(active_rank) and "svd" not in vars(part)]
    robust = [(part, part.dense) for part in missing if part.dense is not None]
    others = [part for part in missing if part.dense is None]
    for (part, _), svd in zip(robust, svds_of_matrices([dense for _, dense in robust], device), strict=True):
        part.svd = svd
    for part, svd in zip(others, svds_of_products([part.product for part in others], device), strict=True):
        part.svd = svd
