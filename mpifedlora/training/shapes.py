"""What of a base model is adapted, exchanged whole, or neither: its shapes as the core sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from mpifedlora.core.layout import LinearShape, ModelShapes, TensorShape
from mpifedlora.training.base import BaseModel, check_modules
from mpifedlora.training.lora_layers import find_linears, is_inside


class ModelParts(NamedTuple):
    """The parts of a base model, before any adapter is on it.

    Args:
        linears: layers that carry an adapter, by name.
        whole: names of the modules that are trained whole, head first.
        head: their parameters, by name.
        body: every other parameter, by name.
    """

    linears: dict[str, nn.Linear]
    whole: tuple[str, ...]
    head: dict[str, nn.Parameter]
    body: dict[str, nn.Parameter]

    @property
    def shapes(self) -> ModelShapes:
        """What the core needs of them; weights may be on the device `meta`."""
        return ModelShapes(
            tuple(
                LinearShape(name, linear.out_features, linear.in_features)
                for name, linear in self.linears.items()
            ),
            tuple(TensorShape(name, tuple(parameter.shape)) for name, parameter in self.head.items()),
            tuple(TensorShape(name, self._shape(name, parameter)) for name, parameter in self.body.items()),
        )

    def _shape(self, name: str, parameter: nn.Parameter) -> tuple[int, ...]:
        """Return a parameter's own shape, also where its values are packed."""
        linear = self.linears.get(name.removesuffix(".weight"))
        is_weight = linear is not None and name.endswith(".weight")
        return (linear.out_features, linear.in_features) if linear and is_weight else tuple(parameter.shape)


def find_parts(
    base: BaseModel, target_modules: str | Sequence[str], modules_to_save: Sequence[str]
) -> ModelParts:
    """Find what of a base model is adapted, and what is trained whole.

    Args:
        base: model and head.
        target_modules: see `find_linears`.
        modules_to_save: modules trained whole beside the head.

    Raises:
        AdapterError: if a target matches no linear layer, or a module to save does not exist.
    """
    check_modules(base.module, modules_to_save)
    whole = (*base.head_names, *modules_to_save)
    head = {
        f"{name}.{inner}": parameter
        for name in whole
        for inner, parameter in base.module.get_submodule(name).named_parameters()
    }
    body = {
        name: parameter for name, parameter in base.module.named_parameters() if not is_inside(name, whole)
    }
    linears = find_linears(base.module, target_modules, (*whole, *base.fixed_names))
    return ModelParts(linears, whole, head, body)
