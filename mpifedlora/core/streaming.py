"""A round that is finished part by part, while the rest of it is on the wire.

Each part is a small model of its own: some modules, or tensors exchanged whole, with their slices of the
state, of the rows and of the next message. So the same algebra as for whole updates runs on it, on the
same values in the same order: the bits do not depend on the parts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mpifedlora.core.aggregation import ModuleAggregate, decompose, normalise, weighted_mean
from mpifedlora.core.combining import Combination
from mpifedlora.core.layout import AdapterLayout, ModelShapes, copy_common
from mpifedlora.core.opening import FROZEN, STATE, Lost, Opening, Rounding, write_leading, write_state
from mpifedlora.core.parts import Part
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.screening import NOT_CHOSEN, NOT_FINITE, USED, Contribution
from mpifedlora.core.server_optimizer import Moments
from mpifedlora.core.server_update import FlatUpdate
from mpifedlora.core.switches import Switches
from mpifedlora.core.wire import UpdateHeader


class Admitted(NamedTuple):
    """Who takes part by the headers alone.

    Args:
        used: headers in client order.
        outcomes: by client id of the cohort.
        weights: one a used header, summing to 1.
    """

    used: list[UpdateHeader]
    outcomes: dict[int, str]
    weights: list[float]


def admit(switches: Switches, headers: Sequence[UpdateHeader]) -> Admitted:
    """Admit the updates whose headers tell of no fault, if there are enough of them.

    Args:
        switches: of a method that compares no updates.
        headers: of the cohort, any order.
    """
    ordered = sorted(headers, key=lambda header: header.client_id)
    wrong = {header.client_id: header.fault or ("" if header.is_finite else NOT_FINITE) for header in ordered}
    sound = [header for header in ordered if not wrong[header.client_id]]
    used = sound if len(sound) >= switches.screening.least else []
    kept = USED if used else NOT_CHOSEN
    outcomes = {client_id: reason or kept for client_id, reason in wrong.items()}
    weights = normalise([switches.counts(header) for header in used]) if used else []
    return Admitted(used, outcomes, weights)


class RoundStream:
    """Takes a round's rows in by parts, and fills in the next message.

    Nothing outside of it is changed: a stream that has refused an update is thrown away.

    Args:
        combination: of the round.
        admitted: who takes part.
        parts: of the round.
        budget: of the next round.
        opening: of the next round, its buffers empty.
        announced: plan that the workers are told; one that stops goes without a message.
        lost: by the rounding of the last message.
    """

    def __init__(
        self,
        combination: Combination,
        admitted: Admitted,
        parts: Sequence[Part],
        budget: int,
        opening: Opening,
        announced: RoundPlan,
        lost: Lost | None,
    ) -> None:
        switches, shapes = combination.switches, combination.shapes
        self.combination, self.admitted, self.parts = combination, admitted, parts
        self.budget, self.opening, self.announced = budget, opening, announced
        self.aggregates: list[ModuleAggregate] = []
        self.refused: set[int] = set()
        is_rounded = switches.wire.downlink != "float32"
        self._rounding = Rounding(shapes, opening, switches.wire, lost) if is_rounded else None
        segments = opening.plan.segments(shapes)
        self._before = _Pieces(combination.plan.layout(shapes))
        self._after, self._sent = _Pieces(opening.plan.layout(shapes)), _Pieces(segments.state)
        self.moments: Moments | None = None  # of the server's optimiser after the round
        self._moved = _Pieces(combination.plan.shared_layout(shapes))
        self._carried = _Pieces(opening.plan.shared_layout(shapes))
        self._is_apart = self._sent.layout != self._after.layout  # then the state is not in the message
        self._flats = opening.plan.split(shapes, opening.message)
        self._frozen_factors = segments.frozen.factors(self._flats.frozen)
        if combination.plan.keeps_head:  # it is in no row
            self._after.layout.whole_values(opening.state).copy_(combination.reference[1])

    @property
    def lost(self) -> Lost | None:
        """What the rounding of the next message has lost."""
        return self._rounding.lost if self._rounding else None

    @property
    def wire(self) -> Tensor:
        """Bytes of the next message."""
        return self.opening.wire

    def take(self, part: Part, rows: dict[int, Tensor], breathe: Callable[[], None]) -> None:
        """Aggregate one part, and write it into the next message.

        Args:
            part: one of `parts`, in their order.
            rows: by client id, the bytes of the part's uplink span.
            breathe: called between modules, so that the wire goes on.
        """
        if self.combination.plan.scope == "full":
            self._take_values(part, rows)
        else:
            self._take_factors(part, rows, breathe)

    def _take_values(self, part: Part, rows: dict[int, Tensor]) -> None:
        whole, span = self.combination, self._after.span(part)
        wire, reference, state = whole.switches.wire, whole.state[span], self.opening.state[span]
        clients = [header.client_id for header in self.admitted.used]
        used = {client_id: self._own_bytes(part, rows[client_id]) for client_id in clients}
        if wire.uplink == "float32":
            values = {client_id: row.view(torch.float32) for client_id, row in used.items()}
        else:
            own = self._after.select(part)
            values = {client_id: wire.decode_update(own, row, reference) for client_id, row in used.items()}
        flat_update = self._flat_update(part)
        mean = flat_update.advance(reference, list(values.values()), self.admitted.weights, state)
        self._keep_moments(part, flat_update)
        is_mean = whole.switches.combiner is weighted_mean
        if self._is_sound(values, mean if is_mean else None):
            self._send(part, state, [])

    def _take_factors(self, part: Part, rows: dict[int, Tensor], breathe: Callable[[], None]) -> None:
        piece = self._piece(part)
        pairs = ((header, self._own_bytes(part, rows[header.client_id])) for header in self.admitted.used)
        received = [piece.contribution(piece.update(header, row)) for header, row in pairs]
        if not self._is_sound({one.update.client_id: one.values for one in received}):
            return
        state = self.opening.state[self._after.span(part)]
        values = piece.next_values(received, self.admitted.weights)
        aggregates = self._cut(piece, part, values, received, breathe)
        if aggregates:
            whole = piece.plan.layout(piece.shapes).whole_values(values)
            write_state(self._after.select(part), state, [one.active for one in aggregates], whole)
        else:
            state.copy_(values)
        self.aggregates += aggregates
        self._keep_moments(part, piece.flat_update)
        self._send(part, state, aggregates)

    def _own_bytes(self, part: Part, row: Tensor) -> Tensor:
        begins = part.begins - part.uplink.start
        return row[begins : begins + part.num_bytes]

    def _is_sound(self, values: dict[int, Tensor], mean: Tensor | None = None) -> bool:
        """Say whether all updates so far are finite, whatever their headers say; a finite mean says so."""
        # Where the sum of the mean is not finite, the updates themselves tell whose fault it is.
        if mean is None or not math.isfinite(mean.sum()):
            self.refused |= {client for client, one in values.items() if not math.isfinite(one.sum())}
        return not self.refused

    def _piece(self, part: Part) -> Combination:
        whole = self.combination
        own, span = self._before.select(part), self._before.span(part)
        plan = replace(
            whole.plan,
            lora_ranks=whole.plan.lora_ranks[part.first : part.last],
            frozen_ranks=whole.plan.frozen_ranks[part.first : part.last],
            mapped_ranks=(),
        )
        shapes = ModelShapes(own.modules, own.whole, ())
        flat_update = self._flat_update(part)
        return replace(whole, shapes=shapes, plan=plan, state=whole.state[span], flat_update=flat_update)

    def _flat_update(self, part: Part) -> FlatUpdate:
        """Return what advances a part: with moments of its own, where the server has an optimiser."""
        whole = self.combination.flat_update
        own = FlatUpdate(whole.combiner, whole.optimizer)
        moments, span = whole.moments, self._moved.span(part)
        if moments is not None and moments.first.numel() == self._moved.layout.num_values:
            own.moments = Moments(moments.first[span].clone(), moments.second[span].clone())
        return own

    def _keep_moments(self, part: Part, own: FlatUpdate) -> None:
        if own.moments is None:
            return
        if self.moments is None:
            num_values = self._carried.layout.num_values
            self.moments = Moments(
                torch.empty(num_values), torch.empty(num_values * (own.moments.second.numel() > 0))
            )
        span = self._carried.span(part)
        self.moments.first[span] = own.moments.first
        self.moments.second[span] = own.moments.second

    def _cut(
        self,
        piece: Combination,
        part: Part,
        values: Tensor,
        received: Sequence[Contribution],
        breathe: Callable[[], None],
    ) -> list[ModuleAggregate]:
        if piece.plan.keeps_b:
            return []
        active = self.opening.plan.lora_ranks[part.first : part.last]
        kept = piece.plan.lora_ranks if piece.switches.freezes else active
        sums = piece.sums(values, received, self.admitted.weights)
        if piece.switches.device != "cpu":
            decompose(sums, active, piece.switches.device)
        if piece.flat_update.moments is not None and active != piece.plan.lora_ranks:
            maps = [one.map(least) for one, least in zip(sums, active, strict=True)]
            piece.flat_update.carry(self._moved.select(part), self._carried.select(part), maps)
        aggregates = []
        for one, most, least in zip(sums, kept, active, strict=True):
            aggregates.append(one.cut(most, least))
            breathe()
        return aggregates

    def _send(self, part: Part, state: Tensor, aggregates: Sequence[ModuleAggregate]) -> None:
        targets = self._frozen_factors[part.first : part.last]
        write_leading([one.frozen for one in aggregates], targets[: len(aggregates)])
        if self._is_apart:
            sent = self._flats.state[self._sent.span(part)]
            copy_common(self._after.select(part), state, self._sent.select(part), sent)
        if self._rounding:
            for segment in (FROZEN, STATE):
                self._rounding.round_pieces(segment, part.first, part.last)
            if self._is_apart:
                copy_common(self._sent.select(part), sent, self._after.select(part), state)


class _Pieces:
    """A layout whose ranges are asked for often."""

    def __init__(self, layout: AdapterLayout) -> None:
        self.layout = layout
        self._offsets = [0, *itertools.accumulate(layout.piece_values)]

    def select(self, part: Part) -> AdapterLayout:
        """Return the layout of a part."""
        return self.layout.select(part.first, part.last)

    def span(self, part: Part) -> slice:
        """Return where the values of a part lie."""
        return slice(self._offsets[part.first], self._offsets[part.last])
