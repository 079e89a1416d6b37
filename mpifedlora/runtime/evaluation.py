"""Measuring the global model, or each client's own: same bits on the server and on any number of workers.

`Evaluation` is on examples that all processes see, `OwnEvaluation` on those that each client has of its own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpifedlora.core.batches import Indices, length_batches
from mpifedlora.core.metrics import ClientMetrics, Measured, Metrics, mean_metrics
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.planning import given_to
from mpifedlora.errors import DataError, TrainingError
from mpifedlora.io.tables import Examples
from mpifedlora.training.local import predict
from mpifedlora.training.models import FederatedModel
from mpifedlora.training.task import EncodedExamples, Task

Recall = Callable[[RoundPlan, int], Mapping[str, Tensor]]
"""Gives what a client has kept, from the plan and its id."""


class Share(NamedTuple):
    """Examples that one model is measured on.

    Args:
        client_id: whose model, or None for the global one.
        indices: of the examples.
    """

    client_id: int | None
    indices: Indices


class Evaluation:
    """Held-out examples, cut into batches that do not depend on who measures them.

    Args:
        task: what is measured.
        examples: what it is measured on.
        batch_size: examples a forward pass.
        precision: `float32` or `bfloat16`.
        parts: by client id, the examples that the client's own model is measured on, together every
            example once; None measures the global model on all.
        recall: of a client's own model.
    """

    dtype = "float32"

    def __init__(
        self,
        task: Task,
        examples: Examples,
        batch_size: int,
        precision: str,
        parts: Sequence[Indices] | None = None,
        recall: Recall = lambda plan, client_id: {},
    ) -> None:
        self.task = task
        self.raw = examples
        self.batch_size = batch_size
        self.precision = precision
        self.recall = recall
        everything = [Share(None, np.arange(len(examples)))]
        self.shares = everything if parts is None else [Share(*pair) for pair in enumerate(parts)]

    @property
    def width(self) -> int:
        """Statistics of an example."""
        return len(self.task.statistics)

    def lose(self, lost: Sequence[int], num_left: int) -> None:
        """Go on without some workers: any of those left can measure any batch."""

    @cached_property
    def examples(self) -> EncodedExamples:
        """The examples as numbers; encoded when they are first needed, where they are needed."""
        return self.task.encode(self.raw.columns, self.raw.labels)

    @cached_property
    def batches(self) -> list[Share]:
        """All batches, each of one model."""
        lengths = self.examples.lengths
        return [
            Share(client_id, indices[batch])
            for client_id, indices in self.shares
            for batch in length_batches(lengths[indices], self.batch_size)
        ]

    def counts(self, num_parts: int) -> list[int]:
        """Return how many examples each of num_parts workers measures."""
        sizes: list[int] = []
        for share in self.shares:
            full, rest = divmod(len(share.indices), self.batch_size)
            sizes += [self.batch_size] * full + ([rest] if rest else [])
        return [sum(sizes[part::num_parts]) for part in range(num_parts)]

    def predictions(
        self, model: FederatedModel, plan: RoundPlan, part: int = 0, num_parts: int = 1
    ) -> Tensor:
        """Measure every num_parts-th batch from `part` on: (examples, statistics) float32."""
        measured = [torch.empty(0, len(self.task.statistics))]
        for client_id, batches in groupby(self.batches[part::num_parts], lambda batch: batch.client_id):
            _bind(model, plan, client_id, self.recall)
            indices = [batch.indices for batch in batches]
            measured.append(predict(model, self.task, self.examples, indices, self.precision))
        return torch.cat(measured)

    def metrics(self, parts: Sequence[Tensor]) -> Metrics:
        """Return the metrics from all workers' predictions, in the same order for any number of them."""
        return _metrics(self.task, self._whole(parts), self.examples)

    def _whole(self, parts: Sequence[Tensor]) -> Tensor:
        whole = torch.empty(len(self.raw), len(self.task.statistics))
        for part, rows in enumerate(parts):
            batches = self.batches[part :: len(parts)]
            if batches:
                whole[torch.from_numpy(np.concatenate([batch.indices for batch in batches]))] = rows
        return whole

    def measured(self, parts: Sequence[Tensor]) -> Measured:
        """Return the metrics, and those of each client's own model on its share."""
        whole = self._whole(parts)
        by_client = {
            client_id: ClientMetrics(
                len(indices), _metrics(self.task, whole[indices], self.examples.take(indices))
            )
            for client_id, indices in self.shares
            if client_id is not None and len(indices)
        }
        return Measured(_metrics(self.task, whole, self.examples), by_client)


class OwnEvaluation:
    """Examples that each client has held out itself, measured where they are: nothing but metrics goes out.

    Args:
        task: what is measured.
        examples_of: gives a client's held-out examples to its worker.
        parts: by client id, which of them are measured.
        pins: by client id, its worker.
        batch_size: examples a forward pass.
        precision: `float32` or `bfloat16`.
        is_personal: whether each client's own model is measured, else the global one.
        recall: of a client's own model.
    """

    dtype = "float64"

    def __init__(
        self,
        task: Task,
        examples_of: Callable[[int], EncodedExamples],
        parts: Sequence[Indices],
        pins: Sequence[int],
        batch_size: int,
        precision: str,
        *,
        is_personal: bool,
        recall: Recall,
    ) -> None:
        self.task, self.examples_of, self.parts, self.pins = task, examples_of, parts, pins
        self.batch_size, self.precision = batch_size, precision
        self.is_personal, self.recall = is_personal, recall

    @property
    def width(self) -> int:
        """Numbers that are told of a client: its examples, and the metrics on them."""
        return 4 + len(self.task.metric_names)

    def lose(self, lost: Sequence[int], num_left: int) -> None:
        """Go on without some workers: who trains their clients measures them."""
        self.pins = given_to(self.pins, lost, num_left)

    def _clients_of(self, worker_id: int) -> list[int]:
        return [c for c, pin in enumerate(self.pins) if pin == worker_id and len(self.parts[c])]

    def counts(self, num_parts: int) -> list[int]:
        """Return how many clients each of num_parts workers measures."""
        return [len(self._clients_of(worker_id)) for worker_id in range(num_parts)]

    def predictions(
        self, model: FederatedModel, plan: RoundPlan, part: int = 0, num_parts: int = 1
    ) -> Tensor:
        """Measure the clients of the worker `part`: (clients, width) float64."""
        rows = [self._row(model, plan, client_id) for client_id in self._clients_of(part)]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), self.width)

    def _row(self, model: FederatedModel, plan: RoundPlan, client_id: int) -> list[float]:
        try:
            examples = self.examples_of(client_id).take(self.parts[client_id])
        except DataError as error:  # its worker is lost, and its file with it
            sys.stderr.write(f"client {client_id} is not measured in round {plan.round_num}: {error}\n")
            return [0.0, *[math.nan] * (self.width - 1)]
        _bind(model, plan, client_id if self.is_personal else None, self.recall)
        batches = length_batches(examples.lengths, self.batch_size)
        whole = torch.empty(len(examples), len(self.task.statistics))
        rows = predict(model, self.task, examples, batches, self.precision)
        whole[torch.from_numpy(np.concatenate(batches))] = rows
        found = _metrics(self.task, whole, examples)
        return [float(len(examples)), *found[:3], *found.others.values()]

    def measured(self, parts: Sequence[Tensor]) -> Measured:
        """Return each client's metrics, and their mean by examples, from all workers' rows."""
        rows = {
            client_id: row
            for worker_id, part in enumerate(parts)
            for client_id, row in zip(self._clients_of(worker_id), part.tolist(), strict=True)
        }
        by_client = {client_id: self._read(rows[client_id]) for client_id in sorted(rows)}
        return Measured(mean_metrics(list(by_client.values())), by_client)

    def _read(self, row: Sequence[float]) -> ClientMetrics:
        count, loss, accuracy, macro_f1, *others = row
        named = dict(zip(self.task.metric_names, others, strict=True))
        return ClientMetrics(int(count), Metrics(loss, accuracy, macro_f1, named))


def _bind(model: FederatedModel, plan: RoundPlan, client_id: int | None, recall: Recall) -> None:
    """Put the global state into the model, or a client's own."""
    flat = model.state
    if client_id is not None:
        flat = model.start(plan, client_id, recall(plan, client_id))
    model.bind(plan, flat.to(model.device), client_id=client_id)


def _metrics(task: Task, statistics: Tensor, examples: EncodedExamples) -> Metrics:
    found = task.metrics(statistics.numpy(), examples)
    if set(found.others) != set(task.metric_names):
        raise TrainingError(
            f"a task must return the metrics that it names, {', '.join(task.metric_names) or 'none'}, got "
            f"{', '.join(found.others) or 'none'}; make `metrics` and `metric_names` of the task agree"
        )
    return found._replace(others={name: found.others[name] for name in task.metric_names})
