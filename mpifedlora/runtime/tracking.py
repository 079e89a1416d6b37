"""A run told to an experiment tracker: the callback behind `[tracking]`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from mpifedlora.core.config import RunConfig
from mpifedlora.io.output_folder import TRACKING_FOLDER
from mpifedlora.io.results_schema import RoundRow
from mpifedlora.io.trackers import TrackedRun, Tracker, open_tracker
from mpifedlora.runtime.callbacks import Callback, Run

if TYPE_CHECKING:
    from mpifedlora.io.results import Results


class Tracking(Callback):
    """Tells a tracker of a run; one that fails is warned of once, and the run goes on without it.

    Args:
        tool: see `[tracking] tool`.
    """

    def __init__(self, tool: str) -> None:
        self._tool = tool
        self._tracker: Tracker | None = None
        self._metric_names: Sequence[str] = ()
        self._sent_bytes = 0
        self._warn: Callable[[str], None] = lambda text: None

    def on_start(self, run: Run) -> None:
        """Begin a run in the tracker, or go on with it."""
        self._warn, self._metric_names = run.warn, run.info.metric_names
        self._sent_bytes = sum(row.uplink_bytes + row.downlink_bytes for row in run.rows)
        tracked = TrackedRun(
            folder=run.out / TRACKING_FOLDER / self._tool,
            project=run.config.tracking.project,
            name=run.out.absolute().name,
            created=run.info.created,
            first_step=len(run.rows) + 1,
            parameters=parameters_of(run.config),
        )
        self._attempt(lambda: self._open(tracked))

    def _open(self, tracked: TrackedRun) -> None:
        self._tracker = open_tracker(self._tool, tracked)

    def on_round_end(self, row: RoundRow) -> None:
        """Log a round's numbers."""
        self._sent_bytes += row.uplink_bytes + row.downlink_bytes
        if (tracker := self._tracker) is not None:
            values = {**metrics_of(row, self._metric_names), "bytes/sent_so_far": float(self._sent_bytes)}
            self._attempt(lambda: tracker.log(row.round_num, values))

    def on_end(self, results: Results) -> None:
        """End the run in the tracker."""
        if (tracker := self._tracker) is not None:
            self._attempt(lambda: tracker.close(results.status))

    def _attempt(self, tell: Callable[[], None]) -> None:
        try:
            tell()
        # Whatever a tracker, its server or its disk can raise.
        except Exception as error:
            self._tracker = None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._warn(f"tracking by {self._tool} has failed and ends here; the run goes on ({reason})")


def parameters_of(config: RunConfig) -> dict[str, Any]:
    """Return a configuration by dotted key."""
    tables = config.model_dump(mode="json")
    return {f"{table}.{key}": value for table, values in tables.items() for key, value in values.items()}


def metrics_of(row: RoundRow, metric_names: Sequence[str]) -> dict[str, float]:
    """Return a round's numbers by name, grouped as `eval/accuracy`; those that it does not have are left out.

    Args:
        row: a finished round.
        metric_names: of `eval_metrics`.
    """
    named = {
        field.name: getattr(row, field.name)
        for field in fields(row)
        if field.type in ("int", "float") and field.name != "round_num"
    }
    named |= {f"eval_{name}": value for name, value in zip(metric_names, row.eval_metrics, strict=True)}
    return {_grouped(name): float(value) for name, value in named.items() if math.isfinite(value)}


def _grouped(name: str) -> str:
    """Write a field's name with its group.

    >>> _grouped("eval_accuracy"), _grouped("uplink_bytes"), _grouped("train_s"), _grouped("penalty")
    ('eval/accuracy', 'bytes/uplink', 'seconds/train', 'round/penalty')
    """
    if name.startswith("eval_"):
        return f"eval/{name.removeprefix('eval_')}"
    for suffix, group in (("_bytes", "bytes"), ("_s", "seconds")):
        if name.endswith(suffix):
            return f"{group}/{name.removesuffix(suffix)}"
    return f"round/{name}"
