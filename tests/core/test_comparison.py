import json
import math

import numpy as np
import pytest
from made_runs import make_config

from mpifedlora.core.comparison import (
    Run,
    Spread,
    comparability_notes,
    compare,
    default_target,
    front_points,
    group_by_seed,
)
from mpifedlora.core.curves import Curve
from mpifedlora.core.differences import differing_keys

NAN = math.nan


def make(name, accuracies, *, method="fedit", seed=0, each=10.0, rounds=None, status="finished", **tables):
    rounds = np.array(rounds or range(1, len(accuracies) + 1))
    values = np.array(accuracies, np.float64)
    tables["federation"] = {"method": method, "seed": seed, **tables.get("federation", {})}
    config = json.loads(make_config(4, 6, **tables))
    curve = Curve(rounds, rounds * each, values)
    return Run(name, method, config, status, curve, len(rounds), len(rounds) * each, 60.0, 0.9)


def test_runs_that_differ_by_seed_or_by_what_changes_no_number_are_one_group():
    runs = [
        make("a", [0.1, 0.4]),
        make("b", [0.1], method="flora"),
        make("c", [0.3, 0.6], seed=1),
        make("d", [0.2, 0.5], seed=2, checkpoint={"every": 3}),
    ]
    groups = group_by_seed(runs)
    assert [(group.label, [run.name for run in group.runs]) for group in groups] == [
        ("fedit", ["a", "c", "d"]),
        ("flora", ["b"]),
    ]
    assert groups[0].curve.values == pytest.approx([0.2, 0.5])
    assert groups[0].deviation == pytest.approx([0.1, 0.1])


def test_groups_of_one_method_are_named_by_what_they_differ_in():
    one = make("a", [0.1], lora={"rank_max": 8}, federation={"reproducible": False})
    other = make("b", [0.1], seed=3, lora={"rank_max": 4})
    groups = group_by_seed([one, other, make("c", [0.1], method="flora")])
    assert [group.label for group in groups] == [
        "fedit, federation.reproducible=false, lora.rank_max=8",
        "fedit, federation.reproducible=true, lora.rank_max=4",
        "flora",
    ]


def test_the_mean_is_over_rounds_that_every_seed_has():
    runs = [make("a", [0.1, 0.3], rounds=[1, 3]), make("b", [0.5, 0.7, 0.9], seed=1, each=20.0)]
    curve = group_by_seed(runs)[0].curve
    assert curve.round_nums.tolist() == [1, 3]
    assert curve.values == pytest.approx([0.3, 0.6])
    assert curve.sent_bytes == pytest.approx([15.0, 45.0])


def test_spread():
    assert Spread.of([0.1, 0.3]) == pytest.approx((0.2, math.sqrt(0.02)))
    assert Spread.of([0.1])[0] == 0.1
    assert math.isnan(Spread.of([0.1]).deviation)
    assert math.isnan(Spread.of([0.1, NAN]).mean)


def test_bytes_and_rounds_to_the_target_are_those_of_the_first_measured_round_that_reaches_it():
    groups = group_by_seed([
        make("a", [0.2, 0.5, 0.4]),
        make("b", [0.2, 0.3, 0.6], seed=1),
        make("c", [0.2, 0.3], method="flora", each=4.0),
    ])  # fmt: skip
    fedit, flora = compare(groups, 0.5)
    assert (fedit.num_runs, fedit.num_reached) == (2, 2)
    assert fedit.bytes_to_target.mean == 25.0
    assert fedit.rounds_to_target.mean == 2.5
    assert fedit.final_accuracy.mean == pytest.approx(0.5)
    assert fedit.best_accuracy.mean == pytest.approx(0.55)
    assert flora.num_reached == 0
    assert math.isnan(flora.bytes_to_target.mean)
    assert (fedit.is_efficient, flora.is_efficient) == (True, True)


def test_a_group_of_which_some_miss_the_target_has_no_mean():
    (row,) = compare(group_by_seed([make("a", [0.2, 0.5]), make("b", [0.2, 0.3], seed=1)]), 0.5)
    assert (row.num_reached, row.num_runs) == (1, 2)
    assert math.isnan(row.bytes_to_target.mean)


def test_who_pays_more_for_less_is_not_efficient():
    rows = compare(group_by_seed([make("a", [0.5]), make("b", [0.4], method="flora", each=11.0)]), 0.5)
    assert [row.is_efficient for row in rows] == [True, False]


def test_the_default_target_is_a_share_of_the_best_group_mean():
    groups = group_by_seed([make("a", [0.2, 0.6, 0.5]), make("b", [0.4], method="flora")])
    assert default_target(groups) == pytest.approx(0.95 * 0.6)
    assert math.isnan(default_target(group_by_seed([make("a", [])])))


def test_a_run_without_a_measured_accuracy_is_a_row_of_unknowns():
    (row,) = compare(group_by_seed([make("a", [])]), NAN)
    assert math.isnan(row.final_accuracy.mean)
    assert not row.is_efficient


def test_the_front_goes_over_all_rounds_of_all_groups():
    groups = group_by_seed([make("a", [0.2, 0.6]), make("b", [0.3, 0.4], method="flora", each=12.0)])
    assert front_points(groups) == ([10.0, 12.0, 20.0], [0.2, 0.3, 0.6])


def test_comparable_runs_need_no_note():
    runs = [make("a", [0.1], lora={"rank_max": 8}), make("b", [0.1], method="flora")]
    assert comparability_notes(group_by_seed(runs)) == []


@pytest.mark.parametrize(
    ("tables", "note"),
    [
        ({"data": {"alpha": 0.1}}, "data.alpha differs (fedit: 0.5; flora: 0.1)"),
        ({"model": {"name": "other"}}, "model.name differs (fedit: tiny; flora: other)"),
        ({"federation": {"num_rounds": 9}}, "federation.num_rounds differs (fedit: 6; flora: 9)"),
        ({"federation": {"num_clients": 5}}, "federation.num_clients differs (fedit: 4; flora: 5)"),
        ({"evaluation": {"max_examples": 7}}, "evaluation.max_examples differs (fedit: none; flora: 7)"),
        (
            {"evaluation": {"split": "validation"}},
            "evaluation.split differs (fedit: test; flora: validation)",
        ),
    ],
)
def test_what_makes_runs_unlike_is_named(tables, note):
    groups = group_by_seed([make("a", [0.1]), make("b", [0.1], method="flora", **tables)])
    assert comparability_notes(groups) == [note]


def test_unlike_seeds_and_unfinished_runs_are_named():
    groups = group_by_seed([make("a", [0.1]), make("b", [0.1], method="flora", seed=4, status="running")])
    seeds, unfinished = comparability_notes(groups)
    assert "seeds differ" in seeds
    assert "fedit: 0; flora: 4" in seeds
    assert unfinished == "b has not finished (it is running after 1 rounds)"


def test_a_seed_that_counts_twice_is_named():
    (note,) = comparability_notes(group_by_seed([make("a", [0.1]), make("b", [0.1])]))
    assert note == "a seed counts more than once in fedit (a, b): a repeat is no new sample"


def test_a_missing_key_differs_from_a_value():
    assert differing_keys([{"a": {"x": 1}}, {"a": {}}, {}]) == {"a.x": [1, None, None]}
    assert differing_keys([]) == {}
