from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
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
    ELIGIBLE,
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
from mpifedlora.core.server_update import FlatUpdate
from mpifedlora.core.streaming import RoundStream, admit
from mpifedlora.core.switches import Switches
from mpifedlora.core.wire import ClientUpdate, UpdateHeader, UpdateRows

APART = [
    *BOUND_CASES,
    *CLIENT_RANK_CASES,
    *KRUM_CASES,
    *OPTIMIZER_CASES,
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
]
DTYPES = [("bfloat16", "int8"), ("int8", "bfloat16"), ("float16", "float16"), ("float32", "int8")]
ROUNDED = [replace(case, uplink=up, downlink=down) for case in SOME for up, down in DTYPES]
LASTING = [Case("factors"), Case("factors", False, cohort_size=3), B_ONLY, FULL]
FED_BACK = [
    replace(case, uplink=up, downlink=down, has_feedback=True)
    for case in LASTING
    for up, down in [("int8", "int8"), ("float32", "bfloat16"), ("float16", "float32")]
]
ALONE, ALL_IN_ONE = 1, None
PART_BYTES = (ALONE, 150, 400, ALL_IN_ONE)
JUNK = 0xEE


# The server's and the workers' side of a stream.


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
    """A round's updates, and who takes them in: one coordinator whole, the others by parts of a size."""

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
                coordinator.note(0.9 if round_num < 7 else 0.1)
        updates = [spoilt(one, hidden) for one in map(worker.train, worker.plan.cohort)]
        headers, rows = worker.send(updates[::-1])
        yield Arrived(whole, by_parts, headers, rows)


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
    elif isinstance(one, (Coordinator, Annealer, FlatUpdate)):
        mine, theirs = held_by(one), held_by(other)
        assert mine.keys() == theirs.keys(), name
        for key in mine:
            assert_same(mine[key], theirs[key], f"{name}.{key}")
    else:
        assert one == other, name


def held_by(holder: Any) -> dict[str, Any]:
    held = {name: value for name, value in vars(holder).items() if name not in ("switches", "combiner")}
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
    num_streamed = 0
    for arrived in rounds_of(case):
        if not arrived.whole.streams:
            assert not any(coordinator.streams for coordinator in arrived.by_parts.values())
            for coordinator in (arrived.whole, *arrived.by_parts.values()):
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
            assert_same(sent[: message_bytes(coordinator)], coordinator.wire[: message_bytes(coordinator)])
        num_streamed += 1
    assert num_streamed == NUM_ROUNDS - (case.initiating == "full" != case.scope)
