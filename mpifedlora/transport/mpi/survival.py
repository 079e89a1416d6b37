"""What to do when a process of the job has died, with ULFM: revoke, agree, shrink.

Without ULFM the launcher ends the whole job, and nothing of this is ever used.

References:
    Bland, Bouteilla, Herault, Bosilca, Dongarra: Post-failure recovery of MPI communication capability,
    IJHPCA 27 (2013).
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from mpifedlora.errors import ProtocolError, RunLost, WorkerLost
from mpifedlora.transport.mpi.waiting import wait

if TYPE_CHECKING:
    from mpi4py import MPI

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S", bound="Survivor")

_ULFM_VARIABLE = "OMPI_MCA_mpi_ft_enable"
_DRAIN_S, _POLL_S = 1.0, 1e-3


def is_fault_tolerant() -> bool:
    """Say whether the job lives on when one of its processes dies: as `mpirun --with-ft ulfm` starts it."""
    return os.environ.get(_ULFM_VARIABLE) == "1"


def known_lost(comm: MPI.Comm) -> list[int]:
    """Return the MPI ranks that this process knows to be dead; others may know more."""
    from mpi4py import MPI

    failed = comm.Get_failed()
    ranks = MPI.Group.Translate_ranks(failed, list(range(failed.size)), comm.Get_group())
    return sorted(ranks)


def drained(requests: Sequence[MPI.Request]) -> list[MPI.Request]:
    """Let the requests of a revoked communicator end; return those that have not after a second."""
    deadline = time.perf_counter() + _DRAIN_S
    for request in requests:
        while request and not _has_ended(request) and time.perf_counter() < deadline:
            time.sleep(_POLL_S)
    return [request for request in requests if request]


def _has_ended(request: MPI.Request) -> bool:
    from mpi4py import MPI

    try:
        return request.Test()
    except MPI.Exception:
        return True


def agree(comm: MPI.Comm, *, is_parting: bool) -> bool:
    """Wait until everybody who lives says whether it parts; return whether all do, the same everywhere.

    It works on a revoked communicator too, so that one who parts and one who repairs understand each other.
    """
    from mpi4py import MPI

    for _ in range(comm.size):
        comm.Ack_failed()
        flag = np.array([is_parting], np.int32)
        try:
            wait(comm.Iagree(flag))
            return bool(flag[0])
        except MPI.Exception:  # somebody has died since: everybody hears it, and asks again
            pass
    comm.Ack_failed()
    return bool(comm.Agree(int(is_parting)))


def survivable(step: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Make a step of the protocol raise WorkerLost, here and on everybody else, where a process has died."""

    @wraps(step)
    def guarded(end: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            result = step(end, *args, **kwargs)
        except end._mpi.Exception as error:
            if not end.is_fault_tolerant:
                raise
            raise end._loss() from error
        end._requests = [request for request in end._requests if request]
        return result

    return guarded


def vital(step: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
    """Make a step of the set-up raise RunLost, everywhere, where a process has died: nothing is to repeat."""

    @wraps(step)
    def guarded(end: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return survivable(step)(end, *args, **kwargs)
        except WorkerLost as loss:
            end.repair()
            end._tells = end.is_server
            raise RunLost(f"{loss} before the first round; {end._resume}") from loss

    return guarded


class Survivor:
    """The part of an end that lives on when other processes die.

    Args:
        comm: communicator of at least two processes, for this alone; MPI rank 0 is the server.
    """

    library: str
    is_server: bool

    def __init__(self, comm: MPI.Comm) -> None:
        from mpi4py import MPI

        self._mpi, self.comm = MPI, comm
        self.world_size, self.num_workers = comm.size, comm.size - 1
        self.is_fault_tolerant = is_fault_tolerant()
        self._has_lost = False  # somebody whom MPI's own end would wait for
        if self.is_fault_tolerant:
            atexit.register(self._finalize)
        self._names = ["the server", *(f"worker {worker_id}" for worker_id in range(self.num_workers))]
        self._name = self._names[comm.rank]
        self._hosts = [""] * comm.size
        self._resume = "resume it with `mpifedlora run ... --resume`"
        self._tells = True  # whether `abort` prints, or somebody else does
        self._requests: list[MPI.Request] = []  # of the step in hand
        self._abandoned: list[Any] = []  # what calls that failed may still look at

    def process_names(self) -> list[str]:
        """Return what to call each process in a message, by MPI rank: what it was called at the start."""
        return list(self._names)

    def repair(self) -> list[int]:
        """Go on with those that live, after a WorkerLost; every process that lives calls it.

        Returns:
            The ids that the lost workers had; those left keep their order.

        Raises:
            RunLost: if the server or the last worker died.
            ProtocolError: if nobody did.
        """
        self.comm.Revoke()
        requests, self._requests = self._requests, []
        self._abandoned = [*drained(requests), *self._forget()]
        agree(self.comm, is_parting=False)
        return self._rebuild()

    def _forget(self) -> list[Any]:
        """Drop what belongs to the round in hand; return what calls that failed may still write to."""
        raise NotImplementedError

    def _rebuild(self) -> list[int]:
        """Leave the dead behind, once everybody has agreed to."""
        lost = self._shrink()
        if not lost:
            raise ProtocolError(
                "an MPI call may fail only where a process has died, but all live; this is a defect of "
                f"mpifedlora or of {self.library}: please report it"
            )
        if 0 in lost:
            self._tells = self._name == self._names[0]
            raise RunLost(self._without_server())
        if self.num_workers == 0:
            raise RunLost(f"at least one worker must live, but the last has died; {self._resume}")
        return [mpi_rank - 1 for mpi_rank in lost]

    def _without_server(self) -> str:
        return f"the server must live until the run ends, but it has died; {self._resume}"

    def _finalize(self) -> None:
        # Open MPI 5.0 waits forever for the dead where two have died at once.
        if not self._has_lost and not self._mpi.Is_finalized():
            self._mpi.Finalize()

    def _may_part(self) -> bool:
        """Say whether everybody who lives has heard that the run is over."""
        return not self.is_fault_tolerant or agree(self.comm, is_parting=True)

    def _loss(self) -> WorkerLost:
        self.comm.Revoke()  # so that nobody waits for this process
        lost = [self._described(mpi_rank) for mpi_rank in known_lost(self.comm)]
        return WorkerLost(f"{', '.join(lost) or 'a worker'} has died")

    def _described(self, mpi_rank: int) -> str:
        host = self._hosts[mpi_rank]
        return self._names[mpi_rank] + (f" (on {host})" if host else "")

    def _begun(self, request: MPI.Request) -> MPI.Request:
        self._requests.append(request)
        return request

    def _shrink(self) -> list[int]:
        # The old communicator is not freed: calls on it may not have ended everywhere.
        old, self.comm = self.comm, self.comm.Shrink()
        self._has_lost = True
        self.comm.Set_errhandler(self._mpi.ERRORS_RETURN)
        self.world_size, self.num_workers = self.comm.size, self.comm.size - 1
        ranks = self._mpi.Group.Translate_ranks(old.Get_group(), list(range(old.size)), self.comm.Get_group())
        lives = [index for index, found in enumerate(ranks) if found != self._mpi.UNDEFINED]
        self._names = [self._names[index] for index in lives]
        self._hosts = [self._hosts[index] for index in lives]
        return sorted(set(range(old.size)) - set(lives))
