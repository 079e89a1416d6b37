from __future__ import annotations

import math
import re
import struct
import warnings
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpifedlora.core.codec import (
    decode,
    draw_uniform,
    encode,
    largest,
    num_bytes,
    piece_bytes,
)
from mpifedlora.core.layout import AdapterLayout, LinearShape, Parts, TensorShape
from mpifedlora.core.seeding import numpy_generator
from mpifedlora.errors import ProtocolError

LAWS = settings(max_examples=50, deadline=None)
DTYPES = ("float32", "bfloat16", "float16", "int8")
HALVES = ("bfloat16", "float16")
all_dtypes = pytest.mark.parametrize("dtype", DTYPES)
both_halves = pytest.mark.parametrize("dtype", HALVES)
EPSILON = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SMALLEST_NORMAL = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-14}
Q = LinearShape("q", 3, 4)


def whole(*shapes: tuple[int, ...]) -> AdapterLayout:
    return AdapterLayout((), (), tuple(TensorShape(f"w{i}", shape) for i, shape in enumerate(shapes)))


@st.composite
def layouts(draw: st.DrawFn) -> AdapterLayout:
    sizes = st.integers(1, 40)
    modules = tuple(
        LinearShape(f"m{i}", *shape)
        for i, shape in enumerate(draw(st.lists(st.tuples(sizes, sizes), max_size=4)))
    )
    ranks = tuple(draw(st.integers(0, min(module[1:]))) for module in modules)
    shapes = draw(st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=3))
    return AdapterLayout(modules, ranks, whole(*shapes).whole, draw(st.sampled_from(get_args(Parts))))


def uniform_for(layout: AdapterLayout, seed: int = 0) -> Tensor:
    return draw_uniform(layout.num_values, numpy_generator(seed, "test"))


def random_values(layout: AdapterLayout, seed: int = 0) -> Tensor:
    """Values of many magnitudes, an eighth of them 0."""
    generator = torch.Generator().manual_seed(seed)
    size = layout.num_values
    exponents = torch.randint(-9, 4, (size,), generator=generator)
    kept = torch.randint(0, 8, (size,), generator=generator) > 0
    return torch.randn(size, generator=generator) * 10.0**exponents * kept


def encoded(dtype: str, layout: AdapterLayout, values: Tensor, uniform: Tensor | None = None) -> Tensor:
    wire = torch.full((num_bytes(dtype, layout),), 170, dtype=torch.uint8)
    if dtype == "int8" and uniform is None:
        uniform = uniform_for(layout)
    encode(dtype, layout, values, wire, uniform)
    return wire


def decoded(dtype: str, layout: AdapterLayout, wire: Tensor) -> Tensor:
    out = torch.full((layout.num_values,), -7.0)
    assert decode(dtype, layout, wire, out) is out
    return out


def round_trip(dtype: str, layout: AdapterLayout, values: Tensor, uniform: Tensor | None = None) -> Tensor:
    return decoded(dtype, layout, encoded(dtype, layout, values, uniform))


def directions(layout: AdapterLayout, flat: Tensor) -> list[Tensor]:
    """Views of the values that share a scale, one by one."""
    found: list[Tensor] = []
    for a, b in layout.factors(flat):
        found += [*a, *b.T]
    for tensor in layout.whole_tensors(flat):
        found += list(tensor) if tensor.dim() > 1 else [tensor]
    return [direction.reshape(-1) for direction in found if direction.numel()]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.numpy().tobytes() == other.numpy().tobytes()


# Sizes.


def test_hand_sized_pieces() -> None:
    # Rank 2 of (3, 4) has 8 + 6 values and 2 + 2 scales. Then a matrix of 5 rows, a vector, a scalar, a
    # convolution of 2 rows, and tensors of no values.
    shapes = ((5, 6), (7,), (), (2, 3, 2), (0,), (4, 0), (0, 4))
    layout = AdapterLayout((Q,), (2,), whole(*shapes).whole)
    assert layout.piece_values == (14, 30, 7, 1, 12, 0, 0, 0)
    assert piece_bytes("float32", layout) == (56, 120, 28, 4, 48, 0, 0, 0)
    assert piece_bytes("bfloat16", layout) == piece_bytes("float16", layout) == (28, 60, 14, 2, 24, 0, 0, 0)
    assert piece_bytes("int8", layout) == (14 + 16, 30 + 20, 7 + 4, 1 + 4, 12 + 8, 0, 0, 0)
    assert [num_bytes(dtype, layout) for dtype in DTYPES] == [256, 128, 128, 116]


@pytest.mark.parametrize(("parts", "size"), [("", 0), ("a", 8 + 8), ("b", 6 + 8), ("ab", 14 + 16)])
def test_only_the_factors_that_are_sent_have_scales(parts: Parts, size: int) -> None:
    assert piece_bytes("int8", AdapterLayout((Q,), (2,), parts=parts)) == (size,)


@all_dtypes
def test_rank_zero_costs_nothing(dtype: str) -> None:
    layout = AdapterLayout((Q, Q), (0, 1))
    assert piece_bytes(dtype, layout)[0] == 0
    assert num_bytes(dtype, layout) == piece_bytes(dtype, layout)[1]


@all_dtypes
def test_a_layout_of_nothing_has_no_bytes(dtype: str) -> None:
    for layout in (AdapterLayout((), ()), AdapterLayout((Q,), (0,)), whole((0, 3))):
        assert num_bytes(dtype, layout) == 0
        assert round_trip(dtype, layout, torch.zeros(0)).numel() == 0


# Wire forms by hand.


def test_hand_sized_int8_wire_form() -> None:
    # A has the rows 127, -63.5, 1, 0 and 0, 0, 0, 0; B has the columns 254, -2, 3 and 1, -127, 126.5.
    layout = AdapterLayout((Q,), (2,), whole((2, 2)).whole)
    values = torch.tensor([127, -63.5, 1, 0, 0, 0, 0, 0, 254, 1, -2, -127, 3, 126.5, 0.5, 127, -381, 3])
    wire = encoded("int8", layout, values, torch.full((18,), 0.5))
    scales = struct.pack("<4f", 1, 0, 2, 1)
    numbers = struct.pack("14b", 127, -63, 1, 0, 0, 0, 0, 0, 127, 1, -1, -127, 2, 127)
    head = struct.pack("<2f", 1, 3) + struct.pack("4b", 1, 127, -127, 1)
    assert bytes(wire.tolist()) == scales + numbers + head
    result = [127, -63, 1, 0, 0, 0, 0, 0, 254, 1, -2, -127, 4, 127, 1, 127, -381, 3]
    assert decoded("int8", layout, wire).tolist() == result


@pytest.mark.parametrize(
    ("uniform", "wanted"), [(0.0, [1, -2]), (0.49, [1, -2]), (0.51, [2, -1]), (0.75, [2, -1])]
)
def test_the_random_number_decides_the_rounding(uniform: float, wanted: list[float]) -> None:
    layout = whole((3,))
    values = torch.tensor([127, 1.5, -1.5])
    assert round_trip("int8", layout, values, torch.full((3,), uniform)).tolist() == [127, *wanted]


def test_a_vector_has_one_scale_and_a_matrix_one_a_row() -> None:
    values = torch.tensor([127.0, 1, 254, 2])
    assert encoded("int8", whole((4,)), values)[:4].view(torch.float32).tolist() == [2]
    assert encoded("int8", whole((2, 2)), values)[:8].view(torch.float32).tolist() == [1, 2]
    assert encoded("int8", whole((2, 2, 1)), values)[:8].view(torch.float32).tolist() == [1, 2]
    assert encoded("int8", whole(()), values[:1])[:4].view(torch.float32).tolist() == [1]


def test_hand_sized_halves() -> None:
    # bfloat16 keeps 8 bits, float16 11: halfway cases go to the even neighbour.
    values = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, -0.0])
    assert round_trip("bfloat16", whole((5,)), values).tolist() == [1, 1 + 2.0**-6, 1, 1, 0]
    assert round_trip("float16", whole((5,)), values).tolist() == [*values[:2].tolist(), 1, 1 + 2.0**-9, 0]
    assert encoded("bfloat16", whole((2,)), torch.tensor([1.0, -2])).tolist() == [0x80, 0x3F, 0x00, 0xC0]
    assert encoded("float16", whole((2,)), torch.tensor([1.0, -2])).tolist() == [0x00, 0x3C, 0x00, 0xC0]


def test_float32_is_the_values_themselves() -> None:
    values = torch.tensor([1.5, -0.0, math.inf, 1e-45])
    wire = encoded("float32", whole((4,)), values)
    assert bytes(wire.tolist()) == struct.pack("<4f", *values.tolist())
    assert same_bits(wire.view(torch.float32), values)


# Laws.


@all_dtypes
@LAWS
@given(layout=layouts(), seed=st.integers(0, 2**31))
def test_the_error_is_bounded(dtype: str, layout: AdapterLayout, seed: int) -> None:
    values = random_values(layout, seed)
    result = round_trip(dtype, layout, values, uniform_for(layout, seed))
    if dtype == "int8":
        for direction, got in zip(directions(layout, values), directions(layout, result), strict=True):
            scale = float(direction.abs().max()) / 127
            assert float((got.double() - direction.double()).abs().max()) <= scale * (1 + 1e-4)
    else:
        bound = EPSILON[dtype] * values.abs().clamp(min=SMALLEST_NORMAL[dtype])
        assert bool(((result - values).abs() <= bound).all())


@all_dtypes
@LAWS
@given(layout=layouts(), data=st.data())
def test_a_range_of_pieces_is_a_range_of_bytes(
    dtype: str, layout: AdapterLayout, data: st.DataObject
) -> None:
    num_pieces = len(layout.piece_values)
    first = data.draw(st.integers(0, num_pieces))
    last = data.draw(st.integers(first, num_pieces))
    sizes, counts = piece_bytes(dtype, layout), layout.piece_values
    values, uniform, chosen = random_values(layout), uniform_for(layout), layout.select(first, last)
    place = slice(sum(counts[:first]), sum(counts[:last]))
    part = encoded(dtype, layout, values, uniform)[sum(sizes[:first]) : sum(sizes[:last])]
    assert piece_bytes(dtype, chosen) == sizes[first:last]
    assert num_bytes(dtype, layout) == sum(sizes)
    assert same_bits(part, encoded(dtype, chosen, values[place], uniform[place]))
    # The bytes of the range lie where the other pieces put them, at any offset.
    result = round_trip(dtype, layout, values, uniform)
    assert same_bits(decoded(dtype, chosen, part), result[place])


@LAWS
@given(layout=layouts())
def test_int8_has_one_scale_a_direction(layout: AdapterLayout) -> None:
    values = random_values(layout)
    scales = [float(direction.abs().max() / 127) for direction in directions(layout, values)]
    assert num_bytes("int8", layout) == layout.num_values + 4 * len(scales)
    # Every direction's largest value arrives, whatever the others are.
    nearest = torch.full_like(values, 0.5)
    result = directions(layout, round_trip("int8", layout, values, nearest))
    for direction, got, scale in zip(directions(layout, values), result, scales, strict=True):
        place = int(direction.abs().argmax())
        assert math.isclose(float(got[place]), float(direction[place]), rel_tol=1e-6)
        assert bool((got.double() / (scale or 1) - (got.double() / (scale or 1)).round()).abs().max() < 1e-4)


@both_halves
@LAWS
@given(layout=layouts())
def test_rounding_twice_is_rounding_once(dtype: str, layout: AdapterLayout) -> None:
    once = round_trip(dtype, layout, random_values(layout) * 1e4)
    assert same_bits(round_trip(dtype, layout, once), once)


def test_int8_leaves_what_it_has_rounded() -> None:
    # Whole numbers of scales, and the largest of them 127: rounded to nearest they stay.
    layout = AdapterLayout((LinearShape("q", 70, 50),), (3,), whole((4, 9)).whole)
    once = round_trip("int8", layout, random_values(layout))
    again = round_trip("int8", layout, once, torch.full_like(once, 0.5))
    torch.testing.assert_close(again, once, rtol=1e-6, atol=0)


@LAWS
@given(layout=layouts(), number=st.integers(0, 2**31))
def test_bytes_are_equal_for_equal_inputs(layout: AdapterLayout, number: int) -> None:
    values, uniform = random_values(layout, number), uniform_for(layout, number)
    before = values.clone(), uniform.clone()
    assert same_bits(encoded("int8", layout, values, uniform), encoded("int8", layout, values, uniform))
    assert same_bits(values, before[0])
    assert same_bits(uniform, before[1])


def test_stochastic_rounding_is_unbiased() -> None:
    # A's rows, B's columns and the rows of a matrix: each has its largest value once, and then one other
    # value, of which each is a draw.
    num_draws = 20_000
    module = LinearShape("q", num_draws + 1, num_draws + 1)
    layout = AdapterLayout((module,), (4,), whole((4, num_draws + 1), (num_draws + 1,)).whole)
    values = torch.zeros(layout.num_values)
    views = directions(layout, values)
    in_scales = [0.1, -0.25, 0.5, -0.5, 1.75, -3.01, 63.9, 126.4, -126.99, 1e-3, 5.0, -7.0, 0.0]
    for number, (direction, value) in enumerate(zip(views, in_scales, strict=True)):
        scale = 10.0 ** (number % 5 - 2)
        direction.fill_(value * scale)
        direction[0] = 127 * scale
    result = directions(layout, round_trip("int8", layout, values))
    for number, (direction, value) in enumerate(zip(result, in_scales, strict=True)):
        draws = direction[1:].double() / 10.0 ** (number % 5 - 2)
        share = value - math.floor(value)
        sigma = math.sqrt(share * (1 - share))  # of a coin that falls up in this share of the draws
        assert abs(float(draws.mean()) - value) <= 5 * sigma / math.sqrt(num_draws) + 1e-4
        assert abs(float(draws.std()) - sigma) < 0.02


def test_random_numbers_are_drawn_in_order_and_below_one() -> None:
    drawn = draw_uniform(100_000, numpy_generator(1, "test"))
    assert (drawn.dtype, tuple(drawn.shape)) == (torch.float32, (100_000,))
    assert 0 <= float(drawn.min()) < 1e-3
    assert 1 - 1e-3 < float(drawn.max()) < 1
    assert abs(float(drawn.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / 100_000)
    assert torch.equal(drawn[:5], draw_uniform(5, numpy_generator(1, "test")))


def test_the_largest_random_number_lifts_no_exact_value_beyond_the_largest() -> None:
    values = torch.tensor([127.0, -127, 0, 0.1, -0.1])
    almost_one = torch.full((5,), 1 - 2.0**-24)
    assert round_trip("int8", whole((5,)), values, almost_one).tolist() == [127, -126, 0, 1, 0]
    assert round_trip("int8", whole((5,)), values, torch.zeros(5)).tolist() == [127, -127, 0, 0, -1]


# Extremes.


def test_float16_cuts_and_the_others_do_not() -> None:
    values = torch.tensor([65504.0, 65519, 65520, 1e5, -7e4, 1e30, -1e38])
    assert round_trip("float16", whole((7,)), values).tolist() == [65504] * 4 + [-65504, 65504, -65504]
    for dtype in ("float32", "bfloat16"):
        result = round_trip(dtype, whole((7,)), values)
        torch.testing.assert_close(result, values, rtol=2.0**-8, atol=0)


def test_float16_cuts_only_what_is_too_large() -> None:
    values = torch.tensor([1e9, 0.1, -3.0, 6e-8])
    plain = round_trip("float16", whole((3,)), values[1:])
    for too_large in (1e9, -1e9):
        values[0] = too_large
        result = [math.copysign(65504, too_large), *plain.tolist()]
        assert round_trip("float16", whole((4,)), values).tolist() == result


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_magnitude_arrives(dtype: str) -> None:
    assert largest(dtype) == (65504 if dtype == "float16" else 1e15)
    values = torch.tensor([largest(dtype), -largest(dtype)])
    torch.testing.assert_close(round_trip(dtype, whole((2,)), values), values, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("others", [0.0, 1.0, 1e30])
@all_dtypes
def test_what_is_not_finite_arrives_so(dtype: str, others: float, bad: float) -> None:
    values = torch.full((20,), others)
    values[13] = bad
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = round_trip(dtype, whole((20,)), values)
    assert not math.isfinite(result[13])
    if dtype != "int8":
        assert bool(result[torch.arange(20) != 13].isfinite().all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [1, 11, 15])
def test_a_direction_of_int8_that_is_not_finite_is_nan_and_no_other(place: int, bad: float) -> None:
    layout = AdapterLayout((Q,), (2,), whole((2, 2)).whole)
    values = torch.arange(1.0, 19.0)
    clean = round_trip("int8", layout, values)
    values[place] = bad
    result = round_trip("int8", layout, values)
    # Row 0 of A is 0..3, column 1 of B is 9, 11, 13, row 0 of the matrix is 14, 15.
    spoiled = {1: [0, 1, 2, 3], 11: [9, 11, 13], 15: [14, 15]}[place]
    assert result.isnan().nonzero().flatten().tolist() == spoiled
    kept = ~result.isnan()
    assert torch.equal(result[kept], clean[kept])


def test_a_spoiled_direction_has_the_same_bytes_everywhere() -> None:
    values = torch.tensor([math.nan, 1, math.inf, -math.inf, 1, -1, 5])
    nan = encoded("int8", whole((7,)), values, torch.full((7,), 0.5))
    assert nan[4:].tolist() == [0] * 7


def test_signalling_nans_stay_nans() -> None:
    values = torch.tensor([0x7F800001, 0x7F8F0000, -0x007FFFFF], dtype=torch.int32).view(torch.float32)
    for dtype in DTYPES:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert bool(round_trip(dtype, whole((3,)), values).isnan().all())


@pytest.mark.parametrize("magnitude", [1e-45, 1e-43, 1e-40, 1e-36, 3e-38, 1e30, 3.4e38])
def test_int8_stands_any_magnitude(magnitude: float) -> None:
    values = torch.tensor([1, -1, 0.3, -0.3, 0]) * magnitude
    for uniform in (torch.zeros(5), torch.full((5,), 1 - 2.0**-24)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = round_trip("int8", whole((5,)), values, uniform).double()
        # 127 times what a scale can lose to rounding, where scales are the smallest of all numbers.
        bound = magnitude / 127 * (1 + 1e-4) + 127 * 2.0**-150
        assert bool(((result - values.double()).abs() <= bound).all())
        assert result[4] == 0


@pytest.mark.parametrize("value", [1e-45, -1e-45, 8e-44, -8e-44])
@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-24])
def test_what_has_a_scale_of_zero_is_zeros(value: float, uniform: float) -> None:
    wire = encoded("int8", whole((3,)), torch.full((3,), value), torch.full((3,), uniform))
    assert wire.tolist() == [0] * 7


def test_the_largest_float32_may_arrive_as_infinite() -> None:
    # 127 times its scale, which is rounded up.
    values = torch.tensor([torch.finfo(torch.float32).max, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = round_trip("int8", whole((2,)), values, torch.full((2,), 0.5))
    assert result.tolist() == [math.inf, 0]


def test_rounded_values_are_at_most_127() -> None:
    # A value divided by its own 127th part is 127 and a little more, or a little less.
    for sign, uniform in ((1, 1 - 2.0**-24), (-1, 0.0)):
        values = sign * torch.linspace(1, 2, 2001)
        wire = encoded("int8", whole((2001, 1)), values, torch.full((2001,), uniform))
        assert set(wire[4 * 2001 :].view(torch.int8).tolist()) == {sign * 127}


@all_dtypes
def test_zeros_stay_zeros(dtype: str) -> None:
    layout = AdapterLayout((Q,), (2,), whole((2, 2)).whole)
    almost_one = torch.full((18,), 1 - 2.0**-24)
    for values in (torch.zeros(18), torch.full((18,), -0.0)):
        assert round_trip(dtype, layout, values, almost_one).tolist() == [0] * 18


@pytest.mark.parametrize(("out_features", "lora_rank"), [(1, 1), (31, 3), (32, 1), (33, 16), (257, 40)])
def test_columns_of_b_are_scaled_apart(out_features: int, lora_rank: int) -> None:
    layout = AdapterLayout(
        (LinearShape("q", out_features, 50),), (lora_rank := min(lora_rank, out_features),)
    )
    values = torch.ones(layout.num_values)
    b = layout.factors(values)[0].b
    b *= 127 * torch.arange(1, lora_rank + 1)
    # One value of each column, in another row each, is twice as large.
    for column in range(lora_rank):
        b[-1 - column % out_features, column] *= -2
    wire = encoded("int8", layout, values)
    scales = wire[4 * lora_rank : 8 * lora_rank].view(torch.float32)
    assert scales.tolist() == [2.0 * number for number in range(1, lora_rank + 1)]


def test_the_wire_form_may_begin_at_any_byte_under_int8() -> None:
    layout = AdapterLayout((Q,), (2,), whole((3,), (2, 2)).whole)
    values = random_values(layout)
    aligned = encoded("int8", layout, values)
    buffer = torch.full((aligned.numel() + 8,), 9, dtype=torch.uint8)
    for offset in range(4):
        place = buffer[offset : offset + aligned.numel()]
        encode("int8", layout, values, place, uniform_for(layout))
        assert torch.equal(place, aligned)
        assert same_bits(decoded("int8", layout, place), decoded("int8", layout, aligned))
        assert buffer[:offset].tolist() == [9] * offset
        assert buffer[offset + aligned.numel() :].tolist() == [9] * (8 - offset)
        buffer.fill_(9)


@all_dtypes
def test_a_buffer_of_another_size_is_refused(dtype: str) -> None:
    layout = AdapterLayout((Q,), (2,))
    for extra in (-4, 4):
        wire = torch.zeros(num_bytes(dtype, layout) + extra, dtype=torch.uint8)
        with pytest.raises(RuntimeError):
            encode(dtype, layout, torch.zeros(14), wire, torch.zeros(14))
        with pytest.raises(RuntimeError):
            decode(dtype, layout, wire, torch.zeros(14))


def test_int8_needs_random_numbers() -> None:
    message = "the int8 encoding must have a random number a value, got none (codec); pass draw_uniform()"
    with pytest.raises(ProtocolError, match=f"^{re.escape(message)}$"):
        encode("int8", whole((2,)), torch.zeros(2), torch.zeros(6, dtype=torch.uint8))
