"""Metrics of a model, and those of a classifier from each example's loss and predicted label."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Metrics(NamedTuple):
    """Mean loss (nats), accuracy and macro-F1 (0 to 1, nan where a task has none), and others by name."""

    loss: float
    accuracy: float = math.nan
    macro_f1: float = math.nan
    others: Mapping[str, float] = MappingProxyType({})


class ClientMetrics(NamedTuple):
    """What was measured on one client's own examples: how many they are, and the metrics on them."""

    num_examples: int
    metrics: Metrics


class Measured(NamedTuple):
    """What was measured of the model after a round.

    Args:
        metrics: over all clients.
        by_client: by client id, where clients have examples of their own to be measured on.
    """

    metrics: Metrics
    by_client: Mapping[int, ClientMetrics] = MappingProxyType({})


def mean_metrics(parts: Sequence[ClientMetrics]) -> Metrics:
    """Return the mean over the clients that have examples, weighted by these; nan without any.

    What is a mean over examples, as a classifier's loss and accuracy are, is then that of all together.

    >>> mean_metrics([ClientMetrics(3, Metrics(1.0, 0.5)), ClientMetrics(1, Metrics(3.0, 1.0))])[:2]
    (1.5, 0.625)
    """
    found = [part for part in parts if part.num_examples]
    if not found:
        return Metrics(math.nan)
    rows = np.array([(*part.metrics[:3], *part.metrics.others.values()) for part in found])
    counts = np.array([part.num_examples for part in found])
    loss, accuracy, macro_f1, *others = ((counts[:, None] * rows).sum(axis=0) / counts.sum()).tolist()
    return Metrics(loss, accuracy, macro_f1, dict(zip(found[0].metrics.others, others, strict=True)))


_LESS_IS_BETTER = frozenset(
    ("loss", "perplexity", "error", "errors", "mae", "mse", "rmse", "nll", "wer", "cer", "brier")
)


class Metric(NamedTuple):
    """A metric by its name, and which of its values are the better ones.

    Args:
        name: as the results have it: `accuracy`, `macro_f1`, `loss`, or one of the task's own.
        is_less_better: whether lower values are.
    """

    name: str
    is_less_better: bool = False

    @staticmethod
    def named(name: str) -> Metric:
        """Return a metric whose name tells: less is better of losses, errors and perplexities.

        >>> [Metric.named(name).is_less_better for name in ("accuracy", "perplexity", "error_rate")]
        [False, True, True]
        """
        return Metric(name, not _LESS_IS_BETTER.isdisjoint(re.split(r"[^a-z0-9]+", name.lower())))

    @property
    def is_share(self) -> bool:
        """Whether it is known to lie in 0 to 1."""
        return self.name in ("accuracy", "macro_f1", "token_accuracy")

    @property
    def label(self) -> str:
        """Its name as people read it."""
        return self.name.replace("_", " ")

    def gain(self, values: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return values of which more is better."""
        return np.asarray(values, np.float64) * (-1 if self.is_less_better else 1)


def classification_metrics(
    losses: npt.NDArray[np.float32], predicted: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]
) -> Metrics:
    """Return loss, accuracy and macro-F1 (the mean F1 of the labels that occur or are predicted).

    Args:
        losses: (num_examples,).
        predicted: (num_examples,).
        labels: (num_examples,).

    >>> classification_metrics(np.zeros(3, "f4"), np.array([0, 1, 1]), np.array([0, 1, 0]))[:3]
    (0.0, 0.6666666666666666, 0.6666666666666666)
    """
    num_labels = int(max(predicted.max(), labels.max())) + 1
    hits = np.bincount(labels[predicted == labels], minlength=num_labels)
    either = np.bincount(labels, minlength=num_labels) + np.bincount(predicted, minlength=num_labels)
    f1 = 2 * hits[either > 0] / either[either > 0]
    return Metrics(
        float(losses.mean(dtype=np.float64)), float((predicted == labels).mean()), float(f1.mean())
    )
