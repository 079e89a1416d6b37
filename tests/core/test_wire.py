from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpifedlora.core.layout import LinearShape, ModelShapes, TensorShape
from mpifedlora.core.wire import (
    ABSENT,
    HEADER_BYTES,
    PLAN_HEADER,
    UPDATE_HEADER,
    ClientUpdate,
    RoundPlan,
    UpdateRows,
    downlink_header_bytes,
    fitting_rows,
    plan_bytes,
    ranks_digest,
)
from mpifedlora.errors import ProtocolError

LAWS = settings(max_examples=25, deadline=None)
SHAPES = ModelShapes(
    (LinearShape("q", 5, 4), LinearShape("v", 3, 6)),
    (TensorShape("head", (2, 3)),),
    (TensorShape("q.weight", (5, 4)), TensorShape("v.weight", (3, 6)), TensorShape("bias", (7,))),
)
PLAN = RoundPlan(3, "annealing", "adapter", (4, 3), (1, 0), (0, 1, ABSENT, 0), sends_state=True)
FLOATS = st.floats(allow_nan=False)
COUNTS = st.integers(0, 2**31 - 1)


@st.composite
def plans(draw: st.DrawFn, num_modules: int | None = None) -> RoundPlan:
    num_modules = draw(st.integers(0, 5)) if num_modules is None else num_modules
    ranks = st.lists(st.integers(0, 3), min_size=num_modules, max_size=num_modules).map(tuple)
    flags = {name: draw(st.booleans()) for name in ("sends_base", "sends_state", "evaluates", "stops")}
    return RoundPlan(
        round_num=draw(COUNTS),
        stage=draw(st.sampled_from(("initiating", "annealing"))),
        scope=draw(st.sampled_from(("adapter", "full"))),
        lora_ranks=draw(ranks),
        frozen_ranks=draw(ranks),
        workers=tuple(draw(st.lists(st.integers(ABSENT, 9), max_size=6))),
        learning_rate=draw(FLOATS),
        mu=draw(FLOATS),
        temperature=draw(FLOATS),
        **flags,
    )


def update(client_id: int = 2, num_values: int = 71) -> ClientUpdate:
    return ClientUpdate(client_id, 2**40, 5, 0.7, 0.01, 1.5, True, torch.zeros(num_values))


def written(plan: RoundPlan = PLAN) -> UpdateRows:
    rows = UpdateRows(2, plan.layout(SHAPES).num_values)
    for index in range(2):
        update(index).write_header(rows, index, plan)
    return rows


@LAWS
@given(plans())
def test_a_plan_survives_a_round_trip(plan: RoundPlan) -> None:
    num_modules = len(plan.lora_ranks)
    packed = plan.pack()
    assert RoundPlan.unpack(packed, num_modules) == plan
    assert (packed.dtype, packed.size) == (np.uint8, plan_bytes(num_modules, len(plan.workers)))
    assert packed.tobytes() == plan.pack().tobytes()


def test_hand_sized_sizes() -> None:
    assert plan_bytes(2, 4) == 128 + 2 * 2 * 4 + 4 * 4
    assert downlink_header_bytes(2) == 128 + 2 * 2 * 4
    assert PLAN_HEADER.itemsize == UPDATE_HEADER.itemsize == HEADER_BYTES == 128
    # 4 * 9 + 3 * 9 in A and B, 6 in the head.
    assert PLAN.row_bytes(SHAPES) == 128 + 4 * (36 + 27 + 6)
    assert PLAN.message_values(SHAPES) == 9 + 69


def test_a_header_has_no_overlaps() -> None:
    for record in (PLAN_HEADER, UPDATE_HEADER):
        fields = [(record.fields[name][1], record.fields[name][0].itemsize) for name in record.names]
        ends = [offset + itemsize for offset, itemsize in fields]
        assert all(end <= start for end, (start, _) in zip(ends, fields[1:], strict=False))
        assert ends[-1] <= HEADER_BYTES
        assert all(offset % itemsize == 0 for offset, itemsize in fields)


@pytest.mark.parametrize("num_modules", [0, 1, 3])
def test_a_plan_for_another_model_is_refused(num_modules: int) -> None:
    with pytest.raises(ProtocolError, match=rf"for {num_modules} modules, got 2 \(worker\); start all"):
        RoundPlan.unpack(PLAN.pack(), num_modules)


def test_bytes_that_are_no_plan_are_refused() -> None:
    with pytest.raises(ProtocolError):
        RoundPlan.unpack(np.zeros(plan_bytes(0, 0), np.uint8), 0)


@LAWS
@given(plans(num_modules=2))
def test_the_parts_of_a_message_are_a_disjoint_cover(plan: RoundPlan) -> None:
    message = torch.arange(plan.message_values(SHAPES), dtype=torch.float32)
    parts, segments = plan.split(SHAPES, message), plan.segments(SHAPES)
    assert torch.equal(torch.cat(parts), message)
    assert [part.numel() for part in parts] == [segment.num_values for segment in segments]
    storage = message.untyped_storage().data_ptr()
    assert all(part.untyped_storage().data_ptr() == storage for part in parts)


@LAWS
@given(plans(num_modules=2))
def test_a_message_has_its_closed_form(plan: RoundPlan) -> None:
    sums = [lora_ranks[0] * 9 + lora_ranks[1] * 9 for lora_ranks in (plan.frozen_ranks, plan.lora_ranks)]
    state = 45 + 6 if plan.scope == "full" else sums[1] + 6
    assert plan.message_values(SHAPES) == 45 * plan.sends_base + sums[0] + state * plan.sends_state
    assert plan.layout(SHAPES).num_values == state


@LAWS
@given(plans())
def test_every_client_of_the_cohort_is_on_one_worker(plan: RoundPlan) -> None:
    lists = [plan.clients_of(worker_id) for worker_id in range(10)]
    assert sorted(client for clients in lists for client in clients) == list(plan.cohort)
    assert set(plan.cohort) == {client for client, worker in enumerate(plan.workers) if worker >= 0}


@LAWS
@given(st.integers(0, 5), st.integers(0, 200))
def test_rows_and_their_values_start_on_cache_lines(num_rows: int, num_values: int) -> None:
    rows = UpdateRows(num_rows, num_values)
    assert (len(rows), rows.row_bytes) == (num_rows, 128 + 4 * num_values)
    assert rows.row_bytes <= rows.stride < rows.row_bytes + 64
    assert all(rows.rows[index].data_ptr() % 64 == 0 for index in range(num_rows))
    assert all(rows.values(index).data_ptr() % 64 == 0 for index in range(num_rows if num_values else 0))


@LAWS
@given(st.integers(1, 5), st.integers(0, 40))
def test_rows_do_not_touch_each_other_nor_their_headers(num_rows: int, num_values: int) -> None:
    rows = UpdateRows(num_rows, num_values)
    for index in range(num_rows):
        rows.values(index).fill_(index + 1)
    assert all(rows.values(index).tolist() == [index + 1] * num_values for index in range(num_rows))
    assert int(rows.rows[:, :HEADER_BYTES].count_nonzero()) == 0


def test_a_header_is_written_through_into_its_row_only() -> None:
    rows = UpdateRows(3, 4)
    rows.header(1)["num_examples"] = -1
    assert int(rows.buffer.count_nonzero()) == 8
    assert int(rows.rows[1, :HEADER_BYTES].count_nonzero()) == 8


@LAWS
@given(
    client_id=COUNTS,
    numbers=st.tuples(*[st.integers(0, 2**63 - 1)] * 2),
    floats=st.tuples(FLOATS, FLOATS, FLOATS),
    is_finite=st.booleans(),
    plan=plans(num_modules=2),
)
def test_an_update_survives_a_round_trip(
    client_id: int,
    numbers: tuple[int, int],
    floats: tuple[float, float, float],
    is_finite: bool,
    plan: RoundPlan,
) -> None:
    rows = UpdateRows(2, plan.layout(SHAPES).num_values)
    rows.values(1).copy_(torch.arange(rows.num_values))
    sent = ClientUpdate(client_id, *numbers, *floats, is_finite, rows.values(1))
    sent.write_header(rows, 1, plan)
    got = ClientUpdate.read(rows, 1, plan)
    assert {**asdict(got), "values": 0} == {**asdict(sent), "values": 0}
    assert got.values.tolist() == list(range(rows.num_values))
    assert got.values.data_ptr() == rows.values(1).data_ptr()


def test_losses_that_are_no_numbers_arrive() -> None:
    rows = written()
    replace(update(), train_loss=float("nan"), penalty=float("inf")).write_header(rows, 0, PLAN)
    got = ClientUpdate.read(rows, 0, PLAN)
    assert got.train_loss != got.train_loss
    assert got.penalty == float("inf")


@pytest.mark.parametrize(
    "other",
    [replace(PLAN, round_num=4), replace(PLAN, lora_ranks=(3, 3)), replace(PLAN, lora_ranks=(3, 4))],
    ids=["round", "ranks", "swapped ranks"],
)
def test_an_answer_to_another_plan_is_refused(other: RoundPlan) -> None:
    with pytest.raises(ProtocolError, match=f"must answer round {other.round_num} with 69 values, got"):
        ClientUpdate.read(written(), 1, other)


def test_another_number_of_values_is_refused() -> None:
    rows = written()
    rows.header(1)["num_values"] = 68
    with pytest.raises(ProtocolError, match=r"with 69 values, got round 3 with 68 values \(server, row 1\);"):
        ClientUpdate.read(rows, 1, PLAN)


def test_a_row_that_nobody_wrote_is_refused() -> None:
    with pytest.raises(ProtocolError):
        ClientUpdate.read(UpdateRows(1, 69), 0, PLAN)


def test_rows_are_kept_while_they_fit() -> None:
    rows = UpdateRows(2, 10)
    assert fitting_rows(rows, 2, 10) is rows
    for num_rows, num_values in ((3, 10), (2, 9)):
        other = fitting_rows(rows, num_rows, num_values)
        assert (len(other), other.num_values) == (num_rows, num_values)
    assert len(fitting_rows(None, 1, 1)) == 1


@LAWS
@given(st.lists(st.integers(0, 64), max_size=4), st.lists(st.integers(0, 64), max_size=4))
def test_different_ranks_have_different_digests(one: list[int], other: list[int]) -> None:
    assert (ranks_digest(one) == ranks_digest(other)) == (one == other)
    assert 0 <= ranks_digest(one) < 2**32
