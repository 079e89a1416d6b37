"""Metrics of a model, and those of a classifier from each example's loss and predicted label."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
