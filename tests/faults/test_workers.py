"""Workers, servers and launchers that die under a real mpirun: who is left goes on, or ends and says so."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PLAYED = Path(__file__).parent / "played.py"
LIMIT_S = 120  # of a job that takes five seconds on a free machine: a hang fails
END_S = 10.0
EXIT_RESUMABLE = 75
ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMP_NUM_THREADS": "1",
}

MPIRUN = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
pytestmark = [
    pytest.mark.skipif(MPIRUN is None, reason="needs mpirun"),
    pytest.mark.skipif(os.environ.get("OMPI_COMM_WORLD_SIZE") is not None, reason="starts mpirun itself"),
    pytest.mark.timeout(2 * LIMIT_S),
]


class Job:
    """A running mpirun of played.py; its output goes to a file, so that nobody ever waits for a reader."""

    def __init__(self, folder, num_processes, *arguments, survives=True):
        self.output = folder / "output"
        options = ["--with-ft", "ulfm"] if survives else []
        command = [MPIRUN, *options, "-n", str(num_processes), sys.executable, str(PLAYED), *arguments]
        with self.output.open("w") as stream:
            self.process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *failure):
        for pid in [self.process.pid, *self.pids.values()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def text(self):
        return self.output.read_text(errors="replace")

    @property
    def pids(self):
        return {who: int(pid) for pid, who in re.findall(r"pid (\d+) is (\w+)", self.text)}

    def wait(self):
        return self.process.wait(LIMIT_S)

    def wait_for(self, condition, limit_s=LIMIT_S):
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, self.text
            time.sleep(0.05)

    def all_gone(self):
        return not any(is_alive(pid) for pid in self.pids.values())


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


STORIES = {
    # how, values of a message, deaths, who is lost in which repair
    "trains, receives, sends": ("rows", 50, ["training:1:0", "broadcast:2:1", "rows:3:2"], 1),
    "in mid-stream, before the commit, evaluates": (
        "stream",
        50,
        ["part 3:1:0", "commit:2:1", "evaluation:3:2"],
        1,
    ),
    "large parts, last in the cohort": ("stream", 500_000, ["part 2:1:2", "stop:4:0"], None),
    "adds up": ("sum", 500_000, ["sum:1:2", "training:2:0"], 2),
    "two at once": ("rows", 50, ["training:2:0", "training:2:1", "broadcast:2:3"], 1),
}


@pytest.mark.parametrize("story", STORIES)
def test_survivors_go_on(tmp_path, story):
    how, num_values, deaths, num_left = STORIES[story]
    with Job(tmp_path, 5, how, str(num_values), "60", *deaths) as job:
        assert job.wait() == 0, job.text
    assert "unexpected" not in job.text
    assert re.search(r"right with \d" if num_left is None else f"right with {num_left}", job.text), job.text
    lost = set(re.findall(r"'worker (\d)'", job.text))
    assert lost >= {death.split(":")[2] for death in deaths if not death.startswith("stop")}


def test_the_last_worker_ends_the_run(tmp_path):
    with Job(tmp_path, 3, "rows", "50", "60", "training:1:0", "rows:2:1") as job:
        assert job.wait() == EXIT_RESUMABLE
    assert "at least one worker must live, but the last has died; resume it with THIS" in job.text


@pytest.mark.parametrize("who", ["1", "server"])
def test_who_dies_while_the_checkpoint_is_shared_out_ends_the_job(tmp_path, who):
    with Job(tmp_path, 4, "rows", "50", "60", f"share:0:{who}") as job:
        assert job.wait() == EXIT_RESUMABLE, job.text
    assert "Traceback" not in job.text
    name = "the server" if who == "server" else "worker 1"
    assert re.search(rf"{name}.* has died.*; resume it with THIS", job.text), job.text


@pytest.mark.parametrize("where", ["while workers wait", "while workers compute"])
def test_a_dead_server_ends_its_workers(tmp_path, where):
    busy = [f"training:2:{each}:sleeps" for each in range(3)] if where == "while workers compute" else []
    with Job(tmp_path, 4, "rows", "50", "60", "training:2:server", *busy) as job:
        job.wait_for(lambda: len(job.pids) == 4)
        job.wait_for(lambda: not is_alive(job.pids["server"]))
        job.wait_for(job.all_gone, END_S)
        assert job.wait() == EXIT_RESUMABLE
    assert re.search("the server .*has died.*; resume it with THIS", job.text)


@pytest.mark.parametrize("survives", [True, False], ids=["ulfm", "plain"])
def test_without_a_launcher_all_end(tmp_path, survives):
    sleeps = [f"training:1:{each}:sleeps" for each in ("server", 0, 1, 2)]
    with Job(tmp_path, 4, "rows", "50", "60", *sleeps, survives=survives) as job:
        job.wait_for(lambda: len(job.pids) == 4)
        time.sleep(1.0)
        job.process.kill()
        job.wait_for(job.all_gone, END_S)


def test_a_server_that_dies_while_it_writes_at_the_end_ends_its_workers(tmp_path):
    with Job(tmp_path, 4, "rows", "50", "60", "end:4:server") as job:
        assert job.wait() == EXIT_RESUMABLE, job.text
        job.wait_for(job.all_gone, END_S)
    assert re.search("the server .*has died.*; resume it with THIS", job.text)


def test_a_worker_that_dies_at_the_end_changes_nothing(tmp_path):
    with Job(tmp_path, 4, "rows", "50", "60", "end:4:1") as job:
        assert job.wait() == 0, job.text
    assert "right with 3" in job.text


def test_without_ulfm_one_death_ends_all(tmp_path):
    with Job(tmp_path, 4, "rows", "50", "60", "training:2:1", survives=False) as job:
        job.wait_for(lambda: len(job.pids) == 4)
        job.wait_for(lambda: not is_alive(job.pids["1"]))
        job.wait_for(job.all_gone, END_S)
        assert job.wait() != 0
    assert job.text.count("ended from outside; resume it with THIS") == 1


@pytest.mark.parametrize(
    ("who", "where"),
    [
        ("1", "training:2"),
        ("server", "training:2"),
        ("server", "end:4"),
    ],  # at the end it writes what was trained
)
def test_a_stopped_process_ends_the_job(tmp_path, who, where):
    with Job(tmp_path, 4, "stream", "50", "4", f"{where}:{who}:stops") as job:
        assert job.wait() == EXIT_RESUMABLE
        job.wait_for(job.all_gone, END_S)
    name = "the server" if who == "server" else "worker 1"
    assert (
        f"error: {name} has given no sign of life for 4 s; the run ends here; resume it with THIS" in job.text
    )
