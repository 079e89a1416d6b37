"""One frame of `mpifedlora watch`: a run in as many lines as the terminal has."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

import numpy as np
from rich.text import Text

from mpifedlora.core.charts import bars, sparkline
from mpifedlora.core.curves import measured_clients
from mpifedlora.core.units import RECENT_ROUNDS, human_bytes, human_time
from mpifedlora.io.results import Results
from mpifedlora.io.results_schema import Array
from mpifedlora.runtime.watching import Sight

NAME_WIDTH = 10
_VALUE_WIDTH = 12
_MOST_NAMED, _MOST_WORST = 4, 3
_LEAST_CHART, _MOST_CHART = 2, 8
_STYLES: Mapping[str, str] = {
    "finished": "green",
    "running": "cyan",
    "waiting": "cyan",
    "quiet": "yellow",
    "interrupted": "yellow",
    "dead": "bold red",
    "failed": "bold red",
}


_RESUMABLE = ("interrupted", "dead", "failed")


def frame(title: str, sight: Sight, width: int, height: int, shades: str) -> list[Text]:
    """Return a frame's lines.

    Args:
        title: what the folder is called.
        sight: what it shows.
        width: characters of a line; longer texts are cut.
        height: lines at most; the accuracy's curve and the events take what the rest leaves.
        shades: see `core.charts`.
    """
    head = [*_head(title, sight, width)]
    if sight.results is None or not sight.num_finished:
        return [_cut(line, width) for line in [*head, *_events(sight, height - len(head) - 1)]][:height]
    middle = [*_curves(sight, width, shades), *_sent(sight.results), *_times(sight.results)]
    middle += _clients(sight.results)
    left = height - len(head) - len(middle)
    num_events = min(len(sight.results.events), max(1, left - _LEAST_CHART - 1)) if left > 1 else 0
    events = _events(sight, min(num_events, max(left // 3, left - _MOST_CHART - 1)))
    chart_height = min(_MOST_CHART, left - len(events))
    chart = _measured(sight, width, chart_height, shades) if chart_height >= _LEAST_CHART else []
    return [_cut(line, width) for line in [*head, *chart, *middle, *events]][:height]


def _head(title: str, sight: Sight, width: int) -> Iterator[Text]:
    style = _STYLES[sight.state]
    about = ""
    if sight.results is not None:
        info = sight.results.info
        about = f"  {info.method} on {info.dataset} with {info.model}"
    room = width - len(sight.state) - 1
    yield Text.assemble((title, "bold"), about)[:room].append(" ").append(sight.state, style)
    if sight.results is not None:
        yield _position(sight, width)
    advice = f"go on with: mpifedlora run --resume --out {title}" if sight.state in _RESUMABLE else ""
    for text in (sight.note, advice):
        for line in textwrap.wrap(text, width):
            yield Text(line, style)


def _position(sight: Sight, width: int) -> Text:
    assert sight.results is not None
    rounds, done, total = sight.results.rounds, sight.num_finished, sight.num_rounds
    stage = f" {rounds['stage'][-1]}" if done else ""
    filled = 16 * done // max(1, total)
    text = f"round {done}/{total}{stage} [{'#' * filled}{'-' * (16 - filled)}]"
    if sight.state == "running":
        text += f"  left {human_time(sight.left_s)}"
    return Text(f"{text}  last written {human_time(sight.age_s)} ago")


def _measured(sight: Sight, width: int, height: int, shades: str) -> list[Text]:
    """Draw the accuracy, or the loss where the task has none."""
    assert sight.results is not None
    rounds = sight.results.rounds
    has_accuracy = np.isfinite(rounds["eval_accuracy"]).any()
    name, best_of = ("accuracy", np.nanargmax) if has_accuracy else ("loss", np.nanargmin)
    values = rounds[f"eval_{name}"]
    known = values[np.isfinite(values)]
    if not len(known):
        return []
    best = int(best_of(values))
    title = f"{name} {known[-1]:.3f}, best {values[best]:.3f} (round {best + 1})"
    low, high = float(known.min()), float(known.max())
    lines = bars(values.tolist(), sight.num_rounds, width - NAME_WIDTH, height - 1, low=low, shades=shades)
    labels = {0: f"{high:.3f}", len(lines) - 1: f"{low:.3f}"}
    rows = [
        Text(f"{labels.get(index, ''):>{NAME_WIDTH - 2}}  ").append(line, "green")
        for index, line in enumerate(lines)
    ]
    return [Text(title if has_accuracy else f"evaluation {title}", "bold"), *rows]


def _curves(sight: Sight, width: int, shades: str) -> Iterator[Text]:
    assert sight.results is not None
    rounds = sight.results.rounds
    for name, column, write in (
        ("loss", "train_loss", _decimal),
        ("rank", "lora_rank_mean", lambda value: f"{value:.1f}" if value else "-"),
        ("up", "uplink_bytes", lambda value: human_bytes(int(value))),
        ("down", "downlink_bytes", lambda value: human_bytes(int(value))),
    ):
        values = rounds[column].tolist()
        curve = sparkline(values, sight.num_rounds, width - NAME_WIDTH - _VALUE_WIDTH, shades)
        yield Text(f"{name:<{NAME_WIDTH}}{write(values[-1]):<{_VALUE_WIDTH}}").append(curve, "cyan")


def _sent(results: Results) -> Iterator[Text]:
    up, down = (int(results.rounds[f"{way}link_bytes"].sum()) for way in ("up", "down"))
    text = f"{'sent':<{NAME_WIDTH}}{human_bytes(up + down)}"
    if results.baselines is not None:
        full, fixed = results.baselines.reduction_vs_full_model, results.baselines.reduction_vs_fixed_rank
        text += f", {_share(full)} full-model FedAvg, {_share(fixed)} fixed rank"
    yield Text(text)


def _share(reduction: float) -> str:
    return f"{abs(100 * reduction):.1f} % {'over' if reduction < 0 else 'under'}"


def _times(results: Results) -> Iterator[Text]:
    recent = {name: _recent_mean(results.rounds[f"{name}_s"]) for name in ("round", *_STEPS)}
    shown = [name for name in _STEPS if recent[name] >= 0.01 * recent["round"]]
    parts = ", ".join(f"{name} {_seconds(recent[name])}" for name in shown)
    yield Text(f"{'a round':<{NAME_WIDTH}}{_seconds(recent['round'])}: {parts}")


_STEPS = ("train", "collect", "aggregate", "broadcast", "evaluate")


def _recent_mean(values: Array) -> float:
    recent = values[-RECENT_ROUNDS:]
    return float(np.nanmean(recent)) if np.isfinite(recent).any() else math.nan


def _clients(results: Results) -> Iterator[Text]:
    clients = results.clients
    took_part = clients["participated"][-RECENT_ROUNDS:]
    seconds = np.where(took_part, clients["train_s"][-RECENT_ROUNDS:], 0.0)
    mean_s = seconds.sum(0) / np.maximum(took_part.sum(0), 1)
    slowest = [int(client) for client in np.argsort(-mean_s, kind="stable")[:_MOST_NAMED] if mean_s[client]]
    if slowest:
        median_s = float(np.median(mean_s[mean_s > 0]))
        named = ", ".join(f"{client} ({_seconds(float(mean_s[client]))})" for client in slowest)
        yield Text(f"{'slowest':<{NAME_WIDTH}}clients {named}; median {_seconds(median_s)}")
    yield from _by_client(results)
    left_out = ~np.isin(clients["outcome"], ("used", "absent"))
    counts = left_out.sum(0)
    worst = [int(client) for client in np.argsort(-counts, kind="stable") if counts[client]]
    if worst:
        named = ", ".join(
            _left_out(client, clients["outcome"][left_out[:, client], client]) for client in worst
        )
        yield Text(f"{'left out':<{NAME_WIDTH}}{named}", "yellow")


def _by_client(results: Results) -> Iterator[Text]:
    found = measured_clients(results.clients)
    if found is None:
        return
    name, values = found
    known = np.flatnonzero(np.isfinite(values))
    worst = known[np.argsort(values[known] * (-1 if name == "loss" else 1), kind="stable")][:_MOST_WORST]
    named = ", ".join(f"{client} ({values[client]:.3f})" for client in worst.tolist())
    yield Text(f"{'worst':<{NAME_WIDTH}}clients {named}; median {name} {np.median(values[known]):.3f}")


def _left_out(client: int, outcomes: Sequence[str]) -> str:
    return f"client {client} {outcomes[-1]}" + (f" {len(outcomes)} times" if len(outcomes) > 1 else "")


def _events(sight: Sight, most: int) -> list[Text]:
    if sight.results is None or most < 1:
        return []
    shown = sight.results.events[-most:]
    return [Text(f"{_local_time(event.time)}  {event.text}", "dim") for event in shown]


def _local_time(iso: str) -> str:
    return datetime.fromisoformat(iso).astimezone().strftime("%H:%M:%S")


def _decimal(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def _seconds(value: float) -> str:
    return human_time(value) if not value < 10 else f"{value:.2g}s"


def _cut(line: Text, width: int) -> Text:
    line.truncate(width, overflow="ellipsis")
    return line
