from __future__ import annotations

import re
from dataclasses import asdict, fields, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpifedlora.core.layout import DENSE, AdapterLayout, LinearShape, ModelShapes, Parts, TensorShape
from mpifedlora.core.plan import (
    ABSENT,
    HEADER_BYTES,
    PLAN_HEADER,
    RoundPlan,
    Segments,
    downlink_header_bytes,
    header_record,
    plan_bytes,
)
from mpifedlora.core.wire import UPDATE_HEADER
from mpifedlora.errors import ProtocolError

LAWS = settings(max_examples=50, deadline=None)
SHAPES = ModelShapes(
    (LinearShape("q", 5, 4), LinearShape("v", 3, 6)),
    (TensorShape("head", (2, 3)),),
    (TensorShape("q.weight", (5, 4)), TensorShape("v.weight", (3, 6)), TensorShape("bias", (7,))),
)
NUM_BODY, NUM_HEAD = 20 + 18 + 7, 6
# Per direction of q and v: values in A, in B, in both.
A, B, AB = (4, 6), (5, 3), (9, 9)
SCOPES = ("adapter", "full", "a", "b")
PARTS: tuple[Parts, ...] = ("", "a", "b", "ab")
PLAN = RoundPlan(3, "annealing", "adapter", (4, 3), (1, 0), (0, 1, ABSENT, 0), sends_state=True)
# Another value of every field than PLAN has.
OTHERS: dict[str, Any] = {
    "round_num": 4,
    "stage": "initiating",
    "scope": "b",
    "lora_ranks": (3, 4),
    "frozen_ranks": (1, DENSE),
    "workers": (0, 1, 0, ABSENT),
    "mapped_ranks": (4, 0),
    "client_ranks": (1, 2, 3, 4),
    "state_rounds": (0, 2, 0, 1),
    "sends_base": True,
    "sends_state": False,
    "sends_parts": "",
    "keeps_b": True,
    "keeps_head": True,
    "has_variates": True,
    "reduces": True,
    "evaluates": True,
    "stops": True,
    "learning_rate": 0.1,
    "mu": 1e-300,
    "temperature": 0.3,
}
FLAGS = [field.name for field in fields(RoundPlan) if field.type == "bool"]
FLOATS = st.floats(allow_nan=False)
COUNTS = st.integers(0, 2**31 - 1)


@st.composite
def plans(draw: st.DrawFn, num_modules: int | None = None) -> RoundPlan:
    """Draw a plan; of a number of modules it fits SHAPES, whose smallest side is 3."""
    num_modules = draw(st.integers(0, 5)) if num_modules is None else num_modules
    num_clients = draw(st.integers(0, 6))

    def many(number: int, lowest: int, highest: int) -> tuple[int, ...]:
        return tuple(draw(st.lists(st.integers(lowest, highest), min_size=number, max_size=number)))

    def some(number: int, lowest: int, highest: int) -> tuple[int, ...]:
        return many(number, lowest, highest) if number and draw(st.booleans()) else ()

    scope = draw(st.sampled_from(SCOPES))
    flags: dict[str, Any] = {name: draw(st.booleans()) for name in FLAGS}
    flags["keeps_b"] &= scope == "adapter"
    flags["keeps_head"] &= flags["keeps_b"]
    return RoundPlan(
        round_num=draw(COUNTS),
        stage=draw(st.sampled_from(("initiating", "annealing"))),
        scope=scope,
        lora_ranks=many(num_modules, 0, 3),
        frozen_ranks=many(num_modules, DENSE, 3),
        workers=many(num_clients, ABSENT, 9),
        mapped_ranks=some(num_modules, 1, 3),
        client_ranks=some(num_clients, 1, 4),
        state_rounds=some(num_clients, 0, 2**31 - 1),
        sends_parts=draw(st.sampled_from(PARTS)),
        learning_rate=draw(FLOATS),
        mu=draw(FLOATS),
        temperature=draw(FLOATS),
        **flags,
    )


def size(lora_ranks: tuple[int, ...], sides: tuple[int, ...]) -> int:
    return sum(lora_rank * side for lora_rank, side in zip(lora_ranks, sides, strict=True))


# As bytes.


@LAWS
@given(plans())
def test_a_plan_survives_a_round_trip(plan: RoundPlan) -> None:
    num_modules = len(plan.lora_ranks)
    packed = plan.pack()
    assert RoundPlan.unpack(packed, num_modules) == plan
    assert (packed.dtype, packed.size) == (np.uint8, plan_bytes(num_modules, len(plan.workers)))
    assert packed.tobytes() == plan.pack().tobytes()


def test_every_field_is_packed() -> None:
    assert set(OTHERS) == set(asdict(PLAN))
    assert RoundPlan.unpack(PLAN.pack(), 2) == PLAN
    for name, value in OTHERS.items():
        other = replace(PLAN, **{name: value})
        assert other != PLAN, name
        assert RoundPlan.unpack(other.pack(), 2) == other, name
        assert other.pack().tobytes() != PLAN.pack().tobytes(), name
    changed = replace(PLAN, **OTHERS)
    assert RoundPlan.unpack(changed.pack(), 2) == changed


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_is_none_of_the_others(name: str) -> None:
    off: dict[str, Any] = dict.fromkeys(FLAGS, False)
    bare = replace(PLAN, **off)
    got = RoundPlan.unpack(replace(bare, **{name: True}).pack(), 2)
    assert [flag for flag in FLAGS if getattr(got, flag)] == [name]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("scope", SCOPES)
def test_scopes_and_parts_arrive_in_every_combination(scope: str, parts: Parts) -> None:
    plan = replace(PLAN, scope=scope, sends_parts=parts)
    assert RoundPlan.unpack(plan.pack(), 2) == plan


def test_a_plan_that_was_unpacked_is_made_of_python_numbers() -> None:
    got = asdict(RoundPlan.unpack(replace(PLAN, **OTHERS).pack(), 2))
    numbers = [value for row in got.values() if isinstance(row, tuple) for value in row]
    assert {type(number) for number in numbers} == {int}
    assert {type(value) for value in got.values()} == {int, str, tuple, bool, float}


def test_client_lists_without_entries_are_none() -> None:
    plan = RoundPlan.unpack(PLAN.pack(), 2)
    assert (plan.mapped_ranks, plan.client_ranks, plan.state_rounds) == ((), (), ())
    # A list of zeros is one: the clients keep something, but nobody has yet.
    fresh = replace(PLAN, state_rounds=(0, 0, 0, 0))
    assert RoundPlan.unpack(fresh.pack(), 2).state_rounds == (0, 0, 0, 0)


def test_packed_bytes_are_little_endian_and_in_order() -> None:
    plan = replace(PLAN, mapped_ranks=(7, 8), client_ranks=(1, 2, 3, 4), state_rounds=(5, 6, 0, 9))
    packed = plan.pack()
    assert packed[:8].tobytes() == b"MPFL\x03\x00\x00\x00"
    tail = packed[HEADER_BYTES:].view("<i4").tolist()
    assert tail == [4, 3, 1, 0, 7, 8] + [0, 1, ABSENT, 0] + [1, 2, 3, 4] + [5, 6, 0, 9]


def test_hand_sized_sizes() -> None:
    # Three lists of 4-byte numbers by module, three by client.
    assert plan_bytes(2, 4) == 128 + 3 * 2 * 4 + 3 * 4 * 4
    assert plan_bytes(0, 0) == HEADER_BYTES == 128
    # A client needs neither the lists by client nor, without variates, the ranks before a cut.
    assert downlink_header_bytes(2) == 128 + 2 * 2 * 4
    assert downlink_header_bytes(2, has_variates=True) == 128 + 3 * 2 * 4


@LAWS
@given(st.integers(0, 500), st.integers(0, 5000))
def test_a_client_receives_the_plan_without_what_is_the_servers(num_modules: int, num_clients: int) -> None:
    with_variates = downlink_header_bytes(num_modules, has_variates=True)
    assert plan_bytes(num_modules, num_clients) == with_variates + 12 * num_clients
    assert with_variates - downlink_header_bytes(num_modules) == 4 * num_modules


@pytest.mark.parametrize("record", [PLAN_HEADER, UPDATE_HEADER], ids=["plan", "update"])
def test_a_header_has_no_overlaps(record: np.dtype[np.void]) -> None:
    assert record.fields is not None
    assert record.names is not None
    places = [(record.fields[name][1], record.fields[name][0].itemsize) for name in record.names]
    ends = [offset + itemsize for offset, itemsize in places]
    assert all(end <= start for end, (start, _) in zip(ends, places[1:], strict=False))
    assert ends[-1] <= HEADER_BYTES
    assert all(offset % itemsize == 0 for offset, itemsize in places)
    assert record.itemsize == HEADER_BYTES
    assert record.names[0] == "magic"


@pytest.mark.parametrize(
    ("kinds", "places"),
    [
        ({"lora_rank": "<i4", "mu": "<f8"}, {"magic": 0, "lora_rank": 4, "mu": 8}),
        ({"mu": "<f8", "lora_rank": "<i4"}, {"magic": 0, "mu": 8, "lora_rank": 16}),
    ],
)
def test_fields_start_at_multiples_of_their_size(kinds: dict[str, str], places: dict[str, int]) -> None:
    record = header_record(**kinds)
    assert record.fields is not None
    assert {name: place[1] for name, place in record.fields.items()} == places
    assert record.itemsize == 128


@pytest.mark.parametrize("num_modules", [0, 1, 3])
def test_a_plan_for_another_model_is_refused(num_modules: int) -> None:
    message = (
        f"a plan must be for {num_modules} modules, got 2 (worker); "
        "start all processes from one run file and one package version"
    )
    with pytest.raises(ProtocolError, match=f"^{re.escape(message)}$"):
        RoundPlan.unpack(PLAN.pack(), num_modules)


def test_bytes_that_are_no_plan_are_refused() -> None:
    with pytest.raises(ProtocolError, match="a plan must be for 0 modules"):
        RoundPlan.unpack(np.zeros(plan_bytes(0, 0), np.uint8), 0)
    spoiled = PLAN.pack()
    spoiled[0] += 1
    with pytest.raises(ProtocolError, match="a plan must be for 2 modules"):
        RoundPlan.unpack(spoiled, 2)


# Who trains.


@LAWS
@given(plans())
def test_every_client_of_the_cohort_is_on_one_worker(plan: RoundPlan) -> None:
    lists = [plan.clients_of(worker_id) for worker_id in range(10)]
    assert sorted(client for clients in lists for client in clients) == list(plan.cohort)
    assert set(plan.cohort) == {client for client, worker in enumerate(plan.workers) if worker >= 0}
    assert all(list(clients) == sorted(clients) for clients in lists)


def test_a_hand_sized_cohort() -> None:
    plan = replace(PLAN, workers=(2, 0, ABSENT, 2, 0))
    assert plan.cohort == (0, 1, 3, 4)
    assert [plan.clients_of(worker_id) for worker_id in range(3)] == [(1, 4), (), (0, 3)]


# Layouts.


@pytest.mark.parametrize("scope", SCOPES)
def test_the_state_is_whole_whatever_is_trained(scope: str) -> None:
    plan = replace(PLAN, scope=scope, sends_parts="", client_ranks=(1, 1, 1, 1))
    wanted = SHAPES.full() if scope == "full" else SHAPES.adapter((4, 3))
    assert plan.layout(SHAPES) == wanted


@pytest.mark.parametrize(("scope", "parts"), [("adapter", "ab"), ("a", "a"), ("b", "b")])
def test_a_scope_trains_its_factors_and_the_head(scope: str, parts: Parts) -> None:
    plan = replace(PLAN, scope=scope, client_ranks=(1, 2, 4, 9))
    for client_id, ranks in ((None, (4, 3)), (0, (1, 1)), (1, (2, 2)), (2, (4, 3)), (3, (4, 3))):
        wanted = AdapterLayout(SHAPES.modules, ranks, SHAPES.head, parts)
        assert plan.trained_layout(SHAPES, client_id) == wanted
        assert plan.shared_layout(SHAPES, client_id) == wanted


def test_the_full_scope_knows_no_ranks() -> None:
    plan = replace(PLAN, scope="full", client_ranks=(1, 2, 3, 4))
    for client_id in (None, 0, 3):
        assert plan.trained_layout(SHAPES, client_id) == SHAPES.full()
        assert plan.shared_layout(SHAPES, client_id) == SHAPES.full()


def test_b_that_stays_is_trained_but_not_shared() -> None:
    plan = replace(PLAN, keeps_b=True, client_ranks=(2, 4, 4, 4))
    assert plan.trained_layout(SHAPES, 0) == SHAPES.adapter((2, 2))
    assert plan.shared_layout(SHAPES, 0) == SHAPES.adapter((2, 2), "a")
    assert plan.shared_layout(SHAPES) == SHAPES.adapter((4, 3), "a")
    assert plan.personal_layout(SHAPES, 0) == AdapterLayout(SHAPES.modules, (2, 2), (), "b")
    assert plan.personal_layout(SHAPES, 1).num_values == 4 * 5 + 3 * 3


def test_a_head_that_stays_too_leaves_a_alone_to_be_shared() -> None:
    plan = replace(PLAN, keeps_b=True, keeps_head=True)
    assert plan.trained_layout(SHAPES, 0) == SHAPES.adapter((4, 3))
    assert plan.shared_layout(SHAPES, 0) == AdapterLayout(SHAPES.modules, (4, 3), (), "a")
    assert plan.personal_layout(SHAPES, 0) == SHAPES.adapter((4, 3), "b")
    assert plan.row_values(SHAPES, 0) == 4 * 4 + 3 * 6
    assert plan.segments(SHAPES).state == AdapterLayout(SHAPES.modules, (4, 3), (), "ab")
    assert plan.layout(SHAPES) == SHAPES.adapter((4, 3))


@LAWS
@given(plans(num_modules=2).filter(lambda plan: bool(plan.workers)), st.data())
def test_what_is_shared_and_what_stays_is_what_is_trained(plan: RoundPlan, data: st.DataObject) -> None:
    client_id = data.draw(st.sampled_from(range(len(plan.workers))))
    trained, shared = plan.trained_layout(SHAPES, client_id), plan.shared_layout(SHAPES, client_id)
    personal = plan.personal_layout(SHAPES, client_id) if plan.keeps_b else AdapterLayout((), ())
    assert shared.num_values + personal.num_values == trained.num_values
    assert plan.row_values(SHAPES, client_id) == shared.num_values * (1 + plan.has_variates)
    limits = plan.client_ranks or (99,) * len(plan.workers)
    wanted = tuple(min(lora_rank, limits[client_id]) for lora_rank in plan.lora_ranks)
    assert trained.lora_ranks == (() if plan.scope == "full" else wanted)


def test_hand_sized_rows() -> None:
    plan = replace(PLAN, client_ranks=(1, 3, 3, 4))
    assert [plan.row_values(SHAPES, client_id) for client_id in range(4)] == [
        9 + 9 + 6,
        27 + 27 + 6,
        27 + 27 + 6,
        36 + 27 + 6,
    ]
    assert replace(PLAN, scope="a").row_values(SHAPES, 0) == 4 * 4 + 3 * 6 + 6
    assert replace(PLAN, scope="b").row_values(SHAPES, 0) == 4 * 5 + 3 * 3 + 6
    assert replace(PLAN, scope="full").row_values(SHAPES, 0) == 45 + 6
    assert replace(PLAN, keeps_b=True).row_values(SHAPES, 0) == 4 * 4 + 3 * 6 + 6


def test_variates_double_a_row() -> None:
    plan = replace(PLAN, has_variates=True)
    assert plan.row_values(SHAPES, 0) == 2 * (36 + 27 + 6)
    assert replace(plan, scope="full").row_values(SHAPES, 0) == 2 * 51
    assert replace(plan, keeps_b=True).row_values(SHAPES, 0) == 2 * (16 + 18 + 6)


# Messages.


def closed_form(plan: RoundPlan) -> Segments:
    """Sizes of the message's parts, from the plan alone."""
    ranks = plan.lora_ranks
    dense = sum(values for r, values in zip(plan.frozen_ranks, (20, 18), strict=True) if r == DENSE)
    factored = size(tuple(max(lora_rank, 0) for lora_rank in plan.frozen_ranks), AB)
    maps = sum(2 * old * new for old, new in zip(plan.mapped_ranks, ranks, strict=False))
    held = {"": 0, "a": size(ranks, A), "b": size(ranks, B), "ab": size(ranks, AB)}
    shared = {"adapter": "a" if plan.keeps_b else "ab", "a": "a", "b": "b"}
    if plan.scope == "full":
        variate = state = NUM_BODY + NUM_HEAD
    else:
        head = NUM_HEAD * (not plan.keeps_head)
        variate, state = held[shared[plan.scope]] + head, held[plan.sends_parts] + head
    return Segments(
        base=NUM_BODY * plan.sends_base,
        frozen=dense + factored,
        maps=maps,
        variate=variate * (plan.has_variates and plan.sends_state),
        state=state * plan.sends_state,
    )


def assert_is_a_cover(plan: RoundPlan) -> None:
    message = torch.arange(plan.message_values(SHAPES), dtype=torch.float32)
    parts, segments = plan.split(SHAPES, message), plan.segments(SHAPES)
    assert torch.equal(torch.cat(parts), message)
    assert [part.numel() for part in parts] == [segment.num_values for segment in segments]
    assert Segments(*(part.numel() for part in parts)) == closed_form(plan)
    storage = message.untyped_storage().data_ptr()
    assert all(part.untyped_storage().data_ptr() == storage for part in parts)


@LAWS
@given(plans(num_modules=2))
def test_the_parts_of_a_message_are_a_disjoint_cover_in_closed_form(plan: RoundPlan) -> None:
    assert_is_a_cover(plan)
    assert plan.message_values(SHAPES) == sum(closed_form(plan))


@pytest.mark.parametrize("scope", SCOPES)
def test_messages_have_their_closed_form_in_every_combination(scope: str) -> None:
    all_kept = [("keeps_b",), ("keeps_b", "keeps_head")] if scope == "adapter" else []
    for parts, flags, kept in product(PARTS, product((False, True), repeat=3), [(), *all_kept]):
        named: dict[str, Any] = dict(zip(("sends_base", "sends_state", "has_variates"), flags, strict=True))
        named |= dict.fromkeys(kept, True)
        plan = replace(PLAN, scope=scope, sends_parts=parts, frozen_ranks=(DENSE, 2), **named)
        assert_is_a_cover(plan)
        assert_is_a_cover(replace(plan, lora_ranks=(2, 1), mapped_ranks=(4, 3)))


def test_a_hand_sized_message() -> None:
    plan = replace(
        PLAN,
        lora_ranks=(2, 1),
        frozen_ranks=(1, DENSE),
        mapped_ranks=(3, 1),
        sends_base=True,
        has_variates=True,
        sends_parts="a",
    )
    # base 45; frozen 9 + 18; maps 2 * 3 * 2 + 2; variate 18 + 9 + 6; state 8 + 6 + 6.
    assert closed_form(plan) == (45, 27, 14, 33, 20)
    parts = plan.split(SHAPES, torch.arange(139))
    assert [part[0].item() for part in parts] == [0, 45, 72, 86, 119]
    maps = plan.segments(SHAPES).maps.whole_tensors(parts.maps)
    assert [tuple(side.shape) for side in maps] == [(2, 3), (3, 2), (1, 1), (1, 1)]
    assert maps[0].tolist() == [[72, 73, 74], [75, 76, 77]]
    assert plan.segments(SHAPES).state == SHAPES.adapter((2, 1), "a")


def test_round_one_has_no_message() -> None:
    plan = replace(PLAN, frozen_ranks=(0, 0), sends_state=False, has_variates=True)
    assert plan.message_values(SHAPES) == 0
    assert [part.numel() for part in plan.split(SHAPES, torch.empty(0))] == [0] * 5


def test_the_state_is_sent_whole_and_client_ranks_are_no_matter() -> None:
    # One broadcast goes to all; a client of a lower rank takes its leading directions.
    plan = replace(PLAN, client_ranks=(1, 1, 1, 1), has_variates=True)
    segments = plan.segments(SHAPES)
    assert segments.state == segments.variate == SHAPES.adapter((4, 3))


@pytest.mark.parametrize(
    ("scope", "sends_state", "parts", "restarts"),
    [
        ("adapter", False, "ab", True),
        ("adapter", True, "", True),
        ("adapter", True, "a", False),
        ("adapter", True, "ab", False),
        ("b", False, "b", True),
        ("b", True, "", True),
        ("a", True, "a", False),
        ("full", False, "", False),
        ("full", True, "", False),
    ],
)
def test_factors_restart_where_none_is_sent(
    scope: str, sends_state: bool, parts: Parts, restarts: bool
) -> None:
    plan = replace(PLAN, scope=scope, sends_state=sends_state, sends_parts=parts)
    assert plan.restarts is restarts


@pytest.mark.parametrize("keeps_b", [False, True])
def test_messages_are_partial_where_a_factor_is_fixed_or_kept(keeps_b: bool) -> None:
    plans_ = {scope: replace(PLAN, scope=scope, keeps_b=keeps_b) for scope in ("adapter", "full", "a", "b")}
    is_partial = {scope: plan.is_partial for scope, plan in plans_.items()}
    assert is_partial == {"adapter": keeps_b, "full": keeps_b, "a": True, "b": True}
