"""Who owns which training examples: shared out from one source that all see, or one file a client."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from mpifedlora.core.batches import Indices
from mpifedlora.core.cohort import share_out_files
from mpifedlora.core.config import RunConfig
from mpifedlora.core.partition import label_table, partition
from mpifedlora.core.tasks import label_column, value_columns
from mpifedlora.errors import ConfigError, DataError
from mpifedlora.io.client_files import ClientFile, ClientFiles, client_name
from mpifedlora.io.datasets import (
    Dataset,
    check_source,
    held_out_dataset,
    held_out_part,
    label_names_of,
    read_dataset,
)
from mpifedlora.io.row_streams import Columns
from mpifedlora.io.tables import Examples, Table, joined
from mpifedlora.runtime.agreement import agree
from mpifedlora.transport.base import Endpoint

if TYPE_CHECKING:
    from mpifedlora.training.task import EncodedExamples

Encode = Callable[[Examples], "EncodedExamples"]


class OwnParts(NamedTuple):
    """What each client has held out of its own examples.

    Args:
        sizes: how many, by client id.
        pins: see `FederatedData`.
        examples_of: gives them to a client's worker.
    """

    sizes: Sequence[int]
    pins: Sequence[int]
    examples_of: Callable[[int], Examples]


class FederatedData(Protocol):
    """What a process knows of the clients' data.

    Args:
        dataset: what models are measured on; of the training part, what this process may see.
        client_names: by client id; empty where clients have none.
        pins: the worker that trains each client, by client id; empty where any worker may.
    """

    @property
    def dataset(self) -> Dataset:
        """What models are measured on; of the training part, what this process may see."""

    @property
    def client_names(self) -> Sequence[str]:
        """Names by client id; empty where clients have none."""

    @property
    def pins(self) -> Sequence[int]:
        """The worker that trains each client, by client id; empty where any worker may."""

    @property
    def sizes(self) -> Sequence[int]:
        """Training examples by client id."""

    def label_table(self) -> Indices:
        """Return (num_clients, num_labels), each client's training examples by label."""

    def owned(self, part: str = "train") -> Examples:
        """Return all examples of `train`, `validation` or `test` that this process may see."""

    def own_parts(self, part: str) -> OwnParts | None:
        """Return what clients have held out as `validation` or `test`; None where all see one such part."""

    def encoded_by(self, encode: Encode) -> Callable[[int], EncodedExamples]:
        """Return a function that gives a client's training examples, encoded when first needed."""


@dataclass(frozen=True)
class SharedData:
    """A dataset that all processes see, and which client owns which of its training examples."""

    dataset: Dataset
    parts: list[Indices]
    client_names: tuple[str, ...] = ()
    pins: tuple[int, ...] = ()

    def label_table(self) -> Indices:
        """Return (num_clients, num_labels), each client's training examples by label."""
        return label_table(self.parts, self.dataset.train.labels, len(self.dataset.label_names))

    @property
    def sizes(self) -> list[int]:
        """Training examples by client id."""
        return [len(part) for part in self.parts]

    def owned(self, part: str = "train") -> Examples:
        """Return all examples of a part."""
        return self.dataset.part(part)

    def own_parts(self, part: str) -> None:
        """Say that all see one part to measure on."""

    def encoded_by(self, encode: Encode) -> Callable[[int], EncodedExamples]:
        """Return a function that gives a client's training examples; all are encoded when first needed."""

        @cache
        def encoded() -> EncodedExamples:
            return encode(self.dataset.train)

        @cache
        def take(client_id: int) -> EncodedExamples:
            return encoded().take(self.parts[client_id])

        return take


@dataclass(frozen=True)
class ClientData:
    """Clients that have a file each, of which a process has read only those that it owns.

    Args:
        dataset: without a training part.
        files: by client id.
        folder: that reads them.
        counts: by part, (num_clients, num_labels), as the owners have told.
        pins: see `FederatedData`.
        own: by part, examples of the clients that this process owns.
    """

    dataset: Dataset
    files: tuple[str, ...]
    folder: ClientFiles
    counts: Mapping[str, Indices]
    pins: tuple[int, ...]
    own: Mapping[int, Mapping[str, Examples]]

    @property
    def client_names(self) -> tuple[str, ...]:
        """Names by client id: the files' without their endings."""
        return tuple(client_name(file) for file in self.files)

    def label_table(self) -> Indices:
        """Return (num_clients, num_labels), each client's training examples by label."""
        return self.counts["train"]

    @property
    def sizes(self) -> list[int]:
        """Training examples by client id."""
        return self._sizes("train")

    def _sizes(self, part: str) -> list[int]:
        sizes: list[int] = self.counts[part].sum(axis=1).tolist()
        return sizes

    def owned(self, part: str = "train") -> Examples:
        """Return the examples of a part that this process may see."""
        if part != "train" and self.own_parts(part) is None:
            return self.dataset.part(part)
        return joined([parts[part] for parts in self.own.values()])

    def own_parts(self, part: str) -> OwnParts | None:
        """Return what clients have held out, unless there is a common source to test on."""
        if not self.folder.test_fraction:
            return None
        return OwnParts(self._sizes(part), self.pins, lambda client_id: self._examples(client_id)[part])

    def encoded_by(self, encode: Encode) -> Callable[[int], EncodedExamples]:
        """Return a function that gives a client's training examples."""
        return cache(lambda client_id: encode(self._examples(client_id)["train"]))

    def _examples(self, client_id: int) -> Mapping[str, Examples]:
        if client_id in self.own:
            return self.own[client_id]
        # Its worker has died: this one reads the file now, if it can.
        file = self.files[client_id]
        parts = self.folder.examples(file, self.folder.read(file), self.dataset.label_names)
        num_labels = len(self.dataset.label_names)
        for name, examples in parts.items():
            counts = np.bincount(examples.labels, minlength=num_labels)
            if not np.array_equal(counts, self.counts[name][client_id]):
                raise DataError(
                    f"a client's file must stay as it was while the run goes on, got other labels ({file}); "
                    "put it back"
                )
        return parts


def check_data(config: RunConfig) -> None:
    """Find in milliseconds what is wrong with the sources; clients' files are left to their workers.

    Raises:
        DataError: see `mpifedlora.io.datasets.check_source`.
    """
    data, wanted = config.data, _columns(config)
    source = data.test_source if data.partition == "files" else data.source
    if source is not None:
        check_source(source, data.test_source, wanted.values, wanted.label, wanted.owner)


def read_data(config: RunConfig, endpoint: Endpoint) -> FederatedData:
    """Read what this process may see of the examples; every process of the job calls it.

    Args:
        config: of the run, the same on all processes.
        endpoint: to the others.

    Raises:
        ConfigError: if another process could not read its part, or there are more files than clients.
        DataError: if this process could not.
    """
    if config.data.partition == "files":
        return _read_client_files(config, endpoint)
    return agree(endpoint, lambda: (_share_out(config), {}, ""))[0]


def _columns(config: RunConfig) -> Columns:
    data, task = config.data, config.task
    owner = data.partition_column if data.partition == "column" else None
    return Columns(value_columns(task, data), label_column(task, data), owner)


def _share_out(config: RunConfig) -> SharedData:
    data, federation, columns = config.data, config.federation, _columns(config)
    dataset = read_dataset(
        data.source,
        columns=columns.values,
        label_column=columns.label,
        test_source=data.test_source,
        test_fraction=data.test_fraction,
        validation_fraction=data.validation_fraction,
        partition_column=columns.owner,
        max_examples=data.max_examples,
        labels=data.labels,
        seed=federation.seed,
    )
    parts = partition(
        data.partition,
        dataset.train.labels,
        federation.num_clients,
        federation.seed,
        alpha=data.alpha,
        shards_per_client=data.shards_per_client,
        owners=dataset.owners,
    )
    return SharedData(dataset, parts)


def _read_client_files(config: RunConfig, endpoint: Endpoint) -> ClientData:
    """Let every worker read its own clients' files, and tell the others their names and label counts."""
    data, columns, worker_id = config.data, _columns(config), endpoint.trains_as
    holds_out = data.test_source is None
    fractions = (data.test_fraction, data.validation_fraction) if holds_out else (0.0, 0.0)
    folder = ClientFiles(Path(data.source).expanduser(), columns, *fractions, config.federation.seed)
    listed, _ = agree(endpoint, lambda: ([] if worker_id is None else folder.names(), {}, ""))
    seen: list[list[str]] = [json.loads(names) for names in endpoint.pool(json.dumps(listed).encode())]
    owners = share_out_files(seen[1:] or seen)  # the server lists nothing
    _check_clients(list(owners), config)

    def read() -> tuple[tuple[Table | None, dict[str, ClientFile]], Mapping[str, str], str]:
        own = {file: folder.read(file) for file, owner in owners.items() if owner == worker_id}
        return (None if holds_out else held_out_part(data.test_source or "", columns)(), own), {}, ""

    (held_out, own), _ = agree(endpoint, read)
    told = json.dumps({file: read.label_counts() for file, read in own.items()}).encode()
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for part in endpoint.pool(told):
        counts.update(json.loads(part))
    return _client_data(config, folder, owners, counts, held_out, own)


def _client_data(
    config: RunConfig,
    folder: ClientFiles,
    owners: Mapping[str, int],
    counts: Mapping[str, Mapping[str, Mapping[str, int]]],
    held_out: Table | None,
    own: Mapping[str, ClientFile],
) -> ClientData:
    data, files = config.data, tuple(owners)
    # No label loses its last training example to what is held out.
    found = set(held_out.labels if held_out else ()).union(*(counts[file]["train"] for file in files))
    has_labels = folder.columns.label is not None
    names = label_names_of(found, data.labels, data.source, has_labels=has_labels)
    examples = {files.index(file): folder.examples(file, read, names) for file, read in own.items()}
    tables = {
        part: np.array([[counts[file][part].get(name, 0) for name in names] for file in files], np.int64)
        for part in ("train", "validation", "test")
    }
    if held_out is None:
        _check_held_out(config, tables[config.evaluation.split])
    told = hashlib.sha256(json.dumps([files, *(table.tolist() for table in tables.values())]).encode())
    return ClientData(
        dataset=held_out_dataset(
            data.source,
            held_out,
            names,
            test_source=data.test_source or "",
            validation_fraction=data.validation_fraction,
            seed=config.federation.seed,
            training_digest=told.hexdigest(),
        ),
        files=files,
        folder=folder,
        counts=tables,
        pins=tuple(owners.values()),
        own=examples,
    )


def _check_held_out(config: RunConfig, table: Indices) -> None:
    if not table.any():
        key, source = f"{config.evaluation.split}_fraction", config.data.source
        raise DataError(
            f"{key} must hold out an example of one client's file at least and leave one of each label, got "
            f"{getattr(config.data, key)} ({source}); raise data.{key}, or name data.test_source"
        )


def _check_clients(files: Sequence[str], config: RunConfig) -> None:
    """Check what the workers have listed together."""
    source, num_clients = config.data.source, config.federation.num_clients
    names = [client_name(file) for file in files]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"clients must have one file each, got two of {twice!r} ({source}); move one away")
    if len(files) != num_clients:
        raise ConfigError(
            f"federation.num_clients must be the number of clients' files, got {num_clients} and "
            f"{len(files)} files ({source}); set federation.num_clients = {len(files)}"
        )
