"""How one round's rank budget is shared among the modules.

A budget b counts values: the sum over modules of lora_rank * (in + out) is at most
b * sum of (in + out), so that bytes fall with the budget whatever the allocation.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpifedlora.core.layout import LinearShape


def uniform(budget: int, modules: Sequence[LinearShape]) -> tuple[int, ...]:
    """Give every module the budget as its LoRA rank, at most min(in_features, out_features).

    >>> uniform(4, [LinearShape("q", 8, 8), LinearShape("head", 2, 8)])
    (4, 2)
    """
    return tuple(min(budget, module.out_features, module.in_features) for module in modules)
