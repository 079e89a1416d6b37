"""One round's updates against the state that their clients started from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mpifedlora.core.aggregation import ModuleSum, frobenius_weights, normalise, weighted_mean
from mpifedlora.core.cuts import averages_factors
from mpifedlora.core.layout import AdapterLayout, Factors, ModelShapes, copy_common
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.robust import Combiner, combine_products
from mpifedlora.core.screening import Contribution
from mpifedlora.core.server_update import FlatUpdate
from mpifedlora.core.switches import Switches
from mpifedlora.core.wire import ClientUpdate, UpdateHeader, broadcast_values


@dataclass(frozen=True)
class Combination:
    """How a round's updates are combined.

    Args:
        shapes: of the model.
        switches: of the method.
        plan: of the round.
        state: (layout values,), the global state that the clients received.
        flat_update: with the moments of the server's optimiser.
    """

    shapes: ModelShapes
    switches: Switches
    plan: RoundPlan
    state: Tensor
    flat_update: FlatUpdate

    @cached_property
    def reference(self) -> tuple[list[Factors], Tensor]:
        """Factors of the state (none where B stays with the clients), and the rest of it."""
        layout = self.plan.layout(self.shapes)
        factors = [] if self.plan.keeps_b else layout.factors(self.state)
        return factors, layout.whole_values(self.state)

    @cached_property
    def _shared(self) -> AdapterLayout:
        return self.plan.shared_layout(self.shapes)

    @cached_property
    def _broadcast(self) -> Tensor:
        return broadcast_values(self.plan, self.shapes, self.state)

    def _shared_by(self, client_id: int) -> AdapterLayout:
        """Return what a client shares; where all have the same rank, it is looked up once."""
        return self.plan.shared_layout(self.shapes, client_id) if self.plan.client_ranks else self._shared

    def update(self, header: UpdateHeader, row: Tensor) -> ClientUpdate:
        """Return what a client has trained, from the bytes of its row; under float32 a view of them."""
        plan, wire = self.plan, self.switches.wire
        if wire.uplink == "float32":
            return ClientUpdate(**vars(header), values=row.view(torch.float32))
        layout, reference = self._shared_by(header.client_id), self._broadcast
        if plan.client_ranks:
            reference = broadcast_values(plan, self.shapes, self.state, header.client_id)
        return ClientUpdate(**vars(header), values=wire.decode_update(layout, row, reference))

    def contribution(self, update: ClientUpdate) -> Contribution:
        """Return a client's update with what it did not send taken from the state."""
        shared = self._shared_by(update.client_id)
        values = update.values[: shared.num_values]
        pairs = zip(shared.factors(values), self.reference[0], strict=False)
        factors = [_completed(sent, state, shared.parts) for sent, state in pairs]
        return Contribution(update, factors, values, shared.whole_values(values))

    def weights(self, used: Sequence[Contribution]) -> list[float]:
        """Return the weight of each update, summing to 1."""
        if used and self.switches.weights == "frobenius":
            return frobenius_weights([part.factors for part in used])
        return normalise([self.switches.counts(part.update) for part in used]) if used else []

    @property
    def is_mean(self) -> bool:
        """Whether the next factors are means of the clients' factors."""
        return averages_factors(self.switches, self.plan)

    def next_values(self, used: Sequence[Contribution], weights: Sequence[float]) -> Tensor:
        """Return the state as far as it is a mean of values: the head, and the factors if `is_mean`.

        Args:
            used: updates to combine; without any the state stays.
            weights: one an update, summing to 1.

        Returns:
            (layout values,), in the round's layout.
        """
        advance, layout = self.flat_update.advance, self.plan.layout(self.shapes)
        shared = self._shared
        if not self.is_mean:
            flat = self.state.clone()
            head = layout.whole_values(flat)
            advance(self.reference[1], [part.whole for part in used], weights, head)
            return flat
        is_whole = shared == layout
        old = self.state if is_whole else copy_common(layout, self.state, shared, _empty(shared))
        new = advance(old, [self._padded(part, shared) for part in used], weights, torch.empty_like(old))
        if used and self.plan.client_ranks:
            trained = max(self.plan.client_ranks[part.update.client_id] for part in used)
            _keep_beyond(trained, shared.factors(old), shared.factors(new))
        return new if is_whole else copy_common(shared, new, layout, self.state.clone())

    def _padded(self, part: Contribution, shared: AdapterLayout) -> Tensor:
        own = self._shared_by(part.update.client_id)
        if own == shared:
            return part.values
        return copy_common(own, part.values, shared, torch.zeros(shared.num_values))

    def sums(self, values: Tensor, used: Sequence[Contribution], weights: Sequence[float]) -> list[ModuleSum]:
        """Return each module's sum; without any update the state is the only one.

        Args:
            values: what `next_values` returned.
            used: updates to combine.
            weights: one an update, summing to 1.
        """
        layout = self.plan.layout(self.shapes)
        clients = [part.factors for part in used] or [layout.factors(self.state)]
        means = layout.factors(values) if self.is_mean else [None] * len(layout.modules)
        combiner = self.switches.combiner if used else weighted_mean  # the state is no cohort
        return [
            self._sum(module, list(weights) or [1.0], mean, combiner)
            for module, mean in zip(zip(*clients, strict=True), means, strict=True)
        ]

    def _sum(
        self, clients: Sequence[Factors], weights: Sequence[float], mean: Factors | None, combiner: Combiner
    ) -> ModuleSum:
        dense = None
        if mean is None and combiner is not weighted_mean and self.switches.aggregator.active == "svd":
            dense = combine_products(clients, weights, combiner)
        return ModuleSum(clients, weights, self.switches.aggregator, mean, dense)


def _empty(layout: AdapterLayout) -> Tensor:
    return torch.empty(layout.num_values)


def _completed(sent: Factors, state: Factors, parts: str) -> Factors:
    """Take from the state which factor the client has not sent."""
    if parts == "ab":
        return sent
    return Factors(sent.a, state.b) if parts == "a" else Factors(state.a, sent.b)


def _keep_beyond(first: int, old: Sequence[Factors], new: Sequence[Factors]) -> None:
    """Keep the directions that no client of the round has trained as they were."""
    for before, after in zip(old, new, strict=True):
        after.a[first:].copy_(before.a[first:])
        after.b[:, first:].copy_(before.b[:, first:])
