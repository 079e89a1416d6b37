"""Several runs beside each other: groups that differ by seed only, and what each group has achieved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from mpifedlora.core.curves import Curve, first_reaching, pareto_front
from mpifedlora.core.differences import CHANGES_NO_NUMBER, Tables, differing_keys
from mpifedlora.core.metrics import Metric
from mpifedlora.core.units import counted
from mpifedlora.errors import ConfigError

SEED = "federation.seed"
_MUST_AGREE = (
    "model.",
    "data.",
    "task.name",
    "task.template",
    "federation.num_clients",
    "federation.num_rounds",
    "federation.cohort_size",
    "federation.sampling",
    "evaluation.model",
    "evaluation.split",
    "evaluation.max_examples",
)
MARGIN = 0.05
_LONG_LABEL = 40


class Run(NamedTuple):
    """What a comparison takes from one run.

    Args:
        name: of its folder.
        method: its preset.
        config: its configuration.
        status: `finished`, or how else it ended.
        curve: the metric that is compared, where it was measured.
        num_rounds: that are finished.
        total_bytes: sent in both directions.
        wall_s: seconds of its start and of all rounds.
        reduction: 1 - sent / what FedAvg on the whole model sends; nan where not known.
    """

    name: str
    method: str
    config: Tables
    status: str
    curve: Curve
    num_rounds: int
    total_bytes: float
    wall_s: float
    reduction: float

    @property
    def final(self) -> float:
        """Metric of the last measured round, nan without any."""
        return float(self.curve.values[-1]) if len(self.curve.values) else math.nan


class Group(NamedTuple):
    """Runs that differ by their seed only.

    Args:
        label: tells it from the other groups.
        runs: at least one.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def curve(self) -> Curve:
        """Mean of the metric, by round and mean bytes, where every run was measured."""
        common = reduce(np.intersect1d, [run.curve.round_nums for run in self.runs])
        picked = [_pick(run.curve, common) for run in self.runs]
        return Curve(common, *(np.mean([part[i] for part in picked], axis=0) for i in (0, 1)))

    @property
    def deviation(self) -> Any:
        """Standard deviation of the metric at the points of `curve`; nan of one run."""
        common = self.curve.round_nums
        values = np.array([_pick(run.curve, common)[1] for run in self.runs])
        return values.std(axis=0, ddof=1) if len(values) > 1 else np.full(len(common), np.nan)


def _pick(curve: Curve, round_nums: Any) -> tuple[Any, Any]:
    where = np.isin(curve.round_nums, round_nums)
    return curve.sent_bytes[where], curve.values[where]


def choose_metric(runs: Mapping[str, Mapping[str, Curve]], name: str | None) -> str:
    """Return the metric to compare runs by.

    Args:
        runs: metrics of each run, by the run's name; curves without points of what was not measured.
        name: of the metric; None for the first that all runs have.

    Raises:
        ConfigError: if not all runs have it.
    """
    # A run that was not evaluated yet may have any of them.
    names = {
        run: [each for each, curve in curves.items() if len(curve.values)] or list(curves)
        for run, curves in runs.items()
    }
    shared = [each for each in next(iter(names.values())) if all(each in found for found in names.values())]
    if shared and name is None:
        return shared[0]
    if name is None or name not in shared:
        by_metrics: dict[str, list[str]] = {}
        for run, each in names.items():
            by_metrics.setdefault(", ".join(each), []).append(run)
        found = "; ".join(f"{', '.join(having)}: {each}" for each, having in by_metrics.items())
        got = "" if name is None else f", got {name}"
        advice = f"choose {' or '.join(shared)}" if shared else "leave the others out"
        raise ConfigError(f"the metric must be one that all runs have{got} ({found}); {advice}")
    return name


def group_by_seed(runs: Sequence[Run]) -> list[Group]:
    """Put runs together that differ by their seed, and by what changes no number, only.

    Args:
        runs: in any order.

    Returns:
        groups in the order of their first runs. A label is the method; where several groups have the same,
        with the keys in which they differ.
    """
    groups: list[list[Run]] = []
    for run in runs:
        for group in groups:
            if run.method == group[0].method and not _differences([group[0], run]):
                group.append(run)
                break
        else:
            groups.append([run])
    return [Group(_label(group[0], [other[0] for other in groups]), tuple(group)) for group in groups]


def _differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    differing = differing_keys([run.config for run in runs])
    return {k: v for k, v in differing.items() if k != SEED and not k.startswith(CHANGES_NO_NUMBER)}


def _label(run: Run, firsts: Sequence[Run]) -> str:
    alike = [first for first in firsts if first.method == run.method]
    keys = _differences(alike)
    place = next(index for index, first in enumerate(alike) if first is run)
    # A hash says no more than that files differ.
    short = {key: 8 if key.endswith("sha256") else None for key in keys}
    told = (f"{key}={_written(values[place])[: short[key]]}" for key, values in keys.items())
    return ", ".join([run.method, *told])


def _written(value: Any) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class Spread(NamedTuple):
    """Mean and standard deviation over seeds.

    Args:
        mean: nan where a run has no number.
        deviation: of the sample; nan of a single run.
    """

    mean: float
    deviation: float

    @staticmethod
    def of(values: Iterable[float]) -> Spread:
        """Return both of some values."""
        array = np.array(list(values), np.float64)
        deviation = float(array.std(ddof=1)) if len(array) > 1 else math.nan
        return Spread(float(array.mean()), deviation)


class Achievement(NamedTuple):
    """What one group has achieved: a row of the table.

    Args:
        label: of the group.
        num_runs: in it.
        final: metric of the last measured round.
        best: metric of any round.
        total_bytes: sent in both directions.
        reduction: against FedAvg on the whole model.
        num_reached: runs that reach the target.
        bytes_to_target: sent until then; nan unless all runs reach it.
        rounds_to_target: finished until then; nan unless all runs reach it.
        wall_s: seconds.
        is_efficient: whether no other group ends with a metric as good for less bytes.
    """

    label: str
    num_runs: int
    final: Spread
    best: Spread
    total_bytes: Spread
    reduction: Spread
    num_reached: int
    bytes_to_target: Spread
    rounds_to_target: Spread
    wall_s: Spread
    is_efficient: bool


def default_target(groups: Sequence[Group], metric: Metric) -> float:
    """Return what is 5 % short of the best mean that a group reaches, nan where none was measured."""
    best = _best([group.curve for group in groups], metric)
    return best - float(metric.gain(MARGIN * abs(best)))


def _best(curves: Sequence[Curve], metric: Metric) -> float:
    values = np.concatenate([curve.values for curve in curves])
    return float(values[metric.gain(values).argmax()]) if len(values) else math.nan


def compare(groups: Sequence[Group], target: float, metric: Metric) -> list[Achievement]:
    """Return what each group has achieved.

    Args:
        groups: of runs.
        target: value of the metric that bytes and rounds are counted up to.
        metric: that the runs' curves hold.
    """
    sent = [_spread(group, lambda run: run.total_bytes).mean for group in groups]
    final = [_spread(group, lambda run: run.final).mean for group in groups]
    front = pareto_front(sent, metric.gain(final))
    return [_achievement(group, target, metric, index in front) for index, group in enumerate(groups)]


def _spread(group: Group, number: Callable[[Run], float]) -> Spread:
    return Spread.of(number(run) for run in group.runs)


def _achievement(group: Group, target: float, metric: Metric, is_efficient: bool) -> Achievement:
    reached = [_reach(run.curve, target, metric) for run in group.runs]
    return Achievement(
        label=group.label,
        num_runs=len(group.runs),
        final=_spread(group, lambda run: run.final),
        best=_spread(group, lambda run: _best([run.curve], metric)),
        total_bytes=_spread(group, lambda run: run.total_bytes),
        reduction=_spread(group, lambda run: run.reduction),
        num_reached=sum(math.isfinite(sent) for sent, _ in reached),
        bytes_to_target=Spread.of(sent for sent, _ in reached),
        rounds_to_target=Spread.of(round_num for _, round_num in reached),
        wall_s=_spread(group, lambda run: run.wall_s),
        is_efficient=is_efficient,
    )


def _reach(curve: Curve, target: float, metric: Metric) -> tuple[float, float]:
    index = first_reaching(metric.gain(curve.values), float(metric.gain(target)))
    if index is None:
        return math.nan, math.nan
    return float(curve.sent_bytes[index]), float(curve.round_nums[index])


def front_points(groups: Sequence[Group], metric: Metric) -> tuple[list[float], list[float]]:
    """Return bytes and metric of the Pareto front over all measured rounds of all groups."""
    sent = np.concatenate([group.curve.sent_bytes for group in groups])
    values = np.concatenate([group.curve.values for group in groups])
    front = pareto_front(sent, metric.gain(values))
    return sent[front].tolist(), values[front].tolist()


def comparability_notes(groups: Sequence[Group]) -> list[str]:
    """Say why groups cannot be compared as they are; empty where they can.

    Args:
        groups: of runs.
    """
    notes = []
    for key, values in differing_keys([group.runs[0].config for group in groups]).items():
        if key.startswith(_MUST_AGREE):
            pairs = zip(groups, values, strict=True)
            listed = "; ".join(f"{_called(group)}: {_written(value)}" for group, value in pairs)
            notes.append(f"{key} differs ({listed})")
    notes += _seed_notes(groups)
    for group in groups:
        notes += [
            f"{run.name} has not finished (it is {run.status} after {counted(run.num_rounds, 'round')})"
            for run in group.runs
            if run.status != "finished"
        ]
    return notes


def _called(group: Group) -> str:
    return group.label if len(group.label) <= _LONG_LABEL else group.runs[0].name


def _seed_notes(groups: Sequence[Group]) -> list[str]:
    seeds = [
        sorted(run.config.get("federation", {}).get("seed", 0) for run in group.runs) for group in groups
    ]
    pairs = list(zip(groups, seeds, strict=True))
    notes = []
    if any(set(one) != set(seeds[0]) for one in seeds):
        listed = "; ".join(f"{_called(group)}: {', '.join(map(str, one))}" for group, one in pairs)
        notes.append(f"the seeds differ, and with them data split and start ({listed})")
    for group, one in pairs:
        if len(set(one)) < len(one):
            names = ", ".join(run.name for run in group.runs)
            notes.append(
                f"a seed counts more than once in {_called(group)} ({names}): a repeat is no new sample"
            )
    return notes
