"""Whole federations on communicators of 1, 2, 3 and 5 processes: the same bits, and bytes in closed form."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import support

from mpifedlora.io.results import read_results
from mpifedlora.runtime import launch

# Timings differ, and more workers hear more broadcasts; all else must be equal to the last bit.
NOT_COMPARED = {"train_s", "collect_s", "aggregate_s", "broadcast_s", "evaluate_s", "round_s", "mpi_bytes"}

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
    """One folder that all processes share."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    made = tempfile.mkdtemp(prefix="mpifedlora-") if world.rank == 0 else None
    shared = Path(world.bcast(made))
    if world.rank == 0:
        support.make_run_file(shared)
    world.Barrier()
    return shared


def federate(folder, name, comm, done={}):  # noqa: B006 (each run is made once a session)
    out = folder / f"{name}-{comm.size}"
    if out not in done:
        done[out] = launch.run(folder / "run.toml", RUNS[name], out, True, comm=comm)
    assert done[out] == 0
    return out


def contents(out):
    results = read_results(out / "results.h5")
    arrays = {**results.rounds, **{f"clients/{key}": value for key, value in results.clients.items()}}
    bits = {key: value.tobytes() for key, value in arrays.items() if key.split("/")[-1] not in NOT_COMPARED}
    files = sorted(file for file in out.rglob("*") if file.suffix in (".safetensors", ".json"))
    return bits, {str(file.relative_to(out)): file.read_bytes() for file in files}


@pytest.mark.parametrize("name", RUNS)
def test_same_bits_for_any_number_of_processes(comm, folder, name):
    from mpi4py import MPI

    out = federate(folder, name, comm)
    if comm.rank == 0 and comm.size > 1:
        reference = federate(folder, name, MPI.COMM_SELF)
        bits, files = contents(out)
        wanted_bits, wanted_files = contents(reference)
        assert [key for key in bits if bits[key] != wanted_bits[key]] == []
        assert files.keys() == wanted_files.keys()
        assert [key for key in files if files[key] != wanted_files[key]] == []


def values_of(out, hidden=32, inner=64, num_layers=2, num_labels=3):
    """Values of all weights, of the head, and of one rank of every module, from the tiny model's sizes."""
    embeddings = (200 + 64 + 2) * hidden + 2 * hidden
    layer = 4 * (hidden * hidden + hidden) + 2 * hidden * inner + inner + hidden + 4 * hidden
    head = num_labels * hidden + num_labels
    per_rank = num_layers * (4 * 2 * hidden + 2 * (hidden + inner))
    return embeddings + num_layers * layer + head, head, per_rank


HEADER_UP, NUM_MODULES = 128, 12
HEADER_DOWN = 128 + 8 * NUM_MODULES


@pytest.mark.parametrize("name", ["freeze", "drop", "fedit", "fedavg", "full initiating"])
def test_measured_bytes_are_the_closed_form(comm, folder, name):
    out = federate(folder, name, comm)
    if comm.rank:
        return
    results = read_results(out / "results.h5")
    whole, head, per_rank = values_of(out)
    ranks = results.rounds["module_ranks"][:, 0]
    is_full = ranks == 0
    clients = results.rounds["num_participants"]
    up = np.where(is_full, whole, per_rank * ranks + head)
    np.testing.assert_array_equal(results.rounds["uplink_bytes"], clients * (HEADER_UP + 4 * up))
    frozen = np.maximum(np.concatenate([[0], ranks[:-1] - ranks[1:]]), 0) * (
        name in ("freeze", "full initiating")
    )
    opens = np.concatenate([[False], is_full[:-1] & ~is_full[1:]])
    down = up * (np.arange(len(up)) > 0) + frozen * per_rank + np.where(opens, whole - head, 0)
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
    _, head, per_rank = values_of(out)
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
