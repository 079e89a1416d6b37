"""Algebra on products b @ a of low inner dimension, without forming the product.

Shapes: `b` (out_features, k), `a` (k, in_features); energies are squared Frobenius norms in float64.
The SVDs take stacks of equal shapes as well, with one more dimension in front.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mpifedlora.core.layout import Factors

# LoRA draws A from U(-1/sqrt(in), 1/sqrt(in)): a row of A has expected squared norm 1/3.
INITIAL_ROW_NORM = 1 / math.sqrt(3)

# What a floating-point operation of float32 QR and of float64 SVD costs, relative to one of a float32
# matrix product: measured at inner dimensions of some hundred, where the choice is close.
QR_COST = 3.0
SVD_COST = 2.7

# Factors that are on a device at a time: 1 GiB of float32, as large ones gain nothing from company.
BATCH_VALUES = 2**28


class Svd(NamedTuple):
    """Singular triplets of b @ a: `u` (out, k), `s` (k,) float64 and falling, `vt` (k, in)."""

    u: Tensor
    s: Tensor
    vt: Tensor


def stack_weighted(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Stack factors so that one product is the exact weighted sum of theirs.

    [w_1 B_1 ... w_K B_K] @ [A_1; ...; A_K] = sum of w_k B_k A_k (FLoRA, arXiv 2409.05976, stacking).

    Args:
        factors: per client, `a` (lora_rank, in) and `b` (out, lora_rank).
        weights: one factor a client, of any scale.
    """
    b = torch.cat([factor.b * weight for factor, weight in zip(factors, weights, strict=True)], dim=1)
    return Factors(torch.cat([factor.a for factor in factors]), b)


def svds_of_products(products: Sequence[Factors], device: str = "cpu") -> list[Svd]:
    """Return the SVD of each b @ a: one by one on the CPU, elsewhere in batches of equal shapes.

    On the CPU the bits of a result do not depend on which products are given together. On another
    device they may, and so do the signs of directions whose largest entries tie.

    Args:
        products: on the CPU, each as `svd_of_product` takes it; shapes may differ.
        device: where to work, as torch names it.

    Returns:
        One `svd_of_product` a product, on the CPU, in the order given.
    """
    return _svds(lambda a, b: svd_of_product(Factors(a, b)), products, device)


def svds_of_matrices(matrices: Sequence[Tensor], device: str = "cpu") -> list[Svd]:
    """Return the SVD of each matrix, found as `svds_of_products` does.

    Args:
        matrices: on the CPU, each (out, in), float32 or float64; shapes may differ.
        device: where to work, as torch names it.

    Returns:
        One `svd_of_matrix` a matrix, on the CPU, in the order given.
    """
    return _svds(svd_of_matrix, [(matrix,) for matrix in matrices], device)


def _svds(find: Callable[..., Svd], items: Sequence[tuple[Tensor, ...]], device: str) -> list[Svd]:
    if torch.device(device).type == "cpu":
        # A batched matrix product rounds unlike a single one, and LAPACK works matrix by matrix anyway.
        return [find(*item) for item in items]
    return _svds_in_batches(find, items, device)


def _svds_in_batches(find: Callable[..., Svd], items: Sequence[tuple[Tensor, ...]], device: str) -> list[Svd]:
    alike: dict[tuple[object, ...], list[int]] = {}
    for place, item in enumerate(items):
        alike.setdefault(tuple((part.shape, part.dtype) for part in item), []).append(place)
    svds: dict[int, Svd] = {}
    for places in alike.values():
        num_values = sum(part.numel() for part in items[places[0]])
        length = max(1, BATCH_VALUES // max(1, num_values))
        for start in range(0, len(places), length):
            batch = places[start : start + length]
            columns = zip(*(items[place] for place in batch), strict=True)
            found = find(*(torch.stack(column).to(device) for column in columns))
            svds.update(zip(batch, map(Svd, *(part.cpu() for part in found)), strict=True))
    return [svds[place] for place in range(len(items))]


def svd_of_product(product: Factors) -> Svd:
    """Return the SVD of b @ a, from the factors or from the dense product, whichever costs less.

    Signs are fixed (largest entry of each row of vt positive), so that runs and machines agree.

    Args:
        product: `b` (out, k) and `a` (k, in), or stacks of them, float32 or float64.

    Returns:
        min(out, k, in) triplets from the factors, min(out, in) from the dense product: `num_triplets`.
    """
    out_features, inner = product.b.shape[-2:]
    cheaper = factored_is_cheaper(out_features, product.a.shape[-1], inner)
    return _svd_factored(product) if cheaper else _svd_dense(product)


def num_triplets(out_features: int, in_features: int, inner: int) -> int:
    """Return how many triplets `svd_of_product` finds in the product of an inner dimension, zeros included.

    >>> num_triplets(384, 384, 128), num_triplets(384, 384, 512)
    (128, 384)
    """
    least = min(out_features, in_features)
    return min(least, inner) if factored_is_cheaper(out_features, in_features, inner) else least


def svd_of_matrix(dense: Tensor) -> Svd:
    """Return the SVD of a matrix, its signs fixed as in `svd_of_product`.

    QR in the matrix's own type takes it to a square core first, which costs less than the float64
    SVD of a long matrix and errs by that type's rounding, as the returned vectors do anyway.

    Args:
        dense: (out, in), or a stack of them, float32 or float64.
    """
    out_features, in_features = dense.shape[-2:]
    if out_features < in_features:
        turned = svd_of_matrix(dense.mT)
        return _with_fixed_signs(turned.vt.mT, turned.s, turned.u.mT)
    if out_features == in_features:
        return _with_fixed_signs(*_triplets(dense, dense.dtype))
    q, r = torch.linalg.qr(dense)
    u, s, vt = _triplets(r, dense.dtype)
    return _with_fixed_signs(q @ u, s, vt)


def factored_is_cheaper(out_features: int, in_features: int, inner: int) -> bool:
    """Tell whether the SVD of b @ a costs less from its factors than from the dense product.

    A model: floating-point operations of each step, times what one costs in that kind of step
    relative to a matrix product. benchmarks/bench_aggregation.py checks it against measured times.

    Args:
        out_features: rows of b, at least 1.
        in_features: columns of a, at least 1.
        inner: columns of b and rows of a, at least 1.

    References:
        Operation counts of QR and SVD: Golub and Van Loan, Matrix Computations.

    >>> factored_is_cheaper(384, 384, 128), factored_is_cheaper(384, 384, 512)
    (True, False)
    """
    return _factored_cost(out_features, in_features, inner) < _dense_cost(out_features, in_features, inner)


def _factored_cost(out_features: int, in_features: int, inner: int) -> float:
    rows, columns = min(out_features, inner), min(in_features, inner)
    core = _product_cost(rows, inner, columns) + _svd_cost(rows, columns)
    least = min(rows, columns)
    vectors = _product_cost(out_features, rows, least) + _product_cost(in_features, columns, least)
    return _qr_cost(out_features, inner) + _qr_cost(in_features, inner) + core + vectors


def _dense_cost(out_features: int, in_features: int, inner: int) -> float:
    short, long = sorted((out_features, in_features))
    cost = _product_cost(out_features, inner, in_features) + _svd_cost(short, short)
    return cost if short == long else cost + _qr_cost(long, short) + _product_cost(long, short, short)


def _product_cost(rows: int, inner: int, columns: int) -> float:
    return 2 * rows * inner * columns


def _qr_cost(rows: int, columns: int) -> float:
    # Householder: the factorisation, then the explicit q (rows, short).
    short, long = sorted((rows, columns))
    return QR_COST * 2 * short**2 * (long + rows - 2 * short / 3)


def _svd_cost(rows: int, columns: int) -> float:
    short, long = sorted((rows, columns))
    return SVD_COST * (6 * long * short**2 + 20 * short**3)


def _svd_factored(product: Factors) -> Svd:
    q_b, r_b = torch.linalg.qr(product.b)
    q_a, r_a = torch.linalg.qr(product.a.mT)
    u, s, vt = _triplets(r_b.double() @ r_a.double().mT, product.b.dtype)
    return _with_fixed_signs(q_b @ u, s, vt @ q_a.mT)


def _svd_dense(product: Factors) -> Svd:
    return svd_of_matrix(product.b @ product.a)


def _triplets(core: Tensor, dtype: torch.dtype) -> Svd:
    u, s, vt = torch.linalg.svd(core.double(), full_matrices=False)
    return Svd(u.to(dtype), s, vt.to(dtype))


def _with_fixed_signs(u: Tensor, s: Tensor, vt: Tensor) -> Svd:
    largest = vt.gather(-1, vt.abs().argmax(dim=-1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).to(vt.dtype)
    return Svd(u * signs.mT, s, vt * signs)


def factors_of(svd: Svd, first: int, last: int | None) -> Factors:
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
