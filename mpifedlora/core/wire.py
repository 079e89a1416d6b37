"""What crosses the transport, as bytes: uplink rows (header and values), and the message of a round.

Headers are fixed-size little-endian records: nothing is pickled, nothing is parsed. Values go in one
of the wire dtypes of `core.codec`.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mpifedlora.core.agreement import Bytes
from mpifedlora.core.buffers import as_bytes, byte_buffer, padded, value_buffer
from mpifedlora.core.codec import decode, draw_uniform, encode, num_bytes
from mpifedlora.core.layout import AdapterLayout, ModelShapes, copy_common
from mpifedlora.core.plan import HEADER_BYTES, MAGIC, STAGES, RoundPlan, header_record, packer_of
from mpifedlora.core.seeding import numpy_generator
from mpifedlora.errors import ProtocolError

FAILED, LATE, POSTPONED = "failed", "late", "postponed"
VALUE_BYTES = 4
_FAULTS = ("", FAILED, LATE, POSTPONED)
_COPIED_VALUES = 2**18  # of a piece that is copied from a GPU while the piece before is sent
UPDATE_HEADER = header_record(
    round_num="<i4",
    client_id="<i4",
    stage="<i4",
    is_finite="<i4",
    fault="<i4",
    ranks_digest="<u4",
    num_examples="<i8",
    num_steps="<i8",
    staleness="<i8",
    num_bytes="<i8",
    train_loss="<f8",
    penalty="<f8",
    train_s="<f8",
)
_PACKER = packer_of(UPDATE_HEADER)


def ranks_digest(lora_ranks: Sequence[int]) -> int:
    """Return a 32-bit digest of the ranks, by which both ends know that they mean one layout."""
    return zlib.crc32(struct.pack(f"<{len(lora_ranks)}i", *lora_ranks))


@dataclass(frozen=True)
class WireFormat:
    """What values are sent as.

    Args:
        uplink: wire dtype of a client's update; other than `float32` it is the change since the broadcast.
        downlink: wire dtype of the message.
        has_feedback: whether what rounding has lost is added to the next message.
        seed: of the run, for stochastic rounding.
    """

    uplink: str = "float32"
    downlink: str = "float32"
    has_feedback: bool = False
    seed: int = 0

    @property
    def feeds_back(self) -> bool:
        """Whether clients keep what their updates' rounding has lost."""
        return self.has_feedback and self.uplink != "float32"

    def row_bytes(self, plan: RoundPlan, shapes: ModelShapes, client_id: int | None = None) -> int:
        """Bytes of a client's values in an uplink row; without a client, at the full ranks."""
        shared = plan.shared_layout(shapes, client_id)
        return num_bytes(self.uplink, shared) * (2 if plan.has_variates else 1)

    def message_bytes(self, plan: RoundPlan, shapes: ModelShapes) -> int:
        """Bytes of the message that follows the plan."""
        return sum(num_bytes(self.downlink, segment) for segment in plan.segments(shapes))

    def message_buffer(self, plan: RoundPlan, shapes: ModelShapes, *, is_pinned: bool = False) -> Tensor:
        """Return an empty buffer for the message, of whole units."""
        size = padded(self.message_bytes(plan, shapes))
        return byte_buffer(size, is_pinned=is_pinned)

    def as_message(self, plan: RoundPlan, shapes: ModelShapes, wire: Tensor) -> Tensor:
        """See a float32 message's bytes as values, (message_values,): no copy."""
        return wire[: VALUE_BYTES * plan.message_values(shapes)].view(torch.float32)

    def decode_message(self, plan: RoundPlan, shapes: ModelShapes, wire: Tensor) -> Tensor:
        """Return the values of a message, (message_values,) float32; under float32 a view of its bytes."""
        if self.downlink == "float32":
            return self.as_message(plan, shapes, wire)
        message = torch.empty(plan.message_values(shapes))
        offset = 0
        for layout, part in zip(plan.segments(shapes), plan.split(shapes, message), strict=True):
            end = offset + num_bytes(self.downlink, layout)
            decode(self.downlink, layout, wire[offset:end], part)
            offset = end
        return message

    def rounding(self, dtype: str, num_values: int, round_num: int, client_id: int = 0) -> Tensor | None:
        """Return the random numbers of stochastic rounding, (num_values,) in [0, 1), or None without it."""
        if dtype != "int8":
            return None
        purpose = "rounding of the uplink" if client_id else "rounding of the downlink"
        return draw_uniform(num_values, numpy_generator(self.seed, purpose, round_num, client_id))

    def encode_update(
        self, layout: AdapterLayout, change: Tensor, wire: Tensor, round_num: int, client_id: int
    ) -> None:
        """Write a client's change into its row; `change` becomes what this has lost of it.

        Args:
            layout: of what the client returns.
            change: (layout values,) float32 since the broadcast, overwritten.
            wire: (row_bytes,) uint8.
            round_num: of the round.
            client_id: whose it is.
        """
        uniform = self.rounding(self.uplink, layout.num_values, round_num, client_id + 1)
        encode(self.uplink, layout, change, wire, uniform)
        change.sub_(decode(self.uplink, layout, wire, torch.empty_like(change)))

    def decode_update(self, layout: AdapterLayout, wire: Tensor, reference: Tensor) -> Tensor:
        """Return what a client has trained, (layout values,) float32; the uplink is not float32.

        Args:
            layout: of what the client returns, or of a range of its pieces.
            wire: bytes of it.
            reference: (layout values,), what it was broadcast as.
        """
        return decode(self.uplink, layout, wire, torch.empty(layout.num_values)).add_(reference)


def broadcast_values(
    plan: RoundPlan, shapes: ModelShapes, state: Tensor, client_id: int | None = None
) -> Tensor:
    """Return what a client's shared values were broadcast as: (shared values,), maybe the state itself."""
    layout, shared = plan.layout(shapes), plan.shared_layout(shapes, client_id)
    if shared == layout:
        return state
    return copy_common(layout, state, shared, torch.empty(shared.num_values))


@dataclass(frozen=True)
class UpdateHeader:
    """What a client says of its update.

    Args:
        client_id: 0..num_clients-1.
        num_examples: the client's weight.
        num_steps: optimiser steps it took.
        train_loss: mean task loss over its steps.
        penalty: mean proximal penalty over its steps.
        train_s: seconds it trained.
        is_finite: whether all values are finite; not where there are none.
        fault: why there are none: FAILED, LATE, or POSTPONED where the client goes on in its next round; the
            row is then mere zeros.
        staleness: rounds since the client began, where it was late.
    """

    client_id: int
    num_examples: int
    num_steps: int
    train_loss: float
    penalty: float
    train_s: float
    is_finite: bool
    fault: str = field(default="", kw_only=True)
    staleness: int = field(default=0, kw_only=True)

    def write(self, rows: UpdateRows, index: int, plan: RoundPlan) -> None:
        """Write it into the header of a row."""
        _PACKER.pack_into(
            rows.headers[index],
            0,
            MAGIC,
            plan.round_num,
            self.client_id,
            STAGES.index(plan.stage),
            self.is_finite,
            _FAULTS.index(self.fault),
            ranks_digest(plan.lora_ranks),
            self.num_examples,
            self.num_steps,
            self.staleness,
            rows.sizes[index],
            self.train_loss,
            self.penalty,
            self.train_s,
        )

    @staticmethod
    def read(record: Bytes, plan: RoundPlan, client_id: int, size: int) -> UpdateHeader:
        """Read a header.

        Args:
            record: (HEADER_BYTES,), an UPDATE_HEADER.
            plan: of the round.
            client_id: whose header it must be.
            size: bytes that its values must have.

        Raises:
            ProtocolError: if it is not that client's answer to the plan.
        """
        magic, round_num, sender, _, is_finite, fault, digest, *others = _PACKER.unpack_from(record.data)
        num_examples, num_steps, staleness, num_bytes, loss, penalty, train_s = others
        expected = (MAGIC, plan.round_num, client_id, ranks_digest(plan.lora_ranks), size)
        if (magic, round_num, sender, digest, num_bytes) != expected:
            ranks = " of other ranks" if digest != expected[3] else ""
            raise ProtocolError(
                f"an update must answer round {plan.round_num} for client {client_id} with {size} bytes, got "
                f"round {round_num}, client {sender}, {num_bytes} bytes{ranks} (server); this is a defect: "
                "report it"
            )
        said = (sender, num_examples, num_steps, loss, penalty, train_s, bool(is_finite))
        return UpdateHeader(*said, fault=_FAULTS[fault], staleness=staleness)


@dataclass(frozen=True)
class ClientUpdate(UpdateHeader):
    """What one client returns.

    Args:
        values: (row_values,) float32: the shared layout, and behind it the change of its control variate.
    """

    values: Tensor


class UpdateRows:
    """Uplink rows of several clients: their headers, and a buffer of their values' bytes.

    Args:
        sizes: bytes of each client's values.
        device: where the buffer lies.
        is_pinned: whether the buffer is page-locked, for copies from a GPU.
    """

    def __init__(self, sizes: Sequence[int], *, device: str = "cpu", is_pinned: bool = False) -> None:
        self.sizes = tuple(sizes)
        self.headers = np.zeros((len(self.sizes), HEADER_BYTES), np.uint8)
        self.total = torch.empty(0)
        self._starts = [0, *itertools.accumulate(self._strides())]
        self.buffer = byte_buffer(self._room(), device=device, is_pinned=is_pinned).zero_()
        self.bytes = as_bytes(self.buffer)
        self._copies: list[tuple[int, torch.cuda.Event]] = []  # under way: first byte, and when it is done

    def _strides(self) -> list[int]:
        return [padded(size) for size in self.sizes]

    def _room(self) -> int:
        return self._starts[-1]

    def __len__(self) -> int:
        return len(self.sizes)

    def header(self, index: int) -> np.void:
        """Return the header of one row as a writable record, a view."""
        record: np.void = self.headers[index].view(UPDATE_HEADER)[0]
        return record

    def wire(self, index: int) -> Tensor:
        """Return the bytes of one client's values (sizes[index],), a view."""
        return self.buffer[self._starts[index] : self._starts[index] + self.sizes[index]]

    def fill(self, index: int, values: Tensor) -> None:
        """Copy a client's float32 values into its row; from a GPU in pieces, while the caller goes on."""
        target = self.wire(index).view(torch.float32)
        if values.device == target.device or not target.is_pinned():
            target.copy_(values)
            return
        for start in range(0, len(values), _COPIED_VALUES):
            piece = slice(start, start + _COPIED_VALUES)
            target[piece].copy_(values[piece], non_blocking=True)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
            self._copies.append((VALUE_BYTES * start, done))

    def settle(self, stop: int) -> None:
        """Wait until the first `stop` bytes of every row are there."""
        if self.buffer.is_cuda:
            torch.cuda.current_stream(self.buffer.device).synchronize()
        for first, done in self._copies:
            if first < stop:
                done.synchronize()
        self._copies = [copy for copy in self._copies if copy[0] >= stop]

    def close(self, index: int, counts: float) -> None:
        """Take note that a row is written: nothing is left to do, it is sent as it is."""


class SummedRows(UpdateRows):
    """Headers of several clients, and the weighted sum of their float32 values: memory of two rows.

    Args:
        sizes: bytes of each client's values, all the same.
        num_values: float32 values of each.
        dtype: what they are added up in, `float32` or `float64`.
        is_pinned: whether the row is page-locked, for copies from a GPU.
    """

    def __init__(self, sizes: Sequence[int], num_values: int, dtype: str, *, is_pinned: bool = False) -> None:
        super().__init__(sizes, is_pinned=is_pinned)
        self.total = value_buffer(num_values, dtype).zero_()

    def _strides(self) -> list[int]:
        return [0] * len(self.sizes)  # all clients use one row, in turn

    def _room(self) -> int:
        return padded(max(self.sizes, default=0))

    def close(self, index: int, counts: float) -> None:
        """Add the row to the sum, by what the client counts, unless its header says that it is not finite."""
        self.settle(self.sizes[index])
        if self.header(index)["is_finite"]:
            self.total.add_(self.wire(index).view(torch.float32), alpha=counts)


def fitting_rows(
    rows: UpdateRows | None, sizes: Sequence[int], *, device: str = "cpu", is_pinned: bool = False
) -> UpdateRows:
    """Return the given rows if they fit, else new ones: buffers are kept from round to round."""
    if rows is not None and rows.sizes == tuple(sizes):
        return rows
    return UpdateRows(sizes, device=device, is_pinned=is_pinned)


def read_headers(
    headers: Bytes, plan: RoundPlan, clients: Iterable[int], sizes: Iterable[int]
) -> list[UpdateHeader]:
    """Read headers in the order in which they came.

    Args:
        headers: (clients, HEADER_BYTES).
        plan: of the round.
        clients: whose headers they must be.
        sizes: bytes that each one's values must have.

    Raises:
        ProtocolError: if one is not the answer of the client that it should be of.
    """
    return [
        UpdateHeader.read(record, plan, client_id, size)
        for record, client_id, size in zip(headers, clients, sizes, strict=True)
    ]
