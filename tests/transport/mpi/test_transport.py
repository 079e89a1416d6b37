"""The MPI transport against its in-process twin: the same bits, the same bytes."""

import time

import pytest
import torch

from mpifedlora.core.agreement import Status, check_agreement
from mpifedlora.core.buffers import padded
from mpifedlora.core.layout import DENSE, LinearShape, ModelShapes, TensorShape
from mpifedlora.core.plan import HEADER_BYTES, RoundPlan, plan_bytes
from mpifedlora.core.wire import SummedRows, UpdateHeader, UpdateRows, WireFormat
from mpifedlora.errors import ConfigError
from mpifedlora.transport import mpi
from mpifedlora.transport.base import ORDER_BYTES
from mpifedlora.transport.inprocess import Alone, InProcessTransport
from mpifedlora.transport.mpi import endpoint as endpoint_module

SHAPES = ModelShapes(
    (LinearShape("q", 5, 7), LinearShape("v", 9, 4)),
    (TensorShape("head", (3, 2)),),
    (TensorShape("e", (11,)),),
)


class Echo:
    """A worker that returns the bytes that it received, plus its client's number."""

    def __init__(self, worker_id, wire):
        self.worker_id, self.wire = worker_id, wire

    def receive(self, plan, message):
        self.plan, self.message = plan, message.clone()

    def predictions(self):
        return torch.full((self.worker_id + 1, 2), float(self.worker_id))

    def train(self):
        clients = self.plan.clients_of(self.worker_id)
        rows = UpdateRows([self.wire.row_bytes(self.plan, SHAPES, client_id) for client_id in clients])
        source = self.message if len(self.message) else torch.arange(64, dtype=torch.uint8)
        for index, client_id in enumerate(clients):
            row = rows.wire(index)
            row[:] = source[torch.arange(len(row)) % len(source)] + client_id
            write_header(rows, index, self.plan, client_id)
        return rows


def write_header(rows, index, plan, client_id):
    UpdateHeader(
        client_id=client_id,
        num_examples=10 + client_id,
        num_steps=2,
        train_loss=0.5,
        penalty=0.0,
        train_s=1.5,
        is_finite=True,
    ).write(rows, index, plan)


def make_plan(workers, scope="adapter", **changes):
    plan = {
        "round_num": 2,
        "stage": "annealing",
        "scope": scope,
        "lora_ranks": (2, 3),
        "frozen_ranks": (1, 0),
        "workers": tuple(workers),
        "sends_state": True,
    }
    return RoundPlan(**{**plan, **changes})


def plans(num_workers):
    even = [client % num_workers for client in range(2 * num_workers)]
    return {
        "even": make_plan(even),
        "uneven": make_plan([0, 0, *even, -1]),
        "one client": make_plan([-1] * 3 + [0]),
        "full": make_plan(even, scope="full", sends_base=True),
        "first round": make_plan(even, sends_state=False, frozen_ranks=(0, 0), round_num=1),
        "one factor": make_plan(even, scope="b", sends_parts="a", frozen_ranks=(DENSE, 0)),
        "client ranks": make_plan(even, client_ranks=tuple(1 + client % 3 for client in even)),
        "ranks by worker": make_plan(even, client_ranks=tuple(1 + worker % 2 for worker in even)),
        "variates": make_plan(
            even, has_variates=True, mapped_ranks=(3, 3), state_rounds=(1,) * len(even), frozen_ranks=(0, 0)
        ),
        "own factor": make_plan(even, keeps_b=True, sends_parts="a", state_rounds=(0,) * len(even)),
        "nobody": make_plan([-1] * 3),
    }


def make_message(wire, plan):
    message = wire.message_buffer(plan, SHAPES)
    message[:] = torch.randint(0, 256, message.shape, generator=torch.Generator().manual_seed(3))
    return message


def one_round(transport, plan, message, takes):
    transport.broadcast(plan, message, takes=takes)
    predictions = transport.collect_predictions([i + 1 for i in range(transport.num_workers)])
    headers = transport.collect_headers(plan)
    rows = transport.collect_rows(plan) if headers else []
    return [part.tolist() for part in predictions], headers, [row.tolist() for row in rows]


CASES = [(kind, WireFormat()) for kind in plans(1)]
CASES += [("uneven", WireFormat("bfloat16", "int8")), ("full", WireFormat("int8", "bfloat16"))]


@pytest.mark.parametrize(("kind", "wire"), CASES, ids=[f"{kind}, {wire.uplink}" for kind, wire in CASES])
def test_same_bits_and_bytes_as_in_one_process(comm, kind, wire):
    if comm.size == 1:
        assert mpi.connect(comm) is None
        return
    endpoint = mpi.connect(comm)
    plan = plans(endpoint.num_workers)[kind]
    endpoint.open(SHAPES, len(plan.workers), wire)
    message = make_message(wire, plan)
    if not endpoint.is_server:
        worker, places = Echo(endpoint.worker_id, wire), set()
        for _ in range(2):  # the second round reuses the buffers
            got, received = endpoint.receive()
            places.add(received.data_ptr())
            assert got == plan
            assert torch.equal(received, message)
            worker.receive(got, received)
            endpoint.submit_predictions(worker.predictions())
            if got.cohort:
                endpoint.submit(worker.train())
        assert len(places) == 1
        return
    twin = InProcessTransport([Echo(worker_id, wire) for worker_id in range(endpoint.num_workers)])
    for takes in ("", "rows"):
        assert one_round(endpoint, plan, message, takes) == one_round(twin, plan, message, takes)
    assert endpoint.bytes_crossed == twin.bytes_crossed


@pytest.mark.parametrize("takes", ["", "rows"])
def test_bytes_crossed_by_hand(comm, takes):
    if comm.size == 1:
        return
    endpoint = mpi.connect(comm)
    plan = make_plan([0] * 3 + [endpoint.num_workers - 1])
    endpoint.open(SHAPES, 4, WireFormat())
    message = make_message(WireFormat(), plan)
    if not endpoint.is_server:
        worker = Echo(endpoint.worker_id, WireFormat())
        worker.receive(*endpoint.receive())
        endpoint.submit(worker.train())
        return
    endpoint.broadcast(plan, message, takes=takes)
    order = ORDER_BYTES + plan_bytes(2, 4)
    # 2 * (5 + 7) + 3 * (9 + 4) values and the head, and before them the frozen direction of q: 81 in all.
    assert endpoint.bytes_crossed == endpoint.num_workers * (order + padded(4 * 81))
    endpoint.collect_headers(plan)
    endpoint.collect_rows(plan)
    sent_up = 4 * (HEADER_BYTES + padded(4 * 69))
    orders = order if takes == "rows" else 2 * order
    assert endpoint.bytes_crossed == endpoint.num_workers * (orders + padded(4 * 81)) + sent_up


# sums


class Adder(Echo):
    """A worker that adds up whole numbers, of which float32 holds every sum."""

    def __init__(self, worker_id, dtype):
        super().__init__(worker_id, WireFormat())
        self.dtype = dtype

    def train(self):
        clients = self.plan.clients_of(self.worker_id)
        num_values = self.plan.shared_layout(SHAPES).num_values
        rows = SummedRows([4 * num_values] * len(clients), num_values, self.dtype)
        for index, client_id in enumerate(clients):
            torch.arange(num_values, out=rows.wire(index).view(torch.float32)).mul_(client_id + 1)
            write_header(rows, index, self.plan, client_id)
            rows.close(index, 10 + client_id)
        return rows


@pytest.mark.parametrize(
    ("values_a_piece", "num_pieces"), [(7, 10), (69, 1)], ids=["in pieces", "in one piece"]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_sum_is_exact_and_that_of_the_twin(comm, monkeypatch, dtype, values_a_piece, num_pieces):
    if comm.size == 1:
        return
    itemsize = getattr(torch, dtype).itemsize
    monkeypatch.setattr(endpoint_module, "PIECE_BYTES", values_a_piece * itemsize)
    endpoint = mpi.connect(comm)
    # With more than two workers, some have no client.
    plan = make_plan([0, 0, endpoint.num_workers - 1, -1], reduces=True)
    endpoint.open(SHAPES, 4, WireFormat())
    message = make_message(WireFormat(), plan)
    if not endpoint.is_server:
        worker = Adder(endpoint.worker_id, dtype)
        for _ in range(2):
            worker.receive(*endpoint.receive())
            endpoint.submit(worker.train())
        return
    twin = InProcessTransport([Adder(worker_id, dtype) for worker_id in range(endpoint.num_workers)])
    for _ in range(2):
        found = []
        for transport in (endpoint, twin):
            total = torch.full((69,), torch.nan, dtype=getattr(torch, dtype))
            transport.broadcast(plan, message)
            assert len(transport.collect_headers(plan)) == 3
            transport.collect_sum(total)
            found.append(total.tolist())
            assert len(list(endpoint_module.pieces_of(total.numpy()))) == num_pieces
        assert found[0] == found[1] == [(10 * 1 + 11 * 2 + 12 * 3) * index for index in range(69)]
    assert endpoint.bytes_crossed == twin.bytes_crossed


# set-up


def test_every_process_hears_of_a_failure_anywhere(comm):
    if comm.size == 1:
        return
    endpoint = mpi.connect(comm)
    is_last = comm.rank == comm.size - 1
    status = Status(
        f"node{comm.rank}", {"data": "d"}, error="no such file; check the path" if is_last else ""
    )
    statuses = endpoint.exchange(status)
    assert [other.host for other in statuses] == [f"node{index}" for index in range(comm.size)]
    with pytest.raises(ConfigError, match=f"no such file.*worker {comm.size - 2} on node{comm.size - 1}"):
        check_agreement(statuses, endpoint.process_names())


def test_a_process_with_other_data_is_named(comm):
    if comm.size == 1:
        return
    endpoint = mpi.connect(comm)
    status = Status("n", {"data": "other" if comm.rank == 1 else "same"})
    with pytest.raises(ConfigError, match="must have the same data, got other on worker 0"):
        check_agreement(endpoint.exchange(status), endpoint.process_names())


def test_places_count_workers_on_the_node(comm):
    if comm.size == 1:
        return
    place = mpi.connect(comm).place
    assert place.num_workers == comm.size - 1
    assert place.num_sharing_cores == comm.size
    assert place.num_cores >= 1
    assert place.worker_index == (comm.size - 1 if comm.rank == 0 else comm.rank - 1)


# waiting


def share_of_a_core(wait):
    """Do what waits, and return the share of a core that it took; spinning would take all of it."""
    cpu, wall = time.process_time(), time.perf_counter()
    wait()
    return (time.process_time() - cpu) / (time.perf_counter() - wall)


@pytest.fixture
def opened(comm):
    """Endpoint, plan, message and the rows of a round, everybody ready."""
    if comm.size == 1:
        pytest.skip("one process waits for nobody")
    endpoint = mpi.connect(comm)
    plan = make_plan([client % endpoint.num_workers for client in range(4)])
    endpoint.open(SHAPES, 4, WireFormat())
    comm.Barrier()
    return endpoint, plan, make_message(WireFormat(), plan)


def rows_of(endpoint, plan, message):
    worker = Echo(endpoint.worker_id, WireFormat())
    worker.receive(plan, message)
    return worker.train()


def test_waiting_does_not_burn_the_core(opened):
    endpoint, plan, message = opened
    if endpoint.is_server:
        time.sleep(1.0)
        endpoint.broadcast(plan, message)
    else:
        assert share_of_a_core(lambda: endpoint.receive()) < 0.3


def test_waiting_for_an_order_after_the_submission_does_not_either(opened):
    endpoint, plan, message = opened
    if endpoint.is_server:
        endpoint.broadcast(plan, message)
        endpoint.collect_headers(plan)
        time.sleep(1.0)
        endpoint.collect_rows(plan)
    else:
        rows = rows_of(endpoint, *endpoint.receive())
        assert share_of_a_core(lambda: endpoint.submit(rows)) < 0.3


def test_waiting_for_workers_that_train_does_not_either(opened):
    endpoint, plan, message = opened
    if endpoint.is_server:
        endpoint.broadcast(plan, message)
        assert share_of_a_core(lambda: endpoint.collect_headers(plan)) < 0.3
        endpoint.collect_rows(plan)
    else:
        rows = rows_of(endpoint, *endpoint.receive())
        time.sleep(1.0)
        endpoint.submit(rows)


def test_everybody_gets_what_everybody_gives(comm):
    endpoint = mpi.connect(comm) or Alone()
    own = bytes(range(comm.rank * 100 % 256)) * 3  # the server gives nothing
    assert endpoint.pool(own) == [bytes(range(rank * 100 % 256)) * 3 for rank in range(comm.size)]
    assert endpoint.pool(b"") == [b""] * comm.size
    assert endpoint.trains_as == (0 if comm.size == 1 else comm.rank - 1 if comm.rank else None)
