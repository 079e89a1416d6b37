"""A real exchange of two processes, and what MPI says of itself: run in children only."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from mpifedlora.transport.mpi.joining import connect
from mpifedlora.transport.mpi.server import MpiServer
from mpifedlora.transport.mpi.worker import MpiWorker

_SIDE = 512


def describe() -> None:
    """Print, as JSON, which MPI library mpi4py has loaded."""
    import mpi4py
    from mpi4py import MPI

    name, version = MPI.get_vendor()
    print(json.dumps(_answer(vendor=name, version=".".join(map(str, version)), mpi4py=mpi4py.__version__)))


def _answer(**values: Any) -> dict[str, Any]:
    from mpi4py import MPI

    return {
        "library": MPI.Get_library_version().split(",")[0].strip("\x00 \n"),
        "has_threads": MPI.Query_thread() == MPI.THREAD_MULTIPLE,
        **values,
    }


def exchange() -> None:
    """Send a message of the transport to each worker, and take their rows in; the server prints JSON.

    It ends with code 1 where the processes do not see each other, or other bytes arrive.

    Raises:
        SystemExit: with the code.
    """
    end = connect()
    if end is None:
        raise SystemExit("the processes do not see each other: each is alone")
    plan, shapes, wire = _federation(end.num_workers)
    end.open(shapes, end.num_workers, wire)
    if isinstance(end, MpiServer):
        raise SystemExit(_serve(end, plan, shapes, wire))
    _train(end, shapes, wire)


def _federation(num_workers: int) -> tuple[Any, Any, Any]:
    from mpifedlora.core.layout import LinearShape, ModelShapes
    from mpifedlora.core.plan import RoundPlan
    from mpifedlora.core.wire import WireFormat

    workers = tuple(range(num_workers))
    plan = RoundPlan(2, "annealing", "adapter", (_SIDE // 2,), (0,), workers, sends_state=True)
    return plan, ModelShapes((LinearShape("layer", _SIDE, _SIDE),), (), ()), WireFormat()


def _serve(end: MpiServer, plan: Any, shapes: Any, wire: Any) -> int:
    import torch

    message = wire.message_buffer(plan, shapes)
    values = wire.as_message(plan, shapes, message)
    values.copy_(torch.arange(len(values)))
    started = time.perf_counter()
    end.broadcast(plan, message, takes="rows")
    end.collect_headers(plan)
    rows = end.collect_rows(plan)
    seconds = time.perf_counter() - started
    is_right = all(torch.equal(row.view(torch.float32), values + 1) for row in rows)
    end.broadcast(plan.stopped(), message[:0])
    if is_right:
        size = 2 * message.nbytes * end.num_workers
        answer = _answer(seconds=seconds, num_bytes=size, survives=end.is_fault_tolerant)
        print(json.dumps(answer), flush=True)
    return 0 if is_right else 1


def _train(end: MpiWorker, shapes: Any, wire: Any) -> None:
    import torch

    from mpifedlora.core.wire import UpdateHeader, UpdateRows

    plan, message = end.receive()
    rows = UpdateRows([wire.row_bytes(plan, shapes)])
    rows.wire(0).view(torch.float32).copy_(wire.as_message(plan, shapes, message)).add_(1)
    UpdateHeader(end.worker_id, 1, 1, 0.0, 0.0, 0.0, is_finite=True).write(rows, 0, plan)
    end.submit(rows)
    end.receive()


if __name__ == "__main__":
    describe() if sys.argv[1:] == ["describe"] else exchange()
