"""Results files of runs that never were, of any size and with any mishap, by the package's own writer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from mpifedlora.core.method_config import RunTables
from mpifedlora.io.results import Results, ResultsWriter, Status
from mpifedlora.io.results_schema import Baselines, RoundRow, RunInfo

NUM_CLIENTS = 6


def make_config(num_clients: int = 4, num_rounds: int = 6, **tables: dict[str, Any]) -> str:
    """Return a configuration as JSON; `tables` win over the defaults."""
    given: dict[str, Any] = {"model": {"name": "tiny"}, "data": {"source": "posts.csv"}}
    given["federation"] = {"num_clients": num_clients, "num_rounds": num_rounds}
    for name, keys in tables.items():
        given[name] = {**given.get(name, {}), **keys}
    return RunTables.model_validate(given).model_dump_json()


def make_info(num_rounds: int = 12, **changes: Any) -> RunInfo:
    """Return what ran: 6 clients on 2 workers."""
    values: dict[str, Any] = {
        "package_version": "0.1.0",
        "config": make_config(NUM_CLIENTS, num_rounds),
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
    status: Status = "running",
    *,
    events: tuple[str, ...] = (),
    num_rounds: int = 12,
    baselines: tuple[int, ...] | None = None,
    **info: Any,
) -> Results:
    """Write the results of a run to a folder, and return them.

    Args:
        folder: for `results.h5`.
        rows: the finished rounds.
        status: of the run.
        events: out of the ordinary.
        num_rounds: that are planned.
        baselines: bytes of the whole model and of a fixed rank; made up where None, none where ().
        info: changes of `make_info`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writer = ResultsWriter(folder / "results.h5", make_info(num_rounds, **info))
    for row in rows:
        writer.add(row)
    for text in events:
        writer.note(text)
    if rows and baselines != ():
        sent = sum(row.uplink_bytes + row.downlink_bytes for row in rows)
        full, fixed = baselines or (50 * sent, 2 * sent)
        writer.set_baselines(
            Baselines(sent_bytes=sent, full_model_bytes=full, fixed_rank_bytes=fixed, sent_values=sent // 4,
                      full_model_values=full // 4, fixed_rank_values=fixed // 4)
        )  # fmt: skip
    writer.set_status(status)
    writer.write()
    return writer.results()


def make_run(
    folder: Path,
    *,
    num_rounds: int = 6,
    num_finished: int | None = None,
    num_clients: int = 4,
    num_modules: int = 3,
    labels: tuple[str, ...] = ("sport", "music", "food"),
    has_ranks: bool = True,
    every: int = 1,
    status: Status = "finished",
    seed: int = 0,
    method: str = "sa-fedlora",
    events: tuple[str, ...] = (),
    has_baselines: bool = True,
    loses_clients: bool = False,
    accuracy: float = 0.6,
    has_accuracy: bool = True,
    measures_clients: bool = False,
    bytes_each: int = 1_000_000,
    metrics: tuple[str, ...] = (),
    epsilon: float = math.nan,
    info: dict[str, Any] | None = None,
    **tables: dict[str, Any],
) -> Path:
    """Write `results.h5` into a folder, and return the folder."""
    generator = np.random.default_rng(seed)
    tables["federation"] = {"seed": seed, "method": method, **tables.get("federation", {})}
    values: dict[str, Any] = {
        "config": make_config(num_clients, num_rounds, **tables),
        "method": method,
        "model": "tiny",
        "dataset": "posts.csv",
        "num_clients": num_clients,
        "seed": seed,
        "mpi_library": "Open MPI v5.0.11",
        "survives_lost_workers": True,
        "devices": ("cpu, 1 thread", "cpu, 1 thread", "cpu, 1 thread"),
        "startup_s": 3.0,
        "module_names": tuple(f"encoder.layer.{i // 3}.part{i % 3}.dense" for i in range(num_modules)),
        "label_names": labels,
        "metric_names": metrics,
        "label_table": generator.integers(0, 300, (num_clients, len(labels))),
        "created": "2026-01-02T03:04:05+00:00",
    }
    rows = []
    finished = num_rounds if num_finished is None else num_finished
    for round_num in range(1, finished + 1):
        used = np.ones(num_clients, bool)
        outcome = np.full(num_clients, "used", "S16")
        if loses_clients:
            outcome[generator.random(num_clients) < 0.3] = b"absent"
            outcome[0] = b"failed" if round_num % 2 else b"late"
            used = outcome == b"used"
        share = (round_num - 1) / max(1, num_rounds - 1)
        ranks = (1 + np.arange(num_modules) % 2 + round(14 * (1 - share))) * has_ranks
        is_measured = round_num % every == 0 or round_num == num_rounds
        losses = 3 - 2 * share + generator.normal(0, 0.2, num_clients)
        measured = accuracy * (1 - math.exp(-3 * round_num / num_rounds)) if is_measured else math.nan
        by_client = np.clip(measured + np.linspace(-0.2, 0.1, num_clients), 0, 1)
        has_clients = measures_clients and is_measured
        sent = int(bytes_each * (1 - 0.8 * share))
        rows.append(
            make_row(
                round_num,
                stage="initiating" if round_num <= 2 and has_ranks else "annealing",
                temperature=1 - share,
                lora_rank_mean=float(ranks.mean()) if num_modules else 0.0,
                module_ranks=tuple(ranks.tolist()),
                uplink_bytes=sent,
                downlink_bytes=sent if round_num > 1 else 800,
                mpi_bytes=2 * sent,
                train_loss=3 - 2 * share if used.any() else math.nan,
                aggregation_error=0.1 * (1 - share),
                dropped_energy=0.01 * (1 - share),
                num_participants=int(used.sum()),
                train_s=10.0,
                aggregate_s=0.25,
                broadcast_s=0.25,
                evaluate_s=4.0 if is_measured else 0.0,
                round_s=12.0,
                client_num_examples=np.where(used, 100 + np.arange(num_clients), 0),
                client_train_loss=np.where(used, losses, np.nan),
                client_train_s=np.where(used, 5.0, 0.0),
                client_participated=used,
                client_outcome=outcome,
                eval_loss=2 - share if is_measured else math.nan,
                eval_accuracy=measured if has_accuracy else math.nan,
                eval_macro_f1=measured * 0.9 if has_accuracy else math.nan,
                epsilon=epsilon * round_num,
                eval_metrics=tuple(measured * 10 + place for place in range(len(metrics))),
                client_num_evaluated=np.full(num_clients, 20) if has_clients else None,
                client_eval_accuracy=by_client if has_clients else None,
            )
        )
    baselines = (80 * finished * bytes_each, 2 * finished * bytes_each) if has_baselines else ()
    write_results(folder, rows, status, events=events, num_rounds=num_rounds, baselines=baselines,
                  **{**values, **(info or {})})  # fmt: skip
    return folder
