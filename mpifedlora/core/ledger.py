"""Bytes of a run: counted on the buffers that are sent, and in closed form from the layout.

`uplink_bytes` and `downlink_bytes` are what the clients of a real federation would send and
receive, headers included. Three rules follow: what every client has before round 1 (pre-trained
weights) or derives from the seed (fresh factors) is never sent; a client that was absent when base
weights or frozen directions went out receives them with its next downlink, and so it does the last
version of a factor that changed meanwhile; a client of a lower rank receives its leading directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mpifedlora.core.layout import DENSE, AdapterLayout, ModelShapes, Parts
from mpifedlora.core.plan import HEADER_BYTES, RoundPlan, downlink_header_bytes
from mpifedlora.core.wire import VALUE_BYTES, ClientUpdate

_FACTORS: tuple[Parts, ...] = ("a", "b")


class Ledger:
    """Counts what each client would send and receive, catch-up included.

    Args:
        num_clients: clients of the federation.
    """

    def __init__(self, num_clients: int) -> None:
        self.once: list[_Once] = []  # values of everything that went out once, in order
        self.heard = [0] * num_clients  # how many of those each client has received
        self.changed = dict.fromkeys(_FACTORS, 0)  # the round that last sent each factor
        self.joined = [0] * num_clients  # the round each client last took part in

    def count_downlink(self, plan: RoundPlan, shapes: ModelShapes) -> int:
        """Return the downlink bytes of a round, and note what its cohort has now received."""
        self.once.append(_Once.of(plan, shapes))
        for factor in _FACTORS:
            if plan.restarts:
                self.changed[factor] = 0
            elif plan.sends_state and factor in plan.sends_parts:
                self.changed[factor] = plan.round_num
        values = sum(self._values(plan, shapes, client_id) for client_id in plan.cohort)
        for client_id in plan.cohort:
            self.heard[client_id], self.joined[client_id] = len(self.once), plan.round_num
        header = downlink_header_bytes(len(shapes.modules), has_variates=plan.has_variates)
        return len(plan.cohort) * header + VALUE_BYTES * values

    def _values(self, plan: RoundPlan, shapes: ModelShapes, client_id: int) -> int:
        missed = _once_values(self.once[self.heard[client_id] :], shapes)
        if not plan.sends_state:
            return missed
        shared = plan.shared_layout(shapes, client_id)
        variate = shared.num_values if plan.has_variates else 0
        if plan.scope == "full":
            return missed + variate + shared.num_values
        return missed + variate + self._state_values(replace(shared, parts=""), client_id)

    def _state_values(self, layout: AdapterLayout, client_id: int) -> int:
        due = (factor for factor in _FACTORS if self.changed[factor] > self.joined[client_id])
        return layout.num_values + sum(replace(layout, parts=factor).factor_values for factor in due)


class _Once(NamedTuple):
    """Values of what one message holds once: base weights and maps, and frozen parts by module."""

    others: int
    frozen: npt.NDArray[np.int64]

    @staticmethod
    def of(plan: RoundPlan, shapes: ModelShapes) -> _Once:
        parts = plan.segments(shapes)
        sides, whole = _sides_and_whole(shapes)
        ranks = np.array(plan.frozen_ranks, np.int64)
        return _Once(
            parts.base.num_values + parts.maps.num_values, np.where(ranks == DENSE, whole, ranks * sides)
        )


def _sides_and_whole(shapes: ModelShapes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    sizes = np.array([module[1:] for module in shapes.modules], np.int64).reshape(-1, 2)
    return sizes.sum(axis=1), sizes.prod(axis=1)


def _once_values(missed: Sequence[_Once], shapes: ModelShapes) -> int:
    """Count the last message as it is; of those before, a module's sum is one matrix where that is less."""
    *before, last = missed
    earlier = sum((one.frozen for one in before), np.zeros_like(last.frozen))
    frozen = last.frozen + np.minimum(earlier, _sides_and_whole(shapes)[1])
    return int(sum(one.others for one in missed) + frozen.sum())


def count_uplink(updates: Sequence[ClientUpdate]) -> int:
    """Return the bytes that the clients of a round have sent."""
    return sum(HEADER_BYTES + update.values.nbytes for update in updates)


@dataclass(frozen=True)
class Traffic:
    """Total of a whole run in one direction or both: payload values, and bytes with headers."""

    values: int
    bytes: int

    def reduction(self, baseline: Traffic) -> float:
        """Return 1 - bytes / baseline bytes."""
        return 1 - self.bytes / baseline.bytes


def fixed_traffic(shapes: ModelShapes, num_values: int, cohort_sizes: Sequence[int]) -> Traffic:
    """Uplink and downlink of a run that exchanges num_values values both ways in every round.

    The first round's downlink holds headers only, as everywhere.

    Args:
        shapes: of the model, for the header's size.
        num_values: of the message.
        cohort_sizes: clients in each round.
    """
    headers = (HEADER_BYTES + downlink_header_bytes(len(shapes.modules))) * sum(cohort_sizes)
    values = num_values * (sum(cohort_sizes) + sum(cohort_sizes[1:]))
    return Traffic(values, headers + VALUE_BYTES * values)
