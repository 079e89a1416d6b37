"""Clients with a folder of images each, over real MPI: the same bits as in one process."""

import federations
import pytest
import support
from mpi4py import MPI

from mpifedlora.io.results import read_results


@pytest.fixture(scope="module")
def folder():
    pytest.importorskip("PIL")
    shared = federations.shared_folder()
    if MPI.COMM_WORLD.rank == 0:
        support.make_vit(shared / "vit")
        for client_id in range(4):
            support.make_images(shared / "clients" / f"site-{client_id}", 12 + 3 * client_id, seed=client_id)
        support.make_images(shared / "test", 30, seed=9)
    MPI.COMM_WORLD.Barrier()
    return shared


def test_sites_with_folders_of_images(folder, comm):
    settings = [
        "task.name=image-classification",
        f"model.name={folder / 'vit'}",
        "data.partition=files",
        f"data.source={folder / 'clients'}",
        f"data.test_source={folder / 'test'}",
        "initiating.scope=full",
        "initiating.mu=0",
        "evaluation.on=workers",
    ]
    federations.assert_same_bits(folder, "images", settings, comm)
    if comm.rank == 0:
        results = read_results(federations.federate(folder, "images", settings, comm) / "results.h5")
        assert results.info.client_names == ("site-0", "site-1", "site-2", "site-3")
        assert results.info.label_table.sum(axis=1).tolist() == [12, 15, 18, 21]
        assert results.info.label_names == support.LABELS
