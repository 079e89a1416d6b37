"""When this process was started and whether it may go on, from what Linux keeps of it."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

# What starts the processes of a job and ends with it. The daemons `prted` and `orted` may be older than the
# job; the kernel cuts names to 15 characters.
LAUNCHERS = ("hydra_pmi_proxy", "mpiexec", "mpiexec.hydra", "mpirun", "orterun", "prterun", "slurmstepd")
_DAEMONS = ("orted", "prted")
_PROC = Path("/proc")
_WATCH_S = 1.0
_LONGEST_START_S, _GONE_S, _OTHER_TELLS_S = 900.0, 5.0, 4.0


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


@contextlib.contextmanager
def starting_together(advice: str) -> Iterator[None]:
    """End the job where a process that was started with this one ends while this one is inside.

    An MPI that survives the death of processes (ULFM) waits for ever for one that died before MPI was up, and
    keeps Python's other threads from running: so a child process watches. It sees this node's processes; for
    those of other nodes there is a limit of 15 minutes.

    Args:
        advice: printed after what has happened.
    """
    found = _launcher()
    expected = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "")
    if found is None or not expected.isdecimal():
        yield
        return
    parent = os.getpid()
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _watch_start(parent, found[0], int(expected), advice)
        os._exit(0)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _watch_start(process: int, launcher: int, expected: int, advice: str) -> None:
    own, missing_s, left_s = os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", ""), 0.0, _LONGEST_START_S
    while os.getppid() == process:
        time.sleep(_WATCH_S)
        there = _started_by(launcher)
        missing_s = missing_s + _WATCH_S if len(there) < expected else 0.0
        left_s -= _WATCH_S
        if missing_s >= _GONE_S or left_s <= 0:
            if own == min(there, key=int, default=own):  # one of them is enough
                gone = f"{expected - len(there)} of this node's {expected} have ended"
                what = gone if missing_s else f"it is not after {_LONGEST_START_S / 60:.0f} minutes"
                _say(f"error: all processes must live until MPI is up, but {what}; {advice}")
                time.sleep(_WATCH_S)  # in which the launcher takes it on
            else:
                time.sleep(_OTHER_TELLS_S)
            _end_start(process, launcher)


def _end_start(process: int, launcher: int) -> None:
    with contextlib.suppress(OSError):
        if _read_stat(launcher).name in LAUNCHERS:  # a daemon may have other jobs
            os.kill(launcher, signal.SIGTERM)
    with contextlib.suppress(OSError):
        os.kill(process, signal.SIGKILL)
    os._exit(1)


def _started_by(launcher: int) -> list[str]:
    """Return the numbers, on this node, of the processes that a launcher has started and that live."""
    found = []
    for folder in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            stat = _read_stat(int(folder.name))
            if stat.parent == launcher and stat.state not in ("Z", "X"):
                variables = (folder / "environ").read_bytes().split(b"\0")
                key = b"OMPI_COMM_WORLD_LOCAL_RANK="
                found += [text.removeprefix(key).decode() for text in variables if text.startswith(key)]
    return found


def tell_when_terminated(message: str) -> None:
    """Print a message when SIGTERM comes, and end as a process ends that does not catch it."""

    def tell(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        _say(message)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, tell)


def end_in_time(longest_s: int) -> None:
    """Let this process's end, once it has begun, take so many seconds at most: then SIGALRM ends it.

    MPI's own end may wait for ever where a process of the job has died before; by then everything is saved.
    """

    def set_alarm() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(longest_s)

    atexit.register(set_alarm)


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
