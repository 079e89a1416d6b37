"""Whole federations on communicators of 1, 2, 3 and 5 processes: the same bits, and bytes in closed form."""

import itertools

import federations
import numpy as np
import pytest
from federations import HEADER_DOWN, HEADER_UP, values_of

from mpifedlora.io.results import read_results
from mpifedlora.runtime import federation, launch, worker

FEDIT, FEDAVG = "federation.method=fedit", "federation.method=fedavg"
INT8 = ["transport.uplink_dtype=int8", "transport.downlink_dtype=int8"]
FEEDBACK = [*INT8, "transport.error_feedback=true"]
FREE = "federation.reproducible=false"


def parts_of(num_bytes):
    return f"transport.chunk_bytes={num_bytes}"


# The largest module has 32 inputs and 64 outputs at rank 4: 384 values, and 8 scales in int8. So nearly every
# module is a part of its own. Tensors of a whole model may be larger than a part.
SMALL, SMALL_BFLOAT16, SMALL_INT8 = parts_of(4 * 384), parts_of(2 * 384), parts_of(384 + 4 * 8)
RUNS = {
    "sa-fedlora": ["federation.method=sa-fedlora"],
    "drop": ["annealing.cut=drop", SMALL],
    "fedit": [FEDIT],
    "factors with cuts": ["federation.method=custom", "aggregation.kind=factors"],
    "fedavg": [FEDAVG],
    "full initiating": ["initiating.scope=full", "initiating.rounds=2", SMALL],
    "cohort": ["federation.cohort_size=2", "federation.num_rounds=6"],
    "full cohort": ["federation.cohort_size=2", "initiating.scope=full", "federation.num_rounds=6"],
    "on workers": ["evaluation.on=workers", "evaluation.every=2", SMALL],
    "epochs, dropout": ["training.local_epochs=2", "model.dropout=0.1", "lora.dropout=0.1", "data.alpha=0.3"],
    "empty rounds": [
        FEDIT,
        "federation.sampling=poisson",
        "federation.cohort_size=1",
        "federation.num_rounds=8",
        SMALL,
    ],
    "bfloat16 base": ["model.dtype=bfloat16"],
    "bfloat16 autocast": ["training.precision=bfloat16"],
    "bfloat16 wire": [
        "transport.uplink_dtype=bfloat16",
        "transport.downlink_dtype=bfloat16",
        SMALL_BFLOAT16,
        "evaluation.on=workers",
    ],
    "int8 wire": [*INT8, SMALL_INT8],
    "fedit, feedback": [FEDIT, *FEEDBACK, SMALL_INT8, "federation.cohort_size=3"],
    "fedavg, feedback": [FEDAVG, *FEEDBACK, parts_of(1)],
}
# What must not change a bit of another run.
LIKE = {"small parts": "sa-fedlora", "no pipeline": "sa-fedlora", "fedavg, small parts": "fedavg"}
RUNS |= {
    "small parts": [*RUNS["sa-fedlora"], SMALL],
    "no pipeline": [*RUNS["sa-fedlora"], "transport.pipeline=false"],
    "fedavg, small parts": [FEDAVG, parts_of(1)],
}


def federate(folder, name, comm):
    return federations.federate(folder, name, RUNS[name], comm)


@pytest.mark.parametrize("name", [name for name in RUNS if name not in LIKE])
def test_same_bits_for_any_number_of_processes(comm, folder, name):
    federations.assert_same_bits(folder, name, RUNS[name], comm)


@pytest.mark.parametrize(("name", "other"), LIKE.items())
def test_parts_change_no_bit(comm, folder, name, other):
    federations.assert_same_bits(folder, name, RUNS[name], comm, like=(other, RUNS[other]))


@pytest.mark.parametrize(
    ("name", "collect"),
    [("sa-fedlora", "gather in parts"), ("full cohort", "gather in parts"), ("no pipeline", "gather")],
)
def test_results_say_how_updates_were_collected(comm, folder, name, collect):
    out = federate(folder, name, comm)
    if comm.rank == 0:
        assert read_results(out / "results.h5").info.collect == (collect if comm.size > 1 else "handed over")


def test_an_update_that_is_not_what_its_header_says_is_left_out(comm, folder, monkeypatch):
    train_client = worker.train_client

    def lie(model, task, examples, settings, plan, client_id, values, memory, is_late):
        result = train_client(model, task, examples, settings, plan, client_id, values, memory, is_late)
        if (client_id, plan.round_num) == (1, 2):
            values[-1] = np.nan  # in the head, and so in the last part
        return result

    monkeypatch.setattr(worker, "train_client", lie)
    federations.assert_same_bits(folder, "liar", [SMALL], comm)
    if comm.rank == 0:
        results = read_results(federations.federate(folder, "liar", [SMALL], comm) / "results.h5")
        expected = np.full((4, 4), "used", "U16")
        expected[1, 1] = "not finite"
        assert results.clients["outcome"].tolist() == expected.tolist()
        assert np.isfinite(results.rounds["eval_loss"]).all()


def test_a_client_that_raises_is_left_out_on_any_worker_and_then_set_aside(comm, folder, monkeypatch):
    train_client = worker.train_client

    def fail(model, task, examples, settings, plan, client_id, values, *rest):
        result = train_client(model, task, examples, settings, plan, client_id, values, *rest)
        if client_id == 1:
            raise RuntimeError("out of memory")
        return result

    monkeypatch.setattr(worker, "train_client", fail)
    settings = [SMALL, "faults.max_failures=2"]
    federations.assert_same_bits(folder, "failing", settings, comm)
    if comm.rank == 0:
        results = read_results(federations.federate(folder, "failing", settings, comm) / "results.h5")
        assert results.clients["outcome"][:, 1].tolist() == ["failed", "failed", "absent", "absent"]
        assert (results.clients["outcome"][:, [0, 2, 3]] == "used").all()


@pytest.mark.parametrize(
    ("name", "dtype"), [("fedit", "float32"), ("factors with cuts", "float64"), ("fedavg", "float32")]
)
def test_sums_on_the_way_give_what_gathering_gives(comm, folder, name, dtype):
    from mpi4py import MPI

    settings = [*RUNS[name], FREE, "transport.collect=reduce", f"transport.reduce_dtype={dtype}"]
    out = federations.federate(folder, f"{name}, summed", settings, comm)
    if comm.rank:
        return
    gathered = federations.federate(folder, name, RUNS[name], MPI.COMM_SELF)
    found, wanted = read_results(out / "results.h5"), read_results(gathered / "results.h5")
    assert found.info.collect == ("reduce" if comm.size > 1 else "handed over")
    assert not found.info.reproducible
    for column in ("uplink_bytes", "downlink_bytes", "num_participants", "module_ranks"):
        np.testing.assert_array_equal(found.rounds[column], wanted.rounds[column])
    for column in ("train_loss", "eval_loss", "penalty"):
        np.testing.assert_allclose(found.rounds[column], wanted.rounds[column], rtol=1e-4)
    assert np.isnan(found.rounds["aggregation_error"]).all()  # nobody has seen the single updates
    assert found.clients["outcome"].tolist() == wanted.clients["outcome"].tolist()
    federations.assert_close(out, gathered)


def test_updates_that_do_not_fit_into_memory_are_added_up_and_that_is_told(comm, folder, monkeypatch, capfd):
    monkeypatch.setattr(federation, "available_bytes", lambda: 1)
    settings = [FEDIT, FREE, "federation.num_rounds=1", "initiating.rounds=0"]
    out = federations.federate(folder, "too large", settings, comm)
    if comm.rank == 0 and comm.size > 1:
        assert read_results(out / "results.h5").info.collect == "reduce"
        assert "updates are added up on the way to the server; ready " in capfd.readouterr().out


@pytest.mark.parametrize("name", ["sa-fedlora", "drop", "fedit", "fedavg", "full initiating"])
def test_measured_bytes_are_the_closed_form(comm, folder, name):
    out = federate(folder, name, comm)
    if comm.rank:
        return
    results = read_results(out / "results.h5")
    whole, head, per_rank = values_of()
    ranks = results.rounds["module_ranks"][:, 0]
    is_full = ranks == 0
    clients = results.rounds["num_participants"]
    up = np.where(is_full, whole, per_rank * ranks + head)
    np.testing.assert_array_equal(results.rounds["uplink_bytes"], clients * (HEADER_UP + 4 * up))
    frozen = np.maximum(np.concatenate([[0], ranks[:-1] - ranks[1:]]), 0) * (
        name in ("sa-fedlora", "full initiating")
    )
    opens = np.concatenate([[False], is_full[:-1] & ~is_full[1:]])
    state = np.where(opens, head, up) * (np.arange(len(up)) > 0)  # fresh factors follow from the seed
    down = state + frozen * per_rank + np.where(opens, whole - head, 0)
    np.testing.assert_array_equal(results.rounds["downlink_bytes"], clients * (HEADER_DOWN + 4 * down))
    both = results.baselines
    assert both.sent_bytes == (results.rounds["uplink_bytes"] + results.rounds["downlink_bytes"]).sum()
    rounds = len(up)
    headers = clients.sum() * (HEADER_UP + HEADER_DOWN)
    assert both.full_model_bytes == headers + 4 * whole * clients[0] * (2 * rounds - 1)
    assert both.fixed_rank_bytes == headers + 4 * (4 * per_rank + head) * clients[0] * (2 * rounds - 1)
    if name == "fedavg":
        assert both.reduction_vs_full_model == 0
    if name == "fedit":
        assert both.reduction_vs_fixed_rank == 0


def test_an_absent_client_is_sent_what_it_missed(comm, folder):
    out = federate(folder, "cohort", comm)
    if comm.rank:
        return
    results = read_results(out / "results.h5")
    _, head, per_rank = values_of()
    ranks = results.rounds["module_ranks"][:, 0].tolist()
    present = results.clients["participated"]
    heard = np.zeros(4, int)  # frozen ranks that each client has received
    frozen = 0
    for index, rank in enumerate(ranks):
        frozen += ranks[index - 1] - rank if index else 0
        state = (per_rank * rank + head) * (index > 0)
        expected = sum(
            HEADER_DOWN + 4 * (state + per_rank * (frozen - heard[c])) for c in np.flatnonzero(present[index])
        )
        heard[present[index]] = frozen
        assert results.rounds["downlink_bytes"][index] == expected
    assert (heard < frozen).any() or len(set(map(tuple, present))) > 1


def test_rounds_without_a_client_stand_between_others(comm, folder):
    out = federate(folder, "empty rounds", comm)
    if comm.rank == 0:
        is_empty = read_results(out / "results.h5").rounds["num_participants"] == 0
        # A plan that comes with a stream and trains nobody, and a plan that comes after it.
        assert {(False, True), (True, False)} <= set(itertools.pairwise(is_empty.tolist()))


def test_more_workers_than_clients(comm, folder, capfd):
    out = folder / f"few-{comm.size}"
    settings = ["federation.num_clients=2", "federation.num_rounds=2"]
    assert launch.run(folder / "run.toml", settings, out, True, comm=comm) == 0
    if comm.rank == 0 and comm.size > 3:
        assert capfd.readouterr().out.count("have nothing to train") == 1


def test_a_failed_set_up_is_one_error_on_the_server(comm, folder):
    from mpifedlora.errors import ConfigError

    out = folder / f"bad-{comm.size}"
    arguments = (folder / "run.toml", ["lora.target_modules=nothing.*"], out, False)
    if comm.rank == 0:
        with pytest.raises((ConfigError, ValueError), match="must match linear layers"):
            launch.run(*arguments, comm=comm)
        assert not out.exists()
    else:
        assert launch.run(*arguments, comm=comm) == launch.EXIT_FAILED_ELSEWHERE
