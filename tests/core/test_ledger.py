from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpifedlora.core.aggregation import AGGREGATORS
from mpifedlora.core.fresh import initial_adapter
from mpifedlora.core.layout import DENSE, Factors, LinearShape, ModelShapes, TensorShape
from mpifedlora.core.ledger import Ledger, Traffic, count_uplink, fixed_traffic
from mpifedlora.core.plan import ABSENT, RoundPlan
from mpifedlora.core.rounds import Coordinator
from mpifedlora.core.schedule import RankSchedule
from mpifedlora.core.seeding import torch_seed
from mpifedlora.core.switches import Switches
from mpifedlora.core.wire import ClientUpdate

NUM_CLIENTS, NUM_ROUNDS = 4, 5
# A direction of q and v together has 5 + 6 values in A and 4 + 3 in B; 38 weights, and 2 in the head.
SHAPES = ModelShapes(
    (LinearShape("q", 4, 5), LinearShape("v", 3, 6)),
    (TensorShape("head", (2,)),),
    (TensorShape("q.weight", (4, 5)), TensorShape("v.weight", (3, 6))),
)
A, B, AB, HEAD, BODY = 11, 7, 18, 2, 38
HEADER = 128 + 2 * 2 * 4  # of a downlink: fixed part, and two ranks of 4 bytes for each of two modules
COHORTS = st.sets(st.integers(0, NUM_CLIENTS - 1), min_size=1).map(sorted)
Cohorts = Sequence[Sequence[int]]


class Played(NamedTuple):
    """One round: what went out, the whole state behind it, and what came back."""

    plan: RoundPlan
    state: Tensor
    updates: list[ClientUpdate]


def simulate(
    cohorts: Cohorts, kind: str = "constant", initiating: int = 0, lora_rank: int = 3, **fields: Any
) -> list[Played]:
    """Run a federation with made-up updates; ranks fall to 1 unless the kind is `constant`."""

    def workers(round_num: int) -> list[int]:
        return [0 if client in cohorts[round_num - 1] else ABSENT for client in range(NUM_CLIENTS)]

    schedule = RankSchedule(kind, len(cohorts), initiating, 0, lora_rank, 1)
    aggregator = AGGREGATORS[fields.pop("aggregator", "product")]
    switches = Switches(schedule, lambda _t, _s: 0.1, workers, aggregator=aggregator, **fields)
    coordinator = Coordinator(SHAPES, switches, initial_state, seed=0)
    rounds = []
    for _ in cohorts:
        plan = coordinator.plan()
        updates = [made_update(plan, client) for client in plan.cohort]
        rounds.append(Played(plan, coordinator.state.clone(), updates))
        coordinator.finish(updates)
    return rounds


def initial_state(plan: RoundPlan) -> Tensor:
    if plan.scope == "full":
        return torch.zeros(SHAPES.full().num_values)
    return initial_adapter(SHAPES, plan.lora_ranks, torch.zeros(HEAD), 0)


def made_update(plan: RoundPlan, client_id: int) -> ClientUpdate:
    generator = torch.Generator().manual_seed(torch_seed(0, "test", plan.round_num, client_id))
    values = torch.randn(plan.row_values(SHAPES, client_id), generator=generator)
    return ClientUpdate(client_id, 1, 1, 0, 0, 0, True, values)


def downlinks(rounds: Sequence[Played]) -> list[int]:
    ledger = Ledger(NUM_CLIENTS)
    return [ledger.count_downlink(played.plan, SHAPES) for played in rounds]


def uplinks(rounds: Sequence[Played]) -> list[int]:
    return [count_uplink(played.updates) for played in rounds]


def made_plan(cohort: Sequence[int], round_num: int = 2, **fields: Any) -> RoundPlan:
    workers = tuple(0 if client in cohort else ABSENT for client in range(NUM_CLIENTS))
    fixed: dict[str, Any] = {
        "scope": "adapter",
        "lora_ranks": (2, 2),
        "frozen_ranks": (0, 0),
        "sends_state": True,
    }
    return RoundPlan(round_num, "annealing", workers=workers, **{**fixed, **fields})


class Example(NamedTuple):
    """A run of three rounds, and the values that each round costs, counted by hand."""

    cohorts: Cohorts
    switches: dict[str, Any]
    downlink: list[int]
    uplink: list[int]


SOME = [[0, 1], [0], [0, 1]]  # client 1 misses round 2
EXAMPLES = {
    # B, then A, then B at rank 2. Client 1 misses the B of round 2, client 2 both.
    "alternating": Example(
        [[0, 1], [0], [0, 1, 2]],
        {"scope": "alternating", "aggregator": "factors", "lora_rank": 2},
        [0, 2 * B + HEAD, (2 * A + HEAD) + 2 * (2 * AB + HEAD)],
        [2 * (2 * B + HEAD), 2 * A + HEAD, 3 * (2 * B + HEAD)],
    ),
    # Nobody ever needs A: it is what the seed gave.
    "b-only": Example(
        [[0], [1], [0, 2]],
        {"scope": "b-only", "aggregator": "factors", "lora_rank": 2},
        [0, 2 * B + HEAD, 2 * (2 * B + HEAD)],
        [2 * B + HEAD, 2 * B + HEAD, 2 * (2 * B + HEAD)],
    ),
    # Restarts: no factors. Four stacked directions (2 clients of rank 2) go as the matrices (20 + 18),
    # the two of round 2's one client as factors, at most as large (18 of 20, 18 of 18).
    "stack": Example(
        SOME,
        {"aggregator": "stack", "lora_rank": 2},
        [0, HEAD + 38, 2 * (HEAD + 36) + 38],
        [2 * (2 * AB + HEAD), 2 * AB + HEAD, 2 * (2 * AB + HEAD)],
    ),
    # The residual of two clients has the directions of one. One client has none.
    "residual": Example(
        [[0, 1], [0, 1], [2]],
        {"aggregator": "residual", "lora_rank": 2},
        [0, 2 * (2 * AB + HEAD + 2 * AB), 2 * AB + HEAD + 2 * 2 * AB],
        [2 * (2 * AB + HEAD), 2 * (2 * AB + HEAD), 2 * AB + HEAD],
    ),
    # Leading directions both ways: client 0 has rank 1, client 2 rank 2, the others 3.
    "client ranks": Example(
        [[0, 1], [0, 1, 2], [0, 3]],
        {"client_ranks": (1, 3, 2, 9)},
        [0, (1 + 3 + 2) * AB + 3 * HEAD, (1 + 3) * AB + 2 * HEAD],
        [(1 + 3) * AB + 2 * HEAD, (1 + 3 + 2) * AB + 3 * HEAD, (1 + 3) * AB + 2 * HEAD],
    ),
    "personal b": Example(
        [[0, 1], [0], [1, 2]],
        {"keeps_b": True, "aggregator": "factors", "lora_rank": 2},
        [0, 2 * A + HEAD, 2 * (2 * A + HEAD)],
        [2 * (2 * A + HEAD), 2 * A + HEAD, 2 * (2 * A + HEAD)],
    ),
    "personal b and head": Example(
        [[0, 1], [0], [1, 2]],
        {"keeps_b": True, "keeps_head": True, "aggregator": "factors", "lora_rank": 2},
        [0, 2 * A, 2 * 2 * A],
        [2 * 2 * A, 2 * A, 2 * 2 * A],
    ),
    # A cut from r to s has two maps of r * s values in each module: 6 and 6, then 2 and 2, once a client.
    # The header has a third list of ranks: 2 * 4 bytes, 2 values' worth.
    "variates": Example(
        SOME,
        {"kind": "linear", "has_variates": True, "aggregator": "factors", "freezes": False},
        [2 * 2, 2 * (2 * AB + HEAD) + 24 + 2, 2 * (2 * (AB + HEAD) + 8) + 24 + 2 * 2],
        [2 * 2 * (3 * AB + HEAD), 2 * (2 * AB + HEAD), 2 * 2 * (AB + HEAD)],
    ),
    # Each of the two cuts freezes a direction; client 1 gets the first one round later.
    "freeze": Example(
        SOME,
        {"kind": "linear"},
        [0, 2 * AB + HEAD + AB, 2 * (AB + HEAD + AB) + AB],
        [2 * (3 * AB + HEAD), 2 * AB + HEAD, 2 * (AB + HEAD)],
    ),
    "drop": Example(
        SOME,
        {"kind": "linear", "freezes": False},
        [0, 2 * AB + HEAD, 2 * (AB + HEAD)],
        [2 * (3 * AB + HEAD), 2 * AB + HEAD, 2 * (AB + HEAD)],
    ),
    # Round 2 opens with the base weights and restarts: no factors. Then as under `freeze`.
    "full, then freeze": Example(
        SOME,
        {"kind": "linear", "initiating": 1, "initiating_scope": "full"},
        [0, BODY + HEAD, 2 * (AB + HEAD + AB) + BODY],
        [2 * (BODY + HEAD), 2 * AB + HEAD, 2 * (AB + HEAD)],
    ),
    # Client 1 derives the A of the restart that it missed.
    "full, then b-only": Example(
        SOME,
        {
            "initiating": 1,
            "initiating_scope": "full",
            "scope": "b-only",
            "aggregator": "factors",
            "lora_rank": 2,
        },
        [0, BODY + HEAD, 2 * (2 * B + HEAD) + BODY],
        [2 * (BODY + HEAD), 2 * B + HEAD, 2 * (2 * B + HEAD)],
    ),
    "full with variates": Example(
        SOME,
        {"scope": "full", "has_variates": True},
        [2 * 2, 2 * (BODY + HEAD) + 2, 2 * 2 * (BODY + HEAD) + 2 * 2],
        [2 * 2 * (BODY + HEAD), 2 * (BODY + HEAD), 2 * 2 * (BODY + HEAD)],
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_hand_sized_runs(name: str) -> None:
    cohorts, switches, downlink, uplink = EXAMPLES[name]
    rounds, sizes = simulate(cohorts, **switches), [len(cohort) for cohort in cohorts]
    wanted = [HEADER * size + 4 * values for size, values in zip(sizes, downlink, strict=True)]
    assert downlinks(rounds) == wanted
    wanted = [128 * size + 4 * values for size, values in zip(sizes, uplink, strict=True)]
    assert uplinks(rounds) == wanted


# What a client lacks, from the values themselves.


def own_factors(played: Played, client_id: int) -> list[Factors]:
    """The global factors as a client holds them: its leading directions."""
    plan = played.plan
    ranks = plan.trained_layout(SHAPES, client_id).lora_ranks
    pairs = zip(plan.layout(SHAPES).factors(played.state), ranks, strict=True)
    return [Factors(a[:lora_rank], b[:, :lora_rank]) for (a, b), lora_rank in pairs]


def lacking(played: Played, client_id: int, held: Sequence[Factors]) -> int:
    """Values of the state that a client does not hold: variate, head, and each factor that differs."""
    plan = played.plan
    if not plan.sends_state:
        return 0
    shared = plan.shared_layout(SHAPES, client_id)
    missing = shared.num_values * plan.has_variates + (shared.num_values - shared.factor_values)
    wanted = own_factors(played, client_id)
    for part in ("a",) if plan.keeps_b else ("a", "b"):
        mine, theirs = ([getattr(factors, part) for factors in side] for side in (held, wanted))
        if len(mine) != len(theirs) or not all(map(torch.equal, mine, theirs)):
            missing += sum(factor.numel() for factor in theirs)
    return missing


def assert_is_drawn(played: Played) -> None:
    drawn = initial_adapter(SHAPES, played.plan.lora_ranks, torch.zeros(HEAD), 0, played.plan.round_num)
    assert torch.equal(drawn[:-HEAD], played.state[:-HEAD])


def frozen_values(plan: RoundPlan) -> list[int]:
    """Values of each module's frozen part in a message."""
    sides = [(module.out_features + module.in_features) for module in SHAPES.modules]
    pairs = zip(plan.frozen_ranks, sides, WHOLE_MATRICES, strict=True)
    return [whole if rank == DENSE else rank * side for rank, side, whole in pairs]


WHOLE_MATRICES = [module.out_features * module.in_features for module in SHAPES.modules]


def values_lacking(rounds: Sequence[Played]) -> list[int]:
    """Downlink values of each round, client by client, by what differs and what went out once.

    What a client missed of a module's frozen parts comes as one matrix where that is less.
    """
    held = [own_factors(rounds[0], client) for client in range(NUM_CLIENTS)]
    waiting, totals = [0] * NUM_CLIENTS, []
    missed = [[0] * len(SHAPES.modules) for _ in range(NUM_CLIENTS)]
    for played in rounds:
        parts, frozen, total = played.plan.segments(SHAPES), frozen_values(played.plan), 0
        assert parts.frozen.num_values == sum(frozen)
        waiting = [values + parts.base.num_values + parts.maps.num_values for values in waiting]
        if played.plan.restarts:  # everybody knows the seed
            assert_is_drawn(played)
            held = [own_factors(played, client) for client in range(NUM_CLIENTS)]
        for client in range(NUM_CLIENTS):
            if client not in played.plan.cohort:
                missed[client] = [sum(pair) for pair in zip(missed[client], frozen, strict=True)]
                continue
            total += waiting[client] + lacking(played, client, held[client]) + sum(frozen)
            total += sum(map(min, missed[client], WHOLE_MATRICES))
            waiting[client], held[client] = 0, own_factors(played, client)
            missed[client] = [0] * len(SHAPES.modules)
        totals.append(total)
    return totals


@pytest.mark.parametrize("name", EXAMPLES)
@settings(max_examples=8, deadline=None)
@given(cohorts=st.lists(COHORTS, min_size=NUM_ROUNDS, max_size=NUM_ROUNDS))
def test_every_client_receives_what_it_lacks_and_no_more(name: str, cohorts: Cohorts) -> None:
    rounds = simulate(cohorts, **EXAMPLES[name].switches)
    header = HEADER + 8 * rounds[0].plan.has_variates
    sizes = [len(cohort) for cohort in cohorts]
    wanted = zip(sizes, values_lacking(rounds), strict=True)
    assert downlinks(rounds) == [header * size + 4 * values for size, values in wanted]


# Rule by rule, on made-up plans.


def test_a_client_catches_up_on_directions_that_it_missed() -> None:
    ledger = Ledger(NUM_CLIENTS)
    each = HEADER + 4 * (2 * AB + HEAD)
    frozen = made_plan([0], 2, frozen_ranks=(1, 2))
    assert ledger.count_downlink(frozen, SHAPES) == each + 4 * (9 + 18)
    # Client 0 has heard them; clients 1 and 2 get them now; client 3 stays away.
    assert ledger.count_downlink(made_plan([0, 1, 2], 3), SHAPES) == 3 * each + 2 * 4 * 27
    assert ledger.count_downlink(made_plan([0, 1, 2], 4), SHAPES) == 3 * each
    more = made_plan([3], 5, frozen_ranks=(1, DENSE))
    assert ledger.count_downlink(more, SHAPES) == each + 4 * (27 + 9 + 18)
    assert ledger.count_downlink(made_plan([1, 3], 6), SHAPES) == 2 * each + 4 * 27


def test_base_weights_are_counted_once_per_client() -> None:
    ledger = Ledger(NUM_CLIENTS)
    each = HEADER + 4 * (2 * AB + HEAD)
    opening = made_plan([0, 1], 2, sends_base=True)
    assert ledger.count_downlink(opening, SHAPES) == 2 * (each + 4 * BODY)
    assert ledger.count_downlink(made_plan([1, 2], 3), SHAPES) == 2 * each + 4 * BODY
    assert ledger.count_downlink(made_plan([0, 1, 2, 3], 4), SHAPES) == 4 * each + 4 * BODY
    assert ledger.count_downlink(made_plan([0, 1, 2, 3], 5), SHAPES) == 4 * each


def test_maps_are_counted_once_per_client_and_variates_always() -> None:
    ledger = Ledger(NUM_CLIENTS)
    each = HEADER + 2 * 4 + 4 * 2 * (2 * AB + HEAD)
    cut = made_plan([0], 2, has_variates=True, mapped_ranks=(3, 3))
    assert ledger.count_downlink(cut, SHAPES) == each + 4 * 2 * (2 * 3 * 2)
    uncut = [made_plan([0, 1], round_num, has_variates=True) for round_num in (3, 4)]
    assert ledger.count_downlink(uncut[0], SHAPES) == 2 * each + 4 * 24
    assert ledger.count_downlink(uncut[1], SHAPES) == 2 * each


def test_what_goes_out_while_nobody_is_there_is_caught_up_on() -> None:
    ledger = Ledger(NUM_CLIENTS)
    assert ledger.count_downlink(made_plan([], 2, frozen_ranks=(1, 1), sends_parts="b"), SHAPES) == 0
    given_later = made_plan([1], 3, sends_parts="a", scope="b")
    assert ledger.count_downlink(given_later, SHAPES) == HEADER + 4 * (AB + 2 * AB + HEAD)


def test_only_the_last_version_of_a_factor_is_sent() -> None:
    ledger = Ledger(NUM_CLIENTS)
    turns = [made_plan([0], round_num, sends_parts="ba"[round_num % 2]) for round_num in range(2, 8)]
    only_a, only_b = HEADER + 4 * (2 * A + HEAD), HEADER + 4 * (2 * B + HEAD)
    assert [ledger.count_downlink(plan, SHAPES) for plan in turns] == [only_b, only_a] * 3
    late = made_plan([0, 1], 8, sends_parts="b")
    assert ledger.count_downlink(late, SHAPES) == only_b + HEADER + 4 * (2 * AB + HEAD)


def test_a_restart_leaves_nothing_to_send() -> None:
    ledger = Ledger(NUM_CLIENTS)
    for round_num in (2, 3):
        ledger.count_downlink(made_plan([0], round_num), SHAPES)
    restart = made_plan([0, 1], 4, sends_parts="")
    assert ledger.count_downlink(restart, SHAPES) == 2 * (HEADER + 4 * HEAD)
    # B has changed since, A is the one drawn then, also for client 2, which was never there.
    following = made_plan([1, 2], 5, sends_parts="b", scope="b")
    assert ledger.count_downlink(following, SHAPES) == 2 * (HEADER + 4 * (2 * B + HEAD))


def test_round_one_costs_headers_only() -> None:
    plan = made_plan([0, 2], 1, sends_state=False)
    assert Ledger(NUM_CLIENTS).count_downlink(plan, SHAPES) == 2 * HEADER
    plan = made_plan([0, 2], 1, sends_state=False, has_variates=True)
    assert Ledger(NUM_CLIENTS).count_downlink(plan, SHAPES) == 2 * (HEADER + 8)


def test_an_uplink_is_counted_on_what_is_sent() -> None:
    updates = [made_update(made_plan([0, 1], client_ranks=(1, 2, 2, 2)), client) for client in (0, 1)]
    assert count_uplink(updates) == 2 * 128 + 4 * (AB + HEAD + 2 * AB + HEAD)
    assert count_uplink([]) == 0


# Baselines.


@pytest.mark.parametrize("scope", ["adapter", "full"])
@pytest.mark.parametrize("size", range(1, NUM_CLIENTS + 1))
def test_the_fixed_closed_form_is_what_the_ledger_counts(scope: str, size: int) -> None:
    cohorts = list(combinations(range(NUM_CLIENTS), size))[:NUM_ROUNDS]
    rounds = simulate(cohorts, scope=scope)
    layout = SHAPES.full() if scope == "full" else SHAPES.adapter((3, 3))
    closed = fixed_traffic(SHAPES, layout.num_values, [len(cohort) for cohort in cohorts])
    assert closed.bytes == sum(downlinks(rounds)) + sum(uplinks(rounds))
    assert closed.bytes == 4 * closed.values + (128 + HEADER) * sum(map(len, cohorts))


def test_hand_sized_baseline_and_reduction() -> None:
    baseline = fixed_traffic(SHAPES, 10, [2, 3])
    assert baseline == Traffic(values=50 + 30, bytes=4 * 80 + 5 * (128 + HEADER))
    assert Traffic(0, baseline.bytes // 4).reduction(baseline) == 0.75
    assert baseline.reduction(baseline) == 0
