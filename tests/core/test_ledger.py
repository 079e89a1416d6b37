from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
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
SHAPES = ModelShapes(
    (LinearShape("q", 4, 5), LinearShape("v", 3, 6)),
    (TensorShape("head", (2,)),),
    (TensorShape("q.weight", (4, 5)), TensorShape("v.weight", (3, 6))),
)
# What is sent, as [values, bytes under int8]: a byte a value, and four a scale.
Count = npt.NDArray[np.int64]
# A direction of q has 5 values in A and 4 in B, one of v has 6 and 3; each has a scale in A and one in B.
A, B = np.array([5 + 6, 9 + 10]), np.array([4 + 3, 8 + 7])
Q, V = np.array([5 + 4, 9 + 8]), np.array([6 + 3, 10 + 7])
AB = A + B
# The head is a vector with one scale. A weight has one a row; so has a frozen matrix of its shape.
HEAD = np.array([2, 2 + 4])
Q_MATRIX, V_MATRIX = np.array([4 * 5, 4 * (5 + 4)]), np.array([3 * 6, 3 * (6 + 4)])
BODY = Q_MATRIX + V_MATRIX
HEADER = 128 + 2 * 2 * 4  # of a downlink: fixed part, and two ranks of 4 bytes for each of two modules
DTYPES = ("float32", "bfloat16", "float16", "int8")
all_dtypes = pytest.mark.parametrize("dtype", DTYPES)
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

    def workers(round_num: int, without: Sequence[int]) -> list[int]:
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
    return initial_adapter(SHAPES, plan.lora_ranks, torch.zeros(2), 0)


def made_update(plan: RoundPlan, client_id: int) -> ClientUpdate:
    generator = torch.Generator().manual_seed(torch_seed(0, "test", plan.round_num, client_id))
    values = torch.randn(plan.row_values(SHAPES, client_id), generator=generator)
    return ClientUpdate(client_id, 1, 1, 0, 0, 0, True, values)


def traffic(dtype: str, header_bytes: int, count: Count | int) -> Traffic:
    values, int8_bytes = (int(part) for part in np.zeros(2, np.int64) + count)
    widths = {"float32": 4, "bfloat16": 2, "float16": 2}
    return Traffic(values, header_bytes + (int8_bytes if dtype == "int8" else widths[dtype] * values))


def downlinks(rounds: Sequence[Played], dtype: str = "float32") -> list[Traffic]:
    ledger = Ledger(NUM_CLIENTS, dtype)
    return [ledger.count_downlink(played.plan, SHAPES) for played in rounds]


def uplinks(rounds: Sequence[Played], dtype: str = "float32") -> list[Traffic]:
    return [count_uplink(played.plan, SHAPES, dtype) for played in rounds]


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
    """A run of three rounds, and what each round sends, counted by hand."""

    cohorts: Cohorts
    switches: dict[str, Any]
    downlink: list[Any]
    uplink: list[Any]


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
        [0, HEAD + BODY, 2 * (HEAD + 2 * AB) + BODY],
        [2 * (2 * AB + HEAD), 2 * AB + HEAD, 2 * (2 * AB + HEAD)],
    ),
    # The residual of two clients has the directions of one. One client has none. Client 2 missed two of v,
    # which have the 18 values of its matrix, and more bytes than it under int8 (34 and 30).
    "residual": Example(
        [[0, 1], [0, 1], [2]],
        {"aggregator": "residual", "lora_rank": 2},
        [0, 2 * (2 * AB + HEAD + 2 * AB), 2 * AB + HEAD + 2 * AB + 2 * Q + V_MATRIX],
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
    "variates": Example(
        SOME,
        {"kind": "linear", "has_variates": True, "aggregator": "factors", "freezes": False},
        [0, 2 * (2 * AB + HEAD) + 24, 2 * (2 * (AB + HEAD) + 8) + 24],
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
        [0, 2 * (BODY + HEAD), 2 * 2 * (BODY + HEAD)],
        [2 * 2 * (BODY + HEAD), 2 * (BODY + HEAD), 2 * 2 * (BODY + HEAD)],
    ),
}


def dtypes_of(example: Example) -> Sequence[str]:
    """Wire dtypes that a run may have: control variates go as float32 only."""
    return DTYPES[:1] if "has_variates" in example.switches else DTYPES


def header_bytes(rounds: Sequence[Played]) -> int:
    """Bytes of a downlink's header: with control variates it has a third list of ranks."""
    return HEADER + 2 * 4 * rounds[0].plan.has_variates


@pytest.mark.parametrize("name", EXAMPLES)
def test_hand_sized_runs(name: str) -> None:
    example = EXAMPLES[name]
    rounds, sizes = simulate(example.cohorts, **example.switches), [len(cohort) for cohort in example.cohorts]
    header = header_bytes(rounds)
    for dtype in dtypes_of(example):
        down, up = zip(sizes, example.downlink, strict=True), zip(sizes, example.uplink, strict=True)
        assert downlinks(rounds, dtype) == [traffic(dtype, header * size, count) for size, count in down]
        assert uplinks(rounds, dtype) == [traffic(dtype, 128 * size, count) for size, count in up]


# What a client lacks, from the values themselves.


def own_factors(played: Played, client_id: int) -> list[Factors]:
    """The global factors as a client holds them: its leading directions."""
    plan = played.plan
    ranks = plan.trained_layout(SHAPES, client_id).lora_ranks
    pairs = zip(plan.layout(SHAPES).factors(played.state), ranks, strict=True)
    return [Factors(a[:lora_rank], b[:, :lora_rank]) for (a, b), lora_rank in pairs]


def lacking(played: Played, client_id: int, held: Sequence[Factors]) -> Count:
    """What a client does not hold of the state: variate, head, and each factor that differs."""
    plan = played.plan
    if not plan.sends_state:
        return np.zeros(2, np.int64)
    shared = plan.shared_layout(SHAPES, client_id)
    missing: Count = shared.num_values * plan.has_variates + HEAD * (not plan.keeps_head)
    missing = missing + BODY * (plan.scope == "full")
    wanted = own_factors(played, client_id)
    for part in ("a",) if plan.keeps_b else ("a", "b"):
        mine, theirs = ([getattr(factors, part) for factors in side] for side in (held, wanted))
        if len(mine) != len(theirs) or not all(map(torch.equal, mine, theirs)):
            num_values = sum(factor.numel() for factor in theirs)
            missing = missing + (num_values, num_values + 4 * sum(factors.lora_rank for factors in wanted))
    return missing


def assert_is_drawn(played: Played) -> None:
    drawn = initial_adapter(SHAPES, played.plan.lora_ranks, torch.zeros(2), 0, played.plan.round_num)
    assert torch.equal(drawn[:-2], played.state[:-2])


def frozen_counts(plan: RoundPlan) -> list[Count]:
    """Each module's frozen part in a message."""
    matrices = zip(plan.frozen_ranks, (Q, V), (Q_MATRIX, V_MATRIX), strict=True)
    return [matrix if rank == DENSE else rank * direction for rank, direction, matrix in matrices]


def counts_lacking(rounds: Sequence[Played]) -> list[Count]:
    """Downlink of each round, client by client, by what differs and what went out once.

    What a client missed of a module's frozen parts comes as one matrix where that is less.
    """
    held = [own_factors(rounds[0], client) for client in range(NUM_CLIENTS)]
    nothing = np.zeros(2, np.int64)
    waiting, totals = [nothing] * NUM_CLIENTS, []
    missed = [[nothing, nothing] for _ in range(NUM_CLIENTS)]
    for played in rounds:
        parts, frozen, total = played.plan.segments(SHAPES), frozen_counts(played.plan), nothing
        assert parts.frozen.num_values == np.sum(frozen, axis=0)[0]
        waiting = [count + BODY * played.plan.sends_base + parts.maps.num_values for count in waiting]
        if played.plan.restarts:  # everybody knows the seed
            assert_is_drawn(played)
            held = [own_factors(played, client) for client in range(NUM_CLIENTS)]
        for client in range(NUM_CLIENTS):
            if client not in played.plan.cohort:
                missed[client] = list(map(np.add, missed[client], frozen))
                continue
            total = total + waiting[client] + lacking(played, client, held[client]) + sum(frozen)
            total = total + sum(map(np.minimum, missed[client], (Q_MATRIX, V_MATRIX)))
            waiting[client], held[client] = nothing, own_factors(played, client)
            missed[client] = [nothing, nothing]
        totals.append(total)
    return totals


@pytest.mark.parametrize("name", EXAMPLES)
@settings(max_examples=8, deadline=None)
@given(cohorts=st.lists(COHORTS, min_size=NUM_ROUNDS, max_size=NUM_ROUNDS))
def test_every_client_receives_what_it_lacks_and_no_more(name: str, cohorts: Cohorts) -> None:
    rounds = simulate(cohorts, **EXAMPLES[name].switches)
    header, counts = header_bytes(rounds), counts_lacking(rounds)
    for dtype in dtypes_of(EXAMPLES[name]):
        pairs = zip(cohorts, counts, strict=True)
        wanted = [traffic(dtype, header * len(cohort), count) for cohort, count in pairs]
        assert [round_.bytes for round_ in downlinks(rounds, dtype)] == [round_.bytes for round_ in wanted]


# Rule by rule, on made-up plans.


def sent(dtype: str, num_clients: int, count: Count | int) -> Traffic:
    """A downlink to so many clients."""
    return traffic(dtype, HEADER * num_clients, count)


STATE = 2 * AB + HEAD  # what a made-up plan sends to a client that lacks both factors


@all_dtypes
def test_a_client_catches_up_on_directions_that_it_missed(dtype: str) -> None:
    ledger = Ledger(NUM_CLIENTS, dtype)
    frozen = made_plan([0], 2, frozen_ranks=(1, 2))
    assert ledger.count_downlink(frozen, SHAPES) == sent(dtype, 1, STATE + Q + 2 * V)
    # Client 0 has heard them; clients 1 and 2 get them now; client 3 stays away. The two directions of v
    # have the 18 values of its matrix, and go as they are; but 34 bytes under int8, where the matrix has 30.
    late = Q + np.array([18, 30])
    assert ledger.count_downlink(made_plan([0, 1, 2], 3), SHAPES) == sent(dtype, 3, 3 * STATE + 2 * late)
    assert ledger.count_downlink(made_plan([0, 1, 2], 4), SHAPES) == sent(dtype, 3, 3 * STATE)
    more = made_plan([3], 5, frozen_ranks=(1, DENSE))
    assert ledger.count_downlink(more, SHAPES) == sent(dtype, 1, STATE + late + Q + V_MATRIX)
    assert ledger.count_downlink(made_plan([1, 3], 6), SHAPES) == sent(dtype, 2, 2 * STATE + Q + V_MATRIX)


def test_as_many_bytes_are_no_reason_for_a_matrix() -> None:
    # Two directions have 26 values and four scales, the matrix 30 values and three scales.
    shapes, ledger = ModelShapes((LinearShape("u", 3, 10),), (), ()), Ledger(NUM_CLIENTS, "int8")
    ledger.count_downlink(made_plan([], 2, lora_ranks=(0,), frozen_ranks=(2,)), shapes)
    late = made_plan([1], 3, lora_ranks=(0,), frozen_ranks=(0,))
    assert ledger.count_downlink(late, shapes) == Traffic(26, 128 + 2 * 4 + 42)


# Two directions of (3, 7) have 20 values and four scales, its matrix 21 values and three scales. So the
# sum of two missed directions goes as factors, except under int8: 20 + 4 * 4 bytes are more than 21 + 3 * 4.
MERGED = {
    "float32": Traffic(20, 4 * 20),
    "bfloat16": Traffic(20, 2 * 20),
    "float16": Traffic(20, 2 * 20),
    "int8": Traffic(21, 33),
}


@all_dtypes
def test_what_was_missed_goes_as_one_matrix_where_that_has_fewer_bytes(dtype: str) -> None:
    shapes, header = ModelShapes((LinearShape("u", 3, 7),), (), ()), Traffic(0, 128 + 2 * 4)
    ledger, state = Ledger(NUM_CLIENTS, dtype), {"lora_ranks": (0,)}
    for round_num in (2, 3):
        ledger.count_downlink(made_plan([0], round_num, frozen_ranks=(1,), **state), shapes)
    late = made_plan([1], 4, frozen_ranks=(0,), **state)
    assert ledger.count_downlink(late, shapes) == header + MERGED[dtype]
    # Three have 30 values, the matrix 21, in any dtype; the last message goes as it is.
    again = made_plan([2], 5, frozen_ranks=(1,), **state)
    factors, matrix = {"float32": (40, 84), "int8": (18, 33)}.get(dtype, (20, 42))
    as_it_is, before = Traffic(10, factors), MERGED[dtype]
    assert ledger.count_downlink(again, shapes) == header + before + as_it_is
    last = made_plan([3], 6, frozen_ranks=(0,), **state)
    assert ledger.count_downlink(last, shapes) == header + Traffic(21, matrix)


@all_dtypes
def test_base_weights_are_counted_once_per_client(dtype: str) -> None:
    ledger = Ledger(NUM_CLIENTS, dtype)
    opening = made_plan([0, 1], 2, sends_base=True)
    assert ledger.count_downlink(opening, SHAPES) == sent(dtype, 2, 2 * (STATE + BODY))
    assert ledger.count_downlink(made_plan([1, 2], 3), SHAPES) == sent(dtype, 2, 2 * STATE + BODY)
    assert ledger.count_downlink(made_plan([0, 1, 2, 3], 4), SHAPES) == sent(dtype, 4, 4 * STATE + BODY)
    assert ledger.count_downlink(made_plan([0, 1, 2, 3], 5), SHAPES) == sent(dtype, 4, 4 * STATE)


def test_maps_are_counted_once_per_client_and_variates_always() -> None:
    ledger = Ledger(NUM_CLIENTS)
    each = Traffic(2 * 38, HEADER + 2 * 4 + 4 * 2 * 38)  # 2 * 18 values of factors and 2 of the head, twice
    maps = Traffic(24, 4 * 24)  # 2 modules, 2 maps, 3 * 2 values
    cut = made_plan([0], 2, has_variates=True, mapped_ranks=(3, 3))
    assert ledger.count_downlink(cut, SHAPES) == each + maps
    uncut = [made_plan([0, 1], round_num, has_variates=True) for round_num in (3, 4)]
    assert ledger.count_downlink(uncut[0], SHAPES) == each + each + maps
    assert ledger.count_downlink(uncut[1], SHAPES) == each + each


@all_dtypes
def test_what_goes_out_while_nobody_is_there_is_caught_up_on(dtype: str) -> None:
    ledger = Ledger(NUM_CLIENTS, dtype)
    to_nobody = made_plan([], 2, frozen_ranks=(1, 1), sends_parts="b")
    assert ledger.count_downlink(to_nobody, SHAPES) == Traffic(0, 0)
    given_later = made_plan([1], 3, sends_parts="a", scope="b")
    assert ledger.count_downlink(given_later, SHAPES) == sent(dtype, 1, AB + STATE)


@all_dtypes
def test_only_the_last_version_of_a_factor_is_sent(dtype: str) -> None:
    ledger = Ledger(NUM_CLIENTS, dtype)
    turns = [made_plan([0], round_num, sends_parts="ba"[round_num % 2]) for round_num in range(2, 8)]
    only_a, only_b = sent(dtype, 1, 2 * A + HEAD), sent(dtype, 1, 2 * B + HEAD)
    assert [ledger.count_downlink(plan, SHAPES) for plan in turns] == [only_b, only_a] * 3
    late = made_plan([0, 1], 8, sends_parts="b")
    assert ledger.count_downlink(late, SHAPES) == only_b + sent(dtype, 1, STATE)


@all_dtypes
def test_a_restart_leaves_nothing_to_send(dtype: str) -> None:
    ledger = Ledger(NUM_CLIENTS, dtype)
    for round_num in (2, 3):
        ledger.count_downlink(made_plan([0], round_num), SHAPES)
    restart = made_plan([0, 1], 4, sends_parts="")
    assert ledger.count_downlink(restart, SHAPES) == sent(dtype, 2, 2 * HEAD)
    # B has changed since, A is the one drawn then, also for client 2, which was never there.
    following = made_plan([1, 2], 5, sends_parts="b", scope="b")
    assert ledger.count_downlink(following, SHAPES) == sent(dtype, 2, 2 * (2 * B + HEAD))


@all_dtypes
def test_round_one_costs_headers_only(dtype: str) -> None:
    plan = made_plan([0, 2], 1, sends_state=False)
    assert Ledger(NUM_CLIENTS, dtype).count_downlink(plan, SHAPES) == Traffic(0, 2 * HEADER)
    plan = made_plan([0, 2], 1, sends_state=False, has_variates=True)
    assert Ledger(NUM_CLIENTS).count_downlink(plan, SHAPES) == Traffic(0, 2 * (HEADER + 8))


@all_dtypes
def test_an_uplink_is_the_rows_of_the_cohort(dtype: str) -> None:
    plan = made_plan([0, 1], client_ranks=(1, 2, 2, 2))
    wanted = traffic(dtype, 2 * 128, AB + HEAD + 2 * AB + HEAD)
    assert count_uplink(plan, SHAPES, dtype) == wanted
    assert count_uplink(made_plan([]), SHAPES, dtype) == Traffic(0, 0)


def test_control_variates_double_an_uplink() -> None:
    plan = made_plan([0, 1], client_ranks=(1, 2, 2, 2), has_variates=True)
    assert count_uplink(plan, SHAPES) == traffic("float32", 2 * 128, 2 * (3 * AB + 2 * HEAD))
    values = sum(plan.row_values(SHAPES, client_id) for client_id in plan.cohort)
    assert count_uplink(plan, SHAPES).values == values


def test_hand_sized_int8_downlink() -> None:
    # Per module and direction a scale of A and one of B; one scale for the head.
    scales, values = 4 * (2 * 2 * 2 + 1), 2 * (5 + 4 + 6 + 3) + 2
    counted = Ledger(NUM_CLIENTS, "int8").count_downlink(made_plan([0]), SHAPES)
    assert counted == Traffic(38, 144 + 36 + 38) == Traffic(values, HEADER + scales + values)


# Baselines.


@pytest.mark.parametrize("scope", ["adapter", "full"])
@pytest.mark.parametrize("size", range(1, NUM_CLIENTS + 1))
def test_the_fixed_closed_form_is_what_the_ledger_counts(scope: str, size: int) -> None:
    cohorts = list(combinations(range(NUM_CLIENTS), size))[:NUM_ROUNDS]
    rounds = simulate(cohorts, scope=scope)
    layout = SHAPES.full() if scope == "full" else SHAPES.adapter((3, 3))
    closed = fixed_traffic(SHAPES, layout.num_values, [len(cohort) for cohort in cohorts])
    assert closed == sum([*downlinks(rounds), *uplinks(rounds)], Traffic(0, 0))
    assert closed.bytes == 4 * closed.values + (128 + HEADER) * sum(map(len, cohorts))


def test_hand_sized_baseline() -> None:
    baseline = fixed_traffic(SHAPES, 10, [2, 3])
    assert baseline == Traffic(values=50 + 30, bytes=4 * 80 + 5 * (128 + HEADER))
