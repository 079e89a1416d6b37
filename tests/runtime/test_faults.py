"""Clients that raise, diverge or are late, in whole federations in one process."""

import time
from dataclasses import replace

import numpy as np
import pytest
import support

from mpifedlora.errors import ConfigError, TrainingError, WorkerLost
from mpifedlora.io.results import read_results
from mpifedlora.runtime import launch, method, worker
from mpifedlora.runtime.interruption import Interruption
from mpifedlora.training.models import FederatedModel
from mpifedlora.transport.inprocess import InProcessTransport

FREE = "federation.reproducible=false"
TIMES = ("train_s", "collect_s", "aggregate_s", "broadcast_s", "evaluate_s", "round_s")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("faults")
    support.make_run_file(made)
    return made


def run(folder, out, *settings):
    assert launch.run(folder / "run.toml", settings, out, False) == 0
    return read_results(out / "results.h5")


def outcomes_but(**others):
    """What every client's outcome was; `others` has those that were not used, by round and client."""
    table = np.full((4, 4), "used", "U16")
    for place, outcome in others.items():
        table[int(place[1]) - 1, int(place[3])] = outcome
    return table.tolist()


@pytest.fixture
def in_forward(monkeypatch):
    """Let something happen in the second forward pass of a client's training."""

    def install(happen):
        seen = {}
        bind, forward = FederatedModel.bind, FederatedModel.__call__

        def told(self, plan, flat, grad=None, client_id=None):
            seen.update(client_id=client_id, round_num=plan.round_num, passes=0)
            bind(self, plan, flat, grad, client_id)

        def called(self, batch):
            seen["passes"] += 1
            if self.peft_model.training and seen["passes"] == 2:
                happen(seen["round_num"], seen["client_id"])
            return forward(self, batch)

        monkeypatch.setattr(FederatedModel, "bind", told)
        monkeypatch.setattr(FederatedModel, "__call__", called)

    return install


def out_of_memory(*places):
    def happen(round_num, client_id):
        if (round_num, client_id) in places:
            raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB.")

    return happen


def leave_out(monkeypatch, *places):
    """Let clients be in no cohort of some rounds."""
    choose = method._choose_cohort

    def chosen(config, eligible, round_num):
        cohort = choose(config, eligible, round_num)
        return tuple(client_id for client_id in cohort if (round_num, client_id) not in places)

    monkeypatch.setattr(method, "_choose_cohort", chosen)


def assert_same_run(one, other):
    """Hold that two runs have trained, sent back and measured the same, whatever they took and received."""
    for name, column in one.rounds.items():
        if name not in (*TIMES, "uplink_bytes", "downlink_bytes", "mpi_bytes"):
            np.testing.assert_array_equal(column, other.rounds[name], name)
    np.testing.assert_array_equal(one.clients["train_loss"], other.clients["train_loss"])


METHODS = {
    "sa-fedlora": (),
    "fedavg": ("federation.method=fedavg",),
    "own B": ("federation.method=fedsa-lora",),
    "variates": ("federation.method=scaffold",),
    "sums": ("federation.method=fedit", FREE, "transport.collect=reduce"),
    "what rounding lost": (
        "federation.method=fedit",
        "transport.uplink_dtype=int8",
        "transport.error_feedback=true",
    ),
    "median": ("federation.method=ffa-lora", "aggregation.robust=median"),
}


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_a_client_out_of_memory_is_as_if_not_asked(
    folder, tmp_path, capsys, monkeypatch, in_forward, settings
):
    with monkeypatch.context() as patch:
        leave_out(patch, (2, 1), (3, 0), (3, 1))
        wanted = run(folder, tmp_path / "wanted", *settings)
    capsys.readouterr()
    in_forward(out_of_memory((2, 1), (3, 0), (3, 1)))
    found = run(folder, tmp_path / "found", *settings)
    assert found.clients["outcome"].tolist() == outcomes_but(r2c1="failed", r3c0="failed", r3c1="failed")
    assert_same_run(found, wanted)
    out, err = capsys.readouterr()
    assert err.splitlines() == [
        f"worker 0 failed in round {round_num} on client {client_id}: RuntimeError: CUDA out of memory."
        for round_num, client_id in ((2, 1), (3, 0), (3, 1))
    ]
    assert out.count("warning:") == 3
    assert "warning: round 2: the update of client 1 is missing: its training failed" in out


def test_after_failures_in_a_row_a_client_is_set_aside(folder, tmp_path, capsys, monkeypatch, in_forward):
    always = [(round_num, 1) for round_num in range(1, 5)]
    with monkeypatch.context() as patch:
        leave_out(patch, *always)
        wanted = run(folder, tmp_path / "wanted")
    in_forward(out_of_memory(*always))
    found = run(folder, tmp_path / "found", "faults.max_failures=2")
    assert found.clients["outcome"][:, 1].tolist() == ["failed", "failed", "absent", "absent"]
    assert_same_run(found, wanted)
    assert capsys.readouterr().out.count("client 1 has failed 2 times in a row and is no longer chosen") == 1


def test_where_every_client_is_set_aside_the_run_ends(folder, tmp_path, in_forward):
    in_forward(out_of_memory(*((round_num, client) for round_num in (1, 2) for client in range(4))))
    with pytest.raises(TrainingError, match="round 3 needs a client that can train"):
        run(folder, tmp_path / "run", "faults.max_failures=2")
    assert read_results(tmp_path / "run" / "results.h5").status == "failed"


def test_a_client_that_diverges_is_left_out_and_set_aside(folder, tmp_path, capsys, monkeypatch):
    train_client = worker.train_client

    def diverging(model, task, examples, settings, plan, client_id, *rest):
        if client_id == 2:
            settings = replace(settings, optimizer="sgd", grad_clip=0.0)
            plan = replace(plan, learning_rate=1e30)
        return train_client(model, task, examples, settings, plan, client_id, *rest)

    monkeypatch.setattr(worker, "train_client", diverging)
    found = run(folder, tmp_path / "run")
    assert found.clients["outcome"].tolist() == outcomes_but(
        r1c2="not finite", r2c2="not finite", r3c2="not finite", r4c2="absent"
    )
    assert np.isfinite(found.rounds["eval_loss"]).all()
    assert "client 2 has failed 3 times in a row and is no longer chosen" in capsys.readouterr().out


def test_a_round_with_too_few_clients_keeps_the_model(folder, tmp_path, in_forward):
    settings = ("faults.min_clients=3", "annealing.schedule=constant")
    in_forward(out_of_memory((2, 0), (3, 1), (3, 3)))
    found = run(folder, tmp_path / "run", *settings)
    lost = {"r3c0": "not chosen", "r3c1": "failed", "r3c2": "not chosen", "r3c3": "failed"}
    assert found.clients["outcome"].tolist() == outcomes_but(r2c0="failed", **lost)
    assert found.rounds["num_participants"].tolist() == [4, 3, 0, 4]
    assert found.rounds["eval_loss"][2] == pytest.approx(found.rounds["eval_loss"][1], rel=1e-5)
    assert found.rounds["eval_loss"][1] != found.rounds["eval_loss"][0]


def test_clients_after_the_deadline_are_late(folder, tmp_path, capsys, monkeypatch, in_forward):
    class Clock:
        jumped_s = 0.0

        def perf_counter(self):
            return time.perf_counter() + self.jumped_s

    def hang(round_num, client_id):
        if (round_num, client_id) == (2, 2):
            clock.jumped_s += 1e6

    clock = Clock()
    monkeypatch.setattr(worker, "time", clock)
    settings = ("federation.num_clients=4", FREE, "faults.round_deadline_s=1e5")
    with monkeypatch.context() as patch:
        leave_out(patch, (2, 3))
        wanted = run(folder, tmp_path / "wanted", *settings)
    in_forward(hang)
    found = run(folder, tmp_path / "found", *settings)
    # Client 2 ends the step that it is in, its last.
    assert found.clients["outcome"].tolist() == outcomes_but(r2c3="late")
    assert_same_run(found, wanted)
    assert not found.info.reproducible
    assert "the update of client 3 is missing: it was not trained by faults" in capsys.readouterr().out


class Hours:
    """A clock by which steps of some clients take an hour: (round, client), from the second step on."""

    def __init__(self, *places):
        self.places, self.jumped_s = places, 0.0

    def perf_counter(self):
        return time.perf_counter() + self.jumped_s

    def happen(self, round_num, client_id):
        self.jumped_s += 3600 * ((round_num, client_id) in self.places)


LATE = (FREE, "faults.round_deadline_s=1000", "faults.late=next-round", "training.local_steps=3")
EXACT = ("aggregation.kind=product",)  # whose factors get a new basis in each round
CARRYING = {
    "sa-fedlora": EXACT,
    "fedavg": ("federation.method=fedavg",),
    "fedit": ("federation.method=fedit",),
    "flora": ("federation.method=flora",),
    "sums": ("federation.method=fedit", "transport.collect=reduce"),
    "what rounding lost": METHODS["what rounding lost"],
    "ranks": ("federation.method=flexlora", "lora.client_ranks=[1, 2, 4]"),
}


@pytest.fixture
def late_run(folder, tmp_path, monkeypatch, in_forward):
    """Run with a client 2 that stops in round 2 after two of three steps."""

    def start(*settings):
        clock = Hours((2, 2))
        monkeypatch.setattr(worker, "time", clock)
        in_forward(clock.happen)
        return run(folder, tmp_path / "-".join(settings).replace("/", ""), *LATE, *settings)

    return start


@pytest.mark.parametrize("settings", CARRYING.values(), ids=CARRYING)
def test_a_late_client_goes_on_in_its_next_round(late_run, capsys, settings):
    found = late_run(*settings)
    # Client 3 of the same worker has not begun.
    assert found.clients["outcome"].tolist() == outcomes_but(r2c2="postponed", r2c3="late")
    out = capsys.readouterr().out
    assert (
        "warning: round 2: the update of client 2 is late (faults.round_deadline_s): the client goes" in out
    )
    assert out.count("warning: round 3: the update of client 2 began in round 2") == 1
    assert not found.info.reproducible
    assert np.isfinite(found.rounds["eval_loss"]).all()


def test_what_late_steps_are_worth_is_the_users_choice(late_run):
    settings = ((), ("faults.late=drop",), ("faults.late_exponent=0",))
    losses = [late_run(*EXACT, *each).rounds["eval_loss"].tolist() for each in settings]
    assert losses[0][:2] == losses[1][:2] == losses[2][:2]
    assert len({one[2] for one in losses}) == 3


def test_a_resumed_run_goes_on_with_its_late_clients(folder, tmp_path, monkeypatch, in_forward):
    clock = Hours((2, 2), (3, 2))
    monkeypatch.setattr(worker, "time", clock)
    in_forward(clock.happen)
    whole = run(folder, tmp_path / "whole", *LATE, *EXACT)
    column = whole.clients["outcome"][:, 2].tolist()
    assert column == ["used", "postponed", "used", "used"]  # two steps late, it owes one
    out, asked = tmp_path / "cut short", []
    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "is_due", lambda self: asked.append(1) or len(asked) == 2)
        assert launch.run(folder / "run.toml", (*LATE, *EXACT), out, False) == 85
    assert launch.run(None, (), out, False, resumes=True) == 0
    found = read_results(out / "results.h5")
    assert found.clients["outcome"].tolist() == whole.clients["outcome"].tolist()
    assert_same_run(found, whole)


@pytest.mark.parametrize("round_num", [1, 4])
def test_a_loss_while_rows_come_in_begins_the_round_again_also_the_last(
    folder, tmp_path, monkeypatch, round_num
):
    collect_rows, lost = InProcessTransport.collect_rows, []

    def losing(transport, plan):
        if plan.round_num == round_num and not lost:
            lost.append(round_num)
            raise WorkerLost("worker 1 has died")
        return collect_rows(transport, plan)

    whole = run(folder, tmp_path / "whole")
    monkeypatch.setattr(InProcessTransport, "collect_rows", losing)
    monkeypatch.setattr(InProcessTransport, "repair", lambda transport: [])
    again = run(folder, tmp_path / "again")
    assert lost == [round_num]
    assert again.rounds["round_num"].tolist() == whole.rounds["round_num"].tolist() == [1, 2, 3, 4]
    assert again.rounds["eval_loss"].tolist() == whole.rounds["eval_loss"].tolist()


def test_a_refused_switch_says_why(folder, tmp_path):
    for settings, why in (
        (("federation.method=scaffold",), "a variate is the mean gradient of steps from one state"),
        (("federation.method=rolora",), "the next round trains the other factor"),
        (("federation.method=fedsa-lora",), "A of another"),
        ((*EXACT, "aggregation.robust=median"), "has no weights"),
        ((*EXACT, "initiating.scope=full"), "has no place in the other"),
        ((), "a cut gives the mean factors a new basis"),
        (("federation.method=hetlora",), "a norm as the weight"),
    ):
        with pytest.raises(ConfigError, match=why):
            launch.run(folder / "run.toml", (*LATE, *settings), tmp_path / "run", False)
    with pytest.raises(ConfigError, match=r"needs faults\.round_deadline_s"):
        launch.run(folder / "run.toml", (FREE, "faults.late=next-round"), tmp_path / "run", False)


def test_with_a_deadline_that_nobody_meets_the_run_ends_as_it_began(folder, tmp_path):
    found = run(folder, tmp_path / "run", FREE, "faults.round_deadline_s=1e-6", "faults.max_failures=1")
    assert set(found.clients["outcome"].flat) == {"late"}
    assert len(set(found.rounds["eval_accuracy"])) == 1
