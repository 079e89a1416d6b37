"""Algebra on products b @ a of low inner dimension, without forming the product.

Shapes: `b` (out_features, k), `a` (k, in_features); energies are squared Frobenius norms in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpifedlora.core.layout import Factors

# LoRA draws A from U(-1/sqrt(in), 1/sqrt(in)): a row of A has expected squared norm 1/3.
INITIAL_ROW_NORM = 1 / math.sqrt(3)


class Svd(NamedTuple):
    """Singular triplets of b @ a: `u` (out, k), `s` (k,) float64 and falling, `vt` (k, in)."""

    u: Tensor
    s: Tensor
    vt: Tensor


def stack_weighted(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Stack factors so that one product is the exact weighted sum of theirs.

    [w_1 B_1 ... w_K B_K] @ [A_1; ...; A_K] = sum of w_k B_k A_k (FLoRA, arXiv 2409.05976, equation 4).

    Args:
        factors: per client, `a` (lora_rank, in) and `b` (out, lora_rank).
        weights: one factor a client, of any scale.
    """
    b = torch.cat([factor.b * weight for factor, weight in zip(factors, weights, strict=True)], dim=1)
    return Factors(torch.cat([factor.a for factor in factors]), b)


def svd_of_product(product: Factors) -> Svd:
    """Return the SVD of b @ a through QR of both factors and the SVD of a small float64 core.

    Where the inner dimension reaches min(in, out) the dense product is as cheap, and is used.
    Signs are fixed (largest entry of each row of vt positive), so that runs and machines agree.
    """
    a, b = product
    if a.shape[0] >= min(a.shape[1], b.shape[0]):
        u, s, vt = torch.linalg.svd((b @ a).double(), full_matrices=False)
        return _with_fixed_signs(u.to(b.dtype), s, vt.to(a.dtype))
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    u, s, vt = torch.linalg.svd(r_b.double() @ r_a.double().mT)
    return _with_fixed_signs(q_b @ u.to(b.dtype), s, vt.to(a.dtype) @ q_a.mT)


def _with_fixed_signs(u: Tensor, s: Tensor, vt: Tensor) -> Svd:
    largest = vt.gather(1, vt.abs().argmax(dim=1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(vt.dtype)
    return Svd(u * signs.mT, s, vt * signs)


def factors_of(svd: Svd, first: int, last: int) -> Factors:
    """Return singular directions first..last-1 as factors.

    A gets orthogonal rows of LoRA's initial norm, B all of the singular values: so the step of an
    adaptive optimiser on A has the same relative size for strong and for weak directions.
    """
    a = svd.vt[first:last] * INITIAL_ROW_NORM
    b = svd.u[:, first:last] * (svd.s[first:last] / INITIAL_ROW_NORM).to(svd.u.dtype)
    return Factors(a, b)


def energy(product: Factors) -> float:
    """Return ||b @ a||_F^2 from the two small Gram matrices, in float64."""
    a, b = product.a.double(), product.b.double()
    return float(((b.mT @ b) * (a @ a.mT)).sum().clamp_min(0))


def error_energy(exact: Factors, sent: Factors) -> float:
    """Return ||exact - sent||_F^2 of two products of one shape."""
    return energy(Factors(torch.cat([exact.a, sent.a]), torch.cat([exact.b, -sent.b], dim=1)))


def concatenate(parts: Sequence[Factors]) -> Factors:
    """Join factors along the inner dimension: the product of the result is the sum of products."""
    return Factors(torch.cat([part.a for part in parts]), torch.cat([part.b for part in parts], dim=1))
