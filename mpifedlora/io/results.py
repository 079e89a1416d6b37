"""The results of a run in one HDF5 file: written while running, read back afterwards.

Every write makes a whole new file and puts it in place of the old one, so that any reader sees all
finished rounds at any time, also after the writer was killed. The format is the dataclasses below:
a field's name is its name in the file, its annotation decides the dtype and shape there.
`docs/results-format.md` describes it for readers.
"""

from __future__ import annotations

import errno
import glob
import math
import os
import secrets
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

import h5py
import numpy as np
import numpy.typing as npt

from mpifedlora.core.schedule import Stage
from mpifedlora.errors import CheckpointError

FORMAT_VERSION = 1
Status = Literal["running", "finished", "failed"]
StrPath = str | os.PathLike[str]
Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


def _utc_now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True, eq=False, kw_only=True)
class RunInfo:
    """What ran: the root attributes of the file, and the dataset `/label_table`.

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
        devices: device of the server, then of each worker.
        reproducible: whether the conditions held under which any number of workers gives the same bits.
        module_names: the adapted modules, in the order of `module_ranks`.
        label_names: the labels, in the order of `label_table`'s columns; empty for tasks without.
        label_table: shape (num_clients, labels), int64: each client's training examples by label.
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
    devices: tuple[str, ...]
    reproducible: bool
    module_names: tuple[str, ...]
    label_names: tuple[str, ...]
    label_table: Ints
    created: str = field(default_factory=_utc_now)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _check_shape("label_table", self.label_table, (self.num_clients, len(self.label_names)))


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
        train_s: seconds the slowest worker trained.
        collect_s: seconds of collecting the updates.
        aggregate_s: seconds of aggregating and cutting.
        broadcast_s: seconds of broadcasting the plan and the adapter.
        evaluate_s: seconds of evaluating, most of them while the workers train the next round.
        round_s: seconds from one round's end to the next's.
        client_num_examples: examples trained on.
        client_train_loss: mean task loss.
        client_train_s: seconds of training.
        client_participated: whether the client's update was used.
        eval_loss: mean loss of the global model.
        eval_accuracy: its accuracy, 0..1.
        eval_macro_f1: its F1, averaged over labels, 0..1.
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
    eval_loss: float = math.nan
    eval_accuracy: float = math.nan
    eval_macro_f1: float = math.nan


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
    """Where one field of `RoundRow` lies in the file, and as what."""

    name: str
    path: str
    dtype: str
    axis: str

    def shape(self, info: RunInfo) -> tuple[int, ...]:
        widths = {"": (), "modules": (len(info.module_names),), "clients": (info.num_clients,)}
        return widths[self.axis]

    def stack(self, rows: list[RoundRow], info: RunInfo) -> Array:
        values = np.array([getattr(row, self.name) for row in rows], dtype=self.dtype)
        return values.reshape(len(rows), *self.shape(info))

    def value(self, entry: Any) -> Any:
        return entry if self.axis == "clients" else tuple(entry.tolist()) if self.axis else entry.item()


# Annotation of a field of RoundRow -> dtype in the file, second axis.
_KINDS = {
    "int": ("int64", ""),
    "float": ("float64", ""),
    "str": ("S16", ""),
    "tuple[int, ...]": ("int32", "modules"),
    "Ints": ("int64", "clients"),
    "Floats": ("float64", "clients"),
    "Bools": ("bool", "clients"),
}


def _column(row_field: Field[Any]) -> _Column:
    dtype, axis = _KINDS[str(row_field.type)]
    group, name = "rounds", row_field.name
    if axis == "clients":
        group, name = "clients", name.removeprefix("client_")
    return _Column(row_field.name, f"{group}/{name}", dtype, axis)


COLUMNS = tuple(_column(row_field) for row_field in fields(RoundRow))


class ResultsWriter:
    """Keep a run's rounds, and put a whole new file in place whenever asked.

    Nothing is written before the first `write`. Only the server's process holds a writer.

    Args:
        path: the file to write; its folder must exist.
        info: what ran.
    """

    def __init__(self, path: StrPath, info: RunInfo) -> None:
        # Resolved once: a later chdir changes nothing, and a symbolic link is followed, not replaced.
        self._path = Path(os.path.realpath(path))
        self._info = info
        self._rows: list[RoundRow] = []
        self._status: Status = "running"
        self._baselines: Baselines | None = None
        remove_stale_temporaries(self._path)

    @property
    def rows(self) -> tuple[RoundRow, ...]:
        """Return the rounds added so far."""
        return tuple(self._rows)

    def add(self, row: RoundRow) -> None:
        """Append one finished round; it reaches the disk with the next `write`.

        Args:
            row: the round; its arrays are copied.

        Raises:
            ValueError: if the round does not follow the last one or does not fit the run's sizes.
        """
        _check_row(row, self._rows[-1].round_num if self._rows else 0, self._info)
        by_client = (column for column in COLUMNS if column.axis == "clients")
        copies: dict[str, Any] = {c.name: np.array(getattr(row, c.name), dtype=c.dtype) for c in by_client}
        self._rows.append(replace(row, **copies))

    def set_status(self, status: Status) -> None:
        """Set the run's status: `running` (from the start), `finished` or `failed`.

        Raises:
            ValueError: if it is none of them.
        """
        _check_choice("status", status, get_args(Status))
        self._status = status

    def set_baselines(self, baselines: Baselines) -> None:
        """Set what the bytes sent so far are to be compared with."""
        self._baselines = baselines

    def write(self) -> None:
        """Put a new file in place that holds all that was added and set so far.

        Raises:
            CheckpointError: (an `OSError`, with its `errno`) if the disk refuses. The file written
                before is untouched and no row is lost: go on, and write again after the next round.
        """
        content = self._encode()
        try:
            replace_file(self._path, content)
        except OSError as error:
            failure = CheckpointError(
                f"results must be writable, got {error.strerror or error} ({self._path}); free space or "
                "restore the folder: the last complete file is untouched, the next write holds every round"
            )
            failure.errno = error.errno
            raise failure from error

    def _encode(self) -> bytes:
        # In memory, so that only our own plain write meets the disk: HDF5 reports a full disk as any of
        # several errors, some of them at close. A unique name, because HDF5 refuses one that is open.
        # Version 1.8 of the format lifts the limit of 64 KiB on attributes (thousands of labels).
        with h5py.File(
            secrets.token_hex(8), "w", driver="core", backing_store=False, libver=("v108", "v108")
        ) as file:
            _write_info(file, self._info)
            file.attrs["status"] = self._status
            for column in COLUMNS:
                file[column.path] = column.stack(self._rows, self._info)
            _write_attribute(file["rounds/module_ranks"], "module_names", self._info.module_names)
            if self._baselines is not None:
                file.create_group("baselines").attrs.update(vars(self._baselines))
            file.flush()
            return bytes(file.id.get_file_image())


@dataclass(frozen=True, eq=False)
class Results:
    """What a results file holds.

    Args:
        info: what ran.
        status: `running` (or killed), `finished` or `failed`.
        rounds: name to array of `/rounds`, shape (rounds,), `module_ranks` (rounds, modules).
        clients: name to array of `/clients`, shape (rounds, clients).
        baselines: what the bytes compare with, if the run came to tell.
    """

    info: RunInfo
    status: Status
    rounds: dict[str, Array]
    clients: dict[str, Array]
    baselines: Baselines | None

    def rows(self) -> list[RoundRow]:
        """Return the rounds as they were added, for a run that goes on."""
        groups = {"rounds": self.rounds, "clients": self.clients}
        table = {c: groups[c.path.split("/")[0]][c.path.split("/")[1]] for c in COLUMNS}
        count = len(self.rounds["round_num"])
        return [RoundRow(**{c.name: c.value(table[c][i]) for c in COLUMNS}) for i in range(count)]


def read_results(path: StrPath) -> Results:
    """Read a results file, of a run that has ended or is still writing.

    Args:
        path: the file.

    Raises:
        CheckpointError: if the file is missing, cut short, not a results file, or of a newer format.
    """
    try:
        with h5py.File(path, "r") as file:
            return _read(file)
    except CheckpointError:
        raise
    except (OSError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"results must be a complete file written by mpifedlora, got {error} ({os.fspath(path)}); "
            "name the results.h5 in a run's output folder"
        ) from error


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` in place of a file such that readers see the old bytes or the new, never a mix.

    Args:
        path: the file to replace; need not exist, its folder must.
        content: the file's new bytes.

    Raises:
        OSError: if the disk refuses; the old file is untouched.
    """
    unique = f"{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}.{unique}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def remove_stale_temporaries(path: Path) -> None:
    """Remove what killed writers of a file left beside it.

    A temporary file of a live process of this machine is kept. Should a writer on another machine
    lose one, its write fails as on a full disk and is tried again.

    Args:
        path: the file that was to be written.
    """
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        host, pid = temporary.name[len(path.name) + 2 :].rsplit(".", 3)[:2]
        if not (host == socket.gethostname() and _is_alive(pid)):
            with suppress(OSError):
                temporary.unlink()


def _is_alive(pid: str) -> bool:
    # This process has nothing half-written when it starts a writer: its number was used before.
    if not pid.isdecimal() or int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable; some file systems cannot, and say so."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_shape(name: str, value: Any, shape: tuple[int, ...]) -> None:
    if np.shape(value) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {np.shape(value)}")


def _check_row(row: RoundRow, last_round: int, info: RunInfo) -> None:
    if row.round_num <= last_round:
        raise ValueError(f"round_num must be above the last row's, got {row.round_num} after {last_round}")
    _check_choice("stage", row.stage, get_args(Stage))
    for column in COLUMNS:
        _check_shape(f"{column.name} of round {row.round_num}", getattr(row, column.name), column.shape(info))


def _is_attribute(info_field: Field[Any]) -> bool:
    return info_field.type != "Ints"


def _write_info(file: h5py.File, info: RunInfo) -> None:
    for info_field in fields(info):
        value = getattr(info, info_field.name)
        if _is_attribute(info_field):
            _write_attribute(file, info_field.name, value)
        else:
            file[info_field.name] = np.asarray(value, dtype=np.int64)


def _write_attribute(owner: h5py.HLObject, name: str, value: str | int | tuple[str, ...]) -> None:
    if isinstance(value, tuple):
        texts = np.array([_storable(text) for text in value], dtype=object)
        owner.attrs.create(name, texts, dtype=h5py.string_dtype())
    else:
        owner.attrs[name] = _storable(value) if isinstance(value, str) else value


def _storable(text: str) -> str:
    """Replace what HDF5 text cannot hold: NUL, and surrogates from undecodable file names."""
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", "\ufffd")


def _read(file: h5py.File) -> Results:
    _check_format(file)
    info = _read_info(file)
    groups: dict[str, dict[str, Array]] = {"rounds": {}, "clients": {}}
    count = len(file["rounds/round_num"])
    for column in COLUMNS:
        group, name = column.path.split("/")
        values = file[column.path][()]
        _check_shape(column.path, values, (count, *column.shape(info)))
        groups[group][name] = values.astype("U") if column.dtype.startswith("S") else values
    return Results(info, file.attrs["status"], groups["rounds"], groups["clients"], _read_baselines(file))


def _check_format(file: h5py.File) -> None:
    version = file.attrs.get("format_version")
    if version is None:
        raise CheckpointError(
            f"results must be written by mpifedlora, got another HDF5 file ({file.filename}); name the "
            "results.h5 in a run's output folder"
        )
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"format_version must be {FORMAT_VERSION}, got {version} ({file.filename}); read it with the "
            "version of mpifedlora that wrote it"
        )


def _read_info(file: h5py.File) -> RunInfo:
    to_python = {"str": str, "int": int, "bool": bool, "tuple[str, ...]": tuple}
    values = {f.name: to_python[str(f.type)](file.attrs[f.name]) for f in fields(RunInfo) if _is_attribute(f)}
    return RunInfo(label_table=file["label_table"][()], **values)


def _read_baselines(file: h5py.File) -> Baselines | None:
    if "baselines" not in file:
        return None
    attributes = file["baselines"].attrs
    return Baselines(**{f.name: int(attributes[f.name]) for f in fields(Baselines) if f.init})
