"""A trained model as plain transformers loads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpifedlora.core.layout import Factors, ModelShapes
from mpifedlora.errors import AdapterError
from mpifedlora.training.base import MeanPoolingClassifier, Module, linears_to_conv1ds


def merge_adapter(
    base: Module, shapes: ModelShapes, factors: Sequence[Factors], head: Sequence[Tensor], scaling: float
) -> Module:
    """Add an adapter to the weights that it belongs to, in float32.

    Args:
        base: model with the adapter's base weights; it is changed in place.
        shapes: of the model.
        factors: one pair a module.
        head: in the shapes of `shapes.head`.
        scaling: of the adapter.
    """
    weights = dict(base.float().named_parameters())
    for module, part in zip(shapes.modules, factors, strict=True):
        weights[f"{module.name}.weight"].data.addmm_(part.b, part.a, alpha=scaling)
    for shape, value in zip(shapes.head, head, strict=True):
        weights[shape.name].data.copy_(value)
    return base


def save_model(module: Module, folder: Path, label_names: Sequence[str], dtype: str) -> dict[str, Tensor]:
    """Write a model as transformers' own classes load it.

    Args:
        module: a model of transformers, or ours on an encoder.
        folder: for `config.json` and `model.safetensors`.
        label_names: for its configuration.
        dtype: of the weights.

    Returns:
        The weights of a head that no class of transformers has, by name, which are not written.

    Raises:
        AdapterError: if it is no model of transformers.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    is_pooled = isinstance(module, MeanPoolingClassifier)
    model: Any = module.encoder if is_pooled else module
    if not hasattr(model, "save_pretrained"):
        raise AdapterError(
            f"--merge needs a model of transformers, got a {type(model).__name__}; leave --merge out: the "
            "adapter fits what the task's file builds"
        )
    linears_to_conv1ds(model)
    model.config.use_cache = True  # training switches it off
    if label_names and not model.can_generate():
        model.config.id2label = dict(enumerate(label_names))
        model.config.label2id = {name: number for number, name in enumerate(label_names)}
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    head = module.get_submodule("classifier").state_dict() if is_pooled else {}
    return {name: value.float() for name, value in head.items()}
