"""What a transport does: one server, some workers, collective steps in one fixed order.

Every round is: the server broadcasts a plan and one flat buffer; if the plan says so, the workers
submit predictions; the workers submit their clients' rows. Both ends know all sizes from the plan.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mpifedlora.core.agreement import Status

if TYPE_CHECKING:
    from torch import Tensor

    from mpifedlora.core.layout import ModelShapes
    from mpifedlora.core.plan import RoundPlan
    from mpifedlora.core.wire import ClientUpdate, UpdateRows


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

    def receive(self, plan: RoundPlan, message: Tensor) -> None:
        """Take a plan and its message (message_values,) float32."""

    def predictions(self) -> Tensor:
        """Return (examples, 2) float32, loss and predicted label of this worker's test examples."""

    def train(self) -> UpdateRows:
        """Train this worker's clients of the round, and return their rows."""


class ServerTransport(Protocol):
    """The server's end."""

    num_workers: int
    bytes_crossed: int

    def broadcast(self, plan: RoundPlan, message: Tensor) -> None:
        """Send a plan and its message (message_values,) float32 to every worker."""

    def collect_predictions(self, counts: Sequence[int]) -> list[Tensor]:
        """Return each worker's (counts[worker_id], 2) float32 losses and labels."""

    def collect(self, plan: RoundPlan) -> list[ClientUpdate]:
        """Return the cohort's updates; their values are valid until the next collect."""

    def wait_s(self) -> float:
        """Return the seconds that the last collect waited for the slowest worker."""


class WorkerTransport(Protocol):
    """A worker's end."""

    worker_id: int
    num_workers: int

    def receive(self) -> tuple[RoundPlan, Tensor]:
        """Wait for the next plan and message; the message is valid until the next receive."""

    def submit_predictions(self, predictions: Tensor) -> None:
        """Send (examples, 2) float32 losses and labels."""

    def submit(self, rows: UpdateRows) -> None:
        """Send the rows of this worker's clients."""


class Endpoint(Protocol):
    """What both ends share before the shapes of the model are known."""

    place: NodePlace
    library: str
    is_server: bool

    def process_names(self) -> list[str]:
        """Return what to call each process in a message, the server first."""

    def exchange(self, status: Status) -> list[Status]:
        """Give this process's status, and get every process's, the server's first."""

    def open(self, shapes: ModelShapes, num_clients: int, *, is_pinned: bool = False) -> None:
        """Say what the messages look like, and whether a GPU will copy them (page-locked memory)."""

    def abort(self, message: str) -> None:
        """End the whole job with a message and a non-zero exit code."""
