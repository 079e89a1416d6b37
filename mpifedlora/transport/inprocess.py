"""The transport without MPI: server and workers in one process, one after another.

It makes the same calls in the same order as the MPI transport, so a run gives the same bits.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mpifedlora.core.agreement import Status
from mpifedlora.transport.base import ORDER_BYTES, NodePlace, Takes, TrainsClients, own_cores

if TYPE_CHECKING:
    from torch import Tensor

    from mpifedlora.core.layout import ModelShapes
    from mpifedlora.core.plan import RoundPlan
    from mpifedlora.core.streaming import RoundStream
    from mpifedlora.core.wire import UpdateHeader, UpdateRows, WireFormat


class InProcessTransport:
    """Server's end with the workers called directly.

    Args:
        workers: at least one; worker_id is the position.
    """

    can_stream = False
    is_fault_tolerant = False

    def __init__(self, workers: Sequence[TrainsClients]) -> None:
        self.workers = workers
        self.num_workers = len(workers)
        self.bytes_crossed = 0
        self._order_bytes = self._row_order_bytes = 0  # what orders would be over MPI
        self._rows: list[UpdateRows] = []

    def broadcast(self, plan: RoundPlan, wire: Tensor, *, takes: Takes = "") -> None:
        """Hand plan and message to every worker; the message is shared, not copied."""
        order_bytes = self.num_workers * (ORDER_BYTES + plan.pack().nbytes)
        self._row_order_bytes = 0 if takes == "rows" else order_bytes
        self._order_bytes = order_bytes
        self.bytes_crossed += order_bytes + self.num_workers * wire.nbytes
        if not plan.stops:
            for worker in self.workers:
                worker.receive(plan, wire)

    def collect_predictions(
        self, counts: Sequence[int], width: int = 2, dtype: str = "float32"
    ) -> list[Tensor]:
        """Let every worker measure its part of the examples."""
        predictions = [worker.predictions() for worker in self.workers]
        self.bytes_crossed += sum(part.nbytes for part in predictions)
        return predictions

    def collect_headers(self, plan: RoundPlan) -> list[UpdateHeader]:
        """Let every worker train its clients."""
        from mpifedlora.core.wire import read_headers

        headers: list[UpdateHeader] = []
        self._rows = [worker.train() for worker in self.workers] if plan.cohort else []
        for worker_id, rows in enumerate(self._rows):
            self.bytes_crossed += rows.headers.nbytes
            headers += read_headers(rows.headers, plan, plan.clients_of(worker_id), rows.sizes)
        return headers

    def collect_rows(self, plan: RoundPlan) -> list[Tensor]:
        """Return the workers' own rows, in the order of the headers."""
        rows = [each.wire(index) for each in self._rows for index in range(len(each))]
        self.bytes_crossed += self._row_order_bytes + sum(each.buffer.nbytes for each in self._rows)
        return rows

    def collect_sum(self, total: Tensor) -> None:
        """Add up the workers' sums into `total`."""
        total.zero_()
        for rows in self._rows:
            total.add_(rows.total)
        self.bytes_crossed += self._order_bytes + self.num_workers * total.nbytes

    def stream(self, plan: RoundPlan, stream: RoundStream, *, takes: Takes = "") -> float:
        """Never called: there is no wire to hide anything behind."""
        raise NotImplementedError

    def repair(self) -> list[int]:
        """Never called: no worker can be lost."""
        raise NotImplementedError


class Alone:
    """The one process of a run without MPI: server and worker at once."""

    is_server = True
    trains_as = 0
    is_fault_tolerant = False
    library = "in one process, without MPI"

    def __init__(self) -> None:
        self.place = NodePlace(
            host=socket.gethostname(),
            num_cores=len(own_cores()),
            num_sharing_cores=1,
            num_workers=1,
            worker_index=0,
        )

    def exchange(self, status: Status) -> list[Status]:
        """Return this process's own status."""
        return [status]

    def process_names(self) -> list[str]:
        """Return what to call the process in a message."""
        return ["this process"]

    def open(
        self,
        shapes: ModelShapes,
        num_clients: int,
        wire: WireFormat,
        *,
        part_bytes: int | None = None,
        is_pinned: bool = False,
    ) -> None:
        """Do nothing: messages are handed over as they are."""

    def share(self, content: bytes) -> bytes:
        """Return the content."""
        return content

    def pool(self, content: bytes) -> list[bytes]:
        """Return the content alone."""
        return [content]

    def watch(self, timeout_s: float | None, resume: str) -> None:
        """Do nothing: nobody else can die."""

    def part(self) -> None:
        """Do nothing: there is nobody to wait for."""

    def abort(self, message: str, exit_code: int = 1) -> None:
        """Do nothing: the exception ends the only process."""
