"""Compare whole rounds of the package, training left out, with bare MPI calls and the same arithmetic.

    benchmarks/run.sh bench_round.py 5 --json benchmarks/results/bench_round.json
    MPIRUN_FLAGS="--with-ft ulfm" benchmarks/run.sh bench_round.py 5 --json .../bench_round_ulfm.json

What the package adds: plans and their checks, headers, screening, the ledger, the row of the results. Bare
are Gather, the arithmetic of the same core functions on the gathered arrays, and Bcast. Both are timed in
turn in one run, so under ULFM both pay for it. Where the package's time goes is taken from rounds after that,
one directly after another as in a real run.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import common
import federation
import torch
from mpi4py import MPI

from mpifedlora.core.wire import ClientUpdate
from mpifedlora.transport import mpi

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mpifedlora.core.layout import ModelShapes
    from mpifedlora.io.results_schema import RoundRow

SMALL_BOUND, LARGE_BOUND = 1.3, 1.1
LARGE_MB = 33.0
PHASES = ("broadcast_s", "collect_s", "aggregate_s")


class Case(NamedTuple):
    """A kind of round.

    Args:
        name: what is aggregated.
        shapes: of the model.
        scope: `full` takes means, `adapter` exact sums of products and their SVD.
        megabytes: of each client.
        pipeline: whether the package works part by part.
    """

    name: str
    shapes: ModelShapes
    scope: str
    megabytes: float
    pipeline: bool

    @property
    def label(self) -> str:
        """Name the case."""
        return f"{self.name}, {self.megabytes:g} MB, {'in parts' if self.pipeline else 'whole'}"


class Outcome(NamedTuple):
    """What was measured: times, and on the server the package's own breakdown of its rounds."""

    case: Case
    pair: common.Pair
    rows: list[RoundRow]


def cases() -> Iterator[Case]:
    """Give the cases."""
    for pipeline in (False, True):
        for megabytes in (2.7, 33.6):
            yield Case("mean", federation.flat_shapes(1e6 * megabytes), "full", megabytes, pipeline)
        yield Case("exact sum and SVD", federation.minilm_shapes(), "adapter", 2.7, pipeline)


class Bare:
    """A round by MPI calls and core functions.

    Args:
        comm: its first process is the server.
        case: what is aggregated.
    """

    def __init__(self, comm: MPI.Comm, case: Case) -> None:
        self.comm = comm
        switches = federation.make_switches(federation.spread(comm.size - 1, comm.size - 1), scope=case.scope)
        self.coordinator = federation.make_coordinator(case.shapes, switches)
        num_values = self.coordinator.state.numel()
        self.message = federation.written(num_values)
        self.rows = federation.written(1 if comm.rank else comm.size, num_values)
        if comm.rank:
            federation.fill(self.rows[0], comm.rank - 1)

    def round(self) -> None:
        """Gather, aggregate, broadcast."""
        if self.comm.rank:
            self.comm.Gather(self.rows.numpy(), None)
            self.comm.Bcast(self.message.numpy())
            return
        self.comm.Gather(MPI.IN_PLACE, self.rows.numpy())
        updates = [_update(client_id, row) for client_id, row in enumerate(self.rows[1:])]
        self.coordinator.finish(updates)
        self.comm.Bcast(self.coordinator.message.numpy())


def _update(client_id: int, values: torch.Tensor) -> ClientUpdate:
    return ClientUpdate(client_id, 10 + client_id, 1, 0.5, 0.0, 0.0, True, values)


def measure(comm: MPI.Comm, case: Case, repeats: int) -> Outcome:
    """Time rounds of the package and bare ones in turn; every process calls it."""
    transport: Any = mpi.connect(comm)
    transport.open(case.shapes, comm.size - 1, federation.WIRE)
    bare = Bare(comm, case)
    time_pair = partial(common.alternate, second=bare.round, repeats=repeats, warm_up=3, barrier=comm.Barrier)
    if not transport.is_server:
        worker = federation.PlayedWorker(transport, case.shapes)
        pair = time_pair(worker.round)
        for _ in range(repeats):
            worker.round()
        return Outcome(case, pair, [])
    coordinator = federation.make_coordinator(case.shapes, bare.coordinator.switches)
    rounds = federation.make_server(coordinator, transport, pipeline=case.pipeline).rounds()
    pair = time_pair(lambda: next(rounds))
    assert torch.equal(coordinator.message, bare.coordinator.message), "both must give the same bits"
    return Outcome(case, pair, [next(rounds) for _ in range(repeats)])


def record(report: common.Report, outcome: Outcome) -> None:
    """Put a case into the report, and print where its time goes."""
    case, pair = outcome.case, outcome.pair
    details = {"case": case.label, "megabytes": case.megabytes}
    report.samples("package_s", pair.first_s, **details)
    report.samples("bare_s", pair.second_s, **details)
    for phase in PHASES:
        report.samples(phase, phase_seconds(outcome, phase), **details)
    bound = LARGE_BOUND if case.megabytes >= LARGE_MB else SMALL_BOUND
    report.ratio(f"round / bare, {case.label}", pair.ratio, at_most=bound)
    columns = [1e3 * statistics.median(phase_seconds(outcome, phase)) for phase in PHASES]
    whole, bare = (1e3 * statistics.median(seconds) for seconds in pair)
    rest = 1e3 * statistics.median(phase_seconds(outcome, "round_s")) - sum(columns)
    print(f"{case.label:<40} {whole:9.1f} {bare:9.1f} " + " ".join(f"{x:9.1f}" for x in [*columns, rest]))


def phase_seconds(outcome: Outcome, phase: str) -> list[float]:
    """Return the seconds of a phase on the server, by round."""
    return [float(getattr(row, phase)) for row in outcome.rows]


def draw(outcomes: Sequence[Outcome], figure: Figure) -> None:
    """Draw the medians of each case: phases as a bar, and marks for the rounds that were timed in turn."""
    axes = figure.subplots()
    places = range(len(outcomes))
    before = [0.0] * len(outcomes)
    for phase, color in zip(PHASES, common.COLORS, strict=False):
        widths = [1e3 * statistics.median(phase_seconds(outcome, phase)) for outcome in outcomes]
        axes.barh(places, widths, left=before, color=color, label=phase.removesuffix("_s"))
        before = [left + width for left, width in zip(before, widths, strict=True)]
    for seconds, marker, label in (
        ("first_s", "D", "whole round, the package"),
        ("second_s", "o", "whole round, bare MPI"),
    ):
        medians = [1e3 * statistics.median(getattr(outcome.pair, seconds)) for outcome in outcomes]
        style = {"linestyle": "", "color": "black", "markerfacecolor": "white"}
        axes.plot(medians, places, marker=marker, label=label, **style)
    axes.set(
        yticks=list(places), yticklabels=[outcome.case.label for outcome in outcomes], xlabel="ms a round"
    )
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=3, fontsize=10)


def is_ulfm() -> bool:
    """Say whether mpirun was told to keep the job alive when processes die."""
    return os.environ.get("OMPI_MCA_mpi_ft_enable") == "1"  # noqa: SIM112 (Open MPI's own spelling)


@common.options
def main(quick: bool, json_path: Path | None) -> int:
    """Compare whole rounds without training with bare MPI and the same arithmetic."""
    torch.set_num_threads(1)
    comm = MPI.COMM_WORLD
    outcomes = [measure(comm, case, 5 if quick else 21) for case in cases()]
    name = "bench_round_ulfm" if is_ulfm() else "bench_round"
    report = common.Report(name, num_processes=comm.size, num_nodes=federation.num_nodes(comm))
    if comm.rank:
        return 0
    names = ("package", "bare", *(phase.removesuffix("_s") for phase in PHASES), "all else")
    print(f"{'ms a round, median':<40} " + " ".join(f"{name:>9}" for name in names))
    for outcome in outcomes:
        record(report, outcome)
    return report.finish(json_path, partial(draw, outcomes))


if __name__ == "__main__":
    main()
