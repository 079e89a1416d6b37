"""From a method's switches to the plan of a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mpifedlora.core.allocation import uniform
from mpifedlora.core.cuts import averages_factors, frozen_forms
from mpifedlora.core.faults import set_aside
from mpifedlora.core.layout import ModelShapes, Parts
from mpifedlora.core.plan import ABSENT, RoundPlan
from mpifedlora.core.schedule import rank_factor
from mpifedlora.core.switches import Switches


def plan_round(
    switches: Switches,
    shapes: ModelShapes,
    round_num: int,
    lora_ranks: tuple[int, ...],
    frozen_ranks: tuple[int, ...],
    state_rounds: Sequence[int],
    failures: Sequence[int],
) -> RoundPlan:
    """Return the plan of a round, as far as it says nothing of its message.

    Args:
        switches: of the method.
        shapes: of the model.
        round_num: 1..num_rounds; num_rounds + 1 trains nobody, and carries the final model.
        lora_ranks: rank of each module.
        frozen_ranks: of what is added to the base weights before the round.
        state_rounds: by client id, the round whose client state holds.
        failures: by client id, in a row; who has too many is not chosen.
    """
    schedule = switches.schedule
    planned = min(round_num, schedule.num_rounds)
    scope = switches.round_scope(planned)
    without = set_aside(failures, switches.max_failures) if round_num == planned else ()
    workers = tuple(switches.choose_workers(planned, without))
    rate = switches.learning_rate(planned, scope)
    if scope != "full":
        first_ranks = uniform(schedule.rank_max, shapes.modules)
        rate *= rank_factor(switches.rate_exponent, first_ranks, lora_ranks)
    return RoundPlan(
        round_num=round_num,
        stage=schedule.stage(planned),
        scope=scope,
        lora_ranks=lora_ranks,
        frozen_ranks=frozen_ranks,
        workers=(ABSENT,) * len(workers) if round_num > planned else workers,
        client_ranks=switches.client_ranks,
        state_rounds=tuple(state_rounds),
        keeps_b=switches.keeps_b,
        keeps_head=switches.keeps_head,
        has_variates=switches.has_variates,
        reduces=switches.reduces,
        learning_rate=rate,
        mu=switches.mu(planned),
        temperature=schedule.temperature(planned),
    )


def plan_first(switches: Switches, shapes: ModelShapes) -> RoundPlan:
    """Return the plan of round 1, whose message is empty."""
    num_clients = len(switches.choose_workers(1, ()))
    budget = switches.schedule.budget(1)
    states = [0] * num_clients if switches.client_keeps_state else []
    nothing = (0,) * len(shapes.modules)
    lora_ranks = uniform(budget, shapes.modules)
    return plan_round(switches, shapes, 1, lora_ranks, nothing, states, [0] * num_clients)


def plan_next(
    switches: Switches,
    present: RoundPlan,
    shapes: ModelShapes,
    lora_ranks: tuple[int, ...],
    used: Sequence[int],
    state_rounds: Sequence[int],
    failures: Sequence[int],
) -> RoundPlan:
    """Return the plan of the round after one, with what its message holds.

    Args:
        switches: of the method.
        present: plan of the round.
        shapes: of the model.
        lora_ranks: of the next round.
        used: ids of the clients whose updates are used.
        state_rounds: by client id, the round whose client state holds from now on.
        failures: by client id, in a row from now on.
    """
    forms = frozen_forms(switches, present, shapes, lora_ranks, used)
    plan = plan_round(switches, shapes, present.round_num + 1, lora_ranks, forms, state_rounds, failures)
    if present.scope == "full" and plan.scope != "full":
        return replace(plan, sends_base=True, sends_state=True, sends_parts="")
    parts: Parts = "ab" if plan.scope == "full" else parts_to_send(switches, present, shapes, lora_ranks)
    is_mapped = (
        present.has_variates and averages_factors(switches, present) and lora_ranks != present.lora_ranks
    )
    mapped = present.lora_ranks if is_mapped and present.scope != "full" else ()
    return replace(plan, sends_state=True, sends_parts=parts, mapped_ranks=mapped)


def parts_to_send(
    switches: Switches, present: RoundPlan, shapes: ModelShapes, ranks: tuple[int, ...]
) -> Parts:
    """Return which factors the message after a round holds: those that changed, or none where all restart.

    Args:
        switches: of the method.
        present: plan of the round.
        shapes: of the model.
        ranks: of the next round.
    """
    if switches.aggregator.active == "restart":
        return ""
    return present.shared_layout(shapes).parts if ranks == present.lora_ranks else "ab"


def given_to(
    workers: Sequence[int], lost: Sequence[int], num_left: int, *, leaves_out: bool = False
) -> tuple[int, ...]:
    """Return by client id who trains it when workers are lost: their clients are shared out, others stay.

    Args:
        workers: by client id, as before.
        lost: their ids; those left keep their order and have the ids 0..num_left-1 from now on.
        num_left: workers that are left.
        leaves_out: whether nobody trains the clients of the lost instead.

    >>> given_to((0, 1, 2, ABSENT, 3), [1], 3)
    (0, 1, 1, -1, 2)
    >>> given_to((0, 1, 2, ABSENT, 3), [1], 3, leaves_out=True)
    (0, -1, 1, -1, 2)
    """
    left = [worker for worker in range(num_left + len(lost)) if worker not in lost]
    new_ids = {ABSENT: ABSENT, **{worker: new_id for new_id, worker in enumerate(left)}}
    adopters = [ABSENT if leaves_out else client_id % num_left for client_id in range(len(workers))]
    return tuple(new_ids.get(worker, adopter) for worker, adopter in zip(workers, adopters, strict=True))


def without_training(plan: RoundPlan) -> RoundPlan:
    """Return a plan like this one in which nobody trains."""
    return replace(plan, workers=(ABSENT,) * len(plan.workers))


def shrink(switches: Switches, lost: Sequence[int], num_left: int) -> Switches:
    """Return the switches of a run that goes on without the lost workers; see `given_to`."""
    choose = switches.choose_workers
    return replace(
        switches,
        choose_workers=lambda round_num, set_aside: given_to(choose(round_num, set_aside), lost, num_left),
    )
