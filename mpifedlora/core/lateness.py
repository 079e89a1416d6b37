"""Clients that a deadline has found in training: what they go on from, and what their updates count.

A late client keeps how far it has come. In its next round it starts from the new global state plus the change
that it had made, and takes the steps that it still owes: its update answers that round like any other, and
counts less by how many rounds ago it began.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mpifedlora.core.layout import AdapterLayout
from mpifedlora.core.lowrank import factors_of, stack_weighted, svd_of_product

Carried = Literal["", "values", "products"]
"""How a change is taken into the next round: not at all, value by value, or as products of factors."""

_NUMBERS, _STARTED, _TRAINED = "late.numbers", "late.started", "late.trained"


class Progress(NamedTuple):
    """How far a client has come.

    Args:
        begun: the round that it began in.
        num_steps: that it has taken, in all rounds since.
        lora_ranks: of the layout that it trained.
        started: (trained values,), the global state of its last round.
        trained: (trained values,), what it has made of it.
    """

    begun: int
    num_steps: int
    lora_ranks: tuple[int, ...]
    started: Tensor
    trained: Tensor

    def pack(self) -> dict[str, Tensor]:
        """Return it as tensors by name, to be kept with what the client keeps anyway."""
        numbers = torch.tensor([self.begun, self.num_steps, *self.lora_ranks], dtype=torch.float32)
        return {_NUMBERS: numbers, _STARTED: self.started, _TRAINED: self.trained}

    @staticmethod
    def unpack(kept: Mapping[str, Tensor]) -> Progress | None:
        """Find it in what a client has kept; None where the client was not late."""
        if _NUMBERS not in kept:
            return None
        begun, num_steps, *lora_ranks = (int(number) for number in kept[_NUMBERS])
        return Progress(begun, num_steps, tuple(lora_ranks), kept[_STARTED], kept[_TRAINED])


def without_progress(kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what a client has kept beside how far it had come."""
    names = (_NUMBERS, _STARTED, _TRAINED)
    return {name: tensor for name, tensor in kept.items() if name not in names}


def go_on(progress: Progress, layout: AdapterLayout, state: Tensor, carried: Carried) -> Tensor:
    """Return what a late client goes on from: the new state, and the change that it had made.

    Carried as values that is their sum. Under an exact aggregation every round has a new basis, and maybe
    other ranks: there the new factors are those of the best approximation (Eckart-Young), at the new ranks,
    of B A + B_k A_k - B_0 A_0, with B_0 A_0 where the client had started and B_k A_k what it made of it.

    Args:
        progress: of the client.
        layout: of what it trains now; as values, it is the one of `progress`.
        state: (layout values,), the global state of this round.
        carried: `values` or `products`.
    """
    if carried == "values":
        return state + (progress.trained - progress.started)
    before, flat = replace(layout, lora_ranks=progress.lora_ranks), state.clone()
    change = before.whole_values(progress.trained) - before.whole_values(progress.started)
    layout.whole_values(flat).add_(change)
    pairs = zip(before.factors(progress.trained), before.factors(progress.started), strict=True)
    for target, (trained, started) in zip(layout.factors(flat), pairs, strict=True):
        whole = stack_weighted([target, trained, started], [1.0, 1.0, -1.0])
        best = factors_of(svd_of_product(whole), 0, target.lora_rank)
        target.a.copy_(best.a)
        target.b.copy_(best.b)
    return flat


def staleness_weight(staleness: int, exponent: float) -> float:
    """Return what an update counts that began some rounds ago: (1 + staleness)^-exponent.

    Args:
        staleness: rounds.
        exponent: at least 0; 0 makes no difference between early and late.

    References:
        FedAsync, arXiv 1903.03934, section 5.2, the polynomial form; FedBuff, arXiv 2106.06639, has the
        exponent 1/2.

    >>> staleness_weight(0, 0.5), staleness_weight(3, 0.5)
    (1.0, 0.5)
    """
    return float((1 + staleness) ** -exponent)
