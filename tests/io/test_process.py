import json
import signal
import subprocess
import sys
import time

import pytest

from mpifedlora.io import process
from mpifedlora.io.process import seconds_since_start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells when a process was started")

TICK_S = 0.02  # the kernel's ticks are 0.01 s

# A parent of a given name, some time after its own start, starts a child; both say how old they are.
PARENT = """
import json, subprocess, sys, time
from mpifedlora.io.process import seconds_since_start
with open("/proc/self/comm", "w") as stream:
    stream.write(sys.argv[1])
time.sleep(0.3)
before = seconds_since_start()
command = "from mpifedlora.io.process import seconds_since_start as s; print(s())"
child = float(subprocess.run([sys.executable, "-c", command], capture_output=True, check=True).stdout)
print(json.dumps([before, child, seconds_since_start()]))
"""


def ages(name):
    """Seconds: the parent's age before the child was started, what the child says, the parent's age then."""
    started = time.perf_counter()
    ended = subprocess.run([sys.executable, "-c", PARENT, name], capture_output=True, check=True)
    before, child, after = json.loads(ended.stdout)
    assert 0.3 <= before <= after <= time.perf_counter() - started + TICK_S
    return before, child, after


@pytest.mark.parametrize("name", ["prterun", "mpiexec.hydra", "slurmstepd"])
def test_a_process_of_a_job_counts_from_its_launchers_start(name):
    before, child, after = ages(name)
    assert before <= child <= after


@pytest.mark.parametrize("name", ["bash", "prted", "a) mpirun (b", "not mpirun"])
def test_any_other_process_counts_from_its_own_start(name):
    before, child, after = ages(name)
    assert 0 < child <= after - before + TICK_S


def test_it_goes_with_the_clock():
    before = time.perf_counter()
    first = seconds_since_start()
    time.sleep(0.05)
    passed = seconds_since_start() - first
    assert 0.05 <= passed <= time.perf_counter() - before


def test_a_parent_out_of_sight_does_not_matter(monkeypatch):
    own = process._read_stat

    def read_stat(pid):
        if pid == 0:
            raise FileNotFoundError(pid)
        return own(pid)._replace(parent=0)

    expected = seconds_since_start()
    monkeypatch.setattr(process, "_read_stat", read_stat)
    assert seconds_since_start() == pytest.approx(expected, abs=1)


def test_a_system_that_does_not_tell_gives_none(monkeypatch, tmp_path):
    monkeypatch.setattr(process, "_PROC", tmp_path)
    assert seconds_since_start() is None


def test_an_end_that_does_not_come_is_cut_short():
    code = (
        "import atexit, time\n"
        "from mpifedlora.io.process import end_in_time\n"
        "atexit.register(time.sleep, 60)\n"
        "end_in_time(1)\n"
        "print('done', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.returncode) == ("done\n", -signal.SIGALRM)
