"""The plan of a round: what every process must know before it trains, and how it goes as bytes.

A downlink is a plan and then one flat buffer, whose layout follows from the plan.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mpifedlora.core.agreement import Bytes
from mpifedlora.core.layout import AdapterLayout, ModelShapes, Parts, TensorShape
from mpifedlora.core.schedule import Stage
from mpifedlora.errors import ProtocolError

HEADER_BYTES = 128
MAGIC = 0x4C46504D
STAGES: tuple[Stage, ...] = ("initiating", "annealing")
ABSENT = -1
_UNLIMITED = 2**31 - 1
_SCOPES = ("adapter", "full", "a", "b")
_PARTS: tuple[Parts, ...] = ("", "a", "b", "ab")
_CODES = {"<i4": "i", "<u4": "I", "<i8": "q", "<f8": "d"}
_FLAGS = (
    "sends_base",
    "sends_state",
    "evaluates",
    "stops",
    "keeps_b",
    "keeps_head",
    "has_variates",
    "reduces",
)


def header_record(**fields: str) -> np.dtype[np.void]:
    """Return a little-endian record of HEADER_BYTES that begins with the magic number; fields are aligned."""
    formats = ["<i4", *fields.values()]
    layout: Any = {"names": ["magic", *fields], "formats": formats, "itemsize": HEADER_BYTES}
    record: np.dtype[np.void] = np.dtype(layout, align=True)
    return record


def packer_of(record: np.dtype[np.void]) -> struct.Struct:
    """Return what packs and unpacks a record's numbers; numpy takes several times as long.

    >>> packer_of(header_record(mu="<f8", round_num="<i4")).format
    '<ixxxxdi'
    """
    assert record.fields is not None
    form, end = "<", 0
    for dtype, offset, *_ in record.fields.values():
        form += "x" * (offset - end) + _CODES[dtype.str]
        end = offset + dtype.itemsize
    return struct.Struct(form)


PLAN_HEADER = header_record(
    round_num="<i4",
    stage="<i4",
    scope="<i4",
    sends_parts="<i4",
    flags="<i4",
    num_modules="<i4",
    learning_rate="<f8",
    mu="<f8",
    temperature="<f8",
)
_FIELDS, _PACKER = PLAN_HEADER.names or (), packer_of(PLAN_HEADER)

_NOTHING = AdapterLayout((), ())


class Segments(NamedTuple):
    """The parts of a message, in order: their layouts, or their flat values."""

    base: Any
    frozen: Any
    maps: Any
    variate: Any
    state: Any


@dataclass(frozen=True)
class RoundPlan:
    """What every process must know of a round before it trains.

    Args:
        round_num: 1..num_rounds; num_rounds + 1 carries the final model.
        stage: `initiating` or `annealing`.
        scope: what is trained: `adapter`, `full`, or one factor only, `a` or `b`; head included.
        lora_ranks: rank of each module's active factors in this round.
        frozen_ranks: rank of what is added to each module's base weight before this round; DENSE
            where it comes as a whole matrix.
        workers: by client id, the worker that trains it, or ABSENT.
        mapped_ranks: rank of each module before the cut that the message's maps carry kept control
            variates through; none without such a cut.
        client_ranks: by client id, the rank that the client trains at most; none means no limit.
        state_rounds: by client id, the round whose client state holds, 0 before there is one; none
            means that clients keep nothing.
        sends_base: whether the message holds the base weights that the `full` stage has trained.
        sends_state: whether it holds the state to train on; not in round 1, where every process
            derives the same initial state from the weights and the seed.
        sends_parts: which factors it holds then; a process keeps those that did not change. None
            means that all restart, drawn from seed and round number.
        keeps_b: whether B stays with its client, and only A and the head are shared.
        keeps_head: whether the head stays too, then.
        has_variates: whether control variates go with state and updates (SCAFFOLD).
        reduces: whether the workers add up their clients' updates, and the server receives one sum.
        evaluates: whether the workers measure the incoming model before they train.
        stops: whether the workers end here.
        learning_rate: of this round.
        mu: proximal weight of this round.
        temperature: tau in [0, 1].
    """

    round_num: int
    stage: Stage
    scope: str
    lora_ranks: tuple[int, ...]
    frozen_ranks: tuple[int, ...]
    workers: tuple[int, ...]
    mapped_ranks: tuple[int, ...] = ()
    client_ranks: tuple[int, ...] = ()
    state_rounds: tuple[int, ...] = ()
    sends_base: bool = False
    sends_state: bool = False
    sends_parts: Parts = "ab"
    keeps_b: bool = False
    keeps_head: bool = False
    has_variates: bool = False
    reduces: bool = False
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

    @property
    def restarts(self) -> bool:
        """Whether all factors are drawn anew before this round."""
        return self.scope != "full" and (not self.sends_state or self.sends_parts == "")

    @property
    def is_partial(self) -> bool:
        """Whether a later message of the same stage may hold only some of the factors."""
        return self.scope in ("a", "b") or self.keeps_b

    def stopped(self) -> RoundPlan:
        """Return a plan like this one that ends the workers; no message goes with it."""
        nothing = (0,) * len(self.lora_ranks)
        kept = replace(self, frozen_ranks=nothing, mapped_ranks=(), evaluates=False)
        return replace(kept, sends_base=False, sends_state=False, stops=True)

    def layout(self, shapes: ModelShapes) -> AdapterLayout:
        """Layout of the whole state: every weight, or A, B and the head."""
        return shapes.full() if self.scope == "full" else shapes.adapter(self.lora_ranks)

    def _ranks(self, client_id: int | None) -> tuple[int, ...]:
        if client_id is None or not self.client_ranks:
            return self.lora_ranks
        largest = self.client_ranks[client_id]
        return tuple(min(lora_rank, largest) for lora_rank in self.lora_ranks)

    def trained_layout(self, shapes: ModelShapes, client_id: int | None = None) -> AdapterLayout:
        """Layout of what a client trains; without a client, at the full ranks."""
        if self.scope == "full":
            return shapes.full()
        parts: dict[str, Parts] = {"adapter": "ab", "a": "a", "b": "b"}
        return shapes.adapter(self._ranks(client_id), parts[self.scope])

    def shared_layout(self, shapes: ModelShapes, client_id: int | None = None) -> AdapterLayout:
        """Layout of what a client returns; without a client, at the full ranks."""
        trained = self.trained_layout(shapes, client_id)
        if not self.keeps_b:
            return trained
        return replace(trained, parts="a", whole=() if self.keeps_head else trained.whole)

    def personal_layout(self, shapes: ModelShapes, client_id: int) -> AdapterLayout:
        """Layout of what stays with a client under `keeps_b`: its B, and its head under `keeps_head`."""
        trained = self.trained_layout(shapes, client_id)
        return replace(trained, parts="b", whole=trained.whole if self.keeps_head else ())

    def row_values(self, shapes: ModelShapes, client_id: int) -> int:
        """Values in a client's uplink row."""
        return self.shared_layout(shapes, client_id).num_values * (2 if self.has_variates else 1)

    def segments(self, shapes: ModelShapes) -> Segments:
        """Layouts of the message's parts: base weights, frozen directions, maps, control variate, state."""
        shared = self.shared_layout(shapes)
        is_whole = self.scope == "full" or self.sends_parts == shared.parts
        state = shared if is_whole else replace(shared, parts=self.sends_parts)
        return Segments(
            shapes.base() if self.sends_base else _NOTHING,
            shapes.frozen(self.frozen_ranks),
            self._maps_layout(shapes) if self.mapped_ranks else _NOTHING,
            shared if self.has_variates and self.sends_state else _NOTHING,
            state if self.sends_state else _NOTHING,
        )

    def _maps_layout(self, shapes: ModelShapes) -> AdapterLayout:
        pairs = zip(shapes.modules, self.mapped_ranks, self.lora_ranks, strict=False)
        sides = [(module.name, shape) for module, old, new in pairs for shape in ((new, old), (old, new))]
        return AdapterLayout((), (), tuple(TensorShape(name, shape) for name, shape in sides))

    def message_values(self, shapes: ModelShapes) -> int:
        """Values in the flat buffer that follows the plan."""
        return sum(segment.num_values for segment in self.segments(shapes))

    def split(self, shapes: ModelShapes, message: Tensor) -> Segments:
        """Return views of the message's parts, flat."""
        sizes = [segment.num_values for segment in self.segments(shapes)]
        return Segments(*torch.split(message, sizes))

    def pack(self) -> Bytes:
        """Write the plan as plan_bytes(num_modules, num_clients) bytes."""
        header = _PACKER.pack(
            MAGIC,
            self.round_num,
            STAGES.index(self.stage),
            _SCOPES.index(self.scope),
            _PARTS.index(self.sends_parts),
            sum(getattr(self, name) << bit for bit, name in enumerate(_FLAGS)),
            len(self.lora_ranks),
            self.learning_rate,
            self.mu,
            self.temperature,
        )
        num_clients = len(self.workers)
        limits = self.client_ranks or (_UNLIMITED,) * num_clients
        versions = self.state_rounds or (ABSENT,) * num_clients
        mapped = self.mapped_ranks or (0,) * len(self.lora_ranks)
        tail = (*self.lora_ranks, *self.frozen_ranks, *mapped, *self.workers, *limits, *versions)
        packed = header.ljust(HEADER_BYTES, b"\0") + struct.pack(f"<{len(tail)}i", *tail)
        return np.frombuffer(bytearray(packed), np.uint8)

    @staticmethod
    def unpack(data: Bytes, num_modules: int) -> RoundPlan:
        """Read a packed plan.

        Raises:
            ProtocolError: if the bytes are not a plan for num_modules modules.
        """
        header = dict(zip(_FIELDS, _PACKER.unpack_from(data.data), strict=True))
        if header["magic"] != MAGIC or header["num_modules"] != num_modules:
            raise ProtocolError(
                f"a plan must be for {num_modules} modules, got {header['num_modules']} (worker); "
                "start all processes from one run file and one package version"
            )
        lists = _read_lists(data[HEADER_BYTES:].tobytes(), num_modules)
        lora_ranks, frozen_ranks, mapped_ranks, workers, client_ranks, state_rounds = lists
        flags = {name: bool(header["flags"] >> bit & 1) for bit, name in enumerate(_FLAGS)}
        return RoundPlan(
            round_num=header["round_num"],
            stage=STAGES[header["stage"]],
            scope=_SCOPES[header["scope"]],
            lora_ranks=lora_ranks,
            frozen_ranks=frozen_ranks,
            workers=workers,
            mapped_ranks=mapped_ranks,
            client_ranks=client_ranks,
            state_rounds=state_rounds,
            sends_parts=_PARTS[header["sends_parts"]],
            learning_rate=header["learning_rate"],
            mu=header["mu"],
            temperature=header["temperature"],
            **flags,
        )


@lru_cache(maxsize=2)
def _read_lists(tail: bytes, num_modules: int) -> tuple[tuple[int, ...], ...]:
    # A long plan is mostly these, and from round to round they are often the same.
    values = struct.unpack(f"<{len(tail) // 4}i", tail)
    numbers, num_clients = iter(values), len(values) // 3 - num_modules
    lora_ranks, frozen_ranks, mapped = (tuple(islice(numbers, num_modules)) for _ in range(3))
    workers, limits, versions = (tuple(islice(numbers, num_clients)) for _ in range(3))
    return (
        lora_ranks,
        frozen_ranks,
        mapped if any(mapped) else (),
        workers,
        () if set(limits) == {_UNLIMITED} else limits,
        () if set(versions) == {ABSENT} else versions,
    )


def plan_bytes(num_modules: int, num_clients: int) -> int:
    """Bytes of a packed plan; the last 12 * num_clients say who trains where, and on what."""
    return HEADER_BYTES + 12 * num_modules + 12 * num_clients


def downlink_header_bytes(num_modules: int, *, has_variates: bool = False) -> int:
    """Bytes of the part of a plan that a client would receive: header and lists of ranks.

    The third list, of the ranks before a cut, concerns only clients that keep control variates.
    """
    return HEADER_BYTES + (12 if has_variates else 8) * num_modules
