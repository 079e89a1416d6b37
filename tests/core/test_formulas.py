"""The formulas that reports show compute what runs compute."""

import math

import pytest
from made_runs import make_config

from mpifedlora.core.config import RunConfig
from mpifedlora.core.formulas import rank_formula, rate_formula
from mpifedlora.core.method_config import RunTables
from mpifedlora.core.schedule import learning_rate_factor, rank_factor
from mpifedlora.runtime.method import rank_schedule

FUNCTIONS = {"floor": math.floor, "cos": math.cos, "pi": math.pi, "min": min, "max": max}


def config_with(num_rounds=11, **tables):
    return RunTables.model_validate_json(make_config(4, num_rounds, **tables))


def evaluate(formula, t):
    """Return the left sides of a formula in round t, the last equation first: each needs those after it."""
    names = {**FUNCTIONS, **formula.values, "t": t}
    found = {}
    for left, right in reversed(formula.equations):
        name = left.removesuffix("(t)")
        for known in found:
            right = right.replace(f"{known}(t)", known)
        found[name] = names[name] = eval(right.replace("^", "**"), {"__builtins__": {}}, names)
    return found


SHAPES = [
    {"schedule": "linear"},
    {"schedule": "cosine", "heating_rounds": 0},
    {"schedule": "cubic", "cooling_rounds": 4},
    {"schedule": "exponential", "exponential_end": 0.05},
    {"schedule": "step", "num_steps": 3},
    {"schedule": "constant"},
]


@pytest.mark.parametrize("annealing", SHAPES, ids=lambda table: table["schedule"])
@pytest.mark.parametrize("initiating", [0, 3])
def test_the_budget_is_that_of_the_run(annealing, initiating):
    config = config_with(annealing=annealing, initiating={"rounds": initiating}, lora={"rank_min": 3})
    schedule = rank_schedule(RunConfig.model_validate_json(config.model_dump_json()))
    formula = rank_formula(config)
    starts_at_once = initiating + config.annealing.heating_rounds == 0
    assert ("u(1) = 0" in formula.notes) == starts_at_once
    for t in range(2 if starts_at_once else 1, 12):
        found = evaluate(formula, t)
        assert found["b"] == schedule.budget(t), t
        if "tau" in found:
            assert found["tau"] == pytest.approx(schedule.temperature(t), abs=1e-12), t


@pytest.mark.parametrize("kind", ["metropolis", "target"])
def test_a_measured_budget_has_words_for_it_and_the_temperature_of_the_run(kind):
    config = config_with(annealing={"schedule": kind})
    formula = rank_formula(config)
    assert "b(t)" not in dict(formula.equations)
    assert "held-out" in formula.notes
    assert evaluate(formula, 8)["tau"] == pytest.approx(1 - 4 / 7)


def test_a_run_that_ends_before_cooling_keeps_its_rank():
    formula = rank_formula(config_with(num_rounds=3))
    assert formula.equations == [("b(t)", "rank_max")]
    assert "before cooling" in formula.notes


def test_the_whole_model_has_no_rank():
    assert rank_formula(config_with(training={"scope": "full"})) is None


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("scope", ["adapter", "full"])
def test_the_learning_rate_is_that_of_the_run(kind, scope):
    rates = {"learning_rate": 0.02, "full_learning_rate": 0.001}
    training = {"learning_rate_schedule": kind, "scope": scope, **rates}
    config = config_with(training=training, annealing={"schedule": "constant"})
    largest = 0.001 if scope == "full" else 0.02
    for t in (1, 5, 11):
        wanted = largest * learning_rate_factor(kind, t, 11)
        assert evaluate(rate_formula(config), t)["eta"] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("initiating", "start"), [({"scope": "adapter"}, 0), ({"scope": "full", "rounds": 3}, 3)]
)
def test_the_learning_rate_warms_up(initiating, start):
    training = {"learning_rate": 0.02, "warmup_rounds": 4, "learning_rate_schedule": "constant"}
    annealing = {"schedule": "constant"}
    formula = rate_formula(config_with(training=training, initiating=initiating, annealing=annealing))
    rates = [evaluate(formula, start + t)["eta"] for t in (1, 2, 5, 6)]
    assert rates == pytest.approx([0.004, 0.008, 0.02, 0.02])


def test_the_learning_rate_follows_the_rank():
    annealing = {"schedule": "linear", "heating_rounds": 1, "rate_exponent": 0.5}
    training = {"learning_rate": 0.02, "learning_rate_schedule": "constant"}
    config = config_with(annealing=annealing, training=training, lora={"rank_max": 8, "rank_min": 2})
    formula, ranks = rate_formula(config), rank_formula(config)
    for t in (1, 6, 11):
        names = {**FUNCTIONS, **formula.values, "b": lambda t: evaluate(ranks, t)["b"], "t": t}
        rate = eval(dict(formula.equations)["eta(t)"].replace("^", "**"), {"__builtins__": {}}, names)
        budget = evaluate(ranks, t)["b"]
        assert rate == pytest.approx(0.02 * rank_factor(0.5, [8], [budget]))
