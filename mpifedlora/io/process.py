"""When this process was started and whether it may go on, from what Linux keeps of it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NamedTuple

# What starts the processes of a job and ends with it. The daemons `prted` and `orted` may be older than the
# job; the kernel cuts names to 15 characters.
LAUNCHERS = ("hydra_pmi_proxy", "mpiexec", "mpiexec.hydra", "mpirun", "orterun", "prterun", "slurmstepd")
_DAEMONS = ("orted", "prted")
_PROC = Path("/proc")
_WATCH_S = 1.0


class _Stat(NamedTuple):
    name: str
    state: str
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
    return _Stat(start.partition("(")[2], fields[0], int(fields[1]), int(fields[19]) / ticks_per_s)


def end_with_launcher(message: str, exit_code: int) -> bool:
    """End this process within seconds of the MPI launcher above it, whatever it is doing then.

    MPI itself does so only while it is inside MPI. Wrappers between the launcher and this process, as a
    shell script, do not matter.

    Args:
        message: printed before.
        exit_code: of this process then.

    Returns:
        Whether there is a launcher; False on any system but Linux.
    """
    found = _launcher()
    if found is not None:
        arguments = (*found, message, exit_code)
        threading.Thread(target=_watch_launcher, args=arguments, name="launcher", daemon=True).start()
    return found is not None


def _launcher() -> tuple[int, float] | None:
    """Return process id and start of the nearest launcher or launcher's daemon above this process."""
    pid = os.getpid()
    try:
        while (pid := _read_stat(pid).parent) > 0:
            stat = _read_stat(pid)
            if stat.name in (*LAUNCHERS, *_DAEMONS):
                return pid, stat.started_s
    except OSError:  # it has ended, or lies outside this container
        pass
    return None


def _watch_launcher(pid: int, started_s: float, message: str, exit_code: int) -> None:
    while _runs(pid, started_s):
        time.sleep(_WATCH_S)
    _say(message)
    os._exit(exit_code)


def _runs(pid: int, started_s: float) -> bool:
    """Say whether a process lives; its number may be another's by now, or its parent may not have noticed."""
    try:
        stat = _read_stat(pid)
    except OSError:
        return False
    return stat.started_s == started_s and stat.state not in ("Z", "X")


def tell_when_terminated(message: str) -> None:
    """Print a message when SIGTERM comes, and end as a process ends that does not catch it."""

    def tell(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        _say(message)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, tell)


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # whoever reads it may have ended
        os.write(2, f"{message}\n".encode())


def available_bytes() -> int | None:
    """Return the memory of this machine that is free or can be freed at once; None where it does not tell."""
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0]) if found else None
