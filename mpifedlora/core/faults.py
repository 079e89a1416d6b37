"""Clients that fail: how often in a row, and who is set aside for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mpifedlora.core.screening import NOT_FINITE
from mpifedlora.core.wire import FAILED, LATE, POSTPONED


def count_failures(failures: Sequence[int], outcomes: Mapping[int, str]) -> list[int]:
    """Return how often in a row each client has failed, after one more round.

    A round counts if the client raised or its values were not finite. Being late or absent neither adds to
    a row nor ends it: it says nothing about the client.

    Args:
        failures: by client id, before the round.
        outcomes: of the round's cohort, by client id.

    >>> count_failures([1, 1, 1, 1], {0: "failed", 1: "used", 2: "late"})
    [2, 0, 1, 1]
    """
    counted = list(failures)
    for client_id, outcome in outcomes.items():
        if outcome in (FAILED, NOT_FINITE):
            counted[client_id] += 1
        elif outcome not in (LATE, POSTPONED):
            counted[client_id] = 0
    return counted


def set_aside(failures: Sequence[int], max_failures: int) -> tuple[int, ...]:
    """Return the ids of the clients that are no longer chosen, in rising order.

    Args:
        failures: by client id, in a row.
        max_failures: that set a client aside.

    >>> set_aside([0, 3, 2, 5], 3)
    (1, 3)
    """
    return tuple(client_id for client_id, count in enumerate(failures) if count >= max_failures)
