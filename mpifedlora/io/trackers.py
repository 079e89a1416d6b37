"""Experiment trackers: TensorBoard, MLflow and Weights & Biases behind one small interface.

Each writes below the run's folder and needs no network; the tools' own variables (`MLFLOW_TRACKING_URI`,
`WANDB_MODE`) send it elsewhere. The packages are loaded when a run asks for them.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mpifedlora.errors import ConfigError

PACKAGES = {
    "tensorboard": ("tensorboardX", "tensorboardX"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "wandb": ("wandb", "wandb"),
}
"""Tool -> what is imported, and the package that has it."""
_LONGEST_PARAMETER = 500


class Tracker(Protocol):
    """One run in a tracker."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add one round's numbers, by name."""

    def close(self, status: str) -> None:
        """End the run: `finished`, `interrupted` or `failed`."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run before its first round.

    Args:
        folder: of the tracker, for what it writes.
        project: that the run belongs to.
        name: of the run.
        created: when it began, the same after it was resumed.
        first_step: the first round to come.
        parameters: the configuration, by dotted key.
    """

    folder: Path
    project: str
    name: str
    created: str
    first_step: int
    parameters: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Sixteen digits by which the run is known again after it was resumed."""
        return hashlib.sha256(f"{self.name} {self.created}".encode()).hexdigest()[:16]


def check_trackers(tools: Iterable[str]) -> None:
    """Check that the packages of trackers are installed; nothing is loaded.

    Raises:
        ConfigError: naming the first that is not.
    """
    for tool in tools:
        module, package = PACKAGES[tool]
        if find_spec(module) is None:
            raise ConfigError(
                f'tracking.tool = "{tool}" needs the package {package}, got none installed; '
                f'pip install {package}, or set tracking.tool = "none"'
            )


def open_tracker(tool: str, run: TrackedRun) -> Tracker:
    """Begin a run in a tracker, or go on with it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    return _OPEN[tool](run)


class _TensorBoard:
    def __init__(self, run: TrackedRun) -> None:
        from tensorboardX import SummaryWriter

        # What a killed run logged of rounds that are trained again is hidden. The name of a file has whole
        # seconds: without the step, a run resumed at once would write over what was there.
        suffix = f".{run.first_step}"
        self._writer = SummaryWriter(str(run.folder), purge_step=run.first_step, filename_suffix=suffix)
        rows = "\n".join(f"| {key} | {value} |" for key, value in run.parameters.items())
        self._writer.add_text("configuration", f"| key | value |\n|---|---|\n{rows}", 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, status: str) -> None:
        self._writer.add_text("status", status, 0)
        self._writer.close()


class _MLflow:
    def __init__(self, run: TrackedRun) -> None:
        # Files suit network file systems, on which SQLite's locks do not hold.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow.tracking import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or run.folder.absolute().as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        self._run_id = self._find(run) or self._create(run)

    def _find(self, run: TrackedRun) -> str | None:
        experiment = self._client.get_experiment_by_name(run.project)
        if experiment is None:
            return None
        found = self._client.search_runs([experiment.experiment_id], f"tags.mpifedlora_key = '{run.key}'")
        return str(found[0].info.run_id) if found else None

    def _create(self, run: TrackedRun) -> str:
        experiment = self._client.get_experiment_by_name(run.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(run.project)
        tags = {"mpifedlora_key": run.key}
        created = self._client.create_run(number, run_name=run.name, tags=tags)
        for key, value in run.parameters.items():
            self._client.log_param(created.info.run_id, key, str(value)[:_LONGEST_PARAMETER])
        return str(created.info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, value, now_ms, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, status: str) -> None:
        words = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
        self._client.set_terminated(self._run_id, words[status])


class _Wandb:
    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        if not os.environ.get("WANDB_MODE"):
            os.environ["WANDB_MODE"] = "offline"
        import wandb

        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.key,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.parameters),
            settings=wandb.Settings(console="off"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=int(status == "failed"))


_OPEN: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": _TensorBoard,
    "mlflow": _MLflow,
    "wandb": _Wandb,
}
