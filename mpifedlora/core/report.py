"""What a finished round has to say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mpifedlora.core.aggregation import ModuleAggregate
from mpifedlora.core.wire import UpdateHeader


@dataclass(frozen=True)
class RoundReport:
    """What a finished round has to say.

    Args:
        participants: headers of the updates that were aggregated, in client order.
        outcomes: by client id of the cohort, `used` or why the update was left out.
        train_loss: mean of the clients' losses, by the weights of the aggregation.
        penalty: mean of the clients' proximal penalties, by the same.
        aggregation_error: relative Frobenius error of what is sent against the exact sum; nan where
            the server does not see every client's factors.
        dropped_energy: share of the sum's squared norm that the cut discards.
    """

    participants: tuple[UpdateHeader, ...]
    outcomes: dict[int, str]
    train_loss: float
    penalty: float
    aggregation_error: float
    dropped_energy: float


def report_round(
    used: Sequence[UpdateHeader],
    outcomes: dict[int, str],
    weights: Sequence[float],
    aggregates: Sequence[ModuleAggregate],
    *,
    sees_factors: bool,
) -> RoundReport:
    """Sum up a round.

    Args:
        used: of the updates that were aggregated.
        outcomes: by client id of the cohort.
        weights: one an update, summing to 1.
        aggregates: of all modules.
        sees_factors: whether the server has seen every client's A and B.
    """
    exact = sum(aggregate.exact_energy for aggregate in aggregates)
    error = _ratio(sum(part.error_energy for part in aggregates), exact) ** 0.5
    return RoundReport(
        participants=tuple(used),
        outcomes=outcomes,
        train_loss=_mean([header.train_loss for header in used], weights),
        penalty=_mean([header.penalty for header in used], weights),
        aggregation_error=error if sees_factors else math.nan,
        dropped_energy=_ratio(sum(part.dropped_energy for part in aggregates), exact),
    )


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    if not values:
        return math.nan
    return sum(value * weight for value, weight in zip(values, weights, strict=True))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
