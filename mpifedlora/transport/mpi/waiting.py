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

_YIELDING_S, _LONGEST_SLEEP_S = 3e-5, 1e-3
_BUSY_S, _SHORT_SLEEP_S = 5e-2, 1e-4


def wait(request: MPI.Request) -> None:
    """Wait for a request by testing and sleeping: an eighth of the time waited so far, at most 1 ms."""
    started = time.perf_counter()
    while not request.Test():
        waited_s = time.perf_counter() - started
        if waited_s < _YIELDING_S:
            os.sched_yield()
        else:
            time.sleep(min(_LONGEST_SLEEP_S, waited_s / 8))


def wait_busily(requests: Sequence[MPI.Request]) -> None:
    """Wait for requests that are under way: whoever else wants the core gets it, but nobody sleeps long."""
    from mpi4py import MPI

    waiting, started = list(requests), time.perf_counter()
    while not MPI.Request.Testall(waiting):
        if time.perf_counter() - started < _BUSY_S:
            os.sched_yield()
        else:
            time.sleep(_SHORT_SLEEP_S)
