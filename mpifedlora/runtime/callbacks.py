"""Who is told of a run while it goes: the terminal, experiment trackers, and callbacks of a user's own.

All are `Callback`s, on the server's process only, and told in the order in which they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mpifedlora.core.config import RunConfig
from mpifedlora.io.results_schema import RoundRow, RunInfo

if TYPE_CHECKING:
    from mpifedlora.io.results import Results


@dataclass(frozen=True)
class Run:
    """A run that is about to train.

    Args:
        out: its folder.
        config: the resolved configuration.
        info: what runs, as `results.h5` has it.
        rows: the rounds that it goes on from; empty where it starts anew.
        announcement: what the terminal shows first, one line each.
        stop: see `Federation.stop`.
        warn: tells all callbacks, and `/events` of the results.
    """

    out: Path
    config: RunConfig
    info: RunInfo
    rows: tuple[RoundRow, ...]
    announcement: tuple[str, ...]
    stop: Callable[[], None]
    warn: Callable[[str], None]


class Outcome(NamedTuple):
    """How a run has ended: the exit code of this process, and the results, on the server's only."""

    exit_code: int
    results: Results | None = None


class Callback:
    """Told of a run by the server's process; override what you need.

    An exception raised here ends the run, as any other would; `mpifedlora run --resume` goes on.

        class StopWhenGood(Callback):
            def on_start(self, run):
                self.run = run

            def on_round_end(self, row):
                if row.eval_accuracy > 0.9:
                    self.run.stop()
    """

    def on_start(self, run: Run) -> None:
        """Take note of a run that is set up, before its first round."""

    def on_round_start(self, round_num: int, stage: str, lora_rank_mean: float) -> None:
        """Take note of a round that trains from now on.

        Args:
            round_num: 1..num_rounds.
            stage: `initiating` or `annealing`.
            lora_rank_mean: over modules, 0 where the whole model is trained.
        """

    def on_round_end(self, row: RoundRow) -> None:
        """Take note of a finished round, due evaluation included; by then the next one may train already."""

    def on_warning(self, text: str) -> None:
        """Take note of something out of the ordinary, such as a client that was left out."""

    def on_end(self, results: Results) -> None:
        """Take note of the end, also that of a run that has failed: see `results.status`."""


class Callbacks(Callback):
    """Several callbacks as one.

    Args:
        callbacks: told one after another.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._all = tuple(callbacks)

    def on_start(self, run: Run) -> None:
        """Tell all."""
        for each in self._all:
            each.on_start(run)

    def on_round_start(self, round_num: int, stage: str, lora_rank_mean: float) -> None:
        """Tell all."""
        for each in self._all:
            each.on_round_start(round_num, stage, lora_rank_mean)

    def on_round_end(self, row: RoundRow) -> None:
        """Tell all."""
        for each in self._all:
            each.on_round_end(row)

    def on_warning(self, text: str) -> None:
        """Tell all."""
        for each in self._all:
            each.on_warning(text)

    def on_end(self, results: Results) -> None:
        """Tell all, even where one of them raises."""
        failures = []
        for each in self._all:
            try:
                each.on_end(results)
            except Exception as failure:
                failures.append(failure)
        if failures:
            raise failures[0]
