"""Temperature, rank budget, learning rate and penalty of every round (pure functions of round_num).

The stages are SA-FedLoRA's (arXiv 2405.09394 v1): *initiating*, then *annealing*, which heats
(temperature 1), cools (1 to 0) and stays cold. The paper fixes no formula for the cooling; each
shape here is a named option.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Stage = Literal["initiating", "annealing"]


def _exponential(cooled: float, end: float) -> float:
    return (math.pow(end, cooled) - end) / (1 - end)


def _step(cooled: float, num_steps: int) -> float:
    # The small term keeps 3/5 * 5 from falling on the wrong side of a stair.
    return 1 - math.floor(cooled * num_steps + 1e-9) / num_steps


@dataclass(frozen=True)
class RankSchedule:
    """LoRA rank budget b(t) of each round.

    Args:
        kind: shape of the cooling over the cooled fraction u in [0, 1]: `constant` 1, `linear` 1-u,
            `cosine` (1+cos(pi u))/2, `cubic` (1-u)^3, `exponential`, `step`; `metropolis` and `target`
            cool linearly, but their budget follows what is measured (see `Annealer`).
        num_rounds: rounds of the run.
        initiating_rounds: rounds of stage 1, at the full budget.
        heating_rounds: rounds of stage 2 at temperature 1.
        cooling_rounds: rounds until the temperature is 0; None for all that remain.
        rank_max: budget at temperature 1.
        rank_min: budget at temperature 0.
        exponential_end: tau_end of `exponential`.
        num_steps: stairs of `step`.

    References:
        SA-FedLoRA, arXiv 2405.09394 v1; cubic: AdaLoRA, arXiv 2303.10512, equation 12.

    >>> schedule = RankSchedule("linear", 4, initiating_rounds=0, heating_rounds=1, rank_max=8, rank_min=2)
    >>> [schedule.budget(round_num) for round_num in (1, 2, 3, 4)]
    [8, 6, 4, 2]
    """

    kind: str
    num_rounds: int
    initiating_rounds: int
    heating_rounds: int
    rank_max: int
    rank_min: int
    cooling_rounds: int | None = None
    exponential_end: float = 0.01
    num_steps: int = 4

    @property
    def is_measured(self) -> bool:
        """Whether the budget follows what is measured."""
        return self.kind in ("metropolis", "target")

    def stage(self, round_num: int) -> Stage:
        """Name the stage of a round (1..num_rounds)."""
        return "initiating" if round_num <= self.initiating_rounds else "annealing"

    def cooled(self, round_num: int) -> float:
        """Return the cooled fraction u in [0, 1]; 0 in round 1, before which nothing can be cut."""
        start = self.initiating_rounds + self.heating_rounds
        rounds = self.cooling_rounds or self.num_rounds - start
        if round_num == 1 or round_num <= start or rounds <= 0:
            return 0.0
        return min(1.0, (round_num - start) / rounds)

    def temperature(self, round_num: int) -> float:
        """Return tau in [0, 1]."""
        shapes: dict[str, Callable[[float], float]] = {
            "constant": lambda u: 1.0,
            "linear": lambda u: 1 - u,
            "metropolis": lambda u: 1 - u,
            "target": lambda u: 1 - u,
            "cosine": lambda u: (1 + math.cos(math.pi * u)) / 2,
            "cubic": lambda u: (1 - u) ** 3,
            "exponential": lambda u: _exponential(u, self.exponential_end),
            "step": lambda u: _step(u, self.num_steps),
        }
        return shapes[self.kind](self.cooled(round_num))

    def budget(self, round_num: int) -> int:
        """Return b(t), rounded half up, at least 1; after the last round b stays (nothing is cut)."""
        tau = self.temperature(min(round_num, self.num_rounds))
        # The small term keeps 1 + 15 * 1/10 from falling on the wrong side of a half.
        return max(1, math.floor(self.rank_min + (self.rank_max - self.rank_min) * tau + 0.5 + 1e-9))


def learning_rate_factor(kind: str, round_num: int, num_rounds: int) -> float:
    """Return the factor on the learning rate in a round: 1 in the first, towards 0 after the last.

    Args:
        kind: `constant`, `linear` or `cosine`.
        round_num: 1..num_rounds.
        num_rounds: rounds of the run.

    >>> [learning_rate_factor("linear", round_num, 4) for round_num in (1, 2, 3, 4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    done = (round_num - 1) / num_rounds
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[kind]


def warmup_factor(warmup_rounds: int, round_num: int) -> float:
    """Return the factor on the learning rate in a round: equal steps up to 1 in round warmup_rounds + 1.

    >>> [warmup_factor(3, round_num) for round_num in (1, 2, 3, 4, 5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return min(1.0, round_num / (warmup_rounds + 1))


def rank_factor(exponent: float, first_ranks: Sequence[int], lora_ranks: Sequence[int]) -> float:
    """Return the factor on the learning rate where the rank has fallen: (first / present) ** exponent.

    Under Adam each direction of B @ A moves by about the learning rate, r of them together by r times that.

    Args:
        exponent: 0 leaves the learning rate as it is.
        first_ranks: of the modules before any cut.
        lora_ranks: of the modules now; the means of both are compared.

    >>> rank_factor(1.0, [16, 8], [4, 2]), rank_factor(0.5, [16, 8], [4, 2]), rank_factor(0.0, [16], [4])
    (4.0, 2.0, 1.0)
    """
    factor: float = (sum(first_ranks) / sum(lora_ranks)) ** exponent
    return factor


def proximal_weight(mu: float, kind: str, round_num: int, num_rounds: int) -> float:
    """Return mu in a round of a stage: `constant`, or `linear` from mu down to 0 in its last round."""
    if kind == "constant" or num_rounds == 1:
        return mu
    return mu * (num_rounds - round_num) / (num_rounds - 1)
