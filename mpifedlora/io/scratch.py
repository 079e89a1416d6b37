"""Folders for a while, and whether a folder can be written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Give an empty folder of the system's, which is removed behind this block with all that is in it."""
    with tempfile.TemporaryDirectory(prefix="mpifedlora-") as folder:
        yield Path(folder)
