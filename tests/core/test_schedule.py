from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpifedlora.core.schedule import RankSchedule, learning_rate_factor, proximal_weight

COOLING = ("linear", "cosine", "cubic", "exponential", "step")
MEASURED = ("metropolis", "target")
LAWS = settings(max_examples=25, deadline=None)


@st.composite
def schedules(draw: st.DrawFn, kinds: tuple[str, ...] = (*COOLING, "constant")) -> RankSchedule:
    num_rounds, rank_max = draw(st.integers(1, 30)), draw(st.integers(1, 64))
    initiating_rounds = draw(st.integers(0, num_rounds))
    left = num_rounds - initiating_rounds
    heating_rounds = draw(st.integers(0, left))
    left -= heating_rounds
    return RankSchedule(
        draw(st.sampled_from(kinds)),
        num_rounds,
        initiating_rounds,
        heating_rounds,
        rank_max,
        rank_min=draw(st.integers(1, rank_max)),
        cooling_rounds=draw(st.none() | st.integers(1, left)) if left else None,
        exponential_end=draw(st.floats(1e-6, 0.99)),
        num_steps=draw(st.integers(1, 40)),
    )


def budgets(schedule: RankSchedule, after: int = 0) -> list[int]:
    return [schedule.budget(round_num) for round_num in range(1, schedule.num_rounds + 1 + after)]


@LAWS
@given(schedules())
def test_budget_starts_at_rank_max_and_never_rises(schedule: RankSchedule) -> None:
    got = budgets(schedule, after=2)
    assert got[0] == schedule.rank_max
    assert got == sorted(got, reverse=True)


@LAWS
@given(schedules())
def test_budget_and_temperature_stay_in_their_range(schedule: RankSchedule) -> None:
    assert all(schedule.rank_min <= budget <= schedule.rank_max for budget in budgets(schedule))
    assert all(0 <= schedule.temperature(t) <= 1 for t in range(1, schedule.num_rounds + 1))


@LAWS
@given(schedules())
def test_initiating_and_heating_have_the_full_budget(schedule: RankSchedule) -> None:
    warm = schedule.initiating_rounds + schedule.heating_rounds
    assert set(budgets(schedule)[:warm]) <= {schedule.rank_max}
    assert all(schedule.temperature(t) == 1 for t in range(1, warm + 1))


@LAWS
@given(schedules(COOLING))
def test_cooling_ends_at_rank_min_and_stays_there(schedule: RankSchedule) -> None:
    start = schedule.initiating_rounds + schedule.heating_rounds
    end = start + (schedule.cooling_rounds or schedule.num_rounds - start)
    reached = range(max(end, 2), schedule.num_rounds + 1) if end > start else range(0)
    assert all(schedule.budget(t) == schedule.rank_min for t in reached)
    assert all(schedule.temperature(t) == 0 for t in reached)


@LAWS
@given(schedules())
def test_after_the_last_round_nothing_changes(schedule: RankSchedule) -> None:
    last = schedule.budget(schedule.num_rounds)
    assert [schedule.budget(schedule.num_rounds + more) for more in (1, 2, 10)] == [last] * 3


@LAWS
@given(schedules())
def test_stages_split_the_rounds_in_two(schedule: RankSchedule) -> None:
    stages = [schedule.stage(t) for t in range(1, schedule.num_rounds + 1)]
    first = schedule.initiating_rounds
    assert stages == ["initiating"] * first + ["annealing"] * (schedule.num_rounds - first)


@LAWS
@given(schedules(("constant",)))
def test_constant_keeps_rank_max(schedule: RankSchedule) -> None:
    assert set(budgets(schedule)) == {schedule.rank_max}


@pytest.mark.parametrize(("rank_max", "rank_min"), [(16, 1), (11, 2), (64, 1)])
def test_halves_go_up_also_where_floating_point_falls_short(rank_max: int, rank_min: int) -> None:
    for num_rounds in range(2, 33):
        schedule = RankSchedule("linear", num_rounds, 0, 0, rank_max, rank_min)
        for round_num in range(2, num_rounds + 1):
            exact = rank_min + (rank_max - rank_min) * (1 - Fraction(round_num, num_rounds))
            assert schedule.budget(round_num) == math.floor(exact + Fraction(1, 2))


# 16 -> 2 in four rounds after one of initiating and one of heating: u = 1/4, 1/2, 3/4, 1.
@pytest.mark.parametrize(
    ("kind", "cooling"),
    [
        ("linear", [13, 9, 6, 2]),  # 12.5 and 5.5 go up
        ("cosine", [14, 9, 4, 2]),  # 13.95, 9, 4.05
        ("cubic", [8, 4, 2, 2]),  # 7.91, 3.75, 2.22
        ("exponential", [6, 3, 2, 2]),  # tau = 0.309, 0.091, 0.022
        ("step", [16, 9, 9, 2]),  # two stairs
        ("constant", [16, 16, 16, 16]),
    ],
)
def test_hand_sized_budgets(kind: str, cooling: list[int]) -> None:
    schedule = RankSchedule(kind, 7, 1, 1, 16, 2, cooling_rounds=4, num_steps=2)
    assert budgets(schedule) == [16, 16, *cooling, cooling[-1]]


@pytest.mark.parametrize(
    ("kind", "tau"),
    [
        ("linear", 0.75),
        ("cosine", (1 + math.sqrt(0.5)) / 2),
        ("cubic", 27 / 64),
        ("exponential", (0.0001**0.25 - 0.0001) / 0.9999),
        ("step", 0.75),
        ("constant", 1.0),
    ],
)
def test_hand_sized_temperatures(kind: str, tau: float) -> None:
    schedule = RankSchedule(kind, 5, 0, 1, 16, 2, exponential_end=0.0001)
    assert schedule.temperature(2) == pytest.approx(tau, rel=1e-12)
    assert schedule.cooled(2) == 0.25


# 1 / 49 * 49 falls short of 1.
@pytest.mark.parametrize("num_steps", [1, 3, 4, 5, 49, 98])
def test_every_stair_is_met_where_it_falls_on_a_round(num_steps: int) -> None:
    schedule = RankSchedule("step", num_steps + 1, 0, 1, num_steps + 1, 1, num_steps=num_steps)
    assert budgets(schedule) == list(range(num_steps + 1, 0, -1))


def test_round_one_is_never_cut() -> None:
    schedule = RankSchedule("linear", 4, 0, 0, 16, 4)
    assert budgets(schedule) == [16, 10, 7, 4]
    assert budgets(RankSchedule("linear", 1, 0, 0, 16, 4)) == [16]


def test_budget_is_at_least_one() -> None:
    assert RankSchedule("linear", 3, 0, 1, 4, 0).budget(3) == 1


@pytest.mark.parametrize("kind", [*COOLING, "constant", *MEASURED])
def test_only_metropolis_and_target_follow_what_is_measured(kind: str) -> None:
    assert RankSchedule(kind, 5, 0, 1, 16, 2).is_measured == (kind in MEASURED)


@pytest.mark.parametrize("kind", MEASURED)
@LAWS
@given(schedule=schedules(("linear",)))
def test_measured_schedules_cool_linearly(kind: str, schedule: RankSchedule) -> None:
    measured = replace(schedule, kind=kind)
    rounds = range(1, schedule.num_rounds + 1)
    assert [measured.temperature(t) for t in rounds] == [schedule.temperature(t) for t in rounds]
    assert [measured.cooled(t) for t in rounds] == [schedule.cooled(t) for t in rounds]


@pytest.mark.parametrize("kind", MEASURED)
def test_hand_sized_temperatures_of_measured_schedules(kind: str) -> None:
    # One round of initiating, one of heating, four of cooling, one held at 0.
    schedule = RankSchedule(kind, 7, 1, 1, 16, 2, cooling_rounds=4)
    assert [schedule.temperature(t) for t in range(1, 8)] == [1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert schedule.budget(1) == 16


ROUNDS = st.integers(1, 40).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n)))
RATES = st.sampled_from(("constant", "linear", "cosine"))


@LAWS
@given(RATES, ROUNDS)
def test_learning_rate_falls_from_one_and_stays_above_zero(kind: str, rounds: tuple[int, int]) -> None:
    round_num, num_rounds = rounds
    factor = learning_rate_factor(kind, round_num, num_rounds)
    assert learning_rate_factor(kind, 1, num_rounds) == 1
    assert 0 < factor <= (learning_rate_factor(kind, round_num - 1, num_rounds) if round_num > 1 else 1)


def test_hand_sized_learning_rates() -> None:
    rates = {kind: [learning_rate_factor(kind, t, 4) for t in range(1, 5)] for kind in ("constant", "linear")}
    assert rates == {"constant": [1, 1, 1, 1], "linear": [1, 0.75, 0.5, 0.25]}
    half = math.sqrt(0.5) / 2
    assert [learning_rate_factor("cosine", t, 4) for t in range(1, 5)] == pytest.approx(
        [1, 0.5 + half, 0.5, 0.5 - half]
    )


@LAWS
@given(st.floats(0, 100), ROUNDS)
def test_proximal_weight_is_constant_or_falls_to_zero(mu: float, rounds: tuple[int, int]) -> None:
    round_num, num_rounds = rounds
    assert proximal_weight(mu, "constant", round_num, num_rounds) == mu
    assert proximal_weight(mu, "linear", 1, num_rounds) == pytest.approx(mu)
    assert 0 <= proximal_weight(mu, "linear", round_num, num_rounds) <= mu * (1 + 1e-12)
    assert num_rounds == 1 or proximal_weight(mu, "linear", num_rounds, num_rounds) == 0


def test_hand_sized_proximal_weights() -> None:
    assert [proximal_weight(0.5, "linear", t, 5) for t in range(1, 6)] == [0.5, 0.375, 0.25, 0.125, 0]
