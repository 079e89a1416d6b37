"""Memory for what crosses the transport."""

import pytest

from mpifedlora.core.buffers import HUGE_PAGE_BYTES, UNIT_BYTES, byte_buffer


@pytest.mark.parametrize("size", [0, 1, UNIT_BYTES, HUGE_PAGE_BYTES - 1])
def test_a_small_buffer_starts_on_a_unit_border(size):
    buffer = byte_buffer(size)
    assert (buffer.numel(), buffer.data_ptr() % UNIT_BYTES) == (size, 0)


@pytest.mark.parametrize("size", [HUGE_PAGE_BYTES, HUGE_PAGE_BYTES + UNIT_BYTES, 33_600_000])
def test_a_large_buffer_starts_on_the_border_of_a_huge_page(size):
    buffer = byte_buffer(size)
    assert (buffer.numel(), buffer.data_ptr() % HUGE_PAGE_BYTES) == (size, 0)
