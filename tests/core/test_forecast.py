"""A forecast against the federations that the laws of the rounds are held over: plans and bytes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from core.cases import (
    CASES,
    CLIENT_RANKS,
    FULL,
    KRUM_CASES,
    NUM_CLIENTS,
    NUM_ROUNDS,
    RANK_MAX,
    SHAPES,
    SPECTRAL_CASES,
    UNLIKE_SPECTRAL,
    Case,
    over,
)
from core.played import Judge, Played, federation, play
from hypothesis import given
from hypothesis import strategies as st

from mpifedlora.core.forecast import RoundForecast, _Filling, forecast
from mpifedlora.core.layout import LinearShape
from mpifedlora.core.ledger import Ledger, Traffic, count_uplink
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.planning import without_training
from mpifedlora.core.wire import ClientUpdate

BOUNDED = [*SPECTRAL_CASES, UNLIKE_SPECTRAL]
FIXED = [case for case in CASES if not (case.is_spectral or case.norm_bound or case.robust.endswith("krum"))]
WIRES = [
    *(
        Case(kind, uplink=dtype, downlink=dtype, cohort_size=2)
        for kind in ("product", "factors")
        for dtype in ("int8", "bfloat16", "float16")
    ),
    Case("factors", False, "full", uplink="int8", downlink="bfloat16", cohort_size=2),
    replace(FULL, uplink="bfloat16", downlink="int8"),
    Case("stack", downlink="bfloat16", cohort_size=3, client_ranks=CLIENT_RANKS),
]
MEASURED = [
    replace(case, schedule=schedule)
    for schedule in ("metropolis", "target")
    for case in (
        Case(freezes=False),
        Case("factors", False, "full", cohort_size=3),
        Case("factors", False, is_spectral=True, cohort_size=2),
    )
] + [Case("residual", schedule="target"), Case(schedule="target", cohort_size=2)]


def made(case: Case, **options: bool) -> list[RoundForecast]:
    return forecast(case.coordinator().switches, SHAPES, **options)


def sent(case: Case, history: list[Played]) -> list[tuple[Traffic, Traffic]]:
    """What the ledger of a run counts, round by round."""
    ledger = Ledger(NUM_CLIENTS, case.downlink)
    plans = [played.plan for played in history]
    return [(count_uplink(plan, SHAPES, case.uplink), ledger.count_downlink(plan, SHAPES)) for plan in plans]


def assert_within(rounds: list[RoundForecast], wanted: list[tuple[Traffic, Traffic]]) -> None:
    assert len(rounds) == len(wanted) == NUM_ROUNDS
    for one, (uplink, downlink) in zip(rounds, wanted, strict=True):
        assert one.low.uplink.bytes <= uplink.bytes <= one.high.uplink.bytes
        assert one.low.downlink.bytes <= downlink.bytes <= one.high.downlink.bytes


@over([*FIXED, *WIRES])
def test_what_no_value_decides_is_forecast_to_the_byte_and_to_the_plan(case: Case) -> None:
    history, rounds = federation(case), made(case)
    assert all(one.is_exact for one in rounds)
    assert [(one.high.uplink, one.high.downlink) for one in rounds] == sent(case, history)
    assert [one.high.plan for one in rounds] == [played.plan for played in history]
    assert [one.low.plan for one in rounds] == [played.plan for played in history]


@over([case for case in KRUM_CASES if case.kind != "residual"])
def test_left_out_updates_change_nothing_where_the_sum_does_not_show_them(case: Case) -> None:
    rounds = made(case, may_leave_out=True)
    assert [(one.low.uplink, one.low.downlink) for one in rounds] == sent(case, federation(case))
    assert all(one.is_exact for one in rounds)


@over(BOUNDED)
def test_spectral_allocation_stays_within_its_bounds(case: Case) -> None:
    rounds = made(case)
    assert_within(rounds, sent(case, federation(case)))
    assert rounds[0].is_exact
    assert not all(one.is_exact for one in rounds)


@over([replace(SPECTRAL_CASES[0], uplink=dtype, downlink=dtype) for dtype in ("int8", "bfloat16")])
def test_so_it_does_under_other_wire_dtypes(case: Case) -> None:
    assert_within(made(case), sent(case, federation(case)))


def test_spectral_bounds_are_a_direction_apart_and_hold_the_uniform_budget() -> None:
    last = made(Case(freezes=False, is_spectral=True, cohort_size=3))[-3]
    largest, sides = max(16, 8, 56), 16 + 8 + 56
    low, high = (end.plan.shared_layout(SHAPES).factor_values for end in (last.low, last.high))
    budget = last.high.plan.temperature * (RANK_MAX - 1) + 1
    assert budget > 1
    assert low <= round(budget) * sides <= high
    assert high - low <= 2 * largest
    constant = made(Case(is_spectral=True, schedule="constant"))
    assert all(one.is_exact for one in constant)


def judged(answer: float) -> Judge:
    return lambda worker, plan, message: answer * sum(plan.lora_ranks)


@over(MEASURED)
@pytest.mark.parametrize("rise", [1.0, -1.0, 0.02])
def test_measured_schedules_stay_within_their_bounds_whether_they_cut_or_not(case: Case, rise: float) -> None:
    judge = judged(-rise) if case.schedule == "metropolis" else None
    falls_at = {1.0: 2, -1.0: 99, 0.02: 5}[rise]
    history = play(case, judge=judge, accuracy=lambda round_num: float(round_num < falls_at))
    rounds = made(case)
    assert_within(rounds, sent(case, history))
    assert not rounds[-1].is_exact


def test_a_measured_schedule_that_always_cuts_or_never_sends_what_its_bounds_say() -> None:
    case = Case(freezes=False, schedule="metropolis")
    rounds = made(case)
    cutting, keeping = (play(case, judge=judged(sign)) for sign in (1.0, -1e9))
    assert [one.low.downlink for one in rounds] == [downlink for _, downlink in sent(case, cutting)]
    assert [one.high.downlink for one in rounds] == [downlink for _, downlink in sent(case, keeping)]
    assert [max(one.high.plan.lora_ranks) for one in rounds] == [RANK_MAX] * NUM_ROUNDS


@over(
    [
        Case("residual"),
        Case("stack", client_ranks=CLIENT_RANKS, cohort_size=2),
        Case(client_ranks=CLIENT_RANKS),
        Case("stack", client_ranks=CLIENT_RANKS, cohort_size=1, norm_bound=6.0),
    ]
)
@pytest.mark.parametrize("left", [0, 1, 2])
def test_updates_that_are_left_out_stay_within_the_bounds(case: Case, left: int) -> None:
    def spoil(round_num: int, updates: list[ClientUpdate]) -> list[ClientUpdate]:
        return [replace(one, is_finite=index < left) for index, one in enumerate(updates)]

    assert_within(made(case, may_leave_out=True), sent(case, play(case, spoil)))


def test_cohorts_that_nobody_may_know_lie_between_nobody_and_everybody() -> None:
    everybody = replace(FULL, cohort_size=None)
    rounds = made(everybody, hides_cohorts=True)
    assert {one.low.uplink for one in rounds} == {Traffic(0, 0)}
    assert [(one.high.uplink, one.high.downlink) for one in rounds] == sent(everybody, federation(everybody))
    assert_within(rounds, sent(FULL, federation(FULL)))


SIDES = st.integers(2, 40)


@given(st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=5), st.integers(1, 6), st.integers(0, 2000))
def test_filled_ranks_are_the_nearest_around_a_number_of_values(
    sizes: list[tuple[int, int]], rank_max: int, num_values: int
) -> None:
    modules = [LinearShape("m", *size) for size in sizes]
    largest = tuple(min(rank_max, *size) for size in sizes)
    filling = _Filling(modules, largest)
    below, above = filling.at_most(num_values), filling.at_least(num_values)
    count = lambda ranks: sum(r * sum(size) for r, size in zip(ranks, sizes, strict=True))  # noqa: E731
    assert all(1 <= one <= other <= most for one, other, most in zip(below, above, largest, strict=True))
    assert count(below) <= max(num_values, count((1,) * len(sizes)))
    assert count(above) >= min(num_values, count(largest))
    assert sum(above) - sum(below) <= 1
    assert math.prod(above) <= math.prod(largest)


def test_a_walk_goes_on_where_nobody_takes_part() -> None:
    plan: RoundPlan = made(Case("stack", probability=0.25, seed=1))[-1].high.plan
    assert without_training(plan).cohort == ()
