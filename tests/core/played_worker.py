"""A worker whose training is played.

It does with a message what a real worker does, on whole models in double precision, and its clients train
by adding noise. So all that the coordinator sends can be compared with exact arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import torch
from core.cases import (
    AREAS,
    NUM_ADAPTED,
    NUM_STEPS,
    SCALING,
    SHAPES,
    Case,
    initial_body,
    initial_state,
    random_values,
)
from torch import Tensor

from mpifedlora.core.fresh import initial_adapter
from mpifedlora.core.layout import AdapterLayout, Factors
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.wire import (
    ClientUpdate,
    SummedRows,
    UpdateHeader,
    UpdateRows,
    broadcast_values,
    read_headers,
)


def matrices(body: Tensor) -> list[Tensor]:
    """The adapted weights of a flat model, as views."""
    return [
        part.view(shape)
        for part, (_, *shape) in zip(body[:NUM_ADAPTED].split(AREAS), SHAPES.modules, strict=True)
    ]


def add_products(body: Tensor, factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The body with scaling * b @ a added to the adapted weights, in double precision."""
    changed = body.to(torch.float64, copy=True)
    for weight, (a, b) in zip(matrices(changed), factors, strict=True):
        weight += SCALING * b.double() @ a.double()
    return changed


def flattened(factors: Sequence[Factors], parts: str, whole: Tensor) -> Tensor:
    """Some of the factors, and whole values behind them."""
    pairs = (pair._asdict() for pair in factors)
    return torch.cat([*(pair[part].reshape(-1) for pair in pairs for part in parts), whole])


class Cut(NamedTuple):
    """How the cut before a round has mapped each module's factors: a' = a_map @ a, b' = b @ b_map."""

    round_num: int
    before: AdapterLayout
    after: AdapterLayout
    maps: list[tuple[Tensor, Tensor]]


class PlayedWorker:
    """Does with a message what a real worker does, and trains by adding noise."""

    def __init__(self, case: Case) -> None:
        self.seed, self.wire, self.counts = case.seed, case.wire, case.counts
        self.body = initial_body(case.seed).double()  # base weights, frozen directions added
        self.message = self.state = torch.empty(0)
        self.variate = torch.zeros(0)
        self.cuts: list[Cut] = []
        self.trained: dict[int, Tensor] = {}  # in this round, by client
        self.memory: dict[tuple[int, int], Tensor] = {}  # all that clients have kept, by client and round

    def read(self, plan: RoundPlan, wire: Tensor) -> None:
        """Take a plan, and the bytes of its message."""
        self.receive(plan, self.wire.decode_message(plan, SHAPES, wire))

    def receive(self, planned: RoundPlan, message: Tensor) -> None:
        self.plan = plan = RoundPlan.unpack(planned.pack(), len(SHAPES.modules))
        self.message = message.clone()
        parts = plan.split(SHAPES, self.message)
        self.layout = plan.layout(SHAPES)
        self.body = parts.base.double() if plan.sends_base else self.body
        self._freeze(parts.frozen)
        self.variate = parts.variate.double()
        if plan.mapped_ranks:
            sides = plan.segments(SHAPES).maps.whole_tensors(parts.maps.double())
            before = SHAPES.adapter(plan.mapped_ranks)
            maps = list(zip(sides[::2], sides[1::2], strict=True))
            self.cuts = [*self.cuts, Cut(plan.round_num, before, SHAPES.adapter(plan.lora_ranks), maps)]
        self.state = self._received(parts.state) if plan.sends_state else initial_state(self.seed, plan)
        self.factors = self.layout.factors(self.state)
        self.trained = {}

    def _freeze(self, frozen: Tensor) -> None:
        if not frozen.numel():
            return
        layout = SHAPES.frozen(self.plan.frozen_ranks)
        self.body = add_products(self.body, layout.factors(frozen))
        names = [module.name for module in SHAPES.modules]
        for shape, dense in zip(layout.whole, layout.whole_tensors(frozen), strict=True):
            matrices(self.body)[names.index(shape.name)].add_(dense.double(), alpha=SCALING)

    def _received(self, sent: Tensor) -> Tensor:
        plan, layout = self.plan, self.layout
        if plan.scope == "full":
            return sent
        if not plan.sends_parts:
            return initial_adapter(SHAPES, plan.lora_ranks, sent, self.seed, plan.round_num)
        # What was neither sent nor held before would show as nan.
        is_held = self.state.numel() == layout.num_values
        state = self.state.clone() if is_held else torch.full((layout.num_values,), torch.nan)
        source = plan.segments(SHAPES).state
        for held, got in zip(layout.factors(state), source.factors(sent), strict=True):
            if "a" in plan.sends_parts:
                held.a.copy_(got.a)
            if "b" in plan.sends_parts:
                held.b.copy_(got.b)
        if source.whole:
            layout.whole_values(state).copy_(source.whole_values(sent))
        return state

    def twin(self) -> PlayedWorker:
        """A worker that has received the same, and goes its own way from here."""
        return copy(self)

    def recall(self, plan: RoundPlan, client_id: int) -> Tensor | None:
        """What a client has kept, of the version that the plan names."""
        round_num = plan.state_rounds[client_id]
        return self.memory[client_id, round_num] if round_num else None

    def start(self, client_id: int) -> Tensor:
        """What a client trains on."""
        plan = self.plan
        own = plan.trained_layout(SHAPES, client_id)
        flat = torch.zeros(own.num_values)
        for mine, held in zip(own.factors(flat), self.factors, strict=True):
            mine.a.copy_(held.a[: mine.a.shape[0]])
            mine.b.copy_(held.b[:, : mine.b.shape[1]])
        own.whole_values(flat).copy_(self.layout.whole_values(self.state))
        kept = self.recall(plan, client_id) if plan.keeps_b else None
        if kept is not None:
            personal = SHAPES.adapter(plan.lora_ranks, "b")
            for mine, held in zip(own.factors(flat), personal.factors(kept), strict=True):
                mine.b.copy_(held.b)
            if plan.keeps_head:
                own.whole_values(flat).copy_(kept[personal.factor_values :])
        return flat

    def train(self, client_id: int) -> ClientUpdate:
        plan, flat = self.plan, self.start(client_id)
        layout = plan.trained_layout(SHAPES, client_id)
        trained = flat + 0.3 * random_values(flat.numel(), self.seed, plan.round_num, client_id)
        self.trained[client_id] = trained
        values = trained
        if plan.keeps_b:
            pairs, head = layout.factors(trained), layout.whole_values(trained)
            shared, own = (head[:0], head) if plan.keeps_head else (head, head[:0])
            values = flattened(pairs, "a", shared)
            self.memory[client_id, plan.round_num] = flattened(pairs, "b", own)
        if plan.has_variates:
            values = torch.cat([values, self._change_of_variate(client_id, flat - trained)])
        loss = 1.0 + client_id
        return ClientUpdate(client_id, 10 + client_id, NUM_STEPS, loss, 0.5, 0.1, True, values)

    def send(self, updates: Sequence[ClientUpdate]) -> tuple[list[UpdateHeader], UpdateRows]:
        """Write updates into rows; give the headers as the server reads them, and the rows."""
        sizes = [self.wire.row_bytes(self.plan, SHAPES, update.client_id) for update in updates]
        rows = UpdateRows(sizes)
        if self.plan.reduces:
            rows = SummedRows(sizes, self.plan.shared_layout(SHAPES).num_values, "float64")
        for index, update in enumerate(updates):
            if self.wire.uplink == "float32":
                rows.wire(index).view(torch.float32).copy_(update.values)
            else:
                self._encode(update, rows.wire(index))
            update.write(rows, index, self.plan)
            rows.close(index, self.counts(update))
        clients = [update.client_id for update in updates]
        return read_headers(rows.headers, self.plan, clients, sizes), rows

    def _encode(self, update: ClientUpdate, row: Tensor) -> None:
        plan, client_id = self.plan, update.client_id
        change = update.values - broadcast_values(plan, SHAPES, self.state, client_id)
        lost = self.recall(plan, client_id) if self.wire.has_feedback else None
        if lost is not None and lost.numel() == change.numel():
            change += lost
        layout = plan.shared_layout(SHAPES, client_id)
        self.wire.encode_update(layout, change, row, plan.round_num, client_id)
        if self.wire.has_feedback:
            self.memory[client_id, plan.round_num] = change

    def _change_of_variate(self, client_id: int, descent: Tensor) -> Tensor:
        # SCAFFOLD, algorithm 1, option II: c_k' = c_k - c + (x - y) / (steps * learning rate)
        change = descent.double() / (NUM_STEPS * self.plan.learning_rate)
        change = (change - self.variate if self.variate.numel() else change).float()
        kept = self.kept_variate(self.plan, client_id)
        self.memory[client_id, self.plan.round_num] = kept + change
        return change

    def kept_variate(self, plan: RoundPlan, client_id: int) -> Tensor:
        """A client's control variate, taken through the cuts since then: c_A' = b^T c_A, c_B' = c_B a^T."""
        variate = self.recall(plan, client_id)
        if variate is None:
            return torch.zeros(plan.shared_layout(SHAPES).num_values, dtype=torch.float64)
        for cut in self.cuts:
            if cut.round_num > plan.state_rounds[client_id]:
                moved = torch.zeros(cut.after.num_values, dtype=torch.float64)
                both = zip(cut.before.factors(variate), cut.after.factors(moved), cut.maps, strict=True)
                for old, new, (a, b) in both:
                    new.a.copy_(b.mT @ old.a)
                    new.b.copy_(old.b @ a.mT)
                cut.after.whole_values(moved).copy_(cut.before.whole_values(variate))
                variate = moved
        return variate

    def model_of(self, client_id: int) -> Tensor:
        """The whole model that a client has trained, a factor that it did not train taken from the state."""
        own, trained = self.plan.trained_layout(SHAPES, client_id), self.trained[client_id]
        pairs = zip(own.factors(trained), self.factors, strict=True)
        complete = {
            "ab": lambda mine, held: mine,
            "a": lambda mine, held: Factors(mine.a, held.b),
            "b": lambda mine, held: Factors(held.a, mine.b),
        }[own.parts]
        return self._whole([complete(mine, held) for mine, held in pairs], own.whole_values(trained))

    def model(self) -> Tensor:
        """The whole global model, flat, in double precision: base + frozen + active, and the head."""
        return self._whole(self.factors, self.layout.whole_values(self.state))

    def _whole(self, factors: Sequence[Factors], whole: Tensor) -> Tensor:
        if self.plan.scope == "full":
            return whole.double()
        return torch.cat([add_products(self.body, factors), whole.double()])
