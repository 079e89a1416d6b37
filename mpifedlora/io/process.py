"""When this process was started, from what Linux keeps of it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

# What starts the processes of a job and ends with it. The daemons `prted` and `orted` may be older than the
# job; the kernel cuts names to 15 characters.
LAUNCHERS = ("hydra_pmi_proxy", "mpiexec", "mpiexec.hydra", "mpirun", "orterun", "prterun", "slurmstepd")
_PROC = Path("/proc")


class _Stat(NamedTuple):
    name: str
    parent: int
    started_s: float  # since the machine was started


def seconds_since_start() -> float | None:
    """Return the seconds since this process was started, or since the MPI launcher that started it was.

    The resolution is that of the kernel's ticks, in general 0.01 s.

    Returns:
        None where the system does not tell: on any but Linux.
    """
    try:
        process = _read_stat(os.getpid())
    except OSError:
        return None
    try:
        parent = _read_stat(process.parent)
    except OSError:  # it has ended, or lies outside this container
        parent = process
    origin = parent if parent.name in LAUNCHERS else process
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - origin.started_s)


def _read_stat(pid: int) -> _Stat:
    # proc_pid_stat(5); the name stands in parentheses, and may hold some itself.
    text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    start, _, end = text.rpartition(")")
    fields = end.split()
    ticks_per_s = os.sysconf("SC_CLK_TCK")
    return _Stat(start.partition("(")[2], int(fields[1]), int(fields[19]) / ticks_per_s)


def available_bytes() -> int | None:
    """Return the memory of this machine that is free or can be freed at once; None where it does not tell."""
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None
