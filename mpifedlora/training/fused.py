"""PEFT's LoRA layer for linear layers, with frozen weight and adapter as one step of autograd.

PEFT computes `base(x) + B(A(x)) * scaling` as separate steps, each of which writes a whole activation: a
product, a scaled copy and a sum in the forward pass, two gradients of x and their sum in the backward
pass. Here the adapter's part is added in place.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor
from torch.autograd.function import once_differentiable


class FusedLinear(Linear):  # type: ignore[misc]
    """A LoRA layer as PEFT's; what is not one plain adapter is left to PEFT's own way."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return (..., out_features) of x (..., in_features)."""
        device = x.device.type
        is_mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_mixed else x.dtype
        if args or kwargs or not self._is_plain() or not (is_mixed or self._is_all(dtype)):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        (adapter,), base = self.active_adapters, self.base_layer
        parts = (x, base.weight, base.bias, self.lora_A[adapter].weight, self.lora_B[adapter].weight)
        cast = (None if part is None else part.to(dtype) for part in parts)
        fused: Tensor = _Fused.apply(*cast, self.scaling[adapter])  # type: ignore[no-untyped-call]
        return fused

    def _is_plain(self) -> bool:
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        (adapter,) = self.active_adapters
        return not (self.training and getattr(self.lora_dropout[adapter], "p", 0.0) > 0)

    def _is_all(self, dtype: torch.dtype) -> bool:
        (adapter,) = self.active_adapters
        return {self.base_layer.weight.dtype, self.lora_A[adapter].weight.dtype} == {dtype}


class _Fused(torch.autograd.Function):
    """y = x W^T + bias + scaling * (x A^T) B^T, for a weight and a bias that are not trained."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = (rows @ a.t()).mul_(scaling)
        out = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
        out.addmm_(low, b.t())
        needs_x, _, _, needs_a, needs_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            weight if needs_x else None,
            a if needs_x else None,
            b if needs_x or needs_a else None,
            rows if needs_a else None,
            low if needs_b else None,
        )
        ctx.scaling, ctx.shape = scaling, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, a, b, rows, low = ctx.saved_tensors
        grad_out = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_a = grad_b = None
        if b is not None:
            grad_low = (grad_out @ b).mul_(ctx.scaling)
            if weight is not None:
                grad_x = (grad_out @ weight).addmm_(grad_low, a).view(ctx.shape)
            if rows is not None:
                grad_a = grad_low.t() @ rows
        if low is not None:
            grad_b = (low.t() @ grad_out).t()  # much faster than grad_out.t() @ low
        return grad_x, None, None, grad_a, grad_b, None
