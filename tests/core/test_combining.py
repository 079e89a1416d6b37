from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpifedlora.core.aggregation import AGGREGATORS, ModuleAggregate
from mpifedlora.core.combining import Combination
from mpifedlora.core.layout import AdapterLayout, Factors, LinearShape, ModelShapes, TensorShape
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.robust import coordinate_median, trimmed_mean
from mpifedlora.core.schedule import RankSchedule
from mpifedlora.core.screening import Contribution
from mpifedlora.core.server_optimizer import ServerOptimizer
from mpifedlora.core.server_update import FlatUpdate, GaussianNoise
from mpifedlora.core.switches import Switches
from mpifedlora.core.wire import ClientUpdate

LAWS = settings(max_examples=25, deadline=None)
# One module (2, 3) and a head of 1 value: at rank 2 the state is A (2, 3), B (2, 2), head.
SMALL = ModelShapes(
    (LinearShape("q", 2, 3),), (TensorShape("head", (1,)),), (TensorShape("q.weight", (2, 3)),)
)
SHAPES = ModelShapes(
    (LinearShape("q", 6, 5), LinearShape("v", 4, 7)),
    (TensorShape("head", (2, 2)),),
    (TensorShape("norm", (3,)),),
)
# Preset -> (scope, aggregation.kind, weights, limits on the clients' ranks).
PRESETS = {
    "fedit": ("adapter", "factors", "examples", ()),
    "flexlora": ("adapter", "product", "examples", (1, 3, 2, 3, 1)),
    "flora": ("adapter", "stack", "examples", (3, 1, 2, 3, 2)),
    "fedex-lora": ("adapter", "residual", "equal", ()),
    "hetlora": ("adapter", "zero-pad", "frobenius", (1, 2, 1, 2, 2)),
    "ffa-lora": ("b", "factors", "examples", ()),
    "rolora": ("a", "factors", "equal", ()),
}
presets = pytest.mark.parametrize("preset", sorted(PRESETS))


def combination_of(
    shapes: ModelShapes, state: Tensor, lora_ranks: tuple[int, ...], **changes: Any
) -> Combination:
    """A round of five clients; changes go to the plan or to the switches, by their names."""
    plan = RoundPlan(2, "annealing", "adapter", lora_ranks, (0,) * len(lora_ranks), workers=(0,) * 5)
    switches = Switches(
        RankSchedule("constant", 4, 0, 0, max(lora_ranks, default=1), 1),
        learning_rate=lambda round_num, scope: 0.1,
        choose_workers=lambda round_num, without: [0] * 5,
    )
    of_plan = {name: value for name, value in changes.items() if name in RoundPlan.__dataclass_fields__}
    of_switches = {name: value for name, value in changes.items() if name not in of_plan}
    switches = replace(switches, **of_switches)
    update = FlatUpdate(switches.combiner, switches.optimizer, switches.noise)
    return Combination(shapes, switches, replace(plan, **of_plan), state, update)


def update_of(client_id: int, values: Tensor, num_examples: int = 1) -> ClientUpdate:
    return ClientUpdate(client_id, num_examples, 1, 0.5, 0.0, 0.1, True, values)


def flat_of(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], *head: float) -> Tensor:
    return torch.cat([torch.tensor(a).flatten(), torch.tensor(b).flatten(), torch.tensor(head)])


def dense(part: Factors) -> Tensor:
    return part.b.double() @ part.a.double()


def norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.double()))


STATE = flat_of([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[7.0, 8.0], [9.0, 10.0]], 11.0)


# What a client has sent, completed from the state.


def test_a_whole_adapter_is_taken_as_it_is() -> None:
    values = torch.arange(11.0)
    part = combination_of(SMALL, STATE, (2,)).contribution(update_of(3, values))
    assert part.update.client_id == 3
    assert part.factors[0].a.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert part.factors[0].b.tolist() == [[6, 7], [8, 9]]
    assert (part.whole.tolist(), part.values.tolist()) == ([10], values.tolist())


def test_the_factor_that_a_client_did_not_send_is_that_of_the_state() -> None:
    b_only = combination_of(SMALL, STATE, (2,), scope="b").contribution(update_of(0, torch.arange(5.0)))
    assert b_only.factors[0].a.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert b_only.factors[0].b.tolist() == [[0, 1], [2, 3]]
    a_only = combination_of(SMALL, STATE, (2,), scope="a").contribution(update_of(0, torch.arange(7.0)))
    assert a_only.factors[0].a.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert a_only.factors[0].b.tolist() == [[7, 8], [9, 10]]
    assert (b_only.whole.tolist(), a_only.whole.tolist()) == ([4], [6])


def test_a_client_of_lower_rank_has_its_own_layout() -> None:
    combination = combination_of(SMALL, STATE, (2,), client_ranks=(1, 2, 2, 2, 2))
    part = combination.contribution(update_of(0, torch.arange(6.0)))
    assert (part.factors[0].a.tolist(), part.factors[0].b.tolist()) == ([[0, 1, 2]], [[3], [4]])
    assert part.whole.tolist() == [5]


def test_a_control_variate_behind_the_row_is_no_value_of_it() -> None:
    combination = combination_of(SMALL, STATE, (2,), has_variates=True)
    part = combination.contribution(update_of(0, torch.arange(22.0)))
    assert (part.values.tolist(), part.whole.tolist()) == (list(range(11)), [10])


def test_without_b_there_are_no_factors() -> None:
    combination = combination_of(SMALL, STATE, (2,), keeps_b=True)
    part = combination.contribution(update_of(0, torch.arange(7.0)))
    assert (part.factors, combination.reference[0]) == ([], [])
    assert (part.values.tolist(), part.whole.tolist()) == (list(range(7)), [6])


def test_the_whole_model_is_in_no_factor() -> None:
    combination = combination_of(SMALL, torch.zeros(7), (2,), scope="full")
    part = combination.contribution(update_of(0, torch.arange(7.0)))
    assert (part.factors, part.whole.tolist()) == ([], list(range(7)))


def test_the_reference_is_the_state() -> None:
    factors, whole = combination_of(SMALL, STATE, (2,)).reference
    assert (factors[0].a.tolist(), factors[0].b.tolist()) == ([[1, 2, 3], [4, 5, 6]], [[7, 8], [9, 10]])
    assert whole.tolist() == [11]


# Weights.


@pytest.mark.parametrize(
    ("weights", "wanted"), [("examples", [0.25, 0.75]), ("equal", [0.5, 0.5]), ("frobenius", [0.2, 0.8])]
)
def test_hand_sized_weights(weights: str, wanted: list[float]) -> None:
    # ||B A||_F: 1 * 3 and 4 * 3, both of one direction.
    one = flat_of([[3.0, 0, 0], [0, 0, 0]], [[1.0, 0], [0, 0]], 5.0)
    other = flat_of([[0, 3.0, 0], [0, 0, 0]], [[0.0, 0], [4, 0]], -9.0)
    combination = combination_of(SMALL, STATE, (2,), weights=weights)
    used = [
        combination.contribution(update_of(0, one, 10)),
        combination.contribution(update_of(4, other, 30)),
    ]
    assert combination.weights(used) == pytest.approx(wanted, rel=1e-12)
    assert combination.weights([]) == []


# The next values.


def used_of(combination: Combination, rows: dict[int, Tensor], num_examples: int = 1) -> list[Contribution]:
    return [combination.contribution(update_of(*row, num_examples)) for row in rows.items()]


ONE = flat_of([[4.0, 0, 0], [0, 4, 0]], [[8.0, 0], [0, 4]], 4.0)
OTHER = flat_of([[0.0, 0, 4], [0, 8, 0]], [[0.0, 4], [4, 0]], 8.0)
MEAN = flat_of([[1.0, 0, 3], [0, 7, 0]], [[2.0, 3], [3, 1]], 7.0)


def test_means_are_taken_value_by_value_and_leave_the_state_alone() -> None:
    state = STATE.clone()
    for kind in ("factors", "residual", "zero-pad"):
        combination = combination_of(SMALL, state, (2,), aggregator=AGGREGATORS[kind])
        used = used_of(combination, {0: ONE, 1: OTHER})
        assert torch.equal(combination.next_values(used, [0.25, 0.75]), MEAN)
        assert torch.equal(state, STATE)


@pytest.mark.parametrize("kind", ["product", "stack"])
def test_of_an_svd_or_a_restart_only_the_head_is_a_mean(kind: str) -> None:
    combination = combination_of(SMALL, STATE, (2,), aggregator=AGGREGATORS[kind])
    values = combination.next_values(used_of(combination, {0: ONE, 1: OTHER}), [0.25, 0.75])
    assert values.tolist() == [*STATE[:10].tolist(), 7.0]


@pytest.mark.parametrize(("scope", "parts"), [("b", slice(0, 6)), ("a", slice(6, 10))])
def test_a_fixed_factor_keeps_every_bit(scope: str, parts: slice) -> None:
    combination = combination_of(SMALL, STATE / 3, (2,), scope=scope)
    layout = combination.plan.shared_layout(SMALL)
    rows = {client_id: torch.full((layout.num_values,), 3.0 * client_id) for client_id in (0, 2)}
    values = combination.next_values(used_of(combination, rows), [0.5, 0.5])
    wanted = torch.full((11,), 3.0)
    wanted[parts] = STATE[parts] / 3
    assert torch.equal(values, wanted)


def test_a_kept_b_is_not_touched() -> None:
    combination = combination_of(SMALL, STATE, (2,), keeps_b=True)
    values = combination.next_values(
        used_of(combination, {0: torch.zeros(7), 1: torch.full((7,), 4.0)}), [0.25, 0.75]
    )
    assert values.tolist() == [*[3.0] * 6, 7, 8, 9, 10, 3.0]


def test_every_weight_of_a_whole_model_is_a_mean() -> None:
    combination = combination_of(SMALL, torch.zeros(7), (2,), scope="full")
    rows = {0: torch.arange(7.0), 1: -torch.arange(7.0)}
    values = combination.next_values(used_of(combination, rows), [0.75, 0.25])
    assert values.tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3]


@pytest.mark.parametrize("scope", ["adapter", "a", "b", "full"])
@pytest.mark.parametrize("kind", ["product", "factors"])
def test_without_any_update_the_state_stays(scope: str, kind: str) -> None:
    state = torch.arange(7.0) if scope == "full" else STATE
    combination = combination_of(SMALL, state, (2,), scope=scope, aggregator=AGGREGATORS[kind])
    assert torch.equal(combination.next_values([], []), state)


def test_hand_sized_zero_padding() -> None:
    # Client 0 has one direction of two: the second one of the mean is 3/4 of client 1's.
    limits = (1, 2, 2, 2, 2)
    combination = combination_of(SMALL, STATE, (2,), client_ranks=limits, aggregator=AGGREGATORS["zero-pad"])
    short = flat_of([[4.0, 0, 0]], [[8.0], [0.0]], 4.0)
    values = combination.next_values(used_of(combination, {0: short, 1: OTHER}), [0.25, 0.75])
    assert torch.equal(values, flat_of([[1.0, 0, 3], [0, 6, 0]], [[2.0, 3], [3, 0]], 7.0))


def test_directions_that_no_client_of_the_round_has_trained_stay() -> None:
    limits = (1, 1, 2, 2, 2)
    combination = combination_of(SMALL, STATE, (2,), client_ranks=limits, aggregator=AGGREGATORS["zero-pad"])
    rows = {0: flat_of([[4.0, 0, 0]], [[8.0], [0.0]], 4.0), 1: flat_of([[0.0, 4, 0]], [[0.0], [4.0]], 8.0)}
    values = combination.next_values(used_of(combination, rows), [0.25, 0.75])
    assert torch.equal(values, flat_of([[1.0, 3, 0], [4, 5, 6]], [[2.0, 8], [3, 10]], 7.0))


def test_the_server_steps_from_the_state_that_the_clients_received() -> None:
    half = ServerOptimizer("momentum", 0.5, 0.0, 0.0, 0.0)
    combination = combination_of(SMALL, STATE, (2,), aggregator=AGGREGATORS["factors"], optimizer=half)
    values = combination.next_values(used_of(combination, {0: ONE, 1: OTHER}), [0.25, 0.75])
    assert torch.equal(values, (STATE + MEAN) / 2)


def test_noise_reaches_all_that_is_sent_and_never_the_fixed_factor() -> None:
    noise = GaussianNoise(100.0, 0.01, 2.0, torch.Generator().manual_seed(0))
    combination = combination_of(SMALL, STATE, (2,), scope="b", noise=noise)
    for rows in ({}, {0: torch.arange(5.0)}):
        values = combination.next_values(used_of(combination, rows), [1.0] * len(rows))
        assert torch.equal(values[:6], STATE[:6])
        wanted = STATE[6:] + (torch.arange(5.0) - STATE[6:]) / 2 if rows else STATE[6:]
        assert bool((values[6:] != wanted).all())
        assert norm(values[6:] - wanted) < 5


# The sums.


def test_robust_combinations_are_of_products_and_of_head_values() -> None:
    # Products 8, 2 and -50 in the corner: the median is 2, whatever the factors are.
    combination = combination_of(SMALL, STATE, (2,), combiner=coordinate_median)
    corners = {0: (4.0, 2.0, 1.0), 1: (-1.0, -2.0, 3.0), 2: (-50.0, 1.0, 90.0)}
    rows = {
        client_id: flat_of([[a, 0, 0], [0, 0, 0]], [[b, 0], [0, 0]], head)
        for client_id, (a, b, head) in corners.items()
    }
    used = used_of(combination, rows)
    values = combination.next_values(used, [0.25, 0.5, 0.25])
    aggregate = combination.sums(values, used, [0.25, 0.5, 0.25])[0].cut(2, 2)
    assert dense(aggregate.active).flatten().tolist() == pytest.approx([2.0, 0, 0, 0, 0, 0])
    assert values[10] == 3.0
    # The mean of the products is 8/4 + 2/2 - 50/4 = -9.5.
    assert (aggregate.exact_energy, aggregate.error_energy) == pytest.approx((9.5**2, 11.5**2))


@pytest.mark.parametrize("kind", sorted(AGGREGATORS))
def test_without_any_update_the_state_is_the_only_summand(kind: str) -> None:
    combination = combination_of(SMALL, STATE, (2,), aggregator=AGGREGATORS[kind])
    aggregate = combination.sums(combination.next_values([], []), [], [])[0].cut(2, 2)
    state = dense(combination.reference[0][0])
    assert torch.allclose(dense(aggregate.active) + dense(aggregate.frozen), state)
    assert aggregate.error_energy <= 1e-9 * aggregate.exact_energy


@pytest.mark.parametrize("combiner", [coordinate_median, trimmed_mean(1)])
def test_a_robust_method_without_any_update_keeps_the_state_too(combiner: Any) -> None:
    combination = combination_of(SMALL, STATE, (2,), combiner=combiner)
    aggregate = combination.sums(combination.next_values([], []), [], [])[0].cut(2, 2)
    assert torch.allclose(dense(aggregate.active), dense(combination.reference[0][0]))


# A round of each method against its paper's equation, in float64 from dense matrices.


class Round(NamedTuple):
    """A round of a preset: its combination and its clients' updates."""

    combination: Combination
    updates: list[ClientUpdate]

    def aggregate(self, kept: int, active: int) -> tuple[Tensor, list[ModuleAggregate]]:
        combination = self.combination
        used = [combination.contribution(update) for update in self.updates]
        weights = combination.weights(used)
        values = combination.next_values(used, weights)
        return values, [part.cut(kept, active) for part in combination.sums(values, used, weights)]

    def limit(self, client_id: int) -> int:
        return self.combination.plan.client_ranks[client_id] if self.combination.plan.client_ranks else 99


def round_of(preset: str, lora_rank: int, numbers: Sequence[int], seed: int) -> Round:
    scope, kind, weights, limits = PRESETS[preset]
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(SHAPES.adapter((lora_rank,) * 2).num_values, generator=generator)
    combination = combination_of(
        SHAPES,
        state,
        (lora_rank,) * 2,
        scope=scope,
        client_ranks=limits,
        aggregator=AGGREGATORS[kind],
        weights=weights,
    )
    updates = [
        update_of(
            client_id,
            torch.randn(combination.plan.row_values(SHAPES, client_id), generator=generator),
            number,
        )
        for client_id, number in enumerate(numbers)
    ]
    return Round(combination, updates)


@st.composite
def rounds(draw: st.DrawFn, preset: str) -> Round:
    numbers = draw(st.lists(st.integers(1, 300), min_size=1, max_size=5))
    return round_of(preset, draw(st.integers(1, 3)), numbers, draw(st.integers(0, 10**6)))


def clients_factors(given_round: Round, place: int) -> list[Factors]:
    """Each client's factors of a module, read by hand from its row, in float64."""
    plan, state = given_round.combination.plan, given_round.combination.state
    old = SHAPES.adapter(plan.lora_ranks).factors(state)[place]
    factors = []
    for update in given_round.updates:
        lora_rank = min(plan.lora_ranks[place], given_round.limit(update.client_id))
        parts: Any = {"adapter": "ab", "a": "a", "b": "b"}[plan.scope]
        got = AdapterLayout(SHAPES.modules, (lora_rank,) * 2, SHAPES.head, parts).factors(update.values)[
            place
        ]
        a = old.a if plan.scope == "b" else got.a
        b = old.b if plan.scope == "a" else got.b
        factors.append(Factors(a.double(), b.double()))
    return factors


def paper_weights(given_round: Round) -> Tensor:
    kind, updates = given_round.combination.switches.weights, given_round.updates
    if kind == "examples":
        numbers = torch.tensor([update.num_examples for update in updates]).double()
    elif kind == "equal":
        numbers = torch.ones(len(updates)).double()
    else:
        modules = [clients_factors(given_round, place) for place in range(2)]
        numbers = torch.stack(
            [
                torch.cat([dense(part).flatten() for part in parts]).norm()
                for parts in zip(*modules, strict=True)
            ]
        )
    return numbers / numbers.sum()


def padded_mean(factors: Sequence[Factors], weights: Tensor, old: Factors) -> Factors:
    """HetLoRA: the means of the padded factors; directions beyond all clients are the old ones."""
    a, b = torch.zeros_like(old.a).double(), torch.zeros_like(old.b).double()
    for weight, client in zip(weights, factors, strict=True):
        a[: client.lora_rank] += weight * client.a
        b[:, : client.lora_rank] += weight * client.b
    trained = max(client.lora_rank for client in factors)
    return Factors(
        torch.cat([a[:trained], old.a[trained:]]), torch.cat([b[:, :trained], old.b[:, trained:]], 1)
    )


def is_close(got: Tensor, wanted: Tensor) -> bool:
    return norm(got.double() - wanted) <= 1e-5 * (1 + norm(wanted))


@presets
@LAWS
@given(data=st.data())
def test_a_round_is_the_papers_equation(preset: str, data: st.DataObject) -> None:
    played = data.draw(rounds(preset))
    plan, weights = played.combination.plan, paper_weights(played)
    lora_rank, kind = plan.lora_ranks[0], PRESETS[preset][1]
    values, aggregates = played.aggregate(lora_rank, lora_rank)
    old = SHAPES.adapter(plan.lora_ranks).factors(played.combination.state)
    for place, aggregate in enumerate(aggregates):
        factors = clients_factors(played, place)
        exact = (weights[:, None, None] * torch.stack([dense(client) for client in factors])).sum(0)
        sent = dense(aggregate.active) + dense(aggregate.frozen)
        mean = padded_mean(factors, weights, old[place])
        if kind == "product":
            best = float(torch.linalg.svdvals(exact)[lora_rank:].norm())
            assert norm(sent - exact) == pytest.approx(best, rel=1e-5, abs=1e-5 * (1 + norm(exact)))
        elif kind in ("stack", "residual"):
            assert is_close(sent, exact)
            assert aggregate.error_energy <= 1e-9 * (1 + norm(exact) ** 2 + norm(dense(mean)) ** 2)
        else:
            assert is_close(sent, dense(mean))
            wanted = norm(sent - exact) ** 2
            assert aggregate.error_energy == pytest.approx(
                wanted, rel=1e-4, abs=1e-5 * (1 + norm(exact) ** 2)
            )
        if plan.scope != "adapter":
            assert is_close(sent, exact)
        if kind in ("factors", "residual", "zero-pad"):
            assert is_close(aggregate.active.a, mean.a)
            assert is_close(aggregate.active.b, mean.b)
    heads = torch.stack([update.values[-4:].double() for update in played.updates])
    assert is_close(values[-4:], weights @ heads)


@presets
@LAWS
@given(data=st.data(), random=st.randoms(use_true_random=False))
def test_the_order_of_updates_does_not_show(preset: str, data: st.DataObject, random: Random) -> None:
    played = data.draw(rounds(preset))
    mixed = played._replace(updates=random.sample(played.updates, len(played.updates)))
    one, other = played.aggregate(3, 1), mixed.aggregate(3, 1)
    if played.combination.is_mean:
        assert is_close(other[0], one[0].double())
    for got, wanted in zip(other[1], one[1], strict=True):
        size = 1 + wanted.exact_energy
        assert got.exact_energy == pytest.approx(wanted.exact_energy, rel=1e-4, abs=1e-5 * size)
        assert got.error_energy == pytest.approx(wanted.error_energy, rel=1e-4, abs=1e-5 * size)
        assert got.dropped_energy == pytest.approx(wanted.dropped_energy, rel=1e-4, abs=1e-5 * size)


@presets
@LAWS
@given(data=st.data(), scale=st.integers(2, 1000))
def test_examples_counted_in_other_units_change_nothing(preset: str, data: st.DataObject, scale: int) -> None:
    played = data.draw(rounds(preset))
    updates = [replace(update, num_examples=scale * update.num_examples) for update in played.updates]
    other, one = played._replace(updates=updates).aggregate(1, 1), played.aggregate(1, 1)
    assert torch.allclose(other[0], one[0], rtol=1e-6, atol=1e-6)
    for got, wanted in zip(other[1], one[1], strict=True):
        assert got.exact_energy == pytest.approx(wanted.exact_energy, rel=1e-5)


@presets
@LAWS
@given(data=st.data())
def test_clients_that_send_the_state_back_leave_it(preset: str, data: st.DataObject) -> None:
    played = data.draw(rounds(preset))
    combination = replace(played.combination, plan=replace(played.combination.plan, client_ranks=()))
    plan, state = combination.plan, combination.state
    layout, shared = plan.layout(SHAPES), plan.shared_layout(SHAPES)
    factors = layout.factors(state)
    back = torch.cat(
        [
            *(
                part.flatten()
                for one in factors
                for part in (one.a, one.b)[plan.scope == "b" : 2 - (plan.scope == "a")]
            ),
            layout.whole_values(state),
        ]
    )
    assert back.numel() == shared.num_values
    updates = [replace(update, values=back) for update in played.updates]
    values, aggregates = Round(combination, updates).aggregate(plan.lora_ranks[0], plan.lora_ranks[0])
    assert torch.allclose(values, state, rtol=1e-5, atol=1e-5)
    for aggregate, old in zip(aggregates, factors, strict=True):
        assert is_close(dense(aggregate.active) + dense(aggregate.frozen), dense(old))
