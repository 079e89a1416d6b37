"""The weights that a run leaves behind: an adapter as PEFT loads it, and changed base weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from mpifedlora.errors import AdapterError
from mpifedlora.io.atomic import refusal, replace_file
from mpifedlora.io.output_folder import BASE_FOLDER

BASE_FILE = "model.safetensors"
LABELS_FILE = "labels.json"


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
    """Return the base weights of a run that changed them, by name; empty where it did not.

    Raises:
        AdapterError: if the file is damaged.
    """
    file = run_folder / BASE_FOLDER / BASE_FILE
    try:
        return load_file(file) if file.is_file() else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, error) from error


def write_labels(folder: Path, label_names: Sequence[str]) -> None:
    """Write the labels' names in their order, for whoever builds the base model again.

    Raises:
        CheckpointError: if the disk refuses.
    """
    _write_files(folder, {LABELS_FILE: json.dumps(list(label_names), ensure_ascii=False).encode()})


def write_image_processor(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write how images become a model's numbers, as transformers' `AutoImageProcessor` reads it.

    Raises:
        CheckpointError: if the disk refuses.
    """
    _write_files(folder, {"preprocessor_config.json": json.dumps(settings, indent=2).encode()})


def read_labels(folder: Path) -> list[str] | None:
    """Return what `write_labels` has written; None where it has not.

    Raises:
        AdapterError: if the file is damaged.
    """
    file = folder / LABELS_FILE
    try:
        labels = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(file, error) from error
    if labels is not None and not (
        isinstance(labels, list) and all(isinstance(each, str) for each in labels)
    ):
        raise _damaged(file, "no list of names")
    return labels


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name as safetensors.

    Raises:
        CheckpointError: if the disk refuses.
    """
    _write_files(file.parent, {file.name: _encode(tensors)})


def _damaged(file: Path, found: object) -> AdapterError:
    return AdapterError(
        f"{file.name} must be as the run has written it, got {found} ({file}); export the adapter again, or "
        "bring the file back from a backup"
    )


def _encode(tensors: Mapping[str, Tensor]) -> bytes:
    plain = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    return bytes(save(plain, metadata={"format": "pt"}))


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            replace_file(folder / name, content)
    except OSError as error:
        todo = "free space: what was saved before is untouched"
        raise refusal("the run's folder must be writable", error, folder, todo) from error
