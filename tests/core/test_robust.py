from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpifedlora.core import robust
from mpifedlora.core.aggregation import normalise, weighted_mean
from mpifedlora.core.layout import Factors
from mpifedlora.core.robust import (
    combine_products,
    coordinate_median,
    gram_of_products,
    gram_of_values,
    krum,
    smallest_cohort,
    squared_distances,
    trimmed_mean,
    update_norm,
)
from mpifedlora.errors import AggregationError

LAWS = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 10**6)
BAD = [1e30, -1e30, math.inf, -math.inf, math.nan]


@pytest.fixture(autouse=True, scope="module")
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(robust, "CHUNK", 7)
        yield


class Cohort(NamedTuple):
    """Clients of several LoRA ranks: clients[k][m] is client k's factors of module m."""

    clients: list[list[Factors]]
    generator: torch.Generator

    def dense(self) -> Tensor:
        """Each client's products, all modules in one row."""
        return torch.stack([torch.cat([dense(part).flatten() for part in parts]) for parts in self.clients])

    def in_another_basis(self) -> list[list[Factors]]:
        return [[change_basis(part, self.generator) for part in parts] for parts in self.clients]


@st.composite
def cohorts(draw: st.DrawFn, num_modules: int | None = None) -> Cohort:
    generator = torch.Generator().manual_seed(draw(SEEDS))
    sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
    many = st.lists(sizes, min_size=num_modules or 1, max_size=num_modules or 3)
    modules, num_clients = draw(many), draw(st.integers(1, 6))
    lora_ranks = st.integers(0 if num_modules is None else 1, 4)
    clients = [
        [random_factors(draw(lora_ranks), *size, generator) for size in modules] for _ in range(num_clients)
    ]
    return Cohort(clients, generator)


def random_factors(
    lora_rank: int, out_features: int, in_features: int, generator: torch.Generator
) -> Factors:
    a = torch.randn(lora_rank, in_features, generator=generator, dtype=torch.float64)
    return Factors(a, torch.randn(out_features, lora_rank, generator=generator, dtype=torch.float64))


def change_basis(part: Factors, generator: torch.Generator) -> Factors:
    random = torch.randn(part.lora_rank, part.lora_rank, generator=generator, dtype=torch.float64)
    # Orthogonal times 1, 2, 3 ...: far from the identity, and well conditioned.
    q = torch.linalg.qr(random).Q * torch.arange(1.0, part.lora_rank + 1)
    return Factors(q @ part.a, part.b @ torch.linalg.inv(q))


def dense(part: Factors) -> Tensor:
    return part.b.double() @ part.a.double()


def random_values(num_clients: int, num_values: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(num_clients, num_values, generator=generator))


def naive_distances(vectors: Tensor) -> Tensor:
    return (vectors[:, None] - vectors).square().sum(-1)


def naive_scores(distances: Sequence[Sequence[float]], num_byzantine: int) -> list[float]:
    num_near = len(distances) - num_byzantine - 2
    others = [[row[j] for j in range(len(row)) if j != i] for i, row in enumerate(distances)]
    return [sum(sorted(row)[:num_near]) for row in others]


def naive_trimmed(values: Sequence[Tensor], num_trimmed: int) -> list[float]:
    middles = [
        sorted(column)[num_trimmed : len(values) - num_trimmed]
        for column in zip(*[value.tolist() for value in values], strict=True)
    ]
    return [math.fsum(middle) / len(middle) for middle in middles]


def naive_median(values: Sequence[Tensor]) -> list[float]:
    columns = [sorted(column) for column in zip(*[value.tolist() for value in values], strict=True)]
    half = len(values) // 2
    return [column[half] if len(values) % 2 else (column[half - 1] + column[half]) / 2 for column in columns]


def median(values: Sequence[Tensor]) -> Tensor:
    out = torch.full_like(values[0], math.nan)
    assert coordinate_median(values, [], out) is out
    return out


def trimmed(values: Sequence[Tensor], num_trimmed: int) -> Tensor:
    out = torch.full_like(values[0], math.nan)
    assert trimmed_mean(num_trimmed)(values, [], out) is out
    return out


@LAWS
@given(cohorts())
def test_gram_of_products_is_that_of_the_dense_products(cohort: Cohort) -> None:
    gram, vectors = gram_of_products(cohort.clients), cohort.dense()
    assert gram.dtype == torch.float64
    assert torch.allclose(gram, vectors @ vectors.mT, rtol=1e-9, atol=1e-9)


@LAWS
@given(cohorts())
def test_gram_of_products_does_not_see_the_basis(cohort: Cohort) -> None:
    wanted = gram_of_products(cohort.clients)
    assert torch.allclose(gram_of_products(cohort.in_another_basis()), wanted, rtol=1e-9, atol=1e-9)


def test_hand_sized_gram_of_products() -> None:
    # One module with products [[2, 4]] and [[3, 0]], one with [[5]] and [[1 * 2 + 3 * 4]] = [[14]].
    clients = [
        [
            Factors(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0]])),
            Factors(torch.tensor([[5.0]]), torch.tensor([[1.0]])),
        ],
        [
            Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0]])),
            Factors(torch.tensor([[2.0], [4.0]]), torch.tensor([[1.0, 3.0]])),
        ],
    ]
    assert gram_of_products(clients).tolist() == [[45.0, 76.0], [76.0, 205.0]]


def test_without_modules_all_products_are_zero() -> None:
    assert gram_of_products([[], [], []]).tolist() == [[0.0] * 3] * 3


@LAWS
@given(st.integers(1, 5), st.integers(0, 30), SEEDS)
def test_gram_of_values_is_that_of_the_whole_vectors(num_clients: int, num_values: int, seed: int) -> None:
    values = random_values(num_clients, num_values, seed)
    vectors = torch.stack(values).double()
    gram = gram_of_values(values)
    assert gram.dtype == torch.float64
    assert torch.allclose(gram, vectors @ vectors.mT, rtol=1e-12, atol=1e-12)


def test_gram_of_values_sums_in_float64() -> None:
    # 1 is lost beside 2**30 in float32.
    values = [torch.tensor([2.0**15, 1.0]), torch.tensor([2.0**15, -1.0])]
    assert gram_of_values(values).tolist() == [[2**30 + 1, 2**30 - 1], [2**30 - 1, 2**30 + 1]]


@LAWS
@given(cohorts())
def test_distances_are_those_of_the_dense_products(cohort: Cohort) -> None:
    distances, wanted = squared_distances(gram_of_products(cohort.clients)), naive_distances(cohort.dense())
    assert torch.allclose(distances, wanted, rtol=1e-9, atol=1e-9)


@LAWS
@given(st.integers(1, 6), st.integers(0, 30), SEEDS)
def test_distances_are_a_symmetric_matrix_without_negative_ones(
    num_clients: int, num_values: int, seed: int
) -> None:
    # Equal to six digits: the rounding errors are as large as the distances.
    shared = 1e4 + random_values(1, num_values, seed)[0]
    values = [shared + 1e-2 * value for value in random_values(num_clients, num_values, seed)]
    distances = squared_distances(gram_of_values(values))
    assert torch.equal(distances, distances.mT)
    assert bool((distances >= 0).all())
    assert distances.diagonal().tolist() == [0] * num_clients


def test_rounding_cannot_make_a_distance_negative_or_one_sided() -> None:
    gram = torch.tensor([[1.0, 1.25, 0.5], [1.5, 1.0, 0.25], [0.75, 0.25, 2.0]], dtype=torch.float64)
    assert squared_distances(gram).tolist() == [[0, 0, 1.75], [0, 0, 2.5], [1.75, 2.5, 0]]


def test_small_distances_survive_where_the_shared_model_is_taken_off() -> None:
    generator = torch.Generator().manual_seed(0)
    model = random_factors(3, 20, 30, generator)
    steps = [random_factors(3, 20, 30, generator) for _ in range(4)]
    clients = [Factors(model.a + 1e-7 * step.a, model.b + 1e-7 * step.b) for step in steps]
    exact = naive_distances(torch.stack([dense(client) - dense(model) for client in clients]).flatten(1))
    updates = [
        [Factors(torch.cat([client.a, client.a - model.a]), torch.cat([client.b - model.b, model.b], dim=1))]
        for client in clients
    ]
    assert torch.allclose(squared_distances(gram_of_products(updates)), exact, rtol=1e-6, atol=0)
    lost = squared_distances(gram_of_products([[client] for client in clients]))
    assert not torch.allclose(lost, exact, rtol=1e-3, atol=0)


@st.composite
def distance_matrices(draw: st.DrawFn) -> tuple[Tensor, int]:
    num_byzantine = draw(st.integers(0, 2))
    num_clients = smallest_cohort(num_byzantine) + draw(st.integers(0, 3))
    # Small whole numbers: exact sums, and many ties.
    generator = torch.Generator().manual_seed(draw(SEEDS))
    upper = torch.randint(0, draw(st.sampled_from((3, 1000))), (num_clients,) * 2, generator=generator).triu(
        1
    )
    return (upper + upper.mT).double(), num_byzantine


@LAWS
@given(distance_matrices(), st.data())
def test_krum_takes_the_smallest_scores_and_the_lower_index_at_ties(
    case: tuple[Tensor, int], data: st.DataObject
) -> None:
    distances, num_byzantine = case
    num_chosen = data.draw(st.integers(1, len(distances) - num_byzantine))
    scores = naive_scores(distances.tolist(), num_byzantine)
    wanted = sorted(sorted(range(len(scores)), key=lambda client: (scores[client], client))[:num_chosen])
    assert krum(distances, num_byzantine, num_chosen) == tuple(wanted)


@LAWS
@given(distance_matrices(), st.randoms(use_true_random=False), st.data())
def test_krum_does_not_see_the_order_of_clients(
    case: tuple[Tensor, int], random: Random, data: st.DataObject
) -> None:
    distances, num_byzantine = case
    num_chosen = data.draw(st.integers(1, len(distances) - num_byzantine))
    order = random.sample(range(len(distances)), len(distances))
    chosen = krum(distances, num_byzantine, num_chosen)
    moved = sorted(order[place] for place in krum(distances[order][:, order], num_byzantine, num_chosen))
    scores = naive_scores(distances.tolist(), num_byzantine)
    # Clients with equal scores may stand for each other, no others.
    assert sorted(scores[client] for client in moved) == sorted(scores[client] for client in chosen)


def test_hand_sized_krum() -> None:
    # Two nearest others of each, K - f - 2 = 2: 0: 1 + 4; 1: 1 + 1; 2: 1 + 4; 50: 46**2 + 48**2; 4: 4 + 9.
    line = torch.tensor([0.0, 1.0, 2.0, 50.0, 4.0], dtype=torch.float64)
    distances = naive_distances(line[:, None])
    assert naive_scores(distances.tolist(), 1) == [5, 2, 5, 46**2 + 48**2, 13]
    assert [krum(distances, 1, num_chosen) for num_chosen in range(1, 5)] == [
        (1,), (0, 1), (0, 1, 2), (0, 1, 2, 4),
    ]  # fmt: skip


@LAWS
@given(st.integers(1, 3), st.sampled_from(BAD), st.booleans(), SEEDS)
def test_krum_never_chooses_what_lies_far_off(
    num_byzantine: int, bad: float, is_one_place: bool, seed: int
) -> None:
    num_clients = smallest_cohort(num_byzantine)
    values = random_values(num_clients, 20, seed)
    liars = Random(seed).sample(range(num_clients), num_byzantine)
    for number, liar in enumerate(liars):
        # One coordinate each, so that the liars do not stand together; or whole updates.
        values[liar][number if is_one_place else slice(None)] = bad * (1 + number)
    honest = set(range(num_clients)) - set(liars)
    distances = squared_distances(gram_of_values(values))
    assert set(krum(distances, num_byzantine, num_clients - num_byzantine)) == honest
    assert set(krum(distances, num_byzantine, 1)) < honest


@pytest.mark.parametrize("bad", BAD)
def test_one_client_that_is_not_finite_spoils_only_its_own_distances(bad: float) -> None:
    generator = torch.Generator().manual_seed(4)
    clients = [[random_factors(2, 5, 6, generator)] for _ in range(5)]
    clients[2][0].b[3, 1] = bad
    distances = squared_distances(gram_of_products(clients))
    honest = [0, 1, 3, 4]
    wanted = naive_distances(torch.stack([dense(clients[k][0]).flatten() for k in honest]))
    assert torch.allclose(distances[honest][:, honest], wanted)
    assert distances.diagonal().tolist() == [0] * 5
    assert krum(distances, 1, 4) == (0, 1, 3, 4)


@LAWS
@given(st.integers(0, 2), SEEDS)
def test_krum_does_not_see_the_basis(num_byzantine: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # One client more than needed: with one neighbour each, the nearest pair would tie.
    num_clients = smallest_cohort(num_byzantine) + 1
    cohort = Cohort([[random_factors(2, 5, 6, generator)] for _ in range(num_clients)], generator)
    one, other = (
        squared_distances(gram_of_products(clients))
        for clients in (cohort.clients, cohort.in_another_basis())
    )
    for num_chosen in range(1, num_clients - num_byzantine + 1):
        assert krum(one, num_byzantine, num_chosen) == krum(other, num_byzantine, num_chosen)


def test_krum_of_equal_clients_takes_the_first() -> None:
    assert krum(torch.zeros(5, 5), 1, 1) == (0,)
    assert krum(torch.zeros(5, 5), 1, 4) == (0, 1, 2, 3)


@pytest.mark.parametrize("num_byzantine", [0, 1, 2])
def test_krum_needs_two_f_and_three_clients(num_byzantine: int) -> None:
    num_clients = 2 * num_byzantine + 3
    assert smallest_cohort(num_byzantine) == num_clients
    assert krum(torch.zeros(num_clients, num_clients), num_byzantine, 1) == (0,)
    message = (
        rf"Krum against {num_byzantine} arbitrary clients must have at least {num_clients} updates "
        rf"\(2 f \+ 3\), got {num_clients - 1}; take a larger cohort"
    )
    with pytest.raises(AggregationError, match=message):
        krum(torch.zeros(num_clients - 1, num_clients - 1), num_byzantine, 1)


@pytest.mark.parametrize("num_chosen", [-1, 0, 5, 6])
def test_krum_chooses_no_more_than_are_honest(num_chosen: int) -> None:
    message = rf"must choose 1 to 4 of 5 updates, 1 of them arbitrary, got {num_chosen}; choose fewer"
    with pytest.raises(AggregationError, match=message):
        krum(torch.zeros(5, 5), 1, num_chosen)


@LAWS
@given(st.integers(1, 7), st.integers(0, 30), SEEDS)
def test_median_is_that_of_each_coordinate(num_clients: int, num_values: int, seed: int) -> None:
    values = random_values(num_clients, num_values, seed)
    assert torch.equal(median(values), torch.tensor(naive_median(values)))


@LAWS
@given(st.integers(0, 3), st.integers(1, 4), st.integers(0, 30), SEEDS)
def test_trimmed_mean_is_that_of_each_coordinate(
    num_trimmed: int, num_kept: int, num_values: int, seed: int
) -> None:
    values = random_values(2 * num_trimmed + num_kept, num_values, seed)
    wanted = torch.tensor(naive_trimmed(values, num_trimmed))
    assert torch.allclose(trimmed(values, num_trimmed), wanted, rtol=2e-7, atol=1e-12)


def test_hand_sized_median_and_trimmed_mean() -> None:
    values = [torch.tensor(value) for value in ([1.0, 9.0], [5.0, -2.0], [2.0, 0.0], [-8.0, 1.0])]
    assert median(values).tolist() == [1.5, 0.5]
    assert median(values[:3]).tolist() == [2.0, 0.0]
    assert trimmed(values, 1).tolist() == [1.5, 0.5]
    assert trimmed(values[:3], 1).tolist() == [2.0, 0.0]
    assert trimmed(values, 0).tolist() == [0.0, 2.0]
    assert values[3].tolist() == [-8.0, 1.0]


@LAWS
@given(st.integers(1, 6), SEEDS)
def test_a_trimmed_mean_without_trimming_is_the_mean(num_clients: int, seed: int) -> None:
    values = random_values(num_clients, 20, seed)
    mean = weighted_mean(values, normalise([1] * num_clients), torch.empty(20))
    assert torch.allclose(trimmed(values, 0), mean, atol=1e-6)


@LAWS
@given(st.integers(1, 7), st.randoms(use_true_random=False), SEEDS)
def test_median_and_trimmed_mean_do_not_see_the_order_of_clients(
    num_clients: int, random: Random, seed: int
) -> None:
    values = random_values(num_clients, 20, seed)
    mixed = random.sample(values, num_clients)
    num_trimmed = random.randint(0, (num_clients - 1) // 2)
    assert torch.equal(median(mixed), median(values))
    assert torch.equal(trimmed(mixed, num_trimmed), trimmed(values, num_trimmed))


@LAWS
@given(st.integers(1, 7), SEEDS)
def test_median_and_trimmed_mean_of_equal_clients_are_that_client(num_clients: int, seed: int) -> None:
    values = random_values(1, 20, seed) * num_clients
    assert torch.equal(median(values), values[0])
    for num_trimmed in range((num_clients + 1) // 2):
        assert torch.equal(trimmed(values, num_trimmed), values[0])


@LAWS
@given(st.integers(1, 3), st.integers(1, 3), st.sampled_from(BAD), SEEDS)
def test_arbitrary_clients_move_no_coordinate_out_of_the_honest_range(
    num_byzantine: int, num_more: int, bad: float, seed: int
) -> None:
    honest = random_values(num_byzantine + num_more, 20, seed)
    values = [*honest, *[torch.full((20,), bad) for _ in range(num_byzantine)]]
    low, high = torch.stack(honest).amin(0), torch.stack(honest).amax(0)
    for combined in (median(values), trimmed(values, num_byzantine)):
        assert bool((low <= combined).all() and (combined <= high).all())


def test_nan_counts_as_the_largest_value() -> None:
    values = [torch.tensor([value]) for value in (math.nan, 1.0, 3.0)]
    assert median(values).tolist() == trimmed(values, 1).tolist() == [3.0]


def test_tensors_keep_their_shape_and_need_not_be_contiguous() -> None:
    values = [torch.arange(12.0).view(4, 3).mT * sign for sign in (1, -1, 3)]
    out = torch.empty(3, 4)
    assert torch.equal(coordinate_median(values, [], out), values[0])
    assert torch.equal(trimmed_mean(1)(values, [], out), values[0])


@pytest.mark.parametrize("num_trimmed", [1, 2])
def test_a_trimmed_mean_must_keep_something(num_trimmed: int) -> None:
    values = [torch.ones(3)] * (2 * num_trimmed)
    message = (
        rf"without the {num_trimmed} smallest and {num_trimmed} largest values must have more than "
        rf"{2 * num_trimmed} updates, got {2 * num_trimmed}; take a larger cohort or trim fewer"
    )
    with pytest.raises(AggregationError, match=message):
        trimmed(values, num_trimmed)
    assert trimmed([*values, torch.ones(3)], num_trimmed).tolist() == [1, 1, 1]


@LAWS
@given(cohorts(num_modules=1))
def test_products_are_combined_entry_by_entry(cohort: Cohort) -> None:
    clients = [parts[0] for parts in cohort.clients]
    products, weights = list(cohort.dense()), normalise(range(1, len(clients) + 1))
    for combiner in (coordinate_median, trimmed_mean((len(clients) - 1) // 2), weighted_mean):
        combined = combine_products(clients, weights, combiner)
        wanted = combiner(products, weights, torch.empty_like(products[0]))
        assert combined.shape == dense(clients[0]).shape
        assert torch.allclose(combined.flatten(), wanted, rtol=1e-9, atol=1e-9)


@LAWS
@given(cohorts(num_modules=1))
def test_combined_products_do_not_see_the_basis(cohort: Cohort) -> None:
    one, other = (
        combine_products([parts[0] for parts in clients], [], coordinate_median)
        for clients in (cohort.clients, cohort.in_another_basis())
    )
    assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def test_hand_sized_median_of_products() -> None:
    # Products [[1, 2], [3, 6]], [[2, 0], [0, 0]] and [[5, 5], [5, 5]].
    clients = [
        Factors(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [3.0]])),
        Factors(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0], [0.0]])),
        Factors(torch.ones(2, 2), torch.tensor([[2.0, 3.0], [4.0, 1.0]])),
    ]
    combined = combine_products(clients, [0.2, 0.3, 0.5], coordinate_median)
    assert (combined.dtype, combined.tolist()) == (torch.float32, [[2.0, 2.0], [3.0, 5.0]])


@pytest.mark.parametrize(("out_features", "in_features"), [(5, 3), (4, 10)])
def test_a_block_holds_no_more_than_a_chunk_or_one_row(out_features: int, in_features: int) -> None:
    sizes = []

    def count(values: Sequence[Tensor], weights: Sequence[float], out: Tensor) -> Tensor:
        sizes.append(len(out))
        return weighted_mean(values, weights, out)

    part = random_factors(2, out_features, in_features, torch.Generator().manual_seed(0))
    combined = combine_products([part, part], [0.5, 0.5], count)
    assert sizes == ([2, 2, 1] if in_features == 3 else [1, 1, 1, 1])
    assert torch.allclose(combined, dense(part))


@LAWS
@given(cohorts(), SEEDS)
def test_update_norm_is_that_of_the_dense_difference(cohort: Cohort, seed: int) -> None:
    client, reference = cohort.clients[0], cohort.clients[-1]
    head, reference_head = random_values(2, 5, seed)
    squares = sum(
        float((dense(part) - dense(other)).square().sum())
        for part, other in zip(client, reference, strict=True)
    ) + float((head.double() - reference_head.double()).square().sum())
    norm = update_norm(client, reference, head, reference_head)
    assert norm == pytest.approx(math.sqrt(squares), rel=1e-6)


def test_hand_sized_update_norm() -> None:
    # Products [[3, 6], [0, 0]] and [[3, 0], [1, 0]]: 36 + 1; head: 4 + 8 = 12. The root of 49.
    client = Factors(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]]))
    reference = Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0], [1.0]]))
    head, reference_head = torch.tensor([[5.0, 2.0], [0.0, 3.0]]), torch.tensor([[3.0, 0.0], [2.0, 3.0]])
    assert update_norm([client], [reference], head, reference_head) == pytest.approx(7.0)
    assert update_norm([client], [client], head, head) == 0
    assert update_norm([], [], torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])) == pytest.approx(5.0)
