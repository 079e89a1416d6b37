from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpifedlora.core.codec import piece_bytes
from mpifedlora.core.layout import LinearShape, ModelShapes, Parts, TensorShape
from mpifedlora.core.parts import Part, Span, largest_module_bytes, parts_of, pays, uplink_spans
from mpifedlora.core.plan import ABSENT, RoundPlan
from mpifedlora.core.wire import UpdateRows, WireFormat

LAWS = settings(max_examples=60, deadline=None)
DTYPES = st.sampled_from(["float32", "bfloat16", "float16", "int8"])
WIRES = st.builds(WireFormat, DTYPES, DTYPES)
SIDES = st.integers(1, 30)
TENSORS = st.lists(st.lists(st.integers(0, 9), max_size=2).map(tuple), max_size=3)
PLAN = RoundPlan(3, "annealing", "adapter", (), (), (0, 1, ABSENT), sends_state=True)


@st.composite
def models(draw: st.DrawFn) -> tuple[ModelShapes, tuple[int, ...]]:
    """A small model, often with several pieces in a unit of 64 bytes, and ranks that it may have."""
    sides = draw(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=5))
    modules = tuple(LinearShape(f"m{index}", *pair) for index, pair in enumerate(sides))
    ranks = tuple(draw(st.integers(0, min(pair))) for pair in sides)
    head, body = ([TensorShape("t", shape) for shape in draw(TENSORS)] for _ in range(2))
    return ModelShapes(modules, tuple(head), (TensorShape("w", (4,)), *body)), ranks


@st.composite
def rounds(draw: st.DrawFn) -> tuple[RoundPlan, RoundPlan, ModelShapes]:
    """Two plans as a round in parts may have them: not from the whole model to an adapter."""
    shapes, ranks = draw(models())
    nothing = (0,) * len(ranks)
    if draw(st.booleans()):
        plan = replace(PLAN, scope="full", lora_ranks=ranks, frozen_ranks=nothing)
        return plan, plan, shapes
    keeps_b = draw(st.booleans())
    keeps = {"keeps_b": keeps_b, "keeps_head": keeps_b and draw(st.booleans())}
    scopes = st.just("adapter") if keeps_b else st.sampled_from(["adapter", "a", "b"])
    plan = replace(PLAN, scope=draw(scopes), lora_ranks=ranks, frozen_ranks=nothing, **keeps)
    left = tuple(draw(st.integers(0, lora_rank)) for lora_rank in ranks)
    parts: Parts = "a" if keeps_b else draw(st.sampled_from(["a", "b", "ab"]))
    frozen = tuple(lora_rank - one for lora_rank, one in zip(ranks, left, strict=True))
    later = {"scope": draw(scopes), "lora_ranks": left, "frozen_ranks": frozen, "sends_parts": parts}
    return plan, replace(plan, **later), shapes


def row_borders(plan: RoundPlan, shapes: ModelShapes, wire: WireFormat) -> list[int]:
    """Where each piece begins in a row, and the end."""
    return [0, *itertools.accumulate(piece_bytes(wire.uplink, plan.shared_layout(shapes)))]


def writers(following: RoundPlan, shapes: ModelShapes, wire: WireFormat) -> list[int]:
    """Which piece of a row each byte of the message comes from."""
    found: list[int] = []
    for layout in following.segments(shapes):
        for piece, size in enumerate(piece_bytes(wire.downlink, layout)):
            found += [piece] * size
    return found


def units(size: int) -> int:
    return -(-size // 64)


# All parts of a round.


@LAWS
@given(rounds(), WIRES, st.integers(1, 3000) | st.none())
def test_parts_hold_all_pieces_in_order_and_their_spans_hold_the_parts(
    made: tuple[RoundPlan, RoundPlan, ModelShapes], wire: WireFormat, part_bytes: int | None
) -> None:
    plan, following, shapes = made
    parts, borders = parts_of(plan, following, shapes, wire, part_bytes), row_borders(plan, shapes, wire)
    assert [part.uplink for part in parts] == uplink_spans(plan, shapes, wire, part_bytes)
    assert [part.first for part in parts] == [0, *(part.last for part in parts[:-1])]
    assert parts[-1].last == len(borders) - 1
    row = UpdateRows([borders[-1]])
    for part in parts:
        first, last = borders[part.first], borders[part.last]
        assert (part.begins, part.num_bytes) == (first, last - first)
        assert part.uplink == Span(first // 64 * 64, units(last) * 64)
        assert part.uplink.size == part.uplink.stop - part.uplink.start
        assert part.uplink.stop <= row.buffer.numel()


@LAWS
@given(rounds(), WIRES, st.integers(1, 3000))
def test_parts_are_as_large_as_they_may_be(
    made: tuple[RoundPlan, RoundPlan, ModelShapes], wire: WireFormat, part_bytes: int
) -> None:
    plan, following, shapes = made
    parts, borders = parts_of(plan, following, shapes, wire, part_bytes), row_borders(plan, shapes, wire)
    sizes = [borders[part.last] - borders[part.first] for part in parts]
    for part, size in zip(parts, sizes, strict=True):
        holds = [piece for piece in range(part.first, part.last) if borders[piece + 1] > borders[piece]]
        assert size <= part_bytes or len(holds) == 1
    for part, size in zip(parts[:-1], sizes, strict=False):
        assert size + borders[part.last + 1] - borders[part.last] > part_bytes


@LAWS
@given(rounds(), WIRES, st.integers(1, 3000) | st.none())
def test_each_byte_goes_out_once_and_not_before_all_of_its_unit_is_written(
    made: tuple[RoundPlan, RoundPlan, ModelShapes], wire: WireFormat, part_bytes: int | None
) -> None:
    plan, following, shapes = made
    from_piece = writers(following, shapes, wire)
    sent: list[int] = []
    for part in parts_of(plan, following, shapes, wire, part_bytes):
        for start, stop in part.downlink:
            assert start % 64 == stop % 64 == 0 != stop - start
            assert all(piece < part.last for piece in from_piece[start:stop])
            sent += range(start // 64, stop // 64)
    assert sorted(sent) == list(range(units(wire.message_bytes(following, shapes))))
    assert len(from_piece) == wire.message_bytes(following, shapes)


@LAWS
@given(rounds(), WIRES, st.integers(1, 3000))
def test_a_part_goes_out_as_soon_as_its_units_are_written(
    made: tuple[RoundPlan, RoundPlan, ModelShapes], wire: WireFormat, part_bytes: int
) -> None:
    plan, following, shapes = made
    from_piece, segments = writers(following, shapes, wire), following.segments(shapes)
    border = sum(piece_bytes(wire.downlink, segments.frozen)) // 64  # may be shared by both segments
    sent: set[int] = set()
    for part in parts_of(plan, following, shapes, wire, part_bytes):
        sent |= {unit for span in part.downlink for unit in range(span.start // 64, span.stop // 64)}
        for unit in set(range(units(len(from_piece)))) - sent - {border}:
            # It holds a later piece, or what is behind the last piece: of the last part then.
            behind = from_piece[64 * unit : 64 * unit + 64]
            assert len(behind) < 64 or max(behind) >= part.last


@LAWS
@given(rounds(), WIRES, st.integers(1, 3000) | st.none())
def test_both_ends_see_the_same_parts(
    made: tuple[RoundPlan, RoundPlan, ModelShapes], wire: WireFormat, part_bytes: int | None
) -> None:
    plan, following, shapes = made
    num_modules = len(shapes.modules)
    there, announced = (RoundPlan.unpack(one.pack(), num_modules) for one in (plan, following))
    parts = parts_of(plan, following, shapes, wire, part_bytes)
    assert parts_of(there, announced, shapes, wire, part_bytes) == parts
    # A plan that asks for evaluation has the same message.
    assert parts_of(there, replace(announced, evaluates=True), shapes, wire, part_bytes) == parts


@LAWS
@given(rounds(), WIRES, st.integers(1, 3000) | st.none())
def test_nothing_goes_out_where_the_workers_stop(
    made: tuple[RoundPlan, RoundPlan, ModelShapes], wire: WireFormat, part_bytes: int | None
) -> None:
    plan, following, shapes = made
    parts = parts_of(plan, following, shapes, wire, part_bytes)
    stopped = parts_of(plan, following.stopped(), shapes, wire, part_bytes)
    assert stopped == [part._replace(downlink=()) for part in parts]


# By hand.

SQUARE = ModelShapes(
    tuple(LinearShape(name, 4, 4) for name in "qkv"), (TensorShape("head", (10,)),), (TensorShape("w", (8,)),)
)
ADAPTER = replace(PLAN, lora_ranks=(2, 2, 2), frozen_ranks=(0, 0, 0))


def cut(following: RoundPlan, part_bytes: int | None, *dtypes: str) -> list[Part]:
    return parts_of(ADAPTER, following, SQUARE, WireFormat(*dtypes), part_bytes)


def test_hand_sized_parts() -> None:
    # Each module has 2 * (4 + 4) values, 64 bytes; the head has 40 bytes.
    wanted = [Span(0, 64), Span(64, 128), Span(128, 192), Span(192, 256)]
    alone = [
        Part(index, index + 1, 64 * index, min(64, 232 - 64 * index), span, (span,))
        for index, span in enumerate(wanted)
    ]
    assert cut(ADAPTER, 1) == cut(ADAPTER, 64) == alone
    pair, rest = Span(0, 128), Span(128, 256)
    assert cut(ADAPTER, 128) == [Part(0, 2, 0, 128, pair, (pair,)), Part(2, 4, 128, 104, rest, (rest,))]
    assert cut(ADAPTER, 168) == cut(ADAPTER, 128)
    whole = Span(0, 256)
    assert cut(ADAPTER, None) == cut(ADAPTER, 232) == [Part(0, 4, 0, 232, whole, (whole,))]


def test_hand_sized_parts_of_a_cut() -> None:
    # One direction of each module is frozen, 32 bytes; the other stays, 32 bytes: frozen 0..95, state
    # 96..191, head 192..231. Unit 1 has the end of the one and the start of the other.
    following = replace(ADAPTER, lora_ranks=(1, 1, 1), frozen_ranks=(1, 1, 1))
    downlinks = [part.downlink for part in cut(following, 1)]
    # After q and k the frozen ones of both; after v the states of q, k and v up to the head.
    assert downlinks == [(), (Span(0, 64),), (Span(128, 192),), (Span(64, 128), Span(192, 256))]


def test_hand_sized_parts_of_mixed_dtypes() -> None:
    # A module under int8: 16 values and 4 scales are 32 bytes. The head: 10 values and one scale.
    parts = cut(ADAPTER, 40, "int8", "bfloat16")
    assert [(part.begins, part.uplink) for part in parts] == [
        (0, Span(0, 64)),
        (32, Span(0, 64)),
        (64, Span(64, 128)),
        (96, Span(64, 128)),
    ]
    # bfloat16: 32 bytes a module, 20 of the head.
    assert [part.downlink for part in parts] == [(), (Span(0, 64),), (), (Span(64, 128),)]


def test_a_whole_model_is_cut_at_its_tensors() -> None:
    plan = replace(ADAPTER, scope="full")
    parts = parts_of(plan, plan, SQUARE, WireFormat(), 1)
    assert [(part.first, part.begins, part.downlink) for part in parts] == [
        (0, 0, ()),
        (1, 32, (Span(0, 128),)),
    ]


def test_modules_without_a_rank_are_one_part() -> None:
    plan = replace(ADAPTER, lora_ranks=(0, 0, 0), keeps_b=True, keeps_head=True)
    assert parts_of(plan, plan, SQUARE, WireFormat(), None) == [Part(0, 3, 0, 0, Span(0, 0), ())]


# Sizes.

MOST = 3 * 2**20


@pytest.mark.parametrize(
    ("num_clients", "part_bytes"),
    # 16 MiB for two parts of all rows, but 512 KiB to 3 MiB.
    [(0, MOST), (1, MOST), (2, MOST), (4, 2**21), (5, 2**24 // 10), (16, 2**19), (64, 2**19)],
)
def test_by_default_parts_of_all_rows_fit_into_the_cache(num_clients: int, part_bytes: int) -> None:
    # Pieces of 4 KiB, in a row of 8 MiB.
    tensors = tuple(TensorShape("w", (2**10,)) for _ in range(2**11))
    shapes = ModelShapes((LinearShape("q", 1, 1),), tensors, ())
    plan = replace(PLAN, lora_ranks=(0,), frozen_ranks=(0,), workers=(0,) * num_clients + (ABSENT,))
    parts = parts_of(plan, plan, shapes, WireFormat(), None)
    assert {part.last - part.first for part in parts[1:-1]} == {part_bytes // 2**12}


def test_by_default_the_largest_module_fits_into_a_part() -> None:
    modules = (LinearShape("q", 2**10, 2**10), *(LinearShape("k", 2**7, 2**7),) * 16)
    shapes = ModelShapes(modules, (TensorShape("head", (2**21,)),), ())
    ranks = (2**9, *(2**6,) * 16)
    plan = replace(PLAN, lora_ranks=ranks, frozen_ranks=(0,) * 17)
    # q has 4 MiB, each k 64 KiB: 16 of them are 1 MiB; the head, of 8 MiB, is alone.
    assert largest_module_bytes(plan, shapes, WireFormat()) == 2**22
    assert largest_module_bytes(plan, shapes, WireFormat("bfloat16")) == 2**21
    borders = [(part.first, part.last) for part in parts_of(plan, plan, shapes, WireFormat(), None)]
    assert borders == [(0, 1), (1, 17), (17, 18)]


def test_of_a_whole_model_the_largest_tensor_counts() -> None:
    shapes = ModelShapes((LinearShape("q", 2, 3),), (TensorShape("head", (7,)),), (TensorShape("w", (2, 3)),))
    plan = replace(PLAN, scope="full", lora_ranks=(2,), frozen_ranks=(0,))
    assert largest_module_bytes(plan, shapes, WireFormat()) == 28
    assert largest_module_bytes(plan, shapes, WireFormat("int8")) == 2 * 4 + 6
    assert largest_module_bytes(replace(plan, scope="adapter"), shapes, WireFormat()) == 40


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_pay_for_svds_and_for_large_rows(dtype: str) -> None:
    wire, width = WireFormat(dtype), {"float32": 4, "bfloat16": 2}[dtype]
    for num_values, is_large in ((2**23 // width - 1, False), (2**23 // width, True)):
        shapes = ModelShapes((LinearShape("q", 1, 1),), (TensorShape("head", (num_values - 1,)),), ())
        plan = replace(PLAN, lora_ranks=(1,), frozen_ranks=(0,))
        assert pays(plan, shapes, wire, None)
        assert pays(replace(plan, keeps_b=True), shapes, wire, None) == is_large
        body = ModelShapes(shapes.modules, (), (TensorShape("w", (num_values,)),))
        assert pays(replace(plan, scope="full"), body, wire, None) == is_large
