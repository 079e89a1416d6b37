"""The study's changes of the package."""

from __future__ import annotations

import torch
from variants import _cut, balanced, leading_rows

from mpifedlora.core.layout import Factors, LinearShape, ModelShapes, TensorShape
from mpifedlora.core.lowrank import factors_of, svd_of_product
from mpifedlora.core.screening import Contribution


def product(rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, 7, generator=generator), torch.randn(5, rank, generator=generator))


def test_a_balanced_split_is_the_same_product_with_equal_norms() -> None:
    svd = svd_of_product(product(4, 0))
    ours, other = balanced(svd, 1, 3), factors_of(svd, 1, 3)
    torch.testing.assert_close(ours.b @ ours.a, other.b @ other.a)
    torch.testing.assert_close(ours.a.norm(dim=1), ours.b.norm(dim=0))


def test_updates_above_the_rank_are_cut_and_others_stay_as_they_are() -> None:
    factors = [product(4, 1), product(2, 2)]
    empty = torch.empty(0)
    strong, small = _cut(Contribution(None, factors, empty, empty), [3, 2])  # type: ignore[arg-type]
    assert strong.lora_rank == 3
    s = torch.linalg.svdvals(factors[0].b @ factors[0].a)
    error = torch.linalg.norm(factors[0].b @ factors[0].a - strong.b @ strong.a)
    torch.testing.assert_close(error, s[3])
    assert small is factors[1]


def test_leading_rows_are_those_of_the_change_of_each_adapted_weight() -> None:
    modules = LinearShape("first", 4, 2), LinearShape("second", 2, 3)
    body = (
        TensorShape("first.weight", (4, 2)),
        TensorShape("norm.weight", (3,)),
        TensorShape("second.weight", (2, 3)),
    )
    shapes = ModelShapes(modules, head=(TensorShape("head", (5,)),), body=body)
    before = torch.arange(17.0 + 5)
    after = before.clone()
    after[11:17] += torch.outer(torch.tensor([1.0, -2.0]), torch.tensor([0.0, 3.0, 4.0])).flatten()
    after[17:] = 99  # the head, which is not read
    rows = leading_rows(shapes, before, after)
    assert [len(one) for one in rows] == [2, 2]
    torch.testing.assert_close(rows[1][0], torch.tensor([0.0, 0.6, 0.8]), rtol=0, atol=1e-6)
