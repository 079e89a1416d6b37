"""What `mpifedlora results` prints of a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from mpifedlora.core.curves import measured_clients
from mpifedlora.core.units import human_time
from mpifedlora.io.client_figures import client_labels
from mpifedlora.io.report_config import num_planned_rounds
from mpifedlora.io.results import Results
from mpifedlora.runtime.progress import format_row, summarise, summary_lines


def run_lines(results: Results) -> Iterator[str]:
    """Return a run's rounds, its sum and its events, a line each."""
    info = results.info
    yield f"{info.method} on {info.dataset} with {info.model}: {results.status}, begun {info.created}"
    yield f"{info.num_clients} clients on {info.num_workers} workers, seed {info.seed}"
    rows = results.rows()
    num_rounds = num_planned_rounds(info) or len(rows)
    for row in rows:
        yield format_row(row, num_rounds, None, info.metric_names)
    named: dict[str, Any] = {"files": {}, "metric_names": info.metric_names}
    yield from summary_lines(summarise(rows, baselines=results.baselines, wall_s=math.nan, **named))
    yield f"time in rounds     {human_time(float(np.nansum(results.rounds['round_s'])))}"
    for event in results.events:
        yield f"{event.time}  after round {event.num_finished}: {event.text}"


def client_lines(results: Results) -> Iterator[str]:
    """Return a table of the clients: what they have, and how they did."""
    clients, examples = results.clients, results.info.label_table.sum(1)
    name, values = measured_clients(clients) or ("", np.full(results.info.num_clients, np.nan))
    measure = f"{'evaluated' if name == 'loss' else name:<9}  " if name else ""
    names = client_labels(results.info)
    width = max(map(len, ("client", *names)))
    yield f"{'client':<{width}}  examples  rounds  loss    {measure}seconds  left out"
    for client_id in range(results.info.num_clients):
        took_part = clients["participated"][:, client_id]
        losses, seconds = (clients[name][took_part, client_id] for name in ("train_loss", "train_s"))
        outcomes = Counter(clients["outcome"][:, client_id].tolist())
        left_out = [f"{name} {outcomes[name]}" for name in outcomes if name not in ("used", "absent")]
        loss = f"{losses[-1]:.3f}" if len(losses) and math.isfinite(losses[-1]) else "-"
        mean_s = human_time(float(seconds.mean())) if len(seconds) else "-"
        label = f"{names[client_id]:<{width}}" if results.info.client_names else f"{client_id:>{width}}"
        counts = f"{label}  {examples[client_id]:>8}  {took_part.sum():>6}"
        value = values[client_id]
        shown = f"{f'{value:.3f}' if math.isfinite(value) else '-':<9}  " if name else ""
        yield f"{counts}  {loss:<6}  {shown}{mean_s:<7}  {', '.join(left_out)}".rstrip()
