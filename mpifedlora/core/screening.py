"""Which of a round's updates are used: finite ones, within the norm bound, chosen by Krum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mpifedlora.core.layout import Factors
from mpifedlora.core.robust import (
    gram_of_products,
    gram_of_values,
    krum,
    smallest_cohort,
    squared_distances,
    update_norm,
)
from mpifedlora.core.wire import ClientUpdate

ABSENT, USED = "absent", "used"
NOT_FINITE, ABOVE_BOUND, NOT_CHOSEN = "not finite", "above bound", "not chosen"


class Contribution(NamedTuple):
    """One client's update as the server sees it.

    Args:
        update: header and row.
        factors: of every module, what the client did not send taken from the global state; none
            where the whole model is trained, or where B stays with the client.
        values: (shared values,), the row without its control variate.
        whole: what is in no factor: the head, or every weight.
    """

    update: ClientUpdate
    factors: Sequence[Factors]
    values: Tensor
    whole: Tensor


@dataclass(frozen=True)
class Screening:
    """What an update must meet to be used.

    Args:
        norm_bound: largest norm of an update, sqrt(sum of ||B_k A_k - B A||^2 + ||head_k - head||^2),
            with the B A of the client's own rank.
        krum: `krum`, `multi-krum`, or nothing.
        num_byzantine: clients that Krum withstands.
        least: updates that must be left, before Krum chooses, for any of them to be used.
    """

    norm_bound: float | None = None
    krum: str = ""
    num_byzantine: int = 0
    least: int = 1

    @property
    def compares(self) -> bool:
        """Whether more than finiteness and number counts."""
        return self.norm_bound is not None or bool(self.krum)

    def choose(
        self, contributions: Sequence[Contribution], factors: Sequence[Factors], whole: Tensor
    ) -> dict[int, str]:
        """Return the outcome of each client: USED, its fault, NOT_FINITE, ABOVE_BOUND or NOT_CHOSEN.

        Args:
            contributions: of the round.
            factors: of the state that the clients received.
            whole: what is in no factor of it.
        """
        outcomes = {part.update.client_id: self._outcome(part, factors, whole) for part in contributions}
        left = [part for part in contributions if outcomes[part.update.client_id] == USED]
        chosen = {part.update.client_id for part in self._chosen(left, whole)}
        rejected = {part.update.client_id for part in left} - chosen
        return {**outcomes, **dict.fromkeys(rejected, NOT_CHOSEN)}

    def _outcome(self, part: Contribution, factors: Sequence[Factors], whole: Tensor) -> str:
        if part.update.fault:
            return part.update.fault
        # One value that is not finite makes the sum so, whatever the client's header says.
        if not (part.update.is_finite and bool(part.values.sum().isfinite())):
            return NOT_FINITE
        if self.norm_bound is None:
            return USED
        received = [_leading(state, own.lora_rank) for state, own in zip(factors, part.factors, strict=True)]
        norm = update_norm(part.factors, received, part.whole, whole)
        return USED if norm <= self.norm_bound else ABOVE_BOUND

    def _chosen(self, left: Sequence[Contribution], whole: Tensor) -> Sequence[Contribution]:
        if len(left) < self.least:
            return []
        if not self.krum:
            return left
        if len(left) < smallest_cohort(self.num_byzantine):
            return []  # too few are left to tell who is honest
        return [left[index] for index in self._closest(left, whole)]

    def _closest(self, left: Sequence[Contribution], whole: Tensor) -> tuple[int, ...]:
        gram = gram_of_values([part.whole - whole for part in left])
        if left[0].factors:
            gram += gram_of_products([part.factors for part in left])
        num_chosen = 1 if self.krum == "krum" else len(left) - self.num_byzantine - 2
        return krum(squared_distances(gram), self.num_byzantine, num_chosen)


def _leading(factors: Factors, lora_rank: int) -> Factors:
    return Factors(factors.a[:lora_rank], factors.b[:, :lora_rank])
