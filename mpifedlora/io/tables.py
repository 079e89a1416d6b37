"""Tables: the rows of one source, column by column, and the examples that they become."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mpifedlora.core.partition import IntArray
from mpifedlora.errors import DataError
from mpifedlora.io.images import Images, stacked, to_pixels
from mpifedlora.io.row_streams import Columns

Column = tuple[Any, ...] | npt.NDArray[Any]
IMAGE = "image"
"""A task's name for a column of images."""
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


def joined(parts: Sequence[Examples]) -> Examples:
    """Return the examples of all parts, one after another; there is at least one."""
    columns = {name: _joined([part.columns[name] for part in parts]) for name in parts[0].columns}
    return Examples(columns, np.concatenate([part.labels for part in parts]))


def _joined(columns: Sequence[Column]) -> Column:
    if isinstance(columns[0], np.ndarray):
        return np.concatenate(columns)
    return tuple(chain.from_iterable(columns))


class Table(NamedTuple):
    """Values of one part as they were read, before labels and owners get numbers.

    Args:
        columns: by the task's names for them.
        labels: of each example.
        owners: of each example; empty where none are named.
    """

    columns: Mapping[str, Column]
    labels: list[str]
    owners: list[str]


def table_of_rows(rows: Iterable[tuple[Any, ...]], columns: Columns, where: str) -> Table:
    """Check the values of rows, and put them into columns.

    Args:
        rows: values in the order of `columns.wanted()`.
        columns: that were read.
        where: they come from.

    Raises:
        DataError: naming the row; or if there is none.
    """
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
    named = zip(columns.values, read, strict=False)
    return Table(
        {name: _column(name, column, where) for name, column in named}, labels, keys[0] if keys else []
    )


def table_of_images(images: Images, columns: Columns, where: str) -> Table:
    """Return the table of a source that holds images and their labels, and nothing else.

    Raises:
        DataError: see `check_columns_of_images`.
    """
    check_columns_of_images(columns, where)
    labels = images.labels if columns.label is not None else [UNLABELLED] * len(images.labels)
    return Table({IMAGE: images.pixels}, labels, [])


def check_columns_of_images(columns: Columns, where: str) -> None:
    """Check that nothing but images and labels is to be read.

    Raises:
        DataError: naming what else is.
    """
    if set(columns.values) != {IMAGE} or columns.owner is not None:
        wanted = [*(set(columns.values) - {IMAGE}), *([] if columns.owner is None else [columns.owner])]
        raise DataError(
            f"a source of images has no columns but the image and its label, got {', '.join(wanted)} to read "
            f'({where}); set task.name = "image-classification", or name another source'
        )


def _column(name: str, values: list[Any], where: str) -> Column:
    return stacked(values, where) if name == IMAGE else tuple(values)


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


def _messages(value: Any) -> str:
    """Return a conversation as JSON: a list of {role, content} that holds an answer."""
    try:
        turns = json.loads(value) if isinstance(value, str) else list(value)
        plain = [{"role": _text(turn["role"]), "content": _text(turn["content"])} for turn in turns]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"messages must be a list of {{role, content}}, got {value!r}") from error
    if not any(turn["role"] == "assistant" for turn in plain):
        raise ValueError(f"messages must hold a turn of the role assistant, got {value!r}")
    return json.dumps(plain)


_CLEANERS: Mapping[str, Callable[[Any], Any]] = {
    "text": _text,
    "prompt": _text,
    "response": _text,
    "messages": _messages,
    IMAGE: to_pixels,
}


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


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return names in the order in which they are numbered: integers by value, all else by name."""
    try:
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(names))


def numbers_of(values: Sequence[str], names: Sequence[str]) -> IntArray:
    """Return the position of each value in the names, int64."""
    number_of = {name: number for number, name in enumerate(names)}
    return np.array([number_of[value] for value in values], dtype=np.int64)


def examples_of(table: Table, label_names: Sequence[str], where: str) -> Examples:
    """Number the labels of a table.

    Raises:
        DataError: naming the first row whose label is unknown.
    """
    known = set(label_names)
    for number, label in enumerate(table.labels, 1):
        if label not in known:
            raise DataError(
                f"label must be one of {', '.join(map(repr, label_names))}, got {label!r} ({where}, row "
                f"{number}); correct the row, or data.labels"
            )
    return Examples(table.columns, numbers_of(table.labels, label_names))
