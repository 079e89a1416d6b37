"""Follow a run from another terminal until it ends."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from mpifedlora.core.charts import ASCII, BLOCKS
from mpifedlora.core.units import expected_s
from mpifedlora.io.output_folder import free_name
from mpifedlora.runtime.progress import format_row, is_terminal
from mpifedlora.runtime.watch_view import frame
from mpifedlora.runtime.watching import EXIT_CODES, Sight, Watcher

PLAIN_SIZE = 80, 24
EXIT_LEFT = 130


def watch(out: Path, interval_s: float, *, is_once: bool) -> int:
    """Show a run: one frame, or a live view until the run ends; plain lines where nobody can watch one.

    Args:
        out: the run's folder; it need not exist yet.
        interval_s: seconds between two looks.
        is_once: whether one frame is all.

    Returns:
        Exit code; see `mpifedlora.runtime.watching.EXIT_CODES`, or 130 after Ctrl-C.

    Raises:
        CheckpointError: see `mpifedlora.runtime.watching.Watcher`.
    """
    console = Console(force_terminal=is_terminal(sys.stdout), highlight=False)
    watcher = Watcher(out, time.time)
    if is_once:
        sight = watcher.look()
        _print(console, out, sight)
        return EXIT_CODES[sight.state]
    is_live = console.is_terminal and not console.is_dumb_terminal
    try:
        sight = (_live if is_live else _follow)(console, watcher, interval_s)
    except KeyboardInterrupt:
        return EXIT_LEFT
    return EXIT_CODES[sight.state]


def _shades(console: Console) -> str:
    return BLOCKS if console.encoding.lower().startswith("utf") else ASCII


def _lines(console: Console, out: Path, sight: Sight) -> list[Text]:
    width, height = console.size if console.is_terminal else PLAIN_SIZE
    return frame(free_name(out), sight, width, height - 1, _shades(console))


def _print(console: Console, out: Path, sight: Sight) -> None:
    for line in _lines(console, out, sight):
        if console.is_terminal:
            console.print(line, no_wrap=True)
        else:
            _say(console, line.plain)


def _live(console: Console, watcher: Watcher, interval_s: float) -> Sight:
    sight = watcher.look()
    try:
        # The frame stands in a screen of its own; the last one stays behind.
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(Group(*_lines(console, watcher.out, sight)), refresh=True)
                if sight.has_ended:
                    return sight
                time.sleep(interval_s)
                sight = watcher.look()
    finally:
        _print(console, watcher.out, sight)


def _follow(console: Console, watcher: Watcher, interval_s: float) -> Sight:
    """Print a line for each round, event and change of state."""
    num_rows = num_events = 0
    last_state = ""
    while True:
        sight = watcher.look()
        results = sight.results
        if sight.num_finished < num_rows:  # another run has taken its place
            num_rows = num_events = 0
        if results is not None:
            for row in results.rows()[num_rows:]:
                rounds_s = results.rounds["round_s"][: row.round_num].tolist()
                left_s = expected_s(rounds_s, sight.num_rounds - row.round_num)
                _say(console, format_row(row, sight.num_rounds, left_s, results.info.metric_names))
            for event in results.events[num_events:]:
                _say(console, f"warning: {event.text}")
            num_rows, num_events = sight.num_finished, len(results.events)
        if sight.state != last_state:
            _say(
                console,
                f"{free_name(watcher.out)}: {sight.state}" + (f" ({sight.note})" if sight.note else ""),
            )
        last_state = sight.state
        if sight.has_ended:
            return sight
        time.sleep(interval_s)


def _say(console: Console, line: str) -> None:
    encoded = line.rstrip().encode(console.encoding, "replace")
    print(encoded.decode(console.encoding), file=console.file, flush=True)
