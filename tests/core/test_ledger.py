from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpifedlora.core.aggregation import product
from mpifedlora.core.layout import LinearShape, ModelShapes, TensorShape
from mpifedlora.core.ledger import Ledger, Traffic, annealed_traffic, fixed_traffic
from mpifedlora.core.fresh import initial_adapter
from mpifedlora.core.rounds import Coordinator
from mpifedlora.core.schedule import RankSchedule
from mpifedlora.core.plan import ABSENT, RoundPlan
from mpifedlora.core.switches import Switches
from mpifedlora.core.wire import ClientUpdate

NUM_CLIENTS, NUM_ROUNDS = 4, 6
SHAPES = ModelShapes(
    (LinearShape("q", 4, 5), LinearShape("v", 3, 6)),
    (TensorShape("head", (2,)),),
    (TensorShape("q.weight", (4, 5)), TensorShape("v.weight", (3, 6))),
)
HEADER = 128 + 2 * 2 * 4  # of a downlink: fixed part, and two ranks of 4 bytes for each of two modules
COHORTS = st.sets(st.integers(0, NUM_CLIENTS - 1), min_size=1).map(sorted)
Cohorts = Sequence[Sequence[int]]


def simulate(
    cohorts: Cohorts, *, kind: str = "linear", initiating: str = "adapter", scope: str = "adapter"
) -> list[RoundPlan]:
    """Run a federation with made-up updates; return the plans of its rounds."""

    def workers(round_num: int) -> list[int]:
        return [0 if client in cohorts[round_num - 1] else ABSENT for client in range(NUM_CLIENTS)]

    schedule = RankSchedule(kind, len(cohorts), 1, 0, 3, 1)
    rates: tuple[Callable[[int, str], float], Callable[[int], float]] = (lambda _t, _s: 0.1, lambda _t: 0.0)
    switches = Switches(schedule, initiating, scope, product, True, *rates, workers)
    coordinator = Coordinator(SHAPES, switches, initial_state, seed=0)
    plans = []
    for _ in cohorts:
        plan = coordinator.plan()
        plans.append(plan)
        coordinator.finish(
            [
                ClientUpdate(client, 1, 1, 0, 0, 0, True, coordinator.state + 0.1 * client + 0.1)
                for client in plan.cohort
            ]
        )
    return plans


def initial_state(plan: RoundPlan) -> torch.Tensor:
    if plan.scope == "full":
        return torch.zeros(SHAPES.full().num_values)
    return initial_adapter(SHAPES, plan.lora_ranks, torch.zeros(2), 0)


def made_plan(cohort: Sequence[int], **fields: object) -> RoundPlan:
    workers = tuple(0 if client in cohort else ABSENT for client in range(NUM_CLIENTS))
    fixed = {"lora_ranks": (2, 2), "frozen_ranks": (0, 0), "sends_state": True, **fields}
    return RoundPlan(2, "annealing", "adapter", workers=workers, **fixed)  # type: ignore[arg-type]


def test_a_client_catches_up_on_directions_that_it_missed() -> None:
    ledger = Ledger(NUM_CLIENTS)
    each = HEADER + 4 * (2 * 9 + 2 * 9 + 2)
    frozen = made_plan([0], frozen_ranks=(1, 2))
    assert ledger.count_downlink(frozen, SHAPES) == each + 4 * (9 + 18)
    # Client 0 has heard them; clients 1 and 2 get them now; client 3 stays away.
    assert ledger.count_downlink(made_plan([0, 1, 2]), SHAPES) == 3 * each + 2 * 4 * 27
    assert ledger.count_downlink(made_plan([0, 1, 2]), SHAPES) == 3 * each
    more = made_plan([3], frozen_ranks=(1, 0))
    assert ledger.count_downlink(more, SHAPES) == each + 4 * (27 + 9)
    assert ledger.count_downlink(made_plan([1, 3]), SHAPES) == 2 * each + 4 * 9


def test_base_weights_are_counted_once_per_client() -> None:
    ledger = Ledger(NUM_CLIENTS)
    each = HEADER + 4 * (18 + 18 + 2)
    opening = made_plan([0, 1], sends_base=True)
    assert ledger.count_downlink(opening, SHAPES) == 2 * (each + 4 * 38)
    assert ledger.count_downlink(made_plan([1, 2]), SHAPES) == 2 * each + 4 * 38
    assert ledger.count_downlink(made_plan([0, 1, 2, 3]), SHAPES) == 4 * each + 4 * 38
    assert ledger.count_downlink(made_plan([0, 1, 2, 3]), SHAPES) == 4 * each


def test_round_one_costs_headers_only() -> None:
    assert Ledger(NUM_CLIENTS).count_downlink(made_plan([0, 2], sends_state=False), SHAPES) == 2 * HEADER


def values_by_client(plans: Sequence[RoundPlan]) -> int:
    """Downlink values, client by client: each round's state, and what went out since it was last there."""
    total = 0
    for client in range(NUM_CLIENTS):
        waiting = 0
        for plan in plans:
            base, frozen, state = (segment.num_values for segment in plan.segments(SHAPES))
            waiting += base + frozen
            if client in plan.cohort:
                total, waiting = total + state + waiting, 0
    return total


@pytest.mark.parametrize("initiating", ["adapter", "full"])
@settings(max_examples=10, deadline=None)
@given(cohorts=st.lists(COHORTS, min_size=NUM_ROUNDS, max_size=NUM_ROUNDS))
def test_every_client_receives_what_it_missed_once(initiating: str, cohorts: Cohorts) -> None:
    plans, ledger = simulate(cohorts, initiating=initiating), Ledger(NUM_CLIENTS)
    counted = sum(ledger.count_downlink(plan, SHAPES) for plan in plans)
    assert counted == HEADER * sum(map(len, cohorts)) + 4 * values_by_client(plans)


EVERYBODY = [range(NUM_CLIENTS)] * NUM_ROUNDS


@pytest.mark.parametrize("initiating", ["adapter", "full"])
def test_the_annealed_closed_form_is_what_the_ledger_counts(initiating: str) -> None:
    plans, ledger = simulate(EVERYBODY, initiating=initiating), Ledger(NUM_CLIENTS)
    downlink = sum(ledger.count_downlink(plan, SHAPES) for plan in plans)
    uplink = sum(plan.row_bytes(SHAPES) * len(plan.cohort) for plan in plans)
    closed = annealed_traffic(SHAPES, plans)
    assert closed.bytes == downlink + uplink
    assert closed.bytes == 4 * closed.values + (128 + HEADER) * NUM_CLIENTS * NUM_ROUNDS


@pytest.mark.parametrize("scope", ["adapter", "full"])
@pytest.mark.parametrize("size", range(1, NUM_CLIENTS + 1))
def test_the_fixed_closed_form_is_what_the_ledger_counts(scope: str, size: int) -> None:
    cohorts = list(combinations(range(NUM_CLIENTS), size))[:NUM_ROUNDS]
    plans, ledger = simulate(cohorts, kind="constant", initiating=scope, scope=scope), Ledger(NUM_CLIENTS)
    downlink = sum(ledger.count_downlink(plan, SHAPES) for plan in plans)
    uplink = sum(plan.row_bytes(SHAPES) * len(plan.cohort) for plan in plans)
    layout = SHAPES.full() if scope == "full" else SHAPES.adapter((3, 3))
    closed = fixed_traffic(SHAPES, layout.num_values, [len(cohort) for cohort in cohorts])
    assert closed.bytes == downlink + uplink
    assert closed == annealed_traffic(SHAPES, plans)


def test_hand_sized_annealing() -> None:
    # 3 -> 1 over rounds 2 and 3 (u = 1/2, 1), v and q of 9 values a rank, head of 2, one client.
    plans = simulate([[0]] * 3)
    assert [plan.lora_ranks for plan in plans] == [(3, 3), (2, 2), (1, 1)]
    uplink, downlink = [56, 38, 20], [0, 38 + 18, 20 + 18]
    closed = annealed_traffic(SHAPES, plans)
    assert closed.values == sum(uplink) + sum(downlink)
    assert closed.bytes == 4 * closed.values + 3 * (128 + HEADER)


def test_hand_sized_opening_of_the_annealing_stage() -> None:
    # Round 1 trains all 38 + 2 values; round 2 opens with 38 base weights and an adapter of rank 2.
    plans = simulate([[0]] * 3, initiating="full")
    assert annealed_traffic(SHAPES, plans).values == (40 + 38 + 20) + (0 + (38 + 38) + (18 + 20))


def test_hand_sized_baseline_and_reduction() -> None:
    baseline = fixed_traffic(SHAPES, 10, [2, 3])
    assert baseline == Traffic(values=50 + 30, bytes=4 * 80 + 5 * (128 + HEADER))
    assert Traffic(0, baseline.bytes // 4).reduction(baseline) == 0.75
    assert baseline.reduction(baseline) == 0
