"""A federation whose training is played: what `test_rounds` holds its laws over.

`PlayedWorker` does with a message what a real worker does, on whole models in double precision, and its
clients train by adding noise. So all that the coordinator sends can be compared with exact arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, fields
from functools import cache, cached_property, partial
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
from mpifedlora.core.server_update import GaussianNoise
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
        probability: of taking part, for Poisson sampling.
        noise: clipping norm, noise multiplier and expected cohort.
        robust: `median`, `trimmed-mean`, `krum` or `multi-krum`, each against one client.
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

    def gaussian_noise(self) -> GaussianNoise | None:
        if self.noise is None:
            return None
        return GaussianNoise(*self.noise, torch.Generator().manual_seed(self.seed))

    def rank_schedule(self) -> RankSchedule:
        return RankSchedule(self.schedule, NUM_ROUNDS, self.initiating_rounds, 1, RANK_MAX, RANK_MIN)

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
    return [
        part.view(shape)
        for part, (_, *shape) in zip(body[:NUM_ADAPTED].split(AREAS), SHAPES.modules, strict=True)
    ]


def add_products(body: Tensor, factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The body with scaling * b @ a added to the adapted weights, in double precision."""
    changed = body.to(torch.float64, copy=True)
    for weight, (a, b) in zip(matrices(changed), factors, strict=True):
        weight += SCALING * b.double() @ a.double()
    return changed


def flattened(factors: Sequence[Factors], parts: str, whole: Tensor) -> Tensor:
    """Some of the factors, and whole values behind them."""
    pairs = (pair._asdict() for pair in factors)
    return torch.cat([*(pair[part].reshape(-1) for pair in pairs for part in parts), whole])


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
        self.trained: dict[int, Tensor] = {}  # in this round, by client
        self.memory: dict[tuple[int, int], Tensor] = {}  # all that clients have kept, by client and round

    def receive(self, planned: RoundPlan, message: Tensor) -> None:
        self.plan = plan = RoundPlan.unpack(planned.pack(), len(SHAPES.modules))
        parts = plan.split(SHAPES, message.clone())
        self.layout = plan.layout(SHAPES)
        self.body = parts.base.double() if plan.sends_base else self.body
        self._freeze(parts.frozen)
        self.variate = parts.variate.double()
        if plan.mapped_ranks:
            sides = plan.segments(SHAPES).maps.whole_tensors(parts.maps.double())
            before = SHAPES.adapter(plan.mapped_ranks)
            maps = list(zip(sides[::2], sides[1::2], strict=True))
            self.cuts = [*self.cuts, Cut(plan.round_num, before, SHAPES.adapter(plan.lora_ranks), maps)]
        self.state = self._received(parts.state) if plan.sends_state else initial_state(self.seed, plan)
        self.factors = self.layout.factors(self.state)
        self.trained = {}

    def _freeze(self, frozen: Tensor) -> None:
        if not frozen.numel():
            return
        layout = SHAPES.frozen(self.plan.frozen_ranks)
        self.body = add_products(self.body, layout.factors(frozen))
        names = [module.name for module in SHAPES.modules]
        for shape, dense in zip(layout.whole, layout.whole_tensors(frozen), strict=True):
            matrices(self.body)[names.index(shape.name)].add_(dense.double(), alpha=SCALING)

    def _received(self, sent: Tensor) -> Tensor:
        plan, layout = self.plan, self.layout
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
        if source.whole:
            layout.whole_values(state).copy_(source.whole_values(sent))
        return state

    def twin(self) -> PlayedWorker:
        """A worker that has received the same, and goes its own way from here."""
        return copy(self)

    def recall(self, plan: RoundPlan, client_id: int) -> Tensor | None:
        """What a client has kept, of the version that the plan names."""
        round_num = plan.state_rounds[client_id]
        return self.memory[client_id, round_num] if round_num else None

    def start(self, client_id: int) -> Tensor:
        """What a client trains on."""
        plan = self.plan
        own = plan.trained_layout(SHAPES, client_id)
        flat = torch.zeros(own.num_values)
        for mine, held in zip(own.factors(flat), self.factors, strict=True):
            mine.a.copy_(held.a[: mine.a.shape[0]])
            mine.b.copy_(held.b[:, : mine.b.shape[1]])
        own.whole_values(flat).copy_(self.layout.whole_values(self.state))
        kept = self.recall(plan, client_id) if plan.keeps_b else None
        if kept is not None:
            personal = SHAPES.adapter(plan.lora_ranks, "b")
            for mine, held in zip(own.factors(flat), personal.factors(kept), strict=True):
                mine.b.copy_(held.b)
            if plan.keeps_head:
                own.whole_values(flat).copy_(kept[personal.factor_values :])
        return flat

    def train(self, client_id: int) -> ClientUpdate:
        plan, flat = self.plan, self.start(client_id)
        layout = plan.trained_layout(SHAPES, client_id)
        trained = flat + 0.3 * random_values(flat.numel(), self.seed, plan.round_num, client_id)
        self.trained[client_id] = trained
        values = trained
        if plan.keeps_b:
            pairs, head = layout.factors(trained), layout.whole_values(trained)
            shared, own = (head[:0], head) if plan.keeps_head else (head, head[:0])
            values = flattened(pairs, "a", shared)
            self.memory[client_id, plan.round_num] = flattened(pairs, "b", own)
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
        """A client's control variate, taken through the cuts since then: c_A' = b^T c_A, c_B' = c_B a^T."""
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

    def model_of(self, client_id: int) -> Tensor:
        """The whole model that a client has trained, a factor that it did not train taken from the state."""
        own, trained = self.plan.trained_layout(SHAPES, client_id), self.trained[client_id]
        pairs = zip(own.factors(trained), self.factors, strict=True)
        complete = {
            "ab": lambda mine, held: mine,
            "a": lambda mine, held: Factors(mine.a, held.b),
            "b": lambda mine, held: Factors(held.a, mine.b),
        }[own.parts]
        return self._whole([complete(mine, held) for mine, held in pairs], own.whole_values(trained))

    def model(self) -> Tensor:
        """The whole global model, flat, in double precision: base + frozen + active, and the head."""
        return self._whole(self.factors, self.layout.whole_values(self.state))

    def _whole(self, factors: Sequence[Factors], whole: Tensor) -> Tensor:
        if self.plan.scope == "full":
            return whole.double()
        return torch.cat([add_products(self.body, factors), whole.double()])


@dataclass(frozen=True)
class Played:
    """One round: what went out, what came back, and what there was after it.

    Args:
        sent: the worker as it sent the updates.
        updates: as they arrived.
        report: of the round.
        coordinator: after the round.
        got: the worker after it has received what the round has made.
        message: that it has received.
    """

    case: Case
    sent: PlayedWorker
    updates: list[ClientUpdate]
    report: RoundReport
    coordinator: Coordinator
    got: PlayedWorker
    message: Tensor

    @property
    def plan(self) -> RoundPlan:
        return self.sent.plan

    @property
    def next_plan(self) -> RoundPlan:
        return self.got.plan

    @cached_property
    def before(self) -> Tensor:
        """The model that the clients started from."""
        return self.sent.model()

    @cached_property
    def held(self) -> Tensor:
        """The model that the workers hold after the round."""
        return self.got.model()

    @cached_property
    def models(self) -> dict[int, Tensor]:
        """By client of the cohort, the model that it has trained."""
        return {client_id: self.sent.model_of(client_id) for client_id in self.plan.cohort}

    @property
    def used(self) -> list[int]:
        return [update.client_id for update in self.report.participants]

    @property
    def is_cut(self) -> bool:
        return self.next_plan.lora_ranks != self.plan.lora_ranks


Spoil = Callable[[int, list[ClientUpdate]], list[ClientUpdate]]
Judge = Callable[[PlayedWorker, RoundPlan, Tensor], float]


def play(
    case: Case,
    spoil: Spoil = lambda round_num, updates: updates,
    judge: Judge | None = None,
    accuracy: Callable[[int], float] = lambda round_num: 0.0,
) -> list[Played]:
    """Run a whole federation.

    Args:
        case: its switches.
        spoil: may change a round's updates on their way.
        judge: gives the loss of a plan and message, from the worker before it.
        accuracy: of the model that comes in with a round.
    """
    coordinator, worker, history = case.coordinator(), PlayedWorker(case), []
    worker.receive(coordinator.plan(), coordinator.message)
    for round_num in range(1, NUM_ROUNDS + 1):
        if round_num > 1:
            coordinator.note(accuracy(round_num))
        updates = spoil(round_num, [worker.train(client_id) for client_id in worker.plan.cohort])
        sent = worker.twin()
        report = coordinator.finish(updates, None if judge is None else partial(judge, sent))
        worker.receive(coordinator.plan(), coordinator.message)
        after, message = _snapshot(coordinator), coordinator.message.clone()
        history.append(Played(case, sent, updates, report, after, worker.twin(), message))
    return history


def _snapshot(coordinator: Coordinator) -> Coordinator:
    """A copy without what later rounds change in place."""
    after, update = copy(coordinator), copy(coordinator.flat_update)
    after.frozen = [list(kept) for kept in after.frozen]
    after.variate = None if after.variate is None else after.variate.clone()
    if update.moments is not None:
        update.moments = Moments(update.moments.first.clone(), update.moments.second.clone())
    after.flat_update = update
    return after


def exported_model(played: Played) -> Tensor:
    """What a run would leave behind; folded directions are in the weights of the server's own model only."""
    coordinator, worker = played.coordinator, played.got
    changed = [tensor.reshape(-1).double() for tensor in coordinator.base_weights().values()]
    if worker.plan.scope == "full":
        return torch.cat(changed)
    body = torch.cat(changed) if changed else initial_body(worker.seed)
    factors, head = coordinator.adapter()
    body = add_products(worker.body if played.case.folds else body, factors)
    return torch.cat([body, *(tensor.reshape(-1).double() for tensor in head)])


@cache
def federation(case: Case) -> list[Played]:
    return play(case)


# Exact arithmetic on whole models.


def distance(one: Tensor, other: Tensor) -> float:
    """How far apart two tensors are, relative to the second."""
    return float((one - other).norm() / other.norm())


def client_weights(played: Played) -> Tensor:
    """The used clients' weights, of sum 1."""
    body = played.sent.body
    weigh: Callable[[int], float] = {
        "examples": lambda client_id: 10.0 + client_id,
        "equal": lambda client_id: 1.0,
        "frobenius": lambda client_id: float((played.models[client_id][:NUM_BODY] - body).norm()),
    }[played.case.weights]
    weights = torch.tensor([weigh(client_id) for client_id in played.used], dtype=torch.float64)
    return weights / weights.sum()


def mean_model(played: Played) -> Tensor:
    """The exact mean of the used clients' whole models; without any, the model that they received."""
    if not played.used:
        return played.before
    models = torch.stack([played.models[client_id] for client_id in played.used])
    return client_weights(played) @ models


def products(played: Played, model: Tensor) -> list[Tensor]:
    """What a model adds to the base weights of its round, by module: b @ a."""
    return [matrix / SCALING for matrix in matrices(model[:NUM_BODY] - played.sent.body)]


def tail_energy(matrix: Tensor, kept_rank: int) -> float:
    """Squared distance of a matrix to its best approximation of a rank (Eckart-Young)."""
    return float(torch.linalg.svdvals(matrix)[kept_rank:].square().sum())
