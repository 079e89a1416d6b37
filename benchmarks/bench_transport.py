"""Compare the transport with bare MPI calls on arrays made before, same bytes, in turn in one run.

    benchmarks/run.sh bench_transport.py 8 --json benchmarks/results/bench_transport.json

- `broadcast + collect`: the package's plan, message, headers and rows against one Bcast and one Gather.
- `pipeline`: rows in, mean, next message out, part by part, against Gather, the same mean, and Bcast.

Both ends of the second give the same bits, which is checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import common
import federation
import torch
from mpi4py import MPI

from mpifedlora.core.aggregation import normalise, weighted_mean
from mpifedlora.transport import mpi

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from mpifedlora.core.layout import ModelShapes
    from mpifedlora.core.wire import UpdateHeader
    from mpifedlora.transport.mpi import MpiServer

# Megabytes, and turns with each set of buffers. Where buffers lie changes the ratio of 61 turns by up to 0.1.
# So there are several sets, each elsewhere, and all turns count.
TURNS = {2.7: 61, 33.6: 61, 134.2: 11}
NUM_SETS = 3
PROCESSES = (2, 4, 8)
LARGEST_COHORT_MB = 600  # keeps 134 MB from 8 processes off small machines
LARGE_MB = 33.0
SMALL_BOUND, LARGE_BOUND, PIPELINE_BOUND = 1.25, 1.05, 0.85


class Point(NamedTuple):
    """What was measured at one size of messages and one number of processes."""

    megabytes: float
    num_processes: int
    transfers: common.Pair
    pipelines: common.Pair


class Bare:
    """The same work with two MPI calls.

    Args:
        comm: its first process is the server.
        num_values: float32 of each client.
    """

    def __init__(self, comm: MPI.Comm, num_values: int) -> None:
        self.comm, self.is_server = comm, comm.rank == 0
        # Gather gives the server a place of its own, which stays empty.
        self.rows = federation.written(comm.size if self.is_server else 1, num_values)
        if not self.is_server:
            federation.fill(self.rows[0], comm.rank - 1)
        self.message = federation.written(num_values)
        counts = [10 + client_id for client_id in range(comm.size - 1)]
        self.weights = normalise(counts)

    def gather(self) -> None:
        """Gather the rows."""
        rows = self.rows.numpy()
        if self.is_server:
            self.comm.Gather(MPI.IN_PLACE, rows)
        else:
            self.comm.Gather(rows, None)

    def broadcast(self) -> None:
        """Broadcast the message."""
        self.comm.Bcast(self.message.numpy())

    def transfer(self) -> None:
        """Broadcast and gather."""
        self.broadcast()
        self.gather()

    def round(self) -> None:
        """Gather, take the mean, broadcast it."""
        self.gather()
        if self.is_server:
            weighted_mean(list(self.rows[1:]), self.weights, self.message)
        self.broadcast()


class PackageServer:
    """The server's end of the package's transport.

    Args:
        transport: opened.
        shapes: of the messages.
    """

    def __init__(self, transport: MpiServer, shapes: ModelShapes) -> None:
        self.transport = transport
        workers = federation.spread(transport.num_workers, transport.num_workers)
        self.coordinator = federation.make_coordinator(shapes, federation.make_switches(workers))

    def begin(self) -> None:
        """Run round 1, whose message is empty: from then on every round has the same bytes."""
        headers, rows = self._transfer()
        self.coordinator.finish(self.coordinator.updates(headers, rows))

    def _transfer(self) -> tuple[list[UpdateHeader], list[Tensor]]:
        plan = self.coordinator.next_plan
        self.transport.broadcast(plan, self.coordinator.wire, takes="rows")
        return self.transport.collect_headers(plan), self.transport.collect_rows(plan)

    def transfer(self) -> None:
        """Broadcast and collect."""
        self._transfer()

    def begin_pipeline(self) -> None:
        """Run the first round of a pipeline, which a broadcast begins; the round before begins later ones."""
        self.transport.broadcast(self.coordinator.next_plan, self.coordinator.wire, takes="parts")
        self.round()

    def round(self) -> None:
        """Collect, take the mean and broadcast it, in a pipeline."""
        plan, received = self.coordinator.next_plan, self.coordinator.wire
        stream = self.coordinator.stream(self.transport.collect_headers(plan))
        self.transport.stream(plan, stream, takes="parts")
        self.coordinator.commit(stream)
        self.coordinator.spare = received  # as the package's server does


def measure(comm: MPI.Comm, megabytes: float, repeats: int, num_sets: int) -> Point:
    """Time transfers, and pipelines, of the package against bare MPI; every process of `comm` calls it."""
    shapes, pairs = federation.flat_shapes(1e6 * megabytes), []
    for _ in range(num_sets):
        bare = Bare(comm, shapes.full().num_values)  # while those of the last set are there still: elsewhere
        pairs.append(_measure_once(comm, shapes, bare, repeats))
    transfers, pipelines = zip(*pairs, strict=True)
    return Point(megabytes, comm.size, common.pooled(transfers), common.pooled(pipelines))


def _measure_once(
    comm: MPI.Comm, shapes: ModelShapes, bare: Bare, repeats: int
) -> tuple[common.Pair, common.Pair]:
    transport: Any = mpi.connect(comm)
    transport.open(shapes, comm.size - 1, federation.WIRE)
    time_pair = partial(common.alternate, repeats=repeats, warm_up=2, barrier=comm.Barrier)
    if not transport.is_server:
        worker = federation.PlayedWorker(transport, shapes)
        worker.round()
        transfers = time_pair(worker.round, bare.transfer)
        worker.round()
        return transfers, time_pair(worker.round, bare.round)
    server = PackageServer(transport, shapes)
    server.begin()
    transfers = time_pair(server.transfer, bare.transfer)
    server.begin_pipeline()
    # In a run the workers train while the next stream is made ready.
    pipelines = time_pair(server.round, bare.round, aside=server.coordinator.foresee)
    assert torch.equal(server.coordinator.message, bare.message), "both must give the same bits"
    return transfers, pipelines


def record(report: common.Report, point: Point) -> None:
    """Put a point into the report."""
    is_large = point.megabytes >= LARGE_MB
    sizes = {"megabytes": point.megabytes, "num_processes": point.num_processes}
    for what, pair in (("broadcast + collect", point.transfers), ("pipeline", point.pipelines)):
        report.samples("package_s", pair.first_s, what=what, **sizes)
        report.samples("bare_s", pair.second_s, what=what, **sizes)
    where = f"{point.megabytes} MB, {point.num_processes} processes"
    bound = LARGE_BOUND if is_large else SMALL_BOUND
    report.ratio(f"broadcast + collect / Bcast + Gather, {where}", point.transfers.ratio, at_most=bound)
    least = PIPELINE_BOUND if is_large else None
    report.ratio(f"pipeline / Gather + mean + Bcast, {where}", point.pipelines.ratio, at_most=least)


def draw(points: Sequence[Point], figure: Figure) -> None:
    """Draw the ratios over the sizes, a line for each number of processes."""
    left, right = figure.subplots(1, 2, sharey=True)
    for size in dict.fromkeys(point.num_processes for point in points):
        line = [point for point in points if point.num_processes == size]
        megabytes = [point.megabytes for point in line]
        left.plot(megabytes, [point.transfers.ratio for point in line], label=f"{size} processes")
        right.plot(megabytes, [point.pipelines.ratio for point in line], label=f"{size} processes")
    for axes, title in ((left, "broadcast + collect"), (right, "collect + mean + broadcast, pipelined")):
        axes.axhline(1, color="black", linewidth=1, marker="")
        axes.set(xscale="log", xlabel="MB a client", title=title)
    left.set(ylabel="time / time of bare MPI", ylim=(0, None))
    left.legend()


@common.options
def main(quick: bool, json_path: Path | None) -> int:
    """Compare the package's transport with bare MPI."""
    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    report = common.Report("bench_transport", num_processes=world.size, num_nodes=federation.num_nodes(world))
    points = []
    sizes = [size for size in PROCESSES if size <= world.size]
    for size, comm in federation.groups(world, sizes):
        fitting = [mb for mb in list(TURNS)[: 2 if quick else None] if (size - 1) * mb <= LARGEST_COHORT_MB]
        if comm is not None:
            for megabytes in fitting:
                repeats, num_sets = (7, 1) if quick else (TURNS[megabytes], NUM_SETS)
                points.append(measure(comm, megabytes, repeats, num_sets))
    if world.rank:
        return 0
    for point in points:
        record(report, point)
    return report.finish(json_path, partial(draw, points))


if __name__ == "__main__":
    main()
