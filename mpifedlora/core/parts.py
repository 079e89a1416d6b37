"""A round's rows and the next message in parts, each of whole modules, for a pipeline.

While part i + 1 of the rows arrives, part i is aggregated, and part i - 1 of the next message goes out.
Both ends compute the same parts from the two plans.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mpifedlora.core.buffers import UNIT_BYTES, padded
from mpifedlora.core.codec import piece_bytes
from mpifedlora.core.layout import AdapterLayout, ModelShapes
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.wire import WireFormat

LARGEST_PART_BYTES, LEAST_PART_BYTES = 3 * 2**20, 2**19
IN_FLIGHT = 2
"""Parts that the server takes in at a time: more of them leave the cache. See benchmarks/README.md."""
_CACHE_BYTES = 2**24
_LEAST_ROW_BYTES = 2**23


class Span(NamedTuple):
    """Bytes start..stop-1 of a buffer, both on unit borders."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.stop - self.start


class Part(NamedTuple):
    """One part of a round.

    Args:
        first: first piece of the layouts.
        last: piece behind the last.
        begins: where the part's values begin in a row, in bytes.
        num_bytes: of the part's values.
        uplink: what is sent of every row: the units that hold the part.
        downlink: what is complete of the next message, in up to two spans.
    """

    first: int
    last: int
    begins: int
    num_bytes: int
    uplink: Span
    downlink: tuple[Span, ...]


def pays(plan: RoundPlan, shapes: ModelShapes, wire: WireFormat, part_bytes: int | None) -> bool:
    """Say whether parts are worth their bookkeeping, or asked for by their size.

    A mean of small rows is done before it could hide.
    """
    if part_bytes is not None:
        return True
    has_svd = plan.scope != "full" and not plan.keeps_b
    return has_svd or wire.row_bytes(plan, shapes) >= _LEAST_ROW_BYTES


def largest_module_bytes(plan: RoundPlan, shapes: ModelShapes, wire: WireFormat) -> int:
    """Return the bytes of the largest module in a row, or of the largest tensor of a whole model."""
    layout = plan.shared_layout(shapes)
    sizes = piece_bytes(wire.uplink, layout)
    return max(sizes[: len(layout.modules)] or sizes)


def parts_of(
    plan: RoundPlan, following: RoundPlan, shapes: ModelShapes, wire: WireFormat, part_bytes: int | None
) -> list[Part]:
    """Cut a round into parts.

    Args:
        plan: of the round whose rows come in.
        following: of the next round, whose message goes out; none goes out where it stops.
        shapes: of the model.
        wire: dtypes.
        part_bytes: of one row in a part; a larger piece is a part of its own. By default what the cache
            holds of all rows, 512 KiB to 3 MiB, and at least the largest module.
    """
    borders, offsets = _cuts(plan, shapes, wire, part_bytes)
    spans = _downlink_spans(following, shapes, wire, borders)
    return [
        _part(first, last, offsets, downlink)
        for (first, last), downlink in zip(itertools.pairwise(borders), spans, strict=True)
    ]


def uplink_spans(
    plan: RoundPlan, shapes: ModelShapes, wire: WireFormat, part_bytes: int | None
) -> list[Span]:
    """Return the bytes that each part sends of every row: they do not depend on the next round."""
    borders, offsets = _cuts(plan, shapes, wire, part_bytes)
    return [_outward(offsets[first], offsets[last]) for first, last in itertools.pairwise(borders)]


def _cuts(
    plan: RoundPlan, shapes: ModelShapes, wire: WireFormat, part_bytes: int | None
) -> tuple[list[int], list[int]]:
    """Return the pieces with which parts begin, and where each piece begins in a row, in bytes."""
    sizes = piece_bytes(wire.uplink, plan.shared_layout(shapes))
    if part_bytes is None:
        part_bytes = max(_cached_bytes(len(plan.cohort)), largest_module_bytes(plan, shapes, wire))
    return list(_borders(sizes, part_bytes)), [0, *itertools.accumulate(sizes)]


def _part(first: int, last: int, offsets: Sequence[int], downlink: tuple[Span, ...]) -> Part:
    begins, ends = offsets[first], offsets[last]
    return Part(first, last, begins, ends - begins, _outward(begins, ends), downlink)


def _cached_bytes(num_rows: int) -> int:
    share = _CACHE_BYTES // (IN_FLIGHT * max(1, num_rows))
    return min(LARGEST_PART_BYTES, max(LEAST_PART_BYTES, share))


def _borders(sizes: Sequence[int], part_bytes: int) -> Iterator[int]:
    yield 0
    filled = 0
    for index, size in enumerate(sizes):
        if filled and filled + size > part_bytes:
            yield index
            filled = 0
        filled += size
    yield len(sizes)


def _outward(start: int, stop: int) -> Span:
    return Span(start // UNIT_BYTES * UNIT_BYTES, padded(stop))


def _downlink_spans(
    following: RoundPlan, shapes: ModelShapes, wire: WireFormat, borders: Sequence[int]
) -> list[tuple[Span, ...]]:
    segments = following.segments(shapes)
    of_frozen, after = _segment_spans(segments.frozen, 0, wire, borders)
    of_state, _ = _segment_spans(segments.state, after, wire, borders)
    both = zip(of_frozen, of_state, strict=True)
    return [tuple(span for span in pair if span.size) for pair in both]


def _segment_spans(
    layout: AdapterLayout, offset: int, wire: WireFormat, borders: Sequence[int]
) -> tuple[list[Span], int]:
    """Cut a segment where units are complete; a unit that two segments share goes with the first one's end.

    By then the other's share of it has long been written: the parts go out in order.
    """
    offsets = [0, *itertools.accumulate(piece_bytes(wire.downlink, layout))]
    inner = [offset + offsets[min(border, len(offsets) - 1)] for border in borders]
    first, last = padded(inner[0]), padded(inner[-1])
    cuts = [first, *(max(first, cut // UNIT_BYTES * UNIT_BYTES) for cut in inner[1:-1]), last]
    return [Span(*pair) for pair in itertools.pairwise(cuts)], inner[-1]
