"""Signs of life: a thread of each process that notices when another is dead or stopped.

ULFM sees dead processes only, and only while somebody is inside MPI. So every second the server and each
worker send each other one byte, on a communicator of their own.
"""

from __future__ import annotations

import atexit
import math
import sys
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mpifedlora.transport.base import EXIT_RESUMABLE

if TYPE_CHECKING:
    from mpi4py import MPI

INTERVAL_S = 1.0
_GRACE_S = 2.0  # in which the main thread may say more of it
_STAGGER_S, _LONGEST_STAGGER_S = 0.2, 3.0


class Watch:
    """Watches the workers on the server, and the server on a worker, until `stop`.

    Args:
        comm: for this alone; MPI rank 0 is the server.
        peers: whom this process watches.
        names: of the processes, by MPI rank.
        timeout_s: of silence after which a process counts as lost; None for never.
        resume: how to resume.
    """

    def __init__(
        self, comm: MPI.Comm, peers: Iterable[int], names: Sequence[str], timeout_s: float | None, resume: str
    ) -> None:
        from mpi4py import MPI

        self._mpi, self._comm = MPI, comm
        comm.Set_errhandler(MPI.ERRORS_RETURN)
        self._names, self._resume = names, resume
        self._timeout_s = math.inf if timeout_s is None else timeout_s
        self._silent_s = dict.fromkeys(peers, 0.0)
        self._sent: dict[int, MPI.Request] = {}
        self._sign, self._heard = np.ones(1, np.uint8), np.empty(1, np.uint8)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()
        atexit.register(self.stop)  # before MPI is finalised

    def stop(self) -> None:
        """End the thread: from now on others may leave."""
        self._is_over.set()
        self._thread.join()
        atexit.unregister(self.stop)

    def _run(self) -> None:
        while not self._is_over.wait(INTERVAL_S):
            for peer in list(self._silent_s):
                try:
                    self._greet(peer)
                except self._mpi.Exception:  # it is dead
                    del self._silent_s[peer]
                    if peer == 0:
                        self._end(f"{self._names[0]} has died", _GRACE_S)

    def _greet(self, peer: int) -> None:
        # Counted, not measured: a job that is suspended as a whole does not find itself silent.
        self._silent_s[peer] += INTERVAL_S
        if peer not in self._sent or self._sent[peer].Test():
            self._sent[peer] = self._comm.Isend([self._sign, self._mpi.BYTE], peer)
        while self._comm.Iprobe(peer):
            self._comm.Recv([self._heard, self._mpi.BYTE], peer)
            self._silent_s[peer] = 0.0
        if self._silent_s[peer] > self._timeout_s:
            self._end(f"{self._names[peer]} has given no sign of life for {self._timeout_s:g} s")

    def _end(self, what: str, grace_s: float = 0.0) -> None:
        # One of many workers is enough to say it: the first ends the others.
        stagger_s = min(_LONGEST_STAGGER_S, _STAGGER_S * max(0, self._comm.rank - 1))
        if not self._is_over.wait(grace_s + stagger_s):
            print(f"error: {what}; the run ends here; {self._resume}", file=sys.stderr, flush=True)
            self._comm.Abort(EXIT_RESUMABLE)
