"""A folder that is written whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mpifedlora.errors import ConfigError
from mpifedlora.io.atomic import refusal


def check_new_folder(out: Path) -> None:
    """Check that a folder can be made.

    Raises:
        ConfigError: if it is there already and not empty.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"OUT must be a new or empty folder, got {out}; choose another, or remove it")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Give a folder to fill, which takes its name only when all went well.

    Args:
        out: its name; what is there already must be an empty folder.

    Raises:
        CheckpointError: if the disk refuses.
    """
    made = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        made.chmod(0o755)
        yield made
        made.replace(out)
    except OSError as error:
        todo = "free space, or choose another folder"
        raise refusal("OUT must be writable", error, out, todo) from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
