from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mpifedlora.core.buffers import padded
from mpifedlora.core.codec import encode, num_bytes
from mpifedlora.core.layout import LinearShape, ModelShapes, TensorShape
from mpifedlora.core.plan import ABSENT, RoundPlan
from mpifedlora.core.wire import WireFormat, broadcast_values

SHAPES = ModelShapes(
    (LinearShape("q", 5, 4), LinearShape("v", 3, 6)),
    (TensorShape("head", (2, 3)),),
    (TensorShape("q.weight", (5, 4)), TensorShape("v.weight", (3, 6)), TensorShape("bias", (7,))),
)
PLAN = RoundPlan(3, "annealing", "adapter", (4, 3), (1, 0), (0, 1, ABSENT, 0), sends_state=True)
# A row is 18 r + 6 values, of rank 1 for client 0 and of rank 2 for client 3.
MIXED = replace(PLAN, lora_ranks=(3, 3), client_ranks=(1, 9, 9, 2))
DTYPES = ("float32", "bfloat16", "float16", "int8")
ROUNDED = DTYPES[1:]


def random_values(num_values: int, seed: int = 0) -> Tensor:
    return torch.randn(num_values, generator=torch.Generator().manual_seed(seed))


# Sizes.


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [("float32", (96, 168)), ("bfloat16", (48, 84)), ("float16", (48, 84)), ("int8", (48, 82))],
)
def test_hand_sized_rows(dtype: str, sizes: tuple[int, int]) -> None:
    # 18 or 36 values of factors and 6 of the head; scales: 2 a direction and module, 2 of the head's rows.
    wire = WireFormat(dtype, "float32")
    assert tuple(wire.row_bytes(MIXED, SHAPES, client_id) for client_id in (0, 3)) == sizes
    assert wire.row_bytes(MIXED, SHAPES) == {"float32": 240, "int8": 116}.get(dtype, 120)
    assert WireFormat("float32", dtype).row_bytes(MIXED, SHAPES, 0) == 96


def test_a_row_with_a_variate_is_twice_as_long() -> None:
    assert WireFormat().row_bytes(replace(MIXED, has_variates=True), SHAPES, 3) == 2 * 168


@pytest.mark.parametrize(
    ("dtype", "size"),
    # Frozen: one direction of q, 9 values and 2 scales. State: 4 * 9 + 3 * 9 + 6 values, 8 + 6 + 2 scales.
    [("float32", 4 * 78), ("bfloat16", 2 * 78), ("float16", 2 * 78), ("int8", 78 + 4 * 18)],
)
def test_hand_sized_messages(dtype: str, size: int) -> None:
    wire = WireFormat("float32", dtype)
    assert wire.message_bytes(PLAN, SHAPES) == size
    buffer = wire.message_buffer(PLAN, SHAPES)
    assert (buffer.numel(), buffer.dtype) == (padded(size), torch.uint8)
    assert (
        wire.message_bytes(PLAN.stopped(), SHAPES) == wire.message_buffer(PLAN.stopped(), SHAPES).numel() == 0
    )


def test_a_float32_message_is_its_bytes() -> None:
    wire = WireFormat("int8", "float32")
    buffer = wire.message_buffer(PLAN, SHAPES)
    wire.as_message(PLAN, SHAPES, buffer).copy_(torch.arange(78.0))
    got = wire.decode_message(PLAN, SHAPES, buffer)
    assert got.tolist() == list(range(78))
    assert got.data_ptr() == buffer.data_ptr()


# Changes of clients.


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("client_id", [0, 3])
def test_a_change_arrives_rounded_and_what_it_has_lost_is_left(dtype: str, client_id: int) -> None:
    wire, layout = WireFormat(dtype, seed=7), MIXED.shared_layout(SHAPES, client_id)
    exact, reference = random_values(layout.num_values), random_values(layout.num_values, 1)
    row, change = torch.empty(wire.row_bytes(MIXED, SHAPES, client_id), dtype=torch.uint8), exact.clone()
    wire.encode_update(layout, change, row, 3, client_id)
    got = wire.decode_update(layout, row, reference)
    assert torch.allclose(got - reference + change, exact, atol=1e-6)
    # Half of the last place of 8 and 11 bits; a step of int8 is the largest of a direction by 127.
    largest = float(exact.abs().max())
    step = {"bfloat16": 2**-8, "float16": 2**-11, "int8": 1 / 127}[dtype]
    assert 0 < float(change.abs().max()) <= step * largest
    assert not torch.equal(got, reference + exact)


def test_random_numbers_are_for_int8_and_its_rounding_only() -> None:
    for dtype in DTYPES[:3]:
        assert WireFormat().rounding(dtype, 5, 1) is None
    drawn = WireFormat(seed=1).rounding("int8", 5, 1)
    assert drawn is not None
    assert (drawn.shape, drawn.dtype) == ((5,), torch.float32)
    assert bool(((drawn >= 0) & (drawn < 1)).all())


def test_random_numbers_differ_by_seed_round_client_and_direction() -> None:
    def drawn(seed: int, *key: int) -> tuple[float, ...]:
        values = WireFormat(seed=seed).rounding("int8", 4, *key)
        assert values is not None
        return tuple(values.tolist())

    keys = [(0, 1), (1, 1), (0, 2), (0, 1, 1), (0, 1, 2)]
    assert len({drawn(*key) for key in keys}) == len(keys)
    assert drawn(0, 1) == drawn(0, 1, 0)


def test_a_clients_rounding_is_its_own() -> None:
    layout, wire = SHAPES.base(), WireFormat("int8", "int8")
    downlink = torch.empty(num_bytes("int8", layout), dtype=torch.uint8)
    uniform = wire.rounding("int8", layout.num_values, 3)
    encode("int8", layout, random_values(layout.num_values), downlink, uniform)
    seen = {bytes(downlink.numpy())}
    for client_id in range(3):
        row = torch.empty_like(downlink)
        wire.encode_update(layout, random_values(layout.num_values), row, 3, client_id)
        seen.add(bytes(row.numpy()))
    assert len(seen) == 4


# What a client was sent.


def test_the_broadcast_is_the_state_where_all_of_it_is_shared() -> None:
    state = torch.arange(69.0)
    assert broadcast_values(PLAN, SHAPES, state) is state
    assert broadcast_values(replace(PLAN, scope="full"), SHAPES, state) is state


def test_the_broadcast_is_what_a_client_shares_of_the_state() -> None:
    # q: A 4 x 4, B 5 x 4; v: A 3 x 6, B 3 x 3; head 6.
    state = torch.arange(69.0)
    a, head = [*range(16), *range(36, 54)], list(range(63, 69))
    b = [*range(16, 36), *range(54, 63)]
    assert broadcast_values(replace(PLAN, scope="a"), SHAPES, state).tolist() == a + head
    assert broadcast_values(replace(PLAN, scope="b"), SHAPES, state).tolist() == b + head
    kept = replace(PLAN, keeps_b=True, keeps_head=True)
    assert broadcast_values(kept, SHAPES, state).tolist() == a


def test_the_broadcast_to_a_client_of_lower_rank_is_its_leading_directions() -> None:
    state, plan = torch.arange(69.0), replace(PLAN, client_ranks=(1, 9, 9, 9))
    leading = [*range(4), 16, 20, 24, 28, 32, *range(36, 42), 54, 57, 60, *range(63, 69)]
    assert broadcast_values(plan, SHAPES, state, 0).tolist() == leading
    assert broadcast_values(plan, SHAPES, state, 1) is state
