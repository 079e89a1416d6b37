"""MPI, its launcher and the cluster around it, as `doctor` looks at them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mpifedlora.core.units import human_bytes
from mpifedlora.io.children import Answer, ask
from mpifedlora.runtime.findings import Finding, probe
from mpifedlora.transport.mpi.gpu import is_gpu_aware, without_launcher

EXCHANGE_TIMEOUT_S = 90.0
_SHORT_S = 10.0
_MODULE = "mpifedlora.transport.mpi.exchange"
_VERSION = re.compile(
    r"(Open MPI|OpenRTE|MPICH|HYDRA|Intel\(R\) MPI)[^\d]*(\d+\.\d+(?:\.\d+)?)", re.IGNORECASE
)
_ULFM = ("--with-ft", "ulfm")
_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
_CROWDED = {
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}
_OTHER_MPI = (
    "build mpi4py on the MPI whose mpirun comes first in PATH: "
    "pip install --force-reinstall --no-binary=mpi4py mpi4py"
)


def check_mpi() -> Iterator[Finding]:
    """Compare the MPI that mpi4py loads with the mpirun in PATH."""
    loaded = probe(_MODULE, "describe")
    if loaded.values is None:
        text = f"mpi4py cannot load it ({loaded.problem}): {loaded.last_line}"
        advice = "load the cluster's MPI module; without one: pip install 'mpifedlora[mpi]'"
        yield Finding("MPI", "wrong", text, advice)
        return
    described, launcher = _described(loaded.values), _launcher_version()
    if launcher is None:
        advice = "load the cluster's MPI module, or pip install 'mpifedlora[mpi]'; without it: one process"
        yield Finding("MPI", "note", f"{described}; no mpirun in PATH", advice)
        return
    name, version = launcher
    own = str(loaded.values["version"])
    is_same = name.lower() == str(loaded.values["vendor"]).lower()
    is_near = is_same and version.split(".")[:2] == own.split(".")[:2]
    text = f"{described}; mpirun is {name} {version}"
    yield (
        Finding("MPI", "ok", text)
        if is_near
        else Finding("MPI", "wrong" if not is_same else "note", text, _OTHER_MPI)
    )
    if not loaded.values["has_threads"]:
        advice = "an MPI built with MPI_THREAD_MULTIPLE lets a run notice processes that hang"
        yield Finding("threads", "note", "this MPI does not give them", advice)


def _described(values: Mapping[str, Any]) -> str:
    return f"mpi4py {values['mpi4py']} with {values['vendor']} {values['version']}"


def _launcher_version() -> tuple[str, str] | None:
    match = _VERSION.search(ask(["mpirun", "--version"], _SHORT_S, without_launcher()).text)
    if match is None:
        return None
    names = {"openrte": "Open MPI", "hydra": "MPICH", "intel(r) mpi": "Intel MPI", "mpich": "MPICH"}
    return names.get(match[1].lower(), "Open MPI"), match[2]


def check_exchange() -> Iterator[Finding]:
    """Start two processes that exchange a real message, as they would start for a run."""
    launcher = _launcher_version()
    if launcher is None:
        return
    has_option = launcher[0] == "Open MPI" and int(launcher[1].partition(".")[0]) >= 5
    answer, needed = _exchange(*_ULFM) if has_option else _exchange()
    if answer.values is None and has_option:
        answer, needed = _exchange()
    yield _exchanged(answer, needed)
    if answer.values is not None:
        yield _survival(survives=bool(answer.values["survives"]))
    yield from _gpu_awareness()


def _exchange(*options: str) -> tuple[Answer, dict[str, str]]:
    """Return how an exchange went, and the settings that it needed beyond the environment."""
    command = ["mpirun", *options, "-n", "2", sys.executable, "-m", _MODULE]
    environment, needed = without_launcher(), {}
    answer = ask(command, EXCHANGE_TIMEOUT_S, environment)
    for remedy, is_needed in ((_ROOT, _refuses_root), (_CROWDED, _lacks_slots)):
        if answer.values is None and is_needed(answer):
            needed.update(remedy)
            answer = ask(command, EXCHANGE_TIMEOUT_S, environment | needed)
    return answer, needed


def _refuses_root(answer: Answer) -> bool:
    return "run as root" in answer.text or "running as root" in answer.text.lower()


def _lacks_slots(answer: Answer) -> bool:
    return "not enough slots" in answer.text


def _exchanged(answer: Answer, needed: Mapping[str, str]) -> Finding:
    if answer.values is None:
        if "each is alone" in answer.text:
            return Finding("two processes", "wrong", "mpirun starts them, but each is alone", _OTHER_MPI)
        text = f"mpirun -n 2 fails ({answer.problem or 'no answer'}): {answer.last_line}"
        advice = f"run it by hand and read on: mpirun -n 2 {sys.executable} -m {_MODULE}"
        return Finding("two processes", "wrong", text, advice)
    size, seconds = answer.values["num_bytes"], answer.values["seconds"]
    text = f"exchanged {human_bytes(size)} in {1000 * seconds:.0f} ms over {answer.values['library']}"
    if not needed:
        return Finding("two processes", "ok", text)
    settings = " ".join(f"{name}={value}" for name, value in needed.items())
    why = (
        "root may not start processes"
        if "OMPI_ALLOW_RUN_AS_ROOT" in needed
        else "there are fewer cores than 2"
    )
    return Finding(
        "two processes", "wrong", f"{text}, but only with other settings: {why}", f"export {settings}"
    )


def _survival(*, survives: bool) -> Finding:
    if survives:
        return Finding(
            "ULFM", "ok", "start with `mpirun --with-ft ulfm`: then a worker that dies ends no run"
        )
    advice = "Open MPI 5 built with ULFM has it; without it a run is resumed with --resume"
    return Finding("ULFM", "note", "not in this MPI: a process that dies ends the job", advice)


def _gpu_awareness() -> Iterator[Finding]:
    if not Path("/dev/nvidia0").exists():
        return
    if is_gpu_aware():
        yield Finding("CUDA-aware MPI", "ok", "a trial transfer between GPU buffers works")
    else:
        text = "a trial transfer between GPU buffers failed: updates go by way of page-locked memory"
        yield Finding("CUDA-aware MPI", "note", text, "a CUDA-aware MPI saves the copy; runs work without")


def check_cluster() -> Iterator[Finding]:
    """Look for Slurm, and for what its srun can start."""
    version = ask(["sbatch", "--version"], _SHORT_S)
    if version.problem:
        is_there = bool(version.text)
        text = f"installed, but without a cluster: {version.last_line}" if is_there else "none here"
        yield Finding("Slurm", "ok", f"{text}; start runs with mpirun")
        return
    job = f", inside job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    answer = ask(["srun", "--mpi=list"], _SHORT_S)
    if answer.problem:
        advice = "ask for a login node of the cluster, or start its services; runs outside Slurm work"
        yield Finding(
            "Slurm", "note", f"{version.last_line}{job}, but it does not answer: {answer.last_line}", advice
        )
        return
    types = [word for word in re.findall(r"\w+", answer.text) if word.startswith(("pmi", "cray"))]
    text = f"{version.last_line}{job}; srun --mpi offers {', '.join(dict.fromkeys(types)) or 'no PMI'}"
    if any(one.startswith("pmix") for one in types):
        yield Finding("Slurm", "ok", f"{text}: mpifedlora submit uses mpirun, srun --mpi=pmix works too")
    else:
        advice = "Open MPI 5 needs pmix under srun; mpirun, which mpifedlora submit uses, needs none"
        yield Finding("Slurm", "ok", f"{text}: {advice}")
