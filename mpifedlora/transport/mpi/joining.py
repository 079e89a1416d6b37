"""Joining the federation: who is there, who is the server, what a node's processes share."""

from __future__ import annotations

import os
import socket
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

from mpifedlora.errors import ConfigError
from mpifedlora.transport.base import NodePlace, own_cores
from mpifedlora.transport.mpi.server import MpiServer
from mpifedlora.transport.mpi.survival import is_fault_tolerant
from mpifedlora.transport.mpi.worker import MpiWorker

if TYPE_CHECKING:
    from mpi4py import MPI

    Communicator = MPI.Comm
else:
    Communicator = Any

_LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMI_RANK", "PMIX_RANK", "MPI_LOCALNRANKS")


def is_launched() -> bool:
    """Say whether this process was started by an MPI launcher (or as a task of a larger Slurm step)."""
    return any(name in os.environ for name in _LAUNCHER_VARIABLES) or _num_slurm_tasks() > 1


def _num_slurm_tasks() -> int:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))


def connect(comm: Communicator | None = None) -> MpiServer | MpiWorker | None:
    """Join the federation of a communicator, by default of the whole job.

    Returns:
        The server's end, a worker's end, or None where there is one process only.

    Raises:
        ConfigError: if the launcher started several processes that do not see each other.
    """
    import mpi4py

    if is_fault_tolerant():
        mpi4py.rc.finalize = False  # `Survivor` does it, where it ends
    from mpi4py import MPI

    world = MPI.COMM_WORLD if comm is None else comm
    if world.size == 1:
        if comm is None and _num_slurm_tasks() > 1:
            if os.environ.get("SLURM_PROCID", "0") != "0":
                raise SystemExit(2)  # one of the tasks says why
            raise ConfigError(
                f"the {_num_slurm_tasks()} tasks of this Slurm step must form one MPI job, got MPI jobs of 1 "
                "process each (srun without an MPI plugin that fits this MPI); start with mpirun inside "
                "sbatch, or srun --mpi=TYPE with a TYPE from `srun --mpi=list` that fits; "
                "`mpifedlora doctor` looks for more"
            )
        return None
    own = world.Dup()
    place = _place(own)
    own.Set_errhandler(MPI.ERRORS_RETURN)  # from now on a dead process is an exception, not the end
    return MpiServer(own, place) if world.rank == 0 else MpiWorker(own, place)


def _place(comm: Communicator) -> NodePlace:
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    ranks_and_cores = np.zeros((node.size, 2), np.int64)
    cores = zlib.crc32(repr(own_cores()).encode())
    node.Allgather(np.array([comm.rank, cores]), ranks_and_cores)
    node.Free()
    workers = [int(mpi_rank) for mpi_rank in ranks_and_cores[:, 0] if mpi_rank > 0]
    return NodePlace(
        host=socket.gethostname(),
        num_cores=len(own_cores()),
        num_sharing_cores=int((ranks_and_cores[:, 1] == cores).sum()),
        num_workers=len(workers),
        worker_index=workers.index(comm.rank) if comm.rank in workers else len(workers),
    )
