from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpifedlora.core import aggregation
from mpifedlora.core.aggregation import (
    AGGREGATORS,
    ModuleAggregate,
    ModuleSum,
    decompose,
    frobenius_weights,
    normalise,
    residual,
    weighted_mean,
)
from mpifedlora.core.layout import Factors
from mpifedlora.core.lowrank import Svd, energy, stack_weighted, svd_of_matrix, svd_of_product
from mpifedlora.errors import AggregationError

LAWS = settings(max_examples=25, deadline=None)
NUMBERS = st.lists(st.integers(1, 500), min_size=1, max_size=5)
EACH = pytest.mark.parametrize("name", sorted(AGGREGATORS))
MEANS = pytest.mark.parametrize("name", ["factors", "zero-pad"])
EXACT = pytest.mark.parametrize("name", ["stack", "residual"])


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

    def uncut(self) -> Cohort:
        return self._replace(kept_rank=self.lora_rank, active_rank=self.lora_rank)

    def exact(self) -> Tensor:
        """The paper's sum of w_k B_k A_k, dense."""
        return weighted_sum([dense(client) for client in self.clients], self.weights)

    def mean(self) -> Factors:
        """FedIT's means of A and of B apart."""
        a = weighted_sum([client.a for client in self.clients], self.weights)
        return Factors(a, weighted_sum([client.b for client in self.clients], self.weights))

    def sum(self, name: str) -> ModuleSum:
        aggregator = AGGREGATORS[name]
        mean = self.mean() if aggregator.active == "mean" else None
        return ModuleSum(self.clients, self.weights, aggregator, mean)

    def cut(self, name: str) -> ModuleAggregate:
        return self.sum(name).cut(self.kept_rank, self.active_rank)

    def size(self) -> float:
        """Energy that rounding is measured against: what cancels may be larger than what is left."""
        return max(energy(client) for client in self.clients) + energy(self.mean())


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


def whole_factors(lora_rank: int, sizes: Sequence[int], generator: torch.Generator) -> Factors:
    """Factors of small whole numbers, of which sums and products have no rounding."""
    a = torch.randint(-9, 10, (lora_rank, sizes[1]), generator=generator).double()
    return Factors(a, torch.randint(-9, 10, (sizes[0], lora_rank), generator=generator).double())


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


def dense(part: Factors) -> Tensor:
    return part.b.double() @ part.a.double()


def sent(aggregate: ModuleAggregate) -> Tensor:
    return dense(aggregate.active) + dense(aggregate.frozen)


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix))


def weighted_sum(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    scales = torch.tensor(weights, dtype=torch.float64)[:, None, None]
    return (scales * torch.stack(list(values)).double()).sum(0)


def best_error(matrix: Tensor, kept_rank: int) -> float:
    return float(torch.linalg.svdvals(matrix)[kept_rank:].square().sum().sqrt())


def energies(aggregate: ModuleAggregate) -> tuple[float, float, float]:
    return aggregate.exact_energy, aggregate.error_energy, aggregate.dropped_energy


# Product (FlexLoRA, section 3): W = sum of w_k B_k A_k, then its best approximation of the rank.


@LAWS
@given(cohorts())
def test_product_is_exact_where_the_rank_suffices(cohort: Cohort) -> None:
    enough = min(cohort.lora_rank * len(cohort.clients), cohort.largest_rank)
    aggregate = cohort._replace(kept_rank=enough).cut("product")
    assert norm(sent(aggregate) - cohort.exact()) <= 1e-6 * norm(cohort.exact())
    assert aggregate.error_energy == aggregate.dropped_energy == 0


@LAWS
@given(cohorts())
def test_product_cuts_like_the_dense_svd(cohort: Cohort) -> None:
    aggregate = cohort.cut("product")
    error, best = norm(sent(aggregate) - cohort.exact()), best_error(cohort.exact(), cohort.kept_rank)
    assert error == pytest.approx(best, rel=1e-5, abs=1e-9)
    assert math.sqrt(aggregate.error_energy) == pytest.approx(best, rel=1e-5, abs=1e-9)


@LAWS
@given(cohorts())
def test_the_active_part_is_itself_the_best_of_its_rank(cohort: Cohort) -> None:
    active = dense(cohort.cut("product").active)
    best = best_error(cohort.exact(), cohort.active_rank)
    assert norm(active - cohort.exact()) == pytest.approx(best, rel=1e-5, abs=1e-9)


def test_product_takes_clients_of_several_ranks() -> None:
    generator = torch.Generator().manual_seed(0)
    clients = [random_factors(lora_rank, (6, 7), generator) for lora_rank in (1, 3, 2)]
    cohort = Cohort(clients, [0.5, 0.3, 0.2], 6, 2)
    assert torch.allclose(sent(cohort.cut("product")), cohort.exact())


def test_tied_singular_values_are_cut_at_the_same_price() -> None:
    eye = torch.eye(6, dtype=torch.float64)
    clients = [Factors(eye[:2], eye[:, :2]), Factors(eye[2:4], eye[:, 2:4])]
    cohort = Cohort(clients, [0.5, 0.5], 2, 1)
    aggregate = cohort.cut("product")
    assert norm(sent(aggregate) - cohort.exact()) == pytest.approx(math.sqrt(0.5))
    assert energies(aggregate) == pytest.approx((1.0, 0.5, 0.5))


def test_product_of_nothing_learnt_is_nothing() -> None:
    cohort = Cohort([Factors(torch.ones(2, 5), torch.zeros(4, 2))] * 3, [0.2, 0.3, 0.5], 2, 1)
    aggregate = cohort.cut("product")
    assert (float(sent(aggregate).abs().max()), energies(aggregate)) == (0, (0, 0, 0))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("num_clients", [5, 12])  # 20 and 48 directions: by factors, and dense
def test_product_in_float32_is_as_good_as_its_numbers(scale: float, num_clients: int) -> None:
    generator = torch.Generator().manual_seed(1)
    clients = [
        Factors(*(part.float() * scale for part in random_factors(4, (40, 30), generator)))
        for _ in range(num_clients)
    ]
    cohort = Cohort(clients, normalise(range(1, num_clients + 1)), 4, 2)
    aggregate = cohort.cut("product")
    assert aggregate.active.a.dtype == aggregate.frozen.b.dtype == torch.float32
    assert norm(sent(aggregate) - cohort.exact()) == pytest.approx(best_error(cohort.exact(), 4), rel=1e-5)


# A robust combination of the products stands in for their sum.


@LAWS
@given(cohorts())
def test_a_robust_combination_is_cut_like_the_dense_svd_and_judged_by_the_exact_sum(cohort: Cohort) -> None:
    robust = torch.stack([dense(client) for client in cohort.clients]).median(0).values
    module = ModuleSum(cohort.clients, cohort.weights, AGGREGATORS["product"], dense=robust)
    aggregate, exact = module.cut(cohort.kept_rank, cohort.active_rank), cohort.exact()
    best = best_error(robust, cohort.kept_rank)
    assert norm(sent(aggregate) - robust) == pytest.approx(best, rel=1e-5, abs=1e-9)
    wanted = (norm(exact) ** 2, norm(sent(aggregate) - exact) ** 2, best**2)
    assert energies(aggregate) == pytest.approx(wanted, rel=1e-6, abs=1e-9 * cohort.size())


# Factors (FedIT): A = sum of w_k A_k and B = sum of w_k B_k.


@MEANS
@LAWS
@given(cohort=cohorts())
def test_factors_are_averaged_apart(name: str, cohort: Cohort) -> None:
    aggregate, mean = cohort.uncut().cut(name), cohort.mean()
    assert torch.equal(aggregate.active.a, mean.a)
    assert torch.equal(aggregate.active.b, mean.b)
    assert (aggregate.frozen.lora_rank, aggregate.dropped_energy) == (0, 0)


@LAWS
@given(cohorts())
def test_the_bias_of_factors_is_the_covariance_of_the_clients(cohort: Cohort) -> None:
    mean = cohort.mean()
    deviations = [dense(Factors(client.a - mean.a, client.b - mean.b)) for client in cohort.clients]
    aggregate = cohort.uncut().cut("factors")
    bias = norm(weighted_sum(deviations, cohort.weights)) ** 2
    assert aggregate.error_energy == pytest.approx(bias, rel=1e-6, abs=1e-9 * cohort.size())


@MEANS
@LAWS
@given(cohort=cohorts())
def test_factors_cut_the_product_of_the_means(name: str, cohort: Cohort) -> None:
    if cohort.active_rank == cohort.lora_rank:
        return
    aggregate, mean = cohort.cut(name), dense(cohort.mean())
    best = best_error(mean, cohort.kept_rank)
    assert norm(sent(aggregate) - mean) == pytest.approx(best, rel=1e-5, abs=1e-9)
    assert aggregate.dropped_energy == pytest.approx(best**2, rel=1e-5, abs=1e-9)


def test_hand_sized_bias_of_factors() -> None:
    # Clients 1 * 1 and 3 * 3: the exact mean is 5, mean(B) mean(A) is 4.
    cohort = Cohort([Factors(row(value), column(value)) for value in (1.0, 3.0)], [0.5, 0.5], 1, 1)
    biased, exact = cohort.cut("factors"), cohort.cut("product")
    assert (float(sent(biased)), *energies(biased)) == (4.0, 25.0, 1.0, 0.0)
    assert (float(sent(exact)), *energies(exact)) == pytest.approx((5.0, 25.0, 0.0, 0.0))


# Stack (FLoRA): [B_1 ... B_K] @ [w_1 A_1; ...; w_K A_K], added to the base; the adapter restarts.


@LAWS
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=5),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 10**6),
)
def test_a_stack_equals_the_sum_to_the_bit_at_any_ranks(
    lora_ranks: list[int], out_features: int, in_features: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    clients = [whole_factors(lora_rank, (out_features, in_features), generator) for lora_rank in lora_ranks]
    # Weights of few binary digits: no rounding, so the order of the sum cannot show.
    weights = [2.0**-place for place in range(1, len(clients) + 1)]
    stacked_b = torch.cat([client.b for client in clients], dim=1)
    stacked_a = torch.cat([weight * client.a for client, weight in zip(clients, weights, strict=True)])
    aggregate = ModuleSum(clients, weights, AGGREGATORS["stack"]).cut(1, 1)
    products = [dense(client) for client in clients]
    assert torch.equal(dense(aggregate.frozen), stacked_b @ stacked_a)
    assert torch.equal(dense(aggregate.frozen), weighted_sum(products, weights))


def test_hand_sized_stack() -> None:
    clients = [Factors(row(2.0, 0.0), column(1.0, 0.0)), Factors(row(0.0, 4.0), column(0.0, 1.0))]
    aggregate = Cohort(clients, [0.25, 0.75], 1, 1).cut("stack")
    # Weighted once: 1/4 * 2 and 3/4 * 4.
    assert dense(aggregate.frozen).tolist() == [[0.5, 0.0], [0.0, 3.0]]
    assert energies(aggregate) == (0.25 + 9.0, 0.0, 0.0)


@LAWS
@given(cohorts())
def test_after_a_stack_every_adapter_restarts(cohort: Cohort) -> None:
    aggregate = cohort.cut("stack")
    out_features, in_features = cohort.clients[0].b.shape[0], cohort.clients[0].a.shape[1]
    assert aggregate.active.a.shape == (0, in_features)
    assert aggregate.active.b.shape == (out_features, 0)
    assert aggregate.frozen.lora_rank == cohort.lora_rank * len(cohort.clients)


# Residual (FedEx-LoRA): W + sum of w_k B_k A_k - mean(B) mean(A), and the means go on.


@LAWS
@given(cohorts())
def test_the_residual_completes_the_product_of_the_means(cohort: Cohort) -> None:
    mean = cohort.mean()
    lacking = residual(cohort.clients, cohort.weights, mean)
    wanted = cohort.exact() - dense(mean)
    assert norm(dense(lacking) - wanted) <= 1e-12 * math.sqrt(cohort.size())
    assert lacking.lora_rank == (len(cohort.clients) - 1) * cohort.lora_rank
    assert (lacking.a.dtype, lacking.b.dtype) == (torch.float64, torch.float64)


@LAWS
@given(cohorts())
def test_the_base_and_the_means_hold_the_exact_sum(cohort: Cohort) -> None:
    base = torch.ones_like(cohort.exact())
    aggregate = cohort.uncut().cut("residual")
    model = base + dense(aggregate.frozen) + dense(aggregate.active)
    assert norm(model - base - cohort.exact()) <= 1e-6 * norm(cohort.exact())
    mean = cohort.mean()
    assert torch.equal(aggregate.active.a, mean.a)
    assert torch.equal(aggregate.active.b, mean.b)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_residual_in_float32_is_exact_to_six_digits(scale: float) -> None:
    generator = torch.Generator().manual_seed(2)
    clients = [
        Factors(*(part.float() * scale for part in random_factors(4, (40, 30), generator))) for _ in range(6)
    ]
    weights = normalise([1, 2, 3, 4, 5, 6])
    mean = Factors(
        weighted_mean([client.a for client in clients], weights, torch.empty(4, 30)),
        weighted_mean([client.b for client in clients], weights, torch.empty(40, 4)),
    )
    aggregate = ModuleSum(clients, weights, AGGREGATORS["residual"], mean).cut(4, 4)
    exact = Cohort(clients, weights, 4, 4).exact()
    assert aggregate.frozen.a.dtype == torch.float32
    assert norm(sent(aggregate) - exact) <= 1e-6 * norm(exact)


@LAWS
@given(cohorts())
def test_a_residual_of_equal_clients_is_zero(cohort: Cohort) -> None:
    same = cohort._replace(clients=[cohort.clients[0]] * len(cohort.clients))
    assert not dense(residual(same.clients, same.weights, same.mean())).any()


def test_a_single_client_leaves_no_residual() -> None:
    client = random_factors(2, (5, 4), torch.Generator().manual_seed(3))
    lacking = residual([client], [1.0], client)
    assert (lacking.a.shape, lacking.b.shape) == ((0, 4), (5, 0))


def test_hand_sized_residual() -> None:
    # Means 2 and 2, exact 5: 1 is lacking, as 1/2 * (1 - 2) * (1 - 3).
    cohort = Cohort([Factors(row(value), column(value)) for value in (1.0, 3.0)], [0.5, 0.5], 1, 1)
    aggregate = cohort.cut("residual")
    assert (float(dense(aggregate.active)), float(dense(aggregate.frozen))) == (4.0, 1.0)
    assert energies(aggregate) == (25.0, 0.0, 0.0)


# Zero-pad (HetLoRA): the weight of a client is the norm of its adapter.


def test_hand_sized_frobenius_weights() -> None:
    # Client 0 has norms 3 and 4 in two modules, so 5; client 1 has 5 * 3 = 15 in one.
    clients = [
        [Factors(row(3.0), column(1.0)), Factors(row(1.0, 0.0), column(0.0, 4.0))],
        [Factors(row(5.0), column(3.0)), Factors(row(1.0, 1.0), column(0.0, 0.0))],
    ]
    assert frobenius_weights(clients) == [0.25, 0.75]


@LAWS
@given(cohorts(), st.floats(1e-3, 1e3))
def test_frobenius_weights_are_those_of_the_dense_products(cohort: Cohort, scale: float) -> None:
    turned = [Factors(client.b.mT, client.a.mT) for client in cohort.clients]
    clients = [
        [Factors(scale * client.a, client.b), Factors(scale * other.a, other.b)]
        for client, other in zip(cohort.clients, turned[::-1], strict=True)
    ]
    norms = [norm(torch.cat([dense(part).flatten() for part in client])[None]) / scale for client in clients]
    assert frobenius_weights(clients) == pytest.approx([one / sum(norms) for one in norms], rel=1e-9)


@pytest.mark.parametrize("num_clients", [1, 4])
def test_clients_that_have_learnt_nothing_weigh_the_same(num_clients: int) -> None:
    untrained = [Factors(torch.ones(2, 5), torch.zeros(4, 2))]
    assert frobenius_weights([untrained] * num_clients) == [1 / num_clients] * num_clients


# With one factor fixed the mean of the other is exact: B is trained in FFA-LoRA, A or B in RoLoRA.


@pytest.mark.parametrize("fixed", ["a", "b"])
@LAWS
@given(cohort=cohorts())
def test_a_mean_is_exact_where_the_other_factor_is_fixed(fixed: str, cohort: Cohort) -> None:
    common = cohort.clients[0]
    clients = [
        Factors(common.a, client.b) if fixed == "a" else Factors(client.a, common.b)
        for client in cohort.clients
    ]
    alike = cohort._replace(clients=clients).uncut()
    aggregate = alike.cut("factors")
    assert torch.allclose(dense(aggregate.active), alike.exact(), rtol=1e-12, atol=1e-12)
    assert aggregate.error_energy <= 1e-12 * alike.size()
    assert aggregate.frozen.lora_rank == 0


def test_hand_sized_mean_with_a_fixed() -> None:
    clients = [Factors(row(1.0, 2.0), column(4.0)), Factors(row(1.0, 2.0), column(8.0))]
    aggregate = Cohort(clients, [0.25, 0.75], 1, 1).cut("factors")
    assert (sent(aggregate).tolist(), aggregate.error_energy) == ([[7.0, 14.0]], 0.0)


# Laws of all.


@EACH
@LAWS
@given(cohort=cohorts())
def test_the_reported_energies_are_those_of_what_is_sent(name: str, cohort: Cohort) -> None:
    aggregate, exact = cohort.cut(name), cohort.exact()
    wanted = (norm(exact) ** 2, norm(sent(aggregate) - exact) ** 2)
    assert energies(aggregate)[:2] == pytest.approx(wanted, rel=1e-6, abs=1e-9 * cohort.size())
    assert aggregate.error_energy >= 0


@EXACT
@LAWS
@given(cohort=cohorts())
def test_what_is_folded_makes_the_sum_exact_also_where_the_rank_falls(name: str, cohort: Cohort) -> None:
    aggregate = cohort.cut(name)
    assert torch.allclose(sent(aggregate), cohort.exact(), rtol=1e-9, atol=1e-9)
    assert 0 <= aggregate.error_energy <= 1e-12 * cohort.size()
    assert aggregate.dropped_energy == 0


@EACH
@LAWS
@given(cohort=cohorts())
def test_kept_and_dropped_energy_add_up(name: str, cohort: Cohort) -> None:
    aggregate = cohort.cut(name)
    if AGGREGATORS[name].active == "mean":
        if cohort.active_rank == cohort.lora_rank:
            return
        whole = energy(cohort.mean())
    else:
        whole = aggregate.exact_energy
        assert whole == pytest.approx(norm(cohort.exact()) ** 2, rel=1e-9)
    if name == "residual":  # the residual stands beside the directions of the mean
        num_beyond = aggregate.frozen.lora_rank - (len(cohort.clients) - 1) * cohort.lora_rank
        beyond = Factors(aggregate.frozen.a[:num_beyond], aggregate.frozen.b[:, :num_beyond])
        kept = energy(aggregate.active) + energy(beyond)
    else:
        kept = energy(aggregate.active) + energy(aggregate.frozen)
    assert kept + aggregate.dropped_energy == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("name", ["product", "factors", "zero-pad"])
@LAWS
@given(cohort=cohorts())
def test_active_and_frozen_directions_are_those_kept(name: str, cohort: Cohort) -> None:
    aggregate = cohort.cut(name)
    is_cut = name == "product" or cohort.active_rank < cohort.lora_rank
    assert aggregate.active.lora_rank == cohort.active_rank
    assert aggregate.frozen.lora_rank == (cohort.kept_rank - cohort.active_rank) * is_cut
    assert dense(aggregate.frozen).shape == cohort.exact().shape


@EACH
@LAWS
@given(cohort=cohorts(), random=st.randoms(use_true_random=False))
def test_the_order_of_clients_does_not_matter(name: str, cohort: Cohort, random: Random) -> None:
    order = random.sample(range(len(cohort.clients)), len(cohort.clients))
    mixed = cohort._replace(
        clients=[cohort.clients[place] for place in order], weights=[cohort.weights[place] for place in order]
    )
    one, other = cohort.cut(name), mixed.cut(name)
    assert energies(other) == pytest.approx(energies(one), rel=1e-6, abs=1e-9 * cohort.size())
    # By error: at tied singular values the matrices themselves may differ.
    errors = [norm(sent(aggregate) - cohort.exact()) for aggregate in (one, other)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6, abs=1e-6)


@EACH
@LAWS
@given(cohort=cohorts())
def test_equal_clients_give_that_client(name: str, cohort: Cohort) -> None:
    same = cohort._replace(clients=[cohort.clients[0]] * len(cohort.clients), kept_rank=cohort.lora_rank)
    aggregate = same.cut(name)
    wanted = dense(cohort.clients[0])
    assert norm(sent(aggregate) - wanted) <= 1e-9 * norm(wanted)
    assert aggregate.error_energy <= 1e-9 * aggregate.exact_energy


@pytest.mark.parametrize("name", ["product", "stack"])
@LAWS
@given(cohort=cohorts(), place=st.integers(0, 5))
def test_partial_sums_give_the_same_sum(name: str, cohort: Cohort, place: int) -> None:
    middle = min(place, len(cohort.clients))
    groups = [
        (cohort.clients[:middle], cohort.weights[:middle]),
        (cohort.clients[middle:], cohort.weights[middle:]),
    ]
    parts = [stack_weighted(*group) for group in groups if group[0]]
    joined = ModuleSum(parts, [1.0] * len(parts), AGGREGATORS[name]).cut(cohort.kept_rank, cohort.active_rank)
    whole = cohort.cut(name)
    assert energies(joined) == pytest.approx(energies(whole), rel=1e-6, abs=1e-9 * cohort.size())
    errors = [norm(sent(aggregate) - cohort.exact()) for aggregate in (whole, joined)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6, abs=1e-6)


@LAWS
@given(cohorts(), st.integers(1, 4))
def test_means_of_groups_make_the_mean_of_all(cohort: Cohort, place: int) -> None:
    middle = min(place, len(cohort.clients))
    values, weights = [client.a for client in cohort.clients], cohort.weights
    groups = [(values[:middle], weights[:middle]), (values[middle:], weights[middle:])]
    groups = [group for group in groups if group[0]]
    means = [weighted_mean(part, normalise(shares), torch.empty_like(values[0])) for part, shares in groups]
    joined = weighted_mean(means, [sum(shares) for _, shares in groups], torch.empty_like(values[0]))
    assert torch.allclose(joined, cohort.mean().a, rtol=1e-12, atol=1e-12)


# Maps of a cut.


@LAWS
@given(cohorts())
def test_a_cut_maps_the_means_to_the_active_factors(cohort: Cohort) -> None:
    active, mean = cohort.cut("factors").active, cohort.mean()
    by_a, by_b = cohort.sum("factors").map(cohort.active_rank)
    # The maps are float32, and directions of the mean may be as weak as 1e-6 of its strongest.
    assert torch.allclose(mean.b @ by_b.double(), active.b, atol=1e-5 * norm(mean.a) * norm(mean.b))
    strengths = torch.linalg.svdvals(dense(mean))
    tolerance = 1e-5 * norm(mean.a) * norm(mean.b) / float(strengths[cohort.active_rank - 1])
    assert torch.allclose(by_a.double() @ mean.a, active.a, atol=tolerance)


def test_a_map_without_a_cut_is_the_identity() -> None:
    cohort = Cohort([random_factors(3, (6, 5), torch.Generator().manual_seed(4))], [1.0], 3, 3)
    assert all(torch.equal(side, torch.eye(3)) for side in cohort.sum("factors").map(3))


# All singular triplets at once.


def robust_sum(cohort: Cohort) -> ModuleSum:
    median = torch.stack([dense(client) for client in cohort.clients]).median(0).values
    return ModuleSum(cohort.clients, cohort.weights, AGGREGATORS["product"], dense=median)


def all_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize(
    ("name", "active_rank", "is_needed"),
    [
        ("product", 3, True),
        ("product", 2, True),
        ("factors", 3, False),
        ("factors", 2, True),
        ("zero-pad", 3, False),
        ("residual", 3, False),
        ("residual", 0, True),
        ("stack", 3, False),
        ("stack", 0, False),
    ],
)
def test_only_what_a_cut_looks_at_is_decomposed(name: str, active_rank: int, is_needed: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    part = Cohort([random_factors(3, (6, 5), generator) for _ in range(2)], [0.5, 0.5], 3, 3).sum(name)
    decompose([part], [active_rank])
    assert ("svd" in vars(part)) == is_needed
    part.cut(3, active_rank)
    if part.mean is not None:
        part.map(active_rank)
    assert ("svd" in vars(part)) == is_needed  # neither has missed it


@LAWS
@given(st.lists(cohorts(), max_size=4), st.integers(0, 4))
def test_decomposing_together_or_in_parts_changes_no_bit(cohorts: list[Cohort], place: int) -> None:
    names = [*AGGREGATORS, "robust"]

    def sums() -> list[ModuleSum]:
        return [robust_sum(one) if name == "robust" else one.sum(name) for one in cohorts for name in names]

    ranks = [cohort.active_rank for cohort in cohorts for _ in names]
    together, in_parts, alone = sums(), sums(), sums()
    decompose(together, ranks)
    decompose(in_parts[:place], ranks[:place])
    decompose(in_parts[place:], ranks[place:])
    for one, other, lazy, active_rank in zip(together, in_parts, alone, ranks, strict=True):
        wanted = lazy.cut(active_rank, active_rank)
        for part in (one, other):
            aggregate = part.cut(active_rank, active_rank)
            assert all_equal(aggregate.active, wanted.active)
            assert all_equal(aggregate.frozen, wanted.frozen)
            assert energies(aggregate) == energies(wanted)
            assert ("svd" in vars(part)) == ("svd" in vars(lazy))


def test_each_kind_is_decomposed_in_one_call_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(7)
    cohort = Cohort([random_factors(2, (6, 5), generator) for _ in range(3)], [0.2, 0.3, 0.5], 2, 1)
    calls = []

    def note(find: Callable[[Any], Svd]) -> Callable[[Sequence[Any], str], list[Svd]]:
        def find_all(parts: Sequence[Any], device: str) -> list[Svd]:
            calls.append((len(parts), device))
            return [find(part) for part in parts]

        return find_all

    monkeypatch.setattr(aggregation, "svds_of_products", note(svd_of_product))
    monkeypatch.setattr(aggregation, "svds_of_matrices", note(svd_of_matrix))
    product, mean, robust, done = (
        cohort.sum("product"),
        cohort.sum("factors"),
        robust_sum(cohort),
        robust_sum(cohort),
    )
    before = done.svd
    decompose([product, robust, mean, done], [1, 1, 1, 1], "cuda:1")
    assert sorted(calls) == [(1, "cuda:1"), (2, "cuda:1")]
    assert all_equal(product.svd, svd_of_product(product.exact))
    assert all_equal(mean.svd, svd_of_product(cohort.mean()))
    assert all_equal(robust.svd, before)
    assert done.svd is before


# Weights and means.


@LAWS
@given(NUMBERS, st.floats(1e-6, 1e6))
def test_only_the_shares_of_weights_matter(numbers: list[int], scale: float) -> None:
    weights = normalise(numbers)
    assert sum(weights) == pytest.approx(1, rel=1e-12)
    assert normalise([scale * number for number in numbers]) == pytest.approx(weights, rel=1e-12)


@EACH
@LAWS
@given(cohort=cohorts(), scale=st.floats(1e-3, 1e3))
def test_weights_in_other_units_change_nothing(name: str, cohort: Cohort, scale: float) -> None:
    other = cohort._replace(weights=normalise([scale * weight for weight in cohort.weights]))
    wanted = energies(cohort.cut(name))
    assert energies(other.cut(name)) == pytest.approx(wanted, rel=1e-6, abs=1e-9 * cohort.size())


@pytest.mark.parametrize("weights", [[], [0, 0], [-1, 1], [-2, 1], [math.inf, 1], [math.nan, 1]])
def test_weights_without_a_positive_finite_sum_are_refused(weights: list[float]) -> None:
    with pytest.raises(AggregationError, match=r"weights must have a positive finite sum, got .*; leave out"):
        normalise(weights)


def test_hand_sized_weights() -> None:
    assert normalise([1, 3]) == [0.25, 0.75]


@LAWS
@given(NUMBERS, st.integers(0, 20), st.integers(0, 10**6))
def test_weighted_mean_is_fedavgs_and_lies_among_the_values(
    numbers: list[int], num_values: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(num_values, generator=generator) for _ in numbers]
    out = torch.full((num_values,), math.nan)
    mean = weighted_mean(values, normalise(numbers), out)
    stacked = torch.stack(values).double()
    wanted = (torch.tensor(numbers).double()[:, None] * stacked).sum(0) / sum(numbers)
    assert mean is out
    assert torch.allclose(mean.double(), wanted, atol=1e-6)
    assert bool((mean <= stacked.amax(0) + 1e-6).all() and (mean >= stacked.amin(0) - 1e-6).all())


def test_hand_sized_weighted_mean() -> None:
    values = [torch.tensor([4.0, 0.0]), torch.tensor([8.0, -4.0])]
    assert weighted_mean(values, [0.25, 0.75], torch.empty(2)).tolist() == [7.0, -3.0]
    assert values[0].tolist() == [4.0, 0.0]
