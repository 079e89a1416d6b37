"""What a run leaves behind: an adapter as PEFT loads it, base weights, and the folder they lie in."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from mpifedlora.errors import CheckpointError, ConfigError
from mpifedlora.io.atomic import replace_file

RESULTS_FILE = "results.h5"
RUN_FILE = "run.toml"
ADAPTER_FOLDER = "adapter"
BASE_FOLDER = "base_model"
BASE_FILE = "model.safetensors"
_OWN = (RESULTS_FILE, RUN_FILE, ADAPTER_FOLDER, BASE_FOLDER)


def check_output_folder(out: Path, *, overwrite: bool) -> None:
    """Check, without leaving a trace, that a run can be written to a folder.

    Raises:
        ConfigError: if it holds a run already, is no folder, or cannot be written.
    """
    held = [name for name in _OWN if (out / name).exists()] if out.is_dir() else []
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


def write_adapter(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`, each whole or not at all.

    Raises:
        CheckpointError: if the disk refuses.
    """
    text = json.dumps(config, indent=2, sort_keys=True)
    _write_files(
        folder, {"adapter_model.safetensors": _encode(tensors), "adapter_config.json": text.encode()}
    )


def write_base_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the base weights that training has changed as `model.safetensors`.

    Raises:
        CheckpointError: if the disk refuses.
    """
    _write_files(folder, {BASE_FILE: _encode(tensors)})


def read_base_weights(run_folder: Path) -> dict[str, Tensor]:
    """Return the base weights of a run that changed them, by name; empty where it did not."""
    file = run_folder / BASE_FOLDER / BASE_FILE
    return load_file(file) if file.is_file() else {}


def _encode(tensors: Mapping[str, Tensor]) -> bytes:
    plain = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    return bytes(save(plain, metadata={"format": "pt"}))


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            replace_file(folder / name, content)
    except OSError as error:
        raise CheckpointError(
            f"the run's folder must be writable, got {error.strerror or error} ({folder}); "
            f"free space: what was saved before is untouched"
        ) from error


def free_name(path: Path) -> str:
    """Return a path as a user would type it: relative to the current folder where it lies inside."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
