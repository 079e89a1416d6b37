"""Run the package with a change that it does not offer, for the study's ablations.

    python benchmarks/study/variants.py NAME run RUN_FILE --out DIR     # NAME, then as for `mpifedlora`

- `balanced-split`: a cut gives A and B the square root of the singular values each, not A rows of one norm.
- `cut-first`: every client's product is cut to the next round's rank before the sum, not the sum alone.
- `update-subspace`: behind a `full` round A starts in the leading directions of that round's update, not at
  random (LoRA-GA, arXiv 2407.05000, starts in those of a gradient). In one process only.
- `frozen-embeddings`, `frozen-norms`: embeddings, or layer norms, get no gradient under the scope `full`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mpifedlora.cli.main import entry
from mpifedlora.core import aggregation, fresh
from mpifedlora.core.aggregation import ModuleSum
from mpifedlora.core.allocation import uniform
from mpifedlora.core.combining import Combination
from mpifedlora.core.layout import Factors, ModelShapes
from mpifedlora.core.lowrank import INITIAL_ROW_NORM, Svd, factors_of, svd_of_matrix, svd_of_product
from mpifedlora.core.rounds import Coordinator
from mpifedlora.core.screening import Contribution
from mpifedlora.training import models
from mpifedlora.training.models import FederatedModel


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


def leading_rows(shapes: ModelShapes, before: Tensor, after: Tensor) -> list[Tensor]:
    """Return the right singular vectors of each adapted weight's change, the largest first.

    Args:
        shapes: of the model.
        before: (values of the body,) or more, float32; what lies behind the body is not read.
        after: the same.
    """
    layout = shapes.base()
    changes = layout.whole_tensors(after[: layout.num_values] - before[: layout.num_values])
    by_name = {one.name: change for one, change in zip(layout.whole, changes, strict=True)}
    return [svd_of_matrix(by_name[f"{module.name}.weight"]).vt for module in shapes.modules]


def start_in_the_update() -> None:
    """Let server and clients, which are one process here, start A in `leading_rows`."""
    advance, drawn, rows = Coordinator._advance_full, fresh.initial_adapter, list[Tensor]()

    def adapter(
        shapes: ModelShapes, lora_ranks: Sequence[int], head: Tensor, seed: int, round_num: int = 1
    ) -> Tensor:
        flat = drawn(shapes, lora_ranks, head, seed, round_num)
        for factors, row in zip(shapes.adapter(lora_ranks).factors(flat), rows, strict=True):
            factors.a.copy_(row[: factors.lora_rank] * INITIAL_ROW_NORM)
        return flat

    def advance_full(self: Coordinator, values: Sequence[Tensor], weights: Sequence[float]) -> None:
        before = self.state
        advance(self, values, weights)
        plan = self.next_plan
        if plan.scope != "full":
            rows[:] = leading_rows(self.shapes, before, plan.split(self.shapes, self.message).base)
            head = plan.layout(self.shapes).whole_values(self.state).clone()
            self.state.copy_(adapter(self.shapes, plan.lora_ranks, head, self.seed, plan.round_num))

    Coordinator._advance_full = advance_full  # type: ignore[method-assign]
    models.initial_adapter = adapter  # type: ignore[attr-defined]


def freeze(kind: type[nn.Module]) -> None:
    """Let modules of a kind have gradients of zero where the whole model is trained."""
    enter = FederatedModel._enter

    def enter_and_fix(self: FederatedModel, scope: str) -> None:
        was_full = self._is_full
        enter(self, scope)
        if self._is_full and not was_full:
            fixed = [module for module in self.peft_model.modules() if isinstance(module, kind)]
            for parameter in (parameter for module in fixed for parameter in module.parameters()):
                parameter.register_hook(torch.zeros_like)  # type: ignore[no-untyped-call]

    FederatedModel._enter = enter_and_fix  # type: ignore[method-assign]


VARIANTS: Mapping[str, Callable[[], None]] = {
    "balanced-split": balance_the_split,
    "cut-first": cut_first,
    "update-subspace": start_in_the_update,
    "frozen-embeddings": partial(freeze, nn.Embedding),
    "frozen-norms": partial(freeze, nn.LayerNorm),
}


if __name__ == "__main__":
    VARIANTS[sys.argv.pop(1)]()
    entry()
