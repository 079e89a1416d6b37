"""What of a round wants attention, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mpifedlora.core.faults import set_aside
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.report import RoundReport
from mpifedlora.core.screening import ABOVE_BOUND, NOT_FINITE
from mpifedlora.core.switches import Switches
from mpifedlora.core.wire import FAILED, LATE, POSTPONED

_ADVICE = {
    NOT_FINITE: "is not finite and was left out; a lower learning rate may help",
    ABOVE_BOUND: "is above aggregation.norm_bound and was left out",
    FAILED: "is missing: its training failed, and its worker's standard error says why",
    LATE: "is missing: it was not trained by faults.round_deadline_s",
    POSTPONED: "is late (faults.round_deadline_s): the client goes on in its next round",
}


def round_warnings(
    plan: RoundPlan, report: RoundReport, failures: Sequence[int], switches: Switches
) -> Iterator[str]:
    """Give a line for each update that is missing, left out or late, and for each client set aside.

    Args:
        plan: of the round.
        report: of the round.
        failures: by client id, in a row, this round included.
        switches: of the method.
    """
    for client_id, outcome in report.outcomes.items():
        if outcome in _ADVICE:
            yield f"round {plan.round_num}: the update of client {client_id} {_ADVICE[outcome]}"
    for update in report.participants:
        if update.staleness:
            began = plan.round_num - update.staleness
            yield f"round {plan.round_num}: the update of client {update.client_id} began in round {began}"
    for client_id in set_aside(failures, switches.max_failures):
        if client_id in report.outcomes:  # later it is in no cohort
            failed = f"has failed {switches.max_failures} times in a row"
            yield f"client {client_id} {failed} and is no longer chosen"
    if not report.participants:
        why = "no update could be used" if report.outcomes else "no client took part"
        what = "takes the noise alone" if switches.noise is not None else "stays as it was"
        yield f"round {plan.round_num}: {why}; the global state {what}"
