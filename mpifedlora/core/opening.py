"""What a round opens with: its plan, the one flat buffer that goes with it, and the whole state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpifedlora.core.layout import DENSE, Factors, LinearShape, ModelShapes, copy_common
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.server_optimizer import CutMap


class Opening(NamedTuple):
    """Plan and buffers of a round.

    Args:
        plan: of the round.
        message: (message_values,) float32.
        state: (layout values,) float32, the last part of the message where that holds all of it.
    """

    plan: RoundPlan
    message: Tensor
    state: Tensor


def prepare(shapes: ModelShapes, plan: RoundPlan) -> Opening:
    """Return an opening with empty buffers."""
    message = torch.empty(plan.message_values(shapes))
    layout = plan.layout(shapes)
    if plan.segments(shapes).state == layout:
        return Opening(plan, message, plan.split(shapes, message).state)
    return Opening(plan, message, torch.empty(layout.num_values))


def complete(shapes: ModelShapes, opening: Opening, variate: Tensor | None) -> Opening:
    """Copy into the message what it holds of the state, and the control variate."""
    layouts = opening.plan.segments(shapes)
    parts = opening.plan.split(shapes, opening.message)
    layout = opening.plan.layout(shapes)
    if layouts.state != layout:
        copy_common(layout, opening.state, layouts.state, parts.state)
    if variate is not None and layouts.variate.num_values:
        parts.variate.copy_(variate)
    return opening


def frozen_form(module: LinearShape, frozen: Factors) -> int:
    """Return the rank that frozen directions are sent with, or DENSE where the whole matrix is smaller."""
    values = frozen.lora_rank * (module.out_features + module.in_features)
    return DENSE if values > module.out_features * module.in_features else frozen.lora_rank


def write_frozen(shapes: ModelShapes, opening: Opening, frozen: Sequence[Factors]) -> None:
    """Write each module's frozen directions into the message, in the form that the plan names."""
    layout = shapes.frozen(opening.plan.frozen_ranks)
    flat = opening.plan.split(shapes, opening.message).frozen
    dense = iter(layout.whole_tensors(flat))
    for target, source, lora_rank in zip(
        layout.factors(flat), frozen, opening.plan.frozen_ranks, strict=True
    ):
        if lora_rank == DENSE:
            torch.mm(source.b, source.a, out=next(dense))
        else:
            target.a.copy_(source.a)
            target.b.copy_(source.b)


def write_maps(shapes: ModelShapes, opening: Opening, maps: Sequence[CutMap]) -> None:
    """Write into the message how the cut before this round has mapped each module's factors."""
    layout = opening.plan.segments(shapes).maps
    targets = layout.whole_tensors(opening.plan.split(shapes, opening.message).maps)
    for target, source in zip(targets, (part for one in maps for part in one), strict=True):
        target.copy_(source)


def write_leading(sources: Sequence[Factors], targets: Sequence[Factors]) -> None:
    """Copy factors into others that have at least as many directions."""
    for source, target in zip(sources, targets, strict=True):
        target.a[: source.a.shape[0]].copy_(source.a)
        target.b[:, : source.b.shape[1]].copy_(source.b)
