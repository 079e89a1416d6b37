"""Whole federations on communicators of 1, 2, 3 and 5 processes: the same bits, and bytes in closed form."""

import federations
import numpy as np
import pytest
from federations import HEADER_DOWN, HEADER_UP, values_of

from mpifedlora.io.results import read_results
from mpifedlora.runtime import launch

RUNS = {
    "freeze": [],
    "drop": ["annealing.cut=drop"],
    "fedit": ["federation.method=fedit"],
    "factors with cuts": ["federation.method=custom", "aggregation.kind=factors"],
    "fedavg": ["federation.method=fedavg"],
    "fedprox": ["federation.method=fedprox"],
    "full initiating": ["initiating.scope=full", "initiating.rounds=2"],
    "cohort": ["federation.cohort_size=2", "federation.num_rounds=6"],
    "full cohort": ["federation.cohort_size=2", "initiating.scope=full", "federation.num_rounds=6"],
    "on workers": ["evaluation.on=workers", "evaluation.every=2"],
    "epochs, dropout": ["training.local_epochs=2", "model.dropout=0.1", "lora.dropout=0.1", "data.alpha=0.3"],
    "bfloat16 base": ["model.dtype=bfloat16"],
    "bfloat16 autocast": ["training.precision=bfloat16"],
}


@pytest.fixture(scope="module")
def folder():
    return federations.shared_folder()


def federate(folder, name, comm):
    return federations.federate(folder, name, RUNS[name], comm)


@pytest.mark.parametrize("name", RUNS)
def test_same_bits_for_any_number_of_processes(comm, folder, name):
    federations.assert_same_bits(folder, name, RUNS[name], comm)


@pytest.mark.parametrize("name", ["freeze", "drop", "fedit", "fedavg", "full initiating"])
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
        name in ("freeze", "full initiating")
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
