from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mpifedlora.core.allocation import uniform
from mpifedlora.core.layout import AdapterLayout, LinearShape

LAWS = settings(max_examples=25, deadline=None)
SIZES = st.integers(1, 30)
MODULES = st.lists(st.builds(LinearShape, st.just("m"), SIZES, SIZES), max_size=5)


def values(module: LinearShape) -> int:
    return module.in_features + module.out_features


@LAWS
@given(st.integers(1, 40), MODULES)
def test_the_budget_in_values_is_never_exceeded(budget: int, modules: list[LinearShape]) -> None:
    layout = AdapterLayout(tuple(modules), uniform(budget, modules))
    assert layout.num_values <= budget * sum(values(module) for module in modules)


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
