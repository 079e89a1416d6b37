"""Bytes of a run: counted on the buffers that are sent, and in closed form from the layout.

`uplink_bytes` and `downlink_bytes` are what the clients of a real federation would send and
receive, headers included. Two rules follow: what every client has before round 1 (pre-trained
weights, and the initial adapter, which follows from the seed) is never sent, and a client that
was absent when base weights or frozen directions went out receives them with its next downlink.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mpifedlora.core.layout import ModelShapes
from mpifedlora.core.wire import HEADER_BYTES, VALUE_BYTES, RoundPlan, downlink_header_bytes


class Ledger:
    """Counts what each client would receive, catch-up included.

    Args:
        num_clients: clients of the federation.
    """

    def __init__(self, num_clients: int) -> None:
        self.once: list[int] = []  # bytes of everything that went out once, in order
        self.heard = [0] * num_clients  # how many of those each client has received

    def count_downlink(self, plan: RoundPlan, shapes: ModelShapes) -> int:
        """Return the downlink bytes of a round, and note what its cohort has now received."""
        base, frozen, state = plan.segments(shapes)
        if base.num_values + frozen.num_values:
            self.once.append(VALUE_BYTES * (base.num_values + frozen.num_values))
        each = downlink_header_bytes(len(shapes.modules)) + VALUE_BYTES * state.num_values
        total = sum(each + self._missed(client_id) for client_id in plan.cohort)
        for client_id in plan.cohort:
            self.heard[client_id] = len(self.once)
        return total

    def _missed(self, client_id: int) -> int:
        return sum(self.once[self.heard[client_id] :])


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


def annealed_traffic(shapes: ModelShapes, plans: Iterable[RoundPlan]) -> Traffic:
    """Uplink and downlink of a run in closed form, from its plans, when every client hears each round.

    Sum over rounds and clients of: values of the round's layout (up); values of state, frozen
    directions and base weights (down); and both headers.
    """
    values = num_bytes = 0
    for plan in plans:
        each = plan.layout(shapes).num_values + plan.message_values(shapes)
        values += each * len(plan.cohort)
        headers = HEADER_BYTES + downlink_header_bytes(len(shapes.modules))
        num_bytes += (headers + VALUE_BYTES * each) * len(plan.cohort)
    return Traffic(values, num_bytes)
