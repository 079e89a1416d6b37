"""Processes that die before the first round: the job ends, and says why."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
from faults import runs, small
from faults.torture import phases

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("start") / "inputs"
    small.write_inputs(made)
    return made


def killed_in(phase, mpi_rank, folder, out):
    """Kill one of three processes in a phase; return the job's exit code and output."""
    program = (str(Path(small.__file__)),)
    process = runs.launch(program, folder, out, [], 3, subprocess.PIPE)
    while phase not in phases(runs.processes_of(out).get(mpi_rank)):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    runs.send(runs.processes_of(out)[mpi_rank], signal.SIGKILL)
    try:
        output, _ = process.communicate(timeout=110)
    finally:
        runs.end(out)
    return process.returncode, output


@pytest.mark.parametrize("mpi_rank", [0, 2])
def test_where_one_dies_before_mpi_is_up_the_others_do_not_wait(folder, tmp_path, mpi_rank):
    code, output = killed_in("start", mpi_rank, folder, tmp_path / "run")
    assert code != 0
    assert "all processes must live until MPI is up, but 1 of this node's 3 have ended" in output
    assert "start it again" in output


def test_where_a_worker_dies_in_the_set_up_the_job_can_be_started_again(folder, tmp_path):
    code, output = killed_in("set-up", 2, folder, tmp_path / "run")
    assert code == 75
    assert "worker 1" in output
    assert output.count("has died before the first round") == 1
