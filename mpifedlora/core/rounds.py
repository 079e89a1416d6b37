"""The protocol of a federation without any I/O: plan a round, take its updates, finish it.

`Coordinator` owns the global state. `plan` says what the next round needs, `message` is the one flat
buffer that goes with it, `finish` turns the cohort's updates into the next state. It never sends,
reads a clock or touches a file, so the same code runs under any transport and in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mpifedlora.core.aggregation import ModuleAggregate, ModuleSum, decompose
from mpifedlora.core.allocation import spectral, uniform
from mpifedlora.core.annealer import Annealer
from mpifedlora.core.combining import Combination
from mpifedlora.core.faults import count_failures
from mpifedlora.core.fresh import initial_adapter
from mpifedlora.core.history import Lasting, Trained, lasting
from mpifedlora.core.layout import ModelShapes
from mpifedlora.core.opening import (
    Lost,
    Opening,
    complete,
    prepare,
    round_message,
    write_frozen,
    write_maps,
    write_state,
)
from mpifedlora.core.parts import parts_of
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.planning import plan_first, plan_next
from mpifedlora.core.report import RoundReport, report_round
from mpifedlora.core.screening import USED, Contribution
from mpifedlora.core.server_optimizer import CutMap, carry_variate
from mpifedlora.core.server_update import FlatUpdate
from mpifedlora.core.streaming import Admitted, RoundStream, admit
from mpifedlora.core.switches import Switches
from mpifedlora.core.wire import POSTPONED, ClientUpdate, UpdateHeader

Judge = Callable[[RoundPlan, Tensor], float]


class _Asked(NamedTuple):
    """All that a stream follows from, but for the values."""

    plan: RoundPlan
    switches: Switches
    outcomes: dict[int, str]
    part_bytes: int | None
    evaluates: bool
    stops: bool


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
        self.history: list[Lasting] = []  # what messages brought once, in order
        self.variate: Tensor | None = None  # mean control variate, once there is one
        self.next_plan = plan_first(switches, shapes)
        self.state_rounds = list(self.next_plan.state_rounds)
        self.failures = [0] * len(self.next_plan.workers)  # in a row, by client id
        self.state = initial_state(self.next_plan)
        self.message = self.state[:0]
        self.wire = self.message.view(torch.uint8)  # of the message, as it is sent
        self.lost: Lost | None = None
        self.spare: Tensor | None = None  # buffer of a message that nobody reads any more
        self._foreseen: tuple[_Asked, RoundStream] | None = None

    def plan(self, *, evaluates: bool = False) -> RoundPlan:
        """Return the plan of the next round; after the last round, of the final model."""
        return replace(self.next_plan, evaluates=evaluates)

    def finish(self, updates: Sequence[ClientUpdate], judge: Judge | None = None) -> RoundReport:
        """Aggregate the round's updates, cut, and make the next plan and message ready.

        Updates that the screening refuses are left out. If none is left, the global state stands as
        the only update, so that a planned cut is still made.

        Args:
            updates: of the cohort, any order; they are summed in client order.
            judge: gives the held-out loss of a model from its plan and message, for `metropolis`.
        """
        combination = self._combination()
        received = [combination.contribution(update) for update in sorted(updates, key=lambda u: u.client_id)]
        outcomes = self.switches.screening.choose(received, *combination.reference)
        used = [part for part in received if outcomes[part.update.client_id] == USED]
        weights = combination.weights(used)
        self._remember([part.update for part in used], outcomes)
        aggregates = self._advance(combination, used, weights, judge)
        headers = [part.update for part in used]
        return report_round(headers, outcomes, weights, aggregates, sees_factors=not self.switches.keeps_b)

    def finish_sum(
        self, headers: Sequence[UpdateHeader], total: Tensor, judge: Judge | None = None
    ) -> RoundReport:
        """Finish a round from the weighted sum of the finite updates' values, which is divided here.

        Args:
            headers: of the cohort, any order.
            total: (row_values,), sum of num_examples, or 1, times values.
            judge: as in `finish`.
        """
        if not total.sum().isfinite():  # whatever the headers say: it cannot be told whose fault it is
            headers = [replace(header, is_finite=False) for header in headers]
        admitted = admit(self.switches, headers)
        used, counts = admitted.used, [self.switches.counts(header) for header in admitted.used]
        mean, combination = total.div_(sum(counts) or 1).float(), self._combination()
        self._remember(used, admitted.outcomes)
        parts = [combination.contribution(ClientUpdate(**vars(header), values=mean)) for header in used[:1]]
        aggregates = self._advance(combination, parts, [1.0] * len(parts), judge)
        return report_round(used, admitted.outcomes, admitted.weights, aggregates, sees_factors=False)

    def updates(self, headers: Sequence[UpdateHeader], rows: Sequence[Tensor]) -> list[ClientUpdate]:
        """Return what clients have trained, from the bytes of their rows."""
        return list(map(self._combination().update, headers, rows))

    def streams(self, plan: RoundPlan) -> bool:
        """Say whether a round can be finished in parts: the next plan follows from what is known before."""
        switches = self.switches
        following = switches.round_scope(min(plan.round_num + 1, switches.schedule.num_rounds))
        return switches.is_local and (plan.scope == "full") == (following == "full") and not plan.reduces

    def stream(
        self,
        headers: Sequence[UpdateHeader],
        part_bytes: int | None = None,
        *,
        evaluates: bool = False,
        stops: bool = False,
    ) -> RoundStream:
        """Begin to finish a round in parts; nothing is changed before `commit`.

        Args:
            headers: of the cohort, any order.
            part_bytes: see `core.parts.parts_of`.
            evaluates: whether the workers measure the next model.
            stops: whether they end instead, and get no message.
        """
        admitted = admit(self.switches, headers)
        asked = _Asked(self.next_plan, self.switches, admitted.outcomes, part_bytes, evaluates, stops)
        if self._foreseen is None or self._foreseen[0] != asked:
            return self._begin(asked, admitted)
        (_, stream), self._foreseen = self._foreseen, None
        stream.admitted = admitted
        return stream

    def foresee(self, part_bytes: int | None = None, *, evaluates: bool = False, stops: bool = False) -> None:
        """Make the round's stream ready as if every update will be used: while the workers train is time.

        Args:
            part_bytes: as in `stream`; where that is asked for anything else, it begins anew.
            evaluates: as in `stream`.
            stops: as in `stream`.
        """
        outcomes = dict.fromkeys(self.next_plan.cohort, USED)
        asked = _Asked(self.next_plan, self.switches, outcomes, part_bytes, evaluates, stops)
        self._foreseen = asked, self._begin(asked, Admitted([], outcomes, []))

    def _begin(self, asked: _Asked, admitted: Admitted) -> RoundStream:
        plan, switches, outcomes, part_bytes, evaluates, stops = asked
        budget = self.annealer.propose(plan.round_num)
        ranks = uniform(budget, self.shapes.modules)
        used = [client_id for client_id in sorted(outcomes) if outcomes[client_id] == USED]
        states = self._states_after(used, outcomes)
        failures = count_failures(self.failures, outcomes)
        following = plan_next(switches, plan, self.shapes, ranks, used, states, failures)
        opening = self._prepare(following)
        announced = following.stopped() if stops else replace(following, evaluates=evaluates)
        parts = parts_of(plan, announced, self.shapes, switches.wire, part_bytes)
        return RoundStream(self._combination(), admitted, parts, budget, opening, announced, self.lost)

    def commit(self, stream: RoundStream) -> RoundReport:
        """Take over what a stream has made, once all its parts are in and none was refused."""
        self._remember(stream.admitted.used, stream.admitted.outcomes)
        self.annealer.budget = stream.budget
        self.flat_update.moments = stream.moments or self.flat_update.moments
        self._enter(stream.opening, stream.lost)
        return report_round(*stream.admitted, stream.aggregates, sees_factors=not self.switches.keeps_b)

    def _combination(self) -> Combination:
        return Combination(self.shapes, self.switches, self.next_plan, self.state, self.flat_update)

    def _remember(self, used: Sequence[UpdateHeader], outcomes: Mapping[int, str]) -> None:
        plan = self.next_plan
        self.failures = count_failures(self.failures, outcomes)
        self.state_rounds = self._states_after([header.client_id for header in used], outcomes)
        if plan.has_variates:
            num_values = plan.shared_layout(self.shapes).num_values
            self.variate = torch.zeros(num_values) if self.variate is None else self.variate
            for update in used:  # SCAFFOLD, arXiv 1910.06378, algorithm 1, line 17
                assert isinstance(update, ClientUpdate), "variates come with whole rows"
                self.variate.add_(update.values[num_values:], alpha=1 / self.switches.num_eligible)

    def _states_after(self, used: Sequence[int], outcomes: Mapping[int, str]) -> list[int]:
        present = self.next_plan.round_num
        after = dict.fromkeys(used, present if self.switches.always_keeps_state else 0)
        after |= {client_id: present for client_id, outcome in outcomes.items() if outcome == POSTPONED}
        return [after.get(index, before) for index, before in enumerate(self.state_rounds)]

    def _following(self, ranks: tuple[int, ...], used: Sequence[int] = ()) -> RoundPlan:
        states, failures = self.state_rounds, self.failures
        return plan_next(self.switches, self.next_plan, self.shapes, ranks, used, states, failures)

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
        present, clients = self.next_plan.lora_ranks, [part.update.client_id for part in used]
        if self.next_plan.keeps_b:
            self._open(self._assemble(self._following(present, clients), [], flat, []))
            return []
        sums = combination.sums(flat, used, weights)
        budget = self.annealer.propose(self.next_plan.round_num)
        ranks = present if budget == self.annealer.budget else uniform(budget, self.shapes.modules)
        if self.switches.is_spectral and budget != self.annealer.budget:
            decompose(sums, [0] * len(sums), self.switches.device)
            ranks = spectral(budget, self.shapes.modules, [part.svd.s for part in sums], present)
        decompose(sums, ranks, self.switches.device)
        is_carried = combination.is_mean and ranks != present
        maps = [part.map(active) for part, active in zip(sums, ranks, strict=True)] if is_carried else []
        aggregates = self._cut(sums, ranks)
        opening = self._assemble(self._following(ranks, clients), aggregates, flat, maps)
        if judge is not None and ranks != present:
            uncut = self._cut(sums, present)
            kept = self._assemble(self._following(present, clients), uncut, flat, [])
            rise = judge(opening.plan, opening.message) - judge(kept.plan, kept.message)
            if not self.annealer.accepts(self.next_plan.round_num, rise):
                budget, aggregates, opening, maps = self.annealer.budget, uncut, kept, []
        self.annealer.budget = budget
        if maps:
            self._carry(opening.plan.lora_ranks, maps)
        self._open(opening)
        return aggregates

    def _advance_full(self, values: Sequence[Tensor], weights: Sequence[float]) -> None:
        advance, plan = self.flat_update.advance, self.next_plan
        self.annealer.budget = self.annealer.propose(plan.round_num)
        ranks = uniform(self.annealer.budget, self.shapes.modules)
        opening = self._prepare(self._following(ranks))
        if opening.plan.scope == "full":
            advance(self.state, values, weights, opening.state)
            self._open(complete(self.shapes, opening, self.variate))
            return
        flat = advance(self.state, values, weights, torch.empty_like(self.state))
        num_body = self.shapes.base().num_values
        parts = opening.plan.split(self.shapes, opening.message)
        parts.base.copy_(flat[:num_body])
        opening.state.copy_(self._fresh(opening.plan, flat[num_body:]))
        self._open(complete(self.shapes, opening, None))

    def _fresh(self, plan: RoundPlan, head: Tensor) -> Tensor:
        return initial_adapter(self.shapes, plan.lora_ranks, head, self.seed, plan.round_num)

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

    def _assemble(
        self,
        following: RoundPlan,
        aggregates: Sequence[ModuleAggregate],
        flat: Tensor,
        maps: Sequence[CutMap],
    ) -> Opening:
        """Make the next message; `flat` is the state in the present layout, its head up to date."""
        before, ranks = self.next_plan.layout(self.shapes), following.lora_ranks
        opening = self._prepare(following)
        variate = self._carried_variate(ranks, maps)
        if following.mapped_ranks:
            write_maps(self.shapes, opening, maps)
        if not aggregates:
            opening.state.copy_(flat)
            return complete(self.shapes, opening, variate)
        active = [part.active for part in aggregates]
        if any(part.lora_rank < lora_rank for part, lora_rank in zip(active, ranks, strict=True)):
            # Directions that no client of the round had start anew: as zeros they could never be trained.
            opening.state.copy_(self._fresh(opening.plan, before.whole_values(flat)))
        write_state(opening.plan.layout(self.shapes), opening.state, active, before.whole_values(flat))
        write_frozen(self.shapes, opening, [part.frozen for part in aggregates])
        return complete(self.shapes, opening, variate)

    def _prepare(self, plan: RoundPlan) -> Opening:
        if self._foreseen is not None:  # and did not come: its buffer is free
            (_, stream), self._foreseen = self._foreseen, None
            self.spare = stream.opening.wire
        spare, self.spare = self.spare, None
        return prepare(self.shapes, plan, self.switches.wire, spare)

    def _open(self, opening: Opening) -> None:
        self._enter(opening, round_message(self.shapes, opening, self.switches.wire, self.lost))

    def _enter(self, opening: Opening, lost: Lost | None) -> None:
        # Directions that are folded in are no adapter of rank_max: only the base weights hold them.
        is_kept = not self.switches.aggregator.folds
        kept = lasting(opening.plan, self.shapes, opening.message, with_frozen=is_kept)
        self.history += [kept] if kept else []
        self.lost = lost
        self.next_plan, self.message, self.state, self.wire = opening

    @property
    def trained(self) -> Trained:
        """What the rounds so far have made of the model."""
        return Trained(self.shapes, self.next_plan, self.state, self.history)
