"""Runs that are cut short by real signals go on as if they never were; what does not fit is refused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import federations
import pytest
import support

from mpifedlora.errors import CheckpointError, ConfigError
from mpifedlora.io.results import read_results
from mpifedlora.runtime import interruption, launch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("resuming")
    support.make_run_file(made)
    return made


def run(folder, out, *settings, **options):
    return launch.run(folder / "run.toml", settings, out, False, **options)


def resume(folder, out, *settings):
    return run(folder, out, *settings, resumes=True)


@pytest.fixture(scope="module")
def whole(folder):
    run(folder, folder / "whole", "checkpoint.keep=4")
    return folder / "whole"


@pytest.fixture
def cut(folder, tmp_path, monkeypatch):
    """A run that was cut short after two of four rounds."""
    asked = []
    with monkeypatch.context() as patch:
        is_due = lambda self: asked.append(1) or len(asked) == 2  # noqa: E731 (a method by patch)
        patch.setattr(interruption.Interruption, "is_due", is_due)
        assert run(folder, tmp_path / "cut", "checkpoint.keep=4") == 85
    return tmp_path / "cut"


def assert_same(out, whole):
    found, wanted = federations.contents(out), federations.contents(whole)
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if found[key] != wanted[key]] == []
    assert read_results(out / "results.h5").baselines == read_results(whole / "results.h5").baselines


def test_the_folder_alone_goes_on(cut, whole, capsys):
    interrupted = read_results(cut / "results.h5")
    assert interrupted.status == "interrupted"
    assert launch.run(None, [], cut, False, resumes=True) == 0
    assert "resumed after round 2" in capsys.readouterr().out
    assert_same(cut, whole)
    before, after = read_results(whole / "results.h5"), read_results(cut / "results.h5")
    assert (after.status, after.info.created) == ("finished", interrupted.info.created)
    assert [event.text for event in after.events] == ["resumed after round 2"]
    assert len(before.rows()) == len(after.rows())


def test_a_finished_run_is_left_as_it_is(folder, cut, whole):
    assert resume(folder, cut, "checkpoint.keep=4") == 0
    assert resume(folder, cut, "checkpoint.keep=4") == 0
    assert_same(cut, whole)


def test_a_finished_run_is_extended(folder, cut):
    assert resume(folder, cut) == 0
    assert resume(folder, cut, "federation.num_rounds=6") == 0
    results = read_results(cut / "results.h5")
    assert results.rounds["round_num"].tolist() == [1, 2, 3, 4, 5, 6]
    assert results.status == "finished"


def test_where_nothing_is_yet_a_run_begins(folder, tmp_path, whole):
    assert resume(folder, tmp_path / "new", "checkpoint.keep=4") == 0
    assert_same(tmp_path / "new", whole)


def test_a_changed_configuration_is_refused_with_its_keys(folder, cut):
    before = federations.contents(cut)
    with pytest.raises(
        CheckpointError, match=r"lora.rank_min was 1, got 2; training.local_steps was 2, got 3"
    ):
        resume(folder, cut, "lora.rank_min=2", "training.local_steps=3")
    assert federations.contents(cut) == before


def test_the_checkpoint_before_a_damaged_one_is_taken(folder, cut, whole, capsys):
    newest = max((cut / "checkpoints").iterdir())
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert resume(folder, cut, "checkpoint.keep=4") == 0
    told = capsys.readouterr()
    assert (
        f"damaged: its bytes are not those its name tells, so an older one is looked for ({newest})"
        in told.err
    )
    assert "resumed after round 1" in told.out
    assert_same(cut, whole)


def test_rounds_without_a_checkpoint_are_not_thrown_away(folder, tmp_path):
    out = tmp_path / "run"
    assert run(folder, out, "checkpoint.every=0") == 0
    with pytest.raises(CheckpointError, match="got 4 rounds and none"):
        resume(folder, out, "checkpoint.every=0")
    assert len(read_results(out / "results.h5").rows()) == 4


def test_results_that_are_behind_the_checkpoint_are_refused(folder, cut):
    old = cut / "results.h5"
    run(folder, cut / "other", "federation.num_rounds=1", "initiating.rounds=0")
    (cut / "other" / "results.h5").replace(old)
    with pytest.raises(CheckpointError, match=r"must hold the 2 rounds of the checkpoint, got 1"):
        resume(folder, cut)


def test_checkpoints_every_few_rounds(folder, tmp_path):
    out = tmp_path / "run"
    assert run(folder, out, "checkpoint.every=3", "checkpoint.keep=5") == 0
    assert [path.name[:11] for path in sorted((out / "checkpoints").iterdir())] == [
        "round-00003",
        "round-00004",
    ]


def test_slurms_time_limit_ends_a_run_early(folder, tmp_path, monkeypatch, whole):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 5))
    out = tmp_path / "run"
    assert resume(folder, out, "checkpoint.keep=4") == 85
    assert len(read_results(out / "results.h5").rows()) == 1
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert resume(folder, out, "checkpoint.keep=4") == 0
    assert_same(out, whole)


def begin(folder, out, processes, *settings):
    command = [
        sys.executable,
        "-m",
        "mpifedlora",
        "run",
        str(folder / "run.toml"),
        "--out",
        str(out),
        "--resume",
    ]
    command += [part for setting in settings for part in ("--set", setting)]
    if processes:
        command = ["bash", "-c", '. tests/mpi_env.sh && exec mpirun -n "$0" "$@"', str(processes), *command]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ}
    )


def wait_for_checkpoint(out):
    deadline = time.monotonic() + 100
    while not list(out.glob("checkpoints/round-*")):
        assert time.monotonic() < deadline, "a checkpoint must come within 100 s"
        time.sleep(0.02)


LONG = "training.local_steps=40"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "processes"), [("SIGUSR2", 3), ("SIGKILL", 3), ("SIGKILL", 0), ("SIGTERM", 3)]
)
def test_signals(folder, tmp_path, kind, processes):
    out = tmp_path / "cut"
    process = begin(folder, out, processes, LONG)
    wait_for_checkpoint(out)
    process.send_signal(getattr(signal, kind))
    output, _ = process.communicate(timeout=100)
    if kind == "SIGKILL" and processes:  # mpirun alone: its processes notice, and end too
        wait_until_free(out)
    assert len(read_results(out / "results.h5").rows()) < 4, output
    if kind == "SIGUSR2":
        assert process.returncode == 85, output
        assert f"of 4; go on with: mpifedlora run --resume --out {out}" in output
    assert begin(folder, out, 2 if processes else 0, LONG).wait(100) == 0
    assert run(folder, tmp_path / "whole", LONG) == 0
    assert_same(out, tmp_path / "whole")


def wait_until_free(out):
    from mpifedlora.io.output_folder import FolderLock

    lock, deadline = FolderLock(out), time.monotonic() + 30
    while True:
        try:
            lock.take()
        except ConfigError:
            assert time.monotonic() < deadline, "processes without their mpirun must end"
            time.sleep(0.2)
        else:
            lock.release()
            return
