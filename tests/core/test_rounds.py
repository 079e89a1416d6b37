from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from mpifedlora.core.aggregation import AGGREGATORS
from mpifedlora.core.cohort import assign_clients, choose_cohort
from mpifedlora.core.layout import LinearShape, ModelShapes, TensorShape
from mpifedlora.core.fresh import initial_adapter
from mpifedlora.core.rounds import Coordinator, RoundReport
from mpifedlora.core.schedule import RankSchedule
from mpifedlora.core.seeding import torch_seed
from mpifedlora.core.plan import ABSENT, RoundPlan
from mpifedlora.core.switches import Switches
from mpifedlora.core.wire import ClientUpdate

NUM_CLIENTS, NUM_WORKERS, NUM_ROUNDS, INITIATING_ROUNDS = 5, 2, 8, 2
RANK_MAX, RANK_MIN, SCALING = 4, 1, 2.0
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
NUM_HEAD, NUM_BODY = 15, 9 * 7 + 3 * 5 + 30 * 26 + 6
SIDES = (16, 8, 56)  # in + out


class Case(NamedTuple):
    """The switches that the laws are held over."""

    freezes: bool = True
    kind: str = "product"
    initiating: str = "adapter"
    scope: str = "adapter"
    cohort_size: int | None = None
    seed: int = 0

    def __str__(self) -> str:
        return (
            f"{'freeze' if self.freezes else 'drop'}-{self.kind}-{self.initiating}-{self.scope}-{self.seed}"
        )

    def choose_workers(self, round_num: int) -> list[int]:
        cohort = choose_cohort(range(NUM_CLIENTS), self.cohort_size, self.seed, round_num)
        workers = assign_clients(cohort, dict.fromkeys(cohort, 1), NUM_WORKERS)
        return [workers.get(client_id, ABSENT) for client_id in range(NUM_CLIENTS)]

    def coordinator(self) -> Coordinator:
        switches = Switches(
            schedule=RankSchedule("linear", NUM_ROUNDS, INITIATING_ROUNDS, 1, RANK_MAX, RANK_MIN),
            initiating_scope=self.initiating,
            scope=self.scope,
            aggregator=AGGREGATORS[self.kind],
            freezes=self.freezes,
            learning_rate=lambda round_num, scope: {"adapter": 1.0, "full": 0.5}[scope] / round_num,
            mu=lambda round_num: 0.1 * (round_num <= INITIATING_ROUNDS),
            choose_workers=self.choose_workers,
        )
        return Coordinator(SHAPES, switches, partial(initial_state, self.seed), self.seed)


ADAPTER_CASES = [
    Case(freezes, kind, initiating, seed=seed, cohort_size=cohort_size)
    for freezes in (True, False)
    for kind in ("product", "factors")
    for initiating, cohort_size, seed in (("adapter", None, 0), ("full", 3, 1), ("adapter", 1, 2))
]
FULL_CASE = Case(initiating="full", scope="full", cohort_size=3)
CASES = [*ADAPTER_CASES, FULL_CASE]
all_cases = pytest.mark.parametrize("case", CASES, ids=str)
adapter_cases = pytest.mark.parametrize("case", ADAPTER_CASES, ids=str)


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


def add_products(body: Tensor, factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the body with scaling * b @ a added to the adapted weights, in double precision."""
    changed = body.to(torch.float64, copy=True)
    for weight, (a, b) in zip(SHAPES.base().whole_tensors(changed), factors, strict=False):
        weight += SCALING * b.double() @ a.double()
    return changed


class PlayedWorker:
    """Does with a message what a real worker does, and trains by adding noise."""

    def __init__(self, case: Case) -> None:
        self.seed = case.seed
        self.body = initial_body(case.seed).double()  # base weights, frozen directions added

    def receive(self, packed: RoundPlan, message: Tensor) -> None:
        self.plan = RoundPlan.unpack(packed.pack(), len(SHAPES.modules))
        base, frozen, state = (part.clone() for part in self.plan.split(SHAPES, message))
        self.body = base.double() if self.plan.sends_base else self.body
        directions = SHAPES.directions(self.plan.frozen_ranks).factors(frozen)
        self.body = add_products(self.body, directions)
        self.state = state if self.plan.sends_state else initial_state(self.seed, self.plan)

    def train(self, client_id: int) -> ClientUpdate:
        noise = random_values(self.state.numel(), self.seed, self.plan.round_num, client_id)
        values = self.state + 0.3 * noise
        return ClientUpdate(client_id, 10 + client_id, 2, 1.0 + client_id, 0.5, 0.1, True, values)

    def model(self, state: Tensor | None = None) -> Tensor:
        """The whole model, flat, in double precision: base + frozen + active, and the head."""
        state = self.state if state is None else state
        if self.plan.scope == "full":
            return state.double()
        layout = self.plan.layout(SHAPES)
        return torch.cat(
            [add_products(self.body, layout.factors(state)), layout.whole_values(state).double()]
        )


def exported_model(coordinator: Coordinator, case: Case) -> Tensor:
    """What the coordinator leaves behind, as one flat model."""
    changed = [tensor.reshape(-1) for tensor in coordinator.base_weights().values()]
    if coordinator.next_plan.scope == "full":
        return torch.cat(changed).double()
    factors, head = coordinator.adapter()
    body = add_products(torch.cat(changed) if changed else initial_body(case.seed), factors)
    return torch.cat([body, *(tensor.reshape(-1).double() for tensor in head)])


@dataclass
class Played:
    """One round: what went out, what came back, and the models after it."""

    plan: RoundPlan
    updates: list[ClientUpdate]
    clients: list[Tensor]  # each client's trained model
    before: Tensor
    report: RoundReport
    next_plan: RoundPlan
    message: Tensor
    held: Tensor = field(default_factory=lambda: torch.empty(0))  # by the workers
    exported: Tensor = field(default_factory=lambda: torch.empty(0))
    joined_ranks: tuple[int, ...] = ()


Spoil = Callable[[int, list[ClientUpdate]], list[ClientUpdate]]


def play(case: Case, spoil: Spoil = lambda _, updates: updates) -> list[Played]:
    """Run a whole federation; `spoil` may change a round's updates on their way."""
    coordinator, worker, history = case.coordinator(), PlayedWorker(case), []
    worker.receive(coordinator.plan(), coordinator.message)
    for round_num in range(1, NUM_ROUNDS + 1):
        plan, before = worker.plan, worker.model()
        updates = spoil(round_num, [worker.train(client_id) for client_id in plan.cohort])
        clients = [worker.model(update.values) for update in updates]
        report = coordinator.finish(updates)
        worker.receive(coordinator.plan(), coordinator.message)
        played = Played(
            plan, updates, clients, before, report, worker.plan, coordinator.message.clone(), worker.model()
        )
        played.exported = exported_model(coordinator, case)
        if worker.plan.scope == "adapter":
            played.joined_ranks = tuple(part.lora_rank for part in coordinator.adapter()[0])
        history.append(played)
    return history


@cache
def federation(case: Case) -> list[Played]:
    return play(case)


def mean_model(played: Played) -> Tensor:
    weights = torch.tensor([float(update.num_examples) for update in played.updates], dtype=torch.float64)
    return (weights[:, None] * torch.stack(played.clients)).sum(0) / weights.sum()


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@all_cases
def test_workers_hold_the_model_that_is_exported(case: Case) -> None:
    for played in federation(case):
        assert distance(played.held, played.exported) < 1e-5


@all_cases
def test_ranks_never_rise_and_follow_the_schedule(case: Case) -> None:
    plans = [played.plan for played in federation(case)]
    # 4 -> 1 over rounds 4 to 8: 3.4, 2.8, 2.2, 1.6, 1.
    budgets = (4, 4, 4, 3, 3, 2, 2, 1)
    assert [plan.lora_ranks for plan in plans] == [(b, min(b, 3), b) for b in budgets]


@adapter_cases
def test_frozen_and_active_ranks_join_to_at_most_rank_max(case: Case) -> None:
    for played in federation(case):
        wanted = (RANK_MAX, 3, RANK_MAX) if case.freezes else played.next_plan.lora_ranks
        assert played.joined_ranks in (wanted, ())


@adapter_cases
def test_what_is_frozen_is_what_is_no_longer_active(case: Case) -> None:
    for played in federation(case):
        if played.plan.scope == "adapter":
            cut = zip(played.plan.lora_ranks, played.next_plan.lora_ranks, strict=True)
            wanted = tuple((before - after) * case.freezes for before, after in cut)
            assert played.next_plan.frozen_ranks == wanted


@all_cases
def test_messages_have_their_closed_form(case: Case) -> None:
    for played in federation(case):
        plan = played.next_plan
        factors = sum(r * side for r, side in zip(plan.lora_ranks, SIDES, strict=True))
        frozen = sum(r * side for r, side in zip(plan.frozen_ranks, SIDES, strict=True))
        state = NUM_BODY + NUM_HEAD if plan.scope == "full" else factors + NUM_HEAD
        assert played.message.numel() == NUM_BODY * plan.sends_base + frozen + state
        assert plan.row_bytes(SHAPES) == 128 + 4 * state
        assert {update.values.numel() for update in played.updates} == {played.plan.layout(SHAPES).num_values}


@adapter_cases
def test_messages_fall_with_the_rank(case: Case) -> None:
    plans = [played.plan for played in federation(case)]
    uplinks = [plan.row_bytes(SHAPES) for plan in plans]
    assert uplinks == sorted(uplinks, reverse=True)
    assert uplinks[-1] == 128 + 4 * (sum(SIDES) + NUM_HEAD)
    states = [plan.segments(SHAPES)[2].num_values for plan in plans[1:]]
    assert states == sorted(states, reverse=True)


@all_cases
def test_round_one_sends_nothing_and_every_other_round_its_state(case: Case) -> None:
    history = federation(case)
    assert history[0].plan.message_values(SHAPES) == 0
    assert all(played.next_plan.sends_state for played in history)
    opens = [played.next_plan.round_num for played in history if played.next_plan.sends_base]
    assert opens == ([INITIATING_ROUNDS + 1] if case.initiating != case.scope else [])


@all_cases
def test_plans_say_who_trains_what_and_how(case: Case) -> None:
    for round_num, played in enumerate(federation(case), start=1):
        plan, is_first = played.plan, round_num <= INITIATING_ROUNDS
        assert (plan.round_num, plan.stage) == (round_num, "initiating" if is_first else "annealing")
        assert plan.scope == (case.initiating if is_first else case.scope)
        assert list(plan.workers) == case.choose_workers(round_num)
        assert plan.learning_rate == (0.5 if plan.scope == "full" else 1.0) / round_num
        assert (plan.mu, plan.stops, plan.evaluates) == (0.1 * is_first, False, False)


@all_cases
def test_after_the_last_round_nothing_is_cut_and_nobody_trains(case: Case) -> None:
    last = federation(case)[-1]
    assert (last.next_plan.round_num, last.next_plan.cohort) == (NUM_ROUNDS + 1, ())
    assert last.next_plan.lora_ranks == last.plan.lora_ranks
    assert set(last.next_plan.frozen_ranks) == {0}


@all_cases
def test_heads_and_whole_weights_are_averaged(case: Case) -> None:
    for played in federation(case):
        start = 0 if played.plan.scope == "full" else NUM_BODY - 6  # "norm" and the head
        assert distance(played.held[start:], mean_model(played)[start:]) < 1e-6


@adapter_cases
def test_the_reported_error_is_that_of_the_model_sent(case: Case) -> None:
    for played in federation(case):
        if played.plan.scope == "adapter":
            exact, sent = mean_model(played)[: NUM_BODY - 6], played.held[: NUM_BODY - 6]
            # Against what the active factors add to the base; what was frozen before is in the base.
            base = base_of(case, played)
            wanted = float((sent - exact).norm() / (exact - base).norm())
            assert played.report.aggregation_error == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def base_of(case: Case, played: Played) -> Tensor:
    worker = PlayedWorker(case)
    worker.receive(case.coordinator().plan(), torch.empty(0))
    for earlier in federation(case)[: played.plan.round_num - 1]:
        worker.receive(earlier.next_plan, earlier.message)
    return worker.body[: NUM_BODY - 6]


@adapter_cases
def test_the_error_of_product_is_what_it_drops(case: Case) -> None:
    for played in federation(case):
        report = played.report
        assert 0 <= report.dropped_energy <= 1 or case.kind == "factors"
        if case.kind == "product":
            assert report.aggregation_error**2 == pytest.approx(report.dropped_energy, abs=1e-12)
        elif case.freezes:
            assert report.dropped_energy == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", sorted(AGGREGATORS))
def test_a_federation_of_one_client_loses_nothing_by_freezing(kind: str, seed: int) -> None:
    for played in federation(Case(True, kind, cohort_size=1, seed=seed)):
        assert distance(played.held, played.clients[0]) < 1e-5
        assert played.report.aggregation_error < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_a_federation_of_one_client_loses_by_dropping_where_the_rank_falls(seed: int) -> None:
    for played in federation(Case(False, cohort_size=1, seed=seed)):
        is_cut = played.next_plan.lora_ranks != played.plan.lora_ranks
        assert (distance(played.held, played.clients[0]) > 1e-3) == is_cut
        assert (played.report.dropped_energy > 1e-6) == is_cut


@all_cases
def test_reports_average_losses_by_examples(case: Case) -> None:
    for played in federation(case):
        cohort = played.plan.cohort
        assert [update.client_id for update in played.report.participants] == list(cohort)
        weighted = sum((10 + client) * (1.0 + client) for client in cohort)
        wanted = weighted / sum(10 + client for client in cohort)
        assert played.report.train_loss == pytest.approx(wanted)
        assert played.report.penalty == pytest.approx(0.5)
        assert played.report.left_out == ()


@all_cases
def test_the_order_of_updates_changes_no_bit(case: Case) -> None:
    reversed_order = play(case, lambda _, updates: updates[::-1])
    for played, other in zip(federation(case), reversed_order, strict=True):
        assert torch.equal(other.message, played.message)
        assert (other.report.aggregation_error, other.report.train_loss) == (
            played.report.aggregation_error,
            played.report.train_loss,
        )


def not_finite(update: ClientUpdate) -> ClientUpdate:
    return replace(update, values=update.values * math.nan, is_finite=False, train_loss=math.nan)


def with_bad_client(client_id: int) -> Spoil:
    return lambda _, updates: [
        not_finite(update) if update.client_id == client_id else update for update in updates
    ]


def without_client(client_id: int) -> Spoil:
    return lambda _, updates: [update for update in updates if update.client_id != client_id]


@pytest.mark.parametrize("case", [Case(), Case(False, "factors"), Case(True, "product", "full")], ids=str)
def test_an_update_that_is_not_finite_is_named_and_left_out(case: Case) -> None:
    spoilt, without = play(case, with_bad_client(3)), play(case, without_client(3))
    for played, wanted in zip(spoilt, without, strict=True):
        assert played.report.left_out == (3,)
        assert [update.client_id for update in played.report.participants] == [0, 1, 2, 4]
        assert played.report.train_loss == wanted.report.train_loss
        assert torch.equal(played.message, wanted.message)


def nobody_in(*rounds: int) -> Spoil:
    return lambda round_num, updates: [
        not_finite(update) if round_num in rounds else update for update in updates
    ]


@pytest.mark.parametrize("case", [case for case in CASES if case.freezes or case.scope == "full"], ids=str)
def test_a_round_with_nobody_left_keeps_the_global_model(case: Case) -> None:
    history = play(case, nobody_in(1, 2, 5, 7, 8))
    for played in history:
        if not played.report.participants:
            assert distance(played.held, played.before) < 1e-5
            assert distance(played.exported, played.before) < 1e-5
            assert played.report.left_out == played.plan.cohort
            assert math.isnan(played.report.train_loss)
    assert [played.plan.lora_ranks for played in history] == [p.plan.lora_ranks for p in federation(case)]


@pytest.mark.parametrize("kind", sorted(AGGREGATORS))
def test_the_cut_goes_on_where_nobody_is_left(kind: str) -> None:
    case = Case(False, kind, cohort_size=3)
    for played in play(case, nobody_in(*range(4, NUM_ROUNDS + 1)))[3:]:
        # Only the cut's own loss: what is dropped of the model as it was.
        active = played.before - torch.cat([initial_body(case.seed), played.before[NUM_BODY:]])
        lost = float((played.held - played.before)[:NUM_BODY].norm() / active.norm())
        assert lost == pytest.approx(math.sqrt(played.report.dropped_energy), rel=1e-3, abs=1e-5)
        is_cut = played.next_plan.lora_ranks != played.plan.lora_ranks
        assert is_cut == (lost > 1e-4)


def test_a_federation_in_which_nobody_ever_trains_ends_where_it_began() -> None:
    last = play(Case(), nobody_in(*range(1, NUM_ROUNDS + 1)))[-1]
    assert distance(last.held, torch.cat([initial_body(0), random_values(NUM_HEAD, 0, 1000)])) < 1e-6
    assert last.report.aggregation_error == last.report.dropped_energy == 0


@pytest.mark.parametrize("seed", range(3))
def test_annealing_opens_after_full_rounds_on_the_mean_weights(seed: int) -> None:
    opening = federation(Case(True, "product", "full", cohort_size=3, seed=seed))[INITIATING_ROUNDS - 1]
    plan = opening.next_plan
    base, frozen, state = plan.split(SHAPES, opening.message)
    wanted = mean_model(opening)
    assert (frozen.numel(), plan.lora_ranks) == (0, (4, 3, 4))
    assert distance(base.double(), wanted[:NUM_BODY]) < 1e-6
    assert distance(plan.layout(SHAPES).whole_values(state).double(), wanted[NUM_BODY:]) < 1e-6
    for part in plan.layout(SHAPES).factors(state):
        assert float(part.b.abs().max()) == 0
        bound = 1 / math.sqrt(part.a.shape[1])
        assert bound / 2 < float(part.a.abs().max()) <= bound


def test_base_weights_are_named_where_they_changed() -> None:
    names = [tensor.name for tensor in SHAPES.body]
    heads = [tensor.name for tensor in SHAPES.head]
    assert Case().coordinator().base_weights() == {}
    assert list(FULL_CASE.coordinator().base_weights()) == names + heads
    opened = Case(initiating="full").coordinator()
    for _ in range(INITIATING_ROUNDS):
        opened.finish([ClientUpdate(0, 1, 1, 0.0, 0.0, 0.0, True, opened.state + 1)])
    assert list(opened.base_weights()) == names
    wanted = (initial_body(0) + INITIATING_ROUNDS)[:63].view(9, 7)
    assert torch.allclose(opened.base_weights()["q.weight"], wanted)


def test_a_plan_can_ask_for_evaluation_and_the_last_one_stops() -> None:
    coordinator = Case().coordinator()
    assert coordinator.plan(evaluates=True) == replace(coordinator.plan(), evaluates=True)
    stop = coordinator.stop_plan()
    assert (stop.stops, stop.message_values(SHAPES)) == (True, 0)
    assert coordinator.highest_ranks() == (4, 3, 4)
    assert coordinator.num_rounds == NUM_ROUNDS


def test_the_initial_adapter_is_pure_in_its_seed() -> None:
    head = torch.arange(15.0)
    one, again, other = (initial_adapter(SHAPES, (4, 3, 4), head, seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(one[-15:], head)


def test_seeds_differ() -> None:
    finals = [federation(Case(cohort_size=1, seed=seed))[-1].held for seed in range(3)]
    assert distance(finals[0], finals[1]) > 0.1
    assert distance(finals[1], finals[2]) > 0.1
