"""Parameters and flat tensors: views from one into the other."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpifedlora.core.layout import AdapterLayout


def point(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    """Make each parameter a name of the tensor at its place; nothing is copied."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value


def views(layout: AdapterLayout, flat: Tensor) -> list[Tensor]:
    """Return views of (layout values,): factors by module, then the whole tensors."""
    held = {"": (), "a": (0,), "b": (1,), "ab": (0, 1)}[layout.parts]
    return [factors[part] for factors in layout.factors(flat) for part in held] + layout.whole_tensors(flat)


def digest(text: str, parameters: Sequence[nn.Parameter]) -> str:
    """Return a short digest of a text and of samples of all parameters."""
    crc = zlib.crc32(text.encode())
    for parameter in parameters:
        flat = parameter.detach().reshape(-1)
        sample = torch.cat([flat[:256], flat[-256:]]).float().cpu()
        crc = zlib.crc32(sample.numpy().tobytes(), crc)
    return f"{crc:08x}"


def flatten(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return all values of some parameters, (values,) float32 on the CPU, copied."""
    values = [parameter.detach().reshape(-1).float().cpu() for parameter in parameters]
    return torch.cat([torch.empty(0), *values])
