"""Tests over real MPI: started by `tests/run_mpi.sh`, skipped where pytest runs as one process.

All processes of MPI's world run the same tests. A failure on any one of them ends the job at once, since the
others may wait for it in a collective for ever. Only MPI rank 0 writes to the terminal.
"""

import os
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest

SIZES = (1, 2, 3, 5)

# Read from the launcher's variables (Open MPI's, MPICH's), so that a plain pytest run starts no MPI.
WORLD_SIZE = int(os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("PMI_SIZE") or 1)


@pytest.fixture(params=SIZES, ids="{}_processes".format)
def comm(request):
    """A fresh communicator of 1, 2, 3 and 5 processes in turn; the world's other processes skip the test."""
    if request.param > WORLD_SIZE:
        pytest.skip(f"needs {request.param} processes, the world has {WORLD_SIZE}")
    import federations
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    federations.meet(world)
    part = world.Split(0 if world.rank < request.param else MPI.UNDEFINED, world.rank)
    if part == MPI.COMM_NULL:
        pytest.skip("not one of the processes of this communicator")
    yield part
    part.Free()


@pytest.fixture(scope="session")
def folder():
    """A folder for whole federations that all processes share; a run of one name is made once."""
    import federations

    return federations.shared_folder()


def pytest_collection_modifyitems(items):
    alone = pytest.mark.skip(reason="needs several MPI processes: run tests/run_mpi.sh")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.mpi)
            if WORLD_SIZE == 1:
                item.add_marker(alone)


def pytest_configure(config):
    if WORLD_SIZE == 1:
        return
    from hypothesis import HealthCheck, settings
    from mpi4py import MPI

    # The same examples on every process.
    settings.register_profile(
        "mpi",
        database=None,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
    settings.load_profile("mpi")
    config.pluginmanager.register(OneFailureEndsAll(MPI.COMM_WORLD))
    if MPI.COMM_WORLD.rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for pytest's reporter, which is made next)


class OneFailureEndsAll:
    """A pytest plugin: what fails on one process is printed and aborts the world."""

    def __init__(self, world):
        self.world = world
        self.stderr = os.dup(2)  # pytest captures 2 itself while a test runs

    def abort(self, what, details):
        where = f"MPI rank {self.world.rank} of {self.world.size}"
        os.write(self.stderr, f"\n=== {where}: {what}\n{details}\n".encode())
        time.sleep(0.5)  # mpirun needs a moment to pass it on
        self.world.Abort(1)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            captured = [f"--- {title}\n{text}" for title, text in report.sections]
            self.abort(f"{report.nodeid} failed ({report.when})", "\n".join([report.longreprtext, *captured]))

    def pytest_collectreport(self, report):
        if report.failed:
            self.abort(f"{report.nodeid} cannot be collected", report.longreprtext)

    def pytest_internalerror(self, excrepr):
        self.abort("pytest failed", str(excrepr))

    def pytest_collection_finish(self, session):
        names = self.world.allgather({item.nodeid for item in session.items})
        only_some = set.union(*names) - set.intersection(*names)
        if only_some and self.world.rank == 0:
            self.abort("all must collect the same tests, only some have", "\n".join(sorted(only_some)))

    def pytest_timeout_set_timer(self, item, settings):
        # pytest-timeout's own signal waits until the blocked MPI call returns: never, in a hang.
        timer = threading.Timer(settings.timeout, self._time_is_up, (item, threading.get_ident()))
        timer.daemon = True
        timer.start()
        item.cancel_timeout = timer.cancel
        return True

    def _time_is_up(self, item, thread_id):
        # The last frames of every process: where each of them waits.
        stack = traceback.format_stack(sys._current_frames()[thread_id])[-4:]
        self.abort(f"{item.nodeid} took too long; this process is here", "".join(stack))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self):
        self.world.Barrier()  # rank 0 says "passed" only when all have
