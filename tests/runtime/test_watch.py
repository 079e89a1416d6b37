"""A run seen from outside: what its folder tells, how it is shown, and a real one followed to its end."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import support
from made_runs import make_row, without_client, write_results

from mpifedlora.core.charts import ASCII, BLOCKS
from mpifedlora.errors import CheckpointError
from mpifedlora.io.output_folder import FolderLock, LockState, ask_lock
from mpifedlora.runtime.watch_view import frame
from mpifedlora.runtime.watching import EXIT_CODES, Sight, Watcher

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "mpifedlora"]
HELD = LockState(True, True, "process 7 on node1")
FREE_HERE = LockState(False, True, "process 7 on node1")
FREE_ELSEWHERE = LockState(False, False, "process 7 on node1")
UNKNOWN = LockState(None, False, "")
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def rows_up_to(last):
    return [make_row(number) for number in range(1, last + 1)]


def look(folder, age_s=0.0, lock=HELD):
    written_s = (folder / "results.h5").stat().st_mtime
    return Watcher(folder, lambda: written_s + age_s, lambda out: lock).look()


class TestSight:
    @pytest.mark.parametrize(
        ("rows", "age_s", "lock", "state", "note"),
        [
            (4, 1, HELD, "running", ""),
            (4, 29, FREE_ELSEWHERE, "running", ""),
            (4, 29, UNKNOWN, "running", ""),
            (4, 1, FREE_HERE, "dead", "process 7 on node1 has ended without a word"),
            (
                4,
                31,
                HELD,
                "running",
                "nothing new for 31s; a round takes about 10s; process 7 on node1 still",
            ),
            (4, 31, UNKNOWN, "quiet", "no lock to ask: it may have been killed"),
            (4, 31, FREE_ELSEWHERE, "quiet", "as far as this node can tell"),
            (0, 100, UNKNOWN, "running", ""),
            (0, 130, UNKNOWN, "quiet", "nothing new for 2m10s; no lock"),
        ],
    )
    def test_a_run_that_says_running(self, tmp_path, rows, age_s, lock, state, note):
        write_results(tmp_path, rows_up_to(rows))
        sight = look(tmp_path, age_s, lock)
        assert (sight.state, sight.has_ended) == (state, state == "dead")
        assert note in sight.note
        assert bool(sight.note) == bool(note)

    @pytest.mark.parametrize(("status", "code"), [("finished", 0), ("failed", 1), ("interrupted", 85)])
    def test_a_run_that_has_ended(self, tmp_path, status, code):
        write_results(tmp_path, rows_up_to(2), status)
        sight = look(tmp_path, 10_000, FREE_HERE)
        assert (sight.state, sight.has_ended, EXIT_CODES[sight.state]) == (status, True, code)

    def test_time_left_is_that_of_the_last_rounds_less_what_the_round_in_hand_has_had(self, tmp_path):
        rows = [make_row(number, round_s=100.0 if number < 4 else 10.0) for number in range(1, 9)]
        write_results(tmp_path, rows)
        assert [look(tmp_path, age_s).left_s for age_s in (0, 4, 25)] == [40.0, 36.0, 30.0]
        write_results(tmp_path, rows_up_to(12))
        assert look(tmp_path, 5).left_s == 0

    def test_no_folder_no_file_a_file_and_no_folder_again(self, tmp_path):
        folder = tmp_path / "run"
        watcher = Watcher(folder, lambda: 0.0)
        assert "does not exist yet" in watcher.look().note
        folder.mkdir()
        assert "holds no results.h5 yet" in watcher.look().note
        write_results(folder, rows_up_to(1), "finished")
        assert watcher.look().num_finished == 1
        write_results(folder, rows_up_to(2), "finished")
        assert watcher.look().num_finished == 2
        (folder / "results.h5").unlink()
        sight = watcher.look()
        assert (sight.state, sight.num_finished, sight.has_ended) == ("waiting", 2, False)
        folder.rmdir()
        with pytest.raises(CheckpointError, match="must stay while it is watched"):
            watcher.look()

    def test_a_file_that_is_none_of_ours(self, tmp_path):
        (tmp_path / "results.h5").write_bytes(b"no")
        with pytest.raises(CheckpointError, match="must be a complete file written by mpifedlora"):
            Watcher(tmp_path, lambda: 0.0).look()

    def test_a_read_that_fails_now_and_then_is_tried_again(self, tmp_path):
        write_results(tmp_path, rows_up_to(1), "finished")
        watcher = Watcher(tmp_path, lambda: 0.0)
        watcher.look()
        (tmp_path / "results.h5").write_bytes(b"no")
        assert watcher.look().num_finished == 1
        write_results(tmp_path, rows_up_to(2), "finished")
        assert watcher.look().num_finished == 2
        (tmp_path / "results.h5").write_bytes(b"no")
        assert [watcher.look().num_finished for _ in range(4)] == [2] * 4
        with pytest.raises(CheckpointError):
            watcher.look()


def test_the_lock_tells_whether_a_run_lives_and_keeps_no_run_out(tmp_path):
    assert ask_lock(tmp_path) == LockState(False, False, "")
    lock = FolderLock(tmp_path)
    lock.take()
    state = ask_lock(tmp_path)
    assert (state.is_held, f"process {os.getpid()} on ") == (
        True,
        state.holder[: len(f"process {os.getpid()} on ")],
    )
    lock.release()
    killed = (
        "import os, sys, signal; from pathlib import Path\n"
        "from mpifedlora.io.output_folder import FolderLock\n"
        "FolderLock(Path(sys.argv[1])).take(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", killed, str(tmp_path)], cwd=ROOT, check=False)
    assert ask_lock(tmp_path)[:2] == (False, True)
    (tmp_path / ".lock").write_text("process 1 on another-node")
    assert ask_lock(tmp_path) == LockState(False, False, "process 1 on another-node")
    lock.take()
    lock.release()


def shown(sight, width=80, height=23, shades=BLOCKS):
    return [line.plain for line in frame("runs/demo", sight, width, height, shades)]


class TestFrame:
    @pytest.fixture
    def sight(self, tmp_path):
        rows = rows_up_to(5)
        rows += [without_client(6, 5, "failed"), without_client(7, 5, "failed"), without_client(8, 0, "late")]
        events = tuple(f"event {number} [red]" for number in range(1, 10))
        return Sight("running", write_results(tmp_path, rows, events=events), 3.0)

    @pytest.mark.parametrize(
        ("name", "worst"),
        [("accuracy", "1 (0.250), 0 (0.500), 5 (0.500)"), ("loss", "3 (1.000), 4 (0.750), 0 (0.500)")],
    )
    def test_names_the_clients_that_are_served_worst(self, tmp_path, name, worst):
        measured = {f"client_eval_{name}": np.array([0.5, 0.25, np.nan, 1.0, 0.75, 0.5])}
        results = write_results(tmp_path, [make_row(1), make_row(2, **measured), make_row(3)])
        lines = shown(Sight("running", results, 3.0))
        assert f"worst     clients {worst}; median {name} 0.500" in lines

    def test_says_it_all_in_80_columns_and_24_lines(self, sight):
        lines = shown(sight)
        assert len(lines) <= 23
        assert max(map(len, lines)) <= 80
        text = "\n".join(lines)
        for part in (
            "runs/demo  sa-fedlora on 20newsgroups with minilm running",
            "round 8/12 annealing [##########------]  left 37s  last written 3s ago",
            "accuracy 0.838, best 0.838 (round 8)",
            "loss      0.250",
            "rank      9.0",
            "up        250.0 kB",
            "sent      12.2 MB, 98.0 % under full-model FedAvg, 50.0 % under fixed rank",
            "a round   10s: train 8s, collect 0.5s, aggregate 0.3s, evaluate 2s",
            "slowest   clients 5 (6s), 4 (5s), 3 (4s), 2 (3s); median 3.5s",
            "left out  client 5 failed 2 times, client 0 late",
            "event 9 [red]",
        ):
            assert part in text
        rank = next(line for line in lines if line.startswith("rank"))
        assert rank[22:].rstrip() == rank[22:][: 58 * 8 // 12 + 1].rstrip()

    @pytest.mark.parametrize(("width", "height"), [(20, 5), (40, 10), (80, 12), (200, 60), (80, 1)])
    def test_fits_any_terminal(self, sight, width, height):
        lines = shown(sight, width, height)
        assert 0 < len(lines) <= height
        assert max(map(len, lines)) <= width

    def test_every_height_shows_what_matters_first(self, sight):
        assert shown(sight, 80, 12)[1].startswith("round 8/12")
        assert any(line.startswith("left out") for line in shown(sight, 80, 12))
        assert sum("event" in line for line in shown(sight, 80, 60)) == 9

    def test_an_encoding_without_blocks(self, sight):
        assert "".join(shown(sight, shades=ASCII)).isascii()

    def test_before_the_first_round_and_before_the_run(self, tmp_path):
        results = write_results(tmp_path, [], events=("hello",))
        lines = shown(Sight("running", results, 5.0))
        assert lines[1] == "round 0/12 [----------------]  left ?  last written 5s ago"
        assert lines[2].endswith("hello")
        assert shown(Sight("waiting", note="not yet")) == ["runs/demo waiting", "not yet"]

    def test_what_was_not_measured_is_not_drawn(self, tmp_path):
        nan = float("nan")
        rows = [make_row(1, eval_accuracy=nan, train_loss=nan, lora_rank_mean=0.0)]
        text = "\n".join(shown(Sight("running", write_results(tmp_path, rows), 5.0)))
        assert "accuracy" not in text
        assert "nan" not in text
        assert re.search(r"^loss +-", text, re.MULTILINE)
        assert re.search(r"^rank +-", text, re.MULTILINE)

    def test_a_task_without_accuracy_shows_its_loss(self, tmp_path):
        rows = [make_row(number, eval_accuracy=float("nan")) for number in (1, 2)]
        lines = shown(Sight("running", write_results(tmp_path, rows), 5.0))
        assert lines[2] == "evaluation loss 0.750, best 0.750 (round 2)"
        assert [line[:10] for line in (lines[3], lines[9])] == ["   1.500  ", "   0.750  "]

    def test_a_run_that_can_go_on_says_how(self, tmp_path):
        results = write_results(tmp_path, rows_up_to(2), "interrupted")
        assert "go on with: mpifedlora run --resume --out runs/demo" in shown(
            Sight("interrupted", results, 1.0)
        )
        long_note = "word " * 40
        lines = shown(Sight("dead", results, 1.0, long_note))
        assert " ".join(lines).count("word") == 40


class TestProgram:
    def test_once(self, tmp_path):
        write_results(tmp_path / "run", rows_up_to(3), "finished")
        command = [*PROGRAM, "watch", str(tmp_path / "run"), "--once"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert "round 3/12" in done.stdout
        assert "\x1b" not in done.stdout
        assert len(done.stdout.splitlines()) <= 23

    def test_on_a_terminal_the_last_frame_stays(self, tmp_path):
        write_results(tmp_path / "run", rows_up_to(3), "failed", events=("the disk is full",))
        leader, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": "1"}
        process = subprocess.Popen(
            [*PROGRAM, "watch", str(tmp_path / "run")], cwd=ROOT, stdout=follower, env=environment
        )
        os.close(follower)
        written = b""
        while chunk := _read(leader):
            written += chunk
        os.close(leader)
        assert process.wait() == 1
        after = written.decode().split("\x1b[?1049l")  # the screen of its own is left
        assert len(after) == 2
        assert "the disk is full" in ESCAPE.sub("", after[1])
        assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", written.decode())

    def test_follows_a_real_run_to_its_end(self, tmp_path):
        run_file = support.make_run_file(tmp_path)
        out = tmp_path / "runs" / "real"
        watching = subprocess.Popen(
            [*PROGRAM, "watch", str(out), "--interval", "0.1"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        command = [*PROGRAM, "run", str(run_file), "--out", str(out)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        output, _ = watching.communicate(timeout=60)
        assert watching.returncode == 0
        lines = output.splitlines()
        assert "does not exist yet" in lines[0]
        assert [line[:10] for line in lines if line.startswith("round")] == [
            f"round {n}/4 "[:10] for n in range(1, 5)
        ]
        assert lines[-1].endswith(": finished")


def _read(leader):
    try:
        return os.read(leader, 4096)
    except OSError:  # the other end is closed
        return b""
