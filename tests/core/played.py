"""A federation whose training is played: what `test_rounds` holds its laws over.

`PlayedWorker` does with a message what a real worker does, on whole models in double precision, and its
clients train by adding noise. So all that the coordinator sends can be compared with exact arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpifedlora.core.aggregation import AGGREGATORS, weighted_mean
from mpifedlora.core.annealer import Guidance
from mpifedlora.core.cohort import assign_clients, choose_cohort, draw_poisson_cohort
from mpifedlora.core.fresh import initial_adapter
from mpifedlora.core.layout import AdapterLayout, Factors, LinearShape, ModelShapes, TensorShape
from mpifedlora.core.plan import ABSENT, RoundPlan
from mpifedlora.core.robust import coordinate_median, trimmed_mean
from mpifedlora.core.rounds import Coordinator, RoundReport
from mpifedlora.core.schedule import RankSchedule
from mpifedlora.core.screening import Screening
from mpifedlora.core.seeding import numpy_generator, torch_seed
from mpifedlora.core.server_optimizer import Moments, ServerOptimizer
from mpifedlora.core.server_update import FlatUpdate, GaussianNoise
from mpifedlora.core.switches import Switches
from mpifedlora.core.wire import ClientUpdate

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
        optimizer: kind of the server's; its constants are in `server_optimizer`.
        noise: standard deviation and expected cohort.
        probability: of taking part, for Poisson sampling.
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
    has_variates: bool = False
    client_ranks: tuple[int, ...] = ()
    optimizer: ServerOptimizer | None = None
    noise: tuple[float, float] | None = None
    robust: str = ""
    norm_bound: float | None = None
    is_spectral: bool = False
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

    def choose_workers(self, round_num: int) -> list[int]:
        if self.probability is None:
            cohort = choose_cohort(ELIGIBLE, self.cohort_size, self.seed, round_num)
        else:
            generator = numpy_generator(self.seed, "cohort", round_num)
            cohort = draw_poisson_cohort(ELIGIBLE, self.probability, generator)
        workers = assign_clients(cohort, dict.fromkeys(cohort, 1), NUM_WORKERS)
        return [workers.get(client_id, ABSENT) for client_id in range(NUM_CLIENTS)]

    def flat_update(self) -> FlatUpdate:
        noise = None
        if self.noise is not None:
            noise = GaussianNoise(*self.noise, torch.Generator().manual_seed(self.seed))
        return FlatUpdate(COMBINERS.get(self.robust, weighted_mean), self.optimizer, noise)

    def rank_schedule(self) -> RankSchedule:
        return RankSchedule(self.schedule, NUM_ROUNDS, self.initiating_rounds, 1, RANK_MAX, RANK_MIN)

    def coordinator(self) -> Coordinator:
        chooses = self.robust if self.robust.endswith("krum") else ""
        switches = Switches(
            schedule=self.rank_schedule(),
            initiating_scope=self.initiating,
            scope=self.scope,
            keeps_b=self.keeps_b,
            has_variates=self.has_variates,
            num_eligible=len(ELIGIBLE),
            client_ranks=self.client_ranks,
            aggregator=AGGREGATORS[self.kind],
            weights=self.weights,
            flat_update=self.flat_update(),
            screening=Screening(self.norm_bound, chooses, 1),
            freezes=self.freezes,
            is_spectral=self.is_spectral,
            guidance=Guidance(cut_step=1, tolerance=0.01, temperature=0.01),
            learning_rate=lambda round_num, scope: (0.5 if scope == "full" else 1.0) / round_num,
            mu=lambda round_num: 0.1 * (round_num <= self.initiating_rounds),
            choose_workers=self.choose_workers,
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


def matrices(body: Tensor) -> list[Tensor]:
    """The adapted weights of a flat model, as views."""
    return SHAPES.base().whole_tensors(body[:NUM_BODY])[: len(SHAPES.modules)]


def add_products(body: Tensor, factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The body with scaling * b @ a added to the adapted weights, in double precision."""
    changed = body.to(torch.float64, copy=True)
    for weight, (a, b) in zip(matrices(changed), factors, strict=True):
        weight += SCALING * b.double() @ a.double()
    return changed


class Cut(NamedTuple):
    """How the cut before a round has mapped each module's factors: a' = a_map @ a, b' = b @ b_map."""

    round_num: int
    before: AdapterLayout
    after: AdapterLayout
    maps: list[tuple[Tensor, Tensor]]


class PlayedWorker:
    """Does with a message what a real worker does, and trains by adding noise."""

    def __init__(self, case: Case) -> None:
        self.seed = case.seed
        self.body = initial_body(case.seed).double()  # base weights, frozen directions added
        self.state = torch.empty(0)
        self.variate = torch.zeros(0)
        self.cuts: list[Cut] = []
        self.models: dict[int, Tensor] = {}  # by client, as trained in this round
        self.memory: dict[tuple[int, int], Tensor] = {}  # all that clients have kept, by client and round

    def receive(self, planned: RoundPlan, message: Tensor) -> None:
        self.plan = plan = RoundPlan.unpack(planned.pack(), len(SHAPES.modules))
        parts = plan.split(SHAPES, message.clone())
        self.body = parts.base.double() if plan.sends_base else self.body
        self._freeze(parts.frozen)
        self.variate = parts.variate.double()
        if plan.mapped_ranks:
            sides = plan.segments(SHAPES).maps.whole_tensors(parts.maps.double())
            before = SHAPES.adapter(plan.mapped_ranks)
            maps = list(zip(sides[::2], sides[1::2], strict=True))
            self.cuts.append(Cut(plan.round_num, before, SHAPES.adapter(plan.lora_ranks), maps))
        self.state = self._received(parts.state) if plan.sends_state else initial_state(self.seed, plan)
        self.models = {}

    def _freeze(self, frozen: Tensor) -> None:
        layout = SHAPES.frozen(self.plan.frozen_ranks)
        self.body = add_products(self.body, layout.factors(frozen))
        names = [module.name for module in SHAPES.modules]
        for shape, dense in zip(layout.whole, layout.whole_tensors(frozen), strict=True):
            matrices(self.body)[names.index(shape.name)].add_(dense.double(), alpha=SCALING)

    def _received(self, sent: Tensor) -> Tensor:
        plan, layout = self.plan, self.plan.layout(SHAPES)
        if plan.scope == "full":
            return sent
        if not plan.sends_parts:
            return initial_adapter(SHAPES, plan.lora_ranks, sent, self.seed, plan.round_num)
        # What was neither sent nor held before would show as nan.
        is_held = self.state.numel() == layout.num_values
        state = self.state.clone() if is_held else torch.full((layout.num_values,), torch.nan)
        source = plan.segments(SHAPES).state
        for held, got in zip(layout.factors(state), source.factors(sent), strict=True):
            if "a" in plan.sends_parts:
                held.a.copy_(got.a)
            if "b" in plan.sends_parts:
                held.b.copy_(got.b)
        layout.whole_values(state).copy_(source.whole_values(sent))
        return state

    def recall(self, plan: RoundPlan, client_id: int) -> Tensor | None:
        """What a client has kept, of the version that the plan names."""
        round_num = plan.state_rounds[client_id] if plan.state_rounds else 0
        return self.memory[client_id, round_num] if round_num else None

    def start(self, client_id: int) -> Tensor:
        """What a client trains on."""
        plan, layout = self.plan, self.plan.layout(SHAPES)
        own = plan.trained_layout(SHAPES, client_id)
        flat = torch.zeros(own.num_values)
        for mine, held in zip(own.factors(flat), layout.factors(self.state), strict=True):
            mine.a.copy_(held.a[: mine.a.shape[0]])
            mine.b.copy_(held.b[:, : mine.b.shape[1]])
        own.whole_values(flat).copy_(layout.whole_values(self.state))
        if plan.keeps_b:
            kept = self.recall(plan, client_id)
            personal = SHAPES.adapter(plan.lora_ranks, "b")
            kept = torch.zeros(personal.num_values) if kept is None else kept
            for mine, held in zip(own.factors(flat), personal.factors(kept), strict=False):
                mine.b.copy_(held.b)
        return flat

    def train(self, client_id: int) -> ClientUpdate:
        plan, flat = self.plan, self.start(client_id)
        trained = flat + 0.3 * random_values(flat.numel(), self.seed, plan.round_num, client_id)
        self.models[client_id] = self.model_of(client_id, trained)
        values = trained
        if plan.keeps_b:
            layout = plan.trained_layout(SHAPES, client_id)
            pairs, head = layout.factors(trained), layout.whole_values(trained)
            values = torch.cat([*(pair.a.reshape(-1) for pair in pairs), head])
            self.memory[client_id, plan.round_num] = torch.cat([pair.b.reshape(-1) for pair in pairs])
        if plan.has_variates:
            values = torch.cat([values, self._change_of_variate(client_id, flat - trained)])
        loss = 1.0 + client_id
        return ClientUpdate(client_id, 10 + client_id, NUM_STEPS, loss, 0.5, 0.1, True, values)

    def _change_of_variate(self, client_id: int, descent: Tensor) -> Tensor:
        # SCAFFOLD, algorithm 1, option II: c_k' = c_k - c + (x - y) / (steps * learning rate)
        change = descent.double() / (NUM_STEPS * self.plan.learning_rate)
        change = (change - self.variate if self.variate.numel() else change).float()
        kept = self.kept_variate(self.plan, client_id)
        self.memory[client_id, self.plan.round_num] = kept + change
        return change

    def kept_variate(self, plan: RoundPlan, client_id: int) -> Tensor:
        """A client's control variate, taken through the cuts since it was kept: c_A' = b^T c_A, c_B' = c_B a^T."""
        variate = self.recall(plan, client_id)
        if variate is None:
            return torch.zeros(plan.shared_layout(SHAPES).num_values, dtype=torch.float64)
        for cut in self.cuts:
            if cut.round_num > plan.state_rounds[client_id]:
                moved = torch.zeros(cut.after.num_values, dtype=torch.float64)
                both = zip(cut.before.factors(variate), cut.after.factors(moved), cut.maps, strict=True)
                for old, new, (a, b) in both:
                    new.a.copy_(b.mT @ old.a)
                    new.b.copy_(old.b @ a.mT)
                cut.after.whole_values(moved).copy_(cut.before.whole_values(variate))
                variate = moved
        return variate

    def model_of(self, client_id: int, trained: Tensor) -> Tensor:
        """The whole model that a client has trained, a factor that it did not train taken from the state."""
        own, layout = self.plan.trained_layout(SHAPES, client_id), self.plan.layout(SHAPES)
        pairs = zip(own.factors(trained), layout.factors(self.state), strict=True)
        complete = {
            "ab": lambda mine, held: mine,
            "a": lambda mine, held: Factors(mine.a, held.b),
            "b": lambda mine, held: Factors(held.a, mine.b),
        }[own.parts]
        return self._whole([complete(mine, held) for mine, held in pairs], own.whole_values(trained))

    def model(self) -> Tensor:
        """The whole global model, flat, in double precision: base + frozen + active, and the head."""
        layout = self.plan.layout(SHAPES)
        return self._whole(layout.factors(self.state), layout.whole_values(self.state))

    def _whole(self, factors: Sequence[Factors], whole: Tensor) -> Tensor:
        if self.plan.scope == "full":
            return whole.double()
        return torch.cat([add_products(self.body, factors), whole.double()])


def exported_model(coordinator: Coordinator, worker: PlayedWorker) -> Tensor:
    """What a run leaves behind, as one flat model; folded directions are only in the replica's weights."""
    changed = [tensor.reshape(-1).double() for tensor in coordinator.base_weights().values()]
    if coordinator.next_plan.scope == "full":
        return torch.cat(changed)
    body = torch.cat(changed) if changed else initial_body(worker.seed)
    if coordinator.switches.aggregator.folds:
        body = worker.body
    factors, head = coordinator.adapter()
    return torch.cat([add_products(body, factors), *(tensor.reshape(-1).double() for tensor in head)])


@dataclass
class Played:
    """One round: what went out, what came back, and what there was after it."""

    plan: RoundPlan
    body: Tensor  # what the clients' active factors were added to
    state: Tensor  # what the clients started from
    before: Tensor  # the model that they received
    updates: list[ClientUpdate]
    models: Mapping[int, Tensor]  # trained, by client
    starts: Mapping[int, Tensor]
    report: RoundReport
    next_plan: RoundPlan
    message: Tensor
    held: Tensor  # the model that the workers hold after it
    held_state: Tensor
    server_state: Tensor
    exported: Tensor
    joined_ranks: tuple[int, ...]
    variate: Tensor | None  # the server's
    sent_variate: Tensor
    kept_variates: list[Tensor]  # of the eligible clients, carried to the next round
    moments: Moments | None
    cuts: list[Cut] = field(default_factory=list)

    @property
    def used(self) -> tuple[ClientUpdate, ...]:
        return self.report.participants

    @property
    def is_cut(self) -> bool:
        return self.next_plan.lora_ranks != self.plan.lora_ranks


Spoil = Callable[[int, list[ClientUpdate]], list[ClientUpdate]]
Judge = Callable[[PlayedWorker, RoundPlan, Tensor], float]


def unspoilt(round_num: int, updates: list[ClientUpdate]) -> list[ClientUpdate]:
    return updates


def play(
    case: Case,
    spoil: Spoil = unspoilt,
    judge: Judge | None = None,
    accuracy: Callable[[int], float] = lambda round_num: 0.0,
) -> list[Played]:
    """Run a whole federation.

    Args:
        case: its switches.
        spoil: may change a round's updates on their way.
        judge: gives the loss of a model, from a worker that has received all before it.
        accuracy: of the model that comes in with a round.
    """
    coordinator, worker, history = case.coordinator(), PlayedWorker(case), []
    worker.receive(coordinator.plan(), coordinator.message)
    for round_num in range(1, NUM_ROUNDS + 1):
        if round_num > 1:
            coordinator.note(accuracy(round_num))
        history.append(_play_round(coordinator, worker, spoil, judge))
    return history


def _play_round(coordinator: Coordinator, worker: PlayedWorker, spoil: Spoil, judge: Judge | None) -> Played:
    plan, body, state, before = worker.plan, worker.body.clone(), worker.state.clone(), worker.model()
    starts = {client_id: worker.start(client_id) for client_id in plan.cohort}
    updates = spoil(plan.round_num, [worker.train(client_id) for client_id in plan.cohort])
    models = worker.models
    report = coordinator.finish(updates, None if judge is None else partial(judge, worker))
    worker.receive(coordinator.plan(), coordinator.message)
    moments = coordinator.switches.flat_update.moments
    has_variates, has_factors = coordinator.variate is not None, worker.plan.scope != "full"
    return Played(
        plan=plan,
        body=body,
        state=state,
        before=before,
        updates=updates,
        models=models,
        starts=starts,
        report=report,
        next_plan=worker.plan,
        message=coordinator.message.clone(),
        held=worker.model(),
        held_state=worker.state.clone(),
        server_state=coordinator.state.clone(),
        exported=exported_model(coordinator, worker),
        joined_ranks=tuple(part.lora_rank for part in coordinator.adapter()[0]) if has_factors else (),
        variate=coordinator.variate.clone() if coordinator.variate is not None else None,
        sent_variate=worker.variate,
        kept_variates=[worker.kept_variate(worker.plan, client) for client in ELIGIBLE] * has_variates,
        moments=None if moments is None else Moments(moments.first.clone(), moments.second.clone()),
        cuts=list(worker.cuts),
    )


@cache
def federation(case: Case) -> list[Played]:
    return play(case)


# What spoils updates.


def not_finite(update: ClientUpdate) -> ClientUpdate:
    return replace(update, values=update.values * torch.nan, is_finite=False, train_loss=torch.nan)


def with_bad_client(client_id: int) -> Spoil:
    return lambda _, updates: [
        not_finite(update) if update.client_id == client_id else update for update in updates
    ]


def without_client(client_id: int) -> Spoil:
    return lambda _, updates: [update for update in updates if update.client_id != client_id]


def nobody_in(*rounds: int) -> Spoil:
    return lambda round_num, updates: [
        not_finite(update) if round_num in rounds else update for update in updates
    ]


# Exact arithmetic on whole models.


def distance(one: Tensor, other: Tensor, origin: Tensor | float = 0.0) -> float:
    """How far apart two models are, relative to how far the second is from an origin."""
    return float((one - other).norm() / (other - origin).norm())


def client_weights(case: Case, played: Played) -> Tensor:
    """The clients' weights, of sum 1, from the dense models."""
    weights = {
        "examples": lambda: [float(update.num_examples) for update in played.used],
        "equal": lambda: [1.0 for _ in played.used],
        "frobenius": lambda: [
            float((played.models[update.client_id][:NUM_BODY] - played.body).norm()) for update in played.used
        ],
    }[case.weights]()
    return torch.tensor(weights, dtype=torch.float64) / sum(weights)


def mean_model(case: Case, played: Played) -> Tensor:
    """The exact mean of the used clients' whole models; without any, the model that they received."""
    if not played.used:
        return played.before
    models = torch.stack([played.models[update.client_id] for update in played.used])
    return (client_weights(case, played)[:, None] * models).sum(0)


def products(model: Tensor, body: Tensor) -> list[Tensor]:
    """What a model adds to a body, by module: b @ a."""
    return [matrix / SCALING for matrix in matrices(model[:NUM_BODY] - body)]


def tail_energy(matrix: Tensor, kept_rank: int) -> float:
    """Squared distance of a matrix to its best approximation of a rank (Eckart-Young)."""
    return float(torch.linalg.svdvals(matrix)[kept_rank:].square().sum())
