"""What `[faults]` goes together with: more of the rules of `mpifedlora.core.combinations`."""

from __future__ import annotations

from collections.abc import Callable

from mpifedlora.core.method_config import RunTables
from mpifedlora.core.refusals import bars, needs, needs_one_scope, refuse, switch, value_of


def _cohort_is_enough(config: RunTables) -> None:
    key = "federation.num_clients" if config.federation.cohort_size is None else "federation.cohort_size"
    if config.faults.min_clients > value_of(config, key):
        refuse(
            f"faults.min_clients must be at most {key}",
            f"{config.faults.min_clients} and {value_of(config, key)}",
            f"lower faults.min_clients, or raise {key}",
        )


def _deadlines_depend_on_the_machine(config: RunTables) -> None:
    if config.faults.round_deadline_s is not None:
        why = "who is late depends on the machine and its load"
        needs(config, "faults.round_deadline_s", "federation.reproducible", False, why=why)


def _late_updates_have_a_place(config: RunTables) -> None:
    if config.faults.late == "drop":
        return
    subject = switch(config, "faults.late")
    if config.faults.round_deadline_s is None:
        refuse(
            f"{subject} needs faults.round_deadline_s (without a deadline nobody is late)",
            "none",
            "set faults.round_deadline_s, or leave faults.late out",
        )
    needs_one_scope(config, subject, "what was trained in one stage has no place in the other")
    why = "the next round trains the other factor"
    needs(config, subject, "training.scope", "adapter", "full", "b-only", why=why)
    if config.training.scope == "adapter" and config.annealing.schedule != "constant":
        why = "a cut gives the mean factors a new basis, in which an earlier change means nothing"
        needs(config, subject, "aggregation.kind", "product", "stack", why=why)
    why = "B and head of the client would be of one round, and A of another"
    needs(config, subject, "training.personal", "none", why=why)
    why = "a variate is the mean gradient of steps from one state"
    needs(config, subject, "training.control_variates", False, why=why)
    bars(config, subject, "privacy.clip_norm", "the accountant counts what a client trains in one round")
    why = "a norm as the weight leaves no place for that of a late update"
    needs(config, subject, "aggregation.weights", "examples", "equal", why=why)
    needs(config, subject, "aggregation.robust", "none", why="what sorts or chooses updates has no weights")


FAULT_RULES: tuple[Callable[[RunTables], None], ...] = (
    _cohort_is_enough,
    _deadlines_depend_on_the_machine,
    _late_updates_have_a_place,
)
