"""Bytes of a run, in closed form from the plan of each round.

`uplink_bytes` and `downlink_bytes` are what the clients of a real federation would send and
receive, headers included. Three rules follow: what every client has before round 1 (pre-trained
weights) or derives from the seed (fresh factors) is never sent; a client that was absent when base
weights or frozen directions went out receives them with its next downlink, and so it does the last
version of a factor that changed meanwhile; a client of a lower rank receives its leading directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from mpifedlora.core.allocation import uniform
from mpifedlora.core.codec import num_bytes, piece_bytes
from mpifedlora.core.layout import DENSE, AdapterLayout, ModelShapes, Parts
from mpifedlora.core.plan import HEADER_BYTES, RoundPlan, downlink_header_bytes
from mpifedlora.core.wire import VALUE_BYTES

_FACTORS = ("a", "b")


@dataclass(frozen=True)
class Traffic:
    """What was sent: payload values, and bytes with headers."""

    values: int
    bytes: int

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.values + other.values, self.bytes + other.bytes)


class Ledger:
    """Counts what each client would send and receive, catch-up included.

    Args:
        num_clients: clients of the federation.
        dtype: wire dtype of the downlink; `float32` where clients keep control variates.
    """

    def __init__(self, num_clients: int, dtype: str = "float32") -> None:
        self.dtype = dtype
        self.once: list[_Once] = []  # sizes of everything that went out once, in order
        self.heard = [0] * num_clients  # how many of those each client has received
        self.changed = dict.fromkeys(_FACTORS, 0)  # the round that last sent each factor
        self.joined = [0] * num_clients  # the round each client last took part in

    def count_downlink(self, plan: RoundPlan, shapes: ModelShapes) -> Traffic:
        """Return the downlink of a round, and note what its cohort has now received."""
        self.once.append(_Once.of(self.dtype, plan, shapes))
        for factor in _FACTORS:
            if plan.restarts:
                self.changed[factor] = 0
            elif plan.sends_state and factor in plan.sends_parts:
                self.changed[factor] = plan.round_num
        starts = {self.heard[client_id] for client_id in plan.cohort}
        missed = {first: self._caught_up(first, shapes) for first in starts}
        header = downlink_header_bytes(len(shapes.modules), has_variates=plan.has_variates)
        total = Traffic(0, len(plan.cohort) * header)
        for client_id in plan.cohort:
            total += missed[self.heard[client_id]] + self._state(plan, shapes, client_id)
            self.heard[client_id], self.joined[client_id] = len(self.once), plan.round_num
        return total

    def _caught_up(self, first: int, shapes: ModelShapes) -> Traffic:
        # The last message counts as it is. Of those before, a module's sum is one matrix where that is less.
        *before, last = self.once[first:]
        earlier = sum((one.frozen for one in before), np.zeros_like(last.frozen))
        num_modules = len(shapes.modules)
        matrices = _by_piece(self.dtype, shapes.frozen((DENSE,) * num_modules))[:, num_modules:]
        frozen = last.frozen + np.where(matrices[1] < earlier[1], matrices, earlier)
        return sum((one.others for one in (*before, last)), Traffic(*frozen.sum(axis=1).tolist()))

    def _state(self, plan: RoundPlan, shapes: ModelShapes, client_id: int) -> Traffic:
        if not plan.sends_state:
            return Traffic(0, 0)
        shared = plan.shared_layout(shapes, client_id)
        due = "".join(factor for factor in _FACTORS if self.changed[factor] > self.joined[client_id])
        state = replace(shared, parts=cast(Parts, due))
        return _total(self.dtype, [state, shared] if plan.has_variates else [state])


class _Once(NamedTuple):
    """What one message holds once: base weights and maps, and (values and bytes, module) of frozen parts."""

    others: Traffic
    frozen: npt.NDArray[np.int64]

    @staticmethod
    def of(dtype: str, plan: RoundPlan, shapes: ModelShapes) -> _Once:
        parts = plan.segments(shapes)
        sizes, num_modules = _by_piece(dtype, parts.frozen), len(shapes.modules)
        frozen, matrices = sizes[:, :num_modules], sizes[:, num_modules:]
        frozen[:, np.array(plan.frozen_ranks) == DENSE] = matrices
        return _Once(_total(dtype, (parts.base, parts.maps)), frozen)


def _by_piece(dtype: str, layout: AdapterLayout) -> npt.NDArray[np.int64]:
    return np.array([layout.piece_values, piece_bytes(dtype, layout)], np.int64)


def _total(dtype: str, layouts: Iterable[AdapterLayout]) -> Traffic:
    sizes = (Traffic(layout.num_values, num_bytes(dtype, layout)) for layout in layouts)
    return sum(sizes, Traffic(0, 0))


def count_uplink(plan: RoundPlan, shapes: ModelShapes, dtype: str = "float32") -> Traffic:
    """Return the uplink of a round: what its cohort sends back.

    Args:
        plan: of the round.
        shapes: of the model.
        dtype: wire dtype of the uplink; `float32` where control variates go with the updates.
    """
    rows = [plan.shared_layout(shapes, client_id) for client_id in plan.cohort]
    headers = Traffic(0, HEADER_BYTES * len(rows))
    return headers + _total(dtype, rows * 2 if plan.has_variates else rows)


def baseline_traffic(
    shapes: ModelShapes, rank_max: int, cohort_sizes: Sequence[int]
) -> tuple[Traffic, Traffic]:
    """Return what FedAvg of the whole model, and LoRA of a fixed rank, would send in a run's rounds.

    Args:
        shapes: of the model.
        rank_max: the fixed rank.
        cohort_sizes: clients in each round.
    """
    adapter = shapes.adapter(uniform(rank_max, shapes.modules))
    layouts = (shapes.full(), adapter)
    full, fixed = (fixed_traffic(shapes, layout.num_values, cohort_sizes) for layout in layouts)
    return full, fixed


def fixed_traffic(shapes: ModelShapes, num_values: int, cohort_sizes: Sequence[int]) -> Traffic:
    """Return uplink and downlink of a run that exchanges num_values float32 both ways in every round.

    The first round's downlink holds headers only, as everywhere.

    Args:
        shapes: of the model, for the header's size.
        num_values: of the message.
        cohort_sizes: clients in each round.
    """
    headers = (HEADER_BYTES + downlink_header_bytes(len(shapes.modules))) * sum(cohort_sizes)
    values = num_values * (sum(cohort_sizes) + sum(cohort_sizes[1:]))
    return Traffic(values, headers + VALUE_BYTES * values)
