"""A PEFT model whose trained tensors are views into one flat buffer.

The buffer is the message: what the optimiser changes is what is sent. Binding a model to another
buffer of the same layout moves no data; after a cut the modules get new, smaller parameters (setting
`.data` to another shape would break autograd).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpifedlora.core.layout import AdapterLayout, Factors, LinearShape, ModelShapes, TensorShape
from mpifedlora.core.names import describe_no_match
from mpifedlora.core.rounds import initial_adapter
from mpifedlora.core.wire import RoundPlan
from mpifedlora.errors import AdapterError
from mpifedlora.training.base import BaseModel, check_modules

_ACTIVE, _FROZEN = "default", "frozen"


class FederatedModel:
    """A base model with LoRA layers, seen as flat buffers.

    Args:
        base: model and head; it is changed in place.
        rank_max: LoRA rank that training starts with.
        alpha: numerator of the scaling alpha / rank_max, which never changes.
        dropout: on the adapter's input.
        target_modules: see `find_linears`.
        modules_to_save: modules trained whole beside the head.
        device: where the model computes.
        seed: of the initial adapter.

    Raises:
        AdapterError: if a target matches no linear layer, or a module to save does not exist.
    """

    def __init__(
        self,
        base: BaseModel,
        *,
        rank_max: int,
        alpha: float,
        dropout: float = 0.0,
        target_modules: str | Sequence[str] = "all-linear",
        modules_to_save: Sequence[str] = (),
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        check_modules(base.module, modules_to_save)
        whole = (*base.head_names, *modules_to_save)
        linears = find_linears(base.module, target_modules, whole)
        body = {
            name: parameter
            for name, parameter in base.module.named_parameters()
            if not _is_inside(name, whole)
        }
        self.rank_max, self.scaling = rank_max, alpha / rank_max
        self.device = torch.device(device)
        self.options = {"lora_dropout": dropout, "modules_to_save": list(whole), "bias": "none"}
        self.peft_model = _adapt(base.module, list(linears), self.options).to(self.device)
        self._layers = [_lora_layer(self.peft_model, name) for name in linears]
        self._body = list(body.values())
        head = _head_parameters(self.peft_model, whole)
        self._head = list(head.values())
        self._folds = all(layer.base_layer.weight.dtype == torch.float32 for layer in self._layers)
        self._frozen: list[list[Factors]] = [[] for _ in self._layers]
        self._scope = "adapter"
        self.seed = seed
        self.state = torch.empty(0)  # of the global model, as last received
        self.shapes = ModelShapes(
            tuple(LinearShape(name, *linears[name].weight.shape) for name in linears),
            tuple(TensorShape(name, tuple(parameter.shape)) for name, parameter in head.items()),
            tuple(TensorShape(name, tuple(parameter.shape)) for name, parameter in body.items()),
        )
        for layer in self._layers:
            layer.scaling[_ACTIVE] = self.scaling

    def initial_state(self, plan: RoundPlan) -> Tensor:
        """Return the flat state of round 1, which every process derives alike: (num_values,) float32."""
        head = _flat(self._head)
        if plan.scope == "full":
            return torch.cat([_flat(self._body), head])
        return initial_adapter(self.shapes, plan.lora_ranks, head, self.seed)

    def receive(self, plan: RoundPlan, message: Tensor) -> None:
        """Take in a message: base weights and frozen directions now, the state when a model is bound.

        Args:
            plan: of the round.
            message: (message_values,) float32; it must live until the next one.
        """
        base, frozen, state = plan.split(self.shapes, message)
        if plan.sends_base:
            _point(self._body, self.shapes.base().whole_tensors(base.to(self.device, copy=True)))
        if frozen.numel():
            self._freeze(self.shapes.directions(plan.frozen_ranks).factors(frozen))
        self.state = state if plan.sends_state else self.initial_state(plan)

    def bind(self, plan: RoundPlan, flat: Tensor, grad: Tensor | None = None) -> None:
        """Make the trained tensors views into `flat`, and their gradients views into `grad`.

        Args:
            plan: of the round; it fixes scope and layout.
            flat: (num_values,) float32 on the model's device.
            grad: the same, or None where nothing is trained.
        """
        self._enter(plan.scope)
        layout = plan.layout(self.shapes)
        parameters = self._bind_values(layout, flat)
        if grad is not None:
            for parameter, view in zip(parameters, _views(layout, grad), strict=True):
                parameter.grad = view

    def _bind_values(self, layout: AdapterLayout, flat: Tensor) -> list[nn.Parameter]:
        parameters: list[nn.Parameter] = []
        if layout.modules:
            for layer, factors in zip(self._layers, layout.factors(flat), strict=True):
                parameters += _set_factors(layer, _ACTIVE, factors, is_trained=True)
            whole = self._head
        else:
            whole = [*self._body, *self._head]
        _point(whole, layout.whole_tensors(flat))
        return parameters + whole

    def _enter(self, scope: str) -> None:
        if scope == self._scope:
            return
        self._scope = scope
        for parameter in self._body:
            parameter.requires_grad_(scope == "full")
            parameter.grad = None
        for layer in self._layers:
            layer.enable_adapters(scope == "adapter")

    def _freeze(self, directions: Sequence[Factors]) -> None:
        for layer, factors, kept in zip(self._layers, directions, self._frozen, strict=True):
            on_device = Factors(*(part.to(self.device, copy=True) for part in factors))
            if self._folds:
                layer.base_layer.weight.data.addmm_(on_device.b, on_device.a, alpha=self.scaling)
            elif factors.lora_rank:
                kept.append(on_device)
                self._set_frozen(layer, kept)

    def _set_frozen(self, layer: Any, kept: Sequence[Factors]) -> None:
        # bfloat16 weights would round the low-energy directions away: they stay a second adapter.
        if _FROZEN not in self.peft_model.peft_config:
            # What is frozen is part of the base: no dropout, no gradients.
            options = {**self.options, "modules_to_save": None, "lora_dropout": 0.0}
            names = [module.name for module in self.shapes.modules]
            self.peft_model.add_adapter(_FROZEN, _lora_config(names, options, 1, self.scaling))
            for other in self._layers:
                other.set_adapter([_ACTIVE, _FROZEN])
                _set_factors(other, _FROZEN, _nothing(other), is_trained=False)
        both = Factors(torch.cat([part.a for part in kept]), torch.cat([part.b for part in kept], dim=1))
        _set_factors(layer, _FROZEN, both, is_trained=False)
        layer.scaling[_FROZEN] = self.scaling

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Return logits (examples, num_labels)."""
        logits: Tensor = self.peft_model(**batch).logits
        return logits

    def train(self, is_training: bool) -> None:
        """Switch dropout on or off."""
        self.peft_model.train(is_training)

    def digest(self) -> str:
        """Return a short digest of names, shapes and samples of all weights before training."""
        crc = zlib.crc32(repr(self.shapes).encode())
        for parameter in [*self._body, *self._head]:
            flat = parameter.detach().reshape(-1)
            sample = torch.cat([flat[:256], flat[-256:]]).float().cpu()
            crc = zlib.crc32(sample.numpy().tobytes(), crc)
        return f"{crc:08x}"

    def export(
        self, factors: Sequence[Factors], head: Sequence[Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return an adapter as PEFT writes it: `adapter_config.json`, and tensors by name.

        Args:
            factors: one pair a module, of any ranks.
            head: in the shapes of `shapes.head`.
        """
        return export_adapter(self.shapes, factors, head, self.scaling, self.options)


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
    config = _lora_config(names, options, largest, scaling)
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
        if isinstance(module, nn.Linear) and not _is_inside(name, excluded)
    }
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    is_regex = isinstance(target_modules, str)
    found: dict[str, nn.Linear] = {}
    for target in targets:
        matches = {name: linears[name] for name in linears if _matches(name, target, is_regex)}
        if not matches:
            raise AdapterError(describe_no_match(target, linears, is_pattern=is_regex))
        found.update(matches)
    return {name: linears[name] for name in linears if name in found}


def _matches(name: str, target: str, is_regex: bool) -> bool:
    if not is_regex:
        return name == target or name.endswith("." + target)
    try:
        return target == "all-linear" or re.fullmatch(target, name) is not None
    except re.error as error:
        raise AdapterError(
            "lora.target_modules must be a list of names or a regular expression, got "
            f'{target!r} ({error}); for names write a list, as in ["query", "value"]'
        ) from error


def _is_inside(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def _lora_config(names: list[str], options: dict[str, Any], lora_rank: int, scaling: float) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=lora_rank, lora_alpha=scaling * lora_rank, target_modules=names, **options)


def _adapt(model: nn.Module, names: list[str], options: dict[str, Any]) -> Any:
    from peft import get_peft_model

    # Rank 1 is a place-holder: the first bind brings the real ranks.
    return get_peft_model(model, _lora_config(names, options, 1, 1.0))


def _lora_layer(peft_model: Any, name: str) -> Any:
    return peft_model.base_model.model.get_submodule(name)


def _head_parameters(peft_model: Any, names: Sequence[str]) -> dict[str, nn.Parameter]:
    found = {}
    for name in names:
        wrapper = peft_model.base_model.model.get_submodule(name)
        for inner, parameter in wrapper.modules_to_save[_ACTIVE].named_parameters():
            found[f"{name}.{inner}"] = parameter
    return found


def _set_factors(layer: Any, adapter: str, factors: Factors, *, is_trained: bool) -> list[nn.Parameter]:
    layer.r[adapter] = factors.lora_rank
    return [
        _set_weight(layer.lora_A[adapter], factors.a, is_trained),
        _set_weight(layer.lora_B[adapter], factors.b, is_trained),
    ]


def _set_weight(linear: nn.Linear, value: Tensor, is_trained: bool) -> nn.Parameter:
    if linear.weight.shape == value.shape:
        linear.weight.data = value
    else:
        linear.weight = nn.Parameter(value)
        linear.out_features, linear.in_features = value.shape
    parameter = linear.weight.requires_grad_(is_trained)
    assert isinstance(parameter, nn.Parameter)
    return parameter


def _nothing(layer: Any) -> Factors:
    out_features, in_features = layer.base_layer.weight.shape
    device = layer.base_layer.weight.device
    return Factors(torch.zeros(1, in_features, device=device), torch.zeros(out_features, 1, device=device))


def _point(parameters: Sequence[nn.Parameter], views: Sequence[Tensor]) -> None:
    for parameter, view in zip(parameters, views, strict=True):
        parameter.data = view


def _views(layout: AdapterLayout, flat: Tensor) -> list[Tensor]:
    pairs = [part for factors in layout.factors(flat) for part in factors]
    return pairs + layout.whole_tensors(flat)


def _flat(parameters: Sequence[nn.Parameter]) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1).float().cpu() for parameter in parameters])
