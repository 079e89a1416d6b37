"""Measure how a run starts: the time from mpirun to the first training step, and the processes' memory.

    python benchmarks/bench_startup.py --json benchmarks/results/bench_startup.json

- `first step`: real runs on MiniLM; the time is compared with that of importing torch, transformers and
  PEFT in the same processes at the same time, which none of them can do without.
- `weights held`: proportional memory (PSS) that the base weights take in all processes of a node together,
  over their size: 1 where all share one copy. Copying them shows that the measure sees private copies.
- `imports with rare collection`: CPU time of these imports with `setup.collect_rarely` over without.

It needs Linux (/proc/self/smaps_rollup) and starts mpirun by itself.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROCESSES, QUICK_PROCESSES = (2, 3, 4, 5), (4,)
WEIGHTS_PROCESSES = 4
FIRST_STEP_BOUND, SHARED_BOUND, COPIES_BOUND, IMPORT_BOUND = 2.0, 1.5, 0.9, 1.05
LIMIT_S = 600

Findings = list[dict[str, float]]


@common.options
def main(quick: bool, json_path: Path | None) -> int:
    """Measure start-up time and memory; exits with 1 if a bound is broken."""
    counts = QUICK_PROCESSES if quick else PROCESSES
    report = common.Report("bench_startup", num_processes=max(counts))
    runs = {count: start("run", count) for count in counts}
    for count, found in runs.items():
        report_run(report, count, found)
    weights = start("weights", WEIGHTS_PROCESSES)
    held = report_weights(report, weights)
    return report.finish(json_path, lambda figure: draw(figure, runs, held))


def start(kind: str, count: int) -> Findings:
    """Start so many processes, and return what each found."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        script = [str(Path(__file__).with_name("run.sh")), "startup_process.py", str(count), kind, str(file)]
        ended = subprocess.run(["bash", *script], capture_output=True, text=True, timeout=LIMIT_S)
        if ended.returncode or not file.exists():
            raise SystemExit(
                f"error: {' '.join(script)} ended with {ended.returncode}\n{ended.stderr[-3000:]}"
            )
        found: Findings = json.loads(file.read_text())
        return found


def report_run(report: common.Report, count: int, found: Findings) -> None:
    """Keep all figures of one run, and its start-up over the libraries' part of it."""
    for process, figures in enumerate(found):
        for label, value in figures.items():
            report.sample(label, value, num_processes=count, process=process, kind="run")
    slowest = max(found[1:], key=lambda figures: figures["first_step_s"])
    report.ratio(
        f"first step / imports, {count} processes",
        slowest["first_step_s"] / slowest["libraries_s"],
        at_most=FIRST_STEP_BOUND,
    )


def report_weights(report: common.Report, found: Findings) -> tuple[float, float]:
    """Keep what the base weights take, read and copied; return both over their size."""
    count, size = len(found), found[0]["weights_mb"]
    for process, figures in enumerate(found):
        for label, value in figures.items():
            report.sample(label, value, num_processes=count, process=process, kind="weights")
    read = sum(each["read_mb"] - each["before_mb"] for each in found) / size
    copied = sum(each["copied_mb"] - each["read_mb"] for each in found) / size
    report.ratio(f"weights held / their size, {count} processes", read, at_most=SHARED_BOUND)
    report.ratio(f"copies held / their size, {count} processes", copied, at_least=COPIES_BOUND * count)
    own, rare = (min(each["libraries_cpu_s"] for each in found[first::2]) for first in (0, 1))
    report.ratio("imports with rare collection / without", rare / own, at_most=IMPORT_BOUND)
    return read, copied


def draw(figure: Figure, runs: dict[int, Findings], held: tuple[float, float]) -> None:
    """Draw the start-up by number of processes, and what the base weights take."""
    times, memory = figure.subplots(1, 2)
    counts = list(runs)
    for label, name in {"first training step": "first_step_s", "imports alone": "libraries_s"}.items():
        times.plot(counts, [max(each[name] for each in runs[count][1:]) for count in counts], label=label)
    times.set(xlabel="processes", ylabel="seconds since mpirun", title="Start-up", xticks=counts)
    times.set_ylim(bottom=0)
    times.legend(loc="lower right")
    bars: Any = memory.bar(["as they are read", "a copy in each more"], held, color=common.COLORS[:2])
    memory.bar_label(bars, fmt="%.2f")
    memory.axhline(1, color="black", linestyle="--", linewidth=1)
    memory.set(ylabel="memory / size of the weights", title=f"Base weights of {WEIGHTS_PROCESSES} processes")


if __name__ == "__main__":
    main()
