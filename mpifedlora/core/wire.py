"""Messages as bytes: the plan of a round, and the header of a client's update.

A downlink is a plan and then one flat buffer; an uplink row is a header and then the trained values.
Both headers are fixed-size little-endian records: nothing is pickled, nothing is parsed.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpifedlora.core.agreement import Bytes
from mpifedlora.core.layout import AdapterLayout, ModelShapes
from mpifedlora.core.schedule import Stage
from mpifedlora.errors import ProtocolError

HEADER_BYTES = 128
VALUE_BYTES = 4
ABSENT = -1
_ALIGNMENT = 64  # bytes: rows start on cache lines, so bits do not depend on a row's place
_MAGIC = 0x4C46504D
_STAGES: tuple[Stage, ...] = ("initiating", "annealing")
_SCOPES = ("adapter", "full")
_SENDS_BASE, _SENDS_STATE, _EVALUATES, _STOPS = 1, 2, 4, 8


def _record(**fields: str) -> np.dtype[np.void]:
    names = ["magic", *fields]
    formats = ["<i4", *fields.values()]
    offsets = np.cumsum([0, *(np.dtype(kind).itemsize for kind in formats)])[:-1].tolist()
    layout: Any = {"names": names, "formats": formats, "offsets": offsets, "itemsize": HEADER_BYTES}
    record: np.dtype[np.void] = np.dtype(layout)
    return record


PLAN_HEADER = _record(
    round_num="<i4",
    stage="<i4",
    scope="<i4",
    flags="<i4",
    num_modules="<i4",
    learning_rate="<f8",
    mu="<f8",
    temperature="<f8",
)
UPDATE_HEADER = _record(
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


@dataclass(frozen=True)
class RoundPlan:
    """What every process must know of a round before it trains.

    Args:
        round_num: 1..num_rounds; num_rounds + 1 carries the final model.
        stage: `initiating` or `annealing`.
        scope: `adapter` or `full`: what is trained.
        lora_ranks: rank of each module's active factors in this round.
        frozen_ranks: rank of the directions that were frozen by the last cut.
        sends_base: whether the message holds the base weights that the `full` stage has trained.
        sends_state: whether it holds the state to train on; not in round 1, where every process
            derives the same initial state from the weights and the seed.
        evaluates: whether the workers measure the incoming model before they train.
        stops: whether the workers end here.
        learning_rate: of this round.
        mu: proximal weight of this round.
        temperature: tau in [0, 1].
        workers: by client id, the worker that trains it, or ABSENT.
    """

    round_num: int
    stage: Stage
    scope: str
    lora_ranks: tuple[int, ...]
    frozen_ranks: tuple[int, ...]
    workers: tuple[int, ...]
    sends_base: bool = False
    sends_state: bool = False
    evaluates: bool = False
    stops: bool = False
    learning_rate: float = 0.0
    mu: float = 0.0
    temperature: float = 1.0

    @property
    def cohort(self) -> tuple[int, ...]:
        """Ids of the clients that train, in rising order."""
        return tuple(client for client, worker in enumerate(self.workers) if worker != ABSENT)

    def clients_of(self, worker_id: int) -> tuple[int, ...]:
        """Ids of the clients that a worker trains, in rising order."""
        return tuple(client for client, worker in enumerate(self.workers) if worker == worker_id)

    def layout(self, shapes: ModelShapes) -> AdapterLayout:
        """Layout of what is trained and returned in this round."""
        return shapes.full() if self.scope == "full" else shapes.adapter(self.lora_ranks)

    def segments(self, shapes: ModelShapes) -> tuple[AdapterLayout, AdapterLayout, AdapterLayout]:
        """Layouts of the message's three parts: base weights, frozen directions, state."""
        nothing = AdapterLayout((), ())
        return (
            shapes.base() if self.sends_base else nothing,
            shapes.directions(self.frozen_ranks),
            self.layout(shapes) if self.sends_state else nothing,
        )

    def message_values(self, shapes: ModelShapes) -> int:
        """Values in the flat buffer that follows the plan."""
        return sum(segment.num_values for segment in self.segments(shapes))

    def split(self, shapes: ModelShapes, message: Tensor) -> tuple[Tensor, ...]:
        """Return views of the message's three parts, flat."""
        sizes = [segment.num_values for segment in self.segments(shapes)]
        return torch.split(message, sizes)

    def row_bytes(self, shapes: ModelShapes) -> int:
        """Bytes of one client's uplink: header and values."""
        return HEADER_BYTES + VALUE_BYTES * self.layout(shapes).num_values

    def pack(self) -> Bytes:
        """Write the plan as plan_bytes(num_modules, num_clients) bytes."""
        header = np.zeros((), PLAN_HEADER)
        header["magic"], header["round_num"] = _MAGIC, self.round_num
        header["stage"], header["scope"] = _STAGES.index(self.stage), _SCOPES.index(self.scope)
        header["flags"] = (
            _SENDS_BASE * self.sends_base
            + _SENDS_STATE * self.sends_state
            + _EVALUATES * self.evaluates
            + _STOPS * self.stops
        )
        header["num_modules"] = len(self.lora_ranks)
        header["learning_rate"], header["mu"] = self.learning_rate, self.mu
        header["temperature"] = self.temperature
        tail = np.array([*self.lora_ranks, *self.frozen_ranks, *self.workers], "<i4")
        return np.frombuffer(header.tobytes() + tail.tobytes(), np.uint8).copy()

    @staticmethod
    def unpack(data: Bytes, num_modules: int) -> RoundPlan:
        """Read a packed plan.

        Raises:
            ProtocolError: if the bytes are not a plan for num_modules modules.
        """
        header = data[:HEADER_BYTES].view(PLAN_HEADER)[0]
        if header["magic"] != _MAGIC or header["num_modules"] != num_modules:
            raise ProtocolError(
                f"a plan must be for {num_modules} modules, got {int(header['num_modules'])} (worker); "
                "start all processes from one run file and one package version"
            )
        tail = data[HEADER_BYTES:].view("<i4").tolist()
        flags = int(header["flags"])
        return RoundPlan(
            round_num=int(header["round_num"]),
            stage=_STAGES[int(header["stage"])],
            scope=_SCOPES[int(header["scope"])],
            lora_ranks=tuple(tail[:num_modules]),
            frozen_ranks=tuple(tail[num_modules : 2 * num_modules]),
            workers=tuple(tail[2 * num_modules :]),
            sends_base=bool(flags & _SENDS_BASE),
            sends_state=bool(flags & _SENDS_STATE),
            evaluates=bool(flags & _EVALUATES),
            stops=bool(flags & _STOPS),
            learning_rate=float(header["learning_rate"]),
            mu=float(header["mu"]),
            temperature=float(header["temperature"]),
        )


def plan_bytes(num_modules: int, num_clients: int) -> int:
    """Bytes of a packed plan; the last 4 * num_clients say who trains where."""
    return downlink_header_bytes(num_modules) + 4 * num_clients


def downlink_header_bytes(num_modules: int) -> int:
    """Bytes of the part of a plan that a client would receive: header and both lists of ranks."""
    return HEADER_BYTES + 8 * num_modules


def ranks_digest(lora_ranks: Sequence[int]) -> int:
    """Return a 32-bit digest of the ranks, by which both ends know that they mean one layout."""
    return zlib.crc32(np.array(lora_ranks, "<i4").tobytes())


class UpdateRows:
    """Uplink rows of several clients in one buffer, each a header and then values (float32).

    Rows start on 64-byte borders, and so do the values: what is computed on a row does not depend
    on its place in the buffer.

    Args:
        num_rows: clients.
        num_values: values a client returns.
        is_pinned: whether the buffer is page-locked, for copies from a GPU.
    """

    def __init__(self, num_rows: int, num_values: int, *, is_pinned: bool = False) -> None:
        self.num_values = num_values
        self.row_bytes = HEADER_BYTES + VALUE_BYTES * num_values
        self.stride = -(-self.row_bytes // _ALIGNMENT) * _ALIGNMENT
        self.buffer = torch.zeros(num_rows * self.stride, dtype=torch.uint8, pin_memory=is_pinned)
        self.rows = self.buffer.view(num_rows, self.stride)

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    def values(self, index: int) -> Tensor:
        """Return the values of one row (num_values,) float32, a view."""
        return self.rows[index, HEADER_BYTES : self.row_bytes].view(torch.float32)

    def header(self, index: int) -> np.void:
        """Return the header of one row as a writable record, a view."""
        header: np.void = self.rows[index, :HEADER_BYTES].numpy().view(UPDATE_HEADER)[0]
        return header


def fitting_rows(
    rows: UpdateRows | None, num_rows: int, num_values: int, *, is_pinned: bool = False
) -> UpdateRows:
    """Return the given rows if they fit, else new ones: buffers are kept from round to round."""
    if rows is not None and (len(rows), rows.num_values) == (num_rows, num_values):
        return rows
    return UpdateRows(num_rows, num_values, is_pinned=is_pinned)


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
        values: (num_values,) float32 in the round's layout.
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
        header["magic"], header["round_num"] = _MAGIC, plan.round_num
        header["stage"] = _STAGES.index(plan.stage)
        header["ranks_digest"] = ranks_digest(plan.lora_ranks)
        header["num_values"] = rows.num_values
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
    def read(rows: UpdateRows, index: int, plan: RoundPlan) -> ClientUpdate:
        """Read a row; the values are a view of it.

        Raises:
            ProtocolError: if the row is not an answer to the plan.
        """
        header = rows.header(index)
        expected = (_MAGIC, plan.round_num, ranks_digest(plan.lora_ranks), rows.num_values)
        got = tuple(int(header[name]) for name in ("magic", "round_num", "ranks_digest", "num_values"))
        if got != expected:
            ranks = " of other ranks" if got[2] != expected[2] else ""
            raise ProtocolError(
                f"an update must answer round {plan.round_num} with {rows.num_values} values, got round "
                f"{got[1]} with {got[3]} values{ranks} (server, row {index}); this is a defect: report it"
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
