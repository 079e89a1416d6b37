"""Disks and folders that let a run down in its midst: it goes on, says so, and saves what it can."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import support

from mpifedlora.io.output_folder import FolderLock
from mpifedlora.io.results import read_results
from mpifedlora.runtime import launch
from mpifedlora.runtime.interruption import Interruption

FOLDERS = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("disk")
    support.make_run_file(made)
    return made


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run, and let something real happen when a round has been trained; return exit code and output."""

    def start(out, *events, **options):
        asked = []

        def ask(self):
            asked.append(1)
            if len(asked) <= len(events):
                events[len(asked) - 1]()
            return False

        with monkeypatch.context() as patch:
            patch.setattr(Interruption, "is_due", ask)
            code = launch.run(folder / "run.toml", (), out, False, **options)
        return code, capsys.readouterr().out

    return start


def nothing():
    """Leave a round in peace."""


def num_rounds(out):
    return len(read_results(out / "results.h5").rows())


def test_a_folder_that_is_removed_is_made_again(run, tmp_path):
    out = tmp_path / "run"
    code, said = run(out, nothing, lambda: shutil.rmtree(out))
    assert code == 0
    assert said.count("warning: the run's folder was removed, and is made again") == 1
    assert num_rounds(out) == 4
    assert {path.name for path in out.iterdir()} == {"results.h5", "run.toml", "adapter", "checkpoints"}
    assert launch.run(None, ["federation.num_rounds=5"], out, False, resumes=True) == 0
    assert num_rounds(out) == 5


def test_where_nothing_can_be_made_the_run_goes_on(run, tmp_path):
    """The folder that held it is gone too; then it comes back."""
    parent, moved = tmp_path / "runs", tmp_path / "moved"
    parent.mkdir()
    code, said = run(parent / "run", lambda: parent.rename(moved), nothing, lambda: moved.rename(parent))
    assert code == 0
    assert said.count("warning: --out must be writable, got No such file or directory") == 1
    assert num_rounds(parent / "run") == 4
    gone = tmp_path / "gone"
    gone.mkdir()
    code, said = run(gone / "run", nothing, lambda: shutil.rmtree(gone))
    assert (code, gone.exists()) == (1, False)
    assert "nothing is saved until then" in said


def test_checkpoints_that_are_removed_begin_anew(run, tmp_path):
    out = tmp_path / "run"
    code, said = run(out, nothing, lambda: shutil.rmtree(out / "checkpoints"))
    assert (code, "warning" in said) == (0, False)
    assert len(list((out / "checkpoints").iterdir())) == 2


def test_a_file_in_the_place_of_checkpoints_is_told(run, tmp_path):
    out = tmp_path / "run"

    def replace():
        shutil.rmtree(out / "checkpoints")
        (out / "checkpoints").touch()

    code, said = run(out, nothing, replace, lambda: (out / "checkpoints").unlink())
    assert said.count("warning: checkpoints must be writable") == 1
    assert (code, num_rounds(out)) == (0, 4)
    assert len(list((out / "checkpoints").iterdir())) == 2


def test_a_folder_that_another_run_has_taken_is_left_to_it(run, tmp_path):
    out, other = tmp_path / "run", FolderLock(tmp_path / "run")

    def take():
        shutil.rmtree(out)
        out.mkdir()
        other.take()

    code, said = run(out, nothing, take)
    assert code == 1
    assert said.count("warning: nothing is saved any more: --out must be used by one run at a time") == 1
    assert [path.name for path in out.iterdir()] == [".lock"]
    other.release()


READER = """
import sys, time, h5py
with h5py.File(sys.argv[1], "r") as file:
    print("open", flush=True)
    sys.stdin.readline()
    print(len(file["rounds/round_num"]), flush=True)
"""


def test_a_reader_that_locks_the_results_hinders_nobody(run, tmp_path):
    """HDF5 locks what it has open; the file is replaced, not written to."""
    out, readers = tmp_path / "run", []

    def read():
        command = [sys.executable, "-c", READER, out / "results.h5"]
        environment = {**os.environ, "HDF5_USE_FILE_LOCKING": "TRUE"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        readers.append(subprocess.Popen(command, env=environment, **pipes))
        assert readers[0].stdout.readline() == "open\n"

    code, said = run(out, nothing, nothing, read)
    seen, _ = readers[0].communicate("\n", timeout=60)
    assert (code, "warning" in said, seen) == (0, False, "2\n")
    assert num_rounds(out) == 4


IN_NAMESPACE = """
import subprocess, sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from mpifedlora.io.results import read_results
from mpifedlora.runtime import launch
from mpifedlora.runtime.interruption import Interruption

folder, disk = Path(sys.argv[1]), Path(sys.argv[1]) / "disk"
mount = lambda *options: subprocess.run(["mount", *options], check=True)
filler = None

def fill():
    global filler
    filler = open(disk / "filler", "wb", buffering=0)
    try:
        while filler.write(bytes(4096)):
            pass
    except OSError:
        pass

def make_read_only():
    mount("--bind", str(disk), str(disk))
    mount("-o", "remount,bind,ro", str(disk))

SCENES = {
    "full": (fill, lambda: filler.truncate(0)),
    "read-only": (make_read_only, lambda: subprocess.run(["umount", str(disk)], check=True)),
}
for name, (break_disk, mend) in SCENES.items():
    asked = []

    def ask(self):
        asked.append(1)
        before = len(read_results(disk / name / "results.h5").rows())
        if len(asked) == 2:
            break_disk()
        if len(asked) == 4:
            assert before == 1, before  # what was there before is whole
            mend()
        return False

    Interruption.is_due = ask
    settings = ["federation.num_rounds=5"]
    code = launch.run(folder / "run.toml", settings, disk / name, False)
    print(name, code, len(read_results(disk / name / "results.h5").rows()))
    assert len(list((disk / name / "checkpoints").glob("*.safetensors"))) == 2
"""


def test_a_disk_that_is_full_or_read_only_for_a_while(folder, tmp_path):
    """Real ones, in a mount namespace of their own: nothing stays mounted, whatever happens."""
    support.make_run_file(tmp_path)
    (tmp_path / "disk").mkdir()
    script = 'mount -t tmpfs -o size=2m tmpfs "$0/disk" && exec "$@"'
    private = ["unshare", "-m", "sh", "-c", script, str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*private, "true"], capture_output=True).returncode:
        pytest.skip("mounting a disk of its own needs root")
    done = subprocess.run(
        [*private, sys.executable, "-c", IN_NAMESPACE, str(tmp_path), *FOLDERS],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line in ("full 0 5", "read-only 0 5")] == ["full 0 5", "read-only 0 5"]
    told = [line for line in lines if line.startswith("warning:")]
    assert len([line for line in told if "No space left on device" in line]) == 1
    assert len([line for line in told if "Read-only file system" in line]) == 1
