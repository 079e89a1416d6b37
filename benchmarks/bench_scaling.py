"""Measure weak and strong scaling over the workers, fit a latency-bandwidth model, and extrapolate.

    benchmarks/run.sh bench_scaling.py 9 --json benchmarks/results/bench_scaling.json
    sbatch slurm/scaling.sbatch
    python benchmarks/bench_scaling.py --combine FILE... --json OUT

In one mpirun, groups of the first processes stand for smaller jobs. A client trains for a fixed time, asleep:
it needs no core, as if it trained on a GPU. The server's time is that of a round without training. It must
grow at most linearly with the workers, and logarithmically where the workers add up (`reduce`): held where
each process has a core, only printed otherwise. Beyond the measured workers it is extrapolated, and says so.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import common
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from mpi4py import MPI

WAYS = ("whole", "in parts", "reduce")
MEGABYTES = (0.26, 2.7, 33.6)
TRAIN_S = 0.05
WEAK_CLIENTS = 4  # a worker
SCALED_MB = 2.7
FAR_WORKERS = 1024
GROWTH_BOUND = 1.2


class Point(NamedTuple):
    """One measured group of processes.

    Args:
        kind: `messages`, without training; `weak` or `strong` scaling.
        way: how the rows come in.
        megabytes: of each client.
        num_workers: without the server.
        num_clients: in each round.
        num_nodes: of the group.
        is_crowded: whether some processes share a core.
        round_s: median over the rounds.
        train_s: of it, the slowest worker's training.
    """

    kind: str
    way: str
    megabytes: float
    num_workers: int
    num_clients: int
    num_nodes: int
    is_crowded: bool
    round_s: float
    train_s: float

    @property
    def server_s(self) -> float:
        """Seconds of a round in which nobody trains."""
        return self.round_s - self.train_s


class Task(NamedTuple):
    """What to measure in a group."""

    kind: str
    way: str
    megabytes: float
    num_clients: int
    num_rounds: int


def tasks(num_workers: int, num_clients: int, *, quick: bool) -> Iterator[Task]:
    """Give what to measure in a group of so many workers."""
    num_rounds = 5 if quick else 15
    for way in WAYS:
        for megabytes in MEGABYTES[: 2 if quick else None]:
            yield Task("messages", way, megabytes, num_workers, num_rounds)
    yield Task("weak", "in parts", SCALED_MB, WEAK_CLIENTS * num_workers, num_rounds)
    if num_workers <= num_clients:
        yield Task("strong", "in parts", SCALED_MB, num_clients, 3)


def measure(comm: MPI.Comm, task: Task) -> Point | None:
    """Run rounds; every process of `comm` calls it, and only the server gets a point."""
    import federation

    from mpifedlora.transport import mpi

    shapes = federation.flat_shapes(1e6 * task.megabytes)
    transport: Any = mpi.connect(comm)
    transport.open(shapes, task.num_clients, federation.WIRE)
    num_nodes, is_crowded = federation.num_nodes(comm), federation.is_crowded(comm)
    num_rounds = 2 + task.num_rounds  # the first have no message, and make buffers
    if not transport.is_server:
        train = (lambda: None) if task.kind == "messages" else partial(time.sleep, TRAIN_S)
        worker = federation.PlayedWorker(transport, shapes, train)
        for _ in range(num_rounds):
            worker.round()
        return None
    workers = federation.spread(task.num_clients, comm.size - 1)
    switches = federation.make_switches(workers, reduces=task.way == "reduce")
    coordinator = federation.make_coordinator(shapes, switches)
    rounds = federation.make_server(coordinator, transport, pipeline=task.way == "in parts").rounds()
    rows = [next(rounds) for _ in range(num_rounds)][2:]
    return Point(
        kind=task.kind,
        way=task.way,
        megabytes=task.megabytes,
        num_workers=comm.size - 1,
        num_clients=task.num_clients,
        num_nodes=num_nodes,
        is_crowded=is_crowded,
        round_s=statistics.median(float(row.round_s) for row in rows),
        train_s=statistics.median(float(row.train_s) for row in rows),
    )


class Fit(NamedTuple):
    """Seconds of the server: start + latency * steps + megabytes * steps / bandwidth.

    Args:
        way: how the rows come in; its steps are the workers, or under `reduce` the levels of a binary tree.
        start_s: a round's own.
        latency_s: a step.
        s_per_megabyte: a step; one over the bandwidth.
        error: median relative error over the points.
    """

    way: str
    start_s: float
    latency_s: float
    s_per_megabyte: float
    error: float

    def seconds(self, num_workers: float, megabytes: float) -> float:
        """Return the modelled time."""
        terms = features(self.way, num_workers, megabytes)
        return float(np.dot(terms, (self.start_s, self.latency_s, self.s_per_megabyte)))


def features(way: str, num_workers: float, megabytes: float) -> tuple[float, float, float]:
    """Return what the three constants of a fit are multiplied with."""
    steps = math.log2(num_workers + 1) if way == "reduce" else num_workers
    return 1.0, steps, steps * megabytes


def fit(points: Sequence[Point], way: str) -> Fit:
    """Fit one way's points by least squares of relative errors, with constants that are not negative."""
    chosen = [point for point in points if point.kind == "messages" and point.way == way]
    rows = np.array([features(way, point.num_workers, point.megabytes) for point in chosen])
    seconds = np.array([point.server_s for point in chosen])
    constants = _least_squares(rows / seconds[:, None], np.ones(len(chosen)))
    errors = np.abs(rows @ constants / seconds - 1)
    start, latency, slope = map(float, constants)
    return Fit(way, start, latency, slope, float(np.median(errors)))


def _least_squares(rows: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    # The best of all subsets of columns whose solution is not negative: there are only three columns.
    best, least = np.zeros(3), math.inf
    for chosen in range(1, 8):
        columns = [index for index in range(3) if chosen >> index & 1]
        solution = np.zeros(3)
        solution[columns] = np.linalg.lstsq(rows[:, columns], wanted, rcond=None)[0]
        error = float(np.sum((rows @ solution - wanted) ** 2))
        if solution.min() >= 0 and error < least:
            best, least = solution, error
    return best


def record(report: common.Report, points: Sequence[Point], fits: Sequence[Fit]) -> None:
    """Put the points, what they say of scaling, and the fits into the report."""
    for point in points:
        details = {name: value for name, value in point._asdict().items() if name != "round_s"}
        report.sample("round_s", point.round_s, **details)
    for way in WAYS:
        for megabytes in sorted({point.megabytes for point in points}):
            _record_growth(report, _line(points, "messages", way, megabytes), way, megabytes)
    for kind in ("weak", "strong"):
        line = _line(points, kind, "in parts", SCALED_MB)
        for point in line[-1:]:
            where = f"{point.num_workers} workers of {TRAIN_S} s a client"
            report.ratio(f"{kind} efficiency, {where}", efficiency(line[0], point))
    for one in fits:
        _record_fit(report, one)


def _line(points: Sequence[Point], kind: str, way: str, megabytes: float) -> list[Point]:
    wanted = (kind, way, megabytes)
    line = [point for point in points if point[:3] == wanted]
    return sorted(line, key=lambda point: point.num_workers)


def _record_growth(report: common.Report, line: Sequence[Point], way: str, megabytes: float) -> None:
    if len(line) < 2:
        return
    first, last = line[0], line[-1]
    expected = features(way, last.num_workers, 0)[1] / features(way, first.num_workers, 0)[1]
    name = "logarithmic" if way == "reduce" else "linear"
    bound = None if last.is_crowded else GROWTH_BOUND
    label = f"server time, {way}, {megabytes} MB, {first.num_workers} to {last.num_workers} workers / {name}"
    report.ratio(label, last.server_s / first.server_s / expected, at_most=bound)


def efficiency(first: Point, point: Point) -> float:
    """Return the share of the workers' time that is not lost against the smallest group's round."""
    work = point.num_clients / first.num_clients * first.num_workers / point.num_workers
    return work * first.round_s / point.round_s


def _record_fit(report: common.Report, one: Fit) -> None:
    rate = math.inf if one.s_per_megabyte == 0 else 1 / one.s_per_megabyte
    step = "level" if one.way == "reduce" else "worker"
    start, latency = 1e3 * one.start_s, 1e3 * one.latency_s
    print(
        f"{one.way}: {start:.2f} ms, and for each {step} {latency:.3f} ms and its bytes at {rate:.0f} MB/s "
        f"(median error {100 * one.error:.0f} %)"
    )
    for megabytes in MEGABYTES[1:]:
        seconds = one.seconds(FAR_WORKERS, megabytes)
        details = {"way": one.way, "megabytes": megabytes, "num_workers": FAR_WORKERS}
        report.sample("extrapolated_server_s", seconds, **details)
        print(f"  extrapolated: {seconds:.2f} s a round with {FAR_WORKERS} workers of {megabytes} MB")


def draw(points: Sequence[Point], fits: Sequence[Fit], figure: Figure) -> None:
    """Draw the server's time with its fits, and the efficiencies."""
    left, right = figure.subplots(1, 2)
    _draw_times(points, fits, left)
    for kind in ("weak", "strong"):
        line = _line(points, kind, "in parts", SCALED_MB)
        workers = [point.num_workers for point in line]
        right.plot(workers, [100 * efficiency(line[0], point) for point in line], label=kind)
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter("{x:g}")
    right.set(xlabel="workers", ylabel="efficiency, %", ylim=(0, 110))
    right.set_title(f"{SCALED_MB} MB, {TRAIN_S} s a client")
    right.legend()


def _draw_times(points: Sequence[Point], fits: Sequence[Fit], axes: Axes) -> None:
    megabytes = max(point.megabytes for point in points if point.kind == "messages")
    for one, color in zip(fits, common.COLORS, strict=False):
        line = _line(points, "messages", one.way, megabytes)
        measured = [point.num_workers for point in line]
        axes.plot(measured, [point.server_s for point in line], color=color, linestyle="", label=one.way)
        reach = np.geomspace(measured[0], FAR_WORKERS)
        modelled = [one.seconds(num_workers, megabytes) for num_workers in reach]
        axes.plot(reach, modelled, color=color, linestyle="--", marker="", linewidth=1)
    axes.axvspan(measured[-1], FAR_WORKERS, color="0.9", zorder=0)
    axes.text(measured[-1], axes.get_ylim()[0], " extrapolated", va="bottom")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(yscale="log", xlabel="workers", ylabel="server's seconds a round")
    axes.set_title(f"{megabytes} MB a client")
    axes.legend()


def read_points(files: Sequence[Path]) -> list[Point]:
    """Read the points of earlier runs; where several have the same group, the first counts."""
    points: dict[tuple[object, ...], Point] = {}
    for file in files:
        for sample in json.loads(file.read_text())["samples"]:
            if sample["label"] == "round_s":
                values = {**sample, "round_s": sample["value"]}
                point = Point(**{name: values[name] for name in Point._fields})
                points.setdefault(point[:-3], point)
    return list(points.values())


def run(workers: Sequence[int], num_clients: int, *, quick: bool) -> tuple[list[Point], bool]:
    """Measure groups of so many workers, by default 1, 2, 4 and so on; say whether this process reports."""
    import federation
    import torch
    from mpi4py import MPI

    torch.set_num_threads(1)
    world = MPI.COMM_WORLD
    if world.size < 2:
        raise click.UsageError("scaling needs at least 2 processes, got 1; start it with benchmarks/run.sh")
    chosen = list(workers) or [2**power for power in range((world.size - 1).bit_length())]
    sizes = [1 + num_workers for num_workers in sorted(set(chosen)) if num_workers < world.size]
    points = []
    for size, comm in federation.groups(world, sizes):
        if comm is not None:
            points += [measure(comm, task) for task in tasks(size - 1, num_clients, quick=quick)]
    return [point for point in points if point is not None], world.rank == 0


@common.options
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--combine", is_flag=True, help="Measure nothing: put the results in FILES together.")
@click.option("--workers", multiple=True, type=int, help="Workers of a group; by default 1, 2, 4 and so on.")
@click.option("--clients", "num_clients", default=64, show_default=True, help="Of strong scaling, in all.")
def main(
    quick: bool,
    json_path: Path | None,
    files: Sequence[Path],
    combine: bool,
    workers: Sequence[int],
    num_clients: int,
) -> int:
    """Measure scaling over the workers, or combine the results of earlier runs."""
    if combine != bool(files):
        raise click.UsageError("--combine and the results to combine go together")
    points, is_server = (read_points(files), True) if combine else run(workers, num_clients, quick=quick)
    if not is_server:
        return 0
    fits = [fit(points, way) for way in WAYS]
    num_processes = 1 + max(point.num_workers for point in points)
    num_nodes = max(point.num_nodes for point in points)
    report = common.Report("bench_scaling", num_nodes=num_nodes, num_processes=num_processes)
    record(report, points, fits)
    return report.finish(json_path, partial(draw, points, fits))


if __name__ == "__main__":
    main()
