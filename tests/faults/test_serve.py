"""A worker's loop where another worker dies: repaired, renumbered, and no message taken in twice."""

from types import SimpleNamespace

import pytest

from mpifedlora.errors import RunLost, WorkerLost
from mpifedlora.runtime.worker import Worker, serve


def make_plan(round_num, *, stops=False, cohort=(0,)):
    return SimpleNamespace(round_num=round_num, stops=stops, evaluates=False, cohort=cohort)


class PlayedTransport:
    """Gives plans; a step that is due to fail raises, and the repair makes this worker number 0 of 1."""

    def __init__(self, plans, lost_at=(), repaired=None):
        self.plans, self.lost_at, self.repaired = list(plans), list(lost_at), repaired
        self.worker_id, self.num_workers, self.num_repairs, self.submitted = 1, 2, 0, []

    def receive(self):
        self.meet("receive")
        return self.plans.pop(0), "wire"

    def submit(self, rows):
        self.meet("submit")
        self.submitted.append(rows)

    def meet(self, step):
        if self.lost_at[:1] == [step]:
            self.lost_at.pop(0)
            raise WorkerLost("worker 0 has died")

    def repair(self):
        if self.repaired is not None:
            raise self.repaired
        self.num_repairs += 1
        self.worker_id, self.num_workers = 0, 1
        return [0]


def make_worker(taken, told=None):
    worker = Worker.__new__(Worker)  # the loop and `receive` need no model
    losses = [] if told is None else told
    evaluation = SimpleNamespace(lose=lambda lost, num_left: losses.append((lost, num_left)))
    worker.replica = SimpleNamespace(evaluation=evaluation)
    worker.worker_id, worker.num_workers, worker._plan = 1, 2, None
    worker.model = SimpleNamespace(shapes=None, receive=lambda plan, message: taken.append(plan.round_num))
    worker.wire = SimpleNamespace(decode_message=lambda plan, shapes, wire: wire)
    worker.train = lambda: (worker.plan.round_num, worker.plan.cohort, worker.worker_id)
    return worker


def test_a_round_that_is_sent_again_is_trained_again_on_the_message_in_hand():
    taken, again = [], make_plan(2, cohort=(0, 1))
    plans = [make_plan(1), make_plan(2), again, make_plan(3), make_plan(4, stops=True)]
    transport = PlayedTransport(plans)
    worker = make_worker(taken)
    submit, calls = transport.submit, []

    def failing(rows):
        calls.append(rows)
        if len(calls) == 2:
            raise WorkerLost("worker 0 has died")
        submit(rows)

    transport.submit = failing

    serve(worker, transport)

    assert taken == [1, 2, 3]
    assert transport.submitted == [(1, (0,), 1), (2, (0, 1), 0), (3, (0,), 0)]
    assert (worker.worker_id, worker.num_workers, transport.num_repairs) == (0, 1, 1)


def test_a_loss_while_waiting_is_repaired():
    transport = PlayedTransport([make_plan(1), make_plan(2, stops=True)], ["receive", "receive", "submit"])
    taken, told = [], []
    serve(make_worker(taken, told), transport)
    assert (transport.num_repairs, taken, transport.submitted) == (3, [1], [])
    assert told == [([0], 1)] * 3


def test_a_dead_server_is_the_end():
    transport = PlayedTransport([], ["receive"], RunLost("the server must live"))
    with pytest.raises(RunLost, match="the server must live"):
        serve(make_worker([]), transport)
