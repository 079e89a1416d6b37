"""Buffers of bytes that cross the transport: their unit, and memory for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mpifedlora.core.agreement import Bytes

# The transport is set up, and may find a mistake, before torch is loaded.
if TYPE_CHECKING:
    from torch import Tensor

UNIT_BYTES = 64
"""What crosses the transport is a whole number of these: MPI counts them, and so reaches 128 GiB.

Rows start on cache lines too, so the bits of what is computed do not depend on a row's place."""


HUGE_PAGE_BYTES, LEAST_HUGE_BYTES = 2**21, 2**18
"""A huge page, and what one is taken for: MPI's copies between processes pay by the page."""


def padded(size: int) -> int:
    """Round a number of bytes up to whole units.

    >>> padded(0), padded(1), padded(64)
    (0, 64, 64)
    """
    return -(-size // UNIT_BYTES) * UNIT_BYTES


def byte_buffer(size: int, *, device: str = "cpu", is_pinned: bool = False) -> Tensor:
    """Return a buffer of bytes, not set, which starts on a unit border, from 256 KiB on that of a huge page.

    Args:
        size: in bytes.
        device: where it lies.
        is_pinned: whether it is page-locked, for copies from a GPU.
    """
    import torch

    if device != "cpu" or is_pinned:
        return torch.empty(size, dtype=torch.uint8, device=device, pin_memory=is_pinned)
    # numpy asks for huge pages from 4 MiB on, torch never; the system gives them where a whole one fits.
    unit = HUGE_PAGE_BYTES if size >= LEAST_HUGE_BYTES else UNIT_BYTES
    memory = np.empty(-(-size // unit) * unit + unit, np.uint8)
    first = -memory.ctypes.data % unit
    return torch.from_numpy(memory[first : first + size])


def value_buffer(num_values: int, dtype: str = "float32") -> Tensor:
    """Return (num_values,) of a dtype, not set, in such a buffer."""
    import torch

    kind: torch.dtype = getattr(torch, dtype)
    return byte_buffer(num_values * kind.itemsize).view(kind)


def as_bytes(tensor: Tensor) -> Bytes:
    """See a flat tensor as bytes; numpy has no bfloat16, but any tensor has a one-byte view.

    On a GPU it is the view itself, whose address MPI is given. With cold caches this takes longer than a
    small message: what crosses every round is seen so once.
    """
    import torch

    view = tensor.reshape(-1).view(torch.uint8)
    flat: Bytes = view if view.is_cuda else view.numpy()  # type: ignore[assignment]
    return flat
