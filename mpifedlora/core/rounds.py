"""The protocol of a federation without any I/O: plan a round, take its updates, finish it.

`Coordinator` owns the global state. `plan` says what the next round needs, `message` is the one flat
buffer that goes with it, `finish` turns the cohort's updates into the next state. It never sends,
reads a clock or touches a file, so the same code runs under any transport and in tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpifedlora.core.aggregation import Aggregator, ModuleAggregate, normalise, weighted_mean
from mpifedlora.core.allocation import uniform
from mpifedlora.core.layout import AdapterLayout, Factors, ModelShapes
from mpifedlora.core.lowrank import concatenate
from mpifedlora.core.schedule import RankSchedule
from mpifedlora.core.seeding import torch_seed
from mpifedlora.core.wire import ABSENT, ClientUpdate, RoundPlan


@dataclass(frozen=True)
class Switches:
    """The switches of a method, as the core needs them.

    Args:
        schedule: rank budget and stages.
        initiating_scope: what the initiating stage trains, `adapter` or `full`.
        scope: what is trained after it.
        aggregator: how factors are combined.
        freezes: whether directions beyond the budget are frozen (else dropped).
        learning_rate: of a round, given its number and scope.
        mu: proximal weight of a round.
        choose_workers: worker of each client of a round (by client id, or ABSENT), given its number.
    """

    schedule: RankSchedule
    initiating_scope: str
    scope: str
    aggregator: Aggregator
    freezes: bool
    learning_rate: Callable[[int, str], float]
    mu: Callable[[int], float]
    choose_workers: Callable[[int], Sequence[int]]


@dataclass(frozen=True)
class RoundReport:
    """What a finished round has to say.

    Args:
        participants: updates that were aggregated, in client order.
        left_out: ids of clients whose update was not finite.
        train_loss: mean of the clients' losses, by examples.
        penalty: mean of the clients' proximal penalties, by examples.
        aggregation_error: relative Frobenius error of what is sent against the exact sum.
        dropped_energy: share of the sum's squared norm that the cut discards.
    """

    participants: tuple[ClientUpdate, ...]
    left_out: tuple[int, ...]
    train_loss: float
    penalty: float
    aggregation_error: float
    dropped_energy: float


def initial_adapter(shapes: ModelShapes, lora_ranks: Sequence[int], head: Tensor, seed: int) -> Tensor:
    """Return the flat adapter before training: A from U(-1/sqrt(in), 1/sqrt(in)), B = 0.

    Args:
        shapes: of the model.
        lora_ranks: one a module.
        head: (values of the head,) float32.
        seed: of the run; the same bits on every process.

    References:
        LoRA, arXiv 2106.09685, section 4.1; the bounds are those of PEFT's Kaiming initialisation.
    """
    layout = shapes.adapter(lora_ranks)
    flat = torch.zeros(layout.num_values)
    generator = torch.Generator().manual_seed(torch_seed(seed, "adapter"))
    for factors in layout.factors(flat):
        bound = 1 / math.sqrt(factors.a.shape[1])
        factors.a.uniform_(-bound, bound, generator=generator)
    layout.whole_values(flat).copy_(head)
    return flat


class Coordinator:
    """The server's state over the rounds.

    Args:
        shapes: of the model.
        switches: of the method.
        initial_state: gives the flat state (num_values,) of round 1, from its plan.
        seed: of the run.
    """

    def __init__(
        self,
        shapes: ModelShapes,
        switches: Switches,
        initial_state: Callable[[RoundPlan], Tensor],
        seed: int,
    ) -> None:
        self.shapes = shapes
        self.switches = switches
        self.seed = seed
        self.frozen: list[list[Factors]] = [[] for _ in shapes.modules]
        self.body: Tensor | None = None  # trained base weights, once the `full` stage has ended
        no_ranks = (0,) * len(shapes.modules)
        self.next_plan = self._plan(1, no_ranks, sends_base=False, sends_state=False)
        self.state = initial_state(self.next_plan)
        self.message = self.state[:0]

    def _scope(self, round_num: int) -> str:
        is_first_stage = self.switches.schedule.stage(round_num) == "initiating"
        return self.switches.initiating_scope if is_first_stage else self.switches.scope

    def _plan(
        self, round_num: int, frozen_ranks: tuple[int, ...], *, sends_base: bool, sends_state: bool
    ) -> RoundPlan:
        schedule = self.switches.schedule
        is_final = round_num > schedule.num_rounds
        planned = min(round_num, schedule.num_rounds)
        scope = self._scope(planned)
        workers = tuple(self.switches.choose_workers(planned))
        return RoundPlan(
            round_num=round_num,
            stage=schedule.stage(planned),
            scope=scope,
            lora_ranks=uniform(schedule.budget(planned), self.shapes.modules),
            frozen_ranks=frozen_ranks,
            workers=(ABSENT,) * len(workers) if is_final else workers,
            sends_base=sends_base,
            sends_state=sends_state,
            learning_rate=self.switches.learning_rate(planned, scope),
            mu=self.switches.mu(planned),
            temperature=schedule.temperature(planned),
        )

    def plan(self, *, evaluates: bool = False) -> RoundPlan:
        """Return the plan of the next round; after the last round, of the final model."""
        return replace(self.next_plan, evaluates=evaluates)

    @property
    def num_rounds(self) -> int:
        """Rounds of the run."""
        return self.switches.schedule.num_rounds

    def finish(self, updates: Sequence[ClientUpdate]) -> RoundReport:
        """Aggregate the round's updates, cut, and make the next plan and message ready.

        Updates that are not finite are left out. If none is left, the global state stands as the
        only update, so that a planned cut is still made.

        Args:
            updates: of the cohort, any order; they are summed in client order.
        """
        ordered = sorted(updates, key=lambda update: update.client_id)
        participants = tuple(update for update in ordered if update.is_finite)
        values = [update.values for update in participants] or [self.state]
        weights = normalise([update.num_examples for update in participants] or [1])
        aggregates = self._advance(values, weights)
        exact = sum(aggregate.exact_energy for aggregate in aggregates)
        return RoundReport(
            participants=participants,
            left_out=tuple(update.client_id for update in ordered if not update.is_finite),
            train_loss=_mean([update.train_loss for update in participants], weights),
            penalty=_mean([update.penalty for update in participants], weights),
            aggregation_error=_ratio(sum(part.error_energy for part in aggregates), exact) ** 0.5,
            dropped_energy=_ratio(sum(part.dropped_energy for part in aggregates), exact),
        )

    def _advance(self, values: Sequence[Tensor], weights: Sequence[float]) -> list[ModuleAggregate]:
        if self.next_plan.scope == "full":
            self._advance_full(values, weights)
            return []
        before = self.next_plan.layout(self.shapes)
        aggregates = self._aggregate(before, values, weights)
        self._prepare(tuple(part.frozen.lora_rank for part in aggregates), sends_base=False)
        _, frozen, state = self.next_plan.split(self.shapes, self.message)
        after = self.next_plan.layout(self.shapes)
        _copy_factors([part.active for part in aggregates], after.factors(state))
        directions = self.shapes.directions(self.next_plan.frozen_ranks)
        _copy_factors([part.frozen for part in aggregates], directions.factors(frozen))
        for kept, part in zip(self.frozen, aggregates, strict=True):
            kept.extend([part.frozen] if part.frozen.lora_rank else [])
        weighted_mean([before.whole_values(value) for value in values], weights, after.whole_values(state))
        return aggregates

    def _advance_full(self, values: Sequence[Tensor], weights: Sequence[float]) -> None:
        opens_adapter = self._scope(min(self.next_plan.round_num + 1, self.num_rounds)) == "adapter"
        self._prepare((0,) * len(self.shapes.modules), sends_base=opens_adapter)
        base, _, state = self.next_plan.split(self.shapes, self.message)
        if not opens_adapter:
            weighted_mean(values, weights, state)
            return
        num_body = self.shapes.base().num_values
        self.body = weighted_mean([value[:num_body] for value in values], weights, base)
        head = torch.empty(values[0].numel() - num_body)
        weighted_mean([value[num_body:] for value in values], weights, head)
        state.copy_(initial_adapter(self.shapes, self.next_plan.lora_ranks, head, self.seed))

    def _aggregate(
        self, layout: AdapterLayout, values: Sequence[Tensor], weights: Sequence[float]
    ) -> list[ModuleAggregate]:
        following = min(self.next_plan.round_num + 1, self.num_rounds)
        active = uniform(self.switches.schedule.budget(following), self.shapes.modules)
        kept = layout.lora_ranks if self.switches.freezes else active
        by_module = zip(*(layout.factors(value) for value in values), strict=True)
        return [
            self.switches.aggregator(factors, weights, kept_rank, active_rank)
            for factors, kept_rank, active_rank in zip(by_module, kept, active, strict=True)
        ]

    def _prepare(self, frozen_ranks: tuple[int, ...], *, sends_base: bool) -> None:
        following = self.next_plan.round_num + 1
        self.next_plan = self._plan(following, frozen_ranks, sends_base=sends_base, sends_state=True)
        self.message = torch.empty(self.next_plan.message_values(self.shapes))
        self.state = self.next_plan.split(self.shapes, self.message)[2]

    def highest_ranks(self) -> tuple[int, ...]:
        """Return each module's rank at the full budget."""
        return uniform(self.switches.schedule.rank_max, self.shapes.modules)

    def stop_plan(self) -> RoundPlan:
        """Return the plan that ends the workers; no message goes with it."""
        no_ranks = (0,) * len(self.shapes.modules)
        return replace(self.next_plan, frozen_ranks=no_ranks, sends_base=False, sends_state=False, stops=True)

    def adapter(self) -> tuple[list[Factors], list[Tensor]]:
        """Return the global adapter: each module's active and frozen directions joined, and the head.

        The joined rank is at most rank_max, the rank that training started with.
        """
        layout = self.next_plan.layout(self.shapes)
        pairs = zip(layout.factors(self.state), self.frozen, strict=True)
        joined = [concatenate([active, *frozen]) for active, frozen in pairs]
        return joined, layout.whole_tensors(self.state)

    def base_weights(self) -> dict[str, Tensor]:
        """Return the base weights that training has changed, by name; none under scope `adapter`."""
        if self.next_plan.scope == "full":
            layout, flat = self.shapes.full(), self.state
        elif self.body is not None:
            layout, flat = self.shapes.base(), self.body
        else:
            return {}
        tensors = layout.whole_tensors(flat)
        return {shape.name: tensor for shape, tensor in zip(layout.whole, tensors, strict=True)}


def _copy_factors(sources: Sequence[Factors], targets: Sequence[Factors]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.a.copy_(source.a)
        target.b.copy_(source.b)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    if not values:
        return math.nan
    return sum(value * weight for value, weight in zip(values, weights, strict=True))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
