"""Wire dtypes: the flat float32 values of a layout as bytes, and back.

The wire form of a layout is that of its pieces (`AdapterLayout.piece_values`), one after another and
without padding. A piece's bytes depend on its own values alone: so a range of pieces is a range of
bytes, and equals the wire form of the layout of that range.

`float32` is the values themselves. `bfloat16` and `float16` are rounded to nearest even; `float16`
cuts finite values to 65504. `int8` has one float32 scale a direction: a row of A, a column of B, a row
of a tensor exchanged whole (its first dimension), or such a tensor of one dimension or none. Its
rounding is stochastic and so unbiased: the errors of many clients average out. A piece is its scales (of
A, then of B), and then its values, in the order of the buffer.

What is not finite arrives so: under `int8` as a direction of NaN, since its scale is NaN.

References:
    Alistarh et al. 2017, QSGD, arXiv 1610.02132, section 3.1: stochastic rounding (there scaled by the
    Euclidean norm, here by the largest magnitude).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpifedlora.core.layout import AdapterLayout
from mpifedlora.errors import ProtocolError

# What is larger is as good as infinite: products of such values overflow float32.
LARGEST_VALUE = 1e15

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LARGEST_INT8 = 127
_SCALE_BYTES = 4

_Array = npt.NDArray[Any]


def piece_bytes(dtype: str, layout: AdapterLayout) -> tuple[int, ...]:
    """Return the wire bytes of each piece in the order of the buffer: a module, or a tensor exchanged whole.

    Args:
        dtype: `float32`, `bfloat16`, `float16` or `int8`.
        layout: of the values.

    >>> from mpifedlora.core.layout import LinearShape, TensorShape
    >>> layout = AdapterLayout((LinearShape("q", 3, 4),), (2,), (TensorShape("head", (5, 6)),))
    >>> piece_bytes("bfloat16", layout)
    (28, 60)
    >>> piece_bytes("int8", layout)  # 2 + 2 scales and 14 values, 5 scales and 30 values
    (30, 50)
    """
    if dtype != "int8":
        return tuple(_FLOATS[dtype].itemsize * num_values for num_values in layout.piece_values)
    sizes = _part_sizes(layout)
    return tuple(map(sum, zip(sizes[::2], sizes[1::2], strict=True)))


def num_bytes(dtype: str, layout: AdapterLayout) -> int:
    """Return the wire bytes of a layout."""
    if dtype != "int8":
        return _FLOATS[dtype].itemsize * layout.num_values
    return sum(piece_bytes(dtype, layout))


def largest(dtype: str) -> float:
    """Return the largest magnitude that arrives: `float16` cuts to it, else what is larger is not finite."""
    return torch.finfo(torch.float16).max if dtype == "float16" else LARGEST_VALUE


def draw_uniform(num_values: int, generator: np.random.Generator) -> Tensor:
    """Draw the random numbers of an `int8` encoding: (num_values,) float32 in [0, 1).

    A range of a layout's pieces takes the same range of them.
    """
    # Twice as fast as torch.rand, and as slow as the encoding itself.
    return torch.from_numpy(generator.random(num_values, np.float32))


def encode(
    dtype: str, layout: AdapterLayout, values: Tensor, out: Tensor, uniform: Tensor | None = None
) -> None:
    """Write values in their wire form.

    Args:
        dtype: `float32`, `bfloat16`, `float16` or `int8`.
        layout: of the values.
        values: (layout.num_values,) float32 on the CPU.
        out: (num_bytes,) uint8 on the CPU, overwritten; other than under `int8`, it starts on a
            multiple of a value's size.
        uniform: (layout.num_values,) float32 in [0, 1), for `int8` only: a value x of a direction with
            the scale s becomes floor(x / s + u).

    Raises:
        ProtocolError: if `int8` is given no random numbers.
    """
    if dtype == "int8":
        if uniform is None:
            raise ProtocolError(
                "the int8 encoding must have a random number a value, got none (codec); pass draw_uniform()"
            )
        _encode_int8(layout, values, out, uniform)
    else:
        out.view(_FLOATS[dtype]).copy_(_saturated(values) if dtype == "float16" else values)


def decode(dtype: str, layout: AdapterLayout, wire: Tensor, out: Tensor) -> Tensor:
    """Read values from their wire form.

    Args:
        dtype: `float32`, `bfloat16`, `float16` or `int8`.
        layout: of the values.
        wire: (num_bytes,) uint8 on the CPU; other than under `int8`, it starts on a multiple of a
            value's size.
        out: (layout.num_values,) float32 on the CPU, overwritten and returned.
    """
    if dtype != "int8":
        return out.copy_(wire.view(_FLOATS[dtype]))
    _decode_int8(layout, wire, out)
    return out


def _saturated(values: Tensor) -> Tensor:
    limit = largest("float16")
    low, high = torch.aminmax(values) if values.numel() else (0, 0)
    if -limit <= low and high <= limit:
        return values
    return torch.where(values.isinf(), values, values.clamp(-limit, limit))


def _part_sizes(layout: AdapterLayout) -> list[int]:
    """Return the bytes of each piece's scales and rounded values, in turn."""
    modules = (lora_rank * len(layout.parts) for lora_rank in layout.lora_ranks)
    num_scales = (*modules, *(_num_rows(tensor.shape) for tensor in layout.whole))
    pairs = zip(num_scales, layout.piece_values, strict=True)
    return [size for scales, values in pairs for size in (_SCALE_BYTES * scales, values)]


def _num_rows(shape: tuple[int, ...]) -> int:
    if math.prod(shape) == 0:
        return 0
    return shape[0] if len(shape) > 1 else 1


def _directions(layout: AdapterLayout, flat: Tensor) -> list[_Array]:
    """Return a buffer's matrices as views with one direction a row, the empty ones left out."""
    factors = (matrix for a, b in layout.factors(flat) for matrix in (a, b.t()))
    whole = (_as_rows(tensor) for tensor in layout.whole_tensors(flat))
    return [matrix.numpy() for matrix in (*factors, *whole) if matrix.numel()]


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.dim() > 1 else tensor.view(1, -1)


def _pairs(matrices: list[_Array], scales: Tensor) -> Iterator[tuple[_Array, _Array]]:
    """Yield each matrix with its scales as a column."""
    columns = torch.split(scales.view(-1, 1), [len(matrix) for matrix in matrices])
    return zip(matrices, (column.numpy() for column in columns), strict=True)


def _encode_int8(layout: AdapterLayout, values: Tensor, wire: Tensor, uniform: Tensor) -> None:
    if layout.num_values == 0:
        return
    work = values.abs()
    matrices = _directions(layout, work)
    # The columns of B are copied to rows: four times as fast as a maximum over its first dimension.
    tops = [torch.from_numpy(np.ascontiguousarray(matrix).max(axis=1)) for matrix in matrices]
    scales = torch.cat(tops).div_(_LARGEST_INT8)
    scales[scales.isinf()] = torch.nan
    # Divided by inf, what is too small for a scale becomes 0, as it must.
    divisors = scales.where(scales != 0, torch.inf)
    work.copy_(values)
    with np.errstate(invalid="ignore"):
        for matrix, divisor in _pairs(matrices, divisors):
            np.divide(matrix, divisor, out=matrix)
    work.add_(uniform).floor_().clamp_(-_LARGEST_INT8, _LARGEST_INT8)
    if scales.isnan().any():
        work.nan_to_num_()  # what NaN is as an integer differs between machines
    rounded, sizes = work.to(torch.int8), _part_sizes(layout)
    parts = zip(
        torch.split(scales.view(torch.uint8), sizes[::2]),
        torch.split(rounded.view(torch.uint8), sizes[1::2]),
        strict=True,
    )
    wire.copy_(torch.cat([part for pair in parts for part in pair]))


def _decode_int8(layout: AdapterLayout, wire: Tensor, out: Tensor) -> None:
    if layout.num_values == 0:
        return
    parts = torch.split(wire, _part_sizes(layout))
    # Joined, the scales are aligned, which they need not be in the wire form.
    scales = torch.cat(parts[::2]).view(torch.float32)
    out.copy_(torch.cat(parts[1::2]).view(torch.int8))
    # Near the largest float32, 127 scales may be more than that: it counts as not finite anyway.
    with np.errstate(over="ignore"):
        for matrix, scale in _pairs(_directions(layout, out), scales):
            np.multiply(matrix, scale, out=matrix)
