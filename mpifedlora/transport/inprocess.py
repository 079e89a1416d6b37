"""The transport without MPI: server and workers in one process, one after another.

It makes the same calls in the same order as the MPI transport, so a run gives the same bits.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mpifedlora.core.agreement import Status
from mpifedlora.transport.base import NodePlace, TrainsClients, own_cores

if TYPE_CHECKING:
    from torch import Tensor

    from mpifedlora.core.layout import ModelShapes
    from mpifedlora.core.plan import RoundPlan
    from mpifedlora.core.wire import ClientUpdate


class InProcessTransport:
    """Server's end with the workers called directly.

    Args:
        workers: at least one; worker_id is the position.
    """

    def __init__(self, workers: Sequence[TrainsClients]) -> None:
        self.workers = workers
        self.num_workers = len(workers)
        self.bytes_crossed = 0
        self._wait_s = 0.0

    def broadcast(self, plan: RoundPlan, message: Tensor) -> None:
        """Hand plan and message to every worker; the message is shared, not copied."""
        self.bytes_crossed += self.num_workers * (plan.pack().nbytes + message.nbytes)
        if not plan.stops:
            for worker in self.workers:
                worker.receive(plan, message)

    def collect_predictions(self, counts: Sequence[int]) -> list[Tensor]:
        """Let every worker measure its part of the examples."""
        predictions = [worker.predictions() for worker in self.workers]
        self.bytes_crossed += sum(part.nbytes for part in predictions)
        return predictions

    def collect(self, plan: RoundPlan) -> list[ClientUpdate]:
        """Let every worker train its clients."""
        from mpifedlora.core.wire import read_rows

        updates = []
        started = time.perf_counter()
        for worker_id, worker in enumerate(self.workers):
            rows = worker.train()
            self.bytes_crossed += rows.buffer.nbytes
            updates += read_rows(rows, plan, [worker_id])
        self._wait_s = time.perf_counter() - started
        return updates

    def wait_s(self) -> float:
        """Return the seconds that the workers trained in the last collect."""
        return self._wait_s


class Alone:
    """The one process of a run without MPI: server and worker at once."""

    is_server = True
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

    def open(self, shapes: ModelShapes, num_clients: int, *, is_pinned: bool = False) -> None:
        """Do nothing: messages are handed over as they are."""

    def abort(self, message: str) -> None:
        """Do nothing: the exception ends the only process."""
