from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpifedlora.core.layout import Factors
from mpifedlora.core.screening import (
    ABOVE_BOUND,
    NOT_CHOSEN,
    NOT_FINITE,
    USED,
    Contribution,
    Screening,
)
from mpifedlora.core.wire import FAILED, LATE, ClientUpdate

LAWS = settings(max_examples=25, deadline=None)
SIZES = ((4, 5), (3, 6))  # (out, in) of two modules
KINDS = pytest.mark.parametrize("kind", ["krum", "multi-krum"])
SHARED = Factors(torch.zeros(1, 1), torch.zeros(1, 1))


def contribution_of(
    client_id: int,
    factors: Sequence[Factors],
    whole: Tensor,
    *,
    is_finite: bool = True,
    num_examples: int = 1,
) -> Contribution:
    update = ClientUpdate(client_id, num_examples, 1, 0.5, 0.0, 0.1, is_finite, whole)
    sent = [part.flatten() for factor in factors for part in factor]
    return Contribution(update, factors, torch.cat([*sent, whole]), whole)


def scalar(client_id: int, product: float, whole: float, *, is_finite: bool = True) -> Contribution:
    """A client whose one product and whose head are one number each."""
    factors = [Factors(torch.full((1, 1), 2.0), torch.full((1, 1), product / 2))]
    return contribution_of(client_id, factors, torch.tensor([whole]), is_finite=is_finite)


def choose(screening: Screening, parts: Sequence[Contribution]) -> dict[int, str]:
    return screening.choose(parts, [SHARED], torch.zeros(1))


def used(outcomes: dict[int, str]) -> set[int]:
    return {client_id for client_id, outcome in outcomes.items() if outcome == USED}


def random_parts(seed: int, client_ids: Sequence[int], lora_rank: int = 2) -> list[Contribution]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        contribution_of(
            client_id,
            [Factors(draw(lora_rank, inner), draw(outer, lora_rank)) for outer, inner in SIZES],
            draw(7),
        )
        for client_id in client_ids
    ]


def state_of(seed: int) -> tuple[list[Factors], Tensor]:
    part = random_parts(seed + 10**7, [0], 3)[0]
    return list(part.factors), part.whole


def vector(part: Contribution) -> Tensor:
    """All that a client changed, dense and in one row: products of all modules, and the head."""
    products = [(factor.b.double() @ factor.a.double()).flatten() for factor in part.factors]
    return torch.cat([*products, part.whole.double()])


def papers_krum(parts: Sequence[Contribution], num_byzantine: int, num_chosen: int) -> set[int]:
    """Blanchard et al.: the smallest sums of squared distances to the n - f - 2 closest others."""
    vectors = [vector(part) for part in parts]
    scores = []
    for place, one in enumerate(vectors):
        others = [float((one - other).square().sum()) for at, other in enumerate(vectors) if at != place]
        scores.append(sum(sorted(others)[: len(parts) - num_byzantine - 2]))
    best = sorted(range(len(parts)), key=lambda place: (scores[place], place))[:num_chosen]
    return {parts[place].update.client_id for place in best}


# Without any condition, and the norm bound.


def test_finite_updates_are_used_and_others_are_not() -> None:
    parts = [scalar(0, 1e9, -1e9), scalar(3, 1.0, 1.0, is_finite=False), scalar(4, 0.0, 0.0)]
    assert choose(Screening(), parts) == {0: USED, 3: NOT_FINITE, 4: USED}


@pytest.mark.parametrize("screening", [Screening(), Screening(1.0), Screening(1.0, "krum", 1)])
def test_of_nobody_nobody_is_chosen(screening: Screening) -> None:
    assert choose(screening, []) == {}


def test_the_bound_is_on_products_and_head_together_and_is_reached() -> None:
    # sqrt(3^2 + 4^2) = 5.
    parts = [scalar(1, 3.0, -4.0), scalar(2, 3.0, 4.001), scalar(5, 0.0, 5.0), scalar(6, -5.001, 0.0)]
    outcomes = choose(Screening(norm_bound=5.0), parts)
    assert outcomes == {1: USED, 2: ABOVE_BOUND, 5: USED, 6: ABOVE_BOUND}


def test_the_bound_is_on_what_a_client_has_changed() -> None:
    # The clients have received product 10 and head 20.
    factors = [Factors(torch.full((1, 1), 5.0), torch.full((1, 1), 2.0))]
    parts = [scalar(0, 13.0, 24.0), scalar(1, 13.0, 24.1), scalar(2, 0.0, 0.0), scalar(3, 10.0, 20.0)]
    outcomes = Screening(norm_bound=5.0).choose(parts, factors, torch.tensor([20.0]))
    assert outcomes == {0: USED, 1: ABOVE_BOUND, 2: ABOVE_BOUND, 3: USED}


@pytest.mark.parametrize("screening", [Screening(), Screening(1e30)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_client_that_hides_what_is_not_finite_is_found(screening: Screening, value: float) -> None:
    parts = [scalar(0, value, 0.0), scalar(1, 0.0, value), scalar(2, 1.0, 1.0)]
    assert choose(screening, parts) == {0: NOT_FINITE, 1: NOT_FINITE, 2: USED}


def test_a_client_of_lower_rank_is_held_to_what_it_received() -> None:
    state = [Factors(torch.eye(2), 10 * torch.eye(2))]
    unchanged = contribution_of(0, [Factors(torch.eye(2)[:1], 10 * torch.eye(2)[:, :1])], torch.zeros(1))
    assert Screening(norm_bound=1e-6).choose([unchanged], state, torch.zeros(1)) == {0: USED}


def test_where_fewer_than_the_least_are_left_nobody_is_used() -> None:
    parts = [scalar(client_id, 1.0, 0.0) for client_id in range(2)]
    spoilt = scalar(2, 1.0, 0.0, is_finite=False)
    screening = Screening(least=3)
    assert choose(screening, [*parts, scalar(2, 1.0, 0.0)]) == {0: USED, 1: USED, 2: USED}
    assert choose(screening, [*parts, spoilt]) == {0: NOT_CHOSEN, 1: NOT_CHOSEN, 2: NOT_FINITE}


@KINDS
def test_what_must_be_left_is_counted_before_krum_chooses(kind: str) -> None:
    parts = random_parts(0, range(4))
    assert used(choose(Screening(krum=kind, num_byzantine=0, least=4), parts))
    outcomes = choose(Screening(krum=kind, num_byzantine=0, least=5), parts)
    assert outcomes == dict.fromkeys(range(4), NOT_CHOSEN)


@pytest.mark.parametrize("fault", [FAILED, LATE])
@pytest.mark.parametrize("is_finite", [True, False])
@pytest.mark.parametrize("screening", [Screening(), Screening(norm_bound=5.0), Screening(least=2)])
def test_a_client_without_values_is_left_out_by_its_fault(
    screening: Screening, is_finite: bool, fault: str
) -> None:
    parts = [scalar(client_id, 0.0, 0.0, is_finite=is_finite or client_id != 1) for client_id in range(3)]
    absent = replace(parts[1].update, fault=fault)
    parts[1] = parts[1]._replace(update=absent)
    assert choose(screening, parts) == {0: USED, 1: fault, 2: USED}


def test_only_norms_and_distances_need_whole_updates() -> None:
    assert not Screening(least=3, num_byzantine=1).compares
    assert Screening(norm_bound=0.0).compares
    assert Screening(krum="krum").compares


@LAWS
@given(st.integers(0, 10**6), st.floats(0.2, 3))
def test_the_bound_is_that_of_the_dense_difference(seed: int, share: float) -> None:
    parts, (factors, whole) = random_parts(seed, range(4)), state_of(seed)
    # The clients are of rank 2: they have received the leading directions.
    received = [Factors(part.a[:2], part.b[:, :2]) for part in factors]
    state = vector(contribution_of(0, received, whole))
    norms = {part.update.client_id: float((vector(part) - state).norm()) for part in parts}
    bound = share * sum(norms.values()) / len(norms)
    outcomes = Screening(norm_bound=bound).choose(parts, factors, whole)
    assert used(outcomes) == {client_id for client_id, norm in norms.items() if norm <= bound}
    assert set(outcomes.values()) <= {USED, ABOVE_BOUND}


# Krum.


@KINDS
@pytest.mark.parametrize("num_byzantine", [0, 1, 2])
@LAWS
@given(seed=st.integers(0, 10**6), extra=st.integers(0, 4))
def test_the_chosen_are_those_of_the_paper(kind: str, num_byzantine: int, seed: int, extra: int) -> None:
    num_clients = 2 * num_byzantine + 3 + extra
    # Neither in order nor without gaps: outcomes go by id, not by place.
    client_ids = Random(seed).sample(range(50), num_clients)
    parts, (factors, whole) = random_parts(seed, client_ids), state_of(seed)
    outcomes = Screening(krum=kind, num_byzantine=num_byzantine).choose(parts, factors, whole)
    num_chosen = 1 if kind == "krum" else num_clients - num_byzantine - 2
    assert used(outcomes) == papers_krum(parts, num_byzantine, num_chosen)
    assert set(outcomes) == set(client_ids)
    assert list(outcomes.values()).count(NOT_CHOSEN) == num_clients - num_chosen


def test_hand_sized_krum() -> None:
    # f = 1, five clients: two nearest others count. Of 0, 1, 2, 4, 50 client 11 has the best score,
    # 1 + 1 = 2; then come 0 and 2 with 1 + 4 = 5, 4 with 4 + 9 = 13.
    parts = [scalar(10 + place, product, 0.0) for place, product in enumerate([0.0, 1.0, 2.0, 4.0, 50.0])]
    assert used(choose(Screening(krum="krum", num_byzantine=1), parts)) == {11}
    # Multi-Krum takes 5 - 1 - 2 of them.
    assert used(choose(Screening(krum="multi-krum", num_byzantine=1), parts)) == {10, 11}


@KINDS
@LAWS
@given(seed=st.integers(0, 10**6), random=st.randoms(use_true_random=False))
def test_krum_does_not_see_the_order_the_basis_or_the_examples(kind: str, seed: int, random: Random) -> None:
    parts, (factors, whole) = random_parts(seed, range(7)), state_of(seed)
    others = [
        contribution_of(
            part.update.client_id,
            [Factors(-4 * factor.a.flip(0), factor.b.flip(1) / -4) for factor in part.factors],
            part.whole,
            num_examples=random.randint(1, 10**6),
        )
        for part in parts
    ]
    screening = Screening(krum=kind, num_byzantine=1)
    wanted = screening.choose(parts, factors, whole)
    assert screening.choose(random.sample(others, 7), factors, whole) == wanted


@KINDS
@pytest.mark.parametrize("place", ["product", "head"])
def test_an_attack_on_product_or_head_alone_is_seen(kind: str, place: str) -> None:
    honest = [scalar(client_id, 0.1 * client_id, -0.1 * client_id) for client_id in range(4)]
    attack = scalar(9, 90.0, 0.0) if place == "product" else scalar(9, 0.0, 90.0)
    chosen = used(choose(Screening(krum=kind, num_byzantine=1), [attack, *honest]))
    assert chosen
    assert chosen <= {0, 1, 2, 3}


def test_head_and_products_make_one_distance() -> None:
    # By the products alone client 2 is best (1 + 1), by the heads alone client 0 (1 + 1); together it is
    # client 3: (1 + 9) + (49 + 4) = 63, before client 2 with (1 + 9) + (64 + 1) = 75.
    products, heads, nothing = [9.0, -9.0, 1.0, 2.0, 0.0], [0.0, 1.0, -1.0, 2.0, 9.0], [0.0] * 5
    for first, second, wanted in ((products, nothing, 2), (nothing, heads, 0), (products, heads, 3)):
        parts = [scalar(place, *pair) for place, pair in enumerate(zip(first, second, strict=True))]
        assert used(choose(Screening(krum="krum", num_byzantine=1), parts)) == {wanted}


@KINDS
@LAWS
@given(seed=st.integers(0, 10**6))
def test_a_whole_model_is_judged_by_its_weights(kind: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [contribution_of(k, [], torch.randn(30, generator=generator)) for k in range(6)]
    outcomes = Screening(krum=kind, num_byzantine=1).choose(parts, [], torch.randn(30, generator=generator))
    assert used(outcomes) == papers_krum(parts, 1, 1 if kind == "krum" else 3)


def test_small_changes_show_beside_large_weights() -> None:
    # Inner products of the models themselves are about 10^15: their rounding hides distances of 10^-4.
    state = 1e6 * torch.randn(1000, generator=torch.Generator().manual_seed(0))
    state[0] = 0.0
    parts = []
    for client_id, value in enumerate([0.5, 0.04, 0.0, 0.01, 0.02]):
        parts.append(contribution_of(client_id, [], state.clone()))
        parts[-1].whole[0] = value
    outcomes = Screening(krum="krum", num_byzantine=1).choose(parts, [], state)
    assert used(outcomes) == {3}


@KINDS
@pytest.mark.parametrize("num_byzantine", [0, 1, 3])
def test_too_few_to_tell_who_is_honest_are_none(kind: str, num_byzantine: int) -> None:
    screening = Screening(krum=kind, num_byzantine=num_byzantine)
    parts = [scalar(client_id, 0.5, 0.5) for client_id in range(2 * num_byzantine + 2)]
    assert set(choose(screening, parts).values()) == {NOT_CHOSEN}
    assert used(choose(screening, [*parts, scalar(99, 0.5, 0.5)]))


@KINDS
def test_updates_that_are_not_finite_leave_before_krum_counts(kind: str) -> None:
    screening = Screening(krum=kind, num_byzantine=1)
    parts = [scalar(client_id, 0.1 * client_id, 0.0) for client_id in range(5)]
    wrong = scalar(7, math.nan, 0.0, is_finite=False)
    assert choose(screening, [wrong, *parts]) == {7: NOT_FINITE, **choose(screening, parts)}
    # Without it four are left, and 2 f + 3 = 5.
    wanted = {7: NOT_FINITE, **dict.fromkeys(range(4), NOT_CHOSEN)}
    assert choose(screening, [*parts[:4], wrong]) == wanted


@KINDS
def test_updates_above_the_bound_leave_before_krum_counts(kind: str) -> None:
    bounded = Screening(norm_bound=1.0, krum=kind, num_byzantine=1)
    parts = [scalar(client_id, 0.1 * client_id, 0.0) for client_id in range(5)]
    far = [scalar(7, 1e6, 0.0), scalar(8, 1e6, 0.0), scalar(9, 1e6, 0.0)]
    # Three of eight alike far off: for f = 1 their scores would not be the largest.
    outcomes = choose(bounded, [*far, *parts])
    assert outcomes == {**dict.fromkeys((7, 8, 9), ABOVE_BOUND), **choose(bounded, parts)}
    assert used(outcomes)


@KINDS
def test_a_client_that_hides_what_is_not_finite_is_never_chosen(kind: str) -> None:
    parts = [scalar(client_id, 0.1 * client_id, 0.0) for client_id in range(5)]
    for hidden in (scalar(7, math.nan, 0.0), scalar(7, 0.0, math.nan)):
        chosen = used(choose(Screening(krum=kind, num_byzantine=1), [hidden, *parts]))
        assert chosen
        assert 7 not in chosen
