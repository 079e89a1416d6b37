"""Whole runs under `mpirun --with-ft ulfm` whose processes are killed: nothing of the results changes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import federations
import pytest
import support

from mpifedlora.io.results import read_results
from mpifedlora.runtime import launch

ROOT = Path(__file__).parents[2]
LONG = "training.local_steps=30"
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


def begin(folder, out, *settings, processes=4):
    command = [sys.executable, "-m", "mpifedlora", "run", str(folder / "run.toml"), "--out", str(out)]
    command += [part for setting in (LONG, *settings) for part in ("--set", setting)]
    mpirun = '. tests/mpi_env.sh && exec mpirun --with-ft ulfm -n "$0" "$@"'
    return subprocess.Popen(
        ["bash", "-c", mpirun, str(processes), *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(os.environ),
    )


def processes_of(out):
    """Ids of a run's processes by MPI rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode().split("\0")
            variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if str(out) in command and "mpifedlora" in command and not command[0].endswith(("bash", "run")):
            ranks = [text.partition("=")[2] for text in variables if text.startswith("OMPI_COMM_WORLD_RANK=")]
            found |= {int(mpi_rank): int(folder.name) for mpi_rank in ranks}
    return found


def wait_for_rounds(out, process, num_rounds=1):
    deadline = time.monotonic() + 100
    while not (out / "results.h5").exists() or len(read_results(out / "results.h5").rows()) < num_rounds:
        assert time.monotonic() < deadline, "rounds must end within 100 s"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def assert_same(out, whole):
    found, wanted = federations.contents(out), federations.contents(whole)
    assert [key for key in wanted if found.get(key) != wanted[key]] == []


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
    assert_same(out, whole)


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
    assert_same(out, whole)


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
    assert_same(out, whole)


def test_the_policy_may_end_the_run(folder, tmp_path):
    out = tmp_path / "run"
    process = begin(folder, out, 'faults.policy="abort"')
    wait_for_rounds(out, process)
    os.kill(processes_of(out)[1], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    assert 'faults.policy = "abort"' in output
