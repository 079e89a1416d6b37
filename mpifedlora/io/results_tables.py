"""Results in forms that other programs read: CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from mpifedlora.io.atomic import refusal, replace_file
from mpifedlora.io.report_config import config_tables
from mpifedlora.io.results import Results
from mpifedlora.io.results_schema import Array


class Table(NamedTuple):
    """Rows of equal length under names."""

    names: list[str]
    rows: list[list[Any]]

    def csv(self) -> str:
        """Return the table as CSV; a number that is nan is an empty cell."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.names)
        writer.writerows([["" if _is_nan(cell) else cell for cell in row] for row in self.rows])
        return text.getvalue()


def rounds_table(results: Results) -> Table:
    """Return one row a round: every dataset of `/rounds`, those of modules and metrics by their names."""
    columns: dict[str, Sequence[Any]] = {}
    for name, values in results.rounds.items():
        if values.ndim == 1:
            columns[name] = values.tolist()
        else:
            names = results.info.module_names if name == "module_ranks" else results.info.metric_names
            prefix = "lora_rank" if name == "module_ranks" else "eval"
            columns |= {
                f"{prefix}_{each}": column for each, column in zip(names, values.T.tolist(), strict=True)
            }
    return Table(list(columns), [list(row) for row in zip(*columns.values(), strict=True)])


def clients_table(results: Results) -> Table:
    """Return one row a round and client: every dataset of `/clients`."""
    names = list(results.clients)
    by_round = zip(*(results.clients[name].tolist() for name in names), strict=True)
    rows = [
        [round_num, client_id, *cells]
        for round_num, row in zip(results.rounds["round_num"].tolist(), by_round, strict=True)
        for client_id, cells in enumerate(zip(*row, strict=True))
    ]
    return Table(["round_num", "client_id", *names], rows)


def as_json(results: Results, *, with_clients: bool) -> str:
    """Return results as JSON, by the names of the file; a number that is nan or infinite is null.

    Args:
        results: of a run.
        with_clients: whether `/clients` is in it.
    """
    info = {**asdict(results.info), "label_table": results.info.label_table.tolist()}
    info["config"] = config_tables(results.info)
    content = {
        "status": results.status,
        "info": info,
        "rounds": _lists(results.rounds),
        **({"clients": _lists(results.clients)} if with_clients else {}),
        "baselines": None if results.baselines is None else asdict(results.baselines),
        "events": [event._asdict() for event in results.events],
    }
    return json.dumps(_finite(content), indent=2, ensure_ascii=False, allow_nan=False)


def write_csv(file: Path, text: str) -> None:
    """Write CSV, whole or not at all.

    Raises:
        CheckpointError: if the disk refuses.
    """
    try:
        replace_file(file, text.encode())
    except OSError as error:
        raise refusal("the file must be writable", error, file, "choose another") from error


def _lists(arrays: Mapping[str, Array]) -> dict[str, Any]:
    return {name: values.tolist() for name, values in arrays.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if not isinstance(value, str) and isinstance(value, Iterable):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_nan(cell: Any) -> bool:
    return isinstance(cell, float) and math.isnan(cell)
