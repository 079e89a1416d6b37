"""A PEFT model whose trained tensors are views into one flat buffer.

The buffer is the message: what the optimiser changes is what is sent. Binding a model to another
buffer of the same layout moves no data; after a cut the modules get new, smaller parameters (setting
`.data` to another shape would break autograd).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mpifedlora.core.fresh import initial_adapter
from mpifedlora.core.history import Lasting
from mpifedlora.core.layout import AdapterLayout, Factors, copy_common
from mpifedlora.core.plan import RoundPlan, Segments
from mpifedlora.core.server_optimizer import Cut, CutMap, carry_variate
from mpifedlora.errors import ConfigError
from mpifedlora.training.base import BaseModel, MeanPoolingClassifier, is_quantized, recompute_activations
from mpifedlora.training.flat import digest, flatten, point, views
from mpifedlora.training.lora_layers import (
    ACTIVE,
    FROZEN,
    adapt,
    export_adapter,
    fix,
    head_parameters,
    lora_config,
    lora_layer,
    nothing,
    set_factors,
    trained,
)
from mpifedlora.training.shapes import find_parts


class FederatedModel:
    """A base model with LoRA layers, seen as flat buffers.

    Args:
        base: model and head; it is changed in place.
        rank_max: LoRA rank that training starts with.
        alpha: numerator of the scaling alpha / rank_max, which never changes.
        use_rslora: whether the scaling is alpha / sqrt(rank_max).
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
        use_rslora: bool = False,
        dropout: float = 0.0,
        target_modules: str | Sequence[str] = "all-linear",
        modules_to_save: Sequence[str] = (),
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        parts = find_parts(base, target_modules, modules_to_save)
        self.shapes, linears, whole = parts.shapes, parts.linears, parts.whole
        self.rank_max, self.scaling = rank_max, alpha / (rank_max**0.5 if use_rslora else rank_max)
        self.device = torch.device(device)
        self.options = {"lora_dropout": dropout, "modules_to_save": list(whole), "bias": "none"}
        self.peft_model = adapt(base.module, list(linears), self.options).to(self.device)
        self._layers = [lora_layer(self.peft_model, name) for name in linears]
        self._body = list(parts.body.values())
        self._head = head_parameters(self.peft_model, whole)
        self._folds = all(layer.base_layer.weight.dtype == torch.float32 for layer in self._layers)
        self._frozen: list[list[Factors]] = [[] for _ in self._layers]
        self._is_full = False
        self._compiled: Any = None
        self._first_head = flatten(self._head)
        self.seed = seed
        self.state = torch.empty(0)  # of the global model, as last received
        self.variate = torch.empty(0)  # the server's control variate, as last received
        self._cuts: list[Cut] = []  # of rounds gone by, for control variates that clients kept
        self.built_in = 0  # the last round whose base weights, frozen directions and maps are in here
        for layer in self._layers:
            layer.scaling[ACTIVE] = self.scaling

    @property
    def is_pooled(self) -> bool:
        """Whether the head is ours, on mean-pooled features."""
        return isinstance(self.peft_model.base_model.model, MeanPoolingClassifier)

    def initial_state(self, plan: RoundPlan) -> Tensor:
        """Return the flat state of round 1, which every process derives alike: (num_values,) float32.

        Under scope `full` it is taken from the model, before anything else is bound.
        """
        if plan.scope == "full":
            return torch.cat([flatten(self._body), self._first_head])
        return self._fresh(plan, self._first_head)

    def _fresh(self, plan: RoundPlan, head: Tensor) -> Tensor:
        return initial_adapter(self.shapes, plan.lora_ranks, head, self.seed, plan.round_num)

    def receive(self, plan: RoundPlan, message: Tensor) -> None:
        """Take in a message: base weights and frozen directions now, the state when a model is bound.

        Args:
            plan: of the round.
            message: (message_values,) float32; it must live until the next one.
        """
        parts = plan.split(self.shapes, message)
        self._build_in(plan, parts)
        self.variate = parts.variate
        self.state = self._received_state(plan, parts.state) if plan.sends_state else self.initial_state(plan)

    def _build_in(self, plan: RoundPlan, parts: Segments) -> None:
        if plan.round_num <= self.built_in:
            return  # it came before: the server sends a round again whose workers were lost
        self.built_in = plan.round_num
        if plan.sends_base:
            point(self._body, self.shapes.base().whole_tensors(parts.base.to(self.device, copy=True)))
        if parts.frozen.numel():
            self._freeze(plan, parts.frozen)
        if plan.mapped_ranks:
            self._cuts.append(self._cut(plan, parts.maps))

    def recover(
        self, history: Sequence[Lasting], state: Tensor, weights: Mapping[str, Tensor], built_in: int
    ) -> None:
        """Become what a process was that has received all messages of a run so far.

        Args:
            history: what they brought once, in order.
            state: (state values,), the last of them.
            weights: base weights of the adapted layers, where directions were folded into them.
            built_in: the last round that these weights hold.
        """
        for plan, values in history:
            self._build_in(plan, plan.split(self.shapes, values))
        for name, weight in self._adapted().items():
            if name in weights:
                weight.copy_(weights[name])
        self.built_in = max(self.built_in, built_in if weights else 0)
        self.state = state.clone()

    def _received_state(self, plan: RoundPlan, sent: Tensor) -> Tensor:
        layout, source = plan.layout(self.shapes), plan.segments(self.shapes).state
        if plan.restarts:
            return self._fresh(plan, sent)
        if source == layout and not plan.is_partial:
            return sent
        # What is not sent stays as it was, so the state may not live in the buffer of one message.
        kept = self.state if self.state.numel() == layout.num_values else torch.zeros(layout.num_values)
        return copy_common(source, sent, layout, kept.clone())

    def start(self, plan: RoundPlan, client_id: int, memory: Mapping[str, Tensor]) -> Tensor:
        """Return what a client starts from, (trained values,) float32 on the CPU; it may be the state itself.

        Args:
            plan: of the round.
            client_id: 0..num_clients-1.
            memory: what the client has kept; what is its own, under `personal`, starts as it does globally.
        """
        layout, own = plan.layout(self.shapes), plan.trained_layout(self.shapes, client_id)
        if own == layout and not plan.keeps_b:
            return self.state
        flat = copy_common(layout, self.state, own, torch.empty(own.num_values))
        if "personal" in memory:
            copy_common(plan.personal_layout(self.shapes, client_id), memory["personal"], own, flat)
        return flat

    def _cut(self, plan: RoundPlan, values: Tensor) -> Cut:
        sides = plan.segments(self.shapes).maps.whole_tensors(values.clone())
        after = plan.shared_layout(self.shapes)
        maps = [CutMap(a, b) for a, b in zip(sides[::2], sides[1::2], strict=True)]
        return Cut(plan.round_num, replace(after, lora_ranks=plan.mapped_ranks), after, maps)

    def carried(self, variate: Tensor, round_num: int) -> Tensor:
        """Take a client's control variate through the cuts since the round that it is of."""
        for cut in self._cuts:
            if cut.round_num > round_num:
                variate = carry_variate(variate, cut.before, cut.after, cut.maps)
        return variate

    def bind(
        self, plan: RoundPlan, flat: Tensor, grad: Tensor | None = None, client_id: int | None = None
    ) -> None:
        """Make the trained tensors views into `flat`, and their gradients views into `grad`.

        Args:
            plan: of the round; it fixes scope and layout.
            flat: on the model's device: (trained values,) float32 of a client, or without one the
                whole state.
            grad: the same, or None where nothing is trained.
            client_id: whose values they are.
        """
        self._enter(plan.scope)
        layout = plan.layout(self.shapes)
        if client_id is not None:
            layout = plan.trained_layout(self.shapes, client_id)
        parameters = self._bind_values(plan, layout, flat)
        if grad is not None:
            for parameter, view in zip(parameters, views(layout, grad), strict=True):
                parameter.grad = view

    def _bind_values(self, plan: RoundPlan, layout: AdapterLayout, flat: Tensor) -> list[nn.Parameter]:
        whole, parameters = [*self._body, *self._head], []
        if layout.modules:
            whole = self._head
            for layer, factors in zip(self._layers, self._factors(plan, layout, flat), strict=True):
                a, b = set_factors(layer, ACTIVE, factors)
                parameters += trained(a, "a" in layout.parts) + trained(b, "b" in layout.parts)
        point(whole, layout.whole_tensors(flat))
        return parameters + whole

    def _factors(self, plan: RoundPlan, layout: AdapterLayout, flat: Tensor) -> list[Factors]:
        own = layout.factors(flat)
        if layout.parts == "ab":
            return own
        state = plan.layout(self.shapes).factors(self.state.to(self.device))
        if layout.parts == "a":
            return [Factors(part.a, fixed.b) for part, fixed in zip(own, state, strict=True)]
        return [Factors(fixed.a, part.b) for part, fixed in zip(own, state, strict=True)]

    def _enter(self, scope: str) -> None:
        is_full = scope == "full"
        if is_full == self._is_full:
            return
        self._is_full = is_full
        for parameter in self._body:
            parameter.requires_grad_(is_full)
            parameter.grad = None
        for layer in self._layers:
            layer.enable_adapters(not is_full)

    def _freeze(self, plan: RoundPlan, frozen: Tensor) -> None:
        layout = self.shapes.frozen(plan.frozen_ranks)
        values = frozen.to(self.device, copy=True)
        dense = {
            shape.name: matrix
            for shape, matrix in zip(layout.whole, layout.whole_tensors(values), strict=True)
        }
        per_module = zip(self._layers, layout.modules, layout.factors(values), self._frozen, strict=True)
        for layer, module, factors, kept in per_module:
            if module.name in dense and is_quantized(layer.base_layer):
                identity = torch.eye(module.in_features, device=self.device)
                kept.append(Factors(identity, dense[module.name]))
                self._set_frozen(layer, kept)
            elif module.name in dense:
                layer.base_layer.weight.data.add_(dense[module.name], alpha=self.scaling)
            elif self._folds:
                layer.base_layer.weight.data.addmm_(factors.b, factors.a, alpha=self.scaling)
            elif factors.lora_rank:
                kept.append(factors)
                self._set_frozen(layer, kept)

    def _set_frozen(self, layer: Any, kept: Sequence[Factors]) -> None:
        # bfloat16 weights would round the low-energy directions away: they stay a second adapter.
        if FROZEN not in self.peft_model.peft_config:
            # What is frozen is part of the base: no dropout, no gradients.
            options = {**self.options, "modules_to_save": None, "lora_dropout": 0.0}
            names = [module.name for module in self.shapes.modules]
            self.peft_model.add_adapter(FROZEN, lora_config(names, options, 1, self.scaling))
            for other in self._layers:
                other.set_adapter([ACTIVE, FROZEN])
                fix(set_factors(other, FROZEN, nothing(other)))
        both = Factors(torch.cat([part.a for part in kept]), torch.cat([part.b for part in kept], dim=1))
        fix(set_factors(layer, FROZEN, both))
        layer.scaling[FROZEN] = self.scaling

    def adapted_weights(self) -> dict[str, Tensor]:
        """Return the base weights of all adapted layers, with what was added to them, on the CPU."""
        return {name: weight.cpu() for name, weight in self._adapted().items()}

    def _adapted(self) -> dict[str, Tensor]:
        names = (f"{module.name}.weight" for module in self.shapes.modules)
        return {
            name: layer.base_layer.weight.detach() for name, layer in zip(names, self._layers, strict=True)
        }

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the base model's logits, of a classifier (examples, num_labels)."""
        is_compiled = self._compiled is not None and self.peft_model.training
        logits: Tensor = (self._compiled if is_compiled else self.peft_model)(**batch).logits
        return logits

    def compile(self) -> None:
        """Compile the passes of training, when they are first made and again for every other rank.

        After eight ranks (torch's `recompile_limit`) the others run as they are.

        Raises:
            ConfigError: if torch cannot compile on this process's device.
        """
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(1, device=self.device))
        # A missing compiler, a missing package and a wrong driver come as any kind of error.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(
                f"training.compile = true needs a compiler that torch can use, got {reason} ({self.device}); "
                "install g++ (and triton for a GPU), or set training.compile = false"
            ) from error
        self._compiled = torch.compile(self.peft_model, dynamic=True)

    def checkpoint_activations(self) -> None:
        """Keep only the inputs of the base model's layers for the backward pass, and compute the rest again.

        Raises:
            AdapterError: if the base model cannot.
        """
        recompute_activations(self.peft_model.base_model.model)

    def train(self, is_training: bool) -> None:
        """Switch dropout on or off."""
        self.peft_model.train(is_training)

    def digest(self) -> str:
        """Return a short digest of names, shapes and samples of all weights before training."""
        return digest(repr(self.shapes), [*self._body, *self._head])

    def export(
        self, factors: Sequence[Factors], head: Sequence[Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return an adapter as PEFT writes it: `adapter_config.json`, and tensors by name.

        Args:
            factors: one pair a module, of any ranks.
            head: in the shapes of `shapes.head`.
        """
        return export_adapter(self.shapes, factors, head, self.scaling, self.options)
