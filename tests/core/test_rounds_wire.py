"""Rounds whose messages and updates are rounded, or whose updates are added up on the way."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from core.cases import (
    ADAM,
    ALTERNATING,
    B_ONLY,
    CASES,
    FULL,
    MOMENTUM,
    NUM_ROUNDS,
    PERSONAL,
    SHAPES,
    Case,
    over,
)
from core.played import distance, exported_model, federation, play
from core.played_worker import PlayedWorker
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpifedlora.core.aggregation import AGGREGATORS
from mpifedlora.core.layout import LinearShape, ModelShapes, TensorShape, copy_common
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.rounds import Coordinator
from mpifedlora.core.schedule import RankSchedule
from mpifedlora.core.switches import Switches
from mpifedlora.core.wire import FAILED, ClientUpdate, UpdateHeader

LAWS = settings(max_examples=25, deadline=None)
DTYPES = ("bfloat16", "float16", "int8")
UNIT_ROUNDOFF = {"bfloat16": 2**-8, "float16": 2**-11, "int8": 1 / 127}
# Every case in which nothing must be exact, each dtype in turn, up and down.
LOSSY = [
    replace(case, uplink=DTYPES[(index + index // 3) % 3], downlink=DTYPES[index % 3])
    for index, case in enumerate(case for case in CASES if not case.has_variates)
]
LASTING = [Case("factors"), Case("zero-pad", False, cohort_size=3), B_ONLY, FULL]


# What is sent is what the server goes on from.


@over(LOSSY)
def test_the_server_goes_on_from_what_the_workers_read(case: Case) -> None:
    for played in play(case):
        assert torch.equal(played.message, played.coordinator.message)
        assert torch.equal(played.got.state, played.coordinator.state)
        assert distance(played.held, exported_model(played)) < 1e-6


@over(LOSSY)
def test_a_rounded_update_arrives_close_to_what_was_trained(case: Case) -> None:
    for played in federation(replace(case, downlink="float32"))[:4]:
        for update in played.updates:
            shared = played.plan.shared_layout(SHAPES, update.client_id)
            trained = played.plan.trained_layout(SHAPES, update.client_id)
            values = played.sent.trained[update.client_id]
            sent = copy_common(trained, values, shared, torch.zeros(shared.num_values))
            error = (update.values - sent).abs().max()
            # A change is 0.3 times a normal number.
            assert 0 < float(error) < UNIT_ROUNDOFF[case.uplink] * 0.3 * 5


# Error feedback.


def twin_that_sends_exactly(coordinator: Coordinator) -> Coordinator:
    twin = deepcopy(coordinator)
    wire = replace(twin.switches.wire, downlink="float32", has_feedback=False)
    twin.switches = replace(twin.switches, wire=wire)
    return twin


@pytest.mark.parametrize("dtype", DTYPES)
@over([B_ONLY, FULL])
def test_the_sum_of_what_was_sent_follows_the_sum_of_what_was_meant(case: Case, dtype: str) -> None:
    case = replace(case, downlink=dtype, has_feedback=True)
    coordinator, worker = case.coordinator(), PlayedWorker(case)
    apart, largest = torch.zeros(()), 0.0
    worker.read(coordinator.plan(), coordinator.wire)
    for _ in range(NUM_ROUNDS):
        headers, rows = worker.send([worker.train(client_id) for client_id in worker.plan.cohort])
        wires = [rows.wire(index) for index in range(len(rows))]
        exact = twin_that_sends_exactly(coordinator)
        exact.finish(exact.updates(headers, wires))
        coordinator.finish(coordinator.updates(headers, wires))
        worker.read(coordinator.plan(), coordinator.wire)
        apart = apart + (coordinator.state - exact.state)
        largest = max(largest, float(exact.state.abs().max()))
        assert float(apart.abs().max()) <= UNIT_ROUNDOFF[dtype] * largest * 1.5 + 1e-6
    assert float(apart.abs().max()) > 0


def drift(case: Case, change: float) -> Tensor:
    """How far a federation moves in whose every round each client adds the same to each value."""
    coordinator, worker = case.coordinator(), PlayedWorker(case)
    coordinator.state.fill_(1.0)
    worker.read(coordinator.plan(), coordinator.wire)
    worker.state.fill_(1.0)
    for _ in range(NUM_ROUNDS):
        values = worker.state + change
        updates = [ClientUpdate(client, 1, 1, 0.0, 0.0, 0.0, True, values) for client in worker.plan.cohort]
        headers, rows = worker.send(updates)
        arrived = coordinator.updates(headers, [rows.wire(index) for index in range(len(rows))])
        coordinator.finish(arrived)
        worker.read(coordinator.plan(), coordinator.wire)
    return coordinator.state - 1.0


@pytest.mark.parametrize(("dtype", "step"), [("bfloat16", 2**-7), ("float16", 2**-10)])
def test_changes_below_a_step_of_the_downlink_arrive_with_feedback_only(dtype: str, step: float) -> None:
    change, case = 0.3 * step, replace(FULL, downlink=dtype)
    assert not bool(drift(case, change).any())
    moved = drift(replace(case, has_feedback=True), change)
    # 8 rounds of 0.3 steps, and less than one step on its way.
    assert float((moved - NUM_ROUNDS * change).abs().max()) <= step


@pytest.mark.parametrize(("dtype", "unit"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_an_uplinks_errors_do_not_add_up_with_feedback(dtype: str, unit: float) -> None:
    # Above the middle between two numbers: each round is rounded up by a quarter of their distance.
    change, case = 1 + 1.5 * unit, replace(FULL, uplink=dtype)
    wanted = NUM_ROUNDS * change
    without, moved = drift(case, change), drift(replace(case, has_feedback=True), change)
    assert float((without - wanted).abs().min()) >= 0.49 * NUM_ROUNDS * unit
    assert float((moved - wanted).abs().max()) <= 1.01 * unit


@over([replace(case, uplink="bfloat16", downlink="bfloat16", has_feedback=True) for case in LASTING])
def test_losses_of_clients_are_known_by_the_round_that_counted_them(case: Case) -> None:
    kept = [0] * 6
    for played in play(case):
        assert list(played.plan.state_rounds) == kept
        for client_id in played.used:
            kept[client_id] = played.plan.round_num


# Sums on the way.

REDUCED = [
    Case("factors"),
    Case("factors", False, cohort_size=3),
    Case("factors", initiating="full", cohort_size=3),
    Case("zero-pad", weights="equal"),
    B_ONLY,
    ALTERNATING,
    replace(FULL, cohort_size=3, weights="equal"),
    *PERSONAL,
    Case("factors", probability=0.25, seed=1),
    Case("factors", optimizer=ADAM),
    replace(FULL, optimizer=MOMENTUM),
]


@over(REDUCED)
def test_a_sum_gives_the_mean_of_its_updates(case: Case) -> None:
    for played, wanted in zip(play(replace(case, reduces=True)), federation(case), strict=True):
        assert played.plan.reduces
        assert distance(played.held, wanted.held) < 1e-5
        assert played.next_plan == replace(wanted.next_plan, reduces=True)
        report = played.report
        assert (report.outcomes, played.used) == (wanted.report.outcomes, wanted.used)
        losses = (report.train_loss, report.penalty)
        assert losses == pytest.approx((wanted.report.train_loss, wanted.report.penalty), nan_ok=True)
        assert math.isnan(report.aggregation_error)


def without_client_4(_: int, updates: list[ClientUpdate]) -> list[ClientUpdate]:
    return [
        replace(one, values=one.values * math.nan, is_finite=False) if one.client_id == 4 else one
        for one in updates
    ]


@pytest.mark.parametrize("rise", [0.0, 1e9])
def test_a_cut_of_a_summed_round_is_judged(rise: float) -> None:
    def judge(worker: PlayedWorker, plan: RoundPlan, message: Tensor) -> float:
        return rise * (plan.lora_ranks != worker.plan.lora_ranks)

    case = Case("factors", False, schedule="metropolis")
    history = zip(play(replace(case, reduces=True), judge=judge), play(case, judge=judge), strict=True)
    ranks = [(played.plan.lora_ranks, wanted.plan.lora_ranks) for played, wanted in history]
    assert all(one == other for one, other in ranks)
    assert (ranks[-1][0] == (4, 3, 4)) == (rise > 0)


@over([Case("factors"), FULL])
def test_what_is_not_finite_is_named_and_is_in_no_sum(case: Case) -> None:
    history = play(replace(case, reduces=True), without_client_4)
    for played, wanted in zip(history, play(case, without_client_4), strict=True):
        assert played.report.outcomes == {**dict.fromkeys(range(4), "used"), 4: "not finite"}
        assert distance(played.held, wanted.held) < 1e-5


def client_4_failed(_: int, updates: list[ClientUpdate]) -> list[ClientUpdate]:
    return [
        replace(one, values=one.values * 0, is_finite=False, fault=FAILED) if one.client_id == 4 else one
        for one in updates
    ]


@over([Case("factors"), FULL])
def test_a_client_that_failed_is_named_and_is_in_no_sum(case: Case) -> None:
    history = play(replace(case, reduces=True), client_4_failed)
    for played, wanted in zip(history, play(case, without_client_4), strict=True):
        assert played.report.outcomes == {**dict.fromkeys(range(4), "used"), 4: "failed"}
        assert distance(played.held, wanted.held) < 1e-5


@over(REDUCED)
def test_a_sum_of_nobody_keeps_the_model(case: Case) -> None:
    def nobody(_: int, updates: list[ClientUpdate]) -> list[ClientUpdate]:
        return [replace(one, values=one.values * math.nan, is_finite=False) for one in updates]

    for played in play(replace(case, reduces=True, schedule="constant"), nobody):
        assert (played.used, set(played.report.outcomes.values()) <= {"not finite"}) == ([], True)
        assert distance(played.held, played.before) < 1e-6
        assert math.isnan(played.report.train_loss)


WHOLE_NUMBERS = st.lists(st.integers(-99, 99), min_size=7, max_size=7).map(
    lambda row: torch.tensor(row).float()
)


@LAWS
@given(rows=st.lists(WHOLE_NUMBERS, min_size=2, max_size=2), order=st.permutations([0, 1]))
def test_sums_of_whole_numbers_are_exact(rows: list[Tensor], order: list[int]) -> None:
    # Weights 3/4 and 1/4: no sum and no mean needs rounding.
    headers = [UpdateHeader(client, (3, 1)[client], 1, 0.5, 0.0, 0.1, True) for client in order]
    whole, summed = small_coordinator(reduces=False), small_coordinator(reduces=True)
    wanted = whole.finish([ClientUpdate(**vars(one), values=rows[one.client_id]) for one in headers])
    total = torch.stack(rows).T @ torch.tensor([3.0, 1.0])
    report = summed.finish_sum(headers, total.double())
    assert torch.equal(summed.state, whole.state)
    assert summed.state.tolist() == ((3 * rows[0] + rows[1]) / 4).tolist()
    assert (report.train_loss, report.outcomes) == (wanted.train_loss, {0: "used", 1: "used"})
    assert list(report.outcomes) == [0, 1]


def small_coordinator(*, reduces: bool) -> Coordinator:
    shapes = ModelShapes((LinearShape("m", 2, 3),), (TensorShape("head", (2,)),), ())
    switches = Switches(
        schedule=RankSchedule("constant", 2, 0, 0, 1, 1),
        learning_rate=lambda round_num, scope: 1.0,
        choose_workers=lambda round_num, without: [0, 0],
        aggregator=AGGREGATORS["factors"],
        reduces=reduces,
    )
    return Coordinator(shapes, switches, lambda plan: torch.zeros(7), seed=0)


def test_a_sum_that_is_not_finite_is_nobodys() -> None:
    coordinator = small_coordinator(reduces=True)
    headers = [UpdateHeader(client, 1, 1, 0.5, 0.0, 0.1, True) for client in (0, 1)]
    report = coordinator.finish_sum(headers, torch.full((7,), math.nan))
    assert (report.participants, set(report.outcomes.values())) == ((), {"not finite"})
    assert coordinator.state.tolist() == [0.0] * 7
