"""What both ends of the MPI transport share: status records, orders, units, repair."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mpifedlora.core.agreement import STATUS_BYTES, Bytes, Status
from mpifedlora.core.buffers import UNIT_BYTES
from mpifedlora.errors import RunLost
from mpifedlora.transport.base import ORDER_BYTES, NodePlace
from mpifedlora.transport.mpi.survival import Survivor, known_lost, vital
from mpifedlora.transport.mpi.waiting import wait, wait_busily
from mpifedlora.transport.mpi.watch import Watch

# What needs torch is loaded when the set-up has been checked: a mistake is told in a second, not ten.
if TYPE_CHECKING:
    from mpi4py import MPI

    from mpifedlora.core.layout import ModelShapes
    from mpifedlora.core.parts import Part, Span
    from mpifedlora.core.plan import RoundPlan
    from mpifedlora.core.wire import WireFormat

PIECE_BYTES = 2**20
"""Of one reduction, and of what is shared: for a larger sum Open MPI takes new memory, which is slow."""
_OTHERS_TELL_S = 1.0
# From here on Open MPI's Ibcast is no slower than its Bcast on one machine, and with 4 processes faster.
_LARGE_BYTES = 2**23


class Order(IntEnum):
    """What the server says that comes next."""

    NONE = 0  # nothing is announced yet
    MESSAGE = 1  # the plan in the order, then its message
    ROWS = 2  # every client's row
    SUM = 3  # the sum of all rows
    STREAM = 4  # rows in parts, while the message of the plan in the order goes out in parts
    COMMIT = 5  # the stream holds


class Endpoint(Survivor):
    """One process's end.

    Args:
        comm: communicator of at least two processes, for this alone.
        place: of the process on its node.
    """

    is_server: bool

    @property
    def trains_as(self) -> int | None:
        """The worker_id under which this process trains clients; None where it trains none."""
        return None if self.is_server else self.comm.rank - 1

    def __init__(self, comm: MPI.Comm, place: NodePlace) -> None:
        from mpi4py import MPI

        super().__init__(comm)
        self.place = place
        self.library = MPI.Get_library_version().split(",")[0].strip("\x00 \n")
        self.shapes: ModelShapes
        self.wire: WireFormat
        self.part_bytes: int | None = None
        self.order_bytes = 0
        self.is_pinned = False
        self._unit = MPI.BYTE
        self._watch: Watch | None = None

    @vital
    def exchange(self, status: Status) -> list[Status]:
        """Allgather one fixed-size record a process."""
        records = np.zeros((self.world_size, STATUS_BYTES), np.uint8)
        wait(self._begun(self.comm.Iallgather(status.pack(), records)))
        statuses = [Status.unpack(record) for record in records]
        self._hosts = [status.host for status in statuses]
        return statuses

    def open(
        self,
        shapes: ModelShapes,
        num_clients: int,
        wire: WireFormat,
        *,
        part_bytes: int | None = None,
        is_pinned: bool = False,
    ) -> None:
        """Say what the messages look like, and whether a GPU will copy them (page-locked memory)."""
        from mpifedlora.core.plan import plan_bytes

        self.shapes, self.wire, self.part_bytes, self.is_pinned = shapes, wire, part_bytes, is_pinned
        self.order_bytes = ORDER_BYTES + plan_bytes(len(shapes.modules), num_clients)
        self._unit = self._mpi.BYTE.Create_contiguous(UNIT_BYTES).Commit()

    @vital
    def share(self, content: bytes) -> bytes:
        """Broadcast bytes of any number from the server, and return them."""
        size = np.array([len(content)], np.int64)
        wait(self._begun(self.comm.Ibcast(size)))
        buffer = np.frombuffer(content, np.uint8) if self.is_server else np.empty(int(size[0]), np.uint8)
        for piece in pieces_of(buffer):
            wait(self._begun(self.comm.Ibcast([piece, self._mpi.BYTE])))
        return content if self.is_server else buffer.tobytes()

    @vital
    def pool(self, content: bytes) -> list[bytes]:
        """Allgather bytes of any number from every process, and return them, the server's first."""
        sizes = np.zeros(self.world_size, np.int64)
        wait(self._begun(self.comm.Iallgather(np.array([len(content)], np.int64), sizes)))
        buffer = np.empty(int(sizes.sum()), np.uint8)
        wait(self._begun(self.comm.Iallgatherv(np.frombuffer(content, np.uint8), [buffer, sizes.tolist()])))
        return [part.tobytes() for part in np.split(buffer, np.cumsum(sizes)[:-1])]

    @vital
    def watch(self, timeout_s: float | None, resume: str) -> None:
        """End the job when a process that it cannot do without is dead or silent; every process calls it.

        Args:
            timeout_s: of silence that counts as the end of a process that is not dead; None for none.
            resume: what the last message says of how to resume.
        """
        self._resume = resume
        if self._mpi.Query_thread() == self._mpi.THREAD_MULTIPLE:
            names = [self._described(mpi_rank) for mpi_rank in range(self.world_size)]
            peers = range(1, self.world_size) if self.is_server else [0]
            self._watch = Watch(self.comm.Dup(), peers, names, timeout_s, resume)

    def abort(self, message: str, exit_code: int = 1) -> None:
        """Print a message and end every process of the job with an exit code."""
        sys.stdout.flush()
        if self._tells:
            print(message, file=sys.stderr, flush=True)
        else:
            time.sleep(_OTHERS_TELL_S)
        if self.num_workers == 0:  # mpirun takes an Abort of the last process for a success
            os._exit(exit_code)
        self.comm.Abort(exit_code)

    def part(self) -> None:
        """Wait until every process has finished.

        Raises:
            RunLost: if the server has died, which writes what was trained; of a worker nothing is needed.
        """
        try:
            wait(self.comm.Ibarrier())
        except self._mpi.Exception as error:
            if not self.is_fault_tolerant:
                raise
            self._has_lost = True
            self.comm.Revoke()
            if 0 in known_lost(self.comm):
                raise RunLost(self._without_server()) from error
        if self._watch is not None:
            self._watch.stop()

    def _units(self, buffer: Bytes) -> list[object]:
        return [buffer, len(buffer) // UNIT_BYTES, self._unit]

    def _uplink_spans(self, plan: RoundPlan) -> list[Span]:
        from mpifedlora.core.parts import uplink_spans

        return uplink_spans(plan, self.shapes, self.wire, self.part_bytes)

    def _parts(self, plan: RoundPlan, following: RoundPlan) -> list[Part]:
        from mpifedlora.core.parts import parts_of

        return parts_of(plan, following, self.shapes, self.wire, self.part_bytes)

    def _broadcast_whole(self, message: Bytes) -> None:
        if len(message) < _LARGE_BYTES:
            self.comm.Bcast(self._units(message))
        else:
            wait_busily([self._begun(self.comm.Ibcast(self._units(message)))])

    def _broadcast_part(self, part: Part, message: Bytes) -> list[MPI.Request]:
        spans = (message[span.start : span.stop] for span in part.downlink)
        return [self._begun(self.comm.Ibcast(self._units(span))) for span in spans]


def pieces_of(buffer: npt.NDArray[np.generic]) -> Iterator[npt.NDArray[np.generic]]:
    """Cut a flat array into pieces of PIECE_BYTES: small enough for any MPI call."""
    step = PIECE_BYTES // buffer.itemsize
    for start in range(0, len(buffer), step):
        yield buffer[start : start + step]
