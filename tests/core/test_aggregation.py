from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpifedlora.core.aggregation import (
    AGGREGATORS,
    ModuleAggregate,
    factors,
    normalise,
    product,
    weighted_mean,
)
from mpifedlora.core.layout import Factors
from mpifedlora.core.lowrank import concatenate, energy, stack_weighted
from mpifedlora.errors import AggregationError

LAWS = settings(max_examples=25, deadline=None)
NUMBERS = st.lists(st.integers(1, 500), min_size=1, max_size=5)


class Cohort(NamedTuple):
    """Clients of one LoRA rank, weights, and the ranks of a cut."""

    clients: list[Factors]
    weights: list[float]
    kept_rank: int
    active_rank: int

    @property
    def lora_rank(self) -> int:
        return self.clients[0].lora_rank

    @property
    def largest_rank(self) -> int:
        return min(self.clients[0].a.shape[1], self.clients[0].b.shape[0])

    def exact(self) -> Tensor:
        return weighted_sum(self.clients, self.weights)


@st.composite
def cohorts(draw: st.DrawFn) -> Cohort:
    sizes = [draw(st.integers(2, 9)), draw(st.integers(2, 9))]
    lora_rank = draw(st.integers(1, min(*sizes, 4)))
    numbers = draw(NUMBERS)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    clients = [random_factors(lora_rank, sizes, generator) for _ in numbers]
    kept_rank = draw(st.integers(1, lora_rank))
    return Cohort(clients, normalise(numbers), kept_rank, draw(st.integers(1, kept_rank)))


def random_factors(lora_rank: int, sizes: Sequence[int], generator: torch.Generator) -> Factors:
    a = torch.randn(lora_rank, sizes[1], generator=generator, dtype=torch.float64)
    return Factors(a, torch.randn(sizes[0], lora_rank, generator=generator, dtype=torch.float64))


def dense(part: Factors) -> Tensor:
    return part.b.double() @ part.a.double()


def sent(aggregate: ModuleAggregate) -> Tensor:
    return dense(aggregate.active) + dense(aggregate.frozen)


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix))


def weighted_sum(clients: Sequence[Factors], weights: Sequence[float]) -> Tensor:
    products = torch.stack([dense(client) for client in clients])
    return (torch.tensor(weights, dtype=torch.float64)[:, None, None] * products).sum(0)


def best_error(matrix: Tensor, kept_rank: int) -> float:
    return float(torch.linalg.svdvals(matrix)[kept_rank:].square().sum().sqrt())


def energies(aggregate: ModuleAggregate) -> tuple[float, float, float]:
    return aggregate.exact_energy, aggregate.error_energy, aggregate.dropped_energy


def mean_of_factors(cohort: Cohort) -> Factors:
    weights = torch.tensor(cohort.weights, dtype=torch.float64)[:, None, None]
    a = (weights * torch.stack([client.a for client in cohort.clients])).sum(0)
    return Factors(a, (weights * torch.stack([client.b for client in cohort.clients])).sum(0))


@LAWS
@given(cohorts())
def test_product_is_exact_where_the_rank_suffices(cohort: Cohort) -> None:
    enough = min(cohort.lora_rank * len(cohort.clients), cohort.largest_rank)
    aggregate = product(cohort.clients, cohort.weights, enough, cohort.active_rank)
    assert norm(sent(aggregate) - cohort.exact()) <= 1e-6 * norm(cohort.exact())
    assert aggregate.error_energy == aggregate.dropped_energy == 0


@LAWS
@given(cohorts())
def test_product_cuts_like_the_dense_svd(cohort: Cohort) -> None:
    aggregate = product(*cohort)
    error, best = norm(sent(aggregate) - cohort.exact()), best_error(cohort.exact(), cohort.kept_rank)
    assert error == pytest.approx(best, rel=1e-5, abs=1e-9)
    assert math.sqrt(aggregate.error_energy) == pytest.approx(best, rel=1e-5, abs=1e-9)


@LAWS
@given(cohorts())
def test_the_active_part_is_itself_the_best_of_its_rank(cohort: Cohort) -> None:
    active = dense(product(*cohort).active)
    best = best_error(cohort.exact(), cohort.active_rank)
    assert norm(active - cohort.exact()) == pytest.approx(best, rel=1e-5, abs=1e-9)


@LAWS
@given(cohorts())
def test_kept_and_dropped_energy_add_up(cohort: Cohort) -> None:
    aggregate = product(*cohort)
    kept = energy(aggregate.active) + energy(aggregate.frozen)
    assert kept + aggregate.dropped_energy == pytest.approx(aggregate.exact_energy, rel=1e-9)
    assert aggregate.exact_energy == pytest.approx(norm(cohort.exact()) ** 2, rel=1e-9)


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
@LAWS
@given(cohorts())
def test_ranks_are_those_asked_for(name: str, cohort: Cohort) -> None:
    aggregate = AGGREGATORS[name](*cohort._replace(kept_rank=cohort.lora_rank))
    assert aggregate.active.lora_rank == cohort.active_rank
    assert aggregate.frozen.lora_rank == cohort.lora_rank - cohort.active_rank


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
@LAWS
@given(cohorts(), st.randoms(use_true_random=False))
def test_the_order_of_clients_does_not_matter(name: str, cohort: Cohort, random: Random) -> None:
    order = random.sample(range(len(cohort.clients)), len(cohort.clients))
    mixed = cohort._replace(
        clients=[cohort.clients[place] for place in order], weights=[cohort.weights[place] for place in order]
    )
    one, other = AGGREGATORS[name](*cohort), AGGREGATORS[name](*mixed)
    assert energies(other) == pytest.approx(energies(one), rel=1e-6, abs=1e-9)
    # By error: at tied singular values the matrices themselves may differ.
    errors = [norm(sent(aggregate) - cohort.exact()) for aggregate in (one, other)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", sorted(AGGREGATORS))
@LAWS
@given(cohorts())
def test_equal_clients_give_that_client(name: str, cohort: Cohort) -> None:
    same = cohort._replace(clients=[cohort.clients[0]] * len(cohort.clients), kept_rank=cohort.lora_rank)
    aggregate = AGGREGATORS[name](*same)
    wanted = dense(cohort.clients[0])
    assert norm(sent(aggregate) - wanted) <= 1e-9 * norm(wanted)
    assert aggregate.error_energy <= 1e-9 * aggregate.exact_energy


@LAWS
@given(cohorts())
def test_partial_sums_give_the_same_product(cohort: Cohort) -> None:
    middle = len(cohort.clients) // 2
    halves = zip(
        (cohort.clients[:middle], cohort.clients[middle:]),
        (cohort.weights[:middle], cohort.weights[middle:]),
        strict=True,
    )
    parts = [stack_weighted(*half) for half in halves if half[0]]
    whole, joined = product(*cohort), product(parts, [1.0] * len(parts), *cohort[2:])
    assert energies(joined) == pytest.approx(energies(whole), rel=1e-6, abs=1e-9)


def test_product_takes_clients_of_several_ranks() -> None:
    generator = torch.Generator().manual_seed(0)
    clients = [random_factors(lora_rank, (6, 7), generator) for lora_rank in (1, 3, 2)]
    aggregate = product(clients, [0.5, 0.3, 0.2], 6, 2)
    assert torch.allclose(sent(aggregate), weighted_sum(clients, [0.5, 0.3, 0.2]))


def test_tied_singular_values_are_cut_at_the_same_price() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    clients = [Factors(eye[:2], eye[:, :2]), Factors(eye[2:4], eye[:, 2:4])]
    aggregate = product(clients, [0.5, 0.5], 2, 1)
    assert norm(sent(aggregate) - weighted_sum(clients, [0.5, 0.5])) == pytest.approx(math.sqrt(0.5))
    assert energies(aggregate) == pytest.approx((1.0, 0.5, 0.5))


def test_product_of_nothing_learnt_is_nothing() -> None:
    clients = [Factors(torch.ones(2, 5), torch.zeros(4, 2))] * 3
    aggregate = product(clients, [0.2, 0.3, 0.5], 2, 1)
    assert (float(sent(aggregate).abs().max()), energies(aggregate)) == (0, (0, 0, 0))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_product_in_float32_is_as_good_as_its_numbers(scale: float) -> None:
    generator = torch.Generator().manual_seed(1)
    clients = [
        Factors(*(part.float() * scale for part in random_factors(4, (40, 30), generator))) for _ in range(5)
    ]
    weights = normalise([1, 2, 3, 4, 5])
    exact = weighted_sum(clients, weights)
    aggregate = product(clients, weights, 4, 2)
    assert aggregate.active.a.dtype == aggregate.frozen.b.dtype == torch.float32
    assert norm(sent(aggregate) - exact) == pytest.approx(best_error(exact, 4), rel=1e-5)


@LAWS
@given(cohorts())
def test_factors_are_averaged_apart(cohort: Cohort) -> None:
    whole = cohort._replace(kept_rank=cohort.lora_rank, active_rank=cohort.lora_rank)
    aggregate, mean = factors(*whole), mean_of_factors(cohort)
    assert torch.allclose(aggregate.active.a, mean.a)
    assert torch.allclose(aggregate.active.b, mean.b)
    assert (aggregate.frozen.lora_rank, aggregate.dropped_energy) == (0, 0)


@LAWS
@given(cohorts())
def test_the_bias_of_factors_is_reported(cohort: Cohort) -> None:
    aggregate = factors(*cohort)
    exact = cohort.exact()
    size = norm(exact) ** 2 + energy(mean_of_factors(cohort))
    assert aggregate.error_energy == pytest.approx(
        norm(sent(aggregate) - exact) ** 2, rel=1e-6, abs=1e-9 * size
    )
    assert aggregate.exact_energy == pytest.approx(norm(exact) ** 2, rel=1e-9)


@LAWS
@given(cohorts())
def test_factors_cut_the_product_of_the_means(cohort: Cohort) -> None:
    if cohort.active_rank == cohort.lora_rank:
        return
    aggregate, mean = factors(*cohort), dense(mean_of_factors(cohort))
    best = best_error(mean, cohort.kept_rank)
    assert norm(sent(aggregate) - mean) == pytest.approx(best, rel=1e-5, abs=1e-9)
    assert aggregate.dropped_energy == pytest.approx(best**2, rel=1e-5, abs=1e-9)
    assert energy(concatenate([aggregate.active, aggregate.frozen])) + aggregate.dropped_energy == (
        pytest.approx(norm(mean) ** 2, rel=1e-6)
    )


def test_hand_sized_bias_of_factors() -> None:
    # Clients 1 * 1 and 3 * 3: the exact mean is 5, mean(B) mean(A) is 4.
    clients = [Factors(torch.full((1, 1), value), torch.full((1, 1), value)) for value in (1.0, 3.0)]
    biased, exact = factors(clients, [0.5, 0.5], 1, 1), product(clients, [0.5, 0.5], 1, 1)
    assert (float(sent(biased)), energies(biased)) == (4.0, pytest.approx((25.0, 1.0, 0.0)))
    assert (float(sent(exact)), exact.exact_energy) == (pytest.approx(5.0), pytest.approx(25.0))


@LAWS
@given(NUMBERS, st.floats(1e-6, 1e6))
def test_only_the_shares_of_weights_matter(numbers: list[int], scale: float) -> None:
    weights = normalise(numbers)
    assert sum(weights) == pytest.approx(1, rel=1e-12)
    assert normalise([scale * number for number in numbers]) == pytest.approx(weights, rel=1e-12)


@LAWS
@given(cohorts(), st.sampled_from(sorted(AGGREGATORS)))
def test_weights_in_other_units_change_nothing(cohort: Cohort, name: str) -> None:
    other = cohort._replace(weights=normalise([1000 * weight for weight in cohort.weights]))
    wanted = energies(AGGREGATORS[name](*cohort))
    assert energies(AGGREGATORS[name](*other)) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("weights", [[], [0, 0], [-1, 1], [-2, 1], [math.inf, 1], [math.nan, 1]])
def test_weights_without_a_positive_finite_sum_are_refused(weights: list[float]) -> None:
    with pytest.raises(AggregationError, match=r"weights must have a positive finite sum, got .*; leave out"):
        normalise(weights)


def test_hand_sized_weights() -> None:
    assert normalise([1, 3]) == [0.25, 0.75]


@LAWS
@given(NUMBERS, st.integers(0, 20), st.integers(0, 10**6))
def test_weighted_mean_lies_among_the_values(numbers: list[int], num_values: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(num_values, generator=generator) for _ in numbers]
    out = torch.full((num_values,), math.nan)
    mean = weighted_mean(values, normalise(numbers), out)
    stacked = torch.stack(values)
    wanted = (torch.tensor(normalise(numbers))[:, None] * stacked).sum(0)
    assert mean is out
    assert torch.allclose(mean, wanted, atol=1e-5)
    assert bool((mean <= stacked.amax(0) + 1e-5).all() and (mean >= stacked.amin(0) - 1e-5).all())


def test_hand_sized_weighted_mean() -> None:
    values = [torch.tensor([4.0, 0.0]), torch.tensor([8.0, -4.0])]
    assert weighted_mean(values, [0.25, 0.75], torch.empty(2)).tolist() == [7.0, -3.0]
    assert values[0].tolist() == [4.0, 0.0]
