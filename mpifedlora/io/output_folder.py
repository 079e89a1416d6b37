"""The folder of a run: what lies in it, and whether it can be written."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from mpifedlora.errors import ConfigError
from mpifedlora.io.atomic import replace_file

RESULTS_FILE = "results.h5"
RUN_FILE = "run.toml"
ADAPTER_FOLDER = "adapter"
BASE_FOLDER = "base_model"
CLIENT_ADAPTERS_FOLDER = "client_adapters"
CLIENT_STATES_FOLDER = "client_states"
_LEFT_BEHIND = (RESULTS_FILE, RUN_FILE, ADAPTER_FOLDER, BASE_FOLDER, CLIENT_ADAPTERS_FOLDER)
_OWN = (*_LEFT_BEHIND, CLIENT_STATES_FOLDER)


def check_output_folder(out: Path, *, overwrite: bool) -> None:
    """Check, without leaving a trace, that a run can be written to a folder.

    Raises:
        ConfigError: if it holds a run already, is no folder, or cannot be written.
    """
    held = [name for name in _LEFT_BEHIND if (out / name).exists()] if out.is_dir() else []
    if held and not overwrite:
        raise ConfigError(
            f"--out must be a folder without a run, got {out}, which holds {held[0]}; "
            "choose another folder, or add --overwrite"
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


def prepare_output_folder(out: Path, run_file_text: str) -> None:
    """Make the folder of a run, remove what an older run left in it, and write the run file.

    Raises:
        ConfigError: if the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in _OWN:
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


def free_name(path: Path) -> str:
    """Return a path as a user would type it: relative to the current folder where it lies inside."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
