"""The numbers behind the figures of a run, from the arrays of its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Arrays = Mapping[str, npt.NDArray[Any]]

PHASES = ("train", "collect", "aggregate", "broadcast")
"""What a round's seconds are spent on, one after another; evaluation runs alongside training."""


class Span(NamedTuple):
    """Rounds of one stage, the first and the last of them included."""

    stage: str
    first: int
    last: int


def stage_spans(round_nums: Sequence[int], stages: Sequence[str]) -> list[Span]:
    """Return the stages of a run in order.

    Args:
        round_nums: of the finished rounds, rising.
        stages: of each.

    >>> stage_spans([1, 2, 3], ["initiating", "annealing", "annealing"])
    [Span(stage='initiating', first=1, last=1), Span(stage='annealing', first=2, last=3)]
    """
    spans: list[Span] = []
    for round_num, stage in zip(round_nums, stages, strict=True):
        if spans and spans[-1].stage == stage:
            spans[-1] = spans[-1]._replace(last=int(round_num))
        else:
            spans.append(Span(str(stage), int(round_num), int(round_num)))
    return spans


def sent_bytes(rounds: Arrays) -> Floats:
    """Return the bytes that the clients had sent and received after each round (rounds,).

    Args:
        rounds: with `uplink_bytes` and `downlink_bytes`.
    """
    both = np.asarray(rounds["uplink_bytes"]) + np.asarray(rounds["downlink_bytes"])
    return np.cumsum(both, dtype=np.float64)


class Curve(NamedTuple):
    """A number that is measured in some rounds only.

    Args:
        round_nums: (points,) where it is.
        sent_bytes: (points,) sent until then, in both directions.
        values: (points,).
    """

    round_nums: npt.NDArray[np.int64]
    sent_bytes: Floats
    values: Floats


def measured(rounds: Arrays, name: str) -> Curve:
    """Return a number where it is finite.

    Args:
        rounds: with `round_num`, the bytes and `name`.
        name: of the number.
    """
    values = np.asarray(rounds[name], np.float64)
    known = np.isfinite(values)
    return Curve(np.asarray(rounds["round_num"])[known], sent_bytes(rounds)[known], values[known])


def evaluated(rounds: Arrays, metric_names: Sequence[str]) -> dict[str, Curve]:
    """Return each metric of the evaluated models, the one that says most of a task first.

    Args:
        rounds: as `/rounds` of the results has them.
        metric_names: of `eval_metrics`.

    Returns:
        accuracy, the task's own, macro-F1 and loss, by name; curves without points of what a task has not.
    """
    own = {
        name: measured({**rounds, name: rounds["eval_metrics"][:, place]}, name)
        for place, name in enumerate(metric_names)
    }
    known = {name: measured(rounds, f"eval_{name}") for name in ("accuracy", "macro_f1", "loss")}
    return {"accuracy": known["accuracy"], **own, **known}


class Phases(NamedTuple):
    """Where the time of each round went.

    Args:
        seconds: (rounds,) of each of `PHASES` and of `other`; what is not known counts as 0.
        evaluate_s: (rounds,) alongside.
    """

    seconds: dict[str, Floats]
    evaluate_s: Floats


def time_by_phase(rounds: Arrays) -> Phases:
    """Split each round's time; what its phases do not account for is `other`.

    Args:
        rounds: with `round_s`, `evaluate_s` and the seconds of each phase.
    """
    seconds = {phase: np.nan_to_num(np.asarray(rounds[f"{phase}_s"], np.float64)) for phase in PHASES}
    spent = sum(seconds.values(), np.zeros(len(rounds["round_num"])))
    whole = np.nan_to_num(np.asarray(rounds["round_s"], np.float64))
    seconds["other"] = np.maximum(0.0, whole - spent)
    return Phases(seconds, np.nan_to_num(np.asarray(rounds["evaluate_s"], np.float64)))


def measured_clients(clients: Arrays) -> tuple[str, Floats] | None:
    """Return what was measured last on each client's own examples, its accuracy or else its loss.

    Args:
        clients: arrays (rounds, clients) as `/clients` of the results has them.

    Returns:
        `accuracy` or `loss`, and (clients,) values, nan for a client that never was measured; or None.

    >>> found = measured_clients({"eval_accuracy": np.array([[0.5, 0.25], [0.75, np.nan]])})
    >>> found[0], found[1].tolist()
    ('accuracy', [0.75, 0.25])
    """
    for name in ("accuracy", "loss"):
        values = np.asarray(clients[f"eval_{name}"], np.float64)
        is_known = np.isfinite(values)
        if is_known.any():
            last = len(values) - 1 - is_known[::-1].argmax(axis=0)
            return name, values[last, np.arange(values.shape[1])]
    return None


class ClientSummary(NamedTuple):
    """One client over all finished rounds.

    Args:
        client_id: of it.
        num_examples: training examples that it has; 0 where neither labels nor an update tell.
        num_used: rounds whose model its update went into.
        others: how often each other outcome came, but for `absent`.
        last_loss: mean task loss of its last used update, nan without any.
        mean_s: mean seconds of training where its update was used, nan without any.
        total_s: all of them.
    """

    client_id: int
    num_examples: int
    num_used: int
    others: dict[str, int]
    last_loss: float
    mean_s: float
    total_s: float


def summarise_clients(clients: Arrays, label_table: npt.NDArray[np.int64]) -> list[ClientSummary]:
    """Sum up each client's rounds.

    Args:
        clients: arrays (rounds, clients) as `/clients` of the results has them.
        label_table: (clients, labels).
    """
    columns = ("outcome", "participated", "num_examples", "train_loss", "train_s")
    by_client = zip(*(np.asarray(clients[name]).T for name in columns), label_table.sum(axis=1), strict=True)
    return [_summarise(client_id, *values) for client_id, values in enumerate(by_client)]


def _summarise(
    client_id: int, outcomes: Any, used: Any, examples: Any, losses: Any, seconds: Any, num_owned: Any
) -> ClientSummary:
    names, counts = np.unique(outcomes, return_counts=True)
    others = {str(name): int(count) for name, count in zip(names, counts, strict=True)}
    num_used = int(used.sum())
    return ClientSummary(
        client_id=client_id,
        num_examples=max(int(num_owned), int(examples.max(initial=0))),
        num_used=num_used,
        others={name: count for name, count in others.items() if name not in ("used", "absent")},
        last_loss=float(losses[used][-1]) if num_used else np.nan,
        mean_s=float(seconds[used].mean()) if num_used else np.nan,
        total_s=float(seconds.sum()),
    )


def first_reaching(values: Sequence[float] | Floats, target: float) -> int | None:
    """Return the index of the first value that is at least a target, or None where none is.

    >>> first_reaching([0.2, float("nan"), 0.6, 0.5], 0.5)
    2
    """
    reached = np.flatnonzero(np.asarray(values, np.float64) >= target)
    return int(reached[0]) if len(reached) else None


def pareto_front(costs: Sequence[float] | Floats, gains: Sequence[float] | Floats) -> list[int]:
    """Return the points that no other point beats, in the order of their cost.

    A point beats another if it costs no more and gains no less, and is not its equal; of equals, the first
    stays. Points with a nan are beaten.

    Args:
        costs: less is better.
        gains: more is better.

    >>> pareto_front([1, 2, 3, 3], [0.2, 0.1, 0.5, 0.6])
    [0, 3]
    """
    order = sorted(
        (cost, -gain, index)
        for index, (cost, gain) in enumerate(zip(costs, gains, strict=True))
        if np.isfinite(cost) and np.isfinite(gain)
    )
    front: list[int] = []
    best = -np.inf
    for _, negative, index in order:
        if -negative > best:
            front.append(index)
            best = -negative
    return front


def common_path(names: Sequence[str]) -> list[str]:
    """Shorten dotted names by the parts with which all of them begin, and by those with which all end.

    >>> common_path(["encoder.layer.0.query.linear", "encoder.layer.1.value.linear"])
    ['0.query', '1.value']
    """
    split = [name.split(".") for name in names]
    ahead, behind = (_num_shared([parts[::step] for parts in split]) for step in (1, -1))
    return [".".join(parts[ahead : len(parts) - behind]) or ".".join(parts) for parts in split]


def _num_shared(split: Sequence[Sequence[str]]) -> int:
    if len(split) < 2:
        return 0
    count = 0
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        count += 1
    return count
