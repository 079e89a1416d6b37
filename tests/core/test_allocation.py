from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpifedlora.core.allocation import spectral, uniform
from mpifedlora.core.layout import AdapterLayout, LinearShape
from mpifedlora.errors import AggregationError

LAWS = settings(max_examples=25, deadline=None)
SIZES, LARGE_SIZES = st.integers(1, 30), st.integers(9, 30)
MODULES = st.lists(st.builds(LinearShape, st.just("m"), SIZES, SIZES), max_size=5)


def values(module: LinearShape) -> int:
    return module.in_features + module.out_features


def sent(modules: list[LinearShape], lora_ranks: tuple[int, ...]) -> int:
    return AdapterLayout(tuple(modules), lora_ranks).num_values


def allowed(budget: int, modules: list[LinearShape]) -> int:
    return budget * sum(values(module) for module in modules)


@LAWS
@given(st.integers(1, 40), MODULES)
def test_the_budget_in_values_is_never_exceeded(budget: int, modules: list[LinearShape]) -> None:
    assert sent(modules, uniform(budget, modules)) <= allowed(budget, modules)


@LAWS
@given(st.integers(1, 9), st.lists(st.builds(LinearShape, st.just("m"), LARGE_SIZES, LARGE_SIZES)))
def test_uniform_uses_all_of_the_budget_where_it_fits(budget: int, modules: list[LinearShape]) -> None:
    assert sent(modules, uniform(budget, modules)) == allowed(budget, modules)


@LAWS
@given(st.integers(1, 40), MODULES)
def test_the_budget_is_used_where_it_fits(budget: int, modules: list[LinearShape]) -> None:
    for module, lora_rank in zip(modules, uniform(budget, modules), strict=True):
        assert 1 <= lora_rank <= min(module.in_features, module.out_features)
        assert lora_rank == budget or lora_rank == min(module.in_features, module.out_features)


@LAWS
@given(st.integers(2, 40), MODULES)
def test_no_rank_rises_as_the_budget_falls(budget: int, modules: list[LinearShape]) -> None:
    before, after = uniform(budget, modules), uniform(budget - 1, modules)
    assert all(low <= high for low, high in zip(after, before, strict=True))


def test_hand_sized() -> None:
    modules = [LinearShape("q", 8, 8), LinearShape("k", 3, 8), LinearShape("v", 8, 2)]
    assert [uniform(budget, modules) for budget in (1, 3, 16)] == [(1, 1, 1), (3, 3, 2), (8, 3, 2)]


class Case(NamedTuple):
    """Modules of one to five shapes, spectra with ties and zeros among them, and what each may get."""

    modules: list[LinearShape]
    spectra: list[Tensor]
    largest: list[int]

    def allocate(self, budget: int) -> tuple[int, ...]:
        return spectral(budget, self.modules, self.spectra, self.largest)

    def energy(self, budget: int) -> float:
        pairs = zip(self.spectra, self.allocate(budget), strict=True)
        return sum(float(spectrum[:lora_rank].square().sum()) for spectrum, lora_rank in pairs)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    modules = draw(st.lists(st.builds(LinearShape, st.just("m"), SIZES, SIZES), min_size=1, max_size=5))
    largest = [draw(st.integers(1, min(module[1:]))) for module in modules]
    lengths = [draw(st.integers(1, min(module[1:]))) for module in modules]
    singular = st.one_of(st.sampled_from((0.0, 1.0, 2.0)), st.floats(0, 100))
    drawn = [draw(st.lists(singular, min_size=length, max_size=length)) for length in lengths]
    spectra = [torch.tensor(sorted(row, reverse=True), dtype=torch.float64) for row in drawn]
    return Case(modules, spectra, largest)


MORE_LAWS = settings(max_examples=100, deadline=None)
BUDGETS = st.integers(1, 12)


@MORE_LAWS
@given(BUDGETS, cases())
def test_spectral_keeps_the_budget_and_the_limits(budget: int, case: Case) -> None:
    lora_ranks = case.allocate(budget)
    assert sent(case.modules, lora_ranks) <= allowed(budget, case.modules)
    for lora_rank, largest in zip(lora_ranks, case.largest, strict=True):
        assert 1 <= lora_rank <= largest


@MORE_LAWS
@given(BUDGETS, cases())
def test_spectral_leaves_less_than_one_available_direction(budget: int, case: Case) -> None:
    lora_ranks = case.allocate(budget)
    left = allowed(budget, case.modules) - sent(case.modules, lora_ranks)
    for module, lora_rank, largest in zip(case.modules, lora_ranks, case.largest, strict=True):
        assert lora_rank == largest or left < values(module)


@MORE_LAWS
@given(st.integers(2, 12), cases())
def test_spectral_keeps_no_less_energy_with_more_budget(budget: int, case: Case) -> None:
    assert case.energy(budget) >= case.energy(budget - 1) * (1 - 1e-12)


@LAWS
@given(BUDGETS, cases(), st.integers(1, 5))
def test_spectral_is_uniform_for_equal_modules(budget: int, case: Case, num_modules: int) -> None:
    module, spectrum = case.modules[0], case.spectra[0]
    equal = Case([module] * num_modules, [spectrum] * num_modules, [len(spectrum)] * num_modules)
    assert equal.allocate(budget) == (min(budget, len(spectrum)),) * num_modules


@LAWS
@given(BUDGETS, cases())
def test_spectral_is_uniform_where_nothing_is_learnt_and_no_module_too_small(budget: int, case: Case) -> None:
    modules = [LinearShape(name, 12 + rows, 12 + columns) for name, rows, columns in case.modules]
    zeros = [torch.zeros(12, dtype=torch.float64)] * len(modules)
    assert spectral(budget, modules, zeros, [12] * len(modules)) == uniform(budget, modules)


def test_spectral_hand_sized() -> None:
    # Behind the floor q offers 6 / 16 and 1 / 16 per value, k offers 4 / 8 and 3.5 / 8.
    modules = [LinearShape("q", 8, 8), LinearShape("k", 4, 4)]
    case = Case(modules, [torch.tensor([9.0, 6.0, 1.0]), torch.tensor([5.0, 4.0, 3.5])], [3, 3])
    # Beyond the floor 0, 24 and 48 values: none; k twice, then 8 are too few for q; k and q twice.
    assert [case.allocate(budget) for budget in (1, 2, 3)] == [(1, 1), (1, 3), (3, 3)]


def test_one_value_short_is_too_short() -> None:
    # 23 values beyond the floor: two directions of k (8 each) leave 7.
    modules = [LinearShape("q", 7, 8), LinearShape("k", 4, 4)]
    assert spectral(2, modules, [torch.zeros(7), torch.ones(4)], [7, 4]) == (1, 3)


def test_a_direction_that_does_not_fit_is_passed_over_for_a_cheaper_one() -> None:
    # The floor sends 12 + 4 + 4 of 40. Of the 20 left `wide` gets 12; 12 more do not fit, but twice 4 do.
    modules = [LinearShape("wide", 6, 6), LinearShape("k", 2, 2), LinearShape("v", 2, 2)]
    spectra = [torch.tensor([60.0, 50.0, 40.0]), torch.tensor([3.0, 2.0]), torch.tensor([3.0, 1.0])]
    assert spectral(2, modules, spectra, [6, 2, 2]) == (2, 2, 2)


def test_ties_go_to_earlier_directions_then_to_earlier_modules() -> None:
    modules = [LinearShape("q", 4, 4), LinearShape("k", 4, 4), LinearShape("v", 4, 4)]
    spectra = [torch.ones(4, dtype=torch.float64)] * 3
    assert spectral(2, modules, spectra, [4, 1, 4]) == (3, 1, 2)


@pytest.mark.parametrize(("budget", "largest"), [(0, 4), (2, 0)])
def test_spectral_refuses_what_has_no_room_for_the_floor(budget: int, largest: int) -> None:
    modules = [LinearShape("q", 4, 4), LinearShape("k", 4, 4)]
    wanted = rf"at least one direction.*got {budget} and \[4, {largest}\]; raise"
    with pytest.raises(AggregationError, match=wanted):
        spectral(budget, modules, [torch.ones(4)] * 2, [4, largest])
