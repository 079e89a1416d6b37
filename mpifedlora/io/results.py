"""The results of a run in one HDF5 file: written while running, read back afterwards.

Every write makes a whole new file and puts it in place of the old one, so that any reader sees all
finished rounds at any time, also after the writer was killed. `results_schema` is the format, and
`docs/results-format.md` describes it for readers.
"""

from __future__ import annotations

import io
import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import h5py
import numpy as np

from mpifedlora.core.schedule import Stage
from mpifedlora.errors import CheckpointError
from mpifedlora.io.atomic import refusal, remove_stale_temporaries, replace_file
from mpifedlora.io.hdf5_values import read_array, read_attribute, read_texts
from mpifedlora.io.output_folder import RESULTS_FILE
from mpifedlora.io.results_schema import (
    COLUMNS,
    FORMAT_VERSION,
    Array,
    Baselines,
    Event,
    RoundRow,
    RunInfo,
    check_shape,
    utc_now,
)

Status = Literal["running", "interrupted", "finished", "failed"]
StrPath = str | os.PathLike[str]


class ResultsWriter:
    """Keep a run's rounds, and put a whole new file in place whenever asked.

    Nothing is written before the first `write`. Only the server's process holds a writer.

    Args:
        path: the file to write; its folder must exist.
        info: what ran.
        rows: the rounds that a resumed run has already.
        events: that it has had.
    """

    def __init__(
        self, path: StrPath, info: RunInfo, rows: Iterable[RoundRow] = (), events: Iterable[Event] = ()
    ) -> None:
        # Resolved once: a later chdir changes nothing, and a symbolic link is followed, not replaced.
        self._path = Path(os.path.realpath(path))
        self._info = info
        self._rows: list[RoundRow] = list(rows)
        self._events: list[Event] = list(events)
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
        given = (c for c in COLUMNS if c.axis == "clients" and getattr(row, c.name) is not None)
        copies: dict[str, Any] = {c.name: np.array(getattr(row, c.name), dtype=c.dtype) for c in given}
        self._rows.append(replace(row, **copies))

    def note(self, text: str) -> None:
        """Add an event that happens now; it reaches the disk with the next `write`."""
        self._events.append(Event(utc_now(), len(self._rows), text))

    def set_status(self, status: Status) -> None:
        """Set the run's status: `running` (from the start), `interrupted`, `finished` or `failed`.

        Raises:
            ValueError: if it is none of them.
        """
        _check_choice("status", status, get_args(Status))
        self._status = status

    def set_baselines(self, baselines: Baselines) -> None:
        """Set what the bytes sent so far are to be compared with."""
        self._baselines = baselines

    def results(self) -> Results:
        """Return all that was added and set so far, as `read_results` would read it."""
        groups: dict[str, dict[str, Array]] = {"rounds": {}, "clients": {}}
        for column in COLUMNS:
            group, name = column.path.split("/")
            groups[group][name] = _decoded(column.stack(self._rows, self._info))
        return Results(
            info=self._info,
            status=self._status,
            rounds=groups["rounds"],
            clients=groups["clients"],
            baselines=self._baselines,
            events=list(self._events),
        )

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
            todo = (
                "free space or restore the folder: the last complete file is untouched, the next write "
                "holds every round"
            )
            raise refusal("results must be writable", error, self._path, todo) from error

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
                values = column.stack(self._rows, self._info)
                if not column.is_absent(values):
                    file[column.path] = values
            _write_attribute(file["rounds/module_ranks"], "module_names", self._info.module_names)
            _write_attribute(file["rounds/eval_metrics"], "metric_names", self._info.metric_names)
            _write_events(file, self._events)
            if self._baselines is not None:
                file.create_group("baselines").attrs.update(vars(self._baselines))
            file.flush()
            return bytes(file.id.get_file_image())


@dataclass(frozen=True, eq=False)
class Results:
    """What a results file holds.

    Args:
        info: what ran.
        status: `running` (or killed), `interrupted`, `finished` or `failed`.
        rounds: name to array of `/rounds`, shape (rounds,), `module_ranks` (rounds, modules),
            `eval_metrics` (rounds, metrics).
        clients: name to array of `/clients`, shape (rounds, clients).
        baselines: what the bytes compare with, if the run came to tell.
        events: what was out of the ordinary, in order.
    """

    info: RunInfo
    status: Status
    rounds: dict[str, Array]
    clients: dict[str, Array]
    baselines: Baselines | None
    events: list[Event]

    def rows(self) -> list[RoundRow]:
        """Return the rounds as they were added, for a run that goes on."""
        groups = {"rounds": self.rounds, "clients": self.clients}
        table = {c: groups[c.path.split("/")[0]][c.path.split("/")[1]] for c in COLUMNS}
        count = len(self.rounds["round_num"])
        return [RoundRow(**{c.name: c.value(table[c][i]) for c in COLUMNS}) for i in range(count)]


def read_results(path: StrPath) -> Results:
    """Read a results file, of a run that has ended or is still writing.

    Args:
        path: the file, or the run's folder.

    Raises:
        CheckpointError: if the file is missing, cut short, not a results file, or of a newer format.
    """
    given, path = path, os.path.join(path, RESULTS_FILE) if os.path.isdir(path) else path
    if not os.path.exists(path):
        raise CheckpointError(
            f"a run's folder must hold {RESULTS_FILE}, got {os.fspath(given)}, which holds none; "
            "name the --out of a `mpifedlora run`, once it has begun"
        )
    try:
        with h5py.File(path, "r") as file:
            return _read(file)
    except CheckpointError:
        raise
    # Of a damaged file, HDF5 and numpy say many things.
    except Exception as error:
        raise CheckpointError(
            f"results must be a complete file written by mpifedlora, got {error} ({os.fspath(path)}); "
            "name the results.h5 in a run's output folder"
        ) from error


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_row(row: RoundRow, last_round: int, info: RunInfo) -> None:
    if row.round_num <= last_round:
        raise ValueError(f"round_num must be above the last row's, got {row.round_num} after {last_round}")
    _check_choice("stage", row.stage, get_args(Stage))
    for column in COLUMNS:
        value = getattr(row, column.name)
        if value is not None or not column.is_optional:
            check_shape(f"{column.name} of round {row.round_num}", value, column.shape(info))


def _is_attribute(info_field: Field[Any]) -> bool:
    return info_field.type not in ("Ints", "Names")


def _write_info(file: h5py.File, info: RunInfo) -> None:
    for info_field in fields(info):
        value = getattr(info, info_field.name)
        if _is_attribute(info_field):
            _write_attribute(file, info_field.name, value)
        elif info_field.type == "Names":
            texts = np.array([_storable(text) for text in value], dtype=object)
            file.create_dataset(info_field.name, data=texts, dtype=h5py.string_dtype())
        else:
            file[info_field.name] = np.asarray(value, dtype=np.int64)


def _write_attribute(owner: h5py.HLObject, name: str, value: str | int | tuple[str, ...]) -> None:
    if isinstance(value, tuple):
        texts = np.array([_storable(text) for text in value], dtype=object)
        owner.attrs.create(name, texts, dtype=h5py.string_dtype())
    else:
        owner.attrs[name] = _storable(value) if isinstance(value, str) else value


def _write_events(file: h5py.File, events: Sequence[Event]) -> None:
    columns = zip(*events, strict=True) if events else ((), (), ())
    for name, values in zip(Event._fields, columns, strict=True):
        if name == "num_finished":
            file[f"events/{name}"] = np.array(values, np.int64)
        else:
            texts = np.array([_storable(text) for text in values], dtype=object)
            file.create_dataset(f"events/{name}", data=texts, dtype=h5py.string_dtype())


def _read_events(file: h5py.File) -> list[Event]:
    times, texts = read_texts(file, "events/time"), read_texts(file, "events/text")
    finished = read_array(file, "events/num_finished", "int64", (len(times),)).tolist()
    return [Event(*values) for values in zip(times, finished, texts, strict=True)]


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
        shape = count, *column.shape(info)
        if column.is_optional and column.path not in file:
            groups[group][name] = column.blank(shape)
        else:
            groups[group][name] = _decoded(read_array(file, column.path, column.dtype, shape))
    status = file.attrs["status"]
    _check_choice("status", status, get_args(Status))
    return Results(
        info=info,
        status=status,
        rounds=groups["rounds"],
        clients=groups["clients"],
        baselines=_read_baselines(file),
        events=_read_events(file),
    )


def _decoded(values: Array) -> Array:
    return values.astype("U") if values.dtype.kind == "S" else values


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
    values = {f.name: read_attribute(file, f.name, str(f.type)) for f in fields(RunInfo) if _is_attribute(f)}
    names = tuple(read_texts(file, "client_names"))
    shape = values["num_clients"], len(values["label_names"])
    return RunInfo(label_table=read_array(file, "label_table", "int64", shape), client_names=names, **values)


def _read_baselines(file: h5py.File) -> Baselines | None:
    if "baselines" not in file:
        return None
    attributes = file["baselines"].attrs
    return Baselines(**{f.name: int(attributes[f.name]) for f in fields(Baselines) if f.init})


def try_hdf5() -> str:
    """Write a file in memory as results are written, read it, and return HDF5's version.

    Raises:
        CheckpointError: if something else is read.
    """
    written = np.arange(8.0)
    options: dict[str, Any] = {"driver": "core", "backing_store": False, "libver": ("v108", "v108")}
    with h5py.File(secrets.token_hex(8), "w", **options) as file:
        file["rounds/x"] = written
        file.flush()
        content = bytes(file.id.get_file_image())
    with h5py.File(io.BytesIO(content), "r") as file:
        if not np.array_equal(file["rounds/x"][()], written):
            raise CheckpointError(f"HDF5 {h5py.version.hdf5_version} must read what it wrote; reinstall h5py")
    return str(h5py.version.hdf5_version)
