"""The lock of a run's folder: one run at a time, and nothing left behind."""

import subprocess
import sys

import pytest

from mpifedlora.errors import ConfigError
from mpifedlora.io.output_folder import FolderLock

HOLDER = """
import sys, time
from pathlib import Path
from mpifedlora.io.output_folder import FolderLock
FolderLock(Path(sys.argv[1])).take()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_lets_go(tmp_path):
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.take()
    first.take()  # its own
    with pytest.raises(ConfigError, match=r"one run at a time, got .*, which process .* writes"):
        second.take()
    first.release()
    assert list(tmp_path.iterdir()) == []
    second.take()
    second.release()


def test_a_killed_holder_holds_nothing(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    lock = FolderLock(tmp_path)
    with pytest.raises(ConfigError, match=f"process {holder.pid} on "):
        lock.take()
    holder.kill()
    holder.communicate()
    lock.take()
    lock.release()
