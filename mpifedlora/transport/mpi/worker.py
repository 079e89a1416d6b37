"""A worker's end of the MPI transport."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mpifedlora.transport.base import ORDER_BYTES, NodePlace
from mpifedlora.transport.mpi.endpoint import Endpoint, Order, as_bytes, pieces_of
from mpifedlora.transport.mpi.survival import survivable
from mpifedlora.transport.mpi.waiting import wait, wait_busily

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch import Tensor

    from mpifedlora.core.parts import Part
    from mpifedlora.core.plan import RoundPlan
    from mpifedlora.core.wire import UpdateRows


class MpiWorker(Endpoint):
    """A worker's end, MPI rank worker_id + 1."""

    is_server = False

    def __init__(self, comm: MPI.Comm, place: NodePlace) -> None:
        super().__init__(comm, place)
        self.worker_id = comm.rank - 1
        self._message: Tensor | None = None
        self._spare: Tensor | None = None
        self._plan: RoundPlan | None = None
        self._then = Order.NONE  # what the last order has announced
        self._ahead: tuple[RoundPlan, Tensor] | None = None  # what a stream has brought

    @survivable
    def receive(self) -> tuple[RoundPlan, Tensor]:
        """Wait for the next plan and its message's bytes, which hold until the next receive."""
        received = self._received()
        while received[0].stops and not self._may_leave():
            received = self._received()
        return received

    def _may_leave(self) -> bool:
        if self._may_part():
            return True
        self._forget()
        self._rebuild()
        return False

    def _received(self) -> tuple[RoundPlan, Tensor]:
        if self._ahead is None:
            _, plan = self._order(Order.MESSAGE)
            assert plan is not None
            # The round that the message in hand began is over: the next may lie where it lay.
            buffer = self._fitting(plan, self._message)
            if buffer.numel():
                self.comm.Bcast(self._units(as_bytes(buffer)))
            self._ahead = plan, buffer
        (self._plan, buffer), self._ahead = self._ahead, None
        if buffer is not self._message:
            self._spare, self._message = self._message, buffer
        return self._plan, buffer

    def _rebuild(self) -> list[int]:
        lost = super()._rebuild()
        self.worker_id = self.comm.rank - 1
        return lost

    def _forget(self) -> list[Any]:
        # What a stream has brought does not count. The model may still look into the message in hand: new
        # ones go to new buffers.
        kept = [self._spare, self._message, self._ahead]
        self._spare = self._message = self._ahead = None
        return kept

    def _order(self, *expected: Order) -> tuple[Order, RoundPlan | None]:
        from mpifedlora.core.plan import RoundPlan

        record = np.empty(self.order_bytes, np.uint8)
        wait(self._begun(self.comm.Ibcast([record, self._mpi.BYTE])))
        order, self._then = Order(int(record[0])), Order(int(record[1]))
        assert order in expected, f"got the order {order.name}"
        has_plan = order in (Order.MESSAGE, Order.STREAM)
        return order, RoundPlan.unpack(record[ORDER_BYTES:], len(self.shapes.modules)) if has_plan else None

    def _fitting(self, plan: RoundPlan, buffer: Tensor | None) -> Tensor:
        """Return a buffer for a plan's message: the given one, if it has the size."""
        from mpifedlora.core.buffers import padded

        if buffer is not None and buffer.numel() == padded(self.wire.message_bytes(plan, self.shapes)):
            return buffer
        return self.wire.message_buffer(plan, self.shapes, is_pinned=self.is_pinned)

    @survivable
    def submit_predictions(self, predictions: Tensor) -> None:
        """Send what this worker has measured, two-dimensional."""
        wait(self._begun(self.comm.Ibarrier()))
        self.comm.Gatherv([as_bytes(predictions), self._mpi.BYTE], None)

    @survivable
    def submit(self, rows: UpdateRows) -> None:
        """Send the rows of this worker's clients, in rising order of client_id, as the server wants them."""
        headers = self._begun(self.comm.Igatherv([rows.headers.reshape(-1), self._mpi.BYTE], None))
        if self._then is Order.ROWS:
            wait(self._gather_rows(rows))
            headers.Wait()
            return
        order, following = self._order(Order.ROWS, Order.SUM, Order.STREAM)
        headers.Wait()
        while order is Order.STREAM and following is not None:
            received = self._stream(rows, following)
            order, following = self._order(Order.COMMIT, Order.STREAM)
            if order is Order.COMMIT:
                self._ahead = received
        if order is Order.ROWS:
            wait_busily([self._gather_rows(rows)])
        if order is Order.SUM:
            for piece in pieces_of(rows.total.numpy()):
                self.comm.Reduce(piece, None)

    def _stream(self, rows: UpdateRows, following: RoundPlan) -> tuple[RoundPlan, Tensor]:
        from mpifedlora.core.parts import IN_FLIGHT

        assert self._plan is not None
        # The message in hand counts until the stream is committed.
        buffer, parts = self._fitting(following, self._spare), self._parts(self._plan, following)
        # The same calls in the same order as on the server; both ends' buffers are whole all the time.
        requests = [self._gather_part(rows, part) for part in parts[:IN_FLIGHT]]
        for index, part in enumerate(parts):
            requests += self._broadcast_part(part, as_bytes(buffer))
            requests += [self._gather_part(rows, later) for later in parts[index + IN_FLIGHT :][:1]]
        wait_busily(requests)
        return following, buffer

    def _gather_rows(self, rows: UpdateRows) -> MPI.Request:
        rows.settle(rows.buffer.numel())
        return self._begun(self.comm.Igatherv(self._units(as_bytes(rows.buffer)), None))

    def _gather_part(self, rows: UpdateRows, part: Part) -> MPI.Request:
        from mpifedlora.core.buffers import UNIT_BYTES, padded

        rows.settle(part.uplink.stop)
        if len(rows) <= 1:
            span = as_bytes(rows.buffer)[part.uplink.start : part.uplink.stop]
            return self._begun(self.comm.Igatherv(self._units(span), None))
        stride = padded(rows.sizes[0]) // UNIT_BYTES
        strided = self._unit.Create_vector(len(rows), part.uplink.size // UNIT_BYTES, stride).Commit()
        request = self._begun(
            self.comm.Igatherv([as_bytes(rows.buffer)[part.uplink.start :], 1, strided], None)
        )
        strided.Free()  # MPI keeps it until the request is done
        return request
