from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpifedlora.core import lowrank
from mpifedlora.core.layout import Factors
from mpifedlora.core.lowrank import (
    INITIAL_ROW_NORM,
    Svd,
    _svd_dense,
    _svd_factored,
    _svds_in_batches,
    concatenate,
    energy,
    error_energy,
    factored_is_cheaper,
    factors_of,
    stack_weighted,
    svd_of_matrix,
    svd_of_product,
    svds_of_matrices,
    svds_of_products,
)

LAWS = settings(max_examples=25, deadline=None)
DTYPES = st.sampled_from((torch.float32, torch.float64))
WEIGHTS = st.lists(st.floats(1e-3, 10), min_size=1, max_size=4)


class Case(NamedTuple):
    lora_rank: int
    out_features: int
    in_features: int
    seed: int

    def factors(self, dtype: torch.dtype = torch.float64, number: int = 0) -> Factors:
        generator = torch.Generator().manual_seed(100 * self.seed + number)
        a = torch.randn(self.lora_rank, self.in_features, generator=generator, dtype=torch.float64)
        b = torch.randn(self.out_features, self.lora_rank, generator=generator, dtype=torch.float64)
        return Factors(a.to(dtype), b.to(dtype))


SIZES = st.integers(1, 9)
# The inner dimension goes over min(in, out) too, where the dense way is taken.
CASES = st.builds(Case, SIZES, SIZES, SIZES, st.integers(0, 10**6))


def dense(product: Factors) -> Tensor:
    return product.b.double() @ product.a.double()


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix))


def approximation(svd: Svd, kept_rank: int) -> Tensor:
    return dense(factors_of(svd, 0, kept_rank))


Way = Callable[[Factors], Svd]


def find_batch(a: Tensor, b: Tensor) -> Svd:
    return svd_of_product(Factors(a, b))


def in_company(factors: Factors) -> Svd:
    """The way of the devices, on the CPU, with another product of the same shape before it."""
    other = Factors(factors.a.roll(1, 0), factors.b.roll(1, 0))
    return _svds_in_batches(find_batch, [other, factors], "cpu")[1]


WAYS = pytest.mark.parametrize("way", [svd_of_product, _svd_factored, _svd_dense, in_company])


def assert_best_at_each_rank(factors: Factors, way: Way, tolerance: float) -> None:
    svd, exact = way(factors), dense(factors)
    # By error: at tied singular values the matrices themselves may differ.
    singular, size = torch.linalg.svdvals(exact), norm(factors.b) * norm(factors.a)
    for kept_rank in range(len(svd.s) + 1):
        best = float(singular[kept_rank:].square().sum().sqrt())
        error = norm(exact - approximation(svd, kept_rank))
        assert error == pytest.approx(best, rel=10 * tolerance, abs=tolerance * size)


@WAYS
@LAWS
@given(case=CASES, dtype=DTYPES)
def test_error_at_each_rank_is_that_of_the_dense_svd(way: Way, case: Case, dtype: torch.dtype) -> None:
    assert_best_at_each_rank(case.factors(dtype), way, 1e-6 if dtype == torch.float32 else 1e-12)


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lora_rank", [4, 12])
def test_tied_singular_values_are_no_trouble(way: Way, dtype: torch.dtype, lora_rank: int) -> None:
    a, b = torch.zeros(lora_rank, 9, dtype=dtype), torch.zeros(8, lora_rank, dtype=dtype)
    for place in range(4):
        a[place, 2 * place], b[place, place] = 1.0, 3.0
    assert way(Factors(a, b)).s[:4].tolist() == pytest.approx([3.0] * 4)
    assert_best_at_each_rank(Factors(a, b), way, 1e-6)


@WAYS
@pytest.mark.parametrize("scale", [1.0, 1e-6])
@pytest.mark.parametrize("case", [Case(12, 96, 40, 1), Case(64, 48, 40, 2), Case(50, 40, 90, 3)], ids=str)
def test_float32_cuts_err_as_the_best_ones_do_to_five_digits(way: Way, case: Case, scale: float) -> None:
    # Directions 1 to 1e-3 strong, in factors of very unequal size (1e6 and 1e-9).
    scales = torch.logspace(0, math.log10(scale), case.lora_rank)
    a, b = case.factors(torch.float32)
    factors = Factors(a / scales[:, None], b * scales**1.5)
    svd, exact = way(factors), dense(factors)
    singular = torch.linalg.svdvals(exact)
    best = singular.square().flip(0).cumsum(0).flip(0).sqrt()
    # Below that the float32 of the returned vectors shows, whichever way they were found.
    wanted = best[: len(svd.s)][best[: len(svd.s)] > 1e-3 * best[0]]
    errors = [norm(exact - approximation(svd, kept_rank)) for kept_rank in range(len(wanted))]
    assert len(errors) > 3
    assert errors == pytest.approx(wanted.tolist(), rel=1e-5)
    assert norm(exact - approximation(svd, len(svd.s))) <= 1e-6 * norm(exact)


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6)])
def test_the_svd_of_a_matrix_is_that_of_its_float64_copy(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    u, s, vt = svd_of_matrix(matrix)
    wanted = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert (u.dtype, s.dtype, vt.dtype) == (torch.float32, torch.float64, torch.float32)
    assert torch.allclose(s, wanted.S, rtol=1e-6)
    assert torch.allclose((u * s) @ vt.double(), matrix.double(), atol=1e-6 * float(s[0]))
    # The sign of each pair is free in the reference, and fixed here.
    signs = torch.where(wanted.Vh.max(dim=1).values < -wanted.Vh.min(dim=1).values, -1.0, 1.0)
    assert torch.allclose(vt.double(), wanted.Vh * signs[:, None], atol=1e-5)
    assert torch.allclose(u.double(), wanted.U * signs, atol=1e-5)


# (out, in) of MiniLM, BERT-base and a larger model: those of benchmarks/bench_aggregation.py.
SHAPES = [(384, 384), (1536, 384), (384, 1536), (768, 768), (3072, 768), (2048, 2048)]
FEATURES = st.integers(1, 4096)


@pytest.mark.parametrize("shape", SHAPES)
def test_factored_is_cheaper_well_below_the_smaller_side_and_dense_from_there(shape: tuple[int, int]) -> None:
    assert all(factored_is_cheaper(*shape, inner) for inner in (1, 8, min(shape) // 3, 4 * min(shape) // 5))
    assert not any(factored_is_cheaper(*shape, times * min(shape)) for times in (1, 2, 5))


@pytest.mark.parametrize(("inner", "way"), [(8, _svd_factored), (36, _svd_dense)])
def test_the_svd_of_a_product_goes_the_cheaper_way(inner: int, way: Way) -> None:
    factors = Case(inner, 40, 36, 7).factors(torch.float32)
    assert factored_is_cheaper(40, 36, inner) == (way is _svd_factored)
    assert all(map(torch.equal, svd_of_product(factors), way(factors)))


@LAWS
@given(FEATURES, FEATURES, st.lists(FEATURES, min_size=2, max_size=20).map(sorted))
def test_once_dense_is_cheaper_it_stays_so(out_features: int, in_features: int, inners: list[int]) -> None:
    choices = [factored_is_cheaper(out_features, in_features, inner) for inner in inners]
    assert choices == sorted(choices, reverse=True)


@LAWS
@given(FEATURES, FEATURES, FEATURES)
def test_the_choice_is_the_same_for_the_transpose(out_features: int, in_features: int, inner: int) -> None:
    one, other = (out_features, in_features), (in_features, out_features)
    assert factored_is_cheaper(*one, inner) == factored_is_cheaper(*other, inner)


# Many products at once.

# A batched matrix product rounds unlike a single one at the last two, with the MKL of an x86 machine.
ALIKE = st.sampled_from([(2, 6, 5), (9, 6, 5), (2, 5, 6), (28, 81, 1), (6, 5, 11)])
MANY = st.lists(st.tuples(ALIKE, st.integers(0, 10**6)), max_size=6)


def all_equal(one: Svd, other: Svd) -> bool:
    return all(map(torch.equal, one, other))


@LAWS
@given(MANY, st.integers(0, 6), DTYPES)
def test_on_the_cpu_the_bits_do_not_depend_on_the_company(
    many: list[tuple[tuple[int, int, int], int]], place: int, dtype: torch.dtype
) -> None:
    products = [Case(*sizes, seed).factors(dtype) for sizes, seed in many]
    together = svds_of_products(products)
    in_parts = svds_of_products(products[:place]) + svds_of_products(products[place:])
    alone = [svd_of_product(product) for product in products]
    assert len(together) == len(in_parts) == len(products)
    assert all(map(all_equal, together, alone))
    assert all(map(all_equal, in_parts, alone))


@pytest.mark.parametrize("batch_values", [1, 60, 2**28])
def test_batches_give_each_product_its_own_svd_in_the_order_given(
    batch_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "BATCH_VALUES", batch_values)
    sizes = [(2, 6, 5), (2, 5, 6), (9, 6, 5), (2, 6, 5), (2, 5, 6), (2, 6, 5)]
    products = [Case(*size, seed).factors() for seed, size in enumerate(sizes)]
    for svd, product in zip(_svds_in_batches(find_batch, products, "cpu"), products, strict=True):
        assert torch.allclose((svd.u * svd.s) @ svd.vt, dense(product), atol=1e-12)
        assert torch.allclose(svd.s, svd_of_product(product).s, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("batch_values", "wanted"), [(1, [1, 1, 1, 1, 1]), (43, [1, 1, 1, 2]), (44, [2, 1, 2]), (66, [3, 2])]
)
def test_equal_shapes_go_together_as_far_as_they_fit(
    batch_values: int, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "BATCH_VALUES", batch_values)
    lengths = []

    def find(a: Tensor, b: Tensor) -> Svd:
        lengths.append(len(a))
        return svd_of_product(Factors(a, b))

    # 2 * (6 + 5) = 22 values each, then two without any: a product larger than a batch still gets one.
    products = [Case(2, 6, 5, seed).factors() for seed in range(3)]
    products[1:1] = [Factors(torch.ones(1, 1)[:0], torch.ones(1, 1)[:, :0])] * 2
    _svds_in_batches(find, products, "cpu")
    assert lengths == wanted


def test_products_of_one_shape_but_two_dtypes_keep_theirs() -> None:
    products = [Case(2, 6, 5, 0).factors(dtype) for dtype in (torch.float32, torch.float64, torch.float32)]
    for svds in (svds_of_products(products), _svds_in_batches(find_batch, products, "cpu")):
        assert [svd.u.dtype for svd in svds] == [product.a.dtype for product in products]


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6)])
def test_the_svds_of_many_matrices_are_those_of_each(shape: tuple[int, int]) -> None:
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(5))
    wanted = [svd_of_matrix(matrix) for matrix in stack]
    assert all(map(all_equal, svds_of_matrices(list(stack)), wanted))
    for got, one in zip(
        _svds_in_batches(svd_of_matrix, [(matrix,) for matrix in stack], "cpu"), wanted, strict=True
    ):
        assert all(torch.allclose(part, other, atol=1e-6) for part, other in zip(got, one, strict=True))


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_batches_are_for_devices_other_than_the_cpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []

    def note(find: object, items: list[object], device: str) -> list[Svd]:
        devices.append(device)
        return []

    monkeypatch.setattr(lowrank, "_svds_in_batches", note)
    product = Case(2, 6, 5, 0).factors()
    svds_of_products([product], device)
    svds_of_matrices([product.a], device)
    assert devices == ([] if device == "cpu" else [device, device])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sizes", [(64, 200, 100), (300, 200, 100), (64, 100, 200)])
def test_a_gpu_cuts_as_well_as_the_cpu(sizes: tuple[int, int, int]) -> None:
    products = [Case(*sizes, seed).factors(torch.float32) for seed in range(3)]
    for svd, product in zip(svds_of_products(products, "cuda"), products, strict=True):
        assert {part.device.type for part in svd} == {"cpu"}
        best = float(torch.linalg.svdvals(dense(product))[16:].square().sum().sqrt())
        assert norm(dense(product) - approximation(svd, 16)) == pytest.approx(best, rel=1e-5)


@WAYS
@LAWS
@given(case=CASES, dtype=DTYPES)
def test_triplets_are_orthonormal_falling_and_of_their_types(
    way: Way, case: Case, dtype: torch.dtype
) -> None:
    u, s, vt = way(case.factors(dtype))
    num_kept = len(s)
    assert min(case[:3]) <= num_kept <= min(case[1:3])
    assert (u.shape, vt.shape) == ((case.out_features, num_kept), (num_kept, case.in_features))
    assert (u.dtype, s.dtype, vt.dtype) == (dtype, torch.float64, dtype)
    assert s.tolist() == sorted(s.tolist(), reverse=True)
    for gram in (u.double().mT @ u.double(), vt.double() @ vt.double().mT):
        assert torch.allclose(gram, torch.eye(num_kept, dtype=torch.float64), atol=1e-6)


@WAYS
@LAWS
@given(case=CASES, dtype=DTYPES)
def test_the_largest_entry_of_each_right_vector_is_positive(way: Way, case: Case, dtype: torch.dtype) -> None:
    vt = way(case.factors(dtype)).vt
    assert bool((vt.max(dim=1).values >= vt.min(dim=1).values.abs()).all())


@pytest.mark.parametrize("lora_rank", [3, 9])
def test_the_factorisation_does_not_show_in_the_signs(lora_rank: int) -> None:
    factors = Case(lora_rank, 6, 5, 3).factors()
    one, other = svd_of_product(factors), svd_of_product(Factors(-2 * factors.a, -factors.b / 2))
    for got, wanted in zip(other, one, strict=True):
        assert torch.allclose(got, wanted, atol=1e-10)


@pytest.mark.parametrize("lora_rank", [2, 7])
def test_a_zero_product_gives_zero_and_nothing_else(lora_rank: int) -> None:
    a = Case(lora_rank, 4, 5, 0).factors(torch.float32).a
    svd = svd_of_product(Factors(a, torch.zeros(4, lora_rank)))
    factors = factors_of(svd, 0, len(svd.s))
    assert float(svd.s.abs().max()) == 0
    assert bool(torch.isfinite(factors.a).all())
    assert float(factors.b.abs().max()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_doubled_directions_leave_half_of_the_singular_values_at_zero(dtype: torch.dtype) -> None:
    factors = Case(3, 9, 8, 5).factors(dtype)
    doubled = svd_of_product(stack_weighted([factors, factors], [0.25, 0.75]))
    exact = torch.linalg.svdvals(dense(factors))
    assert doubled.s[:3].tolist() == pytest.approx(exact[:3].tolist(), rel=1e-5)
    assert float(doubled.s[3:].max()) <= 1e-5 * float(exact[0])


@LAWS
@given(CASES, CASES, DTYPES)
def test_energies_are_those_of_the_dense_products(case: Case, like: Case, dtype: torch.dtype) -> None:
    one = case.factors(dtype)
    other = case._replace(lora_rank=like.lora_rank, seed=like.seed).factors(dtype)
    assert energy(one) == pytest.approx(norm(dense(one)) ** 2, rel=1e-9)
    wanted = norm(dense(one) - dense(other)) ** 2
    assert error_energy(one, other) == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    assert 0 <= error_energy(one, one) <= 1e-12 * energy(one)


def test_hand_sized_energy() -> None:
    one = Factors(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]]))
    other = Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0], [1.0]]))
    assert (energy(one), energy(other), error_energy(one, other)) == pytest.approx((45, 10, 37))


@LAWS
@given(CASES, st.integers(0, 9), DTYPES)
def test_halves_recombine(case: Case, place: int, dtype: torch.dtype) -> None:
    factors = case.factors(dtype)
    svd = svd_of_product(factors)
    middle = min(place, len(svd.s))
    halves = [factors_of(svd, 0, middle), factors_of(svd, middle, len(svd.s))]
    assert [half.lora_rank for half in halves] == [middle, len(svd.s) - middle]
    difference = norm(dense(concatenate(halves)) - dense(factors))
    assert difference <= (1e-5 if dtype == torch.float32 else 1e-12) * (1 + norm(dense(factors)))
    total = sum(energy(half) for half in halves)
    assert total == pytest.approx(energy(factors), rel=1e-5, abs=1e-5)


@LAWS
@given(CASES)
def test_rows_of_a_are_orthogonal_with_the_norm_that_lora_starts_with(case: Case) -> None:
    svd = svd_of_product(case.factors())
    a = factors_of(svd, 0, len(svd.s)).a
    wanted = INITIAL_ROW_NORM**2 * torch.eye(len(svd.s), dtype=torch.float64)
    assert torch.allclose(a @ a.mT, wanted, atol=1e-12)


@LAWS
@given(CASES, WEIGHTS, DTYPES)
def test_stacking_is_the_exact_weighted_sum(case: Case, weights: list[float], dtype: torch.dtype) -> None:
    clients = [case._replace(lora_rank=1 + k % case.lora_rank).factors(dtype, k) for k in range(len(weights))]
    stacked = stack_weighted(clients, weights)
    wanted = sum(weight * dense(client) for client, weight in zip(clients, weights, strict=True))
    assert stacked.lora_rank == sum(client.lora_rank for client in clients)
    assert stacked.a.dtype == stacked.b.dtype == dtype
    size = sum(weight * norm(dense(client)) for client, weight in zip(clients, weights, strict=True))
    assert norm(dense(stacked) - wanted) <= (1e-6 if dtype == torch.float32 else 1e-12) * size


def test_concatenation_adds_products() -> None:
    parts = [Case(lora_rank, 5, 4, 1).factors(number=lora_rank) for lora_rank in (1, 3, 2)]
    joined = concatenate(parts)
    assert joined.lora_rank == 6
    assert torch.allclose(dense(joined), dense(parts[0]) + dense(parts[1]) + dense(parts[2]))
