"""Run the package with a change that it does not offer, for the study's ablations.

    python benchmarks/study/variants.py NAME run RUN_FILE --out DIR     # NAME, then as for `mpifedlora`

- `balanced-split`: a cut gives A and B the square root of the singular values each, not A rows of one norm.
- `cut-first`: every client's product is cut to the next round's rank before the sum, not the sum alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from mpifedlora.cli.main import entry
from mpifedlora.core import aggregation
from mpifedlora.core.aggregation import ModuleSum
from mpifedlora.core.allocation import uniform
from mpifedlora.core.combining import Combination
from mpifedlora.core.layout import Factors
from mpifedlora.core.lowrank import Svd, factors_of, svd_of_product
from mpifedlora.core.screening import Contribution


def balanced(svd: Svd, first: int, last: int | None) -> Factors:
    """Return singular directions as `lowrank.factors_of` does, the singular values shared out evenly."""
    root = svd.s[first:last].sqrt().to(svd.u.dtype)
    return Factors(svd.vt[first:last] * root[:, None], svd.u[:, first:last] * root)


def balance_the_split() -> None:
    """Let every cut use `balanced`."""
    aggregation.factors_of = balanced  # type: ignore[attr-defined]


def cut_first() -> None:
    """Cut the clients' updates before they are summed."""
    sums = Combination.sums

    def of_cut(
        self: Combination, values: Tensor, used: Sequence[Contribution], weights: Sequence[float]
    ) -> list[ModuleSum]:
        schedule = self.switches.schedule
        budget = schedule.budget(min(self.plan.round_num + 1, schedule.num_rounds))
        ranks = uniform(budget, self.shapes.modules)
        return sums(self, values, [part._replace(factors=_cut(part, ranks)) for part in used], weights)

    Combination.sums = of_cut  # type: ignore[method-assign]


def _cut(part: Contribution, ranks: Sequence[int]) -> list[Factors]:
    pairs = zip(part.factors, ranks, strict=True)
    return [one if one.lora_rank <= rank else factors_of(svd_of_product(one), 0, rank) for one, rank in pairs]


VARIANTS: Mapping[str, Callable[[], None]] = {
    "balanced-split": balance_the_split,
    "cut-first": cut_first,
}


if __name__ == "__main__":
    VARIANTS[sys.argv.pop(1)]()
    entry()
