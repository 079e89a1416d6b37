from __future__ import annotations

import math

import pytest
import torch

from mpifedlora.core.aggregation import ModuleAggregate
from mpifedlora.core.layout import Factors
from mpifedlora.core.report import report_round
from mpifedlora.core.wire import UpdateHeader

NOTHING = Factors(torch.zeros(0, 2), torch.zeros(2, 0))
HEADERS = [UpdateHeader(1, 30, 4, 2.0, 0.5, 9.0, True), UpdateHeader(5, 10, 4, 6.0, 0.1, 9.0, True)]
OUTCOMES = {1: "used", 3: "not finite", 5: "used"}


def aggregate(exact: float, error: float, dropped: float) -> ModuleAggregate:
    return ModuleAggregate(NOTHING, NOTHING, exact, error, dropped)


def test_hand_sized_report() -> None:
    modules = [aggregate(3.0, 0.75, 0.5), aggregate(1.0, 0.25, 0.0)]
    report = report_round(HEADERS, OUTCOMES, [0.75, 0.25], modules, sees_factors=True)
    assert (report.participants, report.outcomes) == (tuple(HEADERS), OUTCOMES)
    assert (report.train_loss, report.penalty) == (3.0, pytest.approx(0.4))
    # Of all modules together: sqrt(1 / 4), and 0.5 / 4.
    assert (report.aggregation_error, report.dropped_energy) == (0.5, 0.125)


def test_without_the_clients_factors_the_error_is_unknown() -> None:
    report = report_round(HEADERS, OUTCOMES, [0.75, 0.25], [aggregate(4.0, 1.0, 1.0)], sees_factors=False)
    assert math.isnan(report.aggregation_error)
    assert report.dropped_energy == 0.25


@pytest.mark.parametrize("modules", [[], [aggregate(0.0, 0.0, 0.0)]])
def test_of_nothing_nothing_is_lost(modules: list[ModuleAggregate]) -> None:
    report = report_round(HEADERS, OUTCOMES, [0.75, 0.25], modules, sees_factors=True)
    assert (report.aggregation_error, report.dropped_energy) == (0, 0)


def test_nobodys_loss_is_nan() -> None:
    report = report_round([], {3: "not finite"}, [], [aggregate(1.0, 0.0, 0.0)], sees_factors=True)
    assert (report.participants, report.outcomes) == ((), {3: "not finite"})
    assert math.isnan(report.train_loss)
    assert math.isnan(report.penalty)
    assert report.aggregation_error == 0
