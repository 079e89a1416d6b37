"""PEFT's LoRA layers: finding them, giving them weights, writing them in PEFT's own format."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpifedlora.core.layout import Factors, ModelShapes
from mpifedlora.core.names import describe_no_match
from mpifedlora.core.patterns import compile_pattern, matches_whole
from mpifedlora.errors import AdapterError
from mpifedlora.training.base import is_quantized

ACTIVE, FROZEN = "default", "frozen"


def export_adapter(
    shapes: ModelShapes,
    factors: Sequence[Factors],
    head: Sequence[Tensor],
    scaling: float,
    options: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write factors in PEFT's format, with per-module ranks and alphas that keep the scaling.

    PEFT scales by alpha / r of each module: so alpha is scaling * r, module by module.
    """
    names = [module.name for module in shapes.modules]
    largest = max(part.lora_rank for part in factors)
    config = lora_config(names, options, largest, scaling)
    others = {name: part.lora_rank for name, part in zip(names, factors, strict=True)}
    config.rank_pattern = {name: others[name] for name in names if others[name] < largest}
    config.alpha_pattern = {name: scaling * others[name] for name in config.rank_pattern}
    config.inference_mode = True
    tensors = {}
    for name, part in zip(names, factors, strict=True):
        tensors[f"base_model.model.{name}.lora_A.weight"] = part.a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = part.b.contiguous()
    for shape, value in zip(shapes.head, head, strict=True):
        tensors[f"base_model.model.{shape.name}"] = value.contiguous()
    plain = {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()
    }
    return plain, tensors


def find_linears(
    model: nn.Module, target_modules: str | Sequence[str], excluded: Sequence[str] = ()
) -> dict[str, nn.Linear]:
    """Find the linear layers to adapt, in the model's order.

    Args:
        model: base model.
        target_modules: `all-linear`, a regular expression for the whole name, or names or endings of
            names, as PEFT takes them.
        excluded: modules that are trained whole; nothing inside them is adapted.

    Raises:
        AdapterError: if a target matches nothing, or is no regular expression.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not is_inside(name, excluded)
    }
    is_pattern = isinstance(target_modules, str)
    targets = [target_modules] if isinstance(target_modules, str) else target_modules
    found: set[str] = set()
    for target in targets:
        matches = _matches(list(linears), target, is_pattern)
        if not matches:
            raise AdapterError(describe_no_match(target, linears, is_pattern=is_pattern))
        found.update(matches)
    return {name: linears[name] for name in linears if name in found}


def _matches(names: list[str], target: str, is_pattern: bool) -> list[str]:
    if not is_pattern:
        return [name for name in names if name == target or name.endswith("." + target)]
    if target == "all-linear":
        return names
    pattern = compile_pattern(target)
    return [name for name in names if matches_whole(pattern, name)]


def is_inside(name: str, modules: Sequence[str]) -> bool:
    """Say whether a name is one of the modules or lies in one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def lora_config(names: list[str], options: dict[str, Any], lora_rank: int, scaling: float) -> Any:
    """Return a `LoraConfig` whose alpha / r is the scaling."""
    from peft import LoraConfig

    return LoraConfig(r=lora_rank, lora_alpha=scaling * lora_rank, target_modules=names, **options)


def adapt(model: nn.Module, names: list[str], options: dict[str, Any]) -> Any:
    """Put LoRA layers on a model; their weights come with the first bind."""
    from peft import get_peft_model

    from mpifedlora.training.fused import FusedLinear

    # Rank 1 is a place-holder: the first bind brings the real ranks.
    config = lora_config(names, options, 1, 1.0)
    if not any(is_quantized(model.get_submodule(name)) for name in names):  # PEFT has layers for these
        config._register_custom_module({nn.Linear: FusedLinear})
    with warnings.catch_warnings():
        # Of transformers, for a name that PEFT asks for.
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        return get_peft_model(model, config)


def lora_layer(peft_model: Any, name: str) -> Any:
    """Return the LoRA layer of an adapted module."""
    return peft_model.base_model.model.get_submodule(name)


def head_parameters(peft_model: Any, names: Sequence[str]) -> list[nn.Parameter]:
    """Return the trained copies of the modules to save, in order."""
    wrappers = (peft_model.base_model.model.get_submodule(name) for name in names)
    return [parameter for one in wrappers for parameter in one.modules_to_save[ACTIVE].parameters()]


def set_factors(layer: Any, adapter: str, factors: Factors) -> list[nn.Parameter]:
    """Make a layer's A and B views of the factors, whatever their rank; return both."""
    layer.r[adapter] = factors.lora_rank
    return [
        _set_weight(layer.lora_A[adapter], factors.a),
        _set_weight(layer.lora_B[adapter], factors.b),
    ]


def _set_weight(linear: nn.Linear, value: Tensor) -> nn.Parameter:
    if linear.weight.shape == value.shape:
        linear.weight.data = value
    else:
        linear.weight = nn.Parameter(value)
        linear.out_features, linear.in_features = value.shape
    parameter = linear.weight
    assert isinstance(parameter, nn.Parameter)
    return parameter


def trained(parameter: nn.Parameter, is_trained: bool) -> list[nn.Parameter]:
    """Switch a parameter's gradient on or off; return it if it is trained."""
    parameter.requires_grad_(is_trained)
    if not is_trained:
        parameter.grad = None
    return [parameter] if is_trained else []


def fix(parameters: Sequence[nn.Parameter]) -> None:
    """Switch gradients off."""
    for parameter in parameters:
        parameter.requires_grad_(False)


def nothing(layer: Any) -> Factors:
    """Return factors of rank 1 whose product is zero."""
    out_features, in_features = layer.base_layer.out_features, layer.base_layer.in_features
    device = layer.base_layer.weight.device
    return Factors(torch.zeros(1, in_features, device=device), torch.zeros(out_features, 1, device=device))
