"""Attention on a CPU under bfloat16 autocast.

PyTorch's fused attention for CPUs takes four times as long in bfloat16 as in float32 in its backward pass
(2.13, 16 x 12 heads x 32 tokens: 12.8 against 2.7 ms), while the matrix products around it take half. So
attention computes in float32 there; the layers before and after it stay in bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def use_float32_attention() -> None:
    """Let `sdpa` attention of transformers compute in float32 under autocast on a CPU."""
    from transformers import AttentionInterface

    AttentionInterface.register("sdpa", _attention)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if query.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return result
    is_added = attention_mask is not None and attention_mask.is_floating_point()
    mask = attention_mask.float() if is_added else attention_mask  # type: ignore[union-attr]
    with torch.autocast("cpu", enabled=False):
        out, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)
    return out.to(query.dtype), None
