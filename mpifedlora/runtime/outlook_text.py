"""An outlook as lines for a terminal of any width, and as JSON values."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mpifedlora.core.forecast import Bound, RoundForecast
from mpifedlora.core.ledger import Traffic
from mpifedlora.core.memory_estimate import Footprint
from mpifedlora.core.units import counted, human_bytes, human_time
from mpifedlora.runtime.announcement import LABEL_WIDTH, MAX_LABELS, label_lines, method_line
from mpifedlora.runtime.method import expected_cohort
from mpifedlora.runtime.outlook import Comparison, Outlook

_HEADS = ("rounds", "stage", "trains", "tau", "rank", "clients", "up", "down", "time")
_NAMES = {"adapter": "A, B", "full": "all", "a": "A", "b": "B"}
MOST_LINES = 24
"""Of the table of rounds."""
_GIGABIT = 1.25e8  # bytes

_Row = tuple[RoundForecast, float]


def outlook_lines(outlook: Outlook, width: int) -> Iterator[str]:
    """Return what there is to say of a run, line by line.

    Args:
        outlook: of the run.
        width: of the terminal.
    """
    yield from _wrapped(_first_line(outlook), width)
    yield from _wrapped(_who_line(outlook), width)
    yield from _wrapped(method_line(outlook.config), width)
    table = outlook.data.label_table()
    most = min(MAX_LABELS, max(1, (width - 7) // (LABEL_WIDTH + 1) - 2))
    data = outlook.data
    yield from label_lines(table, data.dataset.label_names, most, data.client_names, "--json")
    yield ""
    yield from _round_lines(outlook)
    yield ""
    for name, text in _cells(outlook):
        lines = textwrap.wrap(text, max(30, width - 20))
        yield from (f"{name if number == 0 else '':<18}  {line}" for number, line in enumerate(lines))


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(50, width), subsequent_indent="  ")


def _first_line(outlook: Outlook) -> str:
    config, shapes = outlook.config, outlook.shapes
    return (
        f"{config.federation.method} on {config.data.source} with {config.model.name}, "
        f"{shapes.full().num_values / 1e6:.1f} M parameters, {len(shapes.modules)} adapted layers"
    )


def _who_line(outlook: Outlook) -> str:
    federation = outlook.config.federation
    low, high = outlook.clients_per_worker()
    clients = counted(high, "client") if low == high else f"{low} to {high} clients"
    some = f", {expected_cohort(outlook.config)} a round" if federation.cohort_size else ""
    return (
        f"{counted(federation.num_clients, 'client')}{some} on {counted(outlook.num_workers, 'worker')} "
        f"({clients} each) and a server (mpirun -n {outlook.num_workers + 1}), "
        f"{counted(federation.num_rounds, 'round')}, "
        f"seed {federation.seed}"
    )


def _round_lines(outlook: Outlook) -> Iterator[str]:
    durations = outlook.round_s(is_shared=False) or [math.nan] * len(outlook.rounds)
    rows = list(zip(outlook.rounds, durations, strict=True))
    table: list[tuple[str, ...]] = [_HEADS, *map(_cells_of, _grouped(rows))]
    if not outlook.speed:
        table = [row[:-1] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip()


def _grouped(rows: list[_Row]) -> list[list[_Row]]:
    """Put rounds that follow one another into one line: equal ones, or of equal ranks, or so many."""
    size = -(-len(rows) // MOST_LINES)
    keys: tuple[Callable[[_Row], object], ...] = (
        lambda row: _cells_of([row])[1:],
        lambda row: (row[0].high.plan.stage, row[0].high.plan.scope, _ranks_of([row[0]])),
        lambda row: (row[0].high.plan.stage, row[0].high.plan.scope, row[0].high.plan.round_num // size),
    )
    groups: list[list[_Row]] = []
    for key in keys:
        groups = [list(group) for _, group in itertools.groupby(rows, key)]
        if len(groups) <= MOST_LINES:
            break
    return groups


def _cells_of(group: list[_Row]) -> tuple[str, ...]:
    """Return the cells of a line: what its rounds have in common, or from the least to the most of them."""
    rounds = [one for one, _ in group]
    first, last = rounds[0].high.plan, rounds[-1].high.plan
    return (
        _between(str(first.round_num), str(last.round_num)),
        first.stage,
        _NAMES[first.scope],
        _between(f"{first.temperature:.2f}", f"{last.temperature:.2f}"),
        _ranks_of(rounds),
        _span(rounds, lambda end: len(end.plan.cohort), str),
        _span(rounds, lambda end: end.uplink.bytes, human_bytes),
        _span(rounds, lambda end: end.downlink.bytes, human_bytes),
        _between(*(human_time(pick(seconds for _, seconds in group)) for pick in (min, max))),
    )


def _ranks_of(rounds: list[RoundForecast]) -> str:
    if rounds[0].high.plan.scope == "full":
        return "-"
    return _span(rounds, _mean_rank, lambda value: f"{value:.1f}")


def _mean_rank(end: Bound) -> float:
    return sum(end.plan.lora_ranks) / len(end.plan.lora_ranks)


def _span(rounds: list[RoundForecast], value: Callable[[Bound], Any], show: Callable[[Any], str]) -> str:
    return _between(show(min(value(one.low) for one in rounds)), show(max(value(one.high) for one in rounds)))


def _between(low: str, high: str) -> str:
    if low == high:
        return high
    (number, _, unit), end = low.partition(" "), high.partition(" ")
    return f"{number}-{high}" if unit == end[2] else f"{low}-{high}"


def _cells(outlook: Outlook) -> Iterator[tuple[str, str]]:
    low, high = _totals(outlook)
    up, down = (
        _between(*map(human_bytes, pair))
        for pair in zip(_parts(outlook, "low"), _parts(outlook, "high"), strict=True)
    )
    yield "bytes sent", f"{_between(human_bytes(low), human_bytes(high))} (up {up}, down {down})"
    yield "", _certainty(outlook)
    for name, pick in (("full-model FedAvg", _full), ("fixed rank", _fixed)):
        yield name, _comparison(outlook, pick, (low, high))
    yield from _memory_cells(outlook)
    yield from _time_cells(outlook)
    yield "through the server", _link(outlook)


def _certainty(outlook: Outlook) -> str:
    sure = "as long as no client and no worker fails"
    if outlook.is_exact:
        return f"exact, {sure}"
    return f"bounds, {sure}: {'; '.join(outlook.reasons)}"


def _parts(outlook: Outlook, end: str) -> tuple[int, int]:
    bounds: list[Bound] = [getattr(one, end) for one in outlook.rounds]
    return sum(one.uplink.bytes for one in bounds), sum(one.downlink.bytes for one in bounds)


def _totals(outlook: Outlook) -> tuple[int, int]:
    return sum(_parts(outlook, "low")), sum(_parts(outlook, "high"))


def _full(comparison: Comparison) -> Traffic:
    return comparison.full


def _fixed(comparison: Comparison) -> Traffic:
    return comparison.fixed


def _comparison(outlook: Outlook, pick: Callable[[Comparison], Traffic], totals: tuple[int, int]) -> str:
    ends = pick(outlook.low).bytes, pick(outlook.high).bytes
    saved = [1 - total / other for total, other in zip(totals, ends, strict=True) if other]
    return f"{_between(*map(human_bytes, ends))}: {_saving(min(saved), max(saved))} sent"


def _saving(least: float, most: float) -> str:
    low, high = (f"{100 * fraction:.2f}" for fraction in sorted(map(abs, (least, most))))
    if least < 0 < most:
        return f"{-100 * least:.2f} % more to {100 * most:.2f} % less"
    return f"{low if low == high else f'{low} to {high}'} % {'less' if most > 0 else 'more'}"


def _memory_cells(outlook: Outlook) -> Iterator[tuple[str, str]]:
    memory = outlook.memory
    if memory is None:
        yield "memory", f"not known: {outlook.config.model.name} is no folder with a config.json that tells"
        return
    cpu, gpu = memory.on_cpus, memory.on_gpus
    yield "memory, at most", f"server {_gib(cpu.server)}, a worker on CPUs {_gib(cpu.worker)}"
    if outlook.config.training.device != "cpu" and gpu.gpu is not None:
        yield "", f"with GPUs: a worker {_gib(gpu.worker)}, and {_gib(gpu.gpu)} of its GPU"
    yield "", "estimates from the configuration, without the examples"


def _gib(footprint: Footprint) -> str:
    return f"{footprint.total / 2**30:.1f} GiB"


def _time_cells(outlook: Outlook) -> Iterator[tuple[str, str]]:
    speed = outlook.speed
    if speed is None:
        yield "time", "not estimated; --calibrate times some local steps on this machine"
        return
    apart, shared = outlook.round_s(is_shared=False), outlook.round_s(is_shared=True)
    yield (
        "time",
        f"about {human_time(sum(apart))} where each process has cores or a GPU of its own like these",
    )
    if sum(shared) > sum(apart):
        yield (
            "",
            f"about {human_time(sum(shared))} with all processes on this machine's {speed.num_cores} cores",
        )
    points = [
        f"{1000 * seconds:.0f} ms a step"
        + (f" at rank {r:.1f}" if scope != "full" else " of the whole model")
        for scope, pairs in speed.steps.items()
        for r, seconds in pairs
    ]
    yield "", f"measured on {speed.device}: {', '.join(points)} ({speed.num_steps} steps timed)"
    if speed.is_disturbed:
        busy = f"{speed.load:.0f} processes on {speed.num_cores} cores"
        yield "", f"this machine was busy with other work ({busy}): quiet it is faster"
    yield (
        "",
        (
            f"extrapolated: {speed.evaluate_s:.1f} s a measurement from {speed.num_evaluated} examples, "
            f"{speed.aggregate_s:.1f} s of SVDs a round from one module of each shape; not in it: the start, "
            "the network, checkpoints"
        ),
    )


def _link(outlook: Outlook) -> str:
    most = max(one.high.uplink.bytes + one.high.downlink.bytes for one in outlook.rounds)
    slow, fast = (_short(most / (speed * _GIGABIT)) for speed in (1, 10))
    return f"at most {human_bytes(most)} a round: {fast} at 10 Gbit/s, {slow} at 1 Gbit/s"


def _short(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def outlook_values(outlook: Outlook) -> dict[str, Any]:
    """Return an outlook as JSON values; bytes, values, seconds."""
    federation, table = outlook.config.federation, outlook.data.label_table()
    low, high = _totals(outlook)
    return {
        "config": outlook.config.model_dump(mode="json"),
        "num_parameters": outlook.shapes.full().num_values,
        "modules": [module.name for module in outlook.shapes.modules],
        "num_workers": outlook.num_workers,
        "clients_per_worker": list(outlook.clients_per_worker()),
        "label_names": list(outlook.data.dataset.label_names),
        "label_table": np.asarray(table).tolist(),
        "num_examples": {part: len(outlook.data.owned(part)) for part in ("train", "test")},
        "rounds": list(map(_round_values, outlook.rounds, outlook.so_far())),
        "is_exact": outlook.is_exact,
        "bounds_because": list(outlook.reasons),
        "sent_bytes": {"low": low, "high": high},
        "full_model_bytes": _both_ends(outlook, _full),
        "fixed_rank_bytes": _both_ends(outlook, _fixed),
        "memory": _memory_values(outlook),
        "time": _time_values(outlook),
        "seed": federation.seed,
    }


def _both_ends(outlook: Outlook, pick: Callable[[Comparison], Traffic]) -> dict[str, int]:
    return {"low": pick(outlook.low).bytes, "high": pick(outlook.high).bytes}


def _round_values(one: RoundForecast, so_far: Comparison) -> dict[str, Any]:
    plan = one.high.plan
    return {
        "round_num": plan.round_num,
        "stage": plan.stage,
        "scope": plan.scope,
        "temperature": plan.temperature,
        "learning_rate": plan.learning_rate,
        "workers": list(plan.workers),
        **{name: _end_values(end) for name, end in (("low", one.low), ("high", one.high))},
        "full_model_bytes_so_far": so_far.full.bytes,
        "fixed_rank_bytes_so_far": so_far.fixed.bytes,
    }


def _end_values(end: Bound) -> dict[str, Any]:
    return {
        "module_ranks": [0] * len(end.plan.lora_ranks)
        if end.plan.scope == "full"
        else list(end.plan.lora_ranks),
        "num_clients": len(end.plan.cohort),
        "uplink_bytes": end.uplink.bytes,
        "downlink_bytes": end.downlink.bytes,
    }


def _memory_values(outlook: Outlook) -> dict[str, Any] | None:
    memory = outlook.memory
    if memory is None:
        return None
    parts = {
        "server": memory.on_cpus.server,
        "worker_on_cpu": memory.on_cpus.worker,
        "worker_with_gpu": memory.on_gpus.worker,
        "gpu": memory.on_gpus.gpu,
    }
    return {
        name: {"total_bytes": one.total, "parts_bytes": dict(one.parts)} for name, one in parts.items() if one
    }


def _time_values(outlook: Outlook) -> dict[str, Any] | None:
    if outlook.speed is None:
        return None
    return {
        **{name: value for name, value in vars(outlook.speed).items() if name != "steps"},
        "steps": {
            scope: [{"lora_rank": r, "step_s": seconds} for r, seconds in pairs]
            for scope, pairs in outlook.speed.steps.items()
        },
        "round_s": outlook.round_s(is_shared=False),
        "round_s_on_this_machine": outlook.round_s(is_shared=True),
    }
