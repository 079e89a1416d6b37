"""How updates leave a GPU."""

from __future__ import annotations

from collections.abc import Callable

from mpifedlora.errors import ConfigError

DIRECT_MARK = "direct buffers"


def choose_gpu_buffers(requested: str, device: str, *, is_server: bool, is_aware: Callable[[], bool]) -> str:
    """Return how a process's updates leave its GPU: `direct`, `staged`, or `none` without one.

    Args:
        requested: `[transport] gpu_buffers`.
        device: of the process.
        is_server: whether it trains nobody.
        is_aware: tries whether MPI reads GPU memory; asked only where it matters.

    Raises:
        ConfigError: if `direct` is asked for and a worker's MPI or device cannot do it.

    >>> choose_gpu_buffers("auto", "cuda:0", is_server=False, is_aware=lambda: False)
    'staged'
    """
    has_gpu = device.startswith("cuda")
    if is_server or (requested != "direct" and not has_gpu):
        return "none"
    if requested == "staged":
        return "staged"
    if has_gpu and is_aware():
        return "direct"
    if requested == "direct":
        got = "an MPI whose trial transfer between GPU buffers failed" if has_gpu else f"device {device}"
        raise ConfigError(
            'transport.gpu_buffers = "direct" needs a GPU and a CUDA-aware MPI on every worker, got '
            f'{got}; use "auto", or the cluster\'s CUDA-aware MPI with an mpi4py built on it'
        )
    return "staged"


def used_gpu_buffers(devices: list[str]) -> str:
    """Return how the workers' updates leave their GPUs.

    Args:
        devices: descriptions of the workers' devices.
    """
    if any(DIRECT_MARK in device for device in devices):
        return "direct"
    return "staged" if any(not device.startswith("cpu") for device in devices) else "none"
