"""Results files of runs that never were, for what reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mpifedlora.io.results import Results, ResultsWriter
from mpifedlora.io.results_schema import Baselines, RoundRow, RunInfo

NUM_CLIENTS = 6


def make_info(num_rounds: int = 12, **changes: Any) -> RunInfo:
    """Return what ran: 6 clients on 2 workers."""
    values: dict[str, Any] = {
        "package_version": "0.1.0",
        "config": json.dumps({"federation": {"num_rounds": num_rounds}, "lora": {"rank_max": 16}}),
        "method": "sa-fedlora",
        "model": "minilm",
        "dataset": "20newsgroups",
        "num_clients": NUM_CLIENTS,
        "num_workers": 2,
        "seed": 0,
        "mpi_library": "in process",
        "survives_lost_workers": False,
        "devices": ("cpu", "cpu", "cpu"),
        "eval_model": "global",
        "is_private": False,
        "reproducible": True,
        "collect": "gather in parts",
        "uplink_dtype": "float32",
        "downlink_dtype": "float32",
        "gpu_buffers": "none",
        "startup_s": 2.0,
        "module_names": ("query", "value"),
        "label_names": ("sport", "music"),
        "label_table": np.ones((NUM_CLIENTS, 2), np.int64),
    }
    return RunInfo(**(values | changes))


def make_row(round_num: int, **changes: Any) -> RoundRow:
    """Return a round: accuracy and bytes follow from its number, client i trains i + 1 seconds."""
    clients = np.arange(NUM_CLIENTS)
    values: dict[str, Any] = {
        "round_num": round_num,
        "stage": "initiating" if round_num <= 2 else "annealing",
        "temperature": 1.0,
        "lora_rank_mean": max(1.0, 17.0 - round_num),
        "module_ranks": (max(1, 17 - round_num),) * 2,
        "uplink_bytes": 2_000_000 // round_num,
        "downlink_bytes": 2_500_000 // round_num,
        "mpi_bytes": 10,
        "train_loss": 2.0 / round_num,
        "penalty": 0.0,
        "aggregation_error": 0.0,
        "dropped_energy": 0.01,
        "num_participants": NUM_CLIENTS,
        "train_s": 8.0,
        "collect_s": 0.5,
        "aggregate_s": 0.3,
        "broadcast_s": 0.01,
        "evaluate_s": 2.0,
        "round_s": 10.0,
        "client_num_examples": np.full(NUM_CLIENTS, 100),
        "client_train_loss": 2.0 / round_num + clients,
        "client_train_s": clients + 1.0,
        "client_participated": np.ones(NUM_CLIENTS, np.bool_),
        "client_outcome": np.full(NUM_CLIENTS, "used", "S16"),
        "eval_loss": 1.5 / round_num,
        "eval_accuracy": 0.9 - 0.5 / round_num,
        "eval_macro_f1": 0.8 - 0.5 / round_num,
    }
    return RoundRow(**(values | changes))


def without_client(round_num: int, client: int, outcome: str, **changes: Any) -> RoundRow:
    """Return a round in which one client's update was not used."""
    row = make_row(round_num, **changes)
    row.client_outcome[client] = outcome
    row.client_participated[client] = False
    row.client_train_s[client], row.client_train_loss[client] = 0.0, np.nan
    return row


def write_results(
    folder: Path,
    rows: list[RoundRow],
    status: str = "running",
    *,
    events: tuple[str, ...] = (),
    num_rounds: int = 12,
    **info: Any,
) -> Results:
    """Write the results of a run to a folder, and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = ResultsWriter(folder / "results.h5", make_info(num_rounds, **info))
    for row in rows:
        writer.add(row)
    for text in events:
        writer.note(text)
    if rows:
        sent = sum(row.uplink_bytes + row.downlink_bytes for row in rows)
        counts = {"sent_values": 1, "full_model_values": 2, "fixed_rank_values": 1}
        writer.set_baselines(
            Baselines(sent_bytes=sent, full_model_bytes=50 * sent, fixed_rank_bytes=2 * sent, **counts)
        )
    writer.set_status(status)  # type: ignore[arg-type]
    writer.write()
    return writer.results()
