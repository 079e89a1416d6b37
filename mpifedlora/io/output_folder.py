"""The folder of a run: what lies in it, and whether it can be written."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mpifedlora.errors import CheckpointError, ConfigError
from mpifedlora.io.atomic import refusal, replace_file

RESULTS_FILE = "results.h5"
RUN_FILE = "run.toml"
ADAPTER_FOLDER = "adapter"
BASE_FOLDER = "base_model"
CLIENT_ADAPTERS_FOLDER = "client_adapters"
CLIENT_STATES_FOLDER = "client_states"
CHECKPOINTS_FOLDER = "checkpoints"
TRACKING_FOLDER = "tracking"
REPORT_FOLDER = "report"
LOCK_FILE = ".lock"
_LOCK_TRIES = 3
_LEFT_BEHIND = (RESULTS_FILE, RUN_FILE, ADAPTER_FOLDER, BASE_FOLDER, CLIENT_ADAPTERS_FOLDER)
_OWN = (*_LEFT_BEHIND, CLIENT_STATES_FOLDER, CHECKPOINTS_FOLDER, REPORT_FOLDER, TRACKING_FOLDER)


def check_output_folder(out: Path, *, overwrite: bool) -> None:
    """Check, without leaving a trace, that a run can be written to a folder.

    Raises:
        ConfigError: if it holds a run already, is no folder, or cannot be written.
    """
    held = [name for name in _LEFT_BEHIND if (out / name).exists()] if out.is_dir() else []
    if held and not overwrite:
        raise ConfigError(
            f"--out must be a folder without a run, got {out}, which holds {held[0]}; "
            "choose another folder, add --resume to go on, or --overwrite"
        )
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not parent.is_dir():
        raise ConfigError(f"--out must be a folder, got {out}, where {parent} is a file; choose another")
    try:
        # Permission bits tell little (root, read-only mounts, quotas): try it.
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ConfigError(
            f"--out must be writable, got {out} ({error.strerror}: {parent}); choose another folder"
        ) from error


def prepare_output_folder(out: Path, run_file_text: str, *, resumes: bool = False) -> None:
    """Make the folder of a run, remove what an older run left in it, and write the run file.

    Args:
        out: the folder.
        run_file_text: of the resolved configuration.
        resumes: whether the run in the folder goes on: then nothing is removed.

    Raises:
        ConfigError: if the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in () if resumes else _OWN:
            old = out / name
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink(missing_ok=True)
        replace_file(out / RUN_FILE, run_file_text.encode())
    except OSError as error:
        raise ConfigError(
            f"--out must be writable, got {out} ({error.strerror or error}); choose another folder"
        ) from error


def hold_output_folder(out: Path, run_file_text: str, lock: FolderLock) -> bool:
    """Make sure that a run's folder is still there, and still its own; one that was removed is made again.

    Args:
        out: the folder; what it lies in must be there.
        run_file_text: of the resolved configuration, without which the run could not be resumed.
        lock: of the folder.

    Returns:
        Whether it had to be made again.

    Raises:
        CheckpointError: if another run has taken the folder, or it cannot be made.
    """
    try:
        lock.keep()
        if (out / RUN_FILE).exists():
            return False
        out.mkdir(exist_ok=True)
        lock.keep()
        replace_file(out / RUN_FILE, run_file_text.encode())
    except ConfigError as error:
        raise CheckpointError(f"nothing is saved any more: {error}") from error
    except OSError as error:
        todo = "restore the folder or make it writable: nothing is saved until then, and all of it after that"
        raise refusal("--out must be writable", error, out, todo) from error
    return True


def left_behind(out: Path) -> dict[str, str]:
    """Return what a run has left in its folder for its user: name to path, in the order to show."""
    names = (RESULTS_FILE, ADAPTER_FOLDER, CLIENT_ADAPTERS_FOLDER, BASE_FOLDER, RUN_FILE)
    return {name: free_name(out / name) for name in names if (out / name).exists()}


class FolderLock:
    """Keeps a second run out of a folder until it is released, or this process ends.

    Args:
        out: the folder of the run.
    """

    def __init__(self, out: Path) -> None:
        self._path, self._file = out / LOCK_FILE, -1

    def take(self) -> None:
        """Take the lock, if this process has not; a file system without locks is told nothing.

        Raises:
            ConfigError: if another process holds it.
        """
        if self._file >= 0:
            return
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            return  # a folder that cannot be written is told by what must be written to it
        try:
            _lock(file)
        except BlockingIOError as error:
            holder = os.read(file, 200).decode(errors="replace") or "another process"
            os.close(file)
            raise ConfigError(
                f"--out must be used by one run at a time, got {self._path.parent}, which {holder} writes "
                "to; wait until it has ended, end it, or choose another folder"
            ) from error
        except OSError:
            pass
        if not _is_still_there(file, self._path):  # its holder has just let go, and removed it
            os.close(file)
            return self.take()
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        self._file = file

    def keep(self) -> None:
        """Take the lock again where its folder was removed.

        Raises:
            ConfigError: if another process has taken it since.
        """
        if self._file >= 0 and not _is_still_there(self._file, self._path):
            os.close(self._file)
            self._file = -1
        self.take()

    def release(self) -> None:
        """Let others in."""
        if self._file >= 0:
            if _is_still_there(self._file, self._path):  # else it is another run's by now
                with suppress(OSError):
                    self._path.unlink(missing_ok=True)
            os.close(self._file)
        self._file = -1


def _lock(file: int) -> None:
    for _ in range(_LOCK_TRIES - 1):  # `ask_lock` holds it for an instant
        with suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.02)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


class LockState(NamedTuple):
    """What the lock of a run's folder tells of the run.

    Args:
        is_held: whether a process holds it; None where the file system does not tell.
        is_certain: whether that holds for processes of every node.
        holder: who has taken it last, or nothing.
    """

    is_held: bool | None
    is_certain: bool
    holder: str


def ask_lock(out: Path) -> LockState:
    """Ask whether a run holds its folder, without keeping one out.

    Some file systems keep locks to themselves on each node: that nobody holds it is certain only on the
    node of the process that took it.
    """
    try:
        file = os.open(out / LOCK_FILE, os.O_RDONLY)
    except FileNotFoundError:
        return LockState(False, False, "")  # whoever lets go removes it, and a copy may lack it
    except OSError:
        return LockState(None, False, "")
    try:
        holder = os.read(file, 200).decode(errors="replace")
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return LockState(True, True, holder)
    except OSError:
        return LockState(None, False, "")
    finally:
        os.close(file)
    return LockState(False, holder.endswith(f" on {socket.gethostname()}"), holder)


def _is_still_there(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


def free_name(path: Path) -> str:
    """Return a path as a user would type it: relative to the current folder where it lies inside."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
