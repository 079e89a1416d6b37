"""What a round opens with: its plan, the one flat buffer that goes with it, and the whole state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpifedlora.core.buffers import padded
from mpifedlora.core.codec import decode, encode, num_bytes, piece_bytes
from mpifedlora.core.layout import (
    DENSE,
    AdapterLayout,
    Factors,
    ModelShapes,
    copy_common,
    piece_span,
)
from mpifedlora.core.plan import RoundPlan, Segments
from mpifedlora.core.server_optimizer import CutMap
from mpifedlora.core.wire import WireFormat

FROZEN, STATE = Segments._fields.index("frozen"), Segments._fields.index("state")


class Lost(NamedTuple):
    """What rounding has lost of the state that was last sent: `values` in `layout`."""

    layout: AdapterLayout
    values: Tensor


class Opening(NamedTuple):
    """Plan and buffers of a round.

    Args:
        plan: of the round.
        message: (message_values,) float32.
        state: (layout values,) float32, the last part of the message where that holds all of it.
        wire: bytes of the message as it is sent, padded to whole units; under float32 the message's own.
    """

    plan: RoundPlan
    message: Tensor
    state: Tensor
    wire: Tensor


def prepare(shapes: ModelShapes, plan: RoundPlan, wire: WireFormat, spare: Tensor | None = None) -> Opening:
    """Return an opening whose buffers are still to be written.

    Args:
        shapes: of the model.
        plan: of the round.
        wire: dtypes.
        spare: buffer of an older message, used again if it fits: new memory costs more than a copy.
    """
    buffer = spare
    if buffer is None or buffer.numel() != padded(wire.message_bytes(plan, shapes)):
        buffer = wire.message_buffer(plan, shapes)
    if wire.downlink == "float32":
        message = wire.as_message(plan, shapes, buffer)
    else:
        message = torch.empty(plan.message_values(shapes))
    layout = plan.layout(shapes)
    if plan.segments(shapes).state == layout:
        return Opening(plan, message, plan.split(shapes, message).state, buffer)
    return Opening(plan, message, torch.empty(layout.num_values), buffer)


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


def round_message(shapes: ModelShapes, opening: Opening, wire: WireFormat, lost: Lost | None) -> Lost | None:
    """Round a message to what is sent of it, and the state with it; nothing to do under float32.

    Args:
        shapes: of the model.
        opening: whose wire, message and state are written.
        wire: dtypes.
        lost: by the last message, added to this one where its state has the same layout.

    Returns:
        What is lost now, if it is to be added to the next message.
    """
    if wire.downlink == "float32":
        return None
    rounding = Rounding(shapes, opening, wire, lost)
    for index, layout in enumerate(opening.plan.segments(shapes)):
        rounding.round_pieces(index, 0, len(layout.piece_values))
    rounding.update_state()
    return rounding.lost


class Rounding:
    """Rounds a message, any range of its pieces at a time.

    Args:
        shapes: of the model.
        opening: whose wire, message and state are written.
        wire: dtypes; the downlink's is not float32.
        before: what the last message has lost.
    """

    def __init__(self, shapes: ModelShapes, opening: Opening, wire: WireFormat, before: Lost | None) -> None:
        plan, self.dtype = opening.plan, wire.downlink
        self.shapes, self.opening = shapes, opening
        self.layouts, self.values = plan.segments(shapes), plan.split(shapes, opening.message)
        sizes = [num_bytes(self.dtype, layout) for layout in self.layouts]
        self.bytes = torch.split(opening.wire[: sum(sizes)], sizes)
        uniform = wire.rounding(self.dtype, opening.message.numel(), plan.round_num)
        lengths = [layout.num_values for layout in self.layouts]
        self.uniform = [None] * len(sizes) if uniform is None else torch.split(uniform, lengths)
        self.lost = Lost(self.layouts.state, torch.zeros(lengths[STATE])) if wire.has_feedback else None
        is_same = before is not None and before.layout == self.layouts.state
        self.before = before.values if before is not None and is_same else None

    def round_pieces(self, segment: int, first: int, last: int) -> None:
        """Write pieces first..last-1 of a segment to the wire, and make their values what is read from it."""
        whole = self.layouts[segment]
        layout, span = whole.select(first, last), piece_span(whole.piece_values, first, last)
        values, uniform = self.values[segment][span], self.uniform[segment]
        target = self.bytes[segment][piece_span(piece_bytes(self.dtype, whole), first, last)]
        if segment == STATE and self.before is not None:
            values.add_(self.before[span])
        exact = values.clone() if segment == STATE and self.lost is not None else None
        encode(self.dtype, layout, values, target, None if uniform is None else uniform[span])
        decode(self.dtype, layout, target, values)
        if exact is not None and self.lost is not None:
            torch.sub(exact, values, out=self.lost.values[span])

    def update_state(self) -> None:
        """Take into the state what the message holds of it, where it does not lie in the message."""
        layout = self.opening.plan.layout(self.shapes)
        if self.layouts.state != layout:
            copy_common(self.layouts.state, self.values.state, layout, self.opening.state)


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


def write_state(layout: AdapterLayout, state: Tensor, active: Sequence[Factors], whole: Tensor) -> None:
    """Write a state: its leading directions, and what is exchanged whole."""
    write_leading(active, layout.factors(state))
    layout.whole_values(state).copy_(whole)
