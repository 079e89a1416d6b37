"""Processes that write a file over and over and are killed by SIGKILL, at chosen and at random instants."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

ROOT = str(Path(__file__).parents[1])
INSTANTS = ["half-written", "before-replace", "after-replace"] + ["random"] * 15

# One process imports once and forks a writer for each line it reads: kills cost milliseconds.
SCRIPT = """
import os, resource, signal, sys
sys.path[:0] = sys.argv[2:]
from {module} import *
from mpifedlora.io import atomic
path = Path(sys.argv[1])
def say(word, number=0):
    os.write(1, f"{{word}} {{number}}\\n".encode())  # one write: a kill cannot leave half a line
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def fork_writer(instant):
    write = {writer}
    if instant == "half-written":  # the kernel kills at byte 8192
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    if instant == "before-replace":
        os.replace = die
    if instant == "after-replace":
        atomic._sync_folder = die
    for round_num in range(1, 10**6):
        write(round_num)
        say("wrote", round_num)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        fork_writer(line.strip())
    say("pid", pid)
    os.waitpid(pid, 0)
    say("dead")
"""


class KilledWriters:
    """The process that forks writers, and what its writers said.

    Args:
        test_file: the test module whose names the writers use.
        writer: an expression in those names, and in `path`, for a function of round_num that writes.
        path: what is written.
    """

    def __init__(self, test_file: str, writer: str, path: Path) -> None:
        script = SCRIPT.format(module=Path(test_file).stem, writer=writer)
        folders = [str(Path(test_file).parent), str(Path(__file__).parent), ROOT]
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(path), *folders],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run_until_killed(self, instant: str, after_s: float) -> int:
        """Return the last round whose write had returned; `random` kills after_s after the first."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{instant}\n")
        self.process.stdin.flush()
        pid = written = 0
        for line in self.process.stdout:
            word, number = line.split()
            if word == "pid":
                pid = int(number)
            elif word == "wrote":
                written = int(number)
            elif word == "dead":
                return written
            if pid and written == 1 and instant == "random":
                threading.Timer(after_s, os.kill, (pid, signal.SIGKILL)).start()
                instant = "on its way"
        raise AssertionError("the process that forks the writers ended")

    def end(self) -> None:
        """Kill the whole group: a forked writer must not outlive its parent."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
