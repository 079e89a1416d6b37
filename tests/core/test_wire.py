from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpifedlora.core.buffers import padded
from mpifedlora.core.plan import ABSENT, RoundPlan
from mpifedlora.core.wire import (
    FAILED,
    LATE,
    POSTPONED,
    ClientUpdate,
    SummedRows,
    UpdateHeader,
    UpdateRows,
    fitting_rows,
    ranks_digest,
    read_headers,
)
from mpifedlora.errors import ProtocolError

LAWS = settings(max_examples=25, deadline=None)
PLAN = RoundPlan(3, "annealing", "adapter", (4, 3), (1, 0), (0, 1, ABSENT, 0), sends_state=True)
FLOATS = st.floats(allow_nan=False)
COUNTS = st.integers(0, 2**31 - 1)
ROW_SIZES = st.lists(st.integers(0, 200), max_size=6)


def header(client_id: int = 1, *, is_finite: bool = True) -> UpdateHeader:
    return UpdateHeader(client_id, 2**40, 5, 0.7, 0.01, 1.5, is_finite)


def written(plan: RoundPlan = PLAN, sizes: Sequence[int] = (276, 276)) -> UpdateRows:
    rows = UpdateRows(sizes)
    for index in range(len(sizes)):
        header(index).write(rows, index, plan)
    return rows


# Rows.


@LAWS
@given(st.integers(0, 2**40))
def test_padded_is_the_next_whole_unit(size: int) -> None:
    assert padded(size) % 64 == 0
    assert 0 <= padded(size) - size < 64


@LAWS
@given(ROW_SIZES)
def test_rows_start_on_units_and_headers_lie_apart(sizes: list[int]) -> None:
    rows = UpdateRows(sizes)
    assert (len(rows), rows.sizes) == (len(sizes), tuple(sizes))
    assert rows.headers.shape == (len(sizes), 128)
    assert rows.buffer.data_ptr() % 64 == 0
    places = [0]
    for index, size in enumerate(sizes):
        wire = rows.wire(index)
        assert (wire.shape, wire.dtype) == ((size,), torch.uint8)
        assert wire.storage_offset() == places[-1]
        places.append(places[-1] + padded(size))
    assert rows.buffer.numel() == places[-1]


@LAWS
@given(ROW_SIZES)
def test_rows_do_not_touch_each_other_and_headers_do_not_either(sizes: list[int]) -> None:
    rows = UpdateRows(sizes)
    for index in range(len(sizes)):
        rows.wire(index).fill_(index + 1)
        rows.header(index)["num_examples"] = 2**63 - 1 - index
        rows.close(index, 3)
    for index, size in enumerate(sizes):
        assert rows.wire(index).tolist() == [index + 1] * size
        assert int(rows.header(index)["num_examples"]) == 2**63 - 1 - index
    assert int(rows.buffer.count_nonzero()) == sum(sizes)  # what is behind a row stays 0
    assert rows.total.numel() == 0


def test_no_rows_are_no_bytes() -> None:
    rows = UpdateRows([])
    assert (len(rows), rows.buffer.numel(), rows.headers.size) == (0, 0, 0)


def test_rows_are_kept_while_they_fit() -> None:
    rows = UpdateRows([40, 12])
    assert fitting_rows(rows, [40, 12]) is rows
    assert fitting_rows(rows, (40, 12)) is rows
    for sizes in ([40], [40, 12, 12], [12, 40], [40, 16], []):
        other = fitting_rows(rows, sizes)
        assert other is not rows
        assert other.sizes == tuple(sizes)
    assert fitting_rows(None, [4]).sizes == (4,)


# Sums of rows.

WHOLE_NUMBERS = st.lists(
    st.tuples(st.lists(st.integers(-1000, 1000), min_size=5, max_size=5), st.integers(1, 99), st.booleans()),
    max_size=5,
)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@LAWS
@given(clients=WHOLE_NUMBERS)
def test_rows_are_added_up_by_what_they_count(dtype: str, clients: list[tuple[list[int], int, bool]]) -> None:
    rows = SummedRows([20] * len(clients), 5, dtype)
    assert rows.buffer.numel() == 64 * bool(clients)  # one row, whatever their number
    wanted = torch.zeros(5, dtype=torch.int64)
    for index, (values, counts, is_finite) in enumerate(clients):
        rows.wire(index).view(torch.float32).copy_(torch.tensor(values))
        header(index, is_finite=is_finite).write(rows, index, PLAN)
        rows.close(index, counts)
        wanted += counts * is_finite * torch.tensor(values)
    assert rows.total.tolist() == wanted.tolist()
    assert str(rows.total.dtype) == f"torch.{dtype}"
    clients_back = [one.client_id for one in read_headers(rows.headers, PLAN, range(len(rows)), rows.sizes)]
    assert clients_back == list(range(len(clients)))


def test_what_is_not_finite_does_not_touch_the_sum() -> None:
    rows = SummedRows([8, 8], 2, "float32")
    for index, values in enumerate([[float("nan"), 1.0], [2.0, 3.0]]):
        rows.wire(index).view(torch.float32).copy_(torch.tensor(values))
        header(index, is_finite=index == 1).write(rows, index, PLAN)
        rows.close(index, 4)
    assert rows.total.tolist() == [8, 12]


def test_float64_sums_keep_what_float32_loses() -> None:
    sums = []
    for dtype in ("float32", "float64"):
        rows = SummedRows([4, 4], 1, dtype)
        for index, value in enumerate([2.0**24, 1.0]):
            rows.wire(index).view(torch.float32).fill_(value)
            header(index).write(rows, index, PLAN)
            rows.close(index, 1)
        sums.append(float(rows.total))
    assert sums == [2.0**24, 2.0**24 + 1]


# Headers.


@LAWS
@given(
    client_id=COUNTS,
    numbers=st.tuples(*[st.integers(0, 2**63 - 1)] * 3),
    floats=st.tuples(FLOATS, FLOATS, FLOATS),
    is_finite=st.booleans(),
    fault=st.sampled_from(["", FAILED, LATE, POSTPONED]),
    sizes=st.tuples(*[st.integers(0, 99)] * 3),
    round_num=COUNTS,
)
def test_a_header_survives_a_round_trip(
    client_id: int,
    numbers: tuple[int, int, int],
    floats: tuple[float, float, float],
    is_finite: bool,
    fault: str,
    sizes: tuple[int, int, int],
    round_num: int,
) -> None:
    plan, rows = replace(PLAN, round_num=round_num), UpdateRows(sizes)
    sent = UpdateHeader(client_id, *numbers[:2], *floats, is_finite, fault=fault, staleness=numbers[2])
    sent.write(rows, 1, plan)
    (got,) = read_headers(rows.headers[1:2], plan, [client_id], sizes[1:2])
    assert got == sent
    assert {name: type(value) for name, value in asdict(got).items()} == {
        **dict.fromkeys(("client_id", "num_examples", "num_steps", "staleness"), int),
        **dict.fromkeys(("train_loss", "penalty", "train_s"), float),
        "is_finite": bool,
        "fault": str,
    }
    assert not rows.headers[0].any()
    assert not rows.headers[2].any()


def test_an_update_writes_its_header() -> None:
    update, rows = ClientUpdate(**asdict(header(2)), values=torch.ones(69)), UpdateRows([276])
    update.write(rows, 0, PLAN)
    assert read_headers(rows.headers, PLAN, [2], [276]) == [header(2)]


def test_losses_that_are_no_numbers_arrive() -> None:
    rows = UpdateRows([276])
    replace(header(0, is_finite=False), train_loss=float("nan"), penalty=float("inf")).write(rows, 0, PLAN)
    (got,) = read_headers(rows.headers, PLAN, [0], [276])
    assert got.train_loss != got.train_loss
    assert (got.penalty, got.is_finite) == (float("inf"), False)


def refusal(wanted: str, got: str) -> str:
    return (
        f"^an update must answer {re.escape(wanted)}, got {re.escape(got)} "
        r"\(server\); this is a defect: report it$"
    )


def test_an_answer_to_another_round_is_refused() -> None:
    message = refusal("round 4 for client 1 with 276 bytes", "round 3, client 1, 276 bytes")
    with pytest.raises(ProtocolError, match=message):
        read_headers(written().headers[1:], replace(PLAN, round_num=4), [1], [276])


def test_an_answer_of_another_client_is_refused() -> None:
    message = refusal("round 3 for client 2 with 276 bytes", "round 3, client 1, 276 bytes")
    with pytest.raises(ProtocolError, match=message):
        read_headers(written().headers, PLAN, [0, 2], [276, 276])


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [((4, 3), (4, 2)), ((4, 2), (3, 3)), ((4, 3), (3, 4))],
    ids=["fewer", "as many values", "swapped"],
)
def test_an_answer_of_other_ranks_is_refused(sent: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    message = refusal("round 3 for client 0 with 276 bytes", "round 3, client 0, 276 bytes of other ranks")
    rows = written(replace(PLAN, lora_ranks=sent))
    with pytest.raises(ProtocolError, match=message):
        read_headers(rows.headers, replace(PLAN, lora_ranks=wanted), [0, 1], [276, 276])


def test_another_number_of_bytes_is_refused() -> None:
    # A worker that writes another dtype than the server reads.
    rows, message = written(), refusal("round 3 for client 1 with 138 bytes", "round 3, client 1, 276 bytes")
    with pytest.raises(ProtocolError, match=message):
        read_headers(rows.headers, PLAN, [0, 1], [276, 138])


def test_a_header_that_nobody_wrote_is_refused() -> None:
    # All fields are 0, and so they would be of an answer to this plan, but for the magic number.
    plan = replace(PLAN, round_num=0, lora_ranks=())
    assert ranks_digest(plan.lora_ranks) == 0
    with pytest.raises(ProtocolError, match="must answer round 0 for client 0 with 0 bytes"):
        read_headers(UpdateRows([0]).headers, plan, [0], [0])


def test_headers_are_read_in_the_order_in_which_they_came() -> None:
    rows = UpdateRows([12, 4, 8])
    for index, client_id in enumerate((3, 0, 1)):
        header(client_id).write(rows, index, PLAN)
    assert [one.client_id for one in read_headers(rows.headers, PLAN, (3, 0, 1), (12, 4, 8))] == [3, 0, 1]
    with pytest.raises(ProtocolError, match=r"for client 0 with 12 bytes, got round 3, client 3"):
        read_headers(rows.headers, PLAN, (0, 3, 1), (12, 4, 8))
    with pytest.raises(ValueError, match="shorter"):
        read_headers(rows.headers, PLAN, (3, 0), (12, 4))


# Digests.


@LAWS
@given(st.lists(st.integers(0, 64), max_size=4), st.lists(st.integers(0, 64), max_size=4))
def test_different_ranks_have_different_digests(one: list[int], other: list[int]) -> None:
    assert (ranks_digest(one) == ranks_digest(other)) == (one == other)
    assert 0 <= ranks_digest(one) < 2**32


def test_a_digest_is_that_of_little_endian_numbers() -> None:
    assert ranks_digest((4, 3)) == zlib.crc32(b"\x04\x00\x00\x00\x03\x00\x00\x00")
    assert ranks_digest([4, 3]) == ranks_digest((4, 3))
