"""Whether MPI can read and write the memory of a GPU: found out by trying."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

PROBE_TIMEOUT_S = 60
_LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_", "MPI_LOCAL")
_KEPT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_MCA_")


@cache
def is_gpu_aware() -> bool:
    """Say whether a small transfer between two buffers on a GPU works.

    It is tried in a child process, because an MPI that is not made for it crashes.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"from {__name__} import transfer; transfer()"],
            env=without_launcher(),
            timeout=PROBE_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def without_launcher() -> dict[str, str]:
    """Return the environment without what would make the child one of the job's processes."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(_KEPT) or not name.startswith(_LAUNCHER_PREFIXES)
    }


def transfer() -> None:
    """Send a buffer from GPU memory to GPU memory; end with code 1 if it does not arrive.

    Raises:
        SystemExit: with code 1, if there is no GPU or other bytes arrive.
    """
    import torch
    from mpi4py import MPI

    if not torch.cuda.is_available():
        raise SystemExit(1)
    sent = torch.arange(4096, dtype=torch.uint8, device="cuda")
    received = torch.zeros_like(sent)
    MPI.COMM_SELF.Sendrecv([sent, MPI.BYTE], 0, recvbuf=[received, MPI.BYTE], source=0)
    torch.cuda.synchronize()
    raise SystemExit(0 if torch.equal(sent, received) else 1)
