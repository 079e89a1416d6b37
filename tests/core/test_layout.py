from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import NamedTuple, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpifedlora.core.layout import (
    DENSE,
    AdapterLayout,
    Factors,
    LinearShape,
    ModelShapes,
    Parts,
    TensorShape,
    copy_common,
)
from mpifedlora.errors import AdapterError

LAWS = settings(max_examples=25, deadline=None)
SIZES = st.integers(1, 6)
WHOLE = st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=3)
PARTS: tuple[Parts, ...] = get_args(Parts)
all_parts = pytest.mark.parametrize("parts", PARTS)
Q, V = LinearShape("q", 3, 4), LinearShape("v", 2, 5)
HEAD = TensorShape("head", (2,))
Place = tuple[object, ...]


def named(shapes: list[list[int]]) -> tuple[TensorShape, ...]:
    return tuple(TensorShape(f"w{index}", tuple(shape)) for index, shape in enumerate(shapes))


@st.composite
def ranks_for(draw: st.DrawFn, modules: tuple[LinearShape, ...]) -> tuple[int, ...]:
    return tuple(draw(st.integers(0, min(module[1:]))) for module in modules)


@st.composite
def layouts(draw: st.DrawFn) -> AdapterLayout:
    shapes = draw(st.lists(st.tuples(SIZES, SIZES), max_size=4))
    modules = tuple(LinearShape(f"m{i}", *shape) for i, shape in enumerate(shapes))
    return AdapterLayout(modules, draw(ranks_for(modules)), named(draw(WHOLE)), draw(st.sampled_from(PARTS)))


class Pair(NamedTuple):
    """Two layouts of one model."""

    source: AdapterLayout
    target: AdapterLayout


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    source, parts = draw(layouts()), draw(st.sampled_from(PARTS))
    target = replace(source, lora_ranks=draw(ranks_for(source.modules)), parts=parts)
    without = draw(st.sampled_from(("neither", "source", "target")))
    return Pair(
        replace(source, whole=()) if without == "source" else source,
        replace(target, whole=()) if without == "target" else target,
    )


def places(layout: AdapterLayout) -> list[Place]:
    """Name each value of a buffer: A_1 B_1 ... A_M B_M, then whole tensors, each row by row."""
    names: list[Place] = []
    for module, lora_rank in zip(layout.modules, layout.lora_ranks, strict=True):
        for part, rows, columns in (
            ("a", lora_rank, module.in_features),
            ("b", module.out_features, lora_rank),
        ):
            if part in layout.parts:
                names += [
                    (module.name, part, row, column) for row in range(rows) for column in range(columns)
                ]
    return names + [(shape.name, index) for shape in layout.whole for index in range(math.prod(shape.shape))]


def all_views(layout: AdapterLayout, flat: Tensor) -> list[Tensor]:
    return [part for pair in layout.factors(flat) for part in pair] + layout.whole_tensors(flat)


def random_values(layout: AdapterLayout, seed: int = 0) -> Tensor:
    return torch.randn(layout.num_values, generator=torch.Generator().manual_seed(seed))


@LAWS
@given(layouts())
def test_views_cover_the_buffer_once_and_in_order(layout: AdapterLayout) -> None:
    flat = torch.arange(layout.num_values)
    views = all_views(layout, flat)
    assert torch.equal(torch.cat([flat[:0], *(view.reshape(-1) for view in views)]), flat)


@LAWS
@given(layouts())
def test_what_is_written_through_views_is_in_the_buffer(layout: AdapterLayout) -> None:
    flat = torch.zeros(layout.num_values)
    for number, view in enumerate(all_views(layout, flat), start=1):
        view += number
        assert view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    assert bool((flat > 0).all())


@LAWS
@given(layouts())
def test_views_have_the_shapes_of_modules_and_tensors(layout: AdapterLayout) -> None:
    flat = torch.zeros(layout.num_values)
    wanted = [
        (
            (lora_rank if "a" in layout.parts else 0, module.in_features),
            (module.out_features, lora_rank if "b" in layout.parts else 0),
        )
        for module, lora_rank in zip(layout.modules, layout.lora_ranks, strict=True)
    ]
    assert [(tuple(pair.a.shape), tuple(pair.b.shape)) for pair in layout.factors(flat)] == wanted
    assert [tuple(tensor.shape) for tensor in layout.whole_tensors(flat)] == [t.shape for t in layout.whole]


@LAWS
@given(layouts())
def test_values_are_counted_in_closed_form(layout: AdapterLayout) -> None:
    sides = [
        ("a" in layout.parts) * module[2] + ("b" in layout.parts) * module[1] for module in layout.modules
    ]
    in_factors = sum(lora_rank * side for lora_rank, side in zip(layout.lora_ranks, sides, strict=True))
    assert layout.factor_values == in_factors
    assert layout.num_values == in_factors + sum(math.prod(tensor.shape) for tensor in layout.whole)
    assert len(places(layout)) == layout.num_values


@LAWS
@given(layouts())
def test_the_factors_are_what_a_and_b_alone_hold(layout: AdapterLayout) -> None:
    values = {parts: replace(layout, parts=parts).factor_values for parts in PARTS}
    assert values["ab"] == values["a"] + values["b"]
    assert values[""] == 0


@LAWS
@given(layouts(), st.integers(0, 2**31))
def test_values_survive_a_round_trip(layout: AdapterLayout, seed: int) -> None:
    flat = random_values(layout, seed)
    copy = torch.empty_like(flat)
    for target, source in zip(all_views(layout, copy), all_views(layout, flat), strict=True):
        target.copy_(source)
    assert torch.equal(copy, flat)


def test_hand_sized_offsets() -> None:
    layout = AdapterLayout((Q, V), (1, 2), (HEAD,))
    (q, v), (head,) = layout.factors(torch.arange(23)), layout.whole_tensors(torch.arange(23))
    assert (q.a.tolist(), q.b.tolist()) == ([[0, 1, 2, 3]], [[4], [5], [6]])
    assert (v.a.tolist(), v.b.tolist()) == ([[*range(7, 12)], [*range(12, 17)]], [[17, 18], [19, 20]])
    assert head.tolist() == layout.whole_values(torch.arange(23)).tolist() == [21, 22]
    assert [pair.lora_rank for pair in (q, v)] == [1, 2]


def test_hand_sized_offsets_of_a_alone() -> None:
    layout = AdapterLayout((Q, V), (1, 2), (HEAD,), "a")
    assert (layout.factor_values, layout.num_values) == (4 + 10, 16)
    q, v = layout.factors(torch.arange(16))
    assert (q.a.tolist(), v.a.tolist()) == ([[0, 1, 2, 3]], [[*range(4, 9)], [*range(9, 14)]])
    assert (tuple(q.b.shape), tuple(v.b.shape)) == ((3, 0), (2, 0))
    assert layout.whole_values(torch.arange(16)).tolist() == [14, 15]


def test_hand_sized_offsets_of_b_alone() -> None:
    layout = AdapterLayout((Q, V), (1, 2), (HEAD,), "b")
    assert (layout.factor_values, layout.num_values) == (3 + 4, 9)
    q, v = layout.factors(torch.arange(9))
    assert (q.b.tolist(), v.b.tolist()) == ([[0], [1], [2]], [[3, 4], [5, 6]])
    assert (tuple(q.a.shape), tuple(v.a.shape)) == ((0, 4), (0, 5))
    assert layout.whole_values(torch.arange(9)).tolist() == [7, 8]


def test_a_layout_of_no_factor_is_its_head() -> None:
    layout = AdapterLayout((Q, V), (1, 2), (HEAD,), "")
    assert (layout.factor_values, layout.num_values) == (0, 2)
    assert layout.whole_values(torch.arange(2)).tolist() == [0, 1]
    assert all(part.numel() == 0 for pair in layout.factors(torch.arange(2)) for part in pair)


def test_other_ranks_keep_the_tensors_and_are_counted_anew() -> None:
    layout = AdapterLayout((Q, V), (3, 2), (TensorShape("head", (5,)),))
    assert layout.num_values == 3 * 7 + 2 * 7 + 5  # noted by the layout
    smaller = replace(layout, lora_ranks=(1, 0))
    assert (smaller.modules, smaller.whole, smaller.parts) == (layout.modules, layout.whole, "ab")
    assert smaller.num_values == 7 + 5
    assert replace(layout, parts="b").num_values == 3 * 3 + 2 * 2 + 5


def test_layouts_are_equal_by_what_they_hold() -> None:
    one, other = AdapterLayout((Q,), (2,), (HEAD,)), AdapterLayout((Q,), (2,), (HEAD,))
    assert one.num_values == 16  # what is noted on the way makes no difference
    assert one == other
    assert hash(one) == hash(other)
    assert one not in (replace(one, parts="a"), replace(one, lora_ranks=(1,)), replace(one, whole=()))


def test_any_dtype_is_taken() -> None:
    layout = AdapterLayout((Q,), (2,))
    assert layout.factors(torch.zeros(14, dtype=torch.bfloat16))[0].a.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("lora_ranks", "message"),
    [
        ((4, 1), "the LoRA rank of q must be 0 to 3, got 4; lower it"),
        ((1, 3), "the LoRA rank of v must be 0 to 2, got 3; lower it"),
        ((DENSE, 1), "the LoRA rank of q must be 0 to 3, got -1; lower it"),
        ((1,), "a layout needs one rank a module, got 1 ranks for 2 modules; pass one for each"),
        ((), "a layout needs one rank a module, got 0 ranks for 2 modules; pass one for each"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(lora_ranks: tuple[int, ...], message: str) -> None:
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        AdapterLayout((Q, V), lora_ranks)


@all_parts
def test_other_ranks_are_checked_too(parts: Parts) -> None:
    with pytest.raises(AdapterError, match="the LoRA rank of v must be 0 to 2, got 9"):
        replace(AdapterLayout((Q, V), (1, 1), parts=parts), lora_ranks=(1, 9))


# What two layouts have in common.


@settings(max_examples=100, deadline=None)
@given(pairs())
def test_the_common_values_are_copied_and_no_other(pair: Pair) -> None:
    values, out = random_values(pair.source, 1), random_values(pair.target, 2)
    given_values = dict(zip(places(pair.source), values.tolist(), strict=True))
    left = zip(places(pair.target), out.tolist(), strict=True)
    wanted = [given_values.get(place, value) for place, value in left]
    before = values.clone()
    assert copy_common(pair.source, values, pair.target, out) is out
    assert out.tolist() == wanted
    assert torch.equal(values, before)


@LAWS
@given(pairs())
def test_what_fits_survives_a_round_trip(pair: Pair) -> None:
    values, there = random_values(pair.source, 1), torch.zeros(pair.target.num_values)
    back = values.clone()
    copy_common(pair.source, values, pair.target, there)
    copy_common(pair.target, there, pair.source, back)
    assert torch.equal(back, values)


def test_lower_ranks_take_the_leading_directions() -> None:
    source, target = AdapterLayout((V,), (2,), (HEAD,)), AdapterLayout((V,), (1,), (HEAD,))
    # A is rows 0..4 and 5..9, B is [[10, 11], [12, 13]]: its first column is the leading direction.
    out = copy_common(source, torch.arange(16.0), target, torch.zeros(9))
    assert out.tolist() == [0, 1, 2, 3, 4, 10, 12, 14, 15]


def test_higher_ranks_keep_their_other_directions() -> None:
    source, target = AdapterLayout((V,), (1,), (HEAD,)), AdapterLayout((V,), (2,), (HEAD,))
    out = copy_common(source, torch.arange(9.0), target, torch.full((16,), -1.0))
    a, b = target.factors(out)[0]
    assert a.tolist() == [[0, 1, 2, 3, 4], [-1] * 5]
    assert b.tolist() == [[5, -1], [6, -1]]
    assert target.whole_values(out).tolist() == [7, 8]


def test_ranks_are_compared_module_by_module() -> None:
    source, target = AdapterLayout((Q, V), (2, 1)), AdapterLayout((Q, V), (1, 2))
    q, v = target.factors(copy_common(source, torch.arange(21.0), target, torch.full((21,), -1.0)))
    assert (q.a.tolist(), q.b.tolist()) == ([[0, 1, 2, 3]], [[8], [10], [12]])
    assert (v.a.tolist(), v.b.tolist()) == ([[*range(14, 19)], [-1] * 5], [[19, -1], [20, -1]])


@all_parts
def test_missing_factors_are_left_alone(parts: Parts) -> None:
    whole = AdapterLayout((V,), (1,), (HEAD,))
    sent = replace(whole, parts=parts)
    out = copy_common(sent, torch.ones(sent.num_values), whole, torch.zeros(9))
    wanted = [1.0 * ("a" in parts)] * 5 + [1.0 * ("b" in parts)] * 2 + [1.0] * 2
    assert out.tolist() == wanted


@all_parts
def test_a_part_takes_only_its_factors(parts: Parts) -> None:
    whole = AdapterLayout((V,), (1,), (HEAD,))
    taken = replace(whole, parts=parts)
    out = copy_common(whole, torch.arange(9.0), taken, torch.full((taken.num_values,), -1.0))
    wanted = [0, 1, 2, 3, 4] * ("a" in parts) + [5, 6] * ("b" in parts) + [7, 8]
    assert out.tolist() == wanted


def test_equal_layouts_are_copied_whole() -> None:
    layouts_ = [AdapterLayout((Q, V), (1, 2), (HEAD,)) for _ in range(2)]
    out = torch.zeros(23)
    assert copy_common(layouts_[0], torch.arange(23.0), layouts_[1], out) is out
    assert out.tolist() == list(range(23))


# What a model looks like.

BODY = (TensorShape("q.weight", (3, 4)), TensorShape("norm", (4,)))
SHAPES = ModelShapes((Q, V), (TensorShape("head", (2, 2)),), BODY)


def test_a_model_is_seen_in_four_ways() -> None:
    assert SHAPES.adapter((1, 2)).num_values == 7 + 14 + 4
    assert SHAPES.frozen((1, 2)).num_values == 7 + 14
    assert SHAPES.full().num_values == 12 + 4 + 4
    assert SHAPES.base().num_values == 12 + 4
    assert SHAPES.full().whole == (*BODY, *SHAPES.head)


@all_parts
def test_an_adapter_in_parts_always_has_the_head(parts: Parts) -> None:
    layout = SHAPES.adapter([1, 2], parts)
    assert layout == AdapterLayout((Q, V), (1, 2), SHAPES.head, parts)
    assert layout.num_values == 14 * ("a" in parts) + 7 * ("b" in parts) + 4


@pytest.mark.parametrize(
    ("lora_ranks", "factor_values", "dense"),
    [
        ((0, 0), 0, ()),
        ((1, DENSE), 7, (TensorShape("v", (2, 5)),)),
        ((DENSE, 2), 14, (TensorShape("q", (3, 4)),)),
        ((DENSE, DENSE), 0, (TensorShape("q", (3, 4)), TensorShape("v", (2, 5)))),
    ],
)
def test_what_is_frozen_goes_as_factors_or_as_a_matrix(
    lora_ranks: tuple[int, ...], factor_values: int, dense: tuple[TensorShape, ...]
) -> None:
    layout = SHAPES.frozen(lora_ranks)
    assert (layout.modules, layout.whole, layout.parts) == ((Q, V), dense, "ab")
    assert layout.factor_values == factor_values
    assert layout.num_values == factor_values + sum(math.prod(tensor.shape) for tensor in dense)


def test_hand_sized_offsets_of_what_is_frozen() -> None:
    # The factors first, whatever their module's place: then the matrices.
    layout = SHAPES.frozen((DENSE, 1))
    (q, v), (dense,) = layout.factors(torch.arange(19)), layout.whole_tensors(torch.arange(19))
    assert q.lora_rank == 0
    assert (v.a.tolist(), v.b.tolist()) == ([[0, 1, 2, 3, 4]], [[5], [6]])
    assert dense.tolist() == [[7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17, 18]]


def test_frozen_ranks_are_checked_too() -> None:
    with pytest.raises(AdapterError, match="the LoRA rank of q must be 0 to 3, got -2"):
        SHAPES.frozen((-2, 1))
    with pytest.raises(ValueError, match=r"zip\(\)"):
        SHAPES.frozen((1,))


def test_the_rank_of_factors_is_their_inner_dimension() -> None:
    assert Factors(torch.zeros(3, 7), torch.zeros(5, 3)).lora_rank == 3
