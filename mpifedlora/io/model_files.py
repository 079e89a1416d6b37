"""What a model folder tells without loading the model: whether it is whole, its layers' names and sizes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mpifedlora.core.memory_estimate import Matrix, ModelSizes
from mpifedlora.core.names import describe_no_match
from mpifedlora.core.patterns import compile_pattern, matches_within
from mpifedlora.core.tasks import check_length, longest_input
from mpifedlora.errors import AdapterError
from mpifedlora.io.data_fetch import minilm_folder

_HUB_MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def model_path(name: str) -> str:
    """Return the folder or hub name of a model; `minilm` is the packaged one, or else the hub's."""
    if name != "minilm":
        return name
    folder = minilm_folder()
    return str(folder) if folder else _HUB_MINILM


def hub_name(name: str) -> str:
    """Return what others know a model by: `minilm` has a name on the hub too."""
    return _HUB_MINILM if name == "minilm" else name


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


def check_positions(name: str, max_length: int) -> None:
    """Check `data.max_length` against a model folder's configuration; hub names are left to the full check.

    Raises:
        ConfigError: if the model has positions for fewer tokens.
    """
    with suppress(OSError):  # loading the model says what is wrong with it
        check_length(_table((Path(name) / "config.json").read_bytes()), max_length, name)


def check_targets(name: str, target_modules: str | Sequence[str]) -> None:
    """Check names of target modules against the weight files' headers, where there are any.

    This finds a misspelt name in milliseconds. Whether a regular expression matches, and a hub name, is
    left to the full check on the loaded model.

    Raises:
        AdapterError: naming the nearest layers, or what is no regular expression.
    """
    if isinstance(target_modules, str):
        compile_pattern(target_modules)
        return
    layers = _layer_names(Path(name))
    # The loaded model may put more in front of a name, so only its end can be compared.
    endings = {layer.rpartition(".")[2] for layer in layers}
    for target in target_modules:
        if layers and target.rpartition(".")[2] not in endings:
            raise AdapterError(describe_no_match(target, layers))


def _layer_names(folder: Path) -> set[str]:
    """Return the names of all layers with a matrix, from the headers of *.safetensors."""
    return set(_linears(_tensors(folder)))


def _linears(tensors: Mapping[str, Sequence[int]]) -> dict[str, Matrix]:
    return {
        key.removesuffix(".weight"): Matrix(*shape)
        for key, shape in tensors.items()
        if key.endswith(".weight") and len(shape) == 2 and "embed" not in key
    }


def _tensors(folder: Path) -> dict[str, Sequence[int]]:
    """Return the shapes of all tensors, from the headers of *.safetensors."""
    shapes: dict[str, Sequence[int]] = {}
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        named = _header(file).items()
        shapes |= {key: entry["shape"] for key, entry in named if _has_shape(entry)}
    return shapes


def _has_shape(entry: Any) -> bool:
    """Say whether an entry of a header is a tensor's, and not a text or damaged."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    return isinstance(shape, list) and all(isinstance(size, int) and 0 <= size < 2**48 for size in shape)


def read_model_sizes(name: str, target_modules: str | Sequence[str]) -> ModelSizes | None:
    """Return the sizes that a model's memory depends on, from config.json and the weight files' headers.

    Where there are only other weight files, the layers follow from config.json.

    Args:
        name: folder of a model.
        target_modules: see `[lora]`; names that match nothing count as all of them.

    Returns:
        None where there is no folder, as for hub names, or its config.json does not tell.

    Raises:
        AdapterError: if `target_modules` is no regular expression.
    """
    try:
        given = _table((Path(name) / "config.json").read_bytes())
        config = {key: value for key, value in given.items() if value is not None}
        tensors = _tensors(Path(name)) or _tensors_of(config)
        linears = {key: shape for key, shape in _linears(tensors).items() if not _OUTSIDE.search(key)}
        return ModelSizes(
            base_values=sum(map(math.prod, tensors.values())),
            linears=tuple(linears.values()),
            adapted=tuple(_targeted(linears, target_modules)),
            num_layers=_first(config, "num_hidden_layers", "n_layers", "n_layer", "num_layers"),
            hidden_size=_first(config, *_HIDDEN),
            num_heads=_first(config, "num_attention_heads", "n_heads", "n_head", "num_heads"),
            max_tokens=longest_input(config),
        )
    except AdapterError:
        raise
    # Without a configuration, or with one of another kind, nothing is known.
    except (OSError, ValueError, TypeError, StopIteration, OverflowError):
        return None


_MOST_LAYERS = 10_000  # of no model: they are listed one by one
_HIDDEN = ("hidden_size", "n_embd", "d_model", "dim")
# Embeddings by other names, and heads of the model's former task, which are replaced.
_OUTSIDE = re.compile(r"(^|\.)(wte|wpe|shared|lm_head|score|classifier|pre_classifier|pooler|cls)(\.|$)")


def _first(config: Mapping[str, Any], *names: str) -> int:
    return int(next(config[name] for name in names if name in config))


def _targeted(linears: Mapping[str, Matrix], targets: str | Sequence[str]) -> list[Matrix]:
    if targets == "all-linear":
        return list(linears.values())
    if isinstance(targets, str):
        pattern = compile_pattern(targets)
        found = [shape for name, shape in linears.items() if matches_within(pattern, name)]
    else:
        endings = tuple(f".{target}" for target in targets)
        found = [shape for name, shape in linears.items() if f".{name}".endswith(endings)]
    return found or list(linears.values())


def _tensors_of(config: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """Return the shapes of a transformer's matrices: four of attention, two or three of the MLP a layer."""
    hidden = _first(config, *_HIDDEN)
    inner = _first({**config, "": 4 * hidden}, "intermediate_size", "hidden_dim", "d_ff", "n_inner", "")
    is_gated = config.get("hidden_act") in ("silu", "gelu_pytorch_tanh")
    mlp = [(inner, hidden), (hidden, inner), *[(inner, hidden)] * is_gated]
    num_layers = _first(config, "num_hidden_layers", "n_layers", "n_layer", "num_layers")
    if num_layers > _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers = {num_layers}")
    per_layer = [*[(hidden, hidden)] * 4, *mlp]
    layers = {
        f"layer.{layer}.{index}.weight": shape
        for layer in range(num_layers)
        for index, shape in enumerate(per_layer)
    }
    return {"embeddings.weight": (int(config.get("vocab_size", 0)), hidden), **layers}


def _header(file: Path) -> dict[str, Any]:
    # A damaged file has no header: loading the model says what is wrong with it.
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if length <= file.stat().st_size else b""
    return _table(text)


def _table(text: bytes) -> dict[str, Any]:
    """Return the table that a JSON text holds; empty where it is damaged or holds none."""
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}
