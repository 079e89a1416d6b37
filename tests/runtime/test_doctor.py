"""What `doctor` finds: on this machine, and on machines that are made worse for it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mpifedlora.io.children import Answer, ask
from mpifedlora.io.scratch import scratch_folder, try_folder
from mpifedlora.runtime import doctor, doctor_mpi
from mpifedlora.runtime.findings import Finding, as_values, finding_lines, probe

PYTHON = sys.executable


def run_python(text: str, timeout_s: float = 60) -> Answer:
    return ask([PYTHON, "-c", text], timeout_s)


def test_a_child_answers_with_the_last_object_that_it_prints() -> None:
    answer = run_python('print("hello"); print(\'{"a": 1}\'); print("bye")')
    assert (answer.values, answer.problem, answer.last_line) == ({"a": 1}, "", "bye")
    assert run_python("print('[1]'); print('{broken')").values is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("import os; os.abort()", "signal 6"),
        ("import sys; sys.exit('it is broken')", "exit code 1"),
        ("import time; print('waits', flush=True); time.sleep(60)", "no end within 2 s"),
    ],
)
def test_a_childs_end_is_an_answer(text: str, problem: str) -> None:
    answer = run_python(text, 2 if "sleep" in text else 60)
    assert (answer.values, answer.problem) == (None, problem)
    assert "it is broken" in answer.text or "exit" not in problem


def test_a_program_that_is_not_there_is_an_answer() -> None:
    answer = ask(["/nowhere/at/all"], 1)
    assert (answer.values, answer.text) == (None, "")
    assert "No such file" in answer.problem


def test_folders_are_tried() -> None:
    with scratch_folder() as folder:
        room = try_folder(folder / "not" / "yet")
        assert (room.folder, room.problem, room.has_locks) == (folder, "", True)
        assert room.free_bytes > 0
        assert room.kind != "?"
        assert list(folder.iterdir()) == []
    assert not folder.exists()
    assert try_folder(Path("/proc/self")).problem
    assert try_folder(Path("/proc/self")).kind == "proc"


def test_packages_are_compared_with_what_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    [finding] = doctor.check_packages()
    assert finding.state == "ok"
    assert "torch 2." in finding.text
    requires = ["torch>=99.1", "h5py>=3.10", "no-such-package>=1", 'ruff>=99; extra == "dev"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requires)
    [finding] = doctor.check_packages()
    assert finding.state == "wrong"
    assert finding.advice == "pip install 'torch>=99.1' 'no-such-package>=1'"


def test_more_threads_than_cores_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "100000")
    cores, memory = doctor.check_cores()
    assert (cores.state, memory.state) == ("note", "ok")
    assert "unset OMP_NUM_THREADS" in cores.advice
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert next(iter(doctor.check_cores())).state == "ok"


def test_what_was_not_fetched_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MPIFEDLORA_CACHE", str(tmp_path))
    [finding] = doctor.check_data()
    assert "20newsgroups" in finding.text.partition("not yet")[2]
    assert "mpifedlora data fetch 20newsgroups" in finding.advice or finding.state == "ok"


def test_a_cache_that_cannot_be_written_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MPIFEDLORA_CACHE", "/proc/self/cache")
    found = {one.name: one for one in doctor.check_folders()}
    assert found["cache"].state == "wrong"
    assert found["cache"].advice == "set MPIFEDLORA_CACHE"
    assert found["scratch"].state == "ok"


def test_hdf5_is_written_and_read_in_a_child() -> None:
    [finding] = doctor.check_hdf5()
    assert finding.state == "ok"
    assert finding.text.endswith("writes and reads")


def test_a_probe_that_fails_says_how() -> None:
    answer = probe("mpifedlora.runtime.doctor_probes", "no such probe")
    assert answer.values is None
    assert "KeyError" in answer.last_line


def launcher(folder: Path, text: str) -> str:
    script = folder / "mpirun"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_another_mpirun_than_that_of_mpi4py_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", launcher(tmp_path, 'echo "HYDRA build details:"; echo "    Version: 4.2.1"'))
    finding = next(iter(doctor_mpi.check_mpi()))
    assert finding.state == "wrong"
    assert "mpirun is MPICH 4.2.1" in finding.text
    assert "--no-binary=mpi4py" in finding.advice


def test_without_mpirun_a_run_goes_in_one_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    finding = next(iter(doctor_mpi.check_mpi()))
    assert finding.state == "note"
    assert "no mpirun in PATH" in finding.text
    assert list(doctor_mpi.check_exchange()) == []


def test_processes_that_are_alone_are_told_from_an_mpirun_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    version = '[ "$1" = --version ] && echo "mpirun (Open MPI) 4.1.6"'
    starts = f"{version} || {PYTHON} -m mpifedlora.transport.mpi.exchange"
    monkeypatch.setenv("PATH", launcher(tmp_path, starts))
    [finding] = doctor_mpi.check_exchange()
    assert (finding.state, finding.text) == ("wrong", "mpirun starts them, but each is alone")
    monkeypatch.setenv(
        "PATH", launcher(tmp_path, '[ "$1" = --version ] && echo "mpirun (Open MPI) 4.1.6" || exit 3')
    )
    [finding] = doctor_mpi.check_exchange()
    assert finding.state == "wrong"
    assert "exit code 3" in finding.text
    assert "mpirun -n 2" in finding.advice


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root is refused by mpirun")
def test_roots_refusal_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"):
        monkeypatch.delenv(name, raising=False)
    exchanged = next(iter(doctor_mpi.check_exchange()))
    assert exchanged.state == "wrong"
    assert "root may not start processes" in exchanged.text
    assert exchanged.advice == "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"


@pytest.mark.slow
def test_this_machine_is_ready() -> None:
    findings = {one.name: one for one in doctor.examine()}
    wrong = [one for one in findings.values() if one.state == "wrong"]
    assert wrong == []
    assert {
        "Python",
        "packages",
        "torch",
        "models",
        "HDF5",
        "MPI",
        "Slurm",
        "cores",
        "scratch",
        "data",
    } <= set(findings)
    assert "exchanged" in findings["two processes"].text
    values: dict[str, Any] = as_values(list(findings.values()))
    assert values["ok"] is True


def test_lines_fit_a_small_terminal_and_advice_stands_apart() -> None:
    finding = Finding("MPI", "wrong", "a long text " * 12, "do this and that " * 8)
    lines = finding_lines(finding, 80)
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("wrong MPI           a long text")
    assert any(line.startswith(" " * 20 + "-> do this") for line in lines)
    assert as_values([finding]) == {"ok": False, "findings": [finding._asdict()]}
