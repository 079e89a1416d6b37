"""What a round leaves behind in shapes alone: the same for a run and for its forecast."""

from __future__ import annotations

from collections.abc import Sequence

from mpifedlora.core.aggregation import Aggregator, weighted_mean
from mpifedlora.core.layout import DENSE, LinearShape, ModelShapes
from mpifedlora.core.lowrank import num_triplets
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.switches import Switches


def averages_factors(switches: Switches, plan: RoundPlan) -> bool:
    """Say whether the next factors are means of the clients' factors."""
    return switches.aggregator.active == "mean" or plan.scope != "adapter" or plan.keeps_b


def frozen_form(module: LinearShape, lora_rank: int) -> int:
    """Return the rank that frozen directions are sent with, or DENSE where the whole matrix is smaller."""
    values = lora_rank * (module.out_features + module.in_features)
    return DENSE if values > module.out_features * module.in_features else lora_rank


def frozen_forms(
    switches: Switches, plan: RoundPlan, shapes: ModelShapes, lora_ranks: Sequence[int], used: Sequence[int]
) -> tuple[int, ...]:
    """Return what a round adds to each module's base weight: a rank, or DENSE.

    Args:
        switches: of the method.
        plan: of the round.
        shapes: of the model.
        lora_ranks: of the next round.
        used: ids of the clients whose updates are used; without any the state is the only one.
    """
    if plan.keeps_b or plan.scope == "full":
        return (0,) * len(shapes.modules)
    sent = [
        _sent_rank(switches, plan, shapes, place, lora_ranks[place], used) for place in range(len(lora_ranks))
    ]
    if switches.aggregator.folds:
        return tuple(map(frozen_form, shapes.modules, sent))
    return tuple(sent)


def _sent_rank(
    switches: Switches, plan: RoundPlan, shapes: ModelShapes, place: int, active: int, used: Sequence[int]
) -> int:
    module, present, aggregator = shapes.modules[place], plan.lora_ranks[place], switches.aggregator
    limits = [plan.client_ranks[client_id] if plan.client_ranks else present for client_id in used]
    ranks = [min(present, limit) for limit in limits] or [present]
    if aggregator.active == "restart":
        return sum(ranks)
    averages = averages_factors(switches, plan)
    if averages and active == present:
        beyond = 0
    else:
        is_robust = bool(used) and not averages and switches.combiner is not weighted_mean
        inner = present if averages else sum(ranks)
        found = (
            min(module.out_features, module.in_features) if is_robust else num_triplets(*module[1:], inner)
        )
        beyond = _beyond(aggregator, found, present if switches.freezes else active, active)
    return beyond + (len(ranks) - 1) * present * (aggregator.folds and averages)


def _beyond(aggregator: Aggregator, found: int, kept: int, active: int) -> int:
    """Return the directions behind the active ones; an aggregator that folds keeps all that there are."""
    return (found if aggregator.folds else min(kept, found)) - min(active, found)
