"""What messages bring once: every process builds it in when it comes, and a resumed one must again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mpifedlora.core.layout import AdapterLayout, Factors, ModelShapes
from mpifedlora.core.lowrank import concatenate
from mpifedlora.core.plan import RoundPlan


class Lasting(NamedTuple):
    """The parts of one message that outlast its round: base weights, frozen directions, maps.

    Args:
        plan: of the round, as if the message held nothing else.
        values: (message_values of that plan,) float32.
    """

    plan: RoundPlan
    values: Tensor

    def frozen(self, shapes: ModelShapes) -> list[Factors]:
        """Return each module's frozen directions."""
        layout: AdapterLayout = self.plan.segments(shapes).frozen
        return layout.factors(self.plan.split(shapes, self.values).frozen)


def lasting(plan: RoundPlan, shapes: ModelShapes, message: Tensor, *, with_frozen: bool) -> Lasting | None:
    """Return a copy of what of a message outlasts its round, or None where nothing does.

    Args:
        plan: of the round.
        shapes: of the model.
        message: (message_values,).
        with_frozen: whether frozen directions count.
    """
    if not (plan.sends_base or plan.mapped_ranks or any(plan.frozen_ranks)):
        return None
    kept = replace(plan, sends_state=False, has_variates=False)
    parts = plan.split(shapes, message)
    held = [parts.base, parts.frozen, parts.maps]
    if not with_frozen:
        kept, held = replace(kept, frozen_ranks=(0,) * len(plan.frozen_ranks)), [parts.base, parts.maps]
    values = torch.cat(held)
    return Lasting(kept, values) if values.numel() else None


def trained_base(history: Sequence[Lasting], shapes: ModelShapes) -> Tensor | None:
    """Return the base weights that a `full` stage has trained (base values,), if it has ended."""
    for one in history:
        if one.plan.sends_base:
            base: Tensor = one.plan.split(shapes, one.values).base
            return base
    return None


class Trained(NamedTuple):
    """A global model: what the rounds so far have made of the pre-trained one.

    Args:
        shapes: of the model.
        plan: of the round to come.
        state: (state values,) float32, in that round's layout.
        history: what messages have brought once.
    """

    shapes: ModelShapes
    plan: RoundPlan
    state: Tensor
    history: Sequence[Lasting]

    def adapter(self) -> tuple[list[Factors], list[Tensor]]:
        """Return the global adapter: each module's active and frozen directions joined, and the head.

        The joined rank is at most rank_max, the rank that training started with.
        """
        layout = self.plan.layout(self.shapes)
        frozen = [one.frozen(self.shapes) for one in self.history]
        joined = map(concatenate, zip(layout.factors(self.state), *frozen, strict=True))
        return list(joined), layout.whole_tensors(self.state)

    def base_weights(self) -> dict[str, Tensor]:
        """Return the base weights that a `full` stage has trained, by name."""
        if self.plan.scope == "full":
            layout, flat = self.shapes.full(), self.state
        else:
            body = trained_base(self.history, self.shapes)
            if body is None:
                return {}
            layout, flat = self.shapes.base(), body
        tensors = layout.whole_tensors(flat)
        return {shape.name: tensor for shape, tensor in zip(layout.whole, tensors, strict=True)}
