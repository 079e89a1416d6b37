"""What both ends of the MPI transport share: status records, orders, units, waiting.

Waiting does not burn a core: a process that waits for slow partners tests and sleeps, and enters a
blocking collective only when everybody is about to. (Open MPI spins in blocking calls, which on a
shared node would take the cores from those that train.)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mpifedlora.core.agreement import STATUS_BYTES, Bytes, Status
from mpifedlora.transport.base import ORDER_BYTES, NodePlace

# What needs torch is loaded when the set-up has been checked: a mistake is told in a second, not ten.
if TYPE_CHECKING:
    from mpi4py import MPI
    from torch import Tensor

    from mpifedlora.core.layout import ModelShapes
    from mpifedlora.core.parts import Part
    from mpifedlora.core.plan import RoundPlan
    from mpifedlora.core.wire import WireFormat

LARGEST_COUNT = 2**30
"""Elements of one reduction: MPI counts them with 32 bits."""
_YIELDING_S, _LONGEST_SLEEP_S = 3e-5, 1e-3
_BUSY_S, _SHORT_SLEEP_S = 5e-2, 1e-4


class Order(IntEnum):
    """What the server says that comes next."""

    MESSAGE = 1  # the plan in the order, then its message
    ROWS = 2  # every client's row
    SUM = 3  # the sum of all rows
    STREAM = 4  # rows in parts, while the message of the plan in the order goes out in parts
    COMMIT = 5  # the stream holds


class Endpoint:
    """One process's end.

    Args:
        comm: communicator of at least two processes, for this alone.
        place: of the process on its node.
    """

    is_server: bool

    def __init__(self, comm: MPI.Comm, place: NodePlace) -> None:
        from mpi4py import MPI

        self.comm, self.place = comm, place
        self.world_size = comm.size
        self.num_workers = comm.size - 1
        self.library = MPI.Get_library_version().split(",")[0].strip("\x00 \n")
        self.shapes: ModelShapes
        self.wire: WireFormat
        self.part_bytes: int | None = None
        self.order_bytes = 0
        self.is_pinned = False
        self._mpi = MPI
        self._unit = MPI.BYTE

    def exchange(self, status: Status) -> list[Status]:
        """Allgather one fixed-size record a process."""
        records = np.zeros((self.world_size, STATUS_BYTES), np.uint8)
        wait(self.comm.Iallgather(status.pack(), records))
        return [Status.unpack(record) for record in records]

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
        from mpifedlora.core.buffers import UNIT_BYTES
        from mpifedlora.core.plan import plan_bytes

        self.shapes, self.wire, self.part_bytes, self.is_pinned = shapes, wire, part_bytes, is_pinned
        self.order_bytes = ORDER_BYTES + plan_bytes(len(shapes.modules), num_clients)
        self._unit = self._mpi.BYTE.Create_contiguous(UNIT_BYTES).Commit()

    def abort(self, message: str) -> None:
        """Print a message and end every process of the job, with exit code 1."""
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
        self.comm.Abort(1)

    def process_names(self) -> list[str]:
        """Return what to call each process in a message, by MPI rank."""
        return ["the server", *(f"worker {worker_id}" for worker_id in range(self.num_workers))]

    def _units(self, buffer: Bytes) -> list[object]:
        from mpifedlora.core.buffers import UNIT_BYTES

        return [buffer, len(buffer) // UNIT_BYTES, self._unit]

    def _parts(self, plan: RoundPlan, following: RoundPlan) -> list[Part]:
        from mpifedlora.core.parts import parts_of

        return parts_of(plan, following, self.shapes, self.wire, self.part_bytes)

    def _broadcast_part(self, part: Part, message: Bytes) -> list[MPI.Request]:
        spans = (message[span.start : span.stop] for span in part.downlink)
        return [self.comm.Ibcast(self._units(span)) for span in spans]


def pieces_of(buffer: npt.NDArray[np.generic]) -> Iterator[npt.NDArray[np.generic]]:
    """Cut a flat array into pieces that one MPI count can hold."""
    for start in range(0, len(buffer), LARGEST_COUNT):
        yield buffer[start : start + LARGEST_COUNT]


def as_bytes(tensor: Tensor) -> Bytes:
    """See a flat tensor as bytes; numpy has no bfloat16, but any tensor has a one-byte view.

    On a GPU it is the view itself, whose address MPI is given.
    """
    import torch

    view = tensor.reshape(-1).view(torch.uint8)
    flat: Bytes = view if view.is_cuda else view.numpy()  # type: ignore[assignment]
    return flat


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
