"""Whole runs under `mpirun --with-ft ulfm` whose processes are killed: nothing of the results changes."""

import os
import signal
import time

import pytest
import support
from client_folders import read_rows, write_clients
from faults.runs import LONG, begin, differing, processes_of, wait_for_rounds

from mpifedlora.io.results import read_results
from mpifedlora.runtime import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("faults")
    support.make_run_file(made)
    return made


@pytest.fixture(scope="module")
def whole(folder):
    assert launch.run(folder / "run.toml", [LONG], folder / "whole", False) == 0
    return folder / "whole"


@pytest.mark.parametrize("killed", [[1], [3, 2]])
def test_killed_workers_change_nothing(folder, tmp_path, whole, killed):
    out = tmp_path / "run"
    process = begin(folder, out)
    wait_for_rounds(out, process)
    for mpi_rank in killed:
        os.kill(processes_of(out)[mpi_rank], signal.SIGKILL)
        time.sleep(0.3)
    output, _ = process.communicate(timeout=110)
    assert process.returncode == 0, output
    assert "begins again with" in output
    results = read_results(out / "results.h5")
    assert results.status == "finished"
    assert any("has died" in event.text for event in results.events)
    assert differing(out, whole) == []


def test_clients_with_files_of_a_killed_worker_go_on_being_trained_and_measured(folder, tmp_path):
    write_clients(tmp_path / "clients", read_rows(folder / "data.csv"))
    own = ["data.partition=files", f"data.source={tmp_path / 'clients'}", "evaluation.on=workers"]
    assert launch.run(folder / "run.toml", [LONG, *own], tmp_path / "whole", False) == 0
    out = tmp_path / "run"
    process = begin(folder, out, *own)
    wait_for_rounds(out, process)
    os.kill(processes_of(out)[2], signal.SIGKILL)
    output, _ = process.communicate(timeout=110)
    assert process.returncode == 0, output
    assert "begins again with 2 workers" in output
    assert (read_results(out / "results.h5").clients["num_evaluated"] == 6).all()
    assert differing(out, tmp_path / "whole") == []


def test_a_killed_server_ends_the_job_which_is_resumed(folder, tmp_path, whole):
    out = tmp_path / "run"
    process = begin(folder, out)
    wait_for_rounds(out, process)
    os.kill(processes_of(out)[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "the server has died" in output or "it has died" in output
    assert "--resume" in output
    deadline = time.monotonic() + 10
    while processes_of(out):
        assert time.monotonic() < deadline, "workers must end within 10 s of their server"
        time.sleep(0.1)
    assert launch.run(None, [], out, False, resumes=True) == 0
    assert differing(out, whole) == []


def test_a_stopped_worker_ends_the_job_which_is_resumed(folder, tmp_path, whole):
    out = tmp_path / "run"
    process = begin(folder, out, "faults.worker_timeout_s=5")
    wait_for_rounds(out, process)
    stopped = processes_of(out)[2]
    os.kill(stopped, signal.SIGSTOP)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "worker 1" in output
    assert "no sign of life for 5 s" in output
    assert launch.run(None, ["faults.worker_timeout_s=300"], out, False, resumes=True) == 0
    assert differing(out, whole) == []


def test_a_second_signal_ends_the_job_at_once(folder, tmp_path):
    out = tmp_path / "run"
    process = begin(folder, out, "training.local_steps=200")
    wait_for_rounds(out, process)
    server = processes_of(out)[0]
    os.kill(server, signal.SIGUSR2)
    time.sleep(0.5)
    os.kill(server, signal.SIGUSR2)
    output, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert "--resume" in output
    deadline = time.monotonic() + 10
    while processes_of(out):
        assert time.monotonic() < deadline, "workers must end within 10 s of their server"
        time.sleep(0.1)
    assert list((out / "checkpoints").iterdir())


def test_the_policy_may_leave_clients_out_of_a_round(folder, tmp_path):
    out = tmp_path / "run"
    process = begin(folder, out, 'faults.policy="continue"')
    wait_for_rounds(out, process)
    os.kill(processes_of(out)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=110)
    assert process.returncode == 0, output
    results = read_results(out / "results.h5")
    absent = (results.clients["outcome"] == "absent").any(axis=1)
    assert absent.sum() == 1  # from the next round on, others train them
    assert any("begins again with 2 workers" in event.text for event in results.events)


def test_the_policy_may_end_the_run(folder, tmp_path):
    out = tmp_path / "run"
    process = begin(folder, out, 'faults.policy="abort"')
    wait_for_rounds(out, process)
    os.kill(processes_of(out)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert 'faults.policy = "abort"' in output
