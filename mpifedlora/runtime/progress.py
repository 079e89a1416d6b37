"""What the terminal shows of a run: a live bar and one lasting line per round, or plain lines.

Where the output is no terminal, every line is written at once, has no control characters, and
keeps the words and single spaces that `grep` looks for.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import rich.progress
from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from mpifedlora.core.units import expected_s, human_bytes, human_time
from mpifedlora.io.output_folder import free_name, left_behind
from mpifedlora.io.results_schema import Baselines, Floats, RoundRow
from mpifedlora.runtime.callbacks import Callback, Run

if TYPE_CHECKING:
    from mpifedlora.io.results import Results

_OUTPUT_FAILURES = (OSError, ValueError)  # ValueError: a closed stream


def is_terminal(stream: TextIO) -> bool:
    """Tell whether someone can watch a live bar there."""
    # Open MPI gives every process a terminal of its own, even where mpirun writes to a file: that
    # one has no size. Where mpirun is on a real terminal, it has the real one's.
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def format_row(row: RoundRow, num_rounds: int, left_s: float | None, metric_names: Sequence[str] = ()) -> str:
    """Write one round as one line, in columns.

    Args:
        row: the finished round; a number that is nan is shown as `-`, an accuracy as nothing.
        num_rounds: rounds of the whole run.
        left_s: estimated seconds until the run's end, nan where not known; None leaves them out.
        metric_names: what else the task measures; the first is shown as well.
    """
    cells = (
        (f"{_position(row.round_num, num_rounds)}  {row.stage}", 23),
        (f"rank {_number(row.lora_rank_mean or math.nan, 1)}", 9),
        (f"up {human_bytes(row.uplink_bytes)}", 11),
        (f"down {human_bytes(row.downlink_bytes)}", 13),
        (f"loss {_number(row.train_loss)}", 10),
        ("" if math.isnan(row.eval_accuracy) else f"accuracy {_number(row.eval_accuracy)}", 14),
        *((f"{name} {_number(value)}", 0) for name, value in _others(row, metric_names)[:1]),
        ("" if left_s is None else f"left {human_time(left_s)}", 0),
    )
    return "  ".join(text.ljust(width) for text, width in cells).rstrip()


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the final table shows.

    Args:
        final: the last round that was evaluated, if any was.
        best: the round of the best accuracy, or else of the least loss, if any was evaluated.
        uplink_bytes: sent by the clients in all rounds.
        downlink_bytes: received by the clients in all rounds.
        baselines: what the bytes compare with, if known.
        wall_s: seconds that the run took, nan where not known.
        files: what lies where, in the order to show.
        metric_names: what else the task measures.
    """

    final: RoundRow | None
    best: RoundRow | None
    uplink_bytes: int
    downlink_bytes: int
    baselines: Baselines | None
    wall_s: float
    files: Mapping[str, str]
    metric_names: Sequence[str] = ()


def summarise(
    rows: Sequence[RoundRow],
    *,
    baselines: Baselines | None,
    wall_s: float,
    files: Mapping[str, str],
    metric_names: Sequence[str] = (),
) -> Summary:
    """Sum a run up.

    Args:
        rows: all finished rounds, in order.
        baselines: what the bytes compare with, if known.
        wall_s: seconds that the run took.
        files: name to path of what the run leaves behind.
        metric_names: what else the task measures.
    """
    evaluated = [row for row in rows if not math.isnan(_goodness(row))]
    return Summary(
        final=evaluated[-1] if evaluated else None,
        best=max(evaluated, key=_goodness, default=None),
        uplink_bytes=sum(row.uplink_bytes for row in rows),
        downlink_bytes=sum(row.downlink_bytes for row in rows),
        baselines=baselines,
        wall_s=wall_s,
        files=files,
        metric_names=metric_names,
    )


def _goodness(row: RoundRow) -> float:
    return -row.eval_loss if math.isnan(row.eval_accuracy) else row.eval_accuracy


class Progress(Callback):
    """Show a run while it goes.

    Output that fails (a terminal that is gone, a full disk behind a redirection) never ends a run.

    Args:
        num_rounds: rounds of the whole run.
        console: where to show; standard output by default.
    """

    def __init__(self, num_rounds: int, console: Console | None = None) -> None:
        # Decided here: with FORCE_COLOR set rich would draw a live bar into a log file.
        self._console = console or Console(force_terminal=is_terminal(sys.stdout))
        self._num_rounds = num_rounds
        self._metric_names: Sequence[str] = ()
        self._rounds_s: list[float] = []
        self._is_live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._bar = _make_bar(self._console)
        self._task = self._bar.add_task("starting", total=num_rounds, left="")
        self._started_s = time.perf_counter()
        self._out = Path()

    def on_start(self, run: Run) -> None:
        """Show what runs."""
        self._out, self._metric_names = run.out, run.info.metric_names
        self.start(run.announcement)

    def start(self, lines: Iterable[str]) -> None:
        """Show what runs, one line each, and start the live bar on a terminal."""
        for line in lines:
            self._say(line)
        if self._is_live:
            with suppress(*_OUTPUT_FAILURES):
                self._bar.start()

    def on_round_start(self, round_num: int, stage: str, lora_rank_mean: float) -> None:
        """Show which round trains now (on a terminal only)."""
        position = _position(round_num, self._num_rounds)
        shown = _number(lora_rank_mean or math.nan, 1)
        self._bar.update(self._task, description=f"{position}  {stage}  rank {shown}")

    def on_round_end(self, row: RoundRow) -> None:
        """Leave one line for a finished round, and move the bar."""
        self._rounds_s.append(row.round_s)
        left_s = expected_s(self._rounds_s, self._num_rounds - row.round_num)
        self._bar.update(self._task, completed=row.round_num, left=f"left {human_time(left_s)}")
        self._say(format_row(row, self._num_rounds, left_s, self._metric_names))

    def on_warning(self, text: str) -> None:
        """Show a line that wants attention."""
        self._say(f"warning: {text}", style="yellow")

    def on_end(self, results: Results) -> None:
        """Show what has come out, and how to go on where the run was cut short."""
        if results.status == "failed":
            return self.close()
        rows, num_rounds = results.rows(), self._num_rounds
        wall_s = time.perf_counter() - self._started_s
        named: Any = {"files": left_behind(self._out), "metric_names": self._metric_names}
        self.finish(summarise(rows, baselines=results.baselines, wall_s=wall_s, **named))
        if results.status == "interrupted":
            self.on_warning(
                f"interrupted after round {len(rows)} of {num_rounds}; go on with: "
                f"mpifedlora run --resume --out {free_name(self._out)}"
            )

    def finish(self, summary: Summary) -> None:
        """End the live bar and show the final table."""
        self.close()
        if self._is_live:
            return self._show(_make_table(_summary_cells(summary)))
        for line in summary_lines(summary):
            self._say(line)

    def close(self) -> None:
        """End the live bar; may be called again."""
        # Stopping a bar that never started would print an empty line.
        if self._bar.live.is_started:
            with suppress(*_OUTPUT_FAILURES):
                self._bar.stop()

    def _say(self, line: str, style: str = "") -> None:
        if self._is_live:
            self._show(Text(line, style=style))
        else:
            with suppress(*_OUTPUT_FAILURES):
                print(_encodable(line.rstrip(), self._console), file=self._console.file, flush=True)

    def _show(self, content: RenderableType) -> None:
        with suppress(*_OUTPUT_FAILURES):
            self._console.print(content, soft_wrap=isinstance(content, Text))


def summary_lines(summary: Summary) -> list[str]:
    """Return the final table as lines."""
    cells = _summary_cells(summary)
    width = max(len(name) for name, _ in cells)
    return [f"{name:<{width}}  {value}" for name, value in cells]


def _make_bar(console: Console) -> rich.progress.Progress:
    # markup off: descriptions are data, and "[lora]" is not a style.
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("{task.fields[left]}", markup=False),
        console=console,
        refresh_per_second=4,
        transient=True,
    )


def _make_table(cells: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in cells:
        table.add_row(name, Text(value))
    return table


def _summary_cells(summary: Summary) -> list[tuple[str, str]]:
    up, down = summary.uplink_bytes, summary.downlink_bytes
    sent = f"{human_bytes(up + down)} (up {human_bytes(up)}, down {human_bytes(down)})"
    return [
        *_quality_cells(summary.final, summary.best, summary.metric_names),
        ("bytes sent", sent),
        *_baseline_cells(summary.baselines),
        *([("wall time", human_time(summary.wall_s))] if math.isfinite(summary.wall_s) else []),
        *summary.files.items(),
    ]


def _quality_cells(
    final: RoundRow | None, best: RoundRow | None, metric_names: Sequence[str]
) -> list[tuple[str, str]]:
    if final is None or best is None:
        return []
    name, shown = ("loss", "eval_loss") if math.isnan(final.eval_accuracy) else ("accuracy", "eval_accuracy")
    cells = [
        (f"{when} {name}", f"{_number(getattr(row, shown))} (round {row.round_num})")
        for when, row in (("final", final), ("best", best))
    ]
    if not math.isnan(final.eval_macro_f1):
        cells.append(("final macro-F1", _number(final.eval_macro_f1)))
    others = _others(final, metric_names)
    cells += [(f"final {other}", _number(value)) for other, value in others]
    return [*cells, *_client_cells(name, getattr(final, f"client_{shown}"))]


def _client_cells(name: str, by_client: Floats | None) -> list[tuple[str, str]]:
    known = [] if by_client is None else sorted(value for value in by_client.tolist() if math.isfinite(value))
    if not known:
        return []
    low, middle, high = (_number(value) for value in (known[0], statistics.median(known), known[-1]))
    return [(f"clients' {name}", f"{low} to {high}, median {middle}, of {len(known)} clients")]


def _others(row: RoundRow, metric_names: Sequence[str]) -> list[tuple[str, float]]:
    pairs = zip(metric_names, row.eval_metrics, strict=False)
    return [(name.replace("_", " "), value) for name, value in pairs if not math.isnan(value)]


def _baseline_cells(baselines: Baselines | None) -> list[tuple[str, str]]:
    if baselines is None:
        return []
    full, fixed = baselines.reduction_vs_full_model, baselines.reduction_vs_fixed_rank
    return [
        ("full-model FedAvg", f"{human_bytes(baselines.full_model_bytes)}: {_reduction(full)} sent"),
        ("fixed rank", f"{human_bytes(baselines.fixed_rank_bytes)}: {_reduction(fixed)} sent"),
    ]


def _reduction(fraction: float) -> str:
    word = "more" if fraction < 0 else "less"
    return f"{_number(100 * abs(fraction), 2)} % {word}"


def _position(round_num: int, num_rounds: int) -> str:
    return f"round {round_num:>{len(str(num_rounds))}}/{num_rounds}"


def _number(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def _encodable(line: str, console: Console) -> str:
    """Replace what the output's encoding lacks: a label's name must not end a run."""
    encoding = console.encoding
    return line.encode(encoding, "replace").decode(encoding)
