"""Clients that hold out a part of their own files, over real MPI: the same bits as in one process."""

import federations
import numpy as np
import pytest
from client_folders import read_rows, write_clients
from mpi4py import MPI

from mpifedlora.io.results import read_results


@pytest.fixture(scope="module")
def folder():
    shared = federations.shared_folder()
    if MPI.COMM_WORLD.rank == 0:
        write_clients(shared / "clients", read_rows(shared / "data.csv"))
    MPI.COMM_WORLD.Barrier()
    return shared


@pytest.mark.parametrize("method", ["sa-fedlora", "fedsa-lora"])
def test_each_worker_measures_its_clients(folder, comm, method):
    """The global model, and each client's own; some of the examples, every second round."""
    settings = [
        f"federation.method={method}",
        "data.partition=files",
        f"data.source={folder / 'clients'}",
        "evaluation.on=workers",
        "evaluation.max_examples=17",
        "evaluation.every=2",
    ]
    federations.assert_same_bits(folder, f"own {method}", settings, comm)
    if comm.rank == 0:
        results = read_results(federations.federate(folder, f"own {method}", settings, comm))
        assert results.clients["num_evaluated"].sum(axis=1).tolist() == [0, 17, 0, 17]
        assert np.isfinite(results.clients["eval_accuracy"]).all(axis=1).tolist() == [
            False,
            True,
            False,
            True,
        ]
