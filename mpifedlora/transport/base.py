"""What a transport does: one server, some workers, collective steps in one fixed order.

Every round is: the server broadcasts a plan and one flat buffer; if the plan says so, the workers
submit predictions; the workers submit their clients' headers, and then, as the server asks or has asked
before, the rows whole, their sum, or the rows in parts while the next round's plan and buffer come in
parts. Both ends know all sizes from the plan.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from mpifedlora.core.agreement import Status

if TYPE_CHECKING:
    from torch import Tensor

    from mpifedlora.core.layout import ModelShapes
    from mpifedlora.core.plan import RoundPlan
    from mpifedlora.core.streaming import RoundStream
    from mpifedlora.core.wire import UpdateHeader, UpdateRows, WireFormat

EXIT_RESUMABLE = 75
"""Exit code of a job that lost a process and can be resumed: EX_TEMPFAIL of sysexits.h."""

ORDER_BYTES = 8
"""Of the record that says what comes next, before the plan in it."""

Takes = Literal["", "rows", "parts"]
"""What is known beforehand of how a round's rows will be collected: nothing, whole, or in parts.

Then they, or their first parts, come right behind the headers, without waiting for an order."""


@dataclass(frozen=True)
class NodePlace:
    """Where a process stands on its node.

    Args:
        host: name of the node.
        num_cores: that this process may run on.
        num_sharing_cores: processes of this job that may run on the same cores, this one included.
        num_workers: processes of this job on the node that train.
        worker_index: this worker's number among them; the server's is num_workers.
    """

    host: str
    num_cores: int
    num_sharing_cores: int
    num_workers: int
    worker_index: int


def own_cores() -> list[int]:
    """Return the numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class TrainsClients(Protocol):
    """A worker as a transport drives it."""

    def receive(self, plan: RoundPlan, wire: Tensor) -> None:
        """Take a plan and the bytes of its message."""

    def predictions(self) -> Tensor:
        """Return what this worker has measured: the statistics of examples, or the metrics of clients."""

    def train(self) -> UpdateRows:
        """Train this worker's clients of the round, and return their rows, or the sum of them."""


class ServerTransport(Protocol):
    """The server's end."""

    num_workers: int
    bytes_crossed: int
    can_stream: bool
    is_fault_tolerant: bool

    def broadcast(self, plan: RoundPlan, wire: Tensor, *, takes: Takes = "") -> None:
        """Send a plan and the bytes of its message to every worker.

        Args:
            plan: of the round.
            wire: bytes of its message.
            takes: how its rows will be collected. Where parts were announced they may be collected whole
                after all, which costs the first parts.
        """

    def collect_predictions(
        self, counts: Sequence[int], width: int = 2, dtype: str = "float32"
    ) -> list[Tensor]:
        """Return what each worker has measured, (counts[worker_id], width)."""

    def collect_headers(self, plan: RoundPlan) -> list[UpdateHeader]:
        """Wait until all workers have trained; return their clients' headers, by worker and client."""

    def collect_rows(self, plan: RoundPlan) -> list[Tensor]:
        """Return the bytes of every row, in the order of the headers; they hold until the next collect."""

    def collect_sum(self, total: Tensor) -> None:
        """Add up what the workers have summed into `total` (row values,) float32 or float64."""

    def stream(self, plan: RoundPlan, stream: RoundStream, *, takes: Takes = "") -> float:
        """Take in a round part by part, while the next message goes out; return the seconds aggregated.

        Args:
            plan: of the round.
            stream: its parts, and where they go.
            takes: how the next round's rows will be collected.
        """

    def repair(self) -> list[int]:
        """Go on with the workers that live, after a WorkerLost; return the ids that the lost ones had.

        Those left keep their order and have the ids 0..num_workers-1 from now on. They wait for a broadcast.
        """


class WorkerTransport(Protocol):
    """A worker's end."""

    worker_id: int
    num_workers: int

    def receive(self) -> tuple[RoundPlan, Tensor]:
        """Wait for the next plan and its message's bytes, which hold until the next receive."""

    def submit_predictions(self, predictions: Tensor) -> None:
        """Send what this worker has measured, two-dimensional."""

    def submit(self, rows: UpdateRows) -> None:
        """Send the rows of this worker's clients, or their sum."""

    def repair(self) -> list[int]:
        """Go on with those that live, after a WorkerLost: maybe under another worker_id."""


class Endpoint(Protocol):
    """What both ends share before the shapes of the model are known."""

    place: NodePlace
    library: str
    is_server: bool
    is_fault_tolerant: bool

    @property
    def trains_as(self) -> int | None:
        """The worker_id under which this process trains clients; None where it trains none."""

    def process_names(self) -> list[str]:
        """Return what to call each process in a message, the server first."""

    def exchange(self, status: Status) -> list[Status]:
        """Give this process's status, and get every process's, the server's first."""

    def open(
        self,
        shapes: ModelShapes,
        num_clients: int,
        wire: WireFormat,
        *,
        part_bytes: int | None = None,
        is_pinned: bool = False,
    ) -> None:
        """Say what the messages look like, and whether a GPU will copy them (page-locked memory)."""

    def share(self, content: bytes) -> bytes:
        """Return what the server gives, on every process; the workers' own content does not count."""

    def pool(self, content: bytes) -> list[bytes]:
        """Give bytes of any number, and get those of every process, the server's first."""

    def watch(self, timeout_s: float | None, resume: str) -> None:
        """End the job when a process that it cannot do without is dead or silent, and say how to resume."""

    def part(self) -> None:
        """Wait until every process has finished its part of the run; until then they watch each other."""

    def abort(self, message: str, exit_code: int = 1) -> None:
        """End the whole job with a message and a non-zero exit code."""
