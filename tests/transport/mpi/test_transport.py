"""The MPI transport against its in-process twin: the same bits, the same bytes."""

import numpy as np
import pytest
import torch

from mpifedlora.core.agreement import Status, check_agreement
from mpifedlora.core.layout import DENSE, LinearShape, ModelShapes, TensorShape
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.wire import ClientUpdate, UpdateRows
from mpifedlora.errors import ConfigError
from mpifedlora.transport import mpi
from mpifedlora.transport.inprocess import InProcessTransport

SHAPES = ModelShapes(
    (LinearShape("q", 5, 7), LinearShape("v", 9, 4)),
    (TensorShape("head", (3, 2)),),
    (TensorShape("e", (11,)),),
)


class Echo:
    """A worker that returns what it received, plus its client's number."""

    def __init__(self, worker_id):
        self.worker_id = worker_id

    def receive(self, plan, message):
        self.plan, self.message = plan, message.clone()

    def predictions(self):
        return torch.full((self.worker_id + 1, 2), float(self.worker_id))

    def train(self):
        clients = self.plan.clients_of(self.worker_id)
        rows = UpdateRows([self.plan.row_values(SHAPES, client_id) for client_id in clients])
        for index, client_id in enumerate(clients):
            values = rows.values(index)
            state = self.plan.split(SHAPES, self.message).state
            values[:] = client_id + (state[: len(values)] if len(state) >= len(values) else 0.0)
            ClientUpdate(client_id, 10 + client_id, 2, 0.5, 0.0, 1.5, True, values).write_header(
                rows, index, self.plan
            )
        return rows


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


def one_round(transport, plan, message):
    transport.broadcast(plan, message)
    predictions = transport.collect_predictions([i + 1 for i in range(transport.num_workers)])
    updates = sorted(transport.collect(plan), key=lambda update: update.client_id)
    kept = [(u.client_id, u.num_examples, u.train_loss, u.values.numpy().tobytes()) for u in updates]
    return [part.numpy().tobytes() for part in predictions], kept


@pytest.mark.parametrize("kind", plans(1))
def test_same_bits_and_bytes_as_in_one_process(comm, kind):
    if comm.size == 1:
        assert mpi.connect(comm) is None
        return
    endpoint = mpi.connect(comm)
    plan = plans(endpoint.num_workers)[kind]
    endpoint.open(SHAPES, len(plan.workers))
    message = torch.randn(plan.message_values(SHAPES), generator=torch.Generator().manual_seed(3))
    if not endpoint.is_server:
        worker = Echo(endpoint.worker_id)
        for _ in range(2):  # the second round reuses the buffers
            got, received = endpoint.receive()
            assert got == plan
            assert received.numpy().tobytes() == message.numpy().tobytes()
            worker.receive(got, received)
            endpoint.submit_predictions(worker.predictions())
            if got.cohort:
                endpoint.submit(worker.train())
        return
    twin = InProcessTransport([Echo(worker_id) for worker_id in range(endpoint.num_workers)])
    for _ in range(2):
        assert one_round(endpoint, plan, message) == one_round(twin, plan, message)
    assert endpoint.bytes_crossed == twin.bytes_crossed


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


def test_waiting_does_not_burn_the_core(comm):
    if comm.size == 1:
        return
    import time

    endpoint = mpi.connect(comm)
    endpoint.open(SHAPES, 1)
    plan = make_plan([0])
    message = torch.zeros(plan.message_values(SHAPES))
    comm.Barrier()
    if endpoint.is_server:
        time.sleep(1.0)
        endpoint.broadcast(plan, message)
        return
    cpu, wall = time.process_time(), time.perf_counter()
    endpoint.receive()
    # A spinning wait would take all of it.
    assert time.process_time() - cpu < 0.6 * (time.perf_counter() - wall)


def test_numbers_of_any_size_survive_the_headers(comm):
    if comm.size == 1:
        return
    rows = UpdateRows([3])
    plan = make_plan([0])
    ClientUpdate(2**31 - 1, 2**40, 2**35, np.inf, 1e-300, 1e9, False, rows.values(0)).write_header(
        rows, 0, plan
    )
    header = rows.header(0)
    assert (int(header["num_examples"]), int(header["num_steps"])) == (2**40, 2**35)
