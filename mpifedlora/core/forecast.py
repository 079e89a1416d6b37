"""What a run will send, round by round, from shapes alone: exact where no trained value decides, else bounds.

Every round has two plans, which `planning.plan_next` makes as it does for the run itself: one that sends the
least and one that sends the most of what can happen. Where nothing is left open both are the run's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from mpifedlora.core.allocation import uniform
from mpifedlora.core.annealer import Annealer
from mpifedlora.core.layout import DENSE, LinearShape, ModelShapes
from mpifedlora.core.ledger import Ledger, Traffic, count_uplink
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.planning import plan_first, plan_next, without_training
from mpifedlora.core.switches import Switches

Ranks = tuple[int, ...]
_INT8_SCALE_BYTES = 8  # of a direction: one for its row of A, one for its column of B


@dataclass(frozen=True)
class Bound:
    """One end of what a round may be.

    Args:
        plan: of the round.
        uplink: what its cohort sends.
        downlink: what it receives, what it has missed included.
    """

    plan: RoundPlan
    uplink: Traffic
    downlink: Traffic


@dataclass(frozen=True)
class RoundForecast:
    """One round to come, between its two ends."""

    low: Bound
    high: Bound

    @property
    def is_exact(self) -> bool:
        """Whether both ends send the same."""
        return (self.low.uplink, self.low.downlink) == (self.high.uplink, self.high.downlink)


def forecast(
    switches: Switches, shapes: ModelShapes, *, hides_cohorts: bool = False, may_leave_out: bool = False
) -> list[RoundForecast]:
    """Return all rounds of a run in which no client and no worker fails.

    Args:
        switches: of the method.
        shapes: of the model.
        hides_cohorts: whether nobody knows who will take part: then `choose_workers` must name everybody
            who may.
        may_leave_out: whether updates may be left out that are sound: those of late clients.
    """
    walk = _Walk(switches, shapes, may_leave_out=may_leave_out or switches.screening.compares)
    num_clients, downlink = len(walk.high.workers), switches.wire.downlink
    ledgers = Ledger(num_clients, downlink), Ledger(num_clients, downlink)
    rounds = []
    while walk.high.round_num <= switches.schedule.num_rounds:
        low = without_training(walk.low) if hides_cohorts else walk.low
        ends = zip((low, walk.high), ledgers, strict=True)
        rounds.append(RoundForecast(*(_count(switches, shapes, plan, ledger) for plan, ledger in ends)))
        walk.advance()
    return rounds


def _count(switches: Switches, shapes: ModelShapes, plan: RoundPlan, ledger: Ledger) -> Bound:
    uplink = count_uplink(plan, shapes, switches.wire.uplink)
    return Bound(plan, uplink, ledger.count_downlink(plan, shapes))


class _Walk:
    """The least and the most plan of one round after another.

    Args:
        switches: of the method.
        shapes: of the model.
        may_leave_out: whether fewer updates than the cohort's may be used.
    """

    def __init__(self, switches: Switches, shapes: ModelShapes, *, may_leave_out: bool) -> None:
        self.switches, self.shapes, self.may_leave_out = switches, shapes, may_leave_out
        self.annealer = Annealer(switches.schedule, switches.guidance, 0)  # cuts whenever it may
        self.largest = uniform(self.annealer.budget, shapes.modules)
        self.low = self.high = plan_first(switches, shapes)

    def advance(self) -> None:
        """Go to the next round."""
        before, budget = self.annealer.budget, self.annealer.propose(self.high.round_num)
        self.annealer.budget = budget
        low, high = self._ranks(before, budget)
        if self.low == self.high and low == high and not self.may_leave_out:
            self.low = self.high = self._following(self.high, high, high, max)
            return
        least_cut = tuple(map(min, self.low.lora_ranks, high))
        self.low, self.high = (
            self._following(self.low, low, least_cut, min),
            self._following(self.high, high, self._most_cut(low), max),
        )

    def _ranks(self, before: int, budget: int) -> tuple[Ranks, Ranks]:
        """Return the lowest and the highest ranks of the next round."""
        most = self.switches.schedule.rank_max if self.switches.schedule.is_measured else budget
        modules = self.shapes.modules
        if not self.switches.is_spectral or self.high.scope == "full":
            return uniform(budget, modules), uniform(most, modules)
        if budget == before:
            return self.low.lora_ranks, self.high.lora_ranks
        return self._spectral_ranks(budget, most)

    def _spectral_ranks(self, budget: int, most: int) -> tuple[Ranks, Ranks]:
        # The directions that a budget buys are not known, but their values are, up to one direction's.
        if not self._only_values_count:
            return (1,) * len(self.largest), self.high.lora_ranks
        sides = _sides(self.shapes)
        is_int8 = "int8" in (self.switches.wire.uplink, self.switches.wire.downlink)
        slack = _spread(sides) if is_int8 else 1.0
        least = min(_num_values(self.low.lora_ranks, sides), budget * sum(sides) - max(sides))
        largest = min(_num_values(self.high.lora_ranks, sides), most * sum(sides))
        fill = _Filling(self.shapes.modules, self.largest)
        return fill.at_most(int(least / slack)), fill.at_least(math.ceil(largest * slack))

    @property
    def _only_values_count(self) -> bool:
        """Whether ranks of equally many values cost the same bytes, whichever modules have them."""
        switches, modules = self.switches, self.shapes.modules
        pairs = zip(modules, self.largest, strict=True)
        is_low = all((r - 1) * (one[1] + one[2]) <= one[1] * one[2] for one, r in pairs)
        catches_up_by_factors = is_low or not switches.freezes  # else by matrices, where these are smaller
        return catches_up_by_factors and not (
            switches.client_ranks or switches.has_variates or switches.aggregator.folds
        )

    def _most_cut(self, low: Ranks) -> Ranks:
        """Return the lowest ranks that one cut of the highest can lead to."""
        switches = self.switches
        if not switches.schedule.is_measured or switches.is_spectral or switches.aggregator.folds:
            return low
        return tuple(
            max(r, most - switches.guidance.cut_step)
            for r, most in zip(low, self.high.lora_ranks, strict=True)
        )

    def _following(
        self, plan: RoundPlan, ranks: Ranks, cut: Ranks, choose: Callable[[Iterable[int]], int]
    ) -> RoundPlan:
        """Return the next plan, with these ranks, and with what a cut to others adds to its message."""
        following = self._next(plan, ranks, plan.cohort)
        cuts = [self._next(plan, cut, used) for used in self._possibly_used(plan)]
        values = [self._frozen_values(one.frozen_ranks) for one in cuts]
        places = range(len(ranks))
        picks = [values_at.index(choose(values_at)) for values_at in zip(*values, strict=True)]
        frozen = tuple(cuts[picks[place]].frozen_ranks[place] for place in places)
        return replace(following, frozen_ranks=frozen, mapped_ranks=cuts[0].mapped_ranks)

    def _next(self, plan: RoundPlan, ranks: Ranks, used: Sequence[int]) -> RoundPlan:
        states = [
            plan.round_num if client_id in plan.cohort else r for client_id, r in enumerate(plan.state_rounds)
        ]
        return plan_next(self.switches, plan, self.shapes, ranks, used, states, [0] * len(plan.workers))

    def _possibly_used(self, plan: RoundPlan) -> list[Sequence[int]]:
        """Return whose updates may be used: all, one of the least rank, or nobody's."""
        is_seen = self.switches.aggregator.folds or plan.client_ranks
        if not (self.may_leave_out and is_seen and plan.cohort):
            return [plan.cohort]
        limits = plan.client_ranks or (0,) * len(plan.workers)
        return [plan.cohort, [min(plan.cohort, key=lambda client_id: limits[client_id])], []]

    def _frozen_values(self, forms: Ranks) -> list[int]:
        pairs = zip(self.shapes.modules, forms, strict=True)
        return [one[1] * one[2] if form == DENSE else form * (one[1] + one[2]) for one, form in pairs]


class _Filling:
    """Ranks that are all 1 and then rise direction by direction, evenly, and the cheaper module first.

    Args:
        modules: the adapted linear layers.
        largest: rank of each that is not passed.
    """

    def __init__(self, modules: Sequence[LinearShape], largest: Ranks) -> None:
        self.modules, self.largest = modules, largest
        self.sides = [one.out_features + one.in_features for one in modules]
        levels = (
            (r, side, place) for place, side in enumerate(self.sides) for r in range(2, largest[place] + 1)
        )
        self.order = [place for _, _, place in sorted(levels)]

    def at_most(self, num_values: int) -> Ranks:
        """Return the highest of these ranks whose factors have at most so many values."""
        return self._first(sum(total <= num_values for total in self._totals))

    def at_least(self, num_values: int) -> Ranks:
        """Return the lowest of these ranks whose factors have at least so many values, or the largest."""
        return self._first(sum(total < num_values for total in [sum(self.sides), *self._totals][:-1]))

    @property
    def _totals(self) -> list[int]:
        """Values after each further direction."""
        return list(
            itertools.accumulate((self.sides[place] for place in self.order), initial=sum(self.sides))
        )[1:]

    def _first(self, num_directions: int) -> Ranks:
        taken = self.order[:num_directions]
        ranks = [1] * len(self.sides)
        for place in taken:
            ranks[place] += 1
        return tuple(ranks)


def _sides(shapes: ModelShapes) -> list[int]:
    return [module.out_features + module.in_features for module in shapes.modules]


def _num_values(ranks: Ranks, sides: Sequence[int]) -> int:
    return sum(r * side for r, side in zip(ranks, sides, strict=True))


def _spread(sides: Sequence[int]) -> float:
    """Return how much more bytes a value may cost in one module than in another, scales included."""
    rates = [(side + _INT8_SCALE_BYTES) / side for side in sides]
    return max(rates) / min(rates)
