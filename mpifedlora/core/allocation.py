"""How one round's rank budget is shared among the modules.

A budget b counts values: the sum over modules of lora_rank * (in + out) is at most
b * sum of (in + out), so that bytes fall with the budget whatever the allocation.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mpifedlora.core.layout import LinearShape
from mpifedlora.errors import AggregationError


def uniform(budget: int, modules: Sequence[LinearShape]) -> tuple[int, ...]:
    """Give every module the budget as its LoRA rank, at most min(in_features, out_features).

    >>> uniform(4, [LinearShape("q", 8, 8), LinearShape("head", 2, 8)])
    (4, 2)
    """
    return tuple(min(budget, module.out_features, module.in_features) for module in modules)


def spectral(
    budget: int, modules: Sequence[LinearShape], spectra: Sequence[Tensor], largest: Sequence[int]
) -> tuple[int, ...]:
    """Give every module one direction, then those with the largest singular value per value sent.

    A direction that does not fit any more is passed over, and a cheaper one may still fit: less is
    left over than any direction still available costs. More budget never lowers the energy kept: a
    direction that it admits is at least as strong as all that the smaller budget took in its place.

    Directions of singular value zero come last but do count: they are how LoRA starts (B = 0), they
    learn, and a rank that has fallen never rises. Ties go to a module's earlier directions, then to
    the earlier module, so that equal spectra get equal ranks.

    Args:
        budget: directions a module on average, by values; at least 1.
        modules: the adapted linear layers, in order.
        spectra: per module, singular values (directions,) of its aggregated product, falling; directions
            beyond them, that no client of the round has trained, count as zero.
        largest: per module, the rank that it may not exceed, at least 1.

    Returns:
        One LoRA rank a module, at least 1, at most `largest`.

    Raises:
        AggregationError: if a module cannot get its one direction.

    >>> from torch import tensor
    >>> strong, weak = tensor([8.0, 7.0, 6.0]), tensor([3.0, 1.0, 0.0])
    >>> spectral(2, [LinearShape("q", 8, 8), LinearShape("k", 8, 8)], [strong, weak], [3, 3])
    (3, 1)
    """
    costs = [module.in_features + module.out_features for module in modules]
    if budget < 1 or min(largest, default=1) < 1:
        raise AggregationError(
            "every module must get at least one direction, so the budget and each module's largest rank "
            f"must be at least 1, got {budget} and {list(largest)}; raise the budget, or leave modules "
            "without a rank out"
        )
    lora_ranks = [1] * len(modules)
    left = (budget - 1) * sum(costs)
    for place in _strongest_first(spectra, costs, largest):
        # A module's directions all cost the same: behind one that is passed over no other fits.
        if costs[place] <= left:
            lora_ranks[place] += 1
            left -= costs[place]
    return tuple(lora_ranks)


def _strongest_first(spectra: Sequence[Tensor], costs: Sequence[int], largest: Sequence[int]) -> list[int]:
    candidates = sorted(
        (-value / cost, direction, place)
        for place, (spectrum, cost, limit) in enumerate(zip(spectra, costs, largest, strict=True))
        for direction, value in enumerate([*spectrum[1:limit].tolist(), *[0.0] * (limit - len(spectrum))])
    )
    return [place for _, _, place in candidates]
