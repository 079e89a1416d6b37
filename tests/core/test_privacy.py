from __future__ import annotations

import logging
import math
import sys
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpifedlora.core import privacy
from mpifedlora.core.privacy import add_noise, clip, spent_epsilon
from mpifedlora.errors import ConfigError

LAWS = settings(max_examples=40, deadline=None)


def random_values(num_values: int, seed: int) -> Tensor:
    return torch.randn(num_values, generator=torch.Generator().manual_seed(seed))


def norm_of(update: Tensor) -> float:
    return math.sqrt(math.fsum(value * value for value in update.tolist()))


# Clipping.


def test_hand_sized_clipping() -> None:
    update = torch.tensor([3.0, 0.0, -4.0])
    assert clip(update, 2.5) == 5.0
    assert update.tolist() == pytest.approx([1.5, 0.0, -2.0], rel=1e-6)


@LAWS
@given(st.integers(0, 300), st.integers(0, 10**6), st.floats(-12, 12), st.floats(-12, 12))
def test_clipping_bounds_the_norm_and_keeps_the_direction(
    num_values: int, seed: int, size: float, bound: float
) -> None:
    update, largest_norm = random_values(num_values, seed) * 10**size, 10**bound
    before = update.clone()
    norm = clip(update, largest_norm)
    assert norm == pytest.approx(norm_of(before), rel=1e-12)
    assert norm_of(update) <= largest_norm or norm_of(update) == norm_of(before) <= largest_norm
    if norm <= largest_norm:
        assert torch.equal(update, before)
    else:
        assert norm_of(update) == pytest.approx(largest_norm, rel=1e-6)
        assert torch.allclose(update.double() * norm, before.double() * largest_norm, rtol=1e-6, atol=0)
        once = update.clone()
        clip(update, largest_norm)
        assert torch.equal(update, once)


@pytest.mark.parametrize("largest_norm", [1.0, math.inf])
@pytest.mark.parametrize("values", [[math.nan, 3.0], [math.inf, 3.0], [-math.inf, math.nan]])
def test_an_update_that_is_not_finite_is_left_as_it_is(values: list[float], largest_norm: float) -> None:
    update = torch.tensor(values)
    assert not math.isfinite(clip(update, largest_norm))
    assert torch.equal(update.nan_to_num(7.0), torch.tensor(values).nan_to_num(7.0))


def test_norm_of_large_values_does_not_overflow() -> None:
    update = torch.full((4,), 1e38)
    assert clip(update, 1.0) == pytest.approx(2e38)
    assert update.tolist() == pytest.approx([0.5] * 4)


def test_parts_make_one_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "_CHUNK", 7)
    update = random_values(50, 0)
    wanted = norm_of(update)
    assert clip(update, 1.0) == pytest.approx(wanted, rel=1e-12)
    assert norm_of(update) == pytest.approx(1.0, rel=1e-6)


# Noise.


@pytest.mark.parametrize("chunk", [1 << 20, 1000])
def test_noise_is_gaussian_of_its_size_and_centre(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "_CHUNK", chunk)
    total, num_values = torch.full((40_000,), 5.0), 40_000
    add_noise(total, 2.0, torch.Generator().manual_seed(1))
    noise = (total.double() - 5) / 2
    # Five standard errors each; the fourth moment of a Gaussian is 3, its standard error sqrt(96 / n).
    assert abs(float(noise.mean())) < 5 / math.sqrt(num_values)
    assert abs(float(noise.square().mean()) - 1) < 5 * math.sqrt(2 / num_values)
    assert abs(float(noise.pow(4).mean()) - 3) < 5 * math.sqrt(96 / num_values)
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 5 / math.sqrt(num_values)
    assert len(noise.unique()) > 0.99 * num_values


def test_noise_follows_its_generator_alone() -> None:
    def noisy(seed: int) -> Tensor:
        total = torch.zeros(40)
        add_noise(total, 1.0, torch.Generator().manual_seed(seed))
        return total

    torch_state = torch.get_rng_state()
    assert torch.equal(noisy(3), noisy(3))
    assert not torch.equal(noisy(3), noisy(4))
    assert torch.equal(torch.get_rng_state(), torch_state)
    generator = torch.Generator().manual_seed(3)
    first, second = torch.zeros(40), torch.zeros(40)
    add_noise(first, 1.0, generator)
    add_noise(second, 1.0, generator)
    assert not torch.equal(first, second)


def test_no_noise_changes_nothing() -> None:
    total = random_values(40, 5)
    before = total.clone()
    add_noise(total, 0.0, torch.Generator())
    assert torch.equal(total, before)


# Accounting.


@lru_cache
def log_moment(sampling_rate: float, noise_multiplier: float, order: float) -> float:
    """log A of Mironov, Talwar, Zhang, equation 3, by the trapezium rule: the integrand is smooth."""
    x = torch.linspace(-12, 12, 6_001, dtype=torch.float64) * noise_multiplier
    # Where the integrand has its mass: at 0 for small orders, at `order` for large ones.
    x = torch.cat([x, order + x]).sort().values
    log_ratio = torch.logaddexp(
        torch.full_like(x, math.log1p(-sampling_rate) if sampling_rate < 1 else -math.inf),
        math.log(sampling_rate) + (2 * x - 1) / (2 * noise_multiplier**2),
    )
    log_density = -((x / noise_multiplier) ** 2) / 2 - math.log(noise_multiplier * math.sqrt(2 * math.pi))
    values = order * log_ratio + log_density
    largest = float(values.max())
    return largest + math.log(float(torch.trapezoid((values - largest).exp(), x)))


def epsilon_by_hand(num_rounds: int, sampling_rate: float, noise_multiplier: float, delta: float) -> float:
    """Best order of a fine grid, by Canonne, Kamath, Steinke (arXiv 2004.00010), proposition 12."""
    best = math.inf
    for place in range(85):
        order = 1 + 0.1 * 1.12**place
        divergence = num_rounds * log_moment(sampling_rate, noise_multiplier, order) / (order - 1)
        best = min(
            best, divergence + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
        )
    return best


@pytest.mark.parametrize(
    ("num_rounds", "sampling_rate", "noise_multiplier", "delta"),
    [
        (1, 1.0, 5.0, 1e-5),
        (40, 1.0, 3.0, 1e-5),
        (20, 1.0, 1.0, 1e-3),
        (20, 0.25, 1.0, 1e-3),
        (100, 0.1, 0.8, 1e-5),
        (500, 0.5, 4.0, 1e-6),
        (200, 0.05, 1.1, 1e-5),
        (1000, 0.01, 0.7, 1e-5),
        (40, 0.5, 16.0, 1e-4),
        (1, 0.05, 12.0, 1e-5),
    ],
)
def test_epsilon_is_that_of_the_integral(
    num_rounds: int, sampling_rate: float, noise_multiplier: float, delta: float
) -> None:
    wanted = epsilon_by_hand(num_rounds, sampling_rate, noise_multiplier, delta)
    got = spent_epsilon(num_rounds, sampling_rate, noise_multiplier, delta)
    assert 0.995 * wanted <= got <= 1.03 * wanted


def exact_delta(epsilon: float, mu: float) -> float:
    """Delta of a Gaussian mechanism of sensitivity mu (Balle, Wang, arXiv 1805.06530, theorem 8)."""

    def below(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    return below(mu / 2 - epsilon / mu) - math.exp(epsilon) * below(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize(
    ("num_rounds", "noise_multiplier"), [(1, 1.0), (1, 4.0), (10, 2.0), (40, 8.0), (40, 2.0)]
)
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_epsilon_of_the_plain_gaussian_is_a_close_bound(
    num_rounds: int, noise_multiplier: float, delta: float
) -> None:
    mu = math.sqrt(num_rounds) / noise_multiplier
    epsilon = spent_epsilon(num_rounds, 1.0, noise_multiplier, delta)
    assert exact_delta(epsilon, mu) <= delta <= exact_delta(0.8 * epsilon, mu)


def test_epsilon_of_abadi_and_others() -> None:
    # Their figure 2 has 1.26 by the moments accountant; the conversion has become better since.
    assert 0.95 < spent_epsilon(10_000, 0.01, 4.0, 1e-5) < 1.26


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 300), st.floats(0.02, 1), st.floats(0.5, 10), st.floats(1e-7, 1e-2))
def test_epsilon_rises_with_use_and_falls_with_noise(
    num_rounds: int, sampling_rate: float, noise_multiplier: float, delta: float
) -> None:
    epsilon = spent_epsilon(num_rounds, sampling_rate, noise_multiplier, delta)
    assert 0 <= epsilon < math.inf
    assert epsilon <= spent_epsilon(num_rounds + 1, sampling_rate, noise_multiplier, delta)
    assert epsilon >= spent_epsilon(num_rounds, sampling_rate, noise_multiplier, 2 * delta)
    # Rates and noise choose the orders: where epsilon is of use, that is worth less than a hundredth.
    room = 1.01 if epsilon < 10 else 2
    assert spent_epsilon(num_rounds, sampling_rate, 1.1 * noise_multiplier, delta) <= room * epsilon
    assert spent_epsilon(num_rounds, 0.9 * sampling_rate, noise_multiplier, delta) <= room * epsilon


def test_ends_of_the_ranges() -> None:
    assert spent_epsilon(0, 0.5, 1.0, 1e-5) == spent_epsilon(0, 1.0, 0.0, 1e-5) == 0
    assert spent_epsilon(40, 0.0, 1.0, 1e-5) == 0
    assert spent_epsilon(1, 0.5, 0.0, 1e-5) == spent_epsilon(1, 1.0, 0.0, 1e-5) == math.inf


@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 8.0, 8.1, 50.0, 1000.0])
@pytest.mark.parametrize("sampling_rate", [0.01, 0.1, 0.5, 0.9, 1.0])
def test_no_order_is_lost_to_a_warning(
    sampling_rate: float, noise_multiplier: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert math.isfinite(spent_epsilon(40, sampling_rate, noise_multiplier, 1e-5))
    assert not caplog.records


def test_the_library_does_warn_where_orders_are_its_own(caplog: pytest.LogCaptureFixture) -> None:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    with caplog.at_level(logging.WARNING):
        accountant.compose(PoissonSampledDpEvent(0.25, GaussianDpEvent(1.0)), 20)
    assert caplog.records
    # The fractions that are left out cost next to nothing, and large orders gain.
    assert spent_epsilon(20, 0.25, 1.0, 1e-3) <= 1.01 * accountant.get_epsilon(1e-3)


def test_a_missing_library_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(
        ConfigError, match=r"dp-accounting, got .*; install it: pip install 'mpifedlora\[privacy\]'"
    ):
        spent_epsilon(1, 1.0, 1.0, 1e-5)
