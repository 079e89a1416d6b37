"""What every benchmark shares: options, timing side by side, the report with its bounds, the look of figures.

A benchmark holds its claims as *ratios* with bounds: times are one machine's, ratios of two times taken in
turn in one run carry over. A script is

    @common.options
    def main(quick: bool, json_path: Path | None) -> int:
        report = common.Report("bench_name")
        pair = common.alternate(ours, theirs, repeats=5 if quick else 20)
        report.samples("ours_s", pair.first_s)
        report.ratio("ours / theirs", pair.ratio, at_most=1.05)
        return report.finish(json_path, draw)

and ends with 1 if a bound is broken. Of several MPI processes, only the first makes a report.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from mpifedlora.errors import ConfigError
from mpifedlora.io.figures import COLORS as COLORS
from mpifedlora.io.figures import write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]

# What the JSON of a benchmark must have.
KEYS = ("name", "environment", "ratios", "bounds", "samples")


def options(function: Callable[..., int]) -> click.Command:
    """Make a command with --quick and --json of a function (quick, json_path, ...) that returns an exit code.

    Options of its own stand below this decorator.
    """

    @click.command()
    @click.option("--quick", is_flag=True, help="Fewer sizes and repeats: a check, no measurement.")
    @click.option(
        "--json",
        "json_path",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Write the results here, and a figure beside it.",
    )
    @functools.wraps(function)
    def command(**given: Any) -> None:
        sys.exit(function(**given))

    return command


class Pair(NamedTuple):
    """Seconds of two things that were timed in turn.

    Args:
        first_s: of the first, by repeat.
        second_s: of the second, by repeat.
    """

    first_s: list[float]
    second_s: list[float]

    @property
    def ratio(self) -> float:
        """Median over the repeats of first over second."""
        pairs = zip(self.first_s, self.second_s, strict=True)
        return statistics.median(first / second for first, second in pairs)


def pooled(pairs: Sequence[Pair]) -> Pair:
    """Return all repeats of several pairs as one."""
    first, second = ([one for part in column for one in part] for column in zip(*pairs, strict=True))
    return Pair(first, second)


def alternate(
    first: Callable[[], object],
    second: Callable[[], object],
    repeats: int,
    warm_up: int = 1,
    barrier: Callable[[], object] = lambda: None,
    aside: Callable[[], object] = lambda: None,
) -> Pair:
    """Time two callables in turn in one run, so that what else the machine does disturbs both alike.

    Which of the two comes first changes from repeat to repeat.

    Args:
        first: without arguments.
        second: without arguments.
        repeats: timed calls of each, at least 1.
        warm_up: calls of each before, whose time does not count.
        barrier: where processes wait for each other, before each call and, within its time, after it.
        aside: called after each call of the first, and in no time: what in a run hides behind other work.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(-warm_up, repeats):
        for index in (0, 1) if repeat % 2 == 0 else (1, 0):
            barrier()
            started = time.perf_counter()
            (first, second)[index]()
            barrier()
            seconds[index].append(time.perf_counter() - started)
            if index == 0:
                aside()
    return Pair(*(column[warm_up:] for column in seconds))


class Report:
    """The outcome of a benchmark: samples, ratios and their bounds.

    Args:
        name: of the benchmark, that of its file without .py.
        seed: of its random numbers.
        num_nodes: that it ran on.
        num_processes: that took part.
    """

    def __init__(self, name: str, seed: int = 0, *, num_nodes: int = 1, num_processes: int = 1) -> None:
        self.name, self.seed = name, seed
        self.num_nodes, self.num_processes = num_nodes, num_processes
        self.load = os.getloadavg()[0]  # now: later it is the benchmark's own
        self._samples: list[dict[str, Any]] = []
        self._ratios: dict[str, float] = {}
        self._bounds: dict[str, dict[str, float]] = {}

    def sample(self, label: str, value: float, **details: Any) -> None:
        """Keep one raw measurement, its unit in the label, with details such as sizes."""
        self._samples.append({"label": label, "value": float(value), **details})

    def samples(self, label: str, values: Sequence[float], **details: Any) -> None:
        """Keep raw measurements of one kind."""
        for value in values:
            self.sample(label, value, **details)

    def ratio(
        self, label: str, value: float, at_most: float | None = None, at_least: float | None = None
    ) -> None:
        """Keep a ratio, and what it is bound by.

        Args:
            label: must be new; it names sizes and processes, as later runs are compared by it.
            value: NaN breaks every bound.
            at_most: upper bound, if any.
            at_least: lower bound, if any.

        Raises:
            ValueError: if the label is not new.
        """
        if label in self._ratios:
            raise ValueError(f"labels of ratios must differ, got {label!r} twice ({self.name}); rename one")
        self._ratios[label] = float(value)
        given = {"at_most": at_most, "at_least": at_least}
        bounds = {kind: float(bound) for kind, bound in given.items() if bound is not None}
        if bounds:
            self._bounds[label] = bounds

    @property
    def broken(self) -> list[str]:
        """Labels of the ratios that are out of their bounds."""
        return [label for label, bounds in self._bounds.items() if not _holds(self._ratios[label], bounds)]

    def finish(self, json_path: Path | None, figure: Callable[[Figure], object] | None = None) -> int:
        """Print the ratios, write the results, draw the figure, and return the exit code.

        Args:
            json_path: file of the results, or None for none; the figure is the .png beside it.
            figure: draws on an empty matplotlib Figure, for instance with `axes = figure.subplots()`.

        Returns:
            0 where all bounds hold, else 1.
        """
        print(self._table())
        if json_path is not None:
            json_path.parent.mkdir(parents=True, exist_ok=True)
            json_path.write_text(json.dumps(self._content(), indent=1) + "\n")
            if figure is not None:
                draw(json_path.with_suffix(".png"), figure)
        return 1 if self.broken else 0

    def _table(self) -> str:
        width = max(map(len, self._ratios), default=0)
        lines = [f"{self.name}: ratios"]
        for label, value in self._ratios.items():
            bounds = self._bounds.get(label, {})
            words = ", ".join(f"{kind.replace('_', ' ')} {bound:g}" for kind, bound in bounds.items())
            verdict = ("BROKEN" if label in self.broken else "holds") if bounds else ""
            lines.append(f"  {label:<{width}}  {value:8.3f}  {words:<14}  {verdict}".rstrip())
        return "\n".join(lines)

    def _content(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "environment": self._environment(),
            "ratios": {label: _finite(value) for label, value in self._ratios.items()},
            "bounds": self._bounds,
            "samples": [{**sample, "value": _finite(sample["value"])} for sample in self._samples],
        }

    def _environment(self) -> dict[str, Any]:
        import torch

        return {
            "commit": _commit(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "quick": "--quick" in sys.argv,
            "mpi": _mpi_library(),
            "cpu": _cpu(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "num_cores": os.cpu_count(),
            "num_nodes": self.num_nodes,
            "num_processes": self.num_processes,
            "load": round(self.load, 2),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": importlib.metadata.version("numpy"),
            "threads": torch.get_num_threads(),
            "seed": self.seed,
        }


def _holds(value: float, bounds: dict[str, float]) -> bool:
    return bounds.get("at_least", -math.inf) <= value <= bounds.get("at_most", math.inf)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has neither NaN nor infinity


def _commit() -> str:
    try:
        commit, changes = (
            subprocess.run(["git", *words.split()], cwd=ROOT, capture_output=True, text=True, check=True)
            for words in ("rev-parse --short=12 HEAD", "status --porcelain --untracked-files=no")
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changes.stdout.strip() else "")


def _mpi_library() -> str | None:
    if "mpi4py.MPI" not in sys.modules:
        return None
    library: str = sys.modules["mpi4py.MPI"].Get_library_version()
    return library.split(",")[0].strip("\x00 \n")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def draw(path: Path, figure: Callable[[Figure], object], size: tuple[float, float] = (9, 5)) -> None:
    """Draw a figure in the benchmarks' style into a PNG file.

    Args:
        path: of the file.
        figure: draws on an empty matplotlib Figure.
        size: width and height, inches.
    """
    try:
        write_figure(path, figure, size)
    except ConfigError as error:
        print(f"no figure: {error}", file=sys.stderr)
