"""Files that readers see whole or not at all."""

from __future__ import annotations

import errno
import glob
import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path

from mpifedlora.errors import CheckpointError


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` in place of a file such that readers see the old bytes or the new, never a mix.

    Args:
        path: the file to replace; need not exist, its folder must.
        content: the file's new bytes.

    Raises:
        OSError: if the disk refuses; the old file is untouched.
    """
    unique = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}.{unique}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def refusal(must_hold: str, error: OSError, path: Path, what_to_do: str) -> CheckpointError:
    """Return the error that tells why the disk refuses, with its `errno`.

    Args:
        must_hold: the message's first words.
        error: of the disk.
        path: what it is about.
        what_to_do: the message's last words.
    """
    failure = CheckpointError(f"{must_hold}, got {error.strerror or error} ({path}); {what_to_do}")
    failure.errno = error.errno
    return failure


def remove_stale_temporaries(path: Path) -> None:
    """Remove what killed writers of a file left beside it.

    A temporary file of a live process of this machine is kept. Should a writer on another machine
    lose one, its write fails as on a full disk and is tried again.

    Args:
        path: the file that was to be written.
    """
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        host, pid = temporary.name[len(path.name) + 2 :].rsplit(".", 3)[:2]
        if not (host == socket.gethostname() and _is_alive(pid)):
            with suppress(OSError):
                temporary.unlink()


def _is_alive(pid: str) -> bool:
    # This process has nothing half-written when it starts a writer: its number was used before.
    if not pid.isdecimal() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable; some file systems cannot, and say so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
