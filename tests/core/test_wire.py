from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpifedlora.core.layout import LinearShape, ModelShapes, TensorShape
from mpifedlora.core.plan import ABSENT, HEADER_BYTES, RoundPlan
from mpifedlora.core.wire import (
    ClientUpdate,
    UpdateRows,
    fitting_rows,
    ranks_digest,
    read_rows,
    row_sizes,
    row_stride,
)
from mpifedlora.errors import ProtocolError

LAWS = settings(max_examples=25, deadline=None)
SHAPES = ModelShapes(
    (LinearShape("q", 5, 4), LinearShape("v", 3, 6)),
    (TensorShape("head", (2, 3)),),
    (TensorShape("q.weight", (5, 4)), TensorShape("v.weight", (3, 6)), TensorShape("bias", (7,))),
)
PLAN = RoundPlan(3, "annealing", "adapter", (4, 3), (1, 0), (0, 1, ABSENT, 0), sends_state=True)
# Clients 3, 0 and 4 on workers 0, 2 and 2; nobody on worker 1. A row is 18 r + 6 values, twice.
MIXED = replace(
    PLAN,
    lora_ranks=(3, 3),
    workers=(2, ABSENT, ABSENT, 0, 2),
    client_ranks=(1, 9, 9, 2, 9),
    has_variates=True,
)
FLOATS = st.floats(allow_nan=False)
COUNTS = st.integers(0, 2**31 - 1)
ROW_SIZES = st.lists(st.integers(0, 40), max_size=6)


def update(client_id: int = 1, num_values: int = 69) -> ClientUpdate:
    return ClientUpdate(client_id, 2**40, 5, 0.7, 0.01, 1.5, True, torch.zeros(num_values))


def written(plan: RoundPlan = PLAN) -> UpdateRows:
    rows = UpdateRows([69, 69])
    for index in range(2):
        update(index).write_header(rows, index, plan)
    return rows


def starts(sizes: Sequence[int]) -> list[int]:
    """Where each row starts, and the end: header and values, up to the next multiple of 64."""
    places = [0]
    for num_values in sizes:
        end = places[-1] + 128 + 4 * num_values
        places.append(end + -end % 64)
    return places


# Rows.


@LAWS
@given(ROW_SIZES)
def test_rows_and_their_values_start_on_cache_lines(sizes: list[int]) -> None:
    rows, places = UpdateRows(sizes), starts(sizes)
    assert (len(rows), rows.sizes, rows.buffer.numel()) == (len(sizes), tuple(sizes), places[-1])
    assert rows.buffer.data_ptr() % 64 == 0
    for index, num_values in enumerate(sizes):
        assert rows.values(index).shape == (num_values,)
        assert rows.values(index).dtype == torch.float32
        if num_values:
            first = rows.values(index).data_ptr() - rows.buffer.data_ptr()
            assert first == places[index] + HEADER_BYTES
            assert first % 64 == 0


@LAWS
@given(ROW_SIZES)
def test_rows_do_not_touch_each_other_nor_their_headers(sizes: list[int]) -> None:
    rows, places = UpdateRows(sizes), starts(sizes)
    for index in range(len(sizes)):
        rows.values(index).fill_(index + 1)
    headers = [rows.buffer[first : first + HEADER_BYTES] for first in places[:-1]]
    assert not any(int(header.count_nonzero()) for header in headers)
    for index in range(len(sizes)):
        rows.header(index)["num_examples"] = 2**63 - 1 - index
    for index, num_values in enumerate(sizes):
        assert rows.values(index).tolist() == [index + 1] * num_values
        assert int(rows.header(index)["num_examples"]) == 2**63 - 1 - index


@LAWS
@given(ROW_SIZES.filter(bool), st.data())
def test_a_header_is_written_through_into_its_row_only(sizes: list[int], data: st.DataObject) -> None:
    rows, index = UpdateRows(sizes), data.draw(st.sampled_from(range(len(sizes))))
    rows.header(index)["num_examples"] = -1
    touched = rows.buffer.nonzero().flatten()
    assert len(touched) == 8
    assert starts(sizes)[index] <= int(touched[0])
    assert int(touched[-1]) < starts(sizes)[index] + HEADER_BYTES


@pytest.mark.parametrize(("num_values", "stride"), [(0, 128), (1, 192), (16, 192), (17, 256), (69, 448)])
def test_a_row_takes_whole_cache_lines(num_values: int, stride: int) -> None:
    assert row_stride(num_values) == stride
    rows = UpdateRows([num_values] * 3)
    assert rows.buffer.numel() == 3 * stride


def test_no_rows_are_no_bytes() -> None:
    rows = UpdateRows([])
    assert (len(rows), rows.buffer.numel()) == (0, 0)


def test_rows_are_kept_while_they_fit() -> None:
    rows = UpdateRows([10, 3])
    assert fitting_rows(rows, [10, 3]) is rows
    assert fitting_rows(rows, (10, 3)) is rows
    for sizes in ([10], [10, 3, 3], [3, 10], [10, 4], []):
        other = fitting_rows(rows, sizes)
        assert other is not rows
        assert other.sizes == tuple(sizes)
    assert fitting_rows(None, [1]).sizes == (1,)


# Updates.


@LAWS
@given(
    client_id=COUNTS,
    numbers=st.tuples(*[st.integers(0, 2**63 - 1)] * 2),
    floats=st.tuples(FLOATS, FLOATS, FLOATS),
    is_finite=st.booleans(),
    sizes=st.tuples(*[st.integers(0, 30)] * 3),
    round_num=COUNTS,
)
def test_an_update_survives_a_round_trip(
    client_id: int,
    numbers: tuple[int, int],
    floats: tuple[float, float, float],
    is_finite: bool,
    sizes: tuple[int, int, int],
    round_num: int,
) -> None:
    plan = replace(PLAN, round_num=round_num)
    rows = UpdateRows(sizes)
    rows.values(1).copy_(torch.arange(sizes[1]))
    sent = ClientUpdate(client_id, *numbers, *floats, is_finite, rows.values(1))
    sent.write_header(rows, 1, plan)
    got = ClientUpdate.read(rows, 1, plan, client_id)
    assert {**asdict(got), "values": 0} == {**asdict(sent), "values": 0}
    assert got.values.tolist() == list(range(sizes[1]))
    assert got.values.data_ptr() == rows.values(1).data_ptr()


def test_losses_that_are_no_numbers_arrive() -> None:
    rows = written()
    spoiled = replace(update(0), train_loss=float("nan"), penalty=float("inf"), is_finite=False)
    spoiled.write_header(rows, 0, PLAN)
    got = ClientUpdate.read(rows, 0, PLAN, 0)
    assert got.train_loss != got.train_loss
    assert (got.penalty, got.is_finite) == (float("inf"), False)


def refusal(wanted: str, got: str) -> str:
    return (
        f"^an update must answer {re.escape(wanted)}, got {re.escape(got)} "
        r"\(server, row 1\); this is a defect: report it$"
    )


def test_an_answer_to_another_round_is_refused() -> None:
    message = refusal("round 4 for client 1 with 69 values", "round 3, client 1, 69 values")
    with pytest.raises(ProtocolError, match=message):
        ClientUpdate.read(written(), 1, replace(PLAN, round_num=4), 1)


def test_an_answer_of_another_client_is_refused() -> None:
    message = refusal("round 3 for client 0 with 69 values", "round 3, client 1, 69 values")
    with pytest.raises(ProtocolError, match=message):
        ClientUpdate.read(written(), 1, PLAN, 0)


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [((4, 3), (4, 2)), ((4, 2), (3, 3)), ((4, 3), (3, 4))],
    ids=["fewer", "as many values", "swapped"],
)
def test_an_answer_of_other_ranks_is_refused(sent: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    message = refusal("round 3 for client 1 with 69 values", "round 3, client 1, 69 values of other ranks")
    rows = written(replace(PLAN, lora_ranks=sent))
    with pytest.raises(ProtocolError, match=message):
        ClientUpdate.read(rows, 1, replace(PLAN, lora_ranks=wanted), 1)


def test_another_number_of_values_is_refused() -> None:
    rows = written()
    rows.header(1)["num_values"] = 68
    message = refusal("round 3 for client 1 with 69 values", "round 3, client 1, 68 values")
    with pytest.raises(ProtocolError, match=message):
        ClientUpdate.read(rows, 1, PLAN, 1)


def test_a_row_of_another_size_is_refused() -> None:
    rows, larger = written(), UpdateRows([69, 70])
    larger.buffer[: rows.buffer.numel()].copy_(rows.buffer)  # 69 and 70 values take as many bytes
    message = refusal("round 3 for client 1 with 70 values", "round 3, client 1, 69 values")
    with pytest.raises(ProtocolError, match=message):
        ClientUpdate.read(larger, 1, PLAN, 1)


def test_a_row_that_nobody_wrote_is_refused() -> None:
    # All fields are 0, and so they would be of an answer to this plan, but for the magic number.
    plan = replace(PLAN, round_num=0, lora_ranks=())
    assert ranks_digest(plan.lora_ranks) == 0
    with pytest.raises(ProtocolError, match="must answer round 0 for client 0 with 0 values"):
        ClientUpdate.read(UpdateRows([0]), 0, plan, 0)


# All rows of a round.


def test_hand_sized_rows_of_each_worker() -> None:
    assert row_sizes(MIXED, SHAPES, 4) == [[2 * 42], [], [2 * 24, 2 * 60], []]
    assert row_sizes(replace(MIXED, has_variates=False), SHAPES, 3) == [[42], [], [24, 60]]
    assert row_sizes(replace(PLAN, workers=(ABSENT,) * 4), SHAPES, 2) == [[], []]


@LAWS
@given(st.lists(st.integers(ABSENT, 3), max_size=8))
def test_every_client_of_the_cohort_has_one_row(workers: list[int]) -> None:
    ranks = tuple(1 + client_id % 4 for client_id in range(len(workers)))
    plan = replace(PLAN, workers=tuple(workers), client_ranks=ranks)
    by_worker = row_sizes(plan, SHAPES, 4)
    assert [len(sizes) for sizes in by_worker] == [workers.count(worker_id) for worker_id in range(4)]
    wanted = [plan.row_values(SHAPES, client_id) for client_id in plan.cohort]
    assert sorted(size for sizes in by_worker for size in sizes) == sorted(wanted)


def sent_rows(plan: RoundPlan, workers: Sequence[int], first: int = 0) -> UpdateRows:
    """Write what workers send, in their order, behind rows of something else."""
    by_worker = row_sizes(plan, SHAPES, 3)
    rows = UpdateRows([5] * first + [size for worker_id in workers for size in by_worker[worker_id]])
    clients = [client_id for worker_id in workers for client_id in plan.clients_of(worker_id)]
    for index, client_id in enumerate(clients, start=first):
        rows.values(index).fill_(client_id)
        update(client_id).write_header(rows, index, plan)
    return rows


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize(
    ("workers", "clients"), [((0, 1, 2), [3, 0, 4]), ((2, 0), [0, 4, 3]), ((1,), []), ((2,), [0, 4])]
)
def test_rows_are_read_worker_by_worker(workers: Sequence[int], clients: list[int], first: int) -> None:
    updates = read_rows(sent_rows(MIXED, workers, first), MIXED, workers, first)
    assert [one.client_id for one in updates] == clients
    for one in updates:
        assert one.values.tolist() == [one.client_id] * MIXED.row_values(SHAPES, one.client_id)


def test_rows_in_another_order_are_refused() -> None:
    plan = replace(MIXED, client_ranks=())  # equal sizes, so that only the header tells them apart
    with pytest.raises(ProtocolError, match=r"for client 3 with 120 values, got round 3, client 0"):
        read_rows(sent_rows(plan, (2, 0)), plan, (0, 2))
    with pytest.raises(ProtocolError, match=r"for client 3 with 120 values, got .* \(server, row 1\)"):
        read_rows(sent_rows(plan, (2, 0)), plan, (0,), first=1)


# Digests.


@LAWS
@given(st.lists(st.integers(0, 64), max_size=4), st.lists(st.integers(0, 64), max_size=4))
def test_different_ranks_have_different_digests(one: list[int], other: list[int]) -> None:
    assert (ranks_digest(one) == ranks_digest(other)) == (one == other)
    assert 0 <= ranks_digest(one) < 2**32


def test_a_digest_is_that_of_little_endian_numbers() -> None:
    assert ranks_digest((4, 3)) == zlib.crc32(b"\x04\x00\x00\x00\x03\x00\x00\x00")
    assert ranks_digest([4, 3]) == ranks_digest((4, 3))
