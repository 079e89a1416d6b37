import numpy as np


def test_communicator_has_the_asked_size(comm, request):
    asked = request.node.callspec.params["comm"]
    total = np.zeros(1, dtype=np.int64)

    comm.Allreduce(np.ones(1, dtype=np.int64), total)

    assert comm.size == asked
    assert total[0] == asked


def test_what_one_test_leaves_behind_does_not_reach_the_next(comm):
    # Sent and never received: the next test's communicator must not see it.
    comm.Isend(np.full(1, 7, dtype=np.int64), dest=comm.rank).Free()


def test_a_fresh_communicator_is_empty(comm):
    assert not comm.Iprobe(source=comm.rank)
