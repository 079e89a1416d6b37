"""Measuring the global model, or each client's own, on the server or in parts on the workers: same bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpifedlora.core.batches import Indices, length_batches
from mpifedlora.core.metrics import Metrics
from mpifedlora.core.plan import RoundPlan
from mpifedlora.errors import TrainingError
from mpifedlora.io.tables import Examples
from mpifedlora.training.local import predict
from mpifedlora.training.models import FederatedModel
from mpifedlora.training.task import EncodedExamples, Task


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
        recall: gives what a client has kept, from the plan and its id.
    """

    def __init__(
        self,
        task: Task,
        examples: Examples,
        batch_size: int,
        precision: str,
        parts: Sequence[Indices] | None = None,
        recall: Callable[[RoundPlan, int], Mapping[str, Tensor]] = lambda plan, client_id: {},
    ) -> None:
        self.task = task
        self.raw = examples
        self.batch_size = batch_size
        self.precision = precision
        self.recall = recall
        everything = [Share(None, np.arange(len(examples)))]
        self.shares = everything if parts is None else [Share(*pair) for pair in enumerate(parts)]

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
            flat = model.state
            if client_id is not None:
                flat = model.start(plan, client_id, self.recall(plan, client_id))
            model.bind(plan, flat.to(model.device), client_id=client_id)
            indices = [batch.indices for batch in batches]
            measured.append(predict(model, self.task, self.examples, indices, self.precision))
        return torch.cat(measured)

    def metrics(self, parts: Sequence[Tensor]) -> Metrics:
        """Return the metrics from all workers' predictions, in the same order for any number of them."""
        whole = torch.empty(len(self.raw), len(self.task.statistics))
        for part, rows in enumerate(parts):
            batches = self.batches[part :: len(parts)]
            if batches:
                whole[torch.from_numpy(np.concatenate([batch.indices for batch in batches]))] = rows
        found = self.task.metrics(whole.numpy(), self.examples)
        if set(found.others) != set(self.task.metric_names):
            raise TrainingError(
                "a task must return the metrics that it names, "
                f"{', '.join(self.task.metric_names) or 'none'}, got {', '.join(found.others) or 'none'}; "
                "make `metrics` and `metric_names` of the task agree"
            )
        return found._replace(others={name: found.others[name] for name in self.task.metric_names})
