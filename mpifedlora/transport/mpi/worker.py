"""A worker's end of the MPI transport."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mpifedlora.core.buffers import UNIT_BYTES, as_bytes, padded
from mpifedlora.transport.base import ORDER_BYTES, NodePlace
from mpifedlora.transport.mpi.endpoint import Endpoint, Order, pieces_of
from mpifedlora.transport.mpi.survival import survivable
from mpifedlora.transport.mpi.waiting import wait, wait_busily

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch import Tensor

    from mpifedlora.core.agreement import Bytes
    from mpifedlora.core.parts import Span
    from mpifedlora.core.plan import RoundPlan
    from mpifedlora.core.wire import UpdateRows


class _Message(NamedTuple):
    """Where a message comes in, and the same as MPI is given it."""

    wire: Tensor
    bytes: Bytes


class MpiWorker(Endpoint):
    """A worker's end, MPI rank worker_id + 1."""

    is_server = False

    def __init__(self, comm: MPI.Comm, place: NodePlace) -> None:
        super().__init__(comm, place)
        self.worker_id = comm.rank - 1
        self._message: _Message | None = None
        self._spare: _Message | None = None
        self._plan: RoundPlan | None = None
        self._then = Order.NONE  # what the last order has announced
        self._ahead: tuple[RoundPlan, _Message] | None = None  # what a stream has brought

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
            message = self._fitting(plan, self._message)
            if len(message.bytes):
                self._broadcast_whole(message.bytes)
            self._ahead = plan, message
        (self._plan, message), self._ahead = self._ahead, None
        if message is not self._message:
            self._spare, self._message = self._message, message
        return self._plan, message.wire

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

    def _fitting(self, plan: RoundPlan, message: _Message | None) -> _Message:
        """Return a place for a plan's message: the given one, if it has the size."""
        if message is not None and len(message.bytes) == padded(self.wire.message_bytes(plan, self.shapes)):
            return message
        wire = self.wire.message_buffer(plan, self.shapes, is_pinned=self.is_pinned)
        return _Message(wire, as_bytes(wire))

    @survivable
    def submit_predictions(self, predictions: Tensor) -> None:
        """Send what this worker has measured, two-dimensional."""
        wait(self._begun(self.comm.Ibarrier()))
        self.comm.Gatherv([as_bytes(predictions), self._mpi.BYTE], None)

    @survivable
    def submit(self, rows: UpdateRows) -> None:
        """Send the rows of this worker's clients, in rising order of client_id, as the server wants them."""
        headers = self._begun(self.comm.Igatherv([rows.headers, self._mpi.BYTE], None))
        if self._then is Order.ROWS:
            wait(self._gather_rows(rows), len(rows.bytes))
            headers.Wait()
            return
        assert self._plan is not None
        ahead = self._gather_first(rows, self._uplink_spans(self._plan)) if self._then is Order.STREAM else []
        order, following = self._order(Order.ROWS, Order.SUM, Order.STREAM)
        headers.Wait()
        while order is Order.STREAM and following is not None:
            received = self._stream(rows, following, ahead)
            ahead = []
            order, following = self._order(Order.COMMIT, Order.STREAM)
            if order is Order.COMMIT:
                self._ahead = received
        if order is Order.ROWS:
            wait_busily([*ahead, self._gather_rows(rows)])
        if order is Order.SUM:
            for piece in pieces_of(rows.total.numpy()):
                self.comm.Reduce(piece, None)

    def _stream(
        self, rows: UpdateRows, following: RoundPlan, ahead: list[MPI.Request]
    ) -> tuple[RoundPlan, _Message]:
        from mpifedlora.core.parts import IN_FLIGHT

        assert self._plan is not None
        # The message in hand counts until the stream is committed.
        message, parts = self._fitting(following, self._spare), self._parts(self._plan, following)
        # The same calls in the same order as on the server; both ends' buffers are whole all the time.
        spans = [part.uplink for part in parts]
        requests = ahead or self._gather_first(rows, spans)
        for index, part in enumerate(parts):
            requests += self._broadcast_part(part, message.bytes)
            requests += [self._gather_part(rows, later) for later in spans[index + IN_FLIGHT :][:1]]
        # The server adds up meanwhile, on a core that this process may share.
        wait_busily(requests, gives_way=self.place.num_sharing_cores > self.place.num_cores)
        return following, message

    def _gather_rows(self, rows: UpdateRows) -> MPI.Request:
        rows.settle(len(rows.bytes))
        return self._begun(self.comm.Igatherv(self._units(rows.bytes), None))

    def _gather_first(self, rows: UpdateRows, spans: Sequence[Span]) -> list[MPI.Request]:
        from mpifedlora.core.parts import IN_FLIGHT

        return [self._gather_part(rows, span) for span in spans[:IN_FLIGHT]]

    def _gather_part(self, rows: UpdateRows, span: Span) -> MPI.Request:
        rows.settle(span.stop)
        if len(rows) <= 1:
            piece = rows.bytes[span.start : span.stop]
            return self._begun(self.comm.Igatherv(self._units(piece), None))
        stride = padded(rows.sizes[0]) // UNIT_BYTES
        strided = self._unit.Create_vector(len(rows), span.size // UNIT_BYTES, stride).Commit()
        request = self._begun(self.comm.Igatherv([rows.bytes[span.start :], 1, strided], None))
        strided.Free()  # MPI keeps it until the request is done
        return request
