"""What the study keeps of a run: one line in `runs.csv`, and its measured rounds in `curves.csv`."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

import numpy as np
from design import ADAPTER_KEY, ARMS, FIRST, SETTINGS, Trial, arms_of, source_of_rate, tuning

from mpifedlora.core.config import RunConfig
from mpifedlora.io.results import Results
from mpifedlora.io.run_file import resolve_run

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Record:
    """A finished run.

    Args:
        setting, arm, rate, seed, split: of its trial.
        digest: of what the design set for it; a run with other switches is no run of this trial.
        accuracy: after the last round, 0 to 1, with `macro_f1` and `loss`.
        best_accuracy: of the measured rounds.
        uplink_bytes: of all clients and rounds, headers included; `downlink_bytes` likewise.
        sent_values: in both directions, without headers.
        full_model_bytes: of full-model FedAvg in float32 over the same rounds; `full_model_values`.
        cpu_s: processor time of the run (its one thread), start and evaluation included; nan where unknown.
        created: when it began.
        commit: of the source; for an adopted run, of the source that took it in.
        machine: processor, and torch.
    """

    setting: str
    arm: str
    rate: float
    seed: int
    split: str
    digest: str
    accuracy: float
    best_accuracy: float
    macro_f1: float
    loss: float
    uplink_bytes: int
    downlink_bytes: int
    sent_values: int
    full_model_bytes: int
    full_model_values: int
    cpu_s: float
    created: str
    commit: str
    machine: str

    @property
    def trial(self) -> Trial:
        """What was run."""
        return Trial(self.setting, self.arm, self.rate, self.seed, self.split)

    @property
    def sent_bytes(self) -> int:
        """Both directions."""
        return self.uplink_bytes + self.downlink_bytes


@dataclass(frozen=True)
class Point:
    """A measured round of a run: `sent_bytes` are those of all rounds so far."""

    setting: str
    arm: str
    rate: float
    seed: int
    split: str
    round_num: int
    sent_bytes: int
    lora_rank: float
    accuracy: float
    loss: float


class Records:
    """The study's results on disk.

    Args:
        folder: with `runs.csv` and `curves.csv`, or where they will be.
    """

    def __init__(self, folder: Path = RESULTS) -> None:
        self._folder = folder
        self._read()

    def _read(self) -> None:
        self.runs: dict[Trial, Record] = {}
        self.curves: dict[Trial, list[Point]] = {}
        for record in _read(self._folder / "runs.csv", Record):
            self.runs[record.trial] = record
        for point in _read(self._folder / "curves.csv", Point):
            self.curves.setdefault(_trial(point), []).append(point)

    def has(self, trial: Trial) -> bool:
        """Say whether a trial has been run as it stands in the design now."""
        return trial in self.runs and self.runs[trial].digest == digest_of(trial)

    def add(self, record: Record, points: list[Point]) -> None:
        """Add a run, in the place of an older one, and write all; another process may do so as well."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._read()
            self.runs[record.trial], self.curves[record.trial] = record, points
            trials = sorted(self.runs, key=astuple)
            _write(self._folder / "runs.csv", Record, (self.runs[trial] for trial in trials))
            _write(self._folder / "curves.csv", Point, (p for trial in trials for p in self.curves[trial]))


def chosen_rates(records: Records) -> dict[tuple[str, str], float]:
    """Return the learning rate of each arm in each setting: the best on the validation part, by loss.

    Where nothing was tuned it is that of the first setting, or else the middle of the arm's grid.
    """
    return {(setting, arm): _chosen(records, setting, arm) for setting in SETTINGS for arm in ARMS}


def _chosen(records: Records, setting: str, arm: str) -> float:
    setting, arm = source_of_rate(setting, arm)
    for place in (setting, FIRST):
        tried = [
            trial for trial in tuning() if (trial.setting, trial.arm) == (place, arm) and records.has(trial)
        ]
        if tried:
            return min(tried, key=lambda trial: records.runs[trial].loss).rate
    return ARMS[arm].rates[len(ARMS[arm].rates) // 2]


def tables_of(trial: Trial) -> dict[str, dict[str, object]]:
    """Return the tables of a trial's run file."""
    tables: dict[str, dict[str, object]] = {}
    for key, value in {**ARMS[trial.arm].settings(trial.setting), **trial.overrides()}.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    return tables


def digest_of(trial: Trial) -> str:
    """Return the digest of what the design sets for a trial now; keys the package gains change nothing."""
    text = json.dumps(tables_of(trial), sort_keys=True) + ARMS[trial.arm].variant
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def trial_of(results: Results) -> Trial | None:
    """Return the trial that a run was, by its configuration; None if it was none of the design."""
    config = RunConfig.model_validate_json(results.info.config)
    for setting, switches in SETTINGS.items():
        for arm in arms_of(setting) if switches["data.source"] == config.data.source else ():
            section = config.training
            rate = section.learning_rate if arm.rate_key == ADAPTER_KEY else section.full_learning_rate
            trial = Trial(setting, arm.name, rate, config.federation.seed, config.evaluation.split)
            is_offered = (arm.follows or rate in arm.rates) and not arm.variant
            if is_offered and resolve_run(tables_of(trial), {}).config == config:
                return trial
    return None


def record(trial: Trial, results: Results, cpu_s: float, commit: str) -> tuple[Record, list[Point]]:
    """Return what is kept of a finished run."""
    rounds, baselines = results.rounds, results.baselines
    assert baselines is not None
    measured = np.flatnonzero(np.isfinite(rounds["eval_loss"]))
    sent = np.cumsum(rounds["uplink_bytes"] + rounds["downlink_bytes"])
    points = [
        Point(
            **asdict(trial),
            round_num=int(rounds["round_num"][i]),
            sent_bytes=int(sent[i]),
            lora_rank=round(float(rounds["lora_rank_mean"][i]), 3),
            accuracy=round(float(rounds["eval_accuracy"][i]), 5),
            loss=round(float(rounds["eval_loss"][i]), 5),
        )
        for i in measured
    ]
    kept = Record(
        **asdict(trial),
        digest=digest_of(trial),
        accuracy=points[-1].accuracy,
        best_accuracy=max(point.accuracy for point in points),
        macro_f1=round(float(rounds["eval_macro_f1"][measured[-1]]), 5),
        loss=points[-1].loss,
        uplink_bytes=int(rounds["uplink_bytes"].sum()),
        downlink_bytes=int(rounds["downlink_bytes"].sum()),
        sent_values=baselines.sent_values,
        full_model_bytes=baselines.full_model_bytes,
        full_model_values=baselines.full_model_values,
        cpu_s=round(cpu_s, 1),
        created=results.info.created,
        commit=commit,
        machine=_machine(),
    )
    return kept, points


def write_run_file(path: Path, tables: Mapping[str, Mapping[str, object]], head: str) -> None:
    """Write tables as a run file."""
    lines = [f"# {line}".rstrip() for line in head.splitlines()]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def _machine() -> str:
    import torch

    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return f"{gpu or (names[0] if names else platform.machine())}, torch {torch.__version__}"


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.is_file() else []


def _trial(point: Point) -> Trial:
    return Trial(point.setting, point.arm, point.rate, point.seed, point.split)


def _read(file: Path, kind: type) -> Iterable:
    if not file.is_file():
        return []
    kinds = {"int": int, "float": float, "str": str}
    types = {field.name: kinds[str(field.type)] for field in fields(kind)}
    with file.open(newline="") as stream:
        return [kind(**{name: types[name](row[name]) for name in types}) for row in csv.DictReader(stream)]


def _write(file: Path, kind: type, rows: Iterable) -> None:
    fresh = file.with_suffix(".tmp")
    with fresh.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([field.name for field in fields(kind)])
        writer.writerows([astuple(row) for row in rows])
    fresh.replace(file)
