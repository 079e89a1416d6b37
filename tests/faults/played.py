"""One process of a played federation in which some are killed; test_workers.py starts it by mpirun.

Arguments: how rows are collected (rows, sum, stream), the values of a message, and who dies, as
`rows:2:1`: during `rows` of round 2, the process that began as worker 1; `server` dies as well as a number.
The server compares every round with the same round made in one process.
"""

import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from functools import partial

import torch

from mpifedlora.core.aggregation import AGGREGATORS
from mpifedlora.core.layout import LinearShape, ModelShapes, TensorShape
from mpifedlora.core.plan import ABSENT
from mpifedlora.core.rounds import Coordinator
from mpifedlora.core.schedule import RankSchedule
from mpifedlora.core.switches import Switches
from mpifedlora.core.wire import SummedRows, UpdateHeader, UpdateRows, WireFormat
from mpifedlora.errors import RunLost, WorkerLost
from mpifedlora.io.process import end_with_launcher, tell_when_terminated
from mpifedlora.runtime.worker import serve
from mpifedlora.transport import mpi
from mpifedlora.transport.base import EXIT_RESUMABLE
from mpifedlora.transport.mpi import worker as worker_module
from mpifedlora.transport.mpi.endpoint import Order

NUM_CLIENTS, NUM_ROUNDS = 6, 4
WIRE = WireFormat()
RESUME = "resume it with THIS"
LONG_S = 60.0
SHARED_BYTES = 10**6


def make_shapes(num_values):
    modules = (LinearShape("q", 5, 7), LinearShape("k", 9, 4), LinearShape("v", 30, 21))
    return ModelShapes(modules, (TensorShape("head", (num_values,)),), ())


def values_of(num_values, *key):
    seed = sum(number * 1000**place for place, number in enumerate(key))
    return torch.randn(num_values, generator=torch.Generator().manual_seed(seed))


def make_coordinator(shapes, reduces, num_workers):
    switches = Switches(
        schedule=RankSchedule("linear", NUM_ROUNDS, 1, 0, 4, 1),
        learning_rate=lambda round_num, scope: 0.1,
        choose_workers=lambda round_num, set_aside: (
            [client % num_workers() for client in range(5)] + [ABSENT]
        ),
        initiating_scope="adapter",
        scope="adapter",
        aggregator=AGGREGATORS["factors" if reduces else "product"],
        reduces=reduces,
        wire=WIRE,
    )
    return Coordinator(shapes, switches, lambda plan: values_of(plan.layout(shapes).num_values, 0), 0)


def trained_rows(shapes, plan, state, clients):
    sizes = [WIRE.row_bytes(plan, shapes, client_id) for client_id in clients]
    num_values = plan.shared_layout(shapes).num_values
    rows = SummedRows(sizes, num_values, "float32") if plan.reduces else UpdateRows(sizes)
    for index, client_id in enumerate(clients):
        change = 0.1 * values_of(num_values, plan.round_num, 1 + client_id)
        rows.wire(index).view(torch.float32)[:] = state + change
        UpdateHeader(client_id, 10 + client_id, 2, 0.5, 0.0, 1.5, True).write(rows, index, plan)
        rows.close(index, 10 + client_id)
    return rows


def made_alone(shapes, reduces):
    """What each round makes without a transport."""
    coordinator = make_coordinator(shapes, reduces, lambda: 1)
    for _ in range(NUM_ROUNDS):
        plan = coordinator.plan()
        rows = trained_rows(shapes, plan, coordinator.state, plan.cohort)
        headers = [UpdateHeader(client, 10 + client, 2, 0.5, 0.0, 1.5, True) for client in plan.cohort]
        if reduces:
            coordinator.finish_sum(headers, rows.total)
        else:
            coordinator.finish(coordinator.updates(headers, [rows.wire(index) for index in range(5)]))
        yield coordinator.state.clone()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Deaths:
    """Where this process dies: `meet` is called everywhere, and returns where it does not."""

    def __init__(self, name, texts):
        split = [text.split(":") for text in texts]
        self.due = {(where, int(round_num)): how for where, round_num, who, *how in split if who == name}
        self.round_num = 0

    def meet(self, where):
        how = self.due.get((where, self.round_num))
        if how == []:
            die()
        if how == ["stops"]:
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == ["sleeps"]:
            time.sleep(LONG_S)


class PlayedWorker:
    """Trains as every client does, and dies when it is time to."""

    def __init__(self, endpoint, shapes, deaths):
        self.worker_id, self.num_workers = endpoint.worker_id, endpoint.num_workers
        self.shapes, self.deaths, self.taken = shapes, deaths, {}

    def lose(self, lost, worker_id, num_workers):
        self.worker_id, self.num_workers = worker_id, num_workers

    def receive(self, plan, message):
        state = values_of(plan.layout(self.shapes).num_values, 0)
        if plan.sends_state:
            state = plan.split(self.shapes, WIRE.decode_message(plan, self.shapes, message)).state
        before = self.taken.setdefault(plan.round_num, state.clone())
        assert torch.equal(state, before), "a message that is sent again must be the same"
        self.plan, self.state, self.deaths.round_num = plan, state, plan.round_num

    def predictions(self):
        self.deaths.meet("evaluation")
        return torch.full((self.worker_id + 1, 2), float(self.worker_id))

    def train(self):
        self.deaths.meet("training")
        rows = trained_rows(self.shapes, self.plan, self.state, self.plan.clients_of(self.worker_id))
        settle, calls = rows.settle, []

        def settled(num_bytes):
            calls.append(num_bytes)
            self.deaths.meet("rows" if len(calls) == 1 else f"part {len(calls)}")
            settle(num_bytes)

        rows.settle = settled
        return rows


def set_traps(endpoint, deaths):
    """Let a worker die inside the transport."""
    fitting, order, pieces = endpoint._fitting, endpoint._order, worker_module.pieces_of

    def trapped_buffer(plan, buffer):
        if endpoint._plan is None or deaths.round_num != plan.round_num:
            deaths.round_num, before = plan.round_num, deaths.round_num
            deaths.meet("broadcast")
            deaths.round_num = before
        return fitting(plan, buffer)

    def trapped_order(*expected):
        if Order.COMMIT in expected:
            deaths.meet("commit")
        found = order(*expected)
        if found[1] is not None and found[1].stops:
            deaths.meet("stop")
        return found

    def trapped_pieces(buffer):
        deaths.meet("sum")
        return pieces(buffer)

    endpoint._fitting, endpoint._order = trapped_buffer, trapped_order
    worker_module.pieces_of = trapped_pieces


class Conductor:
    """The server of the played federation."""

    def __init__(self, endpoint, shapes, how, deaths):
        self.endpoint, self.shapes, self.how, self.deaths = endpoint, shapes, how, deaths
        self.coordinator = make_coordinator(shapes, how == "sum", lambda: endpoint.num_workers)
        self.is_sent = False

    def run(self):
        for round_num, wanted in enumerate(list(made_alone(self.shapes, self.how == "sum")), start=1):
            self.deaths.round_num = round_num
            while not self.try_round():
                names = self.endpoint.process_names()
                lost = self.endpoint.repair()
                self.is_sent = False
                print(f"round {round_num}: lost {[names[1 + each] for each in lost]}", flush=True)
            is_equal = partial(torch.allclose, atol=1e-5) if self.how == "sum" else torch.equal
            assert is_equal(self.coordinator.state, wanted), round_num
        if not self.is_sent:
            self.endpoint.broadcast(self.coordinator.plan().stopped(), self.coordinator.wire[:0])
        print(f"right with {self.endpoint.num_workers}", flush=True)

    def try_round(self):
        plan, num_workers = self.coordinator.plan(evaluates=True), self.endpoint.num_workers
        workers = [each if each == ABSENT else each % num_workers for each in plan.workers]
        plan = replace(plan, workers=tuple(workers))
        try:
            self.finish(plan)
        except WorkerLost as error:
            print(error, flush=True)
            return False
        return True

    def finish(self, plan):
        endpoint, coordinator = self.endpoint, self.coordinator
        if not self.is_sent:
            endpoint.broadcast(plan, coordinator.wire)
        counts = range(1, endpoint.num_workers + 1)
        for worker_id, part in enumerate(endpoint.collect_predictions(counts)):
            assert part.tolist() == [[worker_id] * 2] * (worker_id + 1)
        self.deaths.meet("training")
        headers = endpoint.collect_headers(plan)
        self.is_sent = self.how == "stream"
        if self.how == "sum":
            total = torch.empty(plan.shared_layout(self.shapes).num_values)
            endpoint.collect_sum(total)
            coordinator.finish_sum(headers, total)
        elif self.how == "rows":
            coordinator.finish(coordinator.updates(headers, endpoint.collect_rows(plan)))
        else:
            stops = plan.round_num == NUM_ROUNDS
            stream = coordinator.stream(headers, 1, evaluates=not stops, stops=stops)
            endpoint.stream(plan, stream)
            coordinator.commit(stream)


def main():
    how, num_values, timeout_s, *texts = sys.argv[1:]
    end_with_launcher(f"the launcher has ended; {RESUME}", EXIT_RESUMABLE)
    endpoint, shapes = mpi.connect(), make_shapes(int(num_values))
    if endpoint.is_server:
        tell_when_terminated(f"ended from outside; {RESUME}")
    print(f"pid {os.getpid()} is {'server' if endpoint.is_server else endpoint.worker_id}", flush=True)
    endpoint.watch(float(timeout_s), RESUME)
    endpoint.open(shapes, NUM_CLIENTS, WIRE, part_bytes=1)
    deaths = Deaths("server" if endpoint.is_server else str(endpoint.worker_id), texts)
    try:
        deaths.meet("share")
        shared = endpoint.share(bytes(SHARED_BYTES) if endpoint.is_server else b"")
        assert shared == bytes(SHARED_BYTES)
        if endpoint.is_server:
            Conductor(endpoint, shapes, how, deaths).run()
        else:
            set_traps(endpoint, deaths)
            serve(PlayedWorker(endpoint, shapes, deaths), endpoint)
        deaths.round_num = NUM_ROUNDS
        deaths.meet("end")
        endpoint.part()
    except RunLost as error:
        endpoint.abort(f"error: {error}", EXIT_RESUMABLE)
    except Exception:
        endpoint.abort(f"unexpected: {traceback.format_exc()}")


if __name__ == "__main__":
    main()
