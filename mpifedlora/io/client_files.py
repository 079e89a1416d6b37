"""One file a client: the workers list the folder, and each file is read by its client's worker alone.

A client's file is a `.csv`, `.jsonl` or `.parquet` file, or a folder of images with a subfolder a label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mpifedlora.core.partition import IntArray, split_stratified
from mpifedlora.errors import DataError
from mpifedlora.io.datasets import open_tables
from mpifedlora.io.row_streams import SUFFIXES, Columns
from mpifedlora.io.tables import Examples, Table, examples_of, numbers_of, sorted_names


class ClientFile(NamedTuple):
    """What a client's file holds.

    Args:
        table: all of it.
        parts: rows of `train`, and of what the client holds out, `validation` and `test`.
    """

    table: Table
    parts: Mapping[str, IntArray]

    def label_counts(self) -> dict[str, dict[str, int]]:
        """Count the examples of each part by label: all that others learn of them."""
        labels = self.table.labels
        return {
            name: dict(Counter(labels[row] for row in rows.tolist())) for name, rows in self.parts.items()
        }


@dataclass(frozen=True)
class ClientFiles:
    """A folder with one file a client.

    Args:
        folder: that holds them; other processes may see other files in theirs.
        columns: to read.
        test_fraction: share of each file that is held out for testing, in [0, 1).
        validation_fraction: share of the rest that is held out for choices, in [0, 1).
        seed: of the run.
    """

    folder: Path
    columns: Columns
    test_fraction: float = 0.0
    validation_fraction: float = 0.0
    seed: int = 0

    def names(self) -> list[str]:
        """List the files, without those that begin with a dot or an underscore.

        Raises:
            DataError: if there is no such folder, or something else lies in it.
        """
        try:
            entries = sorted(entry for entry in self.folder.iterdir() if entry.name[0] not in "._")
        except OSError as error:
            raise DataError(
                f'data.source must be a folder of one file a client under partition = "files", got '
                f"{error.strerror} ({self.folder}); check the path"
            ) from error
        for entry in entries:
            if not entry.is_dir() and entry.suffix.lower() not in SUFFIXES:
                raise DataError(
                    f"a client's file must end in {', '.join(SUFFIXES)}, or be a folder of images, got "
                    f"{entry}; convert it, or move it away"
                )
        return [entry.name for entry in entries]

    def read(self, name: str) -> ClientFile:
        """Read a client's file; what it holds out follows from the seed and the file alone.

        Raises:
            DataError: naming the file and the row that is wrong.
        """
        table = open_tables(str(self.folder / name), self.columns)["train"]()
        labels = numbers_of(table.labels, sorted_names(set(table.labels)))
        rest, test = split_stratified(labels, self.test_fraction, self.seed, "test-split")
        kept, chosen = split_stratified(labels[rest], self.validation_fraction, self.seed, "validation-split")
        return ClientFile(table, {"train": rest[kept], "validation": rest[chosen], "test": test})

    def examples(self, name: str, read: ClientFile, label_names: Sequence[str]) -> dict[str, Examples]:
        """Number the labels of a client's file, and return its parts.

        Raises:
            DataError: naming the file and the first row whose label is unknown.
        """
        whole = examples_of(read.table, label_names, str(self.folder / name))
        return {
            part: whole if len(rows) == len(whole) else whole.take(rows) for part, rows in read.parts.items()
        }


def client_name(file_name: str) -> str:
    """Return what a client is called: its file's name without the ending.

    >>> client_name("clinic-7.jsonl"), client_name("site.a")
    ('clinic-7', 'site.a')
    """
    stem, dot, ending = file_name.rpartition(".")
    return stem if dot and f".{ending.lower()}" in SUFFIXES else file_name
