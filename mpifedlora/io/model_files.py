"""What a model folder tells without loading the model: whether it is whole, and its layers' names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpifedlora.core.names import describe_no_match
from mpifedlora.errors import AdapterError

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def check_model_folder(name: str) -> None:
    """Check that a local model folder holds a configuration and weights; hub names are left alone.

    Raises:
        AdapterError: naming what is missing.
    """
    folder = Path(name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not folder.exists() and looks_local:
        raise AdapterError(f"model.name must be a model folder that exists, got {name}; check the path")
    if not folder.exists():
        return
    if not (folder / "config.json").is_file():
        raise AdapterError(f"a model folder must hold config.json, got none in {name}; check the path")
    if not any(True for pattern in _WEIGHT_FILES for _ in folder.glob(pattern)):
        raise AdapterError(
            f"a model folder must hold weights (*.safetensors or pytorch_model*.bin), got none in {name}; "
            "download or copy the whole model"
        )


def check_targets(name: str, target_modules: str | Sequence[str]) -> None:
    """Check names of target modules against the weight files' headers, where there are any.

    This finds a misspelt name in milliseconds. A regular expression, or a hub name, is left to the
    full check on the loaded model.

    Raises:
        AdapterError: naming the nearest layers.
    """
    if isinstance(target_modules, str):
        return
    layers = _layer_names(Path(name))
    # The loaded model may put more in front of a name, so only its end can be compared.
    endings = {layer.rpartition(".")[2] for layer in layers}
    for target in target_modules:
        if layers and target.rpartition(".")[2] not in endings:
            raise AdapterError(describe_no_match(target, layers))


def _layer_names(folder: Path) -> set[str]:
    """Return the names of all layers with a matrix, from the headers of *.safetensors."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors") if folder.is_dir() else ():
        names |= {
            key.removesuffix(".weight")
            for key, entry in _header(file).items()
            if key.endswith(".weight") and len(entry["shape"]) == 2 and "embed" not in key
        }
    return names


def _header(file: Path) -> dict[str, Any]:
    # A damaged file has no header: loading the model says what is wrong with it.
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if length <= file.stat().st_size else b""
    try:
        header = json.loads(text)
    except ValueError:
        return {}
    return header if isinstance(header, dict) else {}
