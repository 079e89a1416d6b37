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

_YIELDING_S, _SHORT_S, _SHORT_SLEEP_S, _MOMENT_S = 2e-3, 5e-2, 1e-4, 2e-5
_SLEPT_SHARE, _LONGEST_SLEEP_S = 1e-2, 1e-2
_SLOW_BYTES_PER_S = 1e9


def wait(request: MPI.Request, num_bytes: int = 0) -> None:
    """Wait for a request by testing: others may take the core; later it sleeps between the tests.

    Not in the first 2 ms: many steps of a round take less, and a sleep would be a large part of them. Nor
    while so many bytes may be on their way. Then a sleep takes a hundredth of what has been waited: it makes
    no wait longer by more than that.
    """
    started, yielding_s = time.perf_counter(), _YIELDING_S + num_bytes / _SLOW_BYTES_PER_S
    while not request.Test():
        waited_s = time.perf_counter() - started
        if waited_s < yielding_s:
            os.sched_yield()
        else:
            time.sleep(min(max(_SHORT_SLEEP_S, _SLEPT_SHARE * waited_s), _LONGEST_SLEEP_S))


def wait_busily(requests: Sequence[MPI.Request], *, gives_way: bool = False) -> None:
    """Wait for requests that are under way: whoever else wants the core gets it, but nobody sleeps long.

    Args:
        requests: of this process.
        gives_way: sleep a moment between all tests. Who only yields keeps testing, and where processes share
            cores that takes time from whom it waits for.
    """
    waiting, started = list(requests), time.perf_counter()
    while waiting and not waiting[0].Testall(waiting):
        if time.perf_counter() - started >= _SHORT_S:
            time.sleep(_SHORT_SLEEP_S)
        elif gives_way:
            time.sleep(_MOMENT_S)
        else:
            os.sched_yield()
