"""How often in a row clients have failed, and who is set aside."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mpifedlora.core.faults import count_failures, set_aside
from mpifedlora.core.screening import ABOVE_BOUND, NOT_CHOSEN, NOT_FINITE, USED
from mpifedlora.core.wire import FAILED, LATE, POSTPONED

BAD, GOOD = [FAILED, NOT_FINITE], [USED, ABOVE_BOUND, NOT_CHOSEN]
OUTCOMES = st.sampled_from([*BAD, *GOOD, LATE, POSTPONED])
ROUNDS = st.lists(st.dictionaries(st.integers(0, 3), OUTCOMES), max_size=12)


def counted(rounds: list[dict[int, str]]) -> list[int]:
    failures = [0] * 4
    for outcomes in rounds:
        failures = count_failures(failures, outcomes)
    return failures


def test_only_failures_count_and_only_values_end_a_row() -> None:
    outcomes = dict(enumerate([FAILED, NOT_FINITE, LATE, USED, ABOVE_BOUND, NOT_CHOSEN, POSTPONED]))
    assert count_failures([2] * 8, outcomes) == [3, 3, 2, 0, 0, 0, 2, 2]


def test_the_counts_before_stay_as_they_are() -> None:
    before = [1, 0]
    assert count_failures(before, {0: USED, 1: FAILED}) == [0, 1]
    assert before == [1, 0]


@settings(max_examples=50, deadline=None)
@given(rounds=ROUNDS)
def test_a_count_is_of_the_failures_since_the_last_update(rounds: list[dict[int, str]]) -> None:
    for client_id, count in enumerate(counted(rounds)):
        own = [outcomes[client_id] for outcomes in rounds if client_id in outcomes]
        last_good = max((index for index, outcome in enumerate(own) if outcome in GOOD), default=-1)
        assert count == sum(outcome in BAD for outcome in own[last_good + 1 :])


@settings(max_examples=50, deadline=None)
@given(failures=st.lists(st.integers(0, 9), max_size=6), most=st.integers(1, 9))
def test_who_has_failed_that_often_is_set_aside(failures: list[int], most: int) -> None:
    aside = set_aside(failures, most)
    assert list(aside) == sorted(aside)
    assert all((failures[client_id] >= most) == (client_id in aside) for client_id in range(len(failures)))
