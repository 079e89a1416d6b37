from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpifedlora.core.cuts import frozen_form
from mpifedlora.core.layout import DENSE, Factors, LinearShape, ModelShapes, Parts, TensorShape, copy_common
from mpifedlora.core.opening import (
    Opening,
    complete,
    prepare,
    write_frozen,
    write_leading,
    write_maps,
)
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.server_optimizer import CutMap
from mpifedlora.core.wire import WireFormat

LAWS = settings(max_examples=25, deadline=None)
SHAPES = ModelShapes(
    (LinearShape("q", 3, 4), LinearShape("v", 2, 5)),
    (TensorShape("head", (2,)),),
    (TensorShape("q.weight", (3, 4)), TensorShape("v.weight", (2, 5))),
)
# The state: A of q 0..3, B of q 4..6, A of v 7..16, B of v 17..20, head 21..22.
PLAN = RoundPlan(2, "annealing", "adapter", (1, 2), (0, 0), (0,), sends_state=True)
STATE = list(range(23))
HELD: dict[Parts, list[int]] = {
    "": [21, 22],
    "a": [0, 1, 2, 3, *range(7, 17), 21, 22],
    "b": [4, 5, 6, *range(17, 21), 21, 22],
    "ab": STATE,
}
SIDES = st.integers(1, 12)


def random_factors(module: LinearShape, lora_rank: int, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(lora_rank, module.in_features, generator=generator)
    return Factors(a, torch.randn(module.out_features, lora_rank, generator=generator))


def opened(**fields: Any) -> Opening:
    """Return an opening whose buffers hold no number yet, but for the state: 0, 1, 2, ..."""
    opening = prepare(SHAPES, replace(PLAN, **fields), WireFormat())
    opening.message.fill_(torch.nan)
    opening.state.copy_(torch.arange(opening.state.numel()))
    return opening


def parts_of(opening: Opening) -> dict[str, list[float]]:
    parts = opening.plan.split(SHAPES, opening.message)
    return {name: part.tolist() for name, part in parts._asdict().items() if part.numel()}


# The state.


def test_a_state_that_goes_out_whole_is_the_end_of_the_message() -> None:
    opening = prepare(SHAPES, replace(PLAN, frozen_ranks=(1, 1)), WireFormat())
    assert (opening.message.numel(), opening.state.numel()) == (14 + 23, 23)
    assert opening.state.data_ptr() == opening.message[14:].data_ptr()
    assert opening.message.dtype == torch.float32


@pytest.mark.parametrize(
    "fields",
    [
        {"sends_state": False},
        {"sends_parts": ""},
        {"sends_parts": "a"},
        {"sends_parts": "b"},
        {"keeps_b": True, "keeps_head": True},
        {"scope": "full", "sends_state": False},
    ],
    ids=str,
)
def test_a_state_that_does_not_is_apart(fields: dict[str, Any]) -> None:
    opening = prepare(SHAPES, replace(PLAN, sends_base=True, **fields), WireFormat())
    assert opening.state.numel() == (24 if opening.plan.scope == "full" else 23)
    opening.message.fill_(1)
    opening.state.fill_(2)
    assert set(opening.message.tolist()) == {1}


@pytest.mark.parametrize("parts", HELD)
@pytest.mark.parametrize("scope", ["adapter", "a", "b"])
def test_the_message_holds_the_parts_that_the_plan_names(parts: Parts, scope: str) -> None:
    opening = opened(sends_parts=parts, scope=scope)
    assert complete(SHAPES, opening, None) is opening
    assert parts_of(opening) == {"state": HELD[parts]}
    assert opening.state.tolist() == STATE


def test_a_head_that_stays_with_its_clients_is_not_in_the_message() -> None:
    opening = complete(SHAPES, opened(sends_parts="a", keeps_b=True, keeps_head=True), None)
    assert parts_of(opening) == {"state": HELD["a"][:-2]}
    assert opening.state.tolist() == STATE


def test_the_full_scope_sends_every_weight() -> None:
    opening = complete(SHAPES, opened(scope="full"), None)
    assert parts_of(opening) == {"state": list(range(12 + 10 + 2))}


def test_round_one_sends_nothing() -> None:
    opening = opened(sends_state=False, has_variates=True)
    assert opening.message.numel() == 0
    assert opening.state.tolist() == STATE


@pytest.mark.parametrize(
    ("fields", "num_values"),
    [({}, 23), ({"scope": "b"}, 9), ({"keeps_b": True}, 16), ({"scope": "full"}, 24)],
)
def test_the_control_variate_is_that_of_what_is_shared(fields: dict[str, Any], num_values: int) -> None:
    variate = -1.0 - torch.arange(num_values)
    opening = complete(SHAPES, opened(has_variates=True, **fields), variate)
    parts = parts_of(opening)
    assert list(parts) == ["variate", "state"]
    assert parts["variate"] == variate.tolist()
    assert parts["state"] == list(range(24 if opening.plan.scope == "full" else 23))


def test_a_variate_is_sent_only_where_the_plan_has_one() -> None:
    assert parts_of(complete(SHAPES, opened(), torch.zeros(23))) == {"state": STATE}


# Frozen directions.


@pytest.mark.parametrize(
    ("lora_rank", "form"), [(0, 0), (1, 1), (2, 2), (3, 3), (4, DENSE), (5, DENSE), (40, DENSE)]
)
def test_hand_sized_forms(lora_rank: int, form: int) -> None:
    # 48 values as a matrix; 16 a direction, so three directions are as many: they stay factors.
    module = LinearShape("q", 4, 12)
    assert frozen_form(module, lora_rank) == form


@LAWS
@given(SIDES, SIDES, st.integers(0, 30))
def test_the_smaller_form_is_sent_and_always_has_a_layout(
    out_features: int, in_features: int, lora_rank: int
) -> None:
    module = LinearShape("q", out_features, in_features)
    form = frozen_form(module, lora_rank)
    values = lora_rank * (out_features + in_features)
    # Also of more directions than a layout could have, where K clients' directions are stacked.
    assert ModelShapes((module,), (), ()).frozen((form,)).num_values == min(
        values, out_features * in_features
    )
    assert form == (lora_rank if values <= out_features * in_features else DENSE)


@LAWS
@given(st.tuples(st.integers(0, 4), st.integers(0, 4)), st.integers(0, 2**31), st.booleans())
def test_either_form_gives_the_product(ranks: tuple[int, int], seed: int, sends_base: bool) -> None:
    frozen = [
        random_factors(module, lora_rank, seed)
        for module, lora_rank in zip(SHAPES.modules, ranks, strict=True)
    ]
    forms = tuple(map(frozen_form, SHAPES.modules, [part.lora_rank for part in frozen]))
    opening = opened(frozen_ranks=forms, sends_base=sends_base)
    write_frozen(SHAPES, opening, frozen)
    assert_products(opening, frozen)
    parts = opening.plan.split(SHAPES, opening.message)
    assert opening.state.tolist() == parts.state.tolist() == STATE
    assert bool(parts.base.isnan().all())


def assert_products(opening: Opening, frozen: list[Factors]) -> None:
    layout = SHAPES.frozen(opening.plan.frozen_ranks)
    flat = opening.plan.split(SHAPES, opening.message).frozen
    matrices = dict(zip([shape.name for shape in layout.whole], layout.whole_tensors(flat), strict=True))
    for module, sent, source in zip(SHAPES.modules, layout.factors(flat), frozen, strict=True):
        wanted = source.b.double() @ source.a.double()
        if module.name in matrices:
            assert torch.allclose(matrices[module.name].double(), wanted, atol=1e-5)
        else:
            assert (sent.a.tolist(), sent.b.tolist()) == (source.a.tolist(), source.b.tolist())


@pytest.mark.parametrize("forms", [(2, DENSE), (DENSE, 1), (DENSE, DENSE), (2, 1)])
def test_the_form_is_the_plans(forms: tuple[int, int]) -> None:
    frozen = [random_factors(SHAPES.modules[0], 2), random_factors(SHAPES.modules[1], 1)]
    opening = opened(frozen_ranks=forms)
    write_frozen(SHAPES, opening, frozen)
    assert_products(opening, frozen)


def test_a_hand_sized_message_of_both_forms() -> None:
    q = Factors(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[1.0], [0], [-1]]))
    v = Factors(torch.tensor([[1.0, 1, 1, 1, 1]]), torch.tensor([[2.0], [3]]))
    opening = opened(frozen_ranks=(DENSE, 1))
    write_frozen(SHAPES, opening, [q, v])
    # The factors of v come first, then the matrix of q.
    frozen = [1, 1, 1, 1, 1, 2, 3] + [1, 2, 3, 4, 0, 0, 0, 0, -1, -2, -3, -4]
    assert parts_of(opening) == {"frozen": frozen, "state": STATE}


# Maps, and everything together.


def map_of(first: int, old: int, new: int) -> CutMap:
    values = torch.arange(first, first + 2 * old * new, dtype=torch.float32)
    return CutMap(values[: old * new].view(new, old), values[old * new :].view(old, new))


def test_maps_are_written_in_the_order_of_the_modules() -> None:
    opening = opened(mapped_ranks=(3, 2), frozen_ranks=(1, 0))
    write_maps(SHAPES, opening, [map_of(100, 3, 1), map_of(200, 2, 2)])
    maps = opening.plan.split(SHAPES, opening.message).maps
    assert maps.tolist() == [*range(100, 106), *range(200, 208)]
    sides = opening.plan.segments(SHAPES).maps.whole_tensors(maps)
    assert [tuple(side.shape) for side in sides] == [(1, 3), (3, 1), (2, 2), (2, 2)]
    assert opening.plan.split(SHAPES, opening.message).frozen.isnan().all()
    assert opening.state.tolist() == STATE


@pytest.mark.parametrize("parts", HELD)
@pytest.mark.parametrize("scope", ["adapter", "b"])
def test_a_message_is_written_to_its_last_value(parts: Parts, scope: str) -> None:
    opening = opened(
        sends_base=True,
        frozen_ranks=(1, DENSE),
        mapped_ranks=(2, 2),
        has_variates=True,
        sends_parts=parts,
        scope=scope,
    )
    opening.plan.split(SHAPES, opening.message).base.fill_(0)
    write_frozen(SHAPES, opening, [random_factors(module, 1) for module in SHAPES.modules])
    write_maps(SHAPES, opening, [map_of(0, 2, 1), map_of(0, 2, 2)])
    num_shared = len(HELD["ab" if scope == "adapter" else "b"])
    complete(SHAPES, opening, torch.zeros(num_shared))
    assert not bool(opening.message.isnan().any())
    assert opening.message.numel() == 22 + (7 + 10) + (4 + 8) + num_shared + len(HELD[parts])


def test_leading_directions_are_written_and_no_others() -> None:
    layout = SHAPES.adapter((2, 2))
    flat = torch.full((layout.num_values,), -1.0)
    q = Factors(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[5.0], [6], [7]]))
    write_leading([q, random_factors(SHAPES.modules[1], 0)], layout.factors(flat))
    target, untouched = layout.factors(flat)
    assert target.a.tolist() == [[1, 2, 3, 4], [-1] * 4]
    assert target.b.tolist() == [[5, -1], [6, -1], [7, -1]]
    rest = torch.cat([untouched.a.flatten(), untouched.b.flatten(), layout.whole_values(flat)])
    assert bool((rest == -1).all())


@LAWS
@given(st.integers(0, 3), st.integers(0, 2), st.integers(0, 2**31))
def test_leading_directions_keep_the_product_where_the_others_are_zero(q: int, v: int, seed: int) -> None:
    layout = SHAPES.adapter((3, 2))
    sources = [random_factors(module, r, seed) for module, r in zip(SHAPES.modules, (q, v), strict=True)]
    targets = layout.factors(torch.zeros(layout.num_values))
    write_leading(sources, targets)
    for source, target in zip(sources, targets, strict=True):
        assert torch.allclose(target.b @ target.a, source.b @ source.a, atol=1e-6)


def test_two_messages_of_one_factor_each_make_the_whole_state() -> None:
    kept = torch.zeros(23)
    for parts in ("b", "a"):
        opening = complete(SHAPES, opened(sends_parts=parts), None)
        sent = opening.plan.segments(SHAPES).state
        values = opening.plan.split(SHAPES, opening.message).state
        copy_common(sent, values, opening.plan.layout(SHAPES), kept)
    assert kept.tolist() == STATE


# Buffers.


def test_a_float32_message_is_the_values_of_its_wire() -> None:
    opening = prepare(SHAPES, replace(PLAN, frozen_ranks=(1, 0)), WireFormat("int8"))
    assert (opening.message.numel(), opening.wire.numel(), opening.wire.dtype) == (30, 128, torch.uint8)
    assert opening.message.data_ptr() == opening.wire.data_ptr()


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 64), ("int8", 128)])
def test_a_rounded_message_lies_apart_from_its_wire(dtype: str, size: int) -> None:
    # 30 values; under int8 with a scale for each of two, two and four directions, and one for the head.
    opening = prepare(SHAPES, replace(PLAN, frozen_ranks=(1, 0)), WireFormat("float32", dtype))
    assert (opening.message.numel(), opening.wire.numel()) == (30, size)
    opening.message.fill_(1.0)
    opening.wire.zero_()
    assert opening.message.tolist() == [1.0] * 30
    assert opening.state.data_ptr() == opening.message[7:].data_ptr()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_spare_buffer_is_used_where_it_fits(dtype: str) -> None:
    wire = WireFormat("float32", dtype)
    old = prepare(SHAPES, PLAN, wire).wire
    assert prepare(SHAPES, PLAN, wire, old).wire is old
    larger = prepare(SHAPES, replace(PLAN, frozen_ranks=(2, 2)), wire, old)
    assert larger.wire.numel() > old.numel()
    smaller = prepare(SHAPES, replace(PLAN, sends_state=False), wire, old)
    assert smaller.wire.numel() < old.numel()
