from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from mpifedlora.core.aggregation import AGGREGATORS
from mpifedlora.core.layout import LinearShape, ModelShapes
from mpifedlora.core.plan import ABSENT, RoundPlan
from mpifedlora.core.planning import parts_to_send, plan_round
from mpifedlora.core.schedule import RankSchedule
from mpifedlora.core.switches import Switches

SHAPES = ModelShapes((LinearShape("q", 9, 9), LinearShape("v", 9, 9)), (), ())
SCHEDULE = RankSchedule("linear", 3, initiating_rounds=1, heating_rounds=0, rank_max=4, rank_min=2)


def switches(**fields: Any) -> Switches:
    return Switches(
        SCHEDULE,
        learning_rate=lambda round_num, scope: round_num + len(scope),
        choose_workers=lambda round_num, without: [
            ABSENT if client_id in without else worker
            for client_id, worker in enumerate((round_num, ABSENT, 0))
        ],
        mu=lambda round_num: 0.5 * round_num,
        initiating_scope="full",
        **fields,
    )


def test_a_plan_is_that_of_its_round() -> None:
    method = switches(reduces=True, client_ranks=(1, 2, 3), scope="b-only")
    plan = plan_round(method, SHAPES, 2, (4, 3), (1, 0), [0, 2, 0], [0, 0, 0])
    assert plan == RoundPlan(
        round_num=2,
        stage="annealing",
        scope="b",
        lora_ranks=(4, 3),
        frozen_ranks=(1, 0),
        workers=(2, ABSENT, 0),
        client_ranks=(1, 2, 3),
        state_rounds=(0, 2, 0),
        reduces=True,
        learning_rate=3.0,
        mu=1.0,
        temperature=0.5,
    )
    first = plan_round(method, SHAPES, 1, (4, 3), (0, 0), [], [])
    assert (first.stage, first.scope, first.learning_rate) == ("initiating", "full", 5.0)
    flags = {"keeps_b": True, "keeps_head": True, "has_variates": True}
    kept = plan_round(switches(**flags), SHAPES, 2, (4, 3), (0, 0), [], [])
    assert {name: getattr(kept, name) for name in flags} == flags


@pytest.mark.parametrize(
    ("exponent", "rate"), [(0.0, 3.0), (1.0, 3.0 * 4 / 2.5), (2.0, 3.0 * (4 / 2.5) ** 2)]
)
def test_the_learning_rate_rises_as_the_mean_rank_falls(exponent: float, rate: float) -> None:
    method = switches(rate_exponent=exponent, scope="b-only")
    plan = plan_round(method, SHAPES, 2, (2, 3), (0, 0), [], [])
    assert plan.learning_rate == pytest.approx(rate)
    small = replace(SHAPES, modules=(LinearShape("q", 2, 9), LinearShape("v", 9, 9)))  # q has rank 2 at most
    plan = plan_round(method, small, 2, (2, 4), (0, 0), [], [])
    assert plan.learning_rate == 3.0  # nothing has fallen yet
    whole = plan_round(method, SHAPES, 1, (2, 3), (0, 0), [], [])  # no rank in it
    assert whole.learning_rate == 5.0


def test_the_final_plan_is_the_last_rounds_without_anybody() -> None:
    last, final = (plan_round(switches(), SHAPES, round_num, (2, 2), (0, 0), [], []) for round_num in (3, 4))
    assert final == replace(last, round_num=4, workers=(ABSENT,) * 3)
    assert last.cohort == (0, 2)


@pytest.mark.parametrize(
    ("failures", "workers"),
    [([1, 0, 1], (2, ABSENT, 0)), ([2, 0, 1], (ABSENT, ABSENT, 0)), ([0, 5, 3], (2, ABSENT, ABSENT))],
)
def test_who_has_failed_too_often_is_not_chosen(failures: list[int], workers: tuple[int, ...]) -> None:
    method = switches(max_failures=2)
    assert plan_round(method, SHAPES, 2, (4, 3), (0, 0), [], failures).workers == workers


def test_after_the_last_round_nobody_has_to_be_left() -> None:
    def choose(round_num: int, without: Sequence[int]) -> list[int]:
        assert not without
        return [0, 0, 0]

    method = replace(switches(), choose_workers=choose)
    assert plan_round(method, SHAPES, 4, (2, 2), (0, 0), [], [9, 9, 9]).cohort == ()


@pytest.mark.parametrize(
    ("scope", "kind", "uncut"),
    [("adapter", "product", "ab"), ("a", "factors", "a"), ("b", "factors", "b"), ("adapter", "stack", "")],
)
def test_what_has_changed_is_sent(scope: str, kind: str, uncut: str) -> None:
    method = switches(aggregator=AGGREGATORS[kind])
    present = RoundPlan(2, "annealing", scope, (4, 3), (0, 0), (0,))
    assert parts_to_send(method, present, SHAPES, (4, 3)) == uncut
    # A cut changes both factors; a restart draws them anew.
    assert parts_to_send(method, present, SHAPES, (3, 3)) == ("ab" if uncut else "")


def test_a_b_that_stays_with_its_client_is_not_sent() -> None:
    present = RoundPlan(2, "annealing", "adapter", (4, 3), (0, 0), (0,), keeps_b=True)
    assert parts_to_send(switches(aggregator=AGGREGATORS["factors"]), present, SHAPES, (4, 3)) == "a"
