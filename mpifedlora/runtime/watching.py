"""What can be known of a run from its folder while another process trains it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from mpifedlora.core.units import expected_s, human_time
from mpifedlora.errors import CheckpointError
from mpifedlora.io.output_folder import RESULTS_FILE, LockState, ask_lock, free_name
from mpifedlora.io.report_config import num_planned_rounds
from mpifedlora.io.results import Results, read_results
from mpifedlora.runtime.interruption import EXIT_INTERRUPTED
from mpifedlora.transport.base import EXIT_RESUMABLE

EXIT_GOES_ON = 3
"""Exit code for a run that has not ended, or not begun."""
_QUIET_ROUNDS, _LEAST_QUIET_S, _FIRST_QUIET_S = 3.0, 10.0, 120.0
_MOST_FAILED_READS = 5

State = Literal["waiting", "running", "quiet", "dead", "finished", "interrupted", "failed"]
EXIT_CODES: dict[State, int] = {
    "finished": 0,
    "failed": 1,
    "waiting": EXIT_GOES_ON,
    "running": EXIT_GOES_ON,
    "quiet": EXIT_GOES_ON,
    "dead": EXIT_RESUMABLE,
    "interrupted": EXIT_INTERRUPTED,
}


@dataclass(frozen=True)
class Sight:
    """A run as its folder shows it at one moment.

    Args:
        state: `quiet`: nothing has come for long, and whether it lives cannot be told; `dead`: its process
            has ended without a word.
        results: what the file holds; None where there is none.
        age_s: seconds since the file was written.
        note: what the state is concluded from, where that is not what the file says; else empty.
    """

    state: State
    results: Results | None = None
    age_s: float = math.nan
    note: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether no more is to come."""
        return EXIT_CODES[self.state] != EXIT_GOES_ON

    @cached_property
    def num_rounds(self) -> int:
        """Rounds of the whole run."""
        assert self.results is not None
        return num_planned_rounds(self.results.info) or self.num_finished

    @property
    def num_finished(self) -> int:
        """Rounds that are finished."""
        return 0 if self.results is None else len(self.results.rounds["round_num"])

    @property
    def left_s(self) -> float:
        """Seconds until the run's end, as the last rounds let expect; nan where not known."""
        assert self.results is not None
        num_left = self.num_rounds - self.num_finished
        left_s = expected_s(self.results.rounds["round_s"].tolist(), num_left)
        # The round in hand has taken its share already.
        return max(left_s - min(self.age_s, left_s / num_left), 0.0) if num_left and left_s else left_s


class Watcher:
    """Looks at a run's folder again and again; the file is read only when it has changed.

    Args:
        out: the run's folder; it need not exist yet.
        clock: seconds since the epoch.
        ask: what the folder's lock tells.
    """

    def __init__(
        self, out: Path, clock: Callable[[], float], ask: Callable[[Path], LockState] = ask_lock
    ) -> None:
        self.out, self._clock, self._ask = out, clock, ask
        self._results: Results | None = None
        self._version: tuple[int, int] | None = None
        self._written_s = math.nan
        self._failed_reads = 0

    def look(self) -> Sight:
        """Return what the folder shows now.

        Raises:
            CheckpointError: if the file is none of ours, or the folder was removed while it was watched.
        """
        try:
            found = (self.out / RESULTS_FILE).stat()
        except OSError:
            return self._without_file()
        if (found.st_ino, found.st_mtime_ns) != self._version:
            self._read((found.st_ino, found.st_mtime_ns), found.st_mtime)
        if self._results is None:
            return Sight("waiting", note="results.h5 cannot be read yet")
        return self._judge(self._results)

    def _without_file(self) -> Sight:
        if self._results is None:
            what = "holds no results.h5 yet" if self.out.is_dir() else "does not exist yet"
            return Sight("waiting", note=f"{free_name(self.out)} {what}")
        if not self.out.is_dir():
            raise CheckpointError(
                f"a run's folder must stay while it is watched, got none any more ({free_name(self.out)}); "
                "name the folder that the run writes to now"
            )
        # An --overwrite removes the old file some moments before it writes its own.
        return Sight("waiting", self._results, note="results.h5 has been removed; a new one may come")

    def _read(self, version: tuple[int, int], written_s: float) -> None:
        try:
            self._results = read_results(self.out / RESULTS_FILE)
        except CheckpointError:
            # A network file system may take a file away while it is read.
            self._failed_reads += 1
            if self._failed_reads >= _MOST_FAILED_READS or self._results is None:
                raise
            return
        self._version, self._written_s, self._failed_reads = version, written_s, 0

    def _judge(self, results: Results) -> Sight:
        age_s = max(0.0, self._clock() - self._written_s)
        if results.status != "running":
            return Sight(results.status, results, age_s)
        typical_s = expected_s(results.rounds["round_s"].tolist(), 1)
        is_known = math.isfinite(typical_s)
        patience_s = max(_QUIET_ROUNDS * typical_s, _LEAST_QUIET_S) if is_known else _FIRST_QUIET_S
        lock = self._ask(self.out)
        if lock.is_held is False and lock.is_certain:
            return Sight("dead", results, age_s, _death(lock))
        if age_s <= patience_s:
            return Sight("running", results, age_s)
        typical = f"; a round takes about {human_time(typical_s)}" if is_known else ""
        silence = f"nothing new for {human_time(age_s)}{typical}"
        if lock.is_held:
            return Sight("running", results, age_s, f"{silence}; {lock.holder} still holds the folder")
        why = "its lock is free, as far as this node can tell" if lock.holder else "no lock to ask"
        return Sight("quiet", results, age_s, f"{silence}; {why}: it may have been killed")


def _death(lock: LockState) -> str:
    return f"the file says running, but {lock.holder} has ended without a word (killed, or out of memory)"
