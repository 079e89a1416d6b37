"""The transport over MPI collectives: the only file that knows MPI, and MPI ranks.

MPI rank 0 is the server, rank i is worker i - 1. Messages go as raw bytes: bfloat16 and other types
that MPI lacks need no special case, and nothing is pickled.

Waiting does not burn a core: a process that waits for slow partners tests and sleeps, and enters a
blocking collective only when everybody is about to. (Open MPI spins in blocking calls, which on a
shared node would take the cores from those that train.)
"""

from __future__ import annotations

import os
import socket
import sys
import time
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mpifedlora.core.agreement import STATUS_BYTES, Status
from mpifedlora.errors import ConfigError
from mpifedlora.transport.base import NodePlace, own_cores

# What needs torch is loaded when the set-up has been checked: a mistake is told in a second, not ten.
if TYPE_CHECKING:
    from mpi4py import MPI
    from torch import Tensor

    from mpifedlora.core.layout import ModelShapes
    from mpifedlora.core.plan import RoundPlan
    from mpifedlora.core.wire import ClientUpdate, UpdateRows

    Communicator = MPI.Comm

_LAUNCHER_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMI_RANK", "PMIX_RANK", "MPI_LOCALNRANKS")
_LONGEST_SLEEP_S = 1e-3


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
    from mpi4py import MPI

    world = MPI.COMM_WORLD if comm is None else comm
    if world.size == 1:
        if comm is None and _num_slurm_tasks() > 1:
            if os.environ.get("SLURM_PROCID", "0") != "0":
                raise SystemExit(2)  # one of the tasks says why
            raise ConfigError(
                f"the {_num_slurm_tasks()} tasks of this Slurm step must form one MPI job, got MPI jobs of 1 "
                "process each (srun without an MPI plugin that fits this MPI); start with mpirun inside "
                "sbatch, or srun --mpi=TYPE with a TYPE from `srun --mpi=list` that fits"
            )
        return None
    return MpiServer(world) if world.rank == 0 else MpiWorker(world)


class _Endpoint:
    is_server: bool

    def __init__(self, comm: Communicator) -> None:
        from mpi4py import MPI

        self.comm = comm.Dup()
        self.world_size = comm.size
        self.num_workers = comm.size - 1
        self.library = MPI.Get_library_version().split(",")[0].strip("\x00 \n")
        self.place = _place(self.comm)
        self.shapes: ModelShapes
        self.plan_bytes = 0
        self.is_pinned = False
        self._in_place = MPI.IN_PLACE
        self._byte = MPI.BYTE

    def exchange(self, status: Status) -> list[Status]:
        """Allgather one fixed-size record a process."""
        records = np.zeros((self.world_size, STATUS_BYTES), np.uint8)
        _wait(self.comm.Iallgather(status.pack(), records))
        return [Status.unpack(record) for record in records]

    def open(self, shapes: ModelShapes, num_clients: int, *, is_pinned: bool = False) -> None:
        """Say what the messages look like, and whether a GPU will copy them (page-locked memory)."""
        from mpifedlora.core.plan import plan_bytes

        self.shapes, self.is_pinned = shapes, is_pinned
        self.plan_bytes = plan_bytes(len(shapes.modules), num_clients)

    def abort(self, message: str) -> None:
        """Print a message and end every process of the job, with exit code 1."""
        sys.stdout.flush()
        print(message, file=sys.stderr, flush=True)
        self.comm.Abort(1)

    def process_names(self) -> list[str]:
        """Return what to call each process in a message, by MPI rank."""
        return ["the server", *(f"worker {worker_id}" for worker_id in range(self.num_workers))]


class MpiServer(_Endpoint):
    """The server's end, MPI rank 0.

    Args:
        comm: communicator of at least two processes; a duplicate of it is used.
    """

    is_server = True

    def __init__(self, comm: Communicator) -> None:
        super().__init__(comm)
        self.bytes_crossed = 0
        self._rows: UpdateRows | None = None
        self._wait_s = 0.0

    def broadcast(self, plan: RoundPlan, message: Tensor) -> None:
        """Send a plan and its message (message_values,) float32 to every worker."""
        packed = plan.pack()
        self.bytes_crossed += self.num_workers * (packed.nbytes + message.nbytes)
        _wait(self.comm.Ibcast([packed, self._byte]))
        if message.numel():
            self.comm.Bcast([_as_bytes(message), self._byte])

    def collect_predictions(self, counts: Sequence[int]) -> list[Tensor]:
        """Gather each worker's (counts[worker_id], 2) float32 losses and labels."""
        import torch

        received = torch.empty(sum(counts), 2)
        self.bytes_crossed += received.nbytes
        _wait(self.comm.Ibarrier())
        sizes = [0, *(8 * count for count in counts)]
        self.comm.Gatherv(self._in_place, [_as_bytes(received), sizes, None, self._byte])
        return list(torch.split(received, list(counts)))

    def collect(self, plan: RoundPlan) -> list[ClientUpdate]:
        """Gather the cohort's rows, if there are any; their values are valid until the next collect."""
        from mpifedlora.core.wire import fitting_rows, read_rows, row_sizes, row_stride

        started = time.perf_counter()
        self._wait_s = 0.0
        by_worker = row_sizes(plan, self.shapes, self.num_workers)
        counts = [sum(map(row_stride, sizes)) for sizes in by_worker]
        is_even = len(set(counts)) == 1
        # Gather gives the server a place of its own, which stays empty: as large as a worker's.
        unused = by_worker[0] if is_even else ()
        every = [size for sizes in by_worker for size in sizes]
        if not every:
            return []
        rows = self._rows = fitting_rows(self._rows, [*unused, *every])
        self.bytes_crossed += sum(counts)
        _wait(self.comm.Ibarrier())
        self._wait_s = time.perf_counter() - started
        target = _as_bytes(rows.buffer)
        if is_even:
            self.comm.Gather(self._in_place, [target, counts[0], self._byte])
        else:
            self.comm.Gatherv(self._in_place, [target, [0, *counts], None, self._byte])
        return read_rows(rows, plan, range(self.num_workers), first=len(unused))

    def wait_s(self) -> float:
        """Return the seconds that the last collect waited for the slowest worker."""
        return self._wait_s


class MpiWorker(_Endpoint):
    """A worker's end, MPI rank worker_id + 1.

    Args:
        comm: communicator of at least two processes; a duplicate of it is used.
    """

    is_server = False

    def __init__(self, comm: Communicator) -> None:
        super().__init__(comm)
        self.worker_id = comm.rank - 1
        self._message: Tensor | None = None
        self._is_even = False

    def receive(self) -> tuple[RoundPlan, Tensor]:
        """Wait for the next plan and message; the message is valid until the next receive."""
        import torch

        from mpifedlora.core.plan import RoundPlan
        from mpifedlora.core.wire import row_sizes, row_stride

        packed = np.empty(self.plan_bytes, np.uint8)
        _wait(self.comm.Ibcast([packed, self._byte]))
        plan = RoundPlan.unpack(packed, len(self.shapes.modules))
        by_worker = row_sizes(plan, self.shapes, self.num_workers)
        self._is_even = len({sum(map(row_stride, sizes)) for sizes in by_worker}) == 1
        num_values = plan.message_values(self.shapes)
        if self._message is None or self._message.numel() != num_values:
            self._message = torch.empty(num_values, pin_memory=self.is_pinned)
        if num_values:
            self.comm.Bcast([_as_bytes(self._message), self._byte])
        return plan, self._message

    def submit_predictions(self, predictions: Tensor) -> None:
        """Send (examples, 2) float32 losses and labels."""
        _wait(self.comm.Ibarrier())
        self.comm.Gatherv([_as_bytes(predictions), self._byte], None)

    def submit(self, rows: UpdateRows) -> None:
        """Send the rows of this worker's clients, in rising order of client_id."""
        _wait(self.comm.Ibarrier())
        gather = self.comm.Gather if self._is_even else self.comm.Gatherv
        gather([_as_bytes(rows.buffer), self._byte], None)


def _as_bytes(tensor: Tensor) -> npt.NDArray[np.uint8]:
    # numpy has no bfloat16, but any tensor can be seen as bytes through its one-byte view.
    import torch

    view: npt.NDArray[np.uint8] = tensor.reshape(-1).view(torch.uint8).numpy()
    return view


def _wait(request: MPI.Request) -> None:
    pause_s = 0.0
    while not request.Test():
        time.sleep(pause_s)
        pause_s = min(_LONGEST_SLEEP_S, 2 * pause_s + 1e-6)


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
