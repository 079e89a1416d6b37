"""Uplink rows as bytes: the header and the values that one client returns.

Headers are fixed-size little-endian records: nothing is pickled, nothing is parsed.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpifedlora.core.layout import ModelShapes
from mpifedlora.core.plan import HEADER_BYTES, MAGIC, STAGES, RoundPlan, header_record
from mpifedlora.errors import ProtocolError

VALUE_BYTES = 4
_ALIGNMENT = 64  # bytes: rows start on cache lines, so bits do not depend on a row's place

UPDATE_HEADER = header_record(
    round_num="<i4",
    client_id="<i4",
    stage="<i4",
    is_finite="<i4",
    ranks_digest="<u4",
    num_examples="<i8",
    num_steps="<i8",
    num_values="<i8",
    train_loss="<f8",
    penalty="<f8",
    train_s="<f8",
)


def ranks_digest(lora_ranks: Sequence[int]) -> int:
    """Return a 32-bit digest of the ranks, by which both ends know that they mean one layout."""
    return zlib.crc32(np.array(lora_ranks, "<i4").tobytes())


class UpdateRows:
    """Uplink rows of several clients in one buffer, each a header and then values (float32).

    Rows start on 64-byte borders, and so do the values: what is computed on a row does not depend
    on its place in the buffer.

    Args:
        sizes: values that each client returns.
        is_pinned: whether the buffer is page-locked, for copies from a GPU.
    """

    def __init__(self, sizes: Sequence[int], *, is_pinned: bool = False) -> None:
        self.sizes = tuple(sizes)
        self._starts = [0, *itertools.accumulate(row_stride(size) for size in self.sizes)]
        self.buffer = torch.zeros(self._starts[-1], dtype=torch.uint8, pin_memory=is_pinned)

    def __len__(self) -> int:
        return len(self.sizes)

    def values(self, index: int) -> Tensor:
        """Return the values of one row (sizes[index],) float32, a view."""
        first = self._starts[index] + HEADER_BYTES
        return self.buffer[first : first + VALUE_BYTES * self.sizes[index]].view(torch.float32)

    def header(self, index: int) -> np.void:
        """Return the header of one row as a writable record, a view."""
        first = self._starts[index]
        header: np.void = self.buffer[first : first + HEADER_BYTES].numpy().view(UPDATE_HEADER)[0]
        return header


def row_stride(num_values: int) -> int:
    """Bytes that a row of so many values takes in the buffer."""
    return -(-(HEADER_BYTES + VALUE_BYTES * num_values) // _ALIGNMENT) * _ALIGNMENT


def fitting_rows(rows: UpdateRows | None, sizes: Sequence[int], *, is_pinned: bool = False) -> UpdateRows:
    """Return the given rows if they fit, else new ones: buffers are kept from round to round."""
    if rows is not None and rows.sizes == tuple(sizes):
        return rows
    return UpdateRows(sizes, is_pinned=is_pinned)


@dataclass(frozen=True)
class ClientUpdate:
    """What one client returns.

    Args:
        client_id: 0..num_clients-1.
        num_examples: the client's weight.
        num_steps: optimiser steps it took.
        train_loss: mean task loss over its steps.
        penalty: mean proximal penalty over its steps.
        train_s: seconds it trained.
        is_finite: whether all values are finite.
        values: (row_values,) float32: the shared layout, and behind it the change of its control variate.
    """

    client_id: int
    num_examples: int
    num_steps: int
    train_loss: float
    penalty: float
    train_s: float
    is_finite: bool
    values: Tensor

    def write_header(self, rows: UpdateRows, index: int, plan: RoundPlan) -> None:
        """Write everything but the values into the header of a row."""
        header = rows.header(index)
        header["magic"], header["round_num"] = MAGIC, plan.round_num
        header["stage"] = STAGES.index(plan.stage)
        header["ranks_digest"] = ranks_digest(plan.lora_ranks)
        header["num_values"] = rows.sizes[index]
        for name in (
            "client_id",
            "num_examples",
            "num_steps",
            "train_loss",
            "penalty",
            "train_s",
            "is_finite",
        ):
            header[name] = getattr(self, name)

    @staticmethod
    def read(rows: UpdateRows, index: int, plan: RoundPlan, client_id: int) -> ClientUpdate:
        """Read a client's row; the values are a view of it.

        Raises:
            ProtocolError: if the row is not that client's answer to the plan.
        """
        header = rows.header(index)
        names = ("magic", "round_num", "client_id", "ranks_digest", "num_values")
        expected = (MAGIC, plan.round_num, client_id, ranks_digest(plan.lora_ranks), rows.sizes[index])
        got = tuple(int(header[name]) for name in names)
        if got != expected:
            ranks = " of other ranks" if got[3] != expected[3] else ""
            raise ProtocolError(
                f"an update must answer round {plan.round_num} for client {client_id} with {expected[4]} "
                f"values, got round {got[1]}, client {got[2]}, {got[4]} values{ranks} (server, row {index}); "
                "this is a defect: report it"
            )
        return ClientUpdate(
            client_id=int(header["client_id"]),
            num_examples=int(header["num_examples"]),
            num_steps=int(header["num_steps"]),
            train_loss=float(header["train_loss"]),
            penalty=float(header["penalty"]),
            train_s=float(header["train_s"]),
            is_finite=bool(header["is_finite"]),
            values=rows.values(index),
        )


def row_sizes(plan: RoundPlan, shapes: ModelShapes, num_workers: int) -> list[list[int]]:
    """Return, by worker, the values of its clients' rows in the order in which they are sent."""
    return [
        [plan.row_values(shapes, client_id) for client_id in plan.clients_of(worker_id)]
        for worker_id in range(num_workers)
    ]


def read_rows(
    rows: UpdateRows, plan: RoundPlan, workers: Iterable[int], first: int = 0
) -> list[ClientUpdate]:
    """Read the rows of some workers, one after another.

    Args:
        rows: what they sent.
        plan: of the round.
        workers: their ids.
        first: rows to pass over.

    Raises:
        ProtocolError: if a row is not the answer of the client that it should be of.
    """
    clients = [client_id for worker_id in workers for client_id in plan.clients_of(worker_id)]
    return [
        ClientUpdate.read(rows, first + index, plan, client_id) for index, client_id in enumerate(clients)
    ]
