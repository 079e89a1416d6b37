"""Waiting that does not burn a core.

A process that waits for slow partners tests and sleeps, and enters a blocking collective only when everybody
is about to. (Open MPI spins in blocking calls, which on a shared node would take the cores from those that
train.)
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

_YIELDING_S, _SHORT_S, _SHORT_SLEEP_S, _LONGEST_SLEEP_S = 2e-3, 5e-2, 1e-4, 1e-3


def wait(request: MPI.Request) -> None:
    """Wait for a request by testing: others may take the core; after 2 ms it sleeps between the tests.

    Many steps of a round take less than that, and a sleep would be a large part of them.
    """
    started = time.perf_counter()
    while not request.Test():
        waited_s = time.perf_counter() - started
        if waited_s < _YIELDING_S:
            os.sched_yield()
        else:
            time.sleep(_SHORT_SLEEP_S if waited_s < _SHORT_S else _LONGEST_SLEEP_S)


def wait_busily(requests: Sequence[MPI.Request]) -> None:
    """Wait for requests that are under way: whoever else wants the core gets it, but nobody sleeps long."""
    from mpi4py import MPI

    waiting, started = list(requests), time.perf_counter()
    while not MPI.Request.Testall(waiting):
        if time.perf_counter() - started < _SHORT_S:
            os.sched_yield()
        else:
            time.sleep(_SHORT_SLEEP_S)
