"""The transport without MPI: server and workers in one process, one after another.

It makes the same calls in the same order as the MPI transport, so a run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mpifedlora.core.wire import ClientUpdate, RoundPlan
from mpifedlora.transport.base import TrainsClients


class InProcessTransport:
    """Server's end with the workers called directly.

    Args:
        workers: at least one; worker_id is the position.
    """

    def __init__(self, workers: Sequence[TrainsClients]) -> None:
        self.workers = workers
        self.num_workers = len(workers)
        self.bytes_crossed = 0

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
        updates = []
        for worker in self.workers:
            rows = worker.train()
            self.bytes_crossed += rows.buffer.nbytes
            updates += [ClientUpdate.read(rows, index, plan) for index in range(len(rows))]
        return updates

    def wait_s(self) -> float:
        """Return 0: nobody is waited for."""
        return 0.0
