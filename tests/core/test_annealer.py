from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpifedlora.core.annealer import Annealer, Guidance
from mpifedlora.core.schedule import RankSchedule

LAWS = settings(max_examples=50, deadline=None)
MEASURED = ("target", "metropolis")
KINDS = ("constant", "linear", "cosine", "cubic", "exponential", "step", *MEASURED)
ACCURACIES = st.lists(st.floats(0, 1), min_size=30, max_size=30)
GUIDANCE = st.builds(Guidance, st.integers(1, 5), st.sampled_from([0.0, 0.01, 0.25]))


@st.composite
def schedules(draw: st.DrawFn, kinds: Iterable[str] = KINDS) -> RankSchedule:
    num_rounds, rank_max = draw(st.integers(1, 30)), draw(st.integers(1, 20))
    initiating_rounds = draw(st.integers(0, num_rounds))
    heating_rounds = draw(st.integers(0, num_rounds - initiating_rounds))
    left = num_rounds - initiating_rounds - heating_rounds
    return RankSchedule(
        draw(st.sampled_from(tuple(kinds))),
        num_rounds,
        initiating_rounds,
        heating_rounds,
        rank_max,
        rank_min=draw(st.integers(1, rank_max)),
        cooling_rounds=draw(st.none() | st.integers(1, left)) if left else None,
    )


def budgets(annealer: Annealer, accuracies: Iterable[float] = (), *, accepts: bool = True) -> list[int]:
    """Play a run: the model of the round before is measured, then the next round is planned.

    Returns the budgets of rounds 1..num_rounds, and that of the final model.
    """
    got, measured = [annealer.budget], iter(accuracies)
    for round_num in range(1, annealer.schedule.num_rounds + 1):
        if round_num > 1:
            annealer.note(next(measured, 0.5))
        proposed = annealer.propose(round_num)
        if accepts:
            annealer.budget = proposed
        got.append(annealer.budget)
    return got


def target(num_rounds: int, rank_max: int = 8, **guidance: float) -> Annealer:
    schedule = RankSchedule("target", num_rounds, 0, 1, rank_max, 1)
    return Annealer(schedule, Guidance(**guidance), 0)  # type: ignore[arg-type]


# Schedules that are functions of the round.


@LAWS
@given(schedules(set(KINDS) - set(MEASURED)), GUIDANCE, ACCURACIES)
def test_fixed_schedules_go_by_the_round_alone(
    schedule: RankSchedule, guidance: Guidance, accuracies: list[float]
) -> None:
    got = budgets(Annealer(schedule, guidance, 0), accuracies)
    wanted = [schedule.budget(round_num) for round_num in range(1, schedule.num_rounds + 1)]
    assert got == [*wanted, wanted[-1]]


# Laws of all schedules.


@LAWS
@given(schedules(), GUIDANCE, ACCURACIES)
def test_the_budget_never_rises_nor_leaves_its_bounds(
    schedule: RankSchedule, guidance: Guidance, accuracies: list[float]
) -> None:
    got = budgets(Annealer(schedule, guidance, 0), accuracies)
    assert got[0] == schedule.rank_max
    assert got == sorted(got, reverse=True)
    assert got[-1] >= schedule.rank_min


@LAWS
@given(schedules(), GUIDANCE, ACCURACIES)
def test_initiating_and_heating_rounds_keep_the_full_budget(
    schedule: RankSchedule, guidance: Guidance, accuracies: list[float]
) -> None:
    warm = schedule.initiating_rounds + schedule.heating_rounds
    assert set(budgets(Annealer(schedule, guidance, 0), accuracies)[:warm]) <= {schedule.rank_max}


@LAWS
@given(schedules(), GUIDANCE, ACCURACIES)
def test_after_the_last_round_nothing_is_cut(
    schedule: RankSchedule, guidance: Guidance, accuracies: list[float]
) -> None:
    *_, last, final = budgets(Annealer(schedule, guidance, 0), accuracies)
    assert final == last


@LAWS
@given(schedules(MEASURED), GUIDANCE)
def test_a_proposal_alone_changes_nothing(schedule: RankSchedule, guidance: Guidance) -> None:
    annealer = Annealer(schedule, guidance, 0)
    assert set(budgets(annealer, accepts=False)) == {schedule.rank_max}
    middle = (1 + schedule.num_rounds) // 2
    assert annealer.propose(middle) == annealer.propose(middle)


# Target.


@LAWS
@given(schedules(("target",)), GUIDANCE, st.floats(0, 1))
def test_cuts_go_on_while_nothing_is_lost(
    schedule: RankSchedule, guidance: Guidance, accuracy: float
) -> None:
    got = budgets(Annealer(schedule, guidance, 0), [accuracy] * 30)
    warm = max(1, schedule.initiating_rounds + schedule.heating_rounds)
    for round_num in range(1, schedule.num_rounds + 1):
        fallen = schedule.rank_max - guidance.cut_step * max(0, round_num - warm)
        assert got[round_num - 1] == max(schedule.rank_min, fallen)


@LAWS
@given(schedules(("target",)), GUIDANCE, ACCURACIES)
def test_target_stops_for_good_where_it_first_leaves_the_tolerance(
    schedule: RankSchedule, guidance: Guidance, accuracies: list[float]
) -> None:
    uncut = budgets(Annealer(schedule, guidance, 0), [1.0] * 30)
    # In round t > 1 the model of round t - 1 is known, before the budget of t + 1 is planned.
    fails = [
        round_num
        for round_num in range(2, schedule.num_rounds + 1)
        if accuracies[round_num - 2] < max(accuracies[: round_num - 1]) - guidance.tolerance
    ]
    last = fails[0] if fails else schedule.num_rounds + 1
    wanted = [*uncut[:last], *[uncut[last - 1]] * len(uncut[last:])]
    assert budgets(Annealer(schedule, guidance, 0), accuracies) == wanted


def test_hand_sized_target() -> None:
    # Rounds 1 (heating) to 7: cut by 2 before rounds 2, 3 and 4. In round 4 the model of round 3 has
    # lost 1/4 > 1/8, so 5 to 7 stay at 2, although accuracy comes back.
    accuracies = [0.5, 0.75, 0.5, 1.0, 1.0, 1.0]
    assert budgets(target(7, cut_step=2, tolerance=0.125), accuracies) == [8, 6, 4, 2, 2, 2, 2, 2]


def test_hand_sized_target_at_the_edge_of_its_tolerance() -> None:
    # A loss of just the tolerance is borne; the best counts, not the round before: 3/4, 5/8, 1/2.
    assert budgets(target(5, tolerance=0.25), [0.75, 0.5, 0.75, 0.5]) == [8, 7, 6, 5, 4, 4]
    assert budgets(target(5, tolerance=0.125), [0.75, 0.625, 0.5, 0.75]) == [8, 7, 6, 5, 5, 5]


def test_the_last_step_ends_at_rank_min() -> None:
    schedule = RankSchedule("target", 6, 0, 1, 9, 2)
    assert budgets(Annealer(schedule, Guidance(cut_step=4), 0)) == [9, 5, 2, 2, 2, 2, 2]


def test_a_heating_round_between_stages_waits() -> None:
    schedule = RankSchedule("target", 6, 2, 2, 9, 1)
    assert budgets(Annealer(schedule, Guidance(), 0)) == [9, 9, 9, 9, 8, 7, 7]


# Metropolis.

NUM_ROUNDS = 4000


def metropolis(temperature: float, seed: int = 0, **changes: int) -> Annealer:
    stages = {"initiating_rounds": 0, "heating_rounds": NUM_ROUNDS, **changes}
    schedule = RankSchedule("metropolis", NUM_ROUNDS, rank_max=8, rank_min=1, **stages)
    return Annealer(schedule, Guidance(temperature=temperature), seed)


def share_accepted(annealer: Annealer, rise: float) -> float:
    return sum(annealer.accepts(round_num, rise) for round_num in range(1, NUM_ROUNDS + 1)) / NUM_ROUNDS


@LAWS
@given(
    st.integers(1, NUM_ROUNDS),
    st.floats(max_value=0, allow_nan=False),
    st.sampled_from([0.0, 0.01, 1e9]),
    st.integers(0, NUM_ROUNDS),
)
def test_a_cut_that_loses_nothing_is_always_accepted(
    round_num: int, rise: float, temperature: float, heating_rounds: int
) -> None:
    assert metropolis(temperature, heating_rounds=heating_rounds).accepts(round_num, rise)


@pytest.mark.parametrize("ratio", [0.02, 0.5, 1.0, 2.5])
@pytest.mark.parametrize("temperature", [0.01, 3.0])
def test_rises_are_accepted_at_boltzmanns_rate(ratio: float, temperature: float) -> None:
    wanted = math.exp(-ratio)
    deviation = math.sqrt(wanted * (1 - wanted) / NUM_ROUNDS)
    share = share_accepted(metropolis(temperature), ratio * temperature)
    assert abs(share - wanted) < 4.5 * deviation


def test_the_rate_cools_with_the_schedule() -> None:
    # tau = 1 - t / NUM_ROUNDS, so the sum of exp(-x / (T tau)) is to be met.
    annealer = metropolis(0.5, heating_rounds=0)
    taus = [1 - round_num / NUM_ROUNDS for round_num in range(2, NUM_ROUNDS)]
    rates = [1.0, *(math.exp(-0.4 / (0.5 * tau)) for tau in taus)]
    deviation = math.sqrt(sum(rate * (1 - rate) for rate in rates)) / NUM_ROUNDS
    assert abs(share_accepted(annealer, 0.4) - sum(rates) / NUM_ROUNDS) < 4.5 * deviation
    late = sum(annealer.accepts(round_num, 0.4) for round_num in range(NUM_ROUNDS * 9 // 10, NUM_ROUNDS))
    assert late <= 5  # at most exp(-8) each, of 400


@pytest.mark.parametrize("rise", [1e-300, 1e-9, 1.0])
def test_without_temperature_no_rise_is_accepted(rise: float) -> None:
    assert share_accepted(metropolis(0.0), rise) == 0
    # At the end of the cooling tau is 0.
    assert not any(metropolis(1e9, seed, heating_rounds=0).accepts(NUM_ROUNDS, rise) for seed in range(100))


@pytest.mark.parametrize("rise", [math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_never_accepted(rise: float) -> None:
    assert share_accepted(metropolis(1e9), rise) == 0


@LAWS
@given(st.integers(1, NUM_ROUNDS), st.integers(0, 2**31), st.floats(1e-6, 10), st.floats(0, 1))
def test_what_is_accepted_is_pure_and_smaller_rises_are_too(
    round_num: int, seed: int, rise: float, share: float
) -> None:
    annealer = metropolis(1.0, seed)
    is_accepted = annealer.accepts(round_num, rise)
    annealer.accepts(round_num % NUM_ROUNDS + 1, rise)
    assert metropolis(1.0, seed).accepts(round_num, rise) == is_accepted
    assert not is_accepted or annealer.accepts(round_num, share * rise)


def test_seeds_and_rounds_have_their_own_draws() -> None:
    patterns = {
        tuple(metropolis(1.0, seed).accepts(round_num, 0.7) for round_num in range(1, 41))
        for seed in range(20)
    }
    assert len(patterns) == 20
    assert all(len(set(pattern)) == 2 for pattern in patterns)


def test_a_rejected_cut_is_proposed_again() -> None:
    schedule = RankSchedule("metropolis", 6, 0, 1, 8, 1)
    annealer = Annealer(schedule, Guidance(cut_step=2), 0)
    assert [annealer.propose(round_num) for round_num in (1, 2)] == [6, 6]
    annealer.budget = 6
    assert annealer.propose(3) == 4
