"""The formulas of a run's rank budget and learning rate, as Python expressions with `^` for powers.

They say in letters what `core.schedule` computes; `tests/core/test_formulas.py` evaluates them against it.
"""

from __future__ import annotations

from typing import NamedTuple

from mpifedlora.core.method_config import RunTables

BUDGET = "max(1, floor(rank_min + (rank_max - rank_min) * tau(t) + 1/2))"
_FIXED = ("b(t)", "rank_max")
TEMPERATURES = {
    "constant": "1",
    "linear": "1 - u(t)",
    "cosine": "(1 + cos(pi * u(t))) / 2",
    "cubic": "(1 - u(t))^3",
    "exponential": "(tau_end^u(t) - tau_end) / (1 - tau_end)",
    "step": "1 - floor(num_steps * u(t)) / num_steps",
    "metropolis": "1 - u(t)",
    "target": "1 - u(t)",
}
COOLED = "min(1, max(0, t - start) / cooling)"
LEARNING_RATES = {
    "constant": "1",
    "linear": "1 - (t - 1) / num_rounds",
    "cosine": "(1 + cos(pi * (t - 1) / num_rounds)) / 2",
}
_PAPER = "SA-FedLoRA, arXiv 2405.09394 v1 (stages and budget; the paper fixes no formula for the cooling)"
_SOURCES = {
    "cubic": "; its cubic shape: AdaLoRA, arXiv 2303.10512, equation 12",
    "exponential": "; tau_end^u, shifted and scaled so that it ends at 0",
    "target": "; led by accuracy: the idea of SPD-CFL, arXiv 2405.09394 v2",
}
_MEASURED = {
    "metropolis": "b(t) follows what is measured: a further cut is tried on held-out examples, and taken if "
    "the loss does not rise, or rises by x with probability exp(-x / (metropolis_temperature * tau(t)))",
    "target": "b(t) follows what is measured: cutting goes on while the held-out accuracy stays within "
    "tolerance of its best, then it stops for good",
}
_FIRST = "u(1) = 0: nothing can be cut before round 1"


class Formula(NamedTuple):
    """What a number of each round t follows from.

    Args:
        equations: left and right sides.
        values: of the letters, by name.
        notes: what no equation says.
        source: paper and equation; empty where it is nobody's in particular.
    """

    equations: list[tuple[str, str]]
    values: dict[str, float]
    notes: str
    source: str


def rank_formula(config: RunTables) -> Formula | None:
    """Return what the rank budget of round t follows from, or None where there are no ranks.

    Args:
        config: of the run.
    """
    if config.training.scope == "full":
        return None
    annealing, lora, kind = config.annealing, config.lora, config.annealing.schedule
    equations = [("b(t)", BUDGET), ("tau(t)", TEMPERATURES[kind])]
    values: dict[str, float] = {"rank_max": lora.rank_max, "rank_min": lora.rank_min}
    if kind == "constant":
        return Formula([_FIXED], {"rank_max": lora.rank_max}, "", "")
    start = config.initiating.rounds + annealing.heating_rounds
    cooling = annealing.cooling_rounds or config.federation.num_rounds - start
    if cooling <= 0:
        return Formula([_FIXED], values, "the run ends before cooling begins", _PAPER)
    equations.append(("u(t)", COOLED))
    values |= {"start": start, "cooling": cooling}
    values |= {"tau_end": annealing.exponential_end} if kind == "exponential" else {}
    values |= {"num_steps": annealing.num_steps} if kind == "step" else {}
    if kind in _MEASURED:
        equations = equations[1:]
    notes = [_MEASURED[kind]] if kind in _MEASURED else []
    notes += [_FIRST] if start == 0 else []
    return Formula(equations, values, "; ".join(notes), _PAPER + _SOURCES.get(kind, ""))


def rate_formula(config: RunTables) -> Formula:
    """Return what the learning rate of round t follows from.

    Args:
        config: of the run.
    """
    training = config.training
    is_full = training.scope == "full"
    rate = training.full_learning_rate if is_full else training.learning_rate
    rounds: dict[str, float] = {"num_rounds": config.federation.num_rounds}
    product = f"eta_1 * {_bracketed(LEARNING_RATES[training.learning_rate_schedule])}"
    if training.warmup_rounds:
        rounds["warmup_rounds"] = training.warmup_rounds
        start = config.rounds_before_scope
        product += f" * min(1, {f'(t - {start})' if start else 't'} / (warmup_rounds + 1))"
    exponent, ranks = config.annealing.rate_exponent, rank_formula(config)
    if exponent and ranks and _FIXED not in ranks.equations:
        rounds |= {"rank_max": config.lora.rank_max, "rate_exponent": exponent}
        product += " * (rank_max / b(t)) ^ rate_exponent"
    return Formula([("eta(t)", product)], {"eta_1": rate, **rounds}, "", "")


def _bracketed(expression: str) -> str:
    return expression if expression.isalnum() else f"({expression})"
