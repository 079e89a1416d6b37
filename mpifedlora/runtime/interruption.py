"""When a run should end early: a signal asks for it, or Slurm's time limit comes near."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

EXIT_INTERRUPTED = 85
"""Exit code of a run that can be resumed; Slurm scripts requeue on it."""
_LEAST_LEFT_S = 30.0


class Interruption:
    """Whether the round in hand is to be the last of this job.

    SIGUSR2 asks for it. A second one to the server (`is_server`) ends the job at once, as SIGTERM does: the
    last checkpoint is whole at any time. Slurm's time limit asks for it too, where the job's end is less
    than two rounds and half a minute away.

    Args:
        environment: holds `SLURM_JOB_END_TIME`, seconds since the epoch, under Slurm 22.05 and later.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self.is_server, self.is_asked = False, False
        end = environment.get("SLURM_JOB_END_TIME", "")
        self.end_s = float(end) if end.isdecimal() else float("inf")
        self._last_asked_s = time.time()
        self._before: Any = None

    def __enter__(self) -> Interruption:
        # Only a process's main thread may handle signals; a run in another one is not interrupted.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR2, self._handle)
        return self

    def __exit__(self, *failure: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGUSR2, self._before)

    def _handle(self, signal_number: int, frame: FrameType | None) -> None:
        if self.is_asked and self.is_server:
            # A death by a signal is what the other processes notice, with ULFM too; an exit is not.
            signal.raise_signal(signal.SIGTERM)
        self.is_asked = True

    def ask(self) -> None:
        """Ask that the round in hand be the last, as SIGUSR2 does."""
        self.is_asked = True

    def is_due(self) -> bool:
        """Say whether to end after the round in hand; asked once a round."""
        now = time.time()
        round_s, self._last_asked_s = now - self._last_asked_s, now
        return self.is_asked or now + 2 * round_s + _LEAST_LEFT_S > self.end_s
