"""Memory for what crosses the transport."""

import pytest
import torch

from mpifedlora.core.buffers import HUGE_PAGE_BYTES, LEAST_HUGE_BYTES, UNIT_BYTES, byte_buffer, value_buffer


@pytest.mark.parametrize("size", [0, 1, UNIT_BYTES, LEAST_HUGE_BYTES - 1])
def test_a_small_buffer_starts_on_a_unit_border(size):
    buffer = byte_buffer(size)
    assert (buffer.numel(), buffer.data_ptr() % UNIT_BYTES) == (size, 0)


@pytest.mark.parametrize("size", [LEAST_HUGE_BYTES, HUGE_PAGE_BYTES + UNIT_BYTES, 33_600_000])
def test_a_large_buffer_starts_on_the_border_of_a_huge_page(size):
    buffer = byte_buffer(size)
    assert (buffer.numel(), buffer.data_ptr() % HUGE_PAGE_BYTES) == (size, 0)


@pytest.mark.parametrize(("dtype", "num_bytes"), [("float32", 12), ("float64", 24)])
def test_values_lie_in_such_a_buffer(dtype, num_bytes):
    buffer = value_buffer(3, dtype)
    assert (buffer.shape, buffer.dtype, buffer.nbytes) == ((3,), getattr(torch, dtype), num_bytes)
    assert value_buffer(HUGE_PAGE_BYTES, dtype).data_ptr() % HUGE_PAGE_BYTES == 0
