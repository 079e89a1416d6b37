from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpifedlora.core.layout import DENSE, LinearShape, ModelShapes, Parts, TensorShape
from mpifedlora.core.opening import (
    FROZEN,
    STATE,
    Lost,
    Opening,
    Rounding,
    complete,
    prepare,
    round_message,
)
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.wire import WireFormat

LAWS = settings(max_examples=25, deadline=None)
SHAPES = ModelShapes(
    (LinearShape("q", 3, 4), LinearShape("v", 2, 5)),
    (TensorShape("head", (2,)),),
    (TensorShape("q.weight", (3, 4)), TensorShape("v.weight", (2, 5))),
)
# The state: A of q 0..3, B of q 4..6, A of v 7..16, B of v 17..20, head 21..22.
PLAN = RoundPlan(2, "annealing", "adapter", (1, 2), (0, 0), (0,), sends_state=True)
HELD: dict[Parts, list[int]] = {
    "": [21, 22],
    "a": [0, 1, 2, 3, *range(7, 17), 21, 22],
    "b": [4, 5, 6, *range(17, 21), 21, 22],
    "ab": list(range(23)),
}


LOSSY = pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
UNIT_ROUNDOFF = {"bfloat16": 2**-8, "float16": 2**-11, "int8": 1 / 127}


def filled(wire: WireFormat, seed: int = 0, **fields: Any) -> Opening:
    """Return an opening that only has to be rounded."""
    opening = prepare(SHAPES, replace(PLAN, **fields), wire)
    generator = torch.Generator().manual_seed(seed)
    opening.message.copy_(torch.randn(opening.message.numel(), generator=generator))
    if opening.plan.segments(SHAPES).state != opening.plan.layout(SHAPES):
        opening.state.copy_(torch.randn(opening.state.numel(), generator=generator))
    return complete(SHAPES, opening, None)


def test_under_float32_nothing_is_rounded() -> None:
    wire = WireFormat("int8", "float32", has_feedback=True)
    opening = filled(wire)
    before = opening.message.clone()
    lost = Lost(PLAN.segments(SHAPES).state, torch.ones(23))
    assert round_message(SHAPES, opening, wire, lost) is None
    assert torch.equal(opening.message, before)


WHOLE = {"frozen_ranks": (1, DENSE), "sends_base": True}


@LOSSY
@pytest.mark.parametrize(
    "fields", [{}, WHOLE, {"scope": "full"}, {"sends_parts": "b", "scope": "b"}], ids=str
)
def test_the_server_keeps_what_is_read_from_the_wire(dtype: str, fields: dict[str, Any]) -> None:
    wire = WireFormat("float32", dtype, seed=3)
    opening = filled(wire, **fields)
    meant = opening.message.clone()
    assert round_message(SHAPES, opening, wire, None) is None
    assert torch.equal(wire.decode_message(opening.plan, SHAPES, opening.wire), opening.message)
    error = (opening.message - meant).abs()
    assert bool((error <= UNIT_ROUNDOFF[dtype] * float(meant.abs().max())).all())
    for part in opening.plan.split(SHAPES, error):
        assert not part.numel() or bool(part.any())


@LOSSY
@pytest.mark.parametrize("parts", HELD)
def test_of_a_state_that_is_sent_in_part_only_that_is_rounded(dtype: str, parts: Parts) -> None:
    wire = WireFormat("float32", dtype)
    opening = filled(wire, sends_parts=parts)
    before = opening.state.clone()
    round_message(SHAPES, opening, wire, None)
    sent = torch.zeros(23, dtype=torch.bool)
    sent[HELD[parts]] = True
    assert torch.equal(opening.state[sent], opening.plan.split(SHAPES, opening.message).state)
    assert not torch.equal(opening.state[sent], before[sent])
    assert torch.equal(opening.state[~sent], before[~sent])


@LOSSY
def test_a_head_that_stays_with_its_clients_is_not_rounded(dtype: str) -> None:
    wire = WireFormat("float32", dtype)
    opening = filled(wire, sends_parts="a", keeps_b=True, keeps_head=True)
    before = opening.state.clone()
    round_message(SHAPES, opening, wire, None)
    assert torch.equal(opening.state[-2:], before[-2:])


@LOSSY
@LAWS
@given(data=st.data(), has_feedback=st.booleans())
def test_pieces_can_be_rounded_in_any_order(dtype: str, data: st.DataObject, has_feedback: bool) -> None:
    wire = WireFormat("float32", dtype, has_feedback, seed=5)
    fields: dict[str, Any] = {"frozen_ranks": (1, DENSE)}
    whole, apart = filled(wire, **fields), filled(wire, **fields)
    before = Lost(PLAN.segments(SHAPES).state, torch.full((23,), 0.01)) if has_feedback else None
    lost = round_message(SHAPES, whole, wire, before)
    rounding = Rounding(SHAPES, apart, wire, before)
    ranges = []  # both segments have three pieces: two modules, and a matrix or the head
    for segment in (FROZEN, STATE):
        cuts = sorted(data.draw(st.sets(st.integers(1, 2))))
        ranges += [(segment, first, last) for first, last in pairwise([0, *cuts, 3])]
    for one in data.draw(st.permutations(ranges)):
        rounding.round_pieces(*one)
    assert torch.equal(apart.message, whole.message)
    size = wire.message_bytes(whole.plan, SHAPES)
    assert torch.equal(apart.wire[:size], whole.wire[:size])
    assert (lost is None) == (rounding.lost is None) == (not has_feedback)
    if lost is not None and rounding.lost is not None:
        assert torch.equal(rounding.lost.values, lost.values)


# Error feedback.


def sent_over_rounds(wire: WireFormat, meant: Sequence[float], **fields: Any) -> list[Tensor]:
    """Send a state of one value everywhere in each round; return what is read of the states."""
    lost, sent = None, []
    for round_num, value in enumerate(meant, start=2):
        opening = prepare(SHAPES, replace(PLAN, round_num=round_num, **fields), wire)
        opening.message.fill_(value)
        lost = round_message(SHAPES, opening, wire, lost)
        sent.append(opening.plan.split(SHAPES, opening.message).state.clone())
    return sent


def test_hand_sized_feedback() -> None:
    # Around 1 bfloat16 has steps of 4/512. 3 is sent as 4; then 3 - 1 = 2, as far from 0 as from 4: even.
    value = 1 + 3 / 512
    with_feedback = sent_over_rounds(WireFormat("float32", "bfloat16", has_feedback=True), [value] * 4)
    assert [float(one[0] - 1) * 512 for one in with_feedback] == [4, 0, 4, 4]  # 3, 2, 5, 4: lost -1, 2, 1, 0
    without = sent_over_rounds(WireFormat("float32", "bfloat16"), [value] * 4)
    assert [float(one[0] - 1) * 512 for one in without] == [4, 4, 4, 4]


@LOSSY
@LAWS
@given(
    meant=st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=12),
    scope=st.sampled_from(["adapter", "b", "full"]),
)
def test_the_sum_of_what_was_sent_follows_what_was_meant(dtype: str, meant: list[float], scope: str) -> None:
    wire = WireFormat("float32", dtype, has_feedback=True)
    sent = sent_over_rounds(wire, meant, scope=scope, sends_parts="b" if scope == "b" else "ab")
    # Whatever the number of rounds, the sums are apart by what the last rounding has lost.
    largest = 3 * (1 + 2 * UNIT_ROUNDOFF[dtype])
    error = (sum(sent, torch.zeros(1)) - sum(meant)).abs().max()
    assert float(error) <= UNIT_ROUNDOFF[dtype] * largest + 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_without_feedback_the_errors_add_up(dtype: str) -> None:
    unit = UNIT_ROUNDOFF[dtype]
    meant = [1 + 0.75 * unit] * 20
    apart = [
        abs(
            float(sum(one[0] for one in sent_over_rounds(WireFormat("", dtype, has_feedback), meant)))
            - sum(meant)
        )
        for has_feedback in (True, False)
    ]
    assert apart[0] <= 2 * unit
    assert apart[1] > 4 * unit


@LOSSY
def test_only_what_the_state_has_lost_is_kept(dtype: str) -> None:
    wire = WireFormat("float32", dtype, has_feedback=True)
    opening = filled(wire, frozen_ranks=(1, 1))
    meant = opening.plan.split(SHAPES, opening.message.clone()).state
    lost = round_message(SHAPES, opening, wire, None)
    assert lost is not None
    assert lost.layout == PLAN.segments(SHAPES).state
    assert torch.equal(lost.values, meant - opening.state)


CUT, OTHER_PART = {"lora_ranks": (1, 1)}, {"sends_parts": "a"}
AS_MANY_VALUES = {"lora_ranks": (2, 1)}


@LOSSY
@pytest.mark.parametrize("fields", [CUT, OTHER_PART, AS_MANY_VALUES], ids=str)
def test_another_layout_begins_anew(dtype: str, fields: dict[str, Any]) -> None:
    wire = WireFormat("float32", dtype, has_feedback=True)
    lost = round_message(SHAPES, filled(wire), wire, None)
    assert lost is not None
    messages = []
    for before in (None, lost):
        opening = filled(wire, 1, **fields)
        after = round_message(SHAPES, opening, wire, before)
        assert after is not None
        messages.append(torch.cat([opening.message, after.values]))
    assert torch.equal(*messages)
    fed_back = [filled(wire, 1), filled(wire, 1)]
    for opening, before in zip(fed_back, (None, lost), strict=True):
        round_message(SHAPES, opening, wire, before)
    assert not torch.equal(*(opening.message for opening in fed_back))
