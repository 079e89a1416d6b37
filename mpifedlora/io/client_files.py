"""One file a client: the workers list the folder, and each file is read by its client's worker alone.

A client's file is a `.csv`, `.jsonl` or `.parquet` file, or a folder of images with a subfolder a label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mpifedlora.errors import DataError
from mpifedlora.io.datasets import open_tables
from mpifedlora.io.row_streams import SUFFIXES, Columns
from mpifedlora.io.tables import Examples, Table, examples_of


@dataclass(frozen=True)
class ClientFiles:
    """A folder with one file a client.

    Args:
        folder: that holds them; other processes may see other files in theirs.
        columns: to read.
    """

    folder: Path
    columns: Columns

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

    def read(self, name: str) -> Table:
        """Read a client's file.

        Raises:
            DataError: naming the file and the row that is wrong.
        """
        return open_tables(str(self.folder / name), self.columns)["train"]()

    def examples(self, name: str, table: Table, label_names: Sequence[str]) -> Examples:
        """Number the labels of a client's table.

        Raises:
            DataError: naming the file and the first row whose label is unknown.
        """
        return examples_of(table, label_names, str(self.folder / name))


def client_name(file_name: str) -> str:
    """Return what a client is called: its file's name without the ending.

    >>> client_name("clinic-7.jsonl"), client_name("site.a")
    ('clinic-7', 'site.a')
    """
    stem, dot, ending = file_name.rpartition(".")
    return stem if dot and f".{ending.lower()}" in SUFFIXES else file_name


def label_counts(table: Table) -> dict[str, int]:
    """Count a client's examples by label: all that others learn of them."""
    return dict(Counter(table.labels))
