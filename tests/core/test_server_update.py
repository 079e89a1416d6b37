from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpifedlora.core.aggregation import normalise
from mpifedlora.core.layout import AdapterLayout, LinearShape, TensorShape
from mpifedlora.core.robust import coordinate_median
from mpifedlora.core.server_optimizer import CutMap, Moments, ServerOptimizer, carry
from mpifedlora.core.server_update import FlatUpdate, GaussianNoise

LAWS = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 10**6)
NUMBERS = st.lists(st.integers(1, 300), min_size=1, max_size=5)
ADAM = ServerOptimizer("fedadam", learning_rate=0.5, beta1=0.5, beta2=0.75, tau=0.25)
MOMENTUM = ServerOptimizer("momentum", learning_rate=1.0, beta1=0.5, beta2=0.0, tau=0.0)


def random_values(num_clients: int, num_values: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(num_values, generator=generator) for _ in range(num_clients)]


def noise_of(
    clip_norm: float, noise_multiplier: float, expected_cohort: float, seed: int = 0
) -> GaussianNoise:
    generator = torch.Generator().manual_seed(seed)
    return GaussianNoise(clip_norm, noise_multiplier, expected_cohort, generator)


def advanced(
    update: FlatUpdate, old: Tensor, values: Sequence[Tensor], weights: Sequence[float] = ()
) -> Tensor:
    out, before = torch.full_like(old, math.nan), old.clone()
    assert update.advance(old, values, list(weights) or [1.0] * len(values), out) is out
    assert torch.equal(old, before)
    return out


# Without noise.


@LAWS
@given(NUMBERS, SEEDS)
def test_on_its_own_it_is_fedavg(numbers: list[int], seed: int) -> None:
    old, *values = random_values(len(numbers) + 1, 6, seed)
    wanted = sum(number * value.double() for number, value in zip(numbers, values, strict=True))
    got = advanced(FlatUpdate(), old, values, normalise(numbers))
    assert torch.allclose(got.double(), torch.as_tensor(wanted) / sum(numbers), atol=1e-6)


def moments_of(update: FlatUpdate) -> list[Tensor]:
    return [] if update.moments is None else [update.moments.first.clone(), update.moments.second.clone()]


@pytest.mark.parametrize("optimizer", [None, ADAM, MOMENTUM])
def test_without_any_client_the_values_and_the_moments_stay(optimizer: ServerOptimizer | None) -> None:
    update, old = FlatUpdate(optimizer=optimizer), torch.tensor([0.1, -3.0])
    assert torch.equal(advanced(update, old, []), old)
    assert moments_of(update) == []
    moved = advanced(update, old, [old + 1])
    before = moments_of(update)
    assert len(before) == (0 if optimizer is None else 2)
    assert torch.equal(advanced(update, moved, []), moved)
    assert all(map(torch.equal, moments_of(update), before))


def test_the_combiner_takes_the_place_of_the_mean() -> None:
    values = [torch.tensor([1.0, 9.0]), torch.tensor([2.0, -9.0]), torch.tensor([99.0, 4.0])]
    got = advanced(FlatUpdate(coordinate_median), torch.zeros(2), values, [0.1, 0.1, 0.8])
    assert got.tolist() == [2.0, 4.0]


# With a server optimiser.


@LAWS
@given(NUMBERS, SEEDS, st.integers(1, 4))
def test_fedadam_over_rounds_is_that_of_the_paper(numbers: list[int], seed: int, num_rounds: int) -> None:
    """Algorithm 2 of FedOpt: m, v from the mean update D, x + eta m / (sqrt(v) + tau), v_0 = tau^2."""
    update, weights = FlatUpdate(optimizer=ADAM), normalise(numbers)
    x = random_values(1, 6, seed)[0]
    wanted, m, v = x.double(), torch.zeros(6).double(), torch.full((6,), ADAM.tau**2).double()
    for round_num in range(num_rounds):
        values = random_values(len(numbers), 6, seed + 1 + round_num)
        mean = sum(w * value.double() for w, value in zip(weights, values, strict=True))
        delta = mean - wanted
        m = ADAM.beta1 * m + (1 - ADAM.beta1) * delta
        v = ADAM.beta2 * v + (1 - ADAM.beta2) * delta**2
        wanted = wanted + ADAM.learning_rate * m / (v.sqrt() + ADAM.tau)
        x = advanced(update, x, values, weights)
    assert torch.allclose(x.double(), wanted, atol=1e-5)


def test_hand_sized_momentum() -> None:
    # Updates of 2, then of 1: m = 2, then 1/2 * 2 + 1 = 2.
    update = FlatUpdate(optimizer=MOMENTUM)
    first = advanced(update, torch.tensor([10.0]), [torch.tensor([12.0])])
    assert first.tolist() == [12.0]
    assert advanced(update, first, [torch.tensor([13.0])]).tolist() == [14.0]


def test_moments_start_anew_where_the_state_has_another_length() -> None:
    update = FlatUpdate(optimizer=MOMENTUM)
    advanced(update, torch.zeros(3), [torch.ones(3)])
    got = advanced(update, torch.zeros(5), [torch.ones(5)])
    assert torch.equal(got, torch.ones(5))
    assert [len(moment) for moment in moments_of(update)] == [5, 0]


def test_moments_are_carried_through_a_cut() -> None:
    modules, head = (LinearShape("q", 3, 4),), (TensorShape("head", (2,)),)
    before, after = AdapterLayout(modules, (2,), head), AdapterLayout(modules, (1,), head)
    maps = [CutMap(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0], [3.0]]))]
    update = FlatUpdate(optimizer=ADAM)
    update.carry(before, after, maps)
    assert moments_of(update) == []
    advanced(update, torch.zeros(before.num_values), random_values(2, before.num_values, 5), [0.5, 0.5])
    wanted = carry(Moments(*moments_of(update)), before, after, maps)
    update.carry(before, after, maps)
    first, second = moments_of(update)
    assert torch.equal(first, wanted.first)
    assert torch.equal(second, wanted.second)
    assert len(first) == after.num_values


# With noise (DP-FedAvg: the sum of clipped updates and N(0, (z S)^2), over a fixed denominator).


@LAWS
@given(st.integers(0, 5), SEEDS, st.floats(0.5, 20), st.floats(0.1, 10))
def test_the_denominator_is_fixed_and_updates_are_clipped(
    num_clients: int, seed: int, expected_cohort: float, clip_norm: float
) -> None:
    old, *values = random_values(num_clients + 1, 6, seed)
    wanted = old.double()
    for value in values:
        delta = value.double() - old.double()
        wanted = wanted + delta * min(1.0, clip_norm / float(delta.norm())) / expected_cohort
    got = advanced(FlatUpdate(noise=noise_of(clip_norm, 0.0, expected_cohort)), old, values)
    assert torch.allclose(got.double(), wanted, atol=1e-5 * (1 + num_clients / expected_cohort))


def test_hand_sized_sum() -> None:
    # (30, 40) is clipped to (3, 4), (1, 0) is short enough; 4 clients are expected, 2 came.
    values = [torch.tensor([31.0, 42.0]), torch.tensor([2.0, 2.0])]
    got = advanced(FlatUpdate(noise=noise_of(5.0, 0.0, 4.0)), torch.tensor([1.0, 2.0]), values)
    assert got.tolist() == pytest.approx([2.0, 3.0], rel=1e-6)


@LAWS
@given(st.integers(1, 5), SEEDS, st.floats(0.1, 3))
def test_one_client_moves_the_result_by_at_most_its_clipped_share(
    num_clients: int, seed: int, clip_norm: float
) -> None:
    old, *values = random_values(num_clients + 1, 6, seed)
    # The same draws of noise on both sides: what is left is the one client.
    with_it = advanced(FlatUpdate(noise=noise_of(clip_norm, 1.0, 3.0, seed)), old, values)
    without = advanced(FlatUpdate(noise=noise_of(clip_norm, 1.0, 3.0, seed)), old, values[:-1])
    moved = float((with_it.double() - without.double()).norm())
    share = min(clip_norm, float((values[-1] - old).norm())) / 3.0
    assert moved == pytest.approx(share, rel=1e-4, abs=1e-5)


def test_weights_do_not_reach_what_is_private() -> None:
    old, *values = random_values(3, 6, 1)
    one = advanced(FlatUpdate(noise=noise_of(1.0, 1.0, 2.0)), old, values, [0.5, 0.5])
    other = advanced(FlatUpdate(noise=noise_of(1.0, 1.0, 2.0)), old, values, [0.01, 0.99])
    assert torch.equal(one, other)


@pytest.mark.parametrize("num_clients", [0, 3])
def test_noise_has_its_size_also_where_nobody_came(num_clients: int) -> None:
    num_values, clip_norm, noise_multiplier, expected_cohort = 40_000, 2.0, 1.5, 4.0
    old = torch.zeros(num_values)
    noise = noise_of(clip_norm, noise_multiplier, expected_cohort, seed=7)
    got = advanced(FlatUpdate(noise=noise), old, [torch.zeros(num_values)] * num_clients).double()
    deviation = noise_multiplier * clip_norm / expected_cohort
    assert abs(float(got.mean())) < 4.5 * deviation / math.sqrt(num_values)
    assert abs(float(got.std()) / deviation - 1) < 4.5 / math.sqrt(2 * num_values)


def test_every_round_has_its_own_noise() -> None:
    update, old = FlatUpdate(noise=noise_of(1.0, 1.0, 1.0)), torch.zeros(4)
    assert not torch.isclose(advanced(update, old, []), advanced(update, old, [])).any()


def test_the_server_steps_along_the_noised_update() -> None:
    old, *values = random_values(3, 6, 2)
    noised = advanced(FlatUpdate(noise=noise_of(1.0, 1.0, 2.0)), old, values)
    got = advanced(FlatUpdate(optimizer=ADAM, noise=noise_of(1.0, 1.0, 2.0)), old, values)
    wanted = advanced(FlatUpdate(optimizer=ADAM), old, [noised])
    assert torch.allclose(got, wanted, atol=1e-6)
    assert not torch.allclose(got, noised, atol=1e-2)
