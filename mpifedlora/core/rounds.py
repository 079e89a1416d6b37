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

from mpifedlora.core.aggregation import ModuleAggregate, ModuleSum
from mpifedlora.core.allocation import spectral, uniform
from mpifedlora.core.annealer import Annealer
from mpifedlora.core.combining import Combination
from mpifedlora.core.fresh import initial_adapter
from mpifedlora.core.layout import Factors, ModelShapes
from mpifedlora.core.lowrank import concatenate
from mpifedlora.core.opening import (
    Opening,
    complete,
    frozen_form,
    prepare,
    write_frozen,
    write_leading,
    write_maps,
)
from mpifedlora.core.plan import ABSENT, RoundPlan
from mpifedlora.core.screening import USED, Contribution
from mpifedlora.core.server_optimizer import CutMap, carry_variate
from mpifedlora.core.server_update import FlatUpdate
from mpifedlora.core.switches import Switches
from mpifedlora.core.wire import ClientUpdate

Judge = Callable[[RoundPlan, Tensor], float]


@dataclass(frozen=True)
class RoundReport:
    """What a finished round has to say.

    Args:
        participants: updates that were aggregated, in client order.
        outcomes: by client id of the cohort, `used` or why the update was left out.
        train_loss: mean of the clients' losses, by the weights of the aggregation.
        penalty: mean of the clients' proximal penalties, by the same.
        aggregation_error: relative Frobenius error of what is sent against the exact sum; nan where
            the server does not see both factors.
        dropped_energy: share of the sum's squared norm that the cut discards.
    """

    participants: tuple[ClientUpdate, ...]
    outcomes: dict[int, str]
    train_loss: float
    penalty: float
    aggregation_error: float
    dropped_energy: float


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
        self.shapes, self.switches, self.seed = shapes, switches, seed
        self.annealer = Annealer(switches.schedule, switches.guidance, seed)
        self.flat_update = FlatUpdate(switches.combiner, switches.optimizer, switches.noise)
        self.frozen: list[list[Factors]] = [[] for _ in shapes.modules]
        self.body: Tensor | None = None  # trained base weights, once the `full` stage has ended
        self.variate: Tensor | None = None  # mean control variate, once there is one
        self.state_rounds = [0] * len(switches.choose_workers(1)) if switches.client_keeps_state else []
        self.next_plan = self._plan(1, uniform(self.annealer.budget, shapes.modules), self._no_ranks)
        self.state = initial_state(self.next_plan)
        self.message = self.state[:0]

    @property
    def _no_ranks(self) -> tuple[int, ...]:
        return (0,) * len(self.shapes.modules)

    @property
    def num_rounds(self) -> int:
        """Rounds of the run."""
        return self.switches.schedule.num_rounds

    def _plan(self, round_num: int, lora_ranks: tuple[int, ...], frozen_ranks: tuple[int, ...]) -> RoundPlan:
        switches, schedule = self.switches, self.switches.schedule
        planned = min(round_num, schedule.num_rounds)
        scope = switches.round_scope(planned)
        workers = tuple(switches.choose_workers(planned))
        return RoundPlan(
            round_num=round_num,
            stage=schedule.stage(planned),
            scope=scope,
            lora_ranks=lora_ranks,
            frozen_ranks=frozen_ranks,
            workers=(ABSENT,) * len(workers) if round_num > planned else workers,
            client_ranks=switches.client_ranks,
            state_rounds=tuple(self.state_rounds),
            keeps_b=switches.keeps_b,
            keeps_head=switches.keeps_head,
            has_variates=switches.has_variates,
            learning_rate=switches.learning_rate(planned, scope),
            mu=switches.mu(planned),
            temperature=schedule.temperature(planned),
        )

    def plan(self, *, evaluates: bool = False) -> RoundPlan:
        """Return the plan of the next round; after the last round, of the final model."""
        return replace(self.next_plan, evaluates=evaluates)

    @property
    def follows_accuracy(self) -> bool:
        """Whether the next cut still depends on what `note` is told."""
        return self.switches.schedule.kind == "target" and self.annealer.is_cutting

    @property
    def needs_judge(self) -> bool:
        """Whether cuts are tried before they are sent."""
        return self.switches.schedule.kind == "metropolis"

    def note(self, accuracy: float) -> None:
        """Take the held-out accuracy of the last round's model, which the `target` schedule goes by."""
        self.annealer.note(accuracy)

    def finish(self, updates: Sequence[ClientUpdate], judge: Judge | None = None) -> RoundReport:
        """Aggregate the round's updates, cut, and make the next plan and message ready.

        Updates that the screening refuses are left out. If none is left, the global state stands as
        the only update, so that a planned cut is still made.

        Args:
            updates: of the cohort, any order; they are summed in client order.
            judge: gives the held-out loss of a model from its plan and message, for `metropolis`.
        """
        combination = Combination(self.shapes, self.switches, self.next_plan, self.state, self.flat_update)
        received = [combination.contribution(update) for update in sorted(updates, key=lambda u: u.client_id)]
        outcomes = self.switches.screening.choose(received, *combination.reference())
        used = [part for part in received if outcomes[part.update.client_id] == USED]
        weights = combination.weights(used)
        self._remember(used)
        aggregates = self._advance(combination, used, weights, judge)
        exact = sum(aggregate.exact_energy for aggregate in aggregates)
        error = _ratio(sum(part.error_energy for part in aggregates), exact) ** 0.5
        participants = tuple(part.update for part in used)
        return RoundReport(
            participants=participants,
            outcomes=outcomes,
            train_loss=_mean([update.train_loss for update in participants], weights),
            penalty=_mean([update.penalty for update in participants], weights),
            aggregation_error=math.nan if self.switches.keeps_b else error,
            dropped_energy=_ratio(sum(part.dropped_energy for part in aggregates), exact),
        )

    def _remember(self, used: Sequence[Contribution]) -> None:
        plan = self.next_plan
        if self.switches.client_keeps_state:
            for part in used:
                self.state_rounds[part.update.client_id] = plan.round_num
        if plan.has_variates:
            num_values = plan.shared_layout(self.shapes).num_values
            self.variate = torch.zeros(num_values) if self.variate is None else self.variate
            for part in used:  # SCAFFOLD, arXiv 1910.06378, algorithm 1, line 17
                self.variate.add_(part.update.values[num_values:], alpha=1 / self.switches.num_eligible)

    def _advance(
        self,
        combination: Combination,
        used: Sequence[Contribution],
        weights: Sequence[float],
        judge: Judge | None,
    ) -> list[ModuleAggregate]:
        if self.next_plan.scope == "full":
            self._advance_full([part.values for part in used], weights)
            return []
        flat = combination.next_values(used, weights)
        present = self.next_plan.lora_ranks
        if self.next_plan.keeps_b:
            self._open(self._assemble(present, [], flat, []))
            return []
        sums = combination.sums(flat, used, weights)
        budget = self.annealer.propose(self.next_plan.round_num)
        ranks = self._allocate(budget, sums)
        is_carried = combination.is_mean and ranks != present
        maps = [part.map(active) for part, active in zip(sums, ranks, strict=True)] if is_carried else []
        aggregates = self._cut(sums, ranks)
        opening = self._assemble(ranks, aggregates, flat, maps)
        if judge is not None and ranks != present:
            uncut = self._cut(sums, present)
            kept = self._assemble(present, uncut, flat, [])
            rise = judge(opening.plan, opening.message) - judge(kept.plan, kept.message)
            if not self.annealer.accepts(self.next_plan.round_num, rise):
                budget, aggregates, opening, maps = self.annealer.budget, uncut, kept, []
        self.annealer.budget = budget
        if maps:
            self._carry(opening.plan.lora_ranks, maps)
        self._keep_frozen(aggregates)
        self._open(opening)
        return aggregates

    def _advance_full(self, values: Sequence[Tensor], weights: Sequence[float]) -> None:
        advance, plan = self.flat_update.advance, self.next_plan
        self.annealer.budget = self.annealer.propose(plan.round_num)
        ranks = uniform(self.annealer.budget, self.shapes.modules)
        following = self._plan(plan.round_num + 1, ranks, self._no_ranks)
        if following.scope == "full":
            opening = prepare(self.shapes, replace(following, sends_state=True))
            advance(self.state, values, weights, opening.state)
            self._open(complete(self.shapes, opening, self.variate))
            return
        opening = prepare(self.shapes, replace(following, sends_base=True, sends_state=True, sends_parts=""))
        flat = advance(self.state, values, weights, torch.empty_like(self.state))
        num_body = self.shapes.base().num_values
        parts = opening.plan.split(self.shapes, opening.message)
        self.body = parts.base.copy_(flat[:num_body])
        opening.state.copy_(self._fresh(opening.plan, flat[num_body:]))
        self._open(complete(self.shapes, opening, None))

    def _fresh(self, plan: RoundPlan, head: Tensor) -> Tensor:
        return initial_adapter(self.shapes, plan.lora_ranks, head, self.seed, plan.round_num)

    def _allocate(self, budget: int, sums: Sequence[ModuleSum]) -> tuple[int, ...]:
        present = self.next_plan.lora_ranks
        if not self.switches.is_spectral:
            return uniform(budget, self.shapes.modules)
        if budget == self.annealer.budget:
            return present
        return spectral(budget, self.shapes.modules, [part.svd.s for part in sums], present)

    def _cut(self, sums: Sequence[ModuleSum], ranks: Sequence[int]) -> list[ModuleAggregate]:
        kept = self.next_plan.lora_ranks if self.switches.freezes else ranks
        return [part.cut(most, active) for part, most, active in zip(sums, kept, ranks, strict=True)]

    def _carry(self, ranks: tuple[int, ...], maps: Sequence[CutMap]) -> None:
        before = self.next_plan.shared_layout(self.shapes)
        self.flat_update.carry(before, replace(before, lora_ranks=ranks), maps)
        self.variate = self._carried_variate(ranks, maps)

    def _carried_variate(self, ranks: tuple[int, ...], maps: Sequence[CutMap]) -> Tensor | None:
        if self.variate is None or not maps:
            return self.variate
        before = self.next_plan.shared_layout(self.shapes)
        return carry_variate(self.variate, before, replace(before, lora_ranks=ranks), maps)

    def _keep_frozen(self, aggregates: Sequence[ModuleAggregate]) -> None:
        if self.switches.aggregator.folds:
            return  # the directions of all rounds are no adapter of rank_max: the base weights hold them
        for kept, part in zip(self.frozen, aggregates, strict=True):
            kept.extend([part.frozen] if part.frozen.lora_rank else [])

    def _assemble(
        self,
        ranks: tuple[int, ...],
        aggregates: Sequence[ModuleAggregate],
        flat: Tensor,
        maps: Sequence[CutMap],
    ) -> Opening:
        """Make the next plan and message; `flat` is the state in the present layout, its head up to date."""
        before = self.next_plan.layout(self.shapes)
        frozen = [part.frozen for part in aggregates]
        forms = tuple(part.lora_rank for part in frozen) or self._no_ranks
        if self.switches.aggregator.folds:
            forms = tuple(map(frozen_form, self.shapes.modules, frozen)) or self._no_ranks
        plan = self._plan(self.next_plan.round_num + 1, ranks, forms)
        sends_parts = self.next_plan.shared_layout(self.shapes).parts if ranks == before.lora_ranks else "ab"
        if self.switches.aggregator.active == "restart":
            sends_parts = ""
        mapped = before.lora_ranks if maps and plan.has_variates else ()
        plan = replace(plan, sends_state=True, sends_parts=sends_parts, mapped_ranks=mapped)
        opening, variate = prepare(self.shapes, plan), self._carried_variate(ranks, maps)
        if mapped:
            write_maps(self.shapes, opening, maps)
        if not aggregates:
            opening.state.copy_(flat)
            return complete(self.shapes, opening, variate)
        active = [part.active for part in aggregates]
        if any(part.lora_rank < lora_rank for part, lora_rank in zip(active, ranks, strict=True)):
            # Directions that no client of the round had start anew: as zeros they could never be trained.
            opening.state.copy_(self._fresh(opening.plan, before.whole_values(flat)))
        after = opening.plan.layout(self.shapes)
        write_leading(active, after.factors(opening.state))
        after.whole_values(opening.state).copy_(before.whole_values(flat))
        write_frozen(self.shapes, opening, frozen)
        return complete(self.shapes, opening, variate)

    def _open(self, opening: Opening) -> None:
        self.next_plan, self.message, self.state = opening

    def highest_ranks(self) -> tuple[int, ...]:
        """Return each module's rank at the full budget."""
        return uniform(self.switches.schedule.rank_max, self.shapes.modules)

    def stop_plan(self) -> RoundPlan:
        """Return the plan that ends the workers; no message goes with it."""
        return replace(
            self.next_plan,
            frozen_ranks=self._no_ranks,
            mapped_ranks=(),
            sends_base=False,
            sends_state=False,
            stops=True,
        )

    def adapter(self) -> tuple[list[Factors], list[Tensor]]:
        """Return the global adapter: each module's active and frozen directions joined, and the head.

        The joined rank is at most rank_max, the rank that training started with.
        """
        layout = self.next_plan.layout(self.shapes)
        pairs = zip(layout.factors(self.state), self.frozen, strict=True)
        joined = [concatenate([active, *frozen]) for active, frozen in pairs]
        return joined, layout.whole_tensors(self.state)

    def base_weights(self) -> dict[str, Tensor]:
        """Return the base weights that a `full` stage has trained, by name."""
        if self.next_plan.scope == "full":
            layout, flat = self.shapes.full(), self.state
        elif self.body is not None:
            layout, flat = self.shapes.base(), self.body
        else:
            return {}
        tensors = layout.whole_tensors(flat)
        return {shape.name: tensor for shape, tensor in zip(layout.whole, tensors, strict=True)}


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    if not values:
        return math.nan
    return sum(value * weight for value, weight in zip(values, weights, strict=True))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
