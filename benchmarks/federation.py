"""Federations without models: clients send back what lies ready, so that only the package's own work is left.

The server is the package's. In one mpirun, groups of the first processes stand for smaller jobs, while the
others sleep.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mpifedlora.core.layout import LinearShape, ModelShapes, TensorShape
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.rounds import Coordinator
from mpifedlora.core.schedule import RankSchedule
from mpifedlora.core.switches import Switches
from mpifedlora.core.wire import SummedRows, UpdateHeader, UpdateRows, WireFormat

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpifedlora.runtime.server import Server
    from mpifedlora.transport.mpi import MpiServer, MpiWorker

LORA_RANK = 16
WIRE = WireFormat()
_PIECE_VALUES = 2**16  # 256 KiB, as a part of a pipeline is whole pieces
_FOREVER = 10**6  # rounds
_SLEEP_S = 5e-2  # seven sleepers that wake every 2 ms would be felt by the two that are timed


def flat_shapes(num_bytes: float) -> ModelShapes:
    """Return a model of about so many bytes of float32, in tensors of 256 KiB, all of it trained."""
    num_pieces, rest = divmod(int(num_bytes) // 64 * 16, _PIECE_VALUES)
    sizes = [_PIECE_VALUES] * num_pieces + [rest] * (rest > 0)
    body = tuple(TensorShape(f"weight{index}", (size,)) for index, size in enumerate(sizes))
    # The transport counts modules; one that nobody trains keeps their number from being 0.
    return ModelShapes((LinearShape("unused", 1, 1),), (), body)


def minilm_shapes() -> ModelShapes:
    """Return the linear layers of MiniLM: 2.65 MB of adapter at LoRA rank 16."""
    layer = [("attention", 384, 384)] * 4 + [("up", 1536, 384), ("down", 384, 1536)]
    return ModelShapes(tuple(LinearShape(*module) for _ in range(6) for module in layer), (), ())


def spread(num_clients: int, num_workers: int) -> tuple[int, ...]:
    """Return each client's worker: equal shares of neighbours."""
    return tuple(client_id * num_workers // num_clients for client_id in range(num_clients))


def make_switches(workers: Sequence[int], *, scope: str = "full", reduces: bool = False) -> Switches:
    """Return a method of weighted means over whole models (`full`), or of exact sums of products (`adapter`).

    Args:
        workers: by client id, who trains it in every round, or ABSENT.
        scope: `full` or `adapter`.
        reduces: whether the workers add up.
    """
    return Switches(
        schedule=RankSchedule("constant", _FOREVER, 0, 1, LORA_RANK, LORA_RANK),
        learning_rate=lambda round_num, scope: 0.1,
        choose_workers=lambda round_num, without: workers,
        initiating_scope=scope,
        scope=scope,
        reduces=reduces,
        wire=WIRE,
    )


def make_coordinator(shapes: ModelShapes, switches: Switches) -> Coordinator:
    """Return a coordinator whose state begins with small random values."""
    generator = torch.Generator().manual_seed(0)

    def initial_state(plan: RoundPlan) -> Tensor:
        return torch.empty(plan.layout(shapes).num_values).normal_(0, 0.02, generator=generator)

    return Coordinator(shapes, switches, initial_state, seed=0)


def make_server(
    coordinator: Coordinator, transport: MpiServer, *, pipeline: bool = True, part_bytes: int | None = None
) -> Server:
    """Return the package's server, with nothing to measure; `next` of its `rounds()` runs one round."""
    from mpifedlora.runtime.server import Server

    model = SimpleNamespace(receive=lambda plan, message: None)
    memory = SimpleNamespace(store=None)
    evaluation = SimpleNamespace(task=SimpleNamespace(metric_names=()))
    replica: Any = SimpleNamespace(model=model, evaluation=evaluation, held_out=None, memory=memory)
    return Server(
        coordinator,
        transport,
        replica,
        evaluate_every=_FOREVER,
        evaluates_on_workers=False,
        epsilon=lambda num_rounds: math.nan,
        warn=print,
        started=lambda plan: None,
        pipeline=pipeline,
        part_bytes=part_bytes,
    )


class PlayedWorker:
    """A worker whose clients send the same values in every round.

    Args:
        transport: this end, opened.
        shapes: of the model.
        train: what a client does instead of training.
    """

    def __init__(
        self, transport: MpiWorker, shapes: ModelShapes, train: Callable[[], object] = lambda: None
    ) -> None:
        self.transport, self.shapes, self.train = transport, shapes, train
        self._rows: UpdateRows | None = None

    def round(self) -> None:
        """Take part in one round."""
        plan, _ = self.transport.receive()
        self.transport.submit(self.rows(plan))

    def rows(self, plan: RoundPlan) -> UpdateRows:
        """Return what this worker's clients send."""
        clients = plan.clients_of(self.transport.worker_id)
        rows = self._rows = self._make(plan, clients) if self._rows is None else self._rows
        if plan.reduces:
            rows.total.zero_()
        for index, client_id in enumerate(clients):
            started = time.perf_counter()
            self.train()
            header = UpdateHeader(client_id, 10 + client_id, 1, 0.5, 0.0, time.perf_counter() - started, True)
            header.write(rows, index, plan)
            rows.close(index, header.num_examples)
        return rows

    def _make(self, plan: RoundPlan, clients: Sequence[int]) -> UpdateRows:
        sizes = [WIRE.row_bytes(plan, self.shapes, client_id) for client_id in clients]
        if plan.reduces:
            num_values = plan.shared_layout(self.shapes).num_values
            rows: UpdateRows = SummedRows(sizes, num_values, "float32")
        else:
            rows = UpdateRows(sizes)
        for index, client_id in enumerate(clients):
            fill(rows.wire(index).view(torch.float32), client_id)
        return rows


def fill(values: Tensor, client_id: int) -> Tensor:
    """Overwrite (num_values,) with a client's values."""
    return values.normal_(0, 0.02, generator=torch.Generator().manual_seed(client_id))


def written(*shape: int) -> Tensor:
    """Return float32 of a shape for bare MPI calls, as fast as there is.

    It lies on huge pages, which numpy asks for and torch does not, and has been written: zeros that never
    were are one page, which stays in cache.
    """
    return torch.from_numpy(np.ones(shape, np.float32))


def groups(world: MPI.Comm, sizes: Sequence[int]) -> Iterator[tuple[int, MPI.Comm | None]]:
    """Give each size with a communicator of so many processes, or None for those that are not in it.

    Every process must go through all sizes; it sleeps until the others have finished one.
    """
    from mpi4py import MPI

    for size in sizes:
        comm = world.Split(0 if world.rank < size else MPI.UNDEFINED)
        is_in = comm != MPI.COMM_NULL
        yield size, comm if is_in else None
        if is_in:
            comm.Free()
        sleepy_barrier(world)


def sleepy_barrier(comm: MPI.Comm, sleep_s: float = _SLEEP_S) -> None:
    """Wait for each other without using the cores."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(sleep_s)


def is_crowded(comm: MPI.Comm) -> bool:
    """Say whether processes of a communicator share a core somewhere; every process calls it."""
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    crowded: bool = comm.allreduce(node.size > (os.cpu_count() or 1), MPI.LOR)
    node.Free()
    return crowded


def num_nodes(comm: MPI.Comm) -> int:
    """Return the number of nodes of a communicator's processes; every process calls it."""
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    total: int = comm.allreduce(int(node.rank == 0), MPI.SUM)
    node.Free()
    return total
