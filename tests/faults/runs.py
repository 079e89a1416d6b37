"""Whole runs under `mpirun --with-ft ulfm`, for tests that kill their processes."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import federations

from mpifedlora.io.results import read_results

ROOT = Path(__file__).parents[2]
LONG = "training.local_steps=30"


def begin(folder, out, *settings, processes=4):
    """Start a run of some seconds; its output can be read."""
    return launch(("-m", "mpifedlora"), folder, out, (LONG, *settings), processes, subprocess.PIPE)


def launch(program, folder, out, settings, processes, output, *options):
    """Start a run under mpirun.

    Args:
        program: what Python is given before `run`.
        folder: of the run file.
        out: folder of the run.
        settings: `section.key=value` texts.
        processes: of the job.
        output: where its output goes, as `subprocess.Popen` takes it.
        options: more of the command line.
    """
    command = [sys.executable, *program, "run", str(folder / "run.toml"), "--out", str(out), *options]
    command += [part for setting in settings for part in ("--set", setting)]
    mpirun = '. tests/mpi_env.sh && exec mpirun --with-ft ulfm -n "$0" "$@"'
    return subprocess.Popen(
        ["bash", "-c", mpirun, str(processes), *command],
        cwd=ROOT,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(os.environ),
    )


def processes_of(out):
    """Return the ids of a run's processes, by MPI rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode().split("\0")
            variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if str(out) in command and command[0] == sys.executable:
            ranks = [text.partition("=")[2] for text in variables if text.startswith("OMPI_COMM_WORLD_RANK=")]
            found |= {int(mpi_rank): int(folder.name) for mpi_rank in ranks}
    return found


def num_finished(out):
    """Return how many rounds a run has saved."""
    return len(read_results(out / "results.h5").rows()) if (out / "results.h5").exists() else 0


def wait_for_rounds(out, process, num_rounds=1):
    """Wait until a run has saved some rounds."""
    deadline = time.monotonic() + 100
    while num_finished(out) < num_rounds:
        assert time.monotonic() < deadline, "rounds must end within 100 s"
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def differing(out, whole):
    """Return what of a run is not as in another, to the last bit."""
    found, wanted = federations.contents(out), federations.contents(whole)
    return [key for key in wanted if found.get(key) != wanted[key]]


def send(process_id, number):
    """Send a signal to a process, if it still lives."""
    with suppress(ProcessLookupError):
        os.kill(process_id, number)


def end(out):
    """Kill whatever is left of a run."""
    for process_id in processes_of(out).values():
        send(process_id, signal.SIGKILL)
