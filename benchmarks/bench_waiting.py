"""Compare a worker's training with idle processes beside it and alone: who waits must not take its cores.

    benchmarks/run.sh bench_waiting.py 8 --json benchmarks/results/bench_waiting.json

One worker trains (matrix products) in one thread, or in as many as there are cores; the server and all other
workers wait in the package's transport for it. In turn with that it trains while they sleep. For comparison,
without a bound: while they wait in a blocking MPI call.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import common
import federation
import torch
from mpi4py import MPI

from mpifedlora.core.plan import ABSENT
from mpifedlora.transport import mpi

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BOUND = 1.1
TRAIN_S = 1.0
_SLEEP_S = 0.05
_SIZE = 256


class Case(NamedTuple):
    """Who trains among whom."""

    num_processes: int
    threads: int

    @property
    def label(self) -> str:
        """Name the case."""
        threads = f"{self.threads} thread" + "s" * (self.threads > 1)
        return f"{self.num_processes} processes, {os.cpu_count()} cores, {threads}"


class Outcome(NamedTuple):
    """Seconds of the same training, by repeat: others wait in the package, in blocking MPI, and asleep."""

    case: Case
    package_s: list[float]
    blocking_s: list[float]
    asleep_s: list[float]


def cases(world_size: int) -> Iterator[Case]:
    """Give the cases: a core for each process, and not; one thread, and all cores."""
    cores = os.cpu_count() or 1
    for num_processes in sorted({min(cores, world_size), world_size}):
        for threads in sorted({1, cores}):
            if num_processes > 1:
                yield Case(num_processes, threads)


class Training:
    """Matrix products, always the same number of them.

    Args:
        num_products: of one training.
    """

    def __init__(self, num_products: int) -> None:
        self.num_products = num_products
        self.matrix = torch.eye(_SIZE)
        self.seconds: list[float] = []

    def __call__(self) -> None:
        """Train, and take the time."""
        started = time.perf_counter()
        for _ in range(self.num_products):
            self.matrix = self.matrix @ self.matrix
        self.seconds.append(time.perf_counter() - started)


def calibrate() -> int:
    """Return how many products take TRAIN_S."""
    trial = Training(200)
    trial()
    trial()
    return max(1, int(TRAIN_S * trial.num_products / trial.seconds[-1]))


def measure(comm: MPI.Comm, case: Case, repeats: int) -> Outcome:
    """Train in the three settings in turn; every process of `comm` calls it, and all get the times."""
    torch.set_num_threads(case.threads)
    training = Training(calibrate() if comm.rank == 1 else 1)
    package = _package_round(comm, training)

    def trains_beside(wait: Callable[[], object]) -> None:
        if comm.rank == 1:
            training()
        wait()

    blocking = partial(trains_beside, comm.Barrier)
    asleep = partial(trains_beside, partial(federation.sleepy_barrier, comm, _SLEEP_S))
    turns = (package, blocking, asleep)
    package()
    training.seconds.clear()
    for repeat in range(repeats):
        for index in range(3):
            federation.sleepy_barrier(comm, _SLEEP_S)
            turns[(repeat + index) % 3]()  # each turn comes first as often
    seconds = comm.bcast(training.seconds, 1)
    by_turn = [[seconds[3 * row + (turn - row) % 3] for row in range(repeats)] for turn in range(3)]
    return Outcome(case, *by_turn)


def _package_round(comm: MPI.Comm, training: Training) -> Callable[[], object]:
    shapes = federation.flat_shapes(1e5)
    transport: Any = mpi.connect(comm)
    transport.open(shapes, 2, federation.WIRE)
    if not transport.is_server:
        return federation.PlayedWorker(transport, shapes, training).round
    switches = federation.make_switches((0, ABSENT))
    rounds = federation.make_server(federation.make_coordinator(shapes, switches), transport).rounds()
    return partial(next, rounds)


def record(report: common.Report, outcome: Outcome) -> None:
    """Put a case into the report."""
    case = outcome.case
    for name in ("package_s", "blocking_s", "asleep_s"):
        report.samples(name, getattr(outcome, name), num_processes=case.num_processes, threads=case.threads)
    for what, seconds, bound in (
        ("in the package", outcome.package_s, BOUND),
        ("in blocking MPI", outcome.blocking_s, None),
    ):
        pair = common.Pair(seconds, outcome.asleep_s)
        report.ratio(f"training while others wait {what} / alone, {case.label}", pair.ratio, at_most=bound)


def draw(outcomes: list[Outcome], figure: Figure) -> None:
    """Draw each case as a pair of bars."""
    axes = figure.subplots()
    labels = {"package_s": "others wait in the package", "blocking_s": "others wait in blocking MPI"}
    for index, (name, label) in enumerate(labels.items()):
        places = [place + 0.4 * index - 0.2 for place in range(len(outcomes))]
        ratios = [common.Pair(getattr(outcome, name), outcome.asleep_s).ratio for outcome in outcomes]
        axes.barh(places, ratios, height=0.38, color=common.COLORS[index], label=label)
    axes.axvline(BOUND, color="black", linewidth=1, marker="", label="bound of the package")
    axes.set(yticks=range(len(outcomes)), yticklabels=[outcome.case.label for outcome in outcomes])
    axes.set_xlabel("training time / training time alone")
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=3)


@common.options
def main(quick: bool, json_path: Path | None) -> int:
    """Compare training beside waiting processes with training alone."""
    world = MPI.COMM_WORLD
    outcomes = []
    for case in cases(world.size):
        for _, comm in federation.groups(world, [case.num_processes]):
            outcomes += [] if comm is None else [measure(comm, case, 3 if quick else 11)]
    report = common.Report("bench_waiting", num_processes=world.size, num_nodes=federation.num_nodes(world))
    if world.rank:
        return 0
    for outcome in outcomes:
        record(report, outcome)
    return report.finish(json_path, partial(draw, outcomes))


if __name__ == "__main__":
    main()
