"""Whether MPI reads GPU memory: what the child process that tries it may do, and what it is told."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mpifedlora.transport.mpi import gpu

PYTHON = sys.executable


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    gpu.is_gpu_aware.cache_clear()
    yield
    gpu.is_gpu_aware.cache_clear()


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script that runs in place of the child."""
    script = tmp_path / "child"
    monkeypatch.setattr(sys, "executable", str(script))
    return script


def write(script: Path, text: str) -> None:
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("exit 0", True), ("exit 1", False), ("kill -SEGV $$", False), ("kill -ABRT $$", False)],
)
def test_the_childs_end_is_the_answer(child: Path, text: str, expected: bool) -> None:
    write(child, text)
    assert gpu.is_gpu_aware() == expected


def test_a_process_asks_once(child: Path, tmp_path: Path) -> None:
    write(child, f"echo asked >> {tmp_path / 'log'}; exit 1")
    assert not gpu.is_gpu_aware()
    assert not gpu.is_gpu_aware()
    assert (tmp_path / "log").read_text() == "asked\n"


def test_a_child_that_hangs_is_ended(child: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PROBE_TIMEOUT_S", 0.2)
    write(child, "exec sleep 60")
    assert not gpu.is_gpu_aware()


def test_without_a_python_to_start_the_answer_is_no(child: Path) -> None:
    assert not gpu.is_gpu_aware()


def test_the_child_is_no_process_of_the_job(
    child: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launchers = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PRTE_LAUNCHED", "SLURM_PROCID")
    kept = (
        "OMPI_ALLOW_RUN_AS_ROOT",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM",
        "OMPI_MCA_btl",
        "CUDA_VISIBLE_DEVICES",
    )
    for name in (*launchers, "MPI_LOCALNRANKS", *kept):
        monkeypatch.setenv(name, "1")
    told = tmp_path / "told.json"
    code = "import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], open(os.environ['TOLD'], 'w'))"
    monkeypatch.setenv("TOLD", str(told))
    write(child, f'exec {PYTHON} -c "{code}" "$@"')
    assert gpu.is_gpu_aware()
    arguments, environment = json.loads(told.read_text())
    assert arguments == ["-c", "from mpifedlora.transport.mpi.gpu import transfer; transfer()"]
    assert not {*launchers, "MPI_LOCALNRANKS"} & set(environment)
    assert {"PATH", *kept} <= set(environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_answer_is_no(monkeypatch: pytest.MonkeyPatch) -> None:
    # What a launcher would have set, were this test one of its processes.
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("PMIX_RANK", "1")
    ended = []
    run = gpu.subprocess.run

    def watch(*arguments: Any, **options: Any) -> Any:
        ended.append(run(*arguments, **options))
        return ended[-1]

    monkeypatch.setattr(gpu.subprocess, "run", watch)
    assert not gpu.is_gpu_aware()
    assert [done.returncode for done in ended] == [1]
    assert b"Traceback" not in ended[0].stderr
