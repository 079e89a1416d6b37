from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpifedlora.core.layout import AdapterLayout, LinearShape, ModelShapes, TensorShape
from mpifedlora.errors import AdapterError

LAWS = settings(max_examples=25, deadline=None)
SIZES = st.integers(1, 6)
WHOLE = st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=3)
Q, V = LinearShape("q", 3, 4), LinearShape("v", 2, 5)


@st.composite
def layouts(draw: st.DrawFn) -> AdapterLayout:
    shapes = draw(st.lists(st.tuples(SIZES, SIZES), max_size=4))
    modules = tuple(LinearShape(f"m{i}", *shape) for i, shape in enumerate(shapes))
    lora_ranks = tuple(draw(st.integers(0, min(shape))) for shape in shapes)
    return AdapterLayout(
        modules, lora_ranks, tuple(TensorShape(f"w{i}", tuple(s)) for i, s in enumerate(draw(WHOLE)))
    )


def all_views(layout: AdapterLayout, flat: torch.Tensor) -> list[torch.Tensor]:
    return [part for pair in layout.factors(flat) for part in pair] + layout.whole_tensors(flat)


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
        ((lora_rank, module.in_features), (module.out_features, lora_rank))
        for module, lora_rank in zip(layout.modules, layout.lora_ranks, strict=True)
    ]
    assert [(tuple(pair.a.shape), tuple(pair.b.shape)) for pair in layout.factors(flat)] == wanted
    assert [pair.lora_rank for pair in layout.factors(flat)] == list(layout.lora_ranks)
    assert [tuple(t.shape) for t in layout.whole_tensors(flat)] == [t.shape for t in layout.whole]


@LAWS
@given(layouts())
def test_values_are_counted_in_closed_form(layout: AdapterLayout) -> None:
    pairs = zip(layout.modules, layout.lora_ranks, strict=True)
    in_factors = sum(lora_rank * (module[1] + module[2]) for module, lora_rank in pairs)
    assert layout.factor_values == in_factors
    assert layout.num_values == in_factors + sum(math.prod(tensor.shape) for tensor in layout.whole)


@LAWS
@given(layouts(), st.integers(0, 2**31))
def test_values_survive_a_round_trip(layout: AdapterLayout, seed: int) -> None:
    flat = torch.randn(layout.num_values, generator=torch.Generator().manual_seed(seed))
    copy = torch.empty_like(flat)
    for target, source in zip(all_views(layout, copy), all_views(layout, flat), strict=True):
        target.copy_(source)
    assert torch.equal(copy, flat)


def test_hand_sized_offsets() -> None:
    layout = AdapterLayout((Q, V), (1, 2), (TensorShape("head", (2,)),))
    (q, v), (head,) = layout.factors(torch.arange(23)), layout.whole_tensors(torch.arange(23))
    assert (q.a.tolist(), q.b.tolist()) == ([[0, 1, 2, 3]], [[4], [5], [6]])
    assert (v.a.tolist(), v.b.tolist()) == ([[*range(7, 12)], [*range(12, 17)]], [[17, 18], [19, 20]])
    assert head.tolist() == layout.whole_values(torch.arange(23)).tolist() == [21, 22]


def test_other_ranks_keep_the_tensors() -> None:
    layout = AdapterLayout((Q, V), (3, 2), (TensorShape("head", (5,)),))
    smaller = layout.with_ranks([1, 0])
    assert (smaller.modules, smaller.lora_ranks, smaller.whole) == (layout.modules, (1, 0), layout.whole)
    assert (layout.num_values, smaller.num_values) == (3 * 7 + 2 * 7 + 5, 7 + 5)


def test_any_dtype_is_taken() -> None:
    layout = AdapterLayout((Q,), (2,))
    assert layout.factors(torch.zeros(14, dtype=torch.bfloat16))[0].a.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("lora_ranks", "message"),
    [
        ((4, 1), "the LoRA rank of q must be 0 to 3, got 4; lower it"),
        ((1, 3), "the LoRA rank of v must be 0 to 2, got 3; lower it"),
        ((-1, 1), "the LoRA rank of q must be 0 to 3, got -1; lower it"),
        ((1,), "a layout needs one rank a module, got 1 ranks for 2 modules; pass one for each"),
        ((), "a layout needs one rank a module, got 0 ranks for 2 modules; pass one for each"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(lora_ranks: tuple[int, ...], message: str) -> None:
    with pytest.raises(AdapterError, match=f"^{re.escape(message)}$"):
        AdapterLayout((Q, V), lora_ranks)


def test_other_ranks_are_checked_too() -> None:
    with pytest.raises(AdapterError, match="the LoRA rank of v must be 0 to 2, got 9"):
        AdapterLayout((Q, V), (1, 1)).with_ranks((1, 9))


def test_a_model_is_seen_in_four_ways() -> None:
    body = (TensorShape("q.weight", (3, 4)), TensorShape("norm", (4,)))
    shapes = ModelShapes((Q, V), (TensorShape("head", (2, 2)),), body)
    assert shapes.adapter((1, 2)).num_values == 7 + 14 + 4
    assert shapes.directions((1, 2)).num_values == 7 + 14
    assert shapes.full().num_values == 12 + 4 + 4
    assert shapes.base().num_values == 12 + 4
    assert shapes.full().whole == (*body, *shapes.head)
