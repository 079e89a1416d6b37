"""The worker: it trains its clients of each round, one after another."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mpifedlora.core.lateness import staleness_weight, without_progress
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.wire import (
    FAILED,
    LATE,
    POSTPONED,
    SummedRows,
    UpdateHeader,
    UpdateRows,
    WireFormat,
    broadcast_values,
    fitting_rows,
)
from mpifedlora.errors import TrainingError, WorkerLost
from mpifedlora.runtime.setup import Replica
from mpifedlora.training.local import DeadlinePassed, train_client
from mpifedlora.transport.base import WorkerTransport


class Worker:
    """Trains the clients that a plan gives it.

    Args:
        worker_id: 0..num_workers-1.
        num_workers: processes that train.
        replica: this process's copy of model and data.
        wire: what messages and updates are sent as.
        reduce_dtype: what updates are added up in, where the plan says that they are.
        counts_examples: whether a client counts by its examples then, else all count the same.
        late_exponent: of the weight of an update that comes late.
        is_direct: whether MPI sends updates out of GPU memory.
        round_deadline_s: seconds that it has for its clients of a round; None is as long as it takes.
    """

    def __init__(
        self,
        worker_id: int,
        num_workers: int,
        replica: Replica,
        wire: WireFormat,
        *,
        reduce_dtype: str = "float32",
        counts_examples: bool = True,
        late_exponent: float = 0.0,
        is_direct: bool = False,
        round_deadline_s: float | None = None,
    ) -> None:
        self.worker_id = worker_id
        self.num_workers = num_workers
        self.replica = replica
        self.model = replica.model
        self._examples_of = replica.examples_of()
        self.wire, self.reduce_dtype, self.counts_examples = wire, reduce_dtype, counts_examples
        self.late_exponent = late_exponent
        self.is_direct = is_direct
        self.round_deadline_s = math.inf if round_deadline_s is None else round_deadline_s
        self._rows: UpdateRows | None = None
        self._plan: RoundPlan | None = None

    def receive(self, plan: RoundPlan, wire: Tensor) -> None:
        """Take a plan and the bytes of its message, or only the plan where the message is here already."""
        # Sent again after a worker was lost: what is frozen may be added to the base weights only once.
        if self._plan is None or self._plan.round_num != plan.round_num:
            self.model.receive(plan, self.wire.decode_message(plan, self.model.shapes, wire))
        self._plan = plan

    @property
    def plan(self) -> RoundPlan:
        """The plan of the round in hand."""
        assert self._plan is not None, "a round begins with receive()"
        return self._plan

    def predictions(self) -> Tensor:
        """Measure this worker's part: the statistics of examples, or the metrics of clients."""
        return self.replica.evaluation.predictions(self.model, self.plan, self.worker_id, self.num_workers)

    def train(self) -> UpdateRows:
        """Train this worker's clients of the round; the rows are valid until the next call.

        A client's failure is data: whatever exception its turn raises, its row becomes zeros, its header
        says so, and the next client has its turn. So it is with clients that the deadline finds in
        training or still waiting.

        Raises:
            TrainingError: naming worker, round and client, if this process cannot go on after a failure.
        """
        started = time.perf_counter()
        clients = self.plan.clients_of(self.worker_id)
        rows = self._rows = self._fitting_rows(clients)
        for index, client_id in enumerate(clients):
            begun = time.perf_counter()
            fault = self._attempt(client_id, rows, index, started + self.round_deadline_s)
            if fault:
                self._give_up(client_id, rows, index, fault, begun)
        return rows

    def _attempt(self, client_id: int, rows: UpdateRows, index: int, deadline: float) -> str:
        """Train one client, and return its fault; once this has returned, nothing holds its memory."""
        try:
            return self._train_one(client_id, rows, index, lambda: time.perf_counter() > deadline)
        except Exception as error:
            sys.stderr.write(self._told(client_id, error).splitlines()[0] + "\n")
            return FAILED

    def _give_up(self, client_id: int, rows: UpdateRows, index: int, fault: str, begun: float) -> None:
        try:
            if self.model.device.type == "cuda":
                torch.cuda.empty_cache()
            rows.settle(rows.sizes[index])  # else a copy under way would come after the zeros
            rows.wire(index).zero_()
        # What a client broke beyond its own turn, as a failed GPU kernel does.
        except Exception as error:
            raise TrainingError(self._told(client_id, error)) from error
        train_s = time.perf_counter() - begun
        UpdateHeader(client_id, 0, 0, math.nan, math.nan, train_s, is_finite=False, fault=fault).write(
            rows, index, self.plan
        )
        rows.close(index, 0)

    def _told(self, client_id: int, error: Exception) -> str:
        return (
            f"worker {self.worker_id} failed in round {self.plan.round_num} on client {client_id}: "
            f"{type(error).__name__}: {error}"
        )

    def _fitting_rows(self, clients: Sequence[int]) -> UpdateRows:
        plan, shapes = self.plan, self.model.shapes
        sizes = [self.wire.row_bytes(plan, shapes, client_id) for client_id in clients]
        is_pinned = self.model.device.type == "cuda" and not self.is_direct
        if plan.reduces:
            num_values = plan.shared_layout(shapes).num_values
            return SummedRows(sizes, num_values, self.reduce_dtype, is_pinned=is_pinned)
        is_direct = self.is_direct and self.wire.uplink == "float32"
        device = str(self.model.device) if is_direct else "cpu"
        return fitting_rows(self._rows, sizes, device=device, is_pinned=is_pinned)

    def _postpone(self, client_id: int, passed: DeadlinePassed, kept: Mapping[str, Tensor]) -> str:
        """Keep how far a late client has come, if it may go on in its next round."""
        if passed.progress is None:
            return LATE
        self.replica.memory.keep(self.plan, client_id, without_progress(kept) | passed.progress.pack())
        return POSTPONED

    def _train_one(self, client_id: int, rows: UpdateRows, index: int, is_late: Callable[[], bool]) -> str:
        """Train one client into its row; return why there is nothing in it, or ""."""
        started = time.perf_counter()
        examples, row = self._examples_of(client_id), rows.wire(index)
        values = self._values(client_id, row)
        task, settings, memory = self.replica.task, self.replica.settings, self.replica.memory
        kept = memory.recall(self.plan, client_id)
        try:
            result = train_client(
                self.model, task, examples, settings, self.plan, client_id, values, kept, is_late
            )
        except DeadlinePassed as passed:
            return self._postpone(client_id, passed, kept)
        keeps = result.memory
        if self.wire.uplink != "float32":
            keeps |= self._encode(client_id, values, row, kept)
        elif values.data_ptr() != row.data_ptr():
            rows.fill(index, values)
        memory.keep(self.plan, client_id, keeps)
        UpdateHeader(
            client_id=client_id,
            num_examples=len(examples),
            num_steps=result.num_steps,
            train_loss=result.train_loss,
            penalty=result.penalty,
            train_s=time.perf_counter() - started,
            is_finite=result.is_finite,
            staleness=result.staleness,
        ).write(rows, index, self.plan)
        count = len(examples) if self.counts_examples else 1
        rows.close(index, count * staleness_weight(result.staleness, self.late_exponent))
        return ""

    def _values(self, client_id: int, row: Tensor) -> Tensor:
        """Return where a client's values are trained: in its row, if that is what is sent of them."""
        num_values = self.plan.row_values(self.model.shapes, client_id)
        if self.wire.uplink != "float32":
            return torch.empty(num_values)
        is_here = row.device == self.model.device
        return row.view(torch.float32) if is_here else torch.empty(num_values, device=self.model.device)

    def lose(self, lost: Sequence[int], worker_id: int, num_workers: int) -> None:
        """Go on without some workers, by another number among those left.

        Args:
            lost: numbers of the workers that have died, of those before.
            worker_id: of this one now.
            num_workers: that are left.
        """
        self.worker_id, self.num_workers = worker_id, num_workers
        self.replica.evaluation.lose(lost, num_workers)

    def _encode(
        self, client_id: int, values: Tensor, row: Tensor, kept: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        plan, shapes = self.plan, self.model.shapes
        change = values.sub_(broadcast_values(plan, shapes, self.model.state, client_id))
        lost = kept.get("lost")
        if lost is not None and lost.numel() == change.numel():  # a cut begins anew
            change.add_(lost)
        layout = plan.shared_layout(shapes, client_id)
        self.wire.encode_update(layout, change, row, plan.round_num, client_id)
        return {"lost": change} if self.wire.feeds_back else {}


def serve(worker: Worker, transport: WorkerTransport) -> None:
    """Follow the server's plans until one says stop, also where other workers die.

    Raises:
        RunLost: if the server has died.
    """
    while True:
        try:
            if _follow(worker, transport):
                return
        except WorkerLost:
            lost = transport.repair()
            worker.lose(lost, transport.worker_id, transport.num_workers)


def _follow(worker: Worker, transport: WorkerTransport) -> bool:
    """Do what the next plan says; return whether it says stop."""
    plan, wire = transport.receive()
    if plan.stops:
        return True
    worker.receive(plan, wire)
    if plan.evaluates:
        transport.submit_predictions(worker.predictions())
    if plan.cohort:
        transport.submit(worker.train())
    return False
