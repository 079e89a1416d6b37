"""What results.h5 holds: the format is these dataclasses.

A field's name is its name in the file, its annotation decides the dtype and shape there.
"""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, field, fields
from datetime import datetime, timezone
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

FORMAT_VERSION = 5
Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Names = tuple[str, ...]
"""Texts, one or none for each client: a dataset, since an attribute holds at most 64 KiB."""
Texts = npt.NDArray[np.bytes_]


def utc_now() -> str:
    """Return the time, ISO 8601 in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Event(NamedTuple):
    """Something out of the ordinary, as the terminal told it: `/events`.

    Args:
        time: when, ISO 8601 in UTC.
        num_finished: rounds that were finished then.
        text: what.
    """

    time: str
    num_finished: int
    text: str


@dataclass(frozen=True, eq=False, kw_only=True)
class RunInfo:
    """What ran: the root attributes of the file, and the datasets `/label_table` and `/client_names`.

    Args:
        package_version: version of mpifedlora that ran.
        config: the resolved configuration, as JSON.
        method: name of the method's preset, or `custom`.
        model: the base model, as the run file names it.
        dataset: the data source, as the run file names it.
        num_clients: clients in the federation.
        num_workers: processes that trained them.
        seed: the run's seed.
        mpi_library: the MPI library's own version text, or how else messages were carried.
        survives_lost_workers: whether the run goes on when a worker dies (ULFM).
        devices: device of the server, then of each worker.
        eval_model: which model the metrics measure: `global`, or each client's own (`personal`).
        is_private: whether noise that nobody can take away protects the clients.
        reproducible: whether the conditions held under which any number of workers gives the same bits.
        collect: how updates reach the server: `gather`, `gather in parts` or `reduce`; `handed over` in
            one process.
        uplink_dtype: what updates are sent as.
        downlink_dtype: what the global state is sent as.
        gpu_buffers: how updates leave a GPU, `direct` or `staged`; `none` where none is used.
        startup_s: seconds from the launch to the first round; nan where the system does not tell.
        module_names: the adapted modules, in the order of `module_ranks`.
        label_names: the labels, in the order of `label_table`'s columns; for tasks without, one that
            all examples have.
        label_table: shape (num_clients, labels), int64: each client's training examples by label.
        metric_names: what the task measures beyond loss, accuracy and macro-F1.
        client_names: of the clients, by id; empty where they have none.
        created: when the run began, ISO 8601 in UTC.
        format_version: version of the file's format.

    Raises:
        ValueError: if `label_table` has another shape.
    """

    package_version: str
    config: str
    method: str
    model: str
    dataset: str
    num_clients: int
    num_workers: int
    seed: int
    mpi_library: str
    survives_lost_workers: bool
    devices: tuple[str, ...]
    eval_model: str
    is_private: bool
    reproducible: bool
    collect: str
    uplink_dtype: str
    downlink_dtype: str
    gpu_buffers: str
    startup_s: float
    module_names: tuple[str, ...]
    label_names: tuple[str, ...]
    label_table: Ints
    metric_names: tuple[str, ...] = ()
    client_names: Names = ()
    created: str = field(default_factory=utc_now)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        check_shape("label_table", self.label_table, (self.num_clients, len(self.label_names)))


@dataclass(frozen=True, eq=False, kw_only=True)
class RoundRow:
    """One finished round: one entry in each dataset of `/rounds` and, for `client_*`, `/clients`.

    Numbers that a round does not have are nan. Arrays have one entry per client of the federation;
    a client that did not take part has zeros, and nan for its loss.

    Args:
        round_num: 1..num_rounds, rising from row to row.
        stage: `initiating` or `annealing`.
        temperature: 0..1, that the rank budget came from.
        lora_rank_mean: mean over modules of the round's LoRA ranks, 0 where the whole model is trained.
        module_ranks: LoRA rank of each module, in the order of `RunInfo.module_names`.
        uplink_bytes: what the clients sent, headers included.
        downlink_bytes: what the clients received, headers included.
        mpi_bytes: what crossed the transport.
        train_loss: mean task loss of the cohort, weighted by examples.
        penalty: mean proximal penalty of the cohort, apart from the loss.
        aggregation_error: what is sent next against the exact sum, relative, in the Frobenius norm.
        dropped_energy: share of the squared norm that the cut drops, 0..1.
        num_participants: clients whose update was used.
        epsilon: of the (epsilon, privacy.delta) guarantee that the model after this round still has;
            inf under clipping without noise, nan without either.
        train_s: seconds the slowest worker trained.
        collect_s: seconds of taking the updates in, once all are trained, without those of aggregating.
        aggregate_s: seconds of aggregating and cutting.
        broadcast_s: seconds of broadcasting the plan and the adapter.
        evaluate_s: seconds of evaluating, most of them while the workers train the next round.
        round_s: seconds from one round's end to the next's.
        client_num_examples: examples trained on.
        client_train_loss: mean task loss.
        client_train_s: seconds of training.
        client_participated: whether the client's update was used.
        client_outcome: `used`, or why not: `absent`, `not finite`, `above bound`, `not chosen`.
        client_num_evaluated: examples of the client's own that the model was measured on; None, as the three
            after it, where clients have none, or the round was not measured.
        client_eval_loss: mean loss on them, nan for a client that has none.
        client_eval_accuracy: accuracy on them, 0..1.
        client_eval_macro_f1: F1 on them, averaged over labels, 0..1.
        eval_loss: mean loss of the model that `RunInfo.eval_model` names.
        eval_accuracy: its accuracy, 0..1.
        eval_macro_f1: its F1, averaged over labels, 0..1.
        eval_metrics: what else the task measures of it, in the order of `RunInfo.metric_names`.
    """

    round_num: int
    stage: str
    temperature: float
    lora_rank_mean: float
    module_ranks: tuple[int, ...]
    uplink_bytes: int
    downlink_bytes: int
    mpi_bytes: int
    train_loss: float
    penalty: float
    aggregation_error: float
    dropped_energy: float
    num_participants: int
    train_s: float
    collect_s: float
    aggregate_s: float
    broadcast_s: float
    evaluate_s: float
    round_s: float
    client_num_examples: Ints
    client_train_loss: Floats
    client_train_s: Floats
    client_participated: Bools
    client_outcome: Texts
    epsilon: float = math.nan
    eval_loss: float = math.nan
    eval_accuracy: float = math.nan
    eval_macro_f1: float = math.nan
    eval_metrics: tuple[float, ...] = ()
    client_num_evaluated: Ints | None = None
    client_eval_loss: Floats | None = None
    client_eval_accuracy: Floats | None = None
    client_eval_macro_f1: Floats | None = None


@dataclass(frozen=True, kw_only=True)
class Baselines:
    """What was sent, both directions together, against what two simpler runs would have sent.

    Both have the same rounds and cohorts: FedAvg on the whole model, and LoRA at `lora_rank_max`
    throughout. The reductions follow from the counts: 0.975 means 97.5 % less, nan stands for an
    empty baseline.

    Args:
        sent_bytes: bytes that were sent, headers included.
        full_model_bytes: the same for FedAvg on the whole model.
        fixed_rank_bytes: the same for LoRA at a fixed rank.
        sent_values: parameters that were sent.
        full_model_values: the same for FedAvg on the whole model.
        fixed_rank_values: the same for LoRA at a fixed rank.

    >>> Baselines(sent_bytes=25, full_model_bytes=1000, fixed_rank_bytes=50, sent_values=6,
    ...           full_model_values=250, fixed_rank_values=12).reduction_vs_full_model
    0.975
    """

    sent_bytes: int
    full_model_bytes: int
    fixed_rank_bytes: int
    sent_values: int
    full_model_values: int
    fixed_rank_values: int
    reduction_vs_full_model: float = field(init=False)
    reduction_vs_fixed_rank: float = field(init=False)
    values_reduction_vs_full_model: float = field(init=False)
    values_reduction_vs_fixed_rank: float = field(init=False)

    def __post_init__(self) -> None:
        for unit, prefix in (("bytes", ""), ("values", "values_")):
            for baseline in ("full_model", "fixed_rank"):
                sent, other = getattr(self, f"sent_{unit}"), getattr(self, f"{baseline}_{unit}")
                reduction = 1 - sent / other if other else math.nan
                object.__setattr__(self, f"{prefix}reduction_vs_{baseline}", reduction)


@dataclass(frozen=True)
class _Column:
    """Where one field of `RoundRow` lies in the file, and as what.

    An optional one is absent from the file as long as no round has it.
    """

    name: str
    path: str
    dtype: str
    axis: str
    is_optional: bool

    def shape(self, info: RunInfo) -> tuple[int, ...]:
        widths = {
            "": (),
            "modules": (len(info.module_names),),
            "metrics": (len(info.metric_names),),
            "clients": (info.num_clients,),
        }
        return widths[self.axis]

    def stack(self, rows: list[RoundRow], info: RunInfo) -> Array:
        shape = self.shape(info)
        found = (getattr(row, self.name) for row in rows)
        values = [self.blank(shape) if value is None else value for value in found]
        return np.array(values, dtype=self.dtype).reshape(len(rows), *shape)

    def blank(self, shape: tuple[int, ...]) -> Array:
        """Return the values of an optional column that no round has: nan, or 0 of what is counted."""
        return np.full(shape, np.nan if self.dtype.startswith("float") else 0, self.dtype)

    def is_absent(self, values: Array) -> bool:
        return self.is_optional and np.array_equal(values, self.blank(values.shape), equal_nan=True)

    def value(self, entry: Any) -> Any:
        if self.axis == "clients":
            return entry.astype(self.dtype)  # outcomes were read as text
        return tuple(entry.tolist()) if self.axis else entry.item()


# Annotation of a field of RoundRow -> dtype in the file, second axis.
_KINDS = {
    "int": ("int64", ""),
    "float": ("float64", ""),
    "str": ("S16", ""),
    "tuple[int, ...]": ("int32", "modules"),
    "tuple[float, ...]": ("float64", "metrics"),
    "Ints": ("int64", "clients"),
    "Floats": ("float64", "clients"),
    "Bools": ("bool", "clients"),
    "Texts": ("S16", "clients"),
}


def _column(row_field: Field[Any]) -> _Column:
    kind = str(row_field.type)
    dtype, axis = _KINDS[kind.removesuffix(" | None")]
    group, name = "rounds", row_field.name
    if axis == "clients":
        group, name = "clients", name.removeprefix("client_")
    return _Column(row_field.name, f"{group}/{name}", dtype, axis, kind.endswith(" | None"))


COLUMNS = tuple(_column(row_field) for row_field in fields(RoundRow))


def check_shape(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raise a ValueError unless an array has a shape."""
    if np.shape(value) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {np.shape(value)}")
