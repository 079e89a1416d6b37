"""Parts of a round's row in the results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mpifedlora.core.metrics import Measured, Metrics
from mpifedlora.core.report import RoundReport
from mpifedlora.core.screening import ABSENT
from mpifedlora.io.results_schema import RoundRow


def seconds_of_row(seconds: dict[str, float]) -> dict[str, Any]:
    """Return the durations that a row holds."""
    names = ("train_s", "collect_s", "aggregate_s", "broadcast_s", "round_s")
    return {"evaluate_s": 0.0, **{name: seconds[name] for name in names}}


def columns_by_client(report: RoundReport, num_clients: int) -> dict[str, Any]:
    """Return what a row says of each client, by name: arrays (num_clients,)."""
    columns: dict[str, Any] = {
        "client_num_examples": np.zeros(num_clients, np.int64),
        "client_train_loss": np.full(num_clients, np.nan),
        "client_train_s": np.zeros(num_clients),
        "client_participated": np.zeros(num_clients, bool),
        "client_outcome": np.full(num_clients, ABSENT, "S16"),
    }
    for client_id, outcome in report.outcomes.items():
        columns["client_outcome"][client_id] = outcome
    for update in report.participants:
        columns["client_num_examples"][update.client_id] = update.num_examples
        columns["client_train_loss"][update.client_id] = update.train_loss
        columns["client_train_s"][update.client_id] = update.train_s
        columns["client_participated"][update.client_id] = True
    return columns


def measured(row: RoundRow, found: Measured, evaluate_s: float) -> RoundRow:
    """Return a row with what was measured of its round's model."""
    metrics = found.metrics
    return replace(
        row,
        eval_loss=metrics.loss,
        eval_accuracy=metrics.accuracy,
        eval_macro_f1=metrics.macro_f1,
        eval_metrics=tuple(metrics.others.values()) or row.eval_metrics,
        evaluate_s=evaluate_s,
        **_measured_by_client(found, len(row.client_outcome)),
    )


def _measured_by_client(found: Measured, num_clients: int) -> dict[str, Any]:
    if not found.by_client:
        return {}
    columns: dict[str, Any] = {"client_num_evaluated": np.zeros(num_clients, np.int64)}
    columns |= {f"client_eval_{name}": np.full(num_clients, np.nan) for name in Metrics._fields[:3]}
    for client_id, one in found.by_client.items():
        columns["client_num_evaluated"][client_id] = one.num_examples
        for name, value in zip(Metrics._fields, one.metrics[:3], strict=False):
            columns[f"client_eval_{name}"][client_id] = value
    return columns
