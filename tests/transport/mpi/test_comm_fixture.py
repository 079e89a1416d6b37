import numpy as np


def test_communicator_has_the_asked_size(comm, request):
    total = np.zeros(1, dtype=np.int64)

    comm.Allreduce(np.ones(1, dtype=np.int64), total)

    assert comm.size == request.node.callspec.params["comm"]
    assert total[0] == comm.size


def test_its_first_process_is_the_worlds_first(comm):
    from mpi4py import MPI

    world_ranks = np.zeros(comm.size, dtype=np.int64)

    comm.Allgather(np.array([MPI.COMM_WORLD.rank]), world_ranks)

    np.testing.assert_array_equal(world_ranks, np.arange(comm.size))
