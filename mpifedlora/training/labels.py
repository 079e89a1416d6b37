"""What all tasks with one label an example have in common: loss, measurement and metrics."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from mpifedlora.core.metrics import Metrics, classification_metrics
from mpifedlora.training.task import EncodedExamples, Model


class LabelTask:
    """Cross-entropy on one label an example."""

    statistics: tuple[str, ...] = ("loss", "predicted")
    metric_names: tuple[str, ...] = ()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of a batch, in float32."""
        return functional.cross_entropy(outputs.float(), targets)

    def measure(self, model: Model, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        """Return (examples, 2) float32: each example's loss and predicted label."""
        logits = model(inputs)
        losses = functional.cross_entropy(logits.float(), targets, reduction="none")
        return torch.stack([losses, logits.argmax(dim=1).float()], dim=1).cpu()

    def metrics(self, statistics: npt.NDArray[np.float32], examples: EncodedExamples) -> Metrics:
        """Return loss, accuracy and macro-F1."""
        return classification_metrics(statistics[:, 0], statistics[:, 1].astype(np.int64), examples.labels)
