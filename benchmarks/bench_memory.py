"""Measure the server's peak memory against the size of the cohort, in the three ways to take a round in.

    benchmarks/run.sh bench_memory.py 3 --json benchmarks/results/bench_memory.json

- whole: all rows are gathered, then aggregated: grows with the cohort times the model.
- in parts: grows with the cohort times the parts in flight, however large the model.
- reduce: the workers add up: does not grow.

Few workers have many clients each. Counted is what a federation adds to the process: its peak resident memory
over what was resident before. Linux only.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import common
import federation
import torch
from mpi4py import MPI

from mpifedlora.core.parts import IN_FLIGHT
from mpifedlora.transport import mpi

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEGABYTES = 8.4
PART_BYTES = 2**18
COHORTS = (4, 16, 64, 256)
WAYS = ("whole", "in parts", "reduce")
NUM_ROUNDS = 3
FLAT_BOUND, GROWTH_BOUND, SHARE_BOUND = 1.1, 1.1, 0.5


class Point(NamedTuple):
    """The server's memory beyond what it had before, in one way and at one cohort."""

    way: str
    cohort_size: int
    peak_bytes: float


def measure(comm: MPI.Comm, way: str, cohort_size: int) -> Point:
    """Run some rounds; every process calls it."""
    gc.collect()
    before = _resident_bytes("VmRSS")
    reset_peak()
    shapes = federation.flat_shapes(1e6 * MEGABYTES)
    transport: Any = mpi.connect(comm)
    transport.open(shapes, cohort_size, federation.WIRE, part_bytes=PART_BYTES)
    if transport.is_server:
        workers = federation.spread(cohort_size, comm.size - 1)
        coordinator = federation.make_coordinator(
            shapes, federation.make_switches(workers, reduces=way == "reduce")
        )
        server = federation.make_server(
            coordinator, transport, pipeline=way == "in parts", part_bytes=PART_BYTES
        )
        rounds = server.rounds()
        for _ in range(NUM_ROUNDS):
            next(rounds)
    else:
        worker = federation.PlayedWorker(transport, shapes)
        for _ in range(NUM_ROUNDS):
            worker.round()
    comm.Barrier()
    return Point(way, cohort_size, _resident_bytes("VmHWM") - before)


def return_freed_memory() -> None:
    """Let glibc give back freed memory at once: else a peak hides in what the point before has left."""
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**16)


def reset_peak() -> None:
    """Let the peak of this process's resident memory begin at what is resident now (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def _resident_bytes(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def record(report: common.Report, points: Sequence[Point]) -> None:
    """Put what was measured into the report, and hold the bounds."""
    by_way = {way: [point for point in points if point.way == way] for way in WAYS}
    for point in points:
        report.sample("server_peak_bytes", point.peak_bytes, way=point.way, cohort_size=point.cohort_size)
    for one in by_way["reduce"][1:]:
        first = by_way["reduce"][0]
        label = f"reduce, {one.cohort_size} clients / {first.cohort_size} clients"
        report.ratio(label, one.peak_bytes / first.peak_bytes, at_most=FLAT_BOUND)
    first, last = by_way["in parts"][0], by_way["in parts"][-1]
    allowed = (last.cohort_size - first.cohort_size) * IN_FLIGHT * PART_BYTES
    label = f"in parts, growth to {last.cohort_size} clients / clients x parts in flight x part"
    report.ratio(label, (last.peak_bytes - first.peak_bytes) / allowed, at_most=GROWTH_BOUND)
    whole = by_way["whole"][-1]
    label = f"in parts / whole, {last.cohort_size} clients of {MEGABYTES} MB"
    report.ratio(label, last.peak_bytes / whole.peak_bytes, at_most=SHARE_BOUND)


def draw(points: Sequence[Point], figure: Figure) -> None:
    """Draw the peak over the cohort, a line for each way."""
    axes = figure.subplots()
    for way in WAYS:
        line = [(point.cohort_size, point.peak_bytes / 1e6) for point in points if point.way == way]
        axes.plot(*zip(*line, strict=True), label=way)
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="clients in a round", ylabel="MB on the server, peak")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.set_title(f"clients of {MEGABYTES} MB")
    axes.legend()


@common.options
def main(quick: bool, json_path: Path | None) -> int:
    """Measure the server's peak memory against the size of the cohort."""
    torch.set_num_threads(1)
    return_freed_memory()
    comm = MPI.COMM_WORLD
    cohorts = COHORTS[: 3 if quick else None]
    if comm.rank == 0:
        import mpifedlora.runtime.server  # noqa: F401 (loaded before memory is counted)
    measure(comm, "reduce", 2)  # what MPI and torch take once
    points = [measure(comm, way, cohort_size) for way in reversed(WAYS) for cohort_size in cohorts]
    report = common.Report("bench_memory", num_processes=comm.size, num_nodes=federation.num_nodes(comm))
    if comm.rank:
        return 0
    record(report, points)
    return report.finish(json_path, partial(draw, points))


if __name__ == "__main__":
    main()
