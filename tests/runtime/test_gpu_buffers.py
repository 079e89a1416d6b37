from __future__ import annotations

import pytest

from mpifedlora.errors import ConfigError
from mpifedlora.runtime.gpu_buffers import DIRECT_MARK, choose_gpu_buffers, used_gpu_buffers


@pytest.mark.parametrize(
    ("requested", "device", "is_aware", "expected"),
    [
        ("auto", "cuda:0", True, "direct"),
        ("auto", "cuda:1", False, "staged"),
        ("direct", "cuda:0", True, "direct"),
        ("staged", "cuda:0", True, "staged"),
        ("auto", "cpu", True, "none"),
        ("staged", "cpu", True, "none"),
    ],
)
def test_a_workers_updates_leave_its_gpu_as_its_mpi_can(
    requested: str, device: str, is_aware: bool, expected: str
) -> None:
    assert choose_gpu_buffers(requested, device, is_server=False, is_aware=lambda: is_aware) == expected


@pytest.mark.parametrize(
    ("device", "got"), [("cuda:0", "an MPI whose trial transfer .* failed"), ("cpu", "device cpu")]
)
def test_direct_buffers_that_cannot_be_are_an_error(device: str, got: str) -> None:
    with pytest.raises(
        ConfigError, match=f"needs a GPU and a CUDA-aware MPI on every worker, got {got}; use"
    ):
        choose_gpu_buffers("direct", device, is_server=False, is_aware=lambda: False)


def not_asked() -> bool:
    raise AssertionError("the trial takes seconds")


@pytest.mark.parametrize(
    ("requested", "device", "is_server"),
    [("auto", "cpu", False), ("staged", "cuda:0", False), ("auto", "cuda:0", True), ("direct", "cpu", True)],
)
def test_the_trial_is_made_only_where_it_matters(requested: str, device: str, is_server: bool) -> None:
    buffers = choose_gpu_buffers(requested, device, is_server=is_server, is_aware=not_asked)
    assert buffers == ("staged" if requested == "staged" else "none")


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (["cpu, 1 thread"] * 2, "none"),
        (["cpu, 1 thread", "Some GPU, 4 threads"], "staged"),
        (["Some GPU, 4 threads", f"Some GPU, 4 threads, {DIRECT_MARK}"], "direct"),
    ],
)
def test_a_run_tells_what_its_workers_use(devices: list[str], expected: str) -> None:
    assert used_gpu_buffers(devices) == expected
