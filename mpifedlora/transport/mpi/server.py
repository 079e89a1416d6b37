"""The server's end of the MPI transport."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mpifedlora.core.buffers import UNIT_BYTES, as_bytes, byte_buffer, padded
from mpifedlora.errors import RunLost
from mpifedlora.transport.base import ORDER_BYTES, NodePlace, Takes
from mpifedlora.transport.mpi.endpoint import Endpoint, Order, pieces_of
from mpifedlora.transport.mpi.survival import survivable
from mpifedlora.transport.mpi.waiting import wait, wait_busily

if TYPE_CHECKING:
    from mpi4py import MPI
    from torch import Tensor

    from mpifedlora.core.parts import Span
    from mpifedlora.core.plan import RoundPlan
    from mpifedlora.core.streaming import RoundStream
    from mpifedlora.core.wire import UpdateHeader


class MpiServer(Endpoint):
    """The server's end, MPI rank 0."""

    is_server = True
    can_stream = True

    def __init__(self, comm: MPI.Comm, place: NodePlace) -> None:
        super().__init__(comm, place)
        self.bytes_crossed = 0
        self._ahead_bytes = 0  # of the next message, which a stream has sent already
        self._buffer: Tensor | None = None
        self._cohort = _Cohort((), ())  # of the round in hand
        self._sizes: list[int] = []  # bytes of each of its rows
        self._headers = np.zeros((0, 0), np.uint8)
        self._landing: _Landing | None = None
        self._then = Order.NONE  # what the last order has announced
        self._ahead: deque[MPI.Request] = deque()  # first parts of a round, before the order for them

    @survivable
    def broadcast(self, plan: RoundPlan, wire: Tensor, *, takes: Takes = "") -> None:
        """Send a plan and its message, whole units of bytes, to every worker."""
        if plan.stops:
            return self._dismiss(plan)
        self._order(Order.MESSAGE, plan, _announcement(plan, takes))
        if wire.numel():
            from mpifedlora.core.buffers import as_bytes

            self.bytes_crossed += self.num_workers * wire.nbytes
            self._broadcast_whole(as_bytes(wire))
        self._make_ready(plan)  # while the workers train

    def _dismiss(self, plan: RoundPlan, *, is_told: bool = False) -> None:
        """Tell everybody who lives that the run is over, and wait until they know."""
        while True:
            if not is_told:
                self._try_order(Order.MESSAGE, plan)
            if self._may_part():
                return
            try:
                self._rebuild()
            except RunLost:
                return
            is_told = False

    def _try_order(self, order: Order, plan: RoundPlan | None = None, then: Order = Order.NONE) -> None:
        """Send an order, and leave it to the next step to say that not everybody may have got it."""
        try:
            self._order(order, plan, then)
        except self._mpi.Exception:
            if not self.is_fault_tolerant:
                raise
            self.comm.Revoke()

    def _order(self, order: Order, plan: RoundPlan | None = None, then: Order = Order.NONE) -> None:
        record = bytearray(self.order_bytes)
        record[0], record[1] = order, then
        self._then = then
        if plan is not None:
            record[ORDER_BYTES:] = plan.pack().data
        self.bytes_crossed += self.num_workers * len(record)
        wait(self._begun(self.comm.Ibcast([record, self._mpi.BYTE])))

    @survivable
    def collect_predictions(
        self, counts: Sequence[int], width: int = 2, dtype: str = "float32"
    ) -> list[Tensor]:
        """Gather what each worker has measured, (counts[worker_id], width)."""
        import torch

        received = torch.empty(sum(counts), width, dtype=getattr(torch, dtype))
        self.bytes_crossed += received.nbytes
        wait(self._begun(self.comm.Ibarrier()))
        sizes = [0, *(received.itemsize * width * count for count in counts)]
        self.comm.Gatherv(self._mpi.IN_PLACE, [as_bytes(received), sizes, None, self._mpi.BYTE])
        return list(torch.split(received, list(counts)))

    def _make_ready(self, plan: RoundPlan) -> None:
        if self._then is not Order.NONE:
            self._expect(plan)
        if self._then is Order.ROWS:
            self._land()

    def _expect(self, plan: RoundPlan) -> None:
        """Make ready what the headers of a round come into."""
        from mpifedlora.core.plan import HEADER_BYTES

        self._cohort = _Cohort.of(plan.workers, self.num_workers)
        self._sizes = self._row_bytes(plan)
        if len(self._headers) != len(self._cohort.clients):
            self._headers = np.zeros((len(self._cohort.clients), HEADER_BYTES), np.uint8)

    def _land(self) -> _Landing:
        """Make ready what the rows of a round come into; the same as last time, where it fits."""
        landing = self._landing
        if landing is None or landing.sizes != self._sizes or landing.counts != self._cohort.counts:
            self._landing = landing = self._new_landing(self._sizes)
        return landing

    def _new_landing(self, sizes: list[int]) -> _Landing:
        import torch

        strides = [padded(size) for size in sizes]
        following = iter(strides)
        by_worker = [sum(islice(following, count)) for count in self._cohort.counts]
        buffer = self._fitting(sum(strides))
        rows = torch.split(buffer, strides)
        views = [row[:size] for row, size in zip(rows, sizes, strict=True)]
        return _Landing(sizes, self._cohort.counts, views, self._target(by_worker, buffer), sum(strides))

    @survivable
    def collect_headers(self, plan: RoundPlan) -> list[UpdateHeader]:
        """Wait until all workers have trained; return their clients' headers, by worker and client."""
        from mpifedlora.core.wire import read_headers

        self.bytes_crossed += self._ahead_bytes
        self._ahead_bytes = 0
        if not plan.cohort:
            return []
        if self._then is Order.NONE:
            self._expect(plan)
        clients, headers = self._cohort.clients, self._headers
        self.bytes_crossed += headers.nbytes
        sizes = [0, *(headers.shape[1] * count for count in self._cohort.counts)]
        trained = self._begun(self.comm.Igatherv(self._mpi.IN_PLACE, [headers, sizes, None, self._mpi.BYTE]))
        if self._then is Order.ROWS:
            self._begun(self.comm.Igatherv(*self._land().target))
        if self._then is Order.STREAM:
            self._ahead = self._gather_first(self._uplink_spans(plan))
        wait(trained)
        return read_headers(headers, plan, clients, self._sizes)

    def _row_bytes(self, plan: RoundPlan) -> list[int]:
        clients = self._cohort.clients
        if plan.client_ranks:
            return [self.wire.row_bytes(plan, self.shapes, client_id) for client_id in clients]
        return [self.wire.row_bytes(plan, self.shapes)] * len(clients)

    @survivable
    def collect_rows(self, plan: RoundPlan) -> list[Tensor]:
        """Return the bytes of every row, in the order of the headers; they hold until the next collect."""
        if self._ahead:
            self._let_in(plan)
        landing = self._land()
        if self._then is not Order.ROWS:
            self._order(Order.ROWS)
            self._begun(self.comm.Igatherv(*landing.target))
        wait_busily(self._requests)
        self.bytes_crossed += landing.num_bytes
        return landing.rows

    def _let_in(self, plan: RoundPlan) -> None:
        """Wait for the first parts that were announced: they come in where the rows will."""
        spans = self._uplink_spans(plan)[: len(self._ahead)]
        self.bytes_crossed += len(self._cohort.clients) * sum(span.size for span in spans)
        wait_busily(self._ahead)
        self._ahead.clear()

    def _fitting(self, size: int) -> Tensor:
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer, self._landing = byte_buffer(size), None
        return self._buffer[:size]

    def _target(self, counts: Sequence[int], buffer: Tensor) -> tuple[Any, list[Any]]:
        units = [0, *(count // UNIT_BYTES for count in counts)]
        return self._mpi.IN_PLACE, [as_bytes(buffer), units, None, self._unit]

    @survivable
    def collect_sum(self, total: Tensor) -> None:
        """Add up what the workers have summed into `total` (row values,) float32 or float64."""
        self._order(Order.SUM)
        self.bytes_crossed += self.num_workers * total.nbytes
        for piece in pieces_of(total.zero_().numpy()):
            self.comm.Reduce(self._mpi.IN_PLACE, piece)

    @survivable
    def stream(self, plan: RoundPlan, stream: RoundStream, *, takes: Takes = "") -> float:
        """Take in a round part by part, while what is aggregated goes out; return the seconds aggregated.

        The workers keep what they have received only if no update was refused.
        """
        before = self.bytes_crossed
        self._order(Order.STREAM, stream.announced)
        parts, clients = stream.parts, self._cohort.clients
        spans = [part.uplink for part in parts]
        buffers = self._part_buffers(spans)
        gathers, self._ahead = self._ahead or self._gather_first(spans), deque()
        message = as_bytes(stream.wire)
        broadcasts: list[MPI.Request] = []
        aggregate_s = 0.0
        for index, part in enumerate(parts):
            gathers.popleft().Wait()
            buffer = buffers[index % len(buffers)]
            started = time.perf_counter()
            rows = buffer[: len(clients) * part.uplink.size].view(len(clients), part.uplink.size)
            stream.take(part, dict(zip(clients, rows, strict=True)), partial(_poke, gathers))
            aggregate_s += time.perf_counter() - started
            broadcasts += self._broadcast_part(part, message)
            if index + len(buffers) < len(parts):
                gathers.append(self._gather_part(spans[index + len(buffers)], buffer))
        self._mpi.Request.Waitall(broadcasts)
        self._end_stream(stream, takes, before)
        return aggregate_s

    def _end_stream(self, stream: RoundStream, takes: Takes, before: int) -> None:
        sent = self.num_workers * sum(span.size for part in stream.parts for span in part.downlink)
        ahead = self.bytes_crossed - before + sent  # the order is the next round's too
        num_clients = len(self._cohort.clients)
        self.bytes_crossed = before + num_clients * sum(part.uplink.size for part in stream.parts)
        if stream.refused or not stream.announced.cohort:  # then no round comes that counts it
            self.bytes_crossed += ahead
        else:
            self._ahead_bytes += ahead
        if stream.refused:
            return
        # From here on the round holds, also where some do not hear of it: they get the next plan again.
        self._try_order(Order.COMMIT, then=_announcement(stream.announced, takes))
        if stream.announced.stops:
            self._dismiss(stream.announced, is_told=True)
        else:
            self._make_ready(stream.announced)

    def _forget(self) -> list[Any]:
        self.bytes_crossed += self._ahead_bytes
        self._ahead_bytes = 0
        self._ahead.clear()
        kept = [self._headers, self._buffer]
        self._headers, self._buffer, self._landing = np.zeros((0, 0), np.uint8), None, None
        return kept

    def _part_buffers(self, spans: Sequence[Span]) -> list[Tensor]:
        from mpifedlora.core.parts import IN_FLIGHT

        depth = min(IN_FLIGHT, len(spans))
        size = len(self._cohort.clients) * max(span.size for span in spans)
        whole = self._fitting(depth * size)
        return [whole[index * size : (index + 1) * size] for index in range(depth)]

    def _gather_first(self, spans: Sequence[Span]) -> deque[MPI.Request]:
        return deque(map(self._gather_part, spans, self._part_buffers(spans)))

    def _gather_part(self, span: Span, buffer: Tensor) -> MPI.Request:
        counts = [count * span.size for count in self._cohort.counts]
        return self._begun(self.comm.Igatherv(*self._target(counts, buffer)))


class _Landing(NamedTuple):
    """Where the rows of a round come in.

    Args:
        sizes: bytes of each row.
        counts: how many rows each worker has.
        rows: views of each.
        target: what a gather is given.
        num_bytes: that cross, of all rows.
    """

    sizes: list[int]
    counts: tuple[int, ...]
    rows: list[Tensor]
    target: tuple[Any, list[Any]]
    num_bytes: int


class _Cohort(NamedTuple):
    """Who trains in a round: clients by worker and id, and how many each worker has."""

    clients: tuple[int, ...]
    counts: tuple[int, ...]

    @staticmethod
    @lru_cache(maxsize=2)
    def of(workers: tuple[int, ...], num_workers: int) -> _Cohort:
        """Return the cohort of a plan's workers, by client id."""
        from mpifedlora.core.plan import ABSENT

        cohort = (client for client, worker_id in enumerate(workers) if worker_id != ABSENT)
        clients = sorted(cohort, key=workers.__getitem__)  # stable: by client within a worker
        counts = Counter(workers)
        return _Cohort(tuple(clients), tuple(counts[worker_id] for worker_id in range(num_workers)))


def _announcement(plan: RoundPlan, takes: Takes) -> Order:
    if plan.stops or not plan.cohort:
        return Order.NONE
    return {"": Order.NONE, "rows": Order.ROWS, "parts": Order.STREAM}[takes]


def _poke(requests: Sequence[MPI.Request]) -> None:
    # Testing one request lets all of them go on.
    if requests:
        requests[0].Test()
