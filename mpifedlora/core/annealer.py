"""The rank budget as a run goes: fixed by the schedule, or led by what is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpifedlora.core.schedule import RankSchedule
from mpifedlora.core.seeding import numpy_generator


@dataclass(frozen=True)
class Guidance:
    """How measured schedules cut.

    Args:
        cut_step: ranks a cut takes.
        tolerance: `target` cuts while the held-out accuracy is within this of its best.
        temperature: scale of the loss that `metropolis` may lose, at tau = 1.
    """

    cut_step: int = 1
    tolerance: float = 0.01
    temperature: float = 0.01


class Annealer:
    """The budget of each round, one round at a time.

    Under `target` (the idea of SPD-CFL, arXiv 2405.09394 v2) the budget falls by cut_step a round as
    long as the held-out accuracy stays within a tolerance of its best; the first time it does not,
    cutting stops for good. Under `metropolis` each such cut is proposed, and the caller accepts it or
    not by `accepts`. All other schedules are functions of the round alone.

    Args:
        schedule: stages, shape and bounds.
        guidance: of measured schedules.
        seed: of the run.
    """

    def __init__(self, schedule: RankSchedule, guidance: Guidance, seed: int) -> None:
        self.schedule, self.guidance, self.seed = schedule, guidance, seed
        self.budget = schedule.budget(1)
        self.best_accuracy = -math.inf
        self.is_cutting = True

    def propose(self, round_num: int) -> int:
        """Return the budget of the round after `round_num`; after the last one nothing is cut."""
        schedule = self.schedule
        following = min(round_num + 1, schedule.num_rounds)
        if not schedule.is_measured:
            return schedule.budget(following)
        is_due = round_num < schedule.num_rounds and schedule.cooled(following) > 0
        if not (is_due and self.is_cutting):
            return self.budget
        return max(min(schedule.rank_min, self.budget), self.budget - self.guidance.cut_step)

    @property
    def follows_accuracy(self) -> bool:
        """Whether the next cut still depends on what `note` is told."""
        return self.schedule.kind == "target" and self.is_cutting

    @property
    def needs_judge(self) -> bool:
        """Whether cuts are tried before they are sent."""
        return self.schedule.kind == "metropolis"

    def note(self, accuracy: float) -> None:
        """Take the held-out accuracy of a round's model, one round late: `target` goes by it."""
        self.best_accuracy = max(self.best_accuracy, accuracy)
        if accuracy < self.best_accuracy - self.guidance.tolerance:
            self.is_cutting = False

    def accepts(self, round_num: int, rise: float) -> bool:
        """Say whether `metropolis` accepts a cut that raises the held-out loss by `rise`.

        Accepted if the loss does not rise, else with probability exp(-rise / (temperature * tau)).

        References:
            Metropolis et al., J. Chem. Phys. 21 (1953); Kirkpatrick et al., Science 220 (1983).
        """
        if rise <= 0:
            return True
        heat = self.guidance.temperature * self.schedule.temperature(round_num)
        draw = numpy_generator(self.seed, "metropolis", round_num).random()
        return heat > 0 and bool(draw < math.exp(-rise / heat))
