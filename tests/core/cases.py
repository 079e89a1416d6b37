"""The switches of the federations that the laws of the rounds are held over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mpifedlora.core.aggregation import AGGREGATORS, weighted_mean
from mpifedlora.core.annealer import Guidance
from mpifedlora.core.cohort import assign_clients, choose_cohort, draw_poisson_cohort
from mpifedlora.core.fresh import initial_adapter
from mpifedlora.core.layout import LinearShape, ModelShapes, TensorShape
from mpifedlora.core.plan import ABSENT, RoundPlan
from mpifedlora.core.robust import coordinate_median, trimmed_mean
from mpifedlora.core.rounds import Coordinator
from mpifedlora.core.schedule import RankSchedule
from mpifedlora.core.screening import Screening
from mpifedlora.core.seeding import numpy_generator, torch_seed
from mpifedlora.core.server_optimizer import ServerOptimizer
from mpifedlora.core.server_update import GaussianNoise
from mpifedlora.core.switches import Switches
from mpifedlora.core.wire import UpdateHeader, WireFormat

# The last client has no examples, and never takes part.
NUM_CLIENTS, ELIGIBLE, NUM_WORKERS, NUM_ROUNDS = 6, range(5), 2, 8
RANK_MAX, RANK_MIN, SCALING, NUM_STEPS = 4, 1, 2.0, 2
# min(in, out) of "k" is below RANK_MAX, and its five clients' factors take the dense way.
SHAPES = ModelShapes(
    (LinearShape("q", 9, 7), LinearShape("k", 3, 5), LinearShape("v", 30, 26)),
    (TensorShape("head.weight", (3, 4)), TensorShape("head.bias", (3,))),
    (
        TensorShape("q.weight", (9, 7)),
        TensorShape("k.weight", (3, 5)),
        TensorShape("v.weight", (30, 26)),
        TensorShape("norm", (6,)),
    ),
)
NUM_HEAD, NUM_ADAPTED = 15, 9 * 7 + 3 * 5 + 30 * 26
NUM_BODY = NUM_ADAPTED + 6
SIDES, AREAS = (16, 8, 56), (63, 15, 780)  # in + out, in * out
COMBINERS = {"median": coordinate_median, "trimmed-mean": trimmed_mean(1)}


@dataclass(frozen=True)
class Case:
    """The switches that the laws are held over.

    Args:
        initiating: scope of the first two rounds; empty where there is no such stage.
        probability: of taking part, for Poisson sampling.
        noise: clipping norm, noise multiplier and expected cohort.
        robust: `median`, `trimmed-mean`, `krum` or `multi-krum`, each against one client.
        uplink: wire dtype of an update.
        downlink: wire dtype of a message.
        max_failures: in a row, that set a client aside.
    """

    kind: str = "product"
    freezes: bool = True
    initiating: str = "adapter"
    scope: str = "adapter"
    schedule: str = "linear"
    cohort_size: int | None = None
    probability: float | None = None
    weights: str = "examples"
    keeps_b: bool = False
    keeps_head: bool = False
    has_variates: bool = False
    client_ranks: tuple[int, ...] = ()
    optimizer: ServerOptimizer | None = None
    noise: tuple[float, float, float] | None = None
    robust: str = ""
    norm_bound: float | None = None
    is_spectral: bool = False
    uplink: str = "float32"
    downlink: str = "float32"
    has_feedback: bool = False
    reduces: bool = False
    max_failures: int = 99
    seed: int = 0

    def __str__(self) -> str:
        changed = {one.name: getattr(self, one.name) for one in fields(self)}
        changed = {one.name: changed[one.name] for one in fields(self) if changed[one.name] != one.default}
        return "-".join(map(_label, changed, changed.values())) or "plain"

    @property
    def initiating_rounds(self) -> int:
        return 2 * bool(self.initiating)

    @property
    def folds(self) -> bool:
        return AGGREGATORS[self.kind].folds

    def choose_workers(self, round_num: int, without: Sequence[int] = ()) -> list[int]:
        eligible = [client_id for client_id in ELIGIBLE if client_id not in without]
        if self.probability is None:
            cohort = choose_cohort(eligible, self.cohort_size, self.seed, round_num)
        else:
            generator = numpy_generator(self.seed, "cohort", round_num)
            cohort = draw_poisson_cohort(eligible, self.probability, generator)
        workers = assign_clients(cohort, dict.fromkeys(cohort, 1), NUM_WORKERS)
        return [workers.get(client_id, ABSENT) for client_id in range(NUM_CLIENTS)]

    def gaussian_noise(self) -> GaussianNoise | None:
        if self.noise is None:
            return None
        return GaussianNoise(*self.noise, torch.Generator().manual_seed(self.seed))

    def rank_schedule(self) -> RankSchedule:
        return RankSchedule(self.schedule, NUM_ROUNDS, self.initiating_rounds, 1, RANK_MAX, RANK_MIN)

    def counts(self, update: UpdateHeader) -> int:
        return update.num_examples if self.weights == "examples" else 1

    @property
    def wire(self) -> WireFormat:
        return WireFormat(self.uplink, self.downlink, self.has_feedback, self.seed)

    def coordinator(self) -> Coordinator:
        chooses = self.robust if self.robust.endswith("krum") else ""
        switches = Switches(
            schedule=self.rank_schedule(),
            initiating_scope=self.initiating,
            scope=self.scope,
            keeps_b=self.keeps_b,
            keeps_head=self.keeps_head,
            has_variates=self.has_variates,
            num_eligible=len(ELIGIBLE),
            client_ranks=self.client_ranks,
            aggregator=AGGREGATORS[self.kind],
            weights=self.weights,
            combiner=COMBINERS.get(self.robust, weighted_mean),
            optimizer=self.optimizer,
            noise=self.gaussian_noise(),
            screening=Screening(self.norm_bound, chooses, 1),
            freezes=self.freezes,
            is_spectral=self.is_spectral,
            guidance=Guidance(cut_step=1, tolerance=0.01, temperature=0.01),
            learning_rate=lambda round_num, scope: (0.5 if scope == "full" else 1.0) / round_num,
            mu=lambda round_num: 0.1 * (round_num <= self.initiating_rounds),
            choose_workers=self.choose_workers,
            max_failures=self.max_failures,
            wire=self.wire,
            reduces=self.reduces,
        )
        return Coordinator(SHAPES, switches, partial(initial_state, self.seed), self.seed)


def _label(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value or f"no_{name}"
    if isinstance(value, bool):
        return name if value else {"freezes": "drops"}[name]
    return value.kind if isinstance(value, ServerOptimizer) else f"{name}={value}"


def random_values(num_values: int, *key: int) -> Tensor:
    generator = torch.Generator().manual_seed(torch_seed(key[0], "test", *key[1:]))
    return torch.randn(num_values, generator=generator)


def initial_state(seed: int, plan: RoundPlan) -> Tensor:
    head = random_values(NUM_HEAD, seed, 1000)
    if plan.scope == "full":
        return torch.cat([initial_body(seed), head])
    return initial_adapter(SHAPES, plan.lora_ranks, head, seed)


def initial_body(seed: int) -> Tensor:
    return random_values(NUM_BODY, seed, 2000)


KIND_CASES = [
    *(
        Case(kind, freezes, initiating, cohort_size=cohort_size, seed=seed)
        for kind in ("product", "factors")
        for freezes in (True, False)
        for initiating, cohort_size, seed in (("adapter", None, 0), ("full", 3, 1), ("", 1, 2))
    ),
    *(Case(kind) for kind in ("residual", "stack")),
    *(Case(kind, False, "full", cohort_size=3, seed=1) for kind in ("residual", "stack")),
]
CLIENT_RANKS = (4, 1, 2, 3, 2, 4)
CLIENT_RANK_CASES = [
    Case(kind, freezes, initiating, cohort_size=cohort_size, client_ranks=CLIENT_RANKS)
    for kind in ("product", "zero-pad", "stack")
    for freezes, initiating, cohort_size in ((True, "adapter", None), (False, "", 2))
    if freezes or kind != "stack"
]
FIXED = Case("factors", schedule="constant", initiating="")
B_ONLY, ALTERNATING = replace(FIXED, scope="b-only"), replace(FIXED, scope="alternating")
FULL = Case(initiating="full", scope="full")
PART_CASES = [
    replace(B_ONLY, initiating="full", cohort_size=3),
    *(replace(ALTERNATING, initiating=initiating, cohort_size=3) for initiating in ("", "adapter", "full")),
    replace(FULL, cohort_size=3),
]
PERSONAL = [replace(FIXED, keeps_b=True, keeps_head=keeps, cohort_size=3) for keeps in (False, True)]
VARIATE_CASES = [
    replace(case, has_variates=True, cohort_size=3)
    for case in (Case("factors"), Case("factors", False, is_spectral=True), B_ONLY, FULL)
]
ADAM = ServerOptimizer("fedadam", 0.3, 0.6, 0.8, 0.5)
MOMENTUM = ServerOptimizer("momentum", 0.7, 0.6, 0.0, 0.0)
LASTING = [Case("factors"), Case("factors", False, "full", cohort_size=3), B_ONLY, FULL]
OPTIMIZER_CASES = [
    *(replace(case, optimizer=MOMENTUM) for case in LASTING[:3]),
    *(replace(case, optimizer=ADAM) for case in (LASTING[0], FULL)),
    replace(LASTING[0], optimizer=replace(ADAM, kind="fedyogi"), has_variates=True, cohort_size=3),
    replace(LASTING[1], optimizer=replace(ADAM, kind="fedadagrad")),
    Case("factors", optimizer=ADAM, has_variates=True, probability=0.25, seed=1),
]
SPECTRAL_CASES = [
    Case(kind, freezes, cohort_size=3, is_spectral=True)
    for kind, freezes in (("product", True), ("product", False), ("factors", False), ("residual", True))
]
UNLIKE_SPECTRAL = Case("product", False, "", cohort_size=1, client_ranks=CLIENT_RANKS, is_spectral=True)
ROBUST_CASES = [
    *(replace(case, robust="median") for case in (Case(), B_ONLY)),
    *(replace(case, robust="trimmed-mean") for case in (Case("product", False, "full"), FULL)),
]
KRUM_CASES = [
    *(replace(case, robust="krum") for case in (Case(), FULL)),
    *(replace(case, robust="multi-krum") for case in (Case("factors", False), B_ONLY)),
]
BOUND_CASES = [
    replace(case, norm_bound=bound)
    for case, bound in ((Case(), 6.0), (Case("residual"), 6.0), (B_ONLY, 2.6), (FULL, 8.9))
]
EMPTY_CASES = [
    replace(case, probability=0.25, cohort_size=None, seed=1)
    for case in (*map(Case, sorted(AGGREGATORS)), B_ONLY, ALTERNATING, FULL, PERSONAL[0])
]
WEIGHT_CASES = [
    Case(kind, weights=weights) for kind, weights in (("product", "frobenius"), ("stack", "equal"))
]
# The next values are means of the used clients' values, whichever clients these are.
MEAN_CASES = [
    *KIND_CASES,
    *CLIENT_RANK_CASES,
    *PART_CASES,
    *VARIATE_CASES,
    *SPECTRAL_CASES,
    *KRUM_CASES,
    *BOUND_CASES,
    *WEIGHT_CASES,
    *EMPTY_CASES[:-1],
]
CASES = [*MEAN_CASES, *PERSONAL, EMPTY_CASES[-1], *OPTIMIZER_CASES, *ROBUST_CASES]


def over(cases: Sequence[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=str)


def adapters(cases: Sequence[Case]) -> list[Case]:
    return [case for case in cases if case.scope == "adapter" and not case.keeps_b]
