import json
import math

import numpy as np
import pytest
from made_runs import make_config

from mpifedlora.core.comparison import (
    Run,
    Spread,
    choose_metric,
    comparability_notes,
    compare,
    default_target,
    front_points,
    group_by_seed,
)
from mpifedlora.core.curves import Curve
from mpifedlora.core.differences import differing_keys
from mpifedlora.core.metrics import Metric
from mpifedlora.errors import ConfigError

NAN = math.nan
ACCURACY, PERPLEXITY = Metric.named("accuracy"), Metric.named("perplexity")


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
    fedit, flora = compare(groups, 0.5, ACCURACY)
    assert (fedit.num_runs, fedit.num_reached) == (2, 2)
    assert fedit.bytes_to_target.mean == 25.0
    assert fedit.rounds_to_target.mean == 2.5
    assert fedit.final.mean == pytest.approx(0.5)
    assert fedit.best.mean == pytest.approx(0.55)
    assert flora.num_reached == 0
    assert math.isnan(flora.bytes_to_target.mean)
    assert (fedit.is_efficient, flora.is_efficient) == (True, True)


def test_a_group_of_which_some_miss_the_target_has_no_mean():
    (row,) = compare(group_by_seed([make("a", [0.2, 0.5]), make("b", [0.2, 0.3], seed=1)]), 0.5, ACCURACY)
    assert (row.num_reached, row.num_runs) == (1, 2)
    assert math.isnan(row.bytes_to_target.mean)


def test_who_pays_more_for_less_is_not_efficient():
    rows = compare(
        group_by_seed([make("a", [0.5]), make("b", [0.4], method="flora", each=11.0)]), 0.5, ACCURACY
    )
    assert [row.is_efficient for row in rows] == [True, False]


def test_the_default_target_is_a_share_of_the_best_group_mean():
    groups = group_by_seed([make("a", [0.2, 0.6, 0.5]), make("b", [0.4], method="flora")])
    assert default_target(groups, ACCURACY) == pytest.approx(0.95 * 0.6)
    assert math.isnan(default_target(group_by_seed([make("a", [])]), ACCURACY))


def test_a_run_without_a_measured_accuracy_is_a_row_of_unknowns():
    (row,) = compare(group_by_seed([make("a", [])]), NAN, ACCURACY)
    assert math.isnan(row.final.mean)
    assert not row.is_efficient


def test_the_front_goes_over_all_rounds_of_all_groups():
    groups = group_by_seed([make("a", [0.2, 0.6]), make("b", [0.3, 0.4], method="flora", each=12.0)])
    assert front_points(groups, ACCURACY) == ([10.0, 12.0, 20.0], [0.2, 0.3, 0.6])


def test_of_a_metric_of_which_less_is_better_the_lowest_is_best():
    groups = group_by_seed([
        make("a", [90.0, 40.0, 50.0]),
        make("b", [80.0, 60.0, 55.0], method="flora", each=9.0),
        make("c", [90.0, 70.0, 60.0], method="ffa-lora", each=9.5),
    ])  # fmt: skip
    assert default_target(groups, PERPLEXITY) == pytest.approx(1.05 * 40)
    fedit, flora, _ = rows = compare(groups, 58.0, PERPLEXITY)
    assert (fedit.final.mean, fedit.best.mean) == (50.0, 40.0)
    assert (fedit.bytes_to_target.mean, flora.bytes_to_target.mean) == (20.0, 27.0)
    assert [row.num_reached for row in rows] == [1, 1, 0]
    assert [row.is_efficient for row in rows] == [True, True, False]
    assert front_points(groups, PERPLEXITY) == ([9.0, 18.0, 20.0], [80.0, 60.0, 40.0])


def test_the_default_target_of_negative_values_is_short_of_the_best_too():
    groups = group_by_seed([make("a", [-3.0, -2.0])])
    assert default_target(groups, Metric("likelihood")) == pytest.approx(-2.1)
    assert default_target(groups, Metric("energy", is_less_better=True)) == pytest.approx(-2.85)


def curves(**values):
    return {name: make("", each).curve for name, each in values.items()}


def test_the_metric_is_the_accuracy_or_else_the_first_that_all_runs_have():
    classifier = curves(accuracy=[0.5], top3=[0.7], macro_f1=[0.4], loss=[1.0])
    model = curves(accuracy=[], perplexity=[9.0], macro_f1=[], loss=[2.0])
    new = curves(accuracy=[], top3=[], loss=[])
    assert choose_metric({"a": classifier}, None) == "accuracy"
    assert choose_metric({"b": model}, None) == "perplexity"
    assert choose_metric({"a": classifier, "b": model}, None) == "loss"
    assert choose_metric({"new": new, "a": classifier}, None) == "accuracy"
    assert choose_metric({"new": new, "a": classifier}, "top3") == "top3"


def test_a_metric_that_a_run_lacks_is_an_error_that_says_who_has_which():
    model = curves(accuracy=[], perplexity=[9.0], loss=[2.0])
    runs = {"a": curves(accuracy=[0.5], loss=[1.0]), "b": model, "c": model}
    expected = (
        "the metric must be one that all runs have, got accuracy "
        "(a: accuracy, loss; b, c: perplexity, loss); choose loss"
    )
    with pytest.raises(ConfigError) as caught:
        choose_metric(runs, "accuracy")
    assert str(caught.value) == expected
    unlike = {"a": curves(accuracy=[0.5]), "b": curves(score=[1.0])}
    with pytest.raises(ConfigError, match="leave the others out"):
        choose_metric(unlike, None)


def test_comparable_runs_need_no_note():
    runs = [make("a", [0.1], lora={"rank_max": 8}), make("b", [0.1], method="flora")]
    assert comparability_notes(group_by_seed(runs)) == []


@pytest.mark.parametrize(
    ("tables", "note"),
    [
        ({"data": {"alpha": 0.1}}, "data.alpha differs (fedit: 0.5; flora: 0.1)"),
        ({"model": {"name": "other"}}, "model.name differs (fedit: tiny; flora: other)"),
        (
            {"task": {"name": "own.py:build"}},
            "task.name differs (fedit: classification; flora: own.py:build)",
        ),
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


def test_a_long_label_is_short_in_notes_and_hashes_are_short_in_labels():
    one = make("runs/a", [0.1], task={"name": "own.py:build", "sha256": "ab" * 32, "options": {"gamma": 2.0}})
    groups = group_by_seed([one, make("runs/b", [0.1])])
    assert groups[0].label.split(", ")[-1] == "task.sha256=abababab"
    assert comparability_notes(groups) == ["task.name differs (runs/a: own.py:build; runs/b: classification)"]


def test_unlike_seeds_and_unfinished_runs_are_named():
    groups = group_by_seed([make("a", [0.1]), make("b", [0.1], method="flora", seed=4, status="running")])
    seeds, unfinished = comparability_notes(groups)
    assert "seeds differ" in seeds
    assert "fedit: 0; flora: 4" in seeds
    assert unfinished == "b has not finished (it is running after 1 round)"


def test_a_seed_that_counts_twice_is_named():
    (note,) = comparability_notes(group_by_seed([make("a", [0.1]), make("b", [0.1])]))
    assert note == "a seed counts more than once in fedit (a, b): a repeat is no new sample"


def test_a_missing_key_differs_from_a_value():
    assert differing_keys([{"a": {"x": 1}}, {"a": {}}, {}]) == {"a.x": [1, None, None]}
    assert differing_keys([]) == {}
