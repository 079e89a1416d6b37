"""The worker: it trains its clients of each round, one after another."""

from __future__ import annotations

import time

from torch import Tensor

from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.wire import ClientUpdate, UpdateRows, fitting_rows
from mpifedlora.errors import TrainingError
from mpifedlora.runtime.setup import Replica
from mpifedlora.training.local import train_client
from mpifedlora.transport.base import WorkerTransport


class Worker:
    """Trains the clients that a plan gives it.

    Args:
        worker_id: 0..num_workers-1.
        num_workers: processes that train.
        replica: this process's copy of model and data.
    """

    def __init__(self, worker_id: int, num_workers: int, replica: Replica) -> None:
        self.worker_id = worker_id
        self.num_workers = num_workers
        self.replica = replica
        self.model = replica.model
        self._examples_of = replica.examples_of()
        self._rows: UpdateRows | None = None
        self._plan: RoundPlan | None = None

    def receive(self, plan: RoundPlan, message: Tensor) -> None:
        """Take a plan and its message (message_values,) float32."""
        self.model.receive(plan, message)
        self._plan = plan

    @property
    def plan(self) -> RoundPlan:
        """The plan of the round in hand."""
        assert self._plan is not None, "a round begins with receive()"
        return self._plan

    def predictions(self) -> Tensor:
        """Measure this worker's part of the examples, (examples, 2) float32."""
        return self.replica.evaluation.predictions(self.model, self.plan, self.worker_id, self.num_workers)

    def train(self) -> UpdateRows:
        """Train this worker's clients of the round; the rows are valid until the next call.

        Raises:
            TrainingError: naming worker, round and client, if a client's training fails.
        """
        clients = self.plan.clients_of(self.worker_id)
        sizes = [self.plan.row_values(self.model.shapes, client_id) for client_id in clients]
        is_pinned = self.model.device.type == "cuda"
        rows = self._rows = fitting_rows(self._rows, sizes, is_pinned=is_pinned)
        for index, client_id in enumerate(clients):
            try:
                self._train_one(client_id, rows, index)
            except Exception as error:
                raise TrainingError(
                    f"worker {self.worker_id} failed in round {self.plan.round_num} on client {client_id}: "
                    f"{type(error).__name__}: {error}"
                ) from error
        return rows

    def _train_one(self, client_id: int, rows: UpdateRows, index: int) -> None:
        started = time.perf_counter()
        examples = self._examples_of(client_id)
        values = rows.values(index)
        task, settings, memory = self.replica.task, self.replica.settings, self.replica.memory
        kept = memory.recall(self.plan, client_id)
        result = train_client(self.model, task, examples, settings, self.plan, client_id, values, kept)
        memory.keep(self.plan, client_id, result.memory)
        ClientUpdate(
            client_id=client_id,
            num_examples=len(examples),
            num_steps=result.num_steps,
            train_loss=result.train_loss,
            penalty=result.penalty,
            train_s=time.perf_counter() - started,
            is_finite=result.is_finite,
            values=values,
        ).write_header(rows, index, self.plan)


def serve(worker: Worker, transport: WorkerTransport) -> None:
    """Follow the server's plans until one says stop."""
    while True:
        plan, message = transport.receive()
        if plan.stops:
            return
        worker.receive(plan, message)
        if plan.evaluates:
            transport.submit_predictions(worker.predictions())
        if plan.cohort:
            transport.submit(worker.train())
