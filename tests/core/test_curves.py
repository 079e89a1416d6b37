import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpifedlora.core.curves import (
    Span,
    common_path,
    first_reaching,
    measured,
    pareto_front,
    sent_bytes,
    stage_spans,
    summarise_clients,
    time_by_phase,
)

ROUNDS = {
    "round_num": np.array([1, 2, 4]),
    "uplink_bytes": np.array([10, 20, 5]),
    "downlink_bytes": np.array([1, 2, 3]),
    "eval_accuracy": np.array([0.1, np.nan, 0.4]),
    "train_s": np.array([3.0, np.nan, 1.0]),
    "collect_s": np.array([1.0, 1.0, 1.0]),
    "aggregate_s": np.array([0.5, 0.5, 0.5]),
    "broadcast_s": np.array([0.25, 0.25, 0.25]),
    "evaluate_s": np.array([2.0, np.nan, 2.0]),
    "round_s": np.array([5.0, 4.0, 1.0]),
}


def test_bytes_add_up_in_both_directions():
    assert sent_bytes(ROUNDS).tolist() == [11, 33, 41]


def test_bytes_of_many_rounds_do_not_wrap():
    large = np.array([2**62, 2**62, 2**62])
    rounds = {"uplink_bytes": large, "downlink_bytes": np.zeros(3, np.int64)}
    assert sent_bytes(rounds)[-1] == 3.0 * 2**62


def test_only_measured_rounds_are_points_and_bytes_still_count_all():
    curve = measured(ROUNDS, "eval_accuracy")
    assert curve.round_nums.tolist() == [1, 4]
    assert curve.sent_bytes.tolist() == [11, 41]
    assert curve.values.tolist() == [0.1, 0.4]


def test_stages_with_a_gap_in_the_rounds():
    spans = stage_spans([1, 2, 5, 6], ["initiating", "initiating", "annealing", "annealing"])
    assert spans == [Span("initiating", 1, 2), Span("annealing", 5, 6)]
    assert stage_spans([], []) == []


def test_time_that_no_phase_accounts_for_is_other_and_never_negative():
    phases = time_by_phase(ROUNDS)
    assert phases.seconds["other"].tolist() == [0.25, 2.25, 0.0]
    assert phases.seconds["train"].tolist() == [3.0, 0.0, 1.0]
    assert phases.evaluate_s.tolist() == [2.0, 0.0, 2.0]


def test_clients_are_summed_up_over_their_used_rounds():
    clients = {
        "outcome": np.array([["used", "absent"], ["late", "absent"], ["used", "failed"]]),
        "participated": np.array([[True, False], [False, False], [True, False]]),
        "num_examples": np.array([[30, 0], [0, 0], [30, 0]]),
        "train_loss": np.array([[2.0, np.nan], [np.nan, np.nan], [1.0, np.nan]]),
        "train_s": np.array([[4.0, 0.0], [0.0, 0.0], [2.0, 0.0]]),
    }
    first, second = summarise_clients(clients, np.zeros((2, 0), np.int64))
    assert (first.num_examples, first.num_used, first.others) == (30, 2, {"late": 1})
    assert (first.last_loss, first.mean_s, first.total_s) == (1.0, 3.0, 6.0)
    assert (second.num_examples, second.num_used, second.others) == (0, 0, {"failed": 1})
    assert math.isnan(second.last_loss)
    assert math.isnan(second.mean_s)
    assert summarise_clients(clients, np.array([[7, 30], [0, 9]]))[1].num_examples == 9


@pytest.mark.parametrize(("target", "index"), [(0.5, 1), (0.9, 2), (0.0, 0), (0.95, None), (math.nan, None)])
def test_first_reaching(target, index):
    assert first_reaching([0.2, 0.5, 0.9, 0.4], target) == index


NUMBERS = st.floats(0, 10) | st.just(math.nan)


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=12))
def test_the_front_is_what_nobody_beats(points):
    costs, gains = [cost for cost, _ in points], [gain for _, gain in points]
    front = pareto_front(costs, gains)

    def beats(one, other):
        return costs[one] <= costs[other] and gains[one] >= gains[other] and points[one] != points[other]

    known = [place for place, point in enumerate(points) if not any(map(math.isnan, point))]
    unbeaten = {points[place] for place in known if not any(beats(other, place) for other in known)}
    assert {points[place] for place in front} == unbeaten
    assert len(front) == len(unbeaten)
    assert [costs[place] for place in front] == sorted(costs[place] for place in front)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["a.0.q.lin", "a.1.v.lin"], ["0.q", "1.v"]),
        (["only.one"], ["only.one"]),
        ([], []),
        (["a.b", "a.b.c"], ["a.b", "c"]),
        (["x.y", "x.y"], ["x.y", "x.y"]),
    ],
)
def test_what_names_share_is_left_out(names, short):
    assert common_path(names) == short
