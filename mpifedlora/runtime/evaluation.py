"""Measuring the global model, on the server or in parts on the workers, with the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mpifedlora.core.batches import Indices, length_batches
from mpifedlora.core.metrics import Metrics, classification_metrics
from mpifedlora.core.wire import RoundPlan
from mpifedlora.training.local import predict
from mpifedlora.training.models import FederatedModel
from mpifedlora.training.tasks import ClassificationTask, EncodedExamples


class Evaluation:
    """Held-out examples, cut into batches that do not depend on who measures them.

    Args:
        task: texts to tokens, logits to losses.
        texts: of the examples.
        labels: (num_examples,).
        batch_size: examples a forward pass.
        precision: `float32` or `bfloat16`.
    """

    def __init__(
        self,
        task: ClassificationTask,
        texts: Sequence[str],
        labels: Indices,
        batch_size: int,
        precision: str,
    ) -> None:
        self.task = task
        self.texts, self.labels = texts, labels
        self.batch_size = batch_size
        self.precision = precision

    @cached_property
    def examples(self) -> EncodedExamples:
        """The examples as tokens; tokenised when they are first needed, where they are needed."""
        return self.task.encode(self.texts, self.labels)

    @cached_property
    def batches(self) -> list[Indices]:
        """Index arrays of all batches."""
        return length_batches(self.examples.lengths, self.batch_size)

    def counts(self, num_parts: int) -> list[int]:
        """Return how many examples each of num_parts workers measures."""
        sizes = [self.batch_size] * (len(self.labels) // self.batch_size)
        rest = len(self.labels) % self.batch_size
        sizes += [rest] if rest else []
        return [sum(sizes[part::num_parts]) for part in range(num_parts)]

    def predictions(
        self, model: FederatedModel, plan: RoundPlan, part: int = 0, num_parts: int = 1
    ) -> Tensor:
        """Measure every num_parts-th batch from `part` on: (examples, 2) float32, loss and label."""
        batches = self.batches[part::num_parts]
        return predict(model, self.task, self.examples, batches, plan, self.precision)

    def metrics(self, parts: Sequence[Tensor]) -> Metrics:
        """Return the metrics from all workers' predictions, in the same order for any number of them."""
        whole = torch.empty(len(self.labels), 2)
        for part, rows in enumerate(parts):
            batches = self.batches[part :: len(parts)]
            if batches:
                whole[torch.from_numpy(np.concatenate(batches))] = rows
        losses, predicted = whole[:, 0].numpy(), whole[:, 1].numpy().astype(np.int64)
        return classification_metrics(losses, predicted, self.labels)
