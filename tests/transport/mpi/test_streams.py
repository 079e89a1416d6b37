"""Rounds in parts over MPI: a real coordinator and played workers against the same rounds taken whole."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from mpifedlora.core.aggregation import AGGREGATORS
from mpifedlora.core.buffers import UNIT_BYTES, padded
from mpifedlora.core.codec import piece_bytes
from mpifedlora.core.layout import LinearShape, ModelShapes, TensorShape
from mpifedlora.core.plan import HEADER_BYTES, plan_bytes
from mpifedlora.core.rounds import Coordinator
from mpifedlora.core.schedule import RankSchedule
from mpifedlora.core.switches import Switches
from mpifedlora.core.wire import UpdateHeader, UpdateRows, WireFormat, broadcast_values
from mpifedlora.transport import mpi
from mpifedlora.transport.base import ORDER_BYTES

# Sizes that leave no border of a module on a unit of 64 bytes.
SHAPES = ModelShapes(
    (LinearShape("q", 5, 7), LinearShape("k", 9, 4), LinearShape("v", 30, 21)),
    (TensorShape("head", (3, 5)), TensorShape("bias", (3,))),
    (TensorShape("e", (11, 3)), TensorShape("norm", (6,))),
)
NUM_CLIENTS, NUM_ROUNDS = 6, 4


@dataclass(frozen=True)
class Case:
    """A method, its wire dtypes, and the size of parts."""

    kind: str = "product"
    scope: str = "adapter"
    uplink: str = "float32"
    downlink: str = "float32"
    part_bytes: int | None = None
    spoiled: int | None = None  # round in which one update is not finite, though its header says so
    plain: tuple[int, ...] = ()  # rounds that are not streamed
    announced: str = ""  # nothing, what will be, or `parts` in every round, also where rows are taken whole

    def __str__(self):
        return "-".join(str(value) for value in vars(self).values())

    @property
    def wire(self):
        return WireFormat(self.uplink, self.downlink, seed=5)

    def takes(self, round_num):
        return (
            "rows"
            if self.announced == "what will be" and round_num in self.plain
            else self.announced and "parts"
        )

    def coordinator(self, num_workers):
        # Five clients of six, three on one worker: others have one, or none.
        def choose_workers(round_num, without):
            return [(client // 3 + round_num) % num_workers for client in range(5)] + [-1]

        switches = Switches(
            schedule=RankSchedule("linear", NUM_ROUNDS, 1, 0, 4, 1),
            learning_rate=lambda round_num, scope: 0.1,
            choose_workers=choose_workers,
            initiating_scope=self.scope,
            scope=self.scope,
            aggregator=AGGREGATORS[self.kind],
            wire=self.wire,
        )
        return Coordinator(SHAPES, switches, initial_state, 0)


def random_values(num_values, *key):
    seed = sum(number * 1000**place for place, number in enumerate(key))
    return torch.randn(num_values, generator=torch.Generator().manual_seed(seed))


def initial_state(plan):
    return random_values(plan.layout(SHAPES).num_values, 0)


def trained_rows(case, plan, message, clients):
    """What clients send that add noise to what they received."""
    state = initial_state(plan)
    if plan.sends_state:
        state = plan.split(SHAPES, case.wire.decode_message(plan, SHAPES, message)).state
    layout = plan.shared_layout(SHAPES)
    rows = UpdateRows([case.wire.row_bytes(plan, SHAPES)] * len(clients))
    for index, client_id in enumerate(clients):
        change = 0.1 * random_values(layout.num_values, plan.round_num, 1 + client_id)
        if (plan.round_num, client_id) == (case.spoiled, 1):
            change[-1] = torch.nan  # found with the last part
        if case.uplink == "float32":
            rows.wire(index).view(torch.float32)[:] = state + change
        else:
            reference = broadcast_values(plan, SHAPES, state, client_id)
            assert len(reference) == len(change)
            case.wire.encode_update(layout, change, rows.wire(index), plan.round_num, client_id)
        UpdateHeader(client_id, 10 + client_id, 2, 0.5, 0.0, 1.5, True).write(rows, index, plan)
    return rows


def work(case, endpoint):
    """Follow the server's orders, as `runtime.worker.serve` does."""
    while True:
        plan, message = endpoint.receive()
        if plan.stops:
            return
        before = message.clone()
        endpoint.submit(trained_rows(case, plan, message, plan.clients_of(endpoint.worker_id)))
        # What a stream brings is kept apart: until the next `receive` this message counts.
        assert torch.equal(message, before)


def drive(case, endpoint, coordinator):
    """Conduct all rounds; return what each has made, and how often its rows were asked for."""
    made, is_sent = [], False
    for round_num in range(1, NUM_ROUNDS + 1):
        plan = coordinator.plan()
        if not is_sent:
            endpoint.broadcast(plan, coordinator.wire, takes=case.takes(round_num))
        headers = endpoint.collect_headers(plan)
        is_sent = round_num not in case.plain
        if is_sent:
            report, tries = stream(case, endpoint, coordinator, plan, headers)
        else:
            report = coordinator.finish(coordinator.updates(headers, endpoint.collect_rows(plan)))
            tries = 1
        made.append((seen(coordinator, report), tries))
    if not is_sent:
        endpoint.broadcast(coordinator.plan().stopped(), coordinator.wire[:0])
    return made


def stream(case, endpoint, coordinator, plan, headers):
    for tries in itertools.count(1):
        assert coordinator.streams(plan)
        is_last = plan.round_num == NUM_ROUNDS
        stream = coordinator.stream(headers, case.part_bytes, stops=is_last)
        assert endpoint.stream(plan, stream, takes=case.takes(plan.round_num + 1)) >= 0
        if not stream.refused:
            return coordinator.commit(stream), tries
        left_out = stream.refused
        headers = [replace(each, is_finite=each.client_id not in left_out) for each in headers]


def alone(case, num_workers):
    """What the same rounds make where every update is taken whole, without a transport."""
    coordinator = case.coordinator(num_workers)
    for _ in range(NUM_ROUNDS):
        plan = coordinator.plan()
        rows = trained_rows(case, plan, coordinator.wire, plan.cohort)
        headers = [
            UpdateHeader(client_id, 10 + client_id, 2, 0.5, 0.0, 1.5, True) for client_id in plan.cohort
        ]
        updates = coordinator.updates(headers, [rows.wire(index) for index in range(len(rows))])
        yield seen(coordinator, coordinator.finish(updates))


def seen(coordinator, report):
    plan, size = coordinator.next_plan, coordinator.switches.wire.message_bytes
    outcomes = [outcome for _, outcome in sorted(report.outcomes.items())]
    numbers = (report.train_loss, report.aggregation_error, report.dropped_energy)
    return (
        plan,
        coordinator.wire[: size(plan, SHAPES)].tolist(),  # without what pads it
        coordinator.state.view(torch.uint8).tolist(),
        outcomes,
        [repr(number) for number in numbers],  # nan is like nan
    )


# Rank 4 in float32: modules of 192, 208 and 816 bytes, two tensors of 60 and 12.
CASES = [
    Case(),
    Case(part_bytes=1),
    Case(part_bytes=816),
    Case(part_bytes=1, spoiled=2),
    Case(part_bytes=816, spoiled=4, plain=(2,)),
    Case(part_bytes=816, plain=(1, 3)),
    Case(part_bytes=1, plain=(4,)),
    Case("factors", part_bytes=1, uplink="int8", downlink="bfloat16"),
    Case("product", part_bytes=1, uplink="bfloat16", downlink="int8", spoiled=3),
    Case("factors", part_bytes=400, uplink="float16", downlink="float16"),
    Case(scope="full", part_bytes=1),
    Case(scope="full", part_bytes=1, uplink="int8", downlink="int8", spoiled=1),
    Case(announced="parts"),
    Case(part_bytes=1, announced="parts"),
    Case(part_bytes=1, spoiled=2, announced="parts"),
    Case(part_bytes=816, plain=(1, 3), announced="parts"),
    Case(part_bytes=1, plain=(2, 4), announced="what will be"),
    Case(scope="full", part_bytes=1, uplink="int8", downlink="int8", spoiled=1, announced="parts"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_parts_give_the_bits_of_the_whole(comm, case):
    if comm.size == 1:
        return
    endpoint = mpi.connect(comm)
    endpoint.open(SHAPES, NUM_CLIENTS, case.wire, part_bytes=case.part_bytes)
    if not endpoint.is_server:
        work(case, endpoint)
        return
    made = drive(case, endpoint, case.coordinator(endpoint.num_workers))
    for (found, tries), wanted in zip(made, alone(case, endpoint.num_workers), strict=True):
        assert found == wanted
        round_num = wanted[0].round_num - 1
        assert found[3] == ["used", "not finite" if round_num == case.spoiled else "used"] + ["used"] * 3
        assert tries == 1 + (round_num == case.spoiled and round_num not in case.plain)


def sent_units(sizes):
    """Bytes of the units that hold pieces of these sizes, each sent as a part of its own."""
    borders = list(itertools.accumulate(sizes, initial=0))
    pairs = itertools.pairwise(borders)
    return sum(padded(stop) - start // UNIT_BYTES * UNIT_BYTES for start, stop in pairs)


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(part_bytes=1),
        Case(part_bytes=1, spoiled=2),
        Case(part_bytes=1, spoiled=4),
        Case(part_bytes=1, uplink="int8", downlink="bfloat16"),
        Case(scope="full", part_bytes=1),
        Case(part_bytes=1, spoiled=2, announced="parts"),
    ],
    ids=str,
)
def test_bytes_of_a_stream_in_closed_form(comm, case):
    if comm.size == 1:
        return
    endpoint = mpi.connect(comm)
    endpoint.open(SHAPES, NUM_CLIENTS, case.wire, part_bytes=case.part_bytes)
    if not endpoint.is_server:
        work(case, endpoint)
        return
    made = drive(case, endpoint, case.coordinator(endpoint.num_workers))
    order = ORDER_BYTES + plan_bytes(3, NUM_CLIENTS)
    total = endpoint.num_workers * order  # the first plan; its message is empty
    for round_num, (found, tries) in enumerate(made, start=1):
        layout = SHAPES.full() if case.scope == "full" else SHAPES.adapter((5 - round_num,) * 3)
        sizes = piece_bytes(case.uplink, layout)
        sent_up = padded(sum(sizes)) if case.part_bytes is None else sent_units(sizes)
        is_last = round_num == NUM_ROUNDS
        message = 0 if is_last else padded(case.wire.message_bytes(found[0], SHAPES))
        total += 5 * HEADER_BYTES + tries * 5 * sent_up
        total += endpoint.num_workers * (tries * (order + message) + order)
    assert endpoint.bytes_crossed == total
