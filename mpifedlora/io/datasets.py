"""Sources -> examples: packaged texts, local files and the hub become numbered, split texts.

Every source is a stream of rows, checked when its first row is read. `read_dataset` takes all rows and
`check_source` one, so both raise the same errors.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import importlib
import importlib.util
import itertools
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mpifedlora.core.partition import IntArray, split_stratified
from mpifedlora.core.seeding import numpy_generator
from mpifedlora.errors import DataError
from mpifedlora.io.data_fetch import PACKAGED, packaged_folder, read_packaged

# Names that end so mean files rather than the hub, though no file that can be read here.
_OTHER_SUFFIXES = (".tsv", ".tab", ".txt", ".json", ".gz", ".zip", ".arrow", ".xlsx")

PACKAGED_TEXTS = tuple(name for name, entry in PACKAGED.items() if entry.kind == "data")

Rows = Generator[tuple[Any, ...], None, None]


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts with their label numbers, shape (num_examples,)."""

    texts: tuple[str, ...]
    labels: IntArray

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int] | IntArray) -> Examples:
        """Return the examples at these indices, in their order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Examples(tuple(self.texts[i] for i in chosen.tolist()), self.labels[chosen])


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples in three parts, with what the label numbers stand for.

    `owners` holds one owner number per training example, if a partition column was named. `digest` is a
    SHA-256 over label names, labels, texts and owners: equal where processes hold the same data.
    """

    name: str
    train: Examples
    validation: Examples
    test: Examples
    label_names: tuple[str, ...]
    owners: IntArray | None
    digest: str


class _Columns(NamedTuple):
    text: str
    label: str
    owner: str | None

    def wanted(self) -> list[tuple[str, str]]:
        """Pair each option with the column that it names."""
        pairs = [("text_column", self.text), ("label_column", self.label)]
        return pairs if self.owner is None else [*pairs, ("partition_column", self.owner)]


class _Table(NamedTuple):
    """Values of one part as they were read, before labels and owners get numbers."""

    texts: list[str]
    labels: list[str]
    owners: list[str]


def read_dataset(
    source: str,
    *,
    text_column: str = "text",
    label_column: str = "label",
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
        text_column: Column with the text; an absent text in a row counts as empty.
        label_column: Column with the label, text or integer.
        test_source: Source of the test part (its own test part, if it has one). Without it the test
            part of `source` is used or, if there is none, `test_fraction` is split off.
        test_fraction: Share to split off for testing, in (0, 1), stratified by label.
        validation_fraction: Share of the training part to hold out, in [0, 1), stratified by label.
        partition_column: Column that names each training example's owner.
        max_examples: Training examples to draw at most, before validation is held out.
        seed: The run's seed.

    Returns:
        The dataset. Labels are numbered in the order of their names (integers by value), over both
        parts; an empty validation part stands for none.

    Raises:
        DataError: The source is missing, malformed or too small, or lacks a column or a label.
    """
    columns = _Columns(text_column, label_column, partition_column)
    table, test_table = _read_tables(source, test_source, columns)
    names = _sorted_names({*table.labels, *(test_table.labels if test_table else ())})
    if len(names) < 2:
        raise DataError(
            f"there must be at least 2 labels, got {len(names)}: {names[0]!r} ({source}); add examples"
        )
    whole, owners = _examples(table, names), _numbers(table.owners, _sorted_names(set(table.owners)))
    rest = np.arange(len(whole), dtype=np.int64)
    test = _examples(test_table, names) if test_table else None
    if test is None:
        rest, held_out = _hold_out(whole, rest, test_fraction, seed, "test", source)
        test = whole.take(held_out)
    rest = _draw(rest, max_examples, seed)
    rest, held_out = _hold_out(whole, rest, validation_fraction, seed, "validation", source)
    parts = (whole.take(rest), whole.take(held_out), test)
    owned = owners[rest] if partition_column else None
    return Dataset(_name(source), *parts, names, owned, _digest(names, parts, owned))


def check_source(
    source: str, test_source: str | None, text_column: str, label_column: str, partition_column: str | None
) -> None:
    """Raise what `read_dataset` would raise, as far as the first row tells, within milliseconds.

    Args:
        source: As in `read_dataset`.
        test_source: As in `read_dataset`.
        text_column: As in `read_dataset`.
        label_column: As in `read_dataset`.
        partition_column: As in `read_dataset`.

    Raises:
        DataError: The source, its package or a column is missing, or the first row cannot be read.
    """
    columns = _Columns(text_column, label_column, partition_column)
    _check_one(source, columns)
    if test_source is not None:
        _check_one(test_source, columns._replace(owner=None))


def _check_one(source: str, columns: _Columns) -> None:
    if source in PACKAGED_TEXTS:
        _positions(["text", "label"], columns, source)
        packaged_folder(source)
    elif _is_file_source(source):
        with closing(_file_rows(Path(source).expanduser(), columns)) as rows:
            _table(itertools.islice(rows, 1), source)
    else:
        _check_installed("datasets", _hub_advice(source))


def _read_tables(source: str, test_source: str | None, columns: _Columns) -> tuple[_Table, _Table | None]:
    parts = _parts(source, columns)
    if test_source is None:
        test = parts.get("test")
    else:
        other = _parts(test_source, columns._replace(owner=None))
        test = other.get("test", other["train"])
    train = _table(parts["train"], source)
    return train, None if test is None else _table(test, test_source or source)


def _parts(source: str, columns: _Columns) -> dict[str, Rows]:
    """Open a source: `train` always, `test` where the source has one. Nothing is read yet."""
    if source in PACKAGED_TEXTS:
        return {part: _packaged_rows(source, part, columns) for part in ("train", "test")}
    if _is_file_source(source):
        return {"train": _file_rows(Path(source).expanduser(), columns)}
    return _hub_parts(source, columns)


def _is_file_source(source: str) -> bool:
    path = Path(source).expanduser()
    looks_so = source.startswith((".", "/", "~")) or source.count("/") > 1
    return looks_so or path.suffix.lower() in {*_READERS, *_OTHER_SUFFIXES} or path.is_file()


def _name(source: str) -> str:
    return Path(source).stem if _is_file_source(source) else source


# Streams of rows: each checks its columns, then yields their values in the order of _Columns.wanted.


def _packaged_rows(name: str, part: str, columns: _Columns) -> Rows:
    positions = _positions(["text", "label"], columns, name)
    lines = read_packaged(name, f"{part}.tab").decode().split("\n")
    # Three header lines; the files also hold a few blank lines, which are no examples.
    for line in filter(str.strip, lines[3:]):
        label, _, text = line.partition("\t")
        yield tuple((text, label)[position] for position in positions)


def _file_rows(path: Path, columns: _Columns) -> Rows:
    if not path.is_file():
        got = "a folder" if path.is_dir() else "a file that does not exist"
        raise DataError(f"source must be a file, got {got} ({path}); check the path")
    if path.suffix.lower() not in _READERS:
        raise DataError(
            f"a source file must end in {', '.join(_READERS)}, got {path.suffix!r} ({path}); convert it"
        )
    try:
        yield from _READERS[path.suffix.lower()](path, columns)
    except UnicodeDecodeError as error:
        raise DataError(
            f"text must be UTF-8, got {error.reason} ({path}:{_first_bad_line(path)}); convert the file, for "
            "example with `iconv -f latin1 -t utf-8`"
        ) from error
    except OSError as error:
        raise DataError(f"source must be readable, got {error} ({path}); check the file") from error


def _csv_rows(path: Path, columns: _Columns) -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as file, _long_csv_fields():
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            positions = _positions(header, columns, str(path)) if header else []
            for row in filter(None, reader):
                if len(row) != len(header):
                    raise csv.Error(f"{len(row)} fields under a header of {len(header)}")
                yield tuple(row[position] for position in positions)
        except csv.Error as error:
            raise DataError(
                f"source must be well-formed CSV, got {error} ({path}:{reader.line_num}); separate fields by "
                'commas, quote fields that hold commas or line breaks, and double a " inside them'
            ) from error


@contextmanager
def _long_csv_fields() -> Iterator[None]:
    # The csv module refuses fields beyond 131,072 characters; the limit belongs to the whole process.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _jsonl_rows(path: Path, columns: _Columns) -> Rows:
    wanted = [column for _, column in columns.wanted()]
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                record = _json_object(line, f"{path}:{number}")
                if not record.keys() >= set(wanted):
                    _positions(list(record), columns, f"{path}:{number}")
                yield tuple(record[column] for column in wanted)


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"every line must be a JSON object, got {error} ({where}); correct the line"
        ) from error
    if not isinstance(record, dict):
        got = type(record).__name__
        raise DataError(f"every line must be a JSON object, got a {got} ({where}); write one object per line")
    return record


def _parquet_rows(path: Path, columns: _Columns) -> Rows:
    arrow = _require("pyarrow", f"reading {path} needs the package pyarrow; run `pip install pyarrow`")
    parquet = importlib.import_module("pyarrow.parquet")
    wanted = [column for _, column in columns.wanted()]
    try:
        # Mapped, so that looking at the first rows does not read a whole row group.
        with parquet.ParquetFile(path, memory_map=True) as file:
            _positions(file.schema_arrow.names, columns, str(path))
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                yield from zip(*(batch.column(column).to_pylist() for column in wanted), strict=True)
    except arrow.ArrowException as error:
        raise DataError(
            f"source must be a readable Parquet file, got {error} ({path}); write it again"
        ) from error


_READERS: dict[str, Callable[[Path, _Columns], Rows]] = {
    ".csv": _csv_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
}


def _hub_parts(source: str, columns: _Columns) -> dict[str, Rows]:
    hub = _require("datasets", _hub_advice(source))
    try:
        parts = hub.load_dataset(source)
    except Exception as error:  # the hub's errors have no common base
        raise DataError(
            f"{source!r} must be a dataset on the hub, got {error}; {_near_packaged(source)}"
        ) from error
    if "train" not in parts:
        raise DataError(
            f"a hub dataset must have a part 'train', got {_listed(parts)} ({source}); use another one"
        )
    wanted = {"train": columns, "test": columns._replace(owner=None)}
    return {part: _hub_rows(parts[part], wanted[part], source) for part in wanted if part in parts}


def _hub_rows(part: Any, columns: _Columns, source: str) -> Rows:
    _positions(part.column_names, columns, source)
    values = {column: list(part[column]) for _, column in columns.wanted()}
    if names := getattr(part.features[columns.label], "names", None):
        # Out of range: the hub writes -1 where a label is withheld.
        values[columns.label] = [names[i] if i in range(len(names)) else None for i in values[columns.label]]
    yield from zip(*(values[column] for _, column in columns.wanted()), strict=True)


def _check_installed(package: str, advice: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise DataError(advice)


def _require(package: str, advice: str) -> Any:
    _check_installed(package, advice)
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DataError(f"the package {package} must be importable, got {error}; install it again") from error


def _hub_advice(source: str) -> str:
    return (
        f"source must be a packaged name, an existing file or a hub name, got {source!r}, which is neither "
        f"of the first two; {_near_packaged(source)}, or run `pip install datasets` to read from the hub"
    )


def _near_packaged(source: str) -> str:
    near = difflib.get_close_matches(source.lower(), PACKAGED_TEXTS, 1)
    return f"did you mean {near[0]!r}?" if near else f"packaged are {', '.join(PACKAGED_TEXTS)}"


# From rows to numbered examples.


def _positions(names: Sequence[str], columns: _Columns, where: str) -> list[int]:
    """Find the wanted columns among those that are there."""
    for option, column in columns.wanted():
        if names.count(column) > 1:
            raise DataError(f"column names must differ, got {column!r} twice ({where}); rename one")
        if column not in names:
            raise DataError(
                f"{option} must name a column, got {column!r} where there are {_listed(names)} ({where}); "
                f"{_near_column(option, column, names)}"
            )
    return [names.index(column) for _, column in columns.wanted()]


def _near_column(option: str, column: str, names: Iterable[str]) -> str:
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(column.lower(), by_lower, 1)
    return f"did you mean {by_lower[near[0]]!r}?" if near else f"set data.{option} to one of them"


def _listed(names: Iterable[str]) -> str:
    shown = [repr(name) for name in itertools.islice(names, 21)]
    return ", ".join(shown[:20] + ["..."] * (len(shown) > 20)) or "none"


def _table(rows: Iterable[tuple[Any, ...]], where: str) -> _Table:
    table = _Table([], [], [])
    for number, values in enumerate(rows, 1):
        try:
            for column, clean, value in zip(table, _CLEANERS, values, strict=False):
                column.append(clean(value))
        except ValueError as error:
            raise DataError(f"{error} ({where}, row {number}); correct or remove the row") from error
    if not table.texts:
        raise DataError(
            f"source must hold at least one example, got none ({where}); add rows or check the path"
        )
    return table


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


_CLEANERS: tuple[Callable[[Any], str], ...] = (_text, _label, _owner)


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


def _examples(table: _Table, names: Sequence[str]) -> Examples:
    return Examples(tuple(table.texts), _numbers(table.labels, names))


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
    pairs = [
        (names, np.empty(0, np.int64) if owners is None else owners),
        *((p.texts, p.labels) for p in parts),
    ]
    for texts, numbers in pairs:
        encoded = [text.encode() for text in texts]
        # Lengths first, so that no two datasets spell the same bytes.
        head = [len(texts), len(numbers), *map(len, encoded)]
        for content in (np.array(head, "<i8").tobytes(), *encoded, numbers.astype("<i8").tobytes()):
            digest.update(content)
    return digest.hexdigest()


def _first_bad_line(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1
