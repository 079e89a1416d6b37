from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from core.cases import (
    ALTERNATING,
    B_ONLY,
    BOUND_CASES,
    CASES,
    CLIENT_RANK_CASES,
    FULL,
    KRUM_CASES,
    NUM_ROUNDS,
    OPTIMIZER_CASES,
    PERSONAL,
    SHAPES,
    SPECTRAL_CASES,
    VARIATE_CASES,
    Case,
    over,
)
from core.played_worker import PlayedWorker
from torch import Tensor

from mpifedlora.core.annealer import Annealer
from mpifedlora.core.report import RoundReport
from mpifedlora.core.rounds import Coordinator
from mpifedlora.core.screening import NOT_CHOSEN, NOT_FINITE, USED, Screening
from mpifedlora.core.server_optimizer import Moments
from mpifedlora.core.server_update import FlatUpdate
from mpifedlora.core.streaming import RoundStream, admit
from mpifedlora.core.wire import FAILED, LATE, ClientUpdate, UpdateHeader, UpdateRows

APART = [
    *BOUND_CASES,
    *CLIENT_RANK_CASES,
    *KRUM_CASES,
    *(case for case in OPTIMIZER_CASES if case.has_variates),
    *SPECTRAL_CASES,
    *VARIATE_CASES,
    *map(Case, ("residual", "stack")),
    Case(weights="frobenius"),
    Case("product", False, schedule="metropolis"),
    replace(FULL, noise=(1.0, 1.0, 5.0)),
]
LOCAL = [case for case in CASES if case.coordinator().switches.is_local]
LOCAL += [Case("factors", schedule="target"), replace(PERSONAL[1], initiating="adapter")]
# Of each kind one.
SOME = [
    Case(),
    Case("factors", False, cohort_size=3),
    Case("zero-pad", initiating="full", cohort_size=3),
    replace(B_ONLY, initiating="full"),
    replace(ALTERNATING, initiating="adapter", cohort_size=3),
    replace(FULL, cohort_size=3),
    *PERSONAL,
    Case(robust="median"),
    replace(FULL, robust="trimmed-mean"),
    Case(probability=0.25, seed=1),
    *OPTIMIZER_CASES[:5:2],
]
DTYPES = [("bfloat16", "int8"), ("int8", "bfloat16"), ("float16", "float16"), ("float32", "int8")]
ROUNDED = [
    replace(case, uplink=DTYPES[index % 4][0], downlink=DTYPES[index % 4][1])
    for index, case in enumerate(SOME * 2)
]
LASTING = [Case("factors"), Case("factors", False, cohort_size=3), B_ONLY, FULL]
FED_BACK = [
    replace(case, uplink=up, downlink=down, has_feedback=True)
    for case in LASTING
    for up, down in [("int8", "int8"), ("float16", "bfloat16")]
]
ALONE, ALL_IN_ONE = 1, None
PART_BYTES = (ALONE, 300, ALL_IN_ONE)
JUNK = 0xEE
INSIDE = ("switches", "combiner", "spare", "_foreseen")  # of a coordinator, what is not compared


# The server's and the workers' side of a stream.


def may_stream(coordinator: Coordinator) -> bool:
    return coordinator.streams(coordinator.next_plan)


def take_all(
    coordinator: Coordinator,
    headers: Sequence[UpdateHeader],
    rows: UpdateRows,
    part_bytes: int | None,
    **options: bool,
) -> tuple[RoundStream, Tensor]:
    """Take a round in as a server does; return the stream, and what of the next message has gone out."""
    stream = coordinator.stream(headers, part_bytes, **options)
    sent = torch.full_like(stream.wire, JUNK)
    for part in stream.parts:
        shape = (len(headers), part.uplink.size)
        spans = torch.full(shape, JUNK, dtype=torch.uint8)  # what is behind a row is anything
        for index, span in enumerate(spans):
            row = rows.wire(index)[slice(*part.uplink)]
            span[: len(row)] = row
        stream.take(part, dict(zip((one.client_id for one in headers), spans, strict=True)), lambda: None)
        for first, last in part.downlink:
            sent[first:last] = stream.wire[first:last]
    return stream, sent


@dataclass(frozen=True)
class Arrived:
    """A round's updates, and who takes them in: one coordinator whole, the others in parts."""

    whole: Coordinator
    by_parts: dict[int | None, Coordinator]
    headers: list[UpdateHeader]
    rows: UpdateRows

    @property
    def plan(self) -> Any:
        return self.whole.next_plan


def rounds_of(case: Case, hidden: Sequence[int] = ()) -> Iterator[Arrived]:
    """Run a federation; the caller finishes each round on all coordinators, or on the whole one only.

    Args:
        case: its switches.
        hidden: clients of which not all values are finite, although their headers say so.
    """
    whole, worker = case.coordinator(), PlayedWorker(case)
    by_parts = {part_bytes: case.coordinator() for part_bytes in PART_BYTES}
    for round_num in range(1, NUM_ROUNDS + 1):
        worker.read(whole.plan(), whole.wire)
        if round_num > 1:
            for coordinator in (whole, *by_parts.values()):
                coordinator.annealer.note(0.9 if round_num < 7 else 0.1)
        if may_stream(whole):  # what is foreseen changes nothing, right or wrong
            by_parts[ALONE].foresee(ALONE)
            by_parts[ALL_IN_ONE].foresee(ALONE, evaluates=True)
        updates = [spoilt(one, hidden) for one in map(worker.train, worker.plan.cohort)]
        headers, rows = worker.send(updates[::-1])
        received = {part_bytes: coordinator.wire for part_bytes, coordinator in by_parts.items()}
        yield Arrived(whole, by_parts, headers, rows)
        for part_bytes, coordinator in by_parts.items():
            coordinator.spare = received[part_bytes].fill_(JUNK)


def spoilt(update: ClientUpdate, hidden: Sequence[int]) -> ClientUpdate:
    if update.client_id not in hidden:
        return update
    values = update.values.clone()
    # Of two clients, one in the first piece, with inf, and one in the last one.
    first = update.client_id == hidden[0]
    values[1 if first else -2] = math.inf if first else math.nan
    return replace(update, values=values)


def assert_same(one: Any, other: Any, name: str = "") -> None:
    """Compare two coordinators, and whatever they hold, to the bit."""
    if isinstance(one, Tensor):
        assert one.shape == other.shape, name
        assert one.numpy().tobytes() == other.numpy().tobytes(), name
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), name
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{name}[{index}]")
    elif isinstance(one, (Coordinator, Annealer, FlatUpdate, Moments)):
        mine, theirs = held_by(one), held_by(other)
        assert mine.keys() == theirs.keys(), name
        for key in mine:
            assert_same(mine[key], theirs[key], f"{name}.{key}")
    else:
        assert one == other, name


def held_by(holder: Any) -> dict[str, Any]:
    held = {name: value for name, value in vars(holder).items() if name not in INSIDE}
    if isinstance(holder, Coordinator):
        size = message_bytes(holder)
        assert len(held["wire"]) == -(-size // 64) * 64
        held["wire"] = held["wire"][:size]  # behind it is anything
    return held


def message_bytes(coordinator: Coordinator) -> int:
    return coordinator.switches.wire.message_bytes(coordinator.next_plan, SHAPES)


def facts(report: RoundReport) -> dict[str, Any]:
    """What a report says; nan as a word, and participants by their headers."""
    headers = [{**vars(one), "values": None} for one in report.participants]
    return {name: repr(value) for name, value in {**vars(report), "participants": headers}.items()}


# The same bits.


def finish(coordinator: Coordinator, arrived: Arrived) -> RoundReport:
    rows = [arrived.rows.wire(index) for index in range(len(arrived.headers))]
    return coordinator.finish(coordinator.updates(arrived.headers, rows))


@over([*LOCAL, *ROUNDED, *FED_BACK])
def test_parts_and_whole_give_the_same_bits(case: Case) -> None:
    opens = case.initiating == "full" != case.scope
    for round_num, arrived in enumerate(rounds_of(case), start=1):
        everybody = (arrived.whole, *arrived.by_parts.values())
        assert {may_stream(coordinator) for coordinator in everybody} == {not (opens and round_num == 2)}
        if not may_stream(arrived.whole):
            for coordinator in everybody:
                finish(coordinator, arrived)
            continue
        streams = {}
        for part_bytes, coordinator in arrived.by_parts.items():
            streams[part_bytes] = take_all(coordinator, arrived.headers, arrived.rows, part_bytes)
            assert_same(coordinator, arrived.whole)  # as it was
        report = finish(arrived.whole, arrived)
        for part_bytes, coordinator in arrived.by_parts.items():
            stream, sent = streams[part_bytes]
            assert facts(coordinator.commit(stream)) == facts(report)
            assert_same(coordinator, arrived.whole)
            size = message_bytes(coordinator)
            assert_same(sent[:size], coordinator.wire[:size])


@over([*SOME, *ROUNDED[:2]])
def test_what_was_foreseen_is_not_made_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def made_again(*args: Any) -> Any:
        pytest.fail("the next plan was made before the headers came")

    options: Any = {"evaluates": True}
    for arrived in rounds_of(case):
        if may_stream(arrived.whole):
            arrived.whole.foresee(ALONE, **options)
            with monkeypatch.context() as patched:
                patched.setattr("mpifedlora.core.rounds.plan_next", made_again)
                stream = arrived.whole.stream(arrived.headers, ALONE, **options)
            assert [one.client_id for one in stream.admitted.used] == sorted(arrived.plan.cohort)
        finish(arrived.whole, arrived)


@pytest.mark.parametrize("what", ["a fault", "other parts", "the end", "whole rows", "another plan"])
def test_what_was_foreseen_wrongly_gives_its_buffer_back(what: str) -> None:
    arrived = next(rounds_of(FULL))
    coordinator, headers = arrived.whole, arrived.headers
    finish(coordinator, arrived)
    expected = coordinator.spare = coordinator.wire.clone()
    coordinator.foresee(ALONE)
    assert coordinator.spare is None
    if what == "whole rows":
        finish(coordinator, arrived)
        assert coordinator.wire is expected
        return
    if what == "a fault":
        headers = [*headers[:-1], replace(headers[-1], fault=FAILED)]
    if what == "another plan":
        coordinator.next_plan = replace(coordinator.next_plan, learning_rate=0.5)
    part_bytes = ALL_IN_ONE if what == "other parts" else ALONE
    stream = coordinator.stream(headers, part_bytes, stops=what == "the end")
    assert stream.wire is expected
    assert stream.announced.stops == (what == "the end")
    assert len(stream.admitted.used) == len(headers) - (what == "a fault")


@pytest.mark.parametrize("part_bytes", PART_BYTES)
@over(SOME[:6])
def test_rounds_have_the_parts_that_they_are_asked_for(case: Case, part_bytes: int | None) -> None:
    coordinator = case.coordinator()
    stream = coordinator.stream([], part_bytes)
    num_pieces = len(coordinator.next_plan.shared_layout(SHAPES).piece_values)
    wanted = {ALONE: range(num_pieces, num_pieces + 1), ALL_IN_ONE: range(1, 2)}
    assert len(stream.parts) in wanted.get(part_bytes, range(2, num_pieces))


@over(APART)
def test_what_needs_whole_updates_is_not_taken_in_parts(case: Case) -> None:
    assert not may_stream(case.coordinator())


@over([Case("factors"), B_ONLY, FULL])
def test_sums_are_not_taken_in_parts(case: Case) -> None:
    assert may_stream(case.coordinator())
    assert not may_stream(replace(case, reduces=True).coordinator())


# Updates that are not finite, although their headers say so.


@over([*SOME, *ROUNDED[:4], Case(max_failures=2), replace(FULL, max_failures=1)])
def test_a_hidden_update_is_named_and_the_others_go_on_without_it(case: Case) -> None:
    num_refused, hidden = 0, (4, 1)
    for arrived in rounds_of(case, hidden):
        if not may_stream(arrived.whole):
            for coordinator in (arrived.whole, *arrived.by_parts.values()):
                finish(coordinator, arrived)
            continue
        streams, bad = {}, set(hidden) & set(arrived.plan.cohort)
        told = [replace(one, is_finite=one.client_id not in bad) for one in arrived.headers]
        for part_bytes, coordinator in arrived.by_parts.items():
            stream, _ = take_all(coordinator, arrived.headers, arrived.rows, part_bytes)
            assert stream.refused == bad
            assert_same(coordinator, arrived.whole)
            streams[part_bytes], _ = take_all(coordinator, told, arrived.rows, part_bytes)
            assert not streams[part_bytes].refused
        report = finish(arrived.whole, arrived)
        assert {one for one, outcome in report.outcomes.items() if outcome == NOT_FINITE} == bad
        for part_bytes, coordinator in arrived.by_parts.items():
            assert facts(coordinator.commit(streams[part_bytes])) == facts(report)
            assert_same(coordinator, arrived.whole)
        num_refused += len(bad)
    assert num_refused


def test_after_a_refusal_nothing_more_is_aggregated() -> None:
    arrived = next(rounds_of(Case(), (0,)))  # what is not finite is in the first module
    stream = arrived.whole.stream(arrived.headers, ALONE)
    for part in stream.parts:
        rows = {
            one.client_id: arrived.rows.wire(index)[slice(*part.uplink)]
            for index, one in enumerate(arrived.headers)
        }
        stream.take(part, rows, lambda: pytest.fail("the round is lost"))
    assert (stream.refused, stream.aggregates) == ({0}, [])


# Who takes part by the headers alone.


def header(client_id: int, *, is_finite: bool = True, fault: str = "") -> UpdateHeader:
    return UpdateHeader(client_id, 10 * client_id + 10, 1, 0.0, 0.0, 0.0, is_finite, fault=fault)


def admitted(case: Case, headers: Sequence[UpdateHeader], least: int = 0) -> Any:
    switches = replace(case.coordinator().switches, screening=Screening(least=least))
    return admit(switches, headers)


def test_headers_are_taken_in_client_order_and_weighed() -> None:
    headers = [header(3), header(0), header(2, is_finite=False), header(1)]
    used, outcomes, weights = admitted(Case(), headers)
    assert [one.client_id for one in used] == [0, 1, 3]
    assert list(outcomes.items()) == [(0, USED), (1, USED), (2, NOT_FINITE), (3, USED)]
    assert weights == [10 / 70, 20 / 70, 40 / 70]
    assert admitted(Case(weights="equal"), headers).weights == [1 / 3] * 3


@pytest.mark.parametrize("is_finite", [True, False])
def test_clients_without_values_are_named_by_their_faults(is_finite: bool) -> None:
    headers = [header(0, is_finite=is_finite, fault=LATE), header(1), header(2, fault=FAILED)]
    assert admitted(Case(), headers) == ([headers[1]], {0: LATE, 1: USED, 2: FAILED}, [1.0])
    assert admitted(Case(), headers, 2) == ([], {0: LATE, 1: NOT_CHOSEN, 2: FAILED}, [])


def test_too_few_are_none() -> None:
    headers = [header(0), header(1), header(2, is_finite=False)]
    assert admitted(Case(), headers, 2).used == headers[:2]
    outcomes = {0: NOT_CHOSEN, 1: NOT_CHOSEN, 2: NOT_FINITE}
    assert admitted(Case(), headers, 3) == ([], outcomes, [])
    assert admitted(Case(), []) == ([], {}, [])


# What the workers are told.


@pytest.mark.parametrize("evaluates", [True, False])
def test_a_stream_announces_the_next_plan(evaluates: bool) -> None:
    for arrived in rounds_of(Case()):
        stream, _ = take_all(arrived.whole, arrived.headers, arrived.rows, 1, evaluates=evaluates)
        arrived.whole.commit(stream)
        assert stream.announced == arrived.whole.plan(evaluates=evaluates)
        assert any(part.downlink for part in stream.parts)


def test_a_stream_that_stops_sends_nothing_and_finishes_the_round() -> None:
    for arrived in rounds_of(Case(downlink="bfloat16")):
        stream, _ = take_all(arrived.whole, arrived.headers, arrived.rows, 1, stops=True, evaluates=True)
        assert not any(part.downlink for part in stream.parts)
        arrived.whole.commit(stream)
        assert stream.announced == arrived.whole.plan().stopped()
        stepped = arrived.by_parts[ALONE]
        finish(stepped, arrived)
        assert_same(stepped, arrived.whole)


@over([Case(), FULL])
def test_the_wire_goes_on_after_each_module(case: Case) -> None:
    arrived, calls = next(rounds_of(case)), []
    stream = arrived.whole.stream(arrived.headers, ALL_IN_ONE)
    rows = {one.client_id: arrived.rows.wire(index) for index, one in enumerate(arrived.headers)}
    stream.take(stream.parts[0], rows, lambda: calls.append(len(calls)))
    assert len(calls) == (0 if case.scope == "full" else len(SHAPES.modules))
