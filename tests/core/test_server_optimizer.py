from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpifedlora.core.aggregation import AGGREGATORS, ModuleSum
from mpifedlora.core.layout import AdapterLayout, Factors, LinearShape, TensorShape
from mpifedlora.core.lowrank import INITIAL_ROW_NORM, concatenate, energy, factors_of, svd_of_product
from mpifedlora.core.server_optimizer import (
    CutMap,
    Moments,
    ServerOptimizer,
    carry,
    carry_variate,
    cut_map,
    initial_moments,
    server_step,
)

LAWS = settings(max_examples=25, deadline=None)
ADAPTIVE = ("fedadagrad", "fedadam", "fedyogi")
KINDS = (*ADAPTIVE, "momentum")
MODULES = (LinearShape("q", 6, 7), LinearShape("v", 5, 9))
HEAD = (TensorShape("head", (2, 3)),)
BEFORE = AdapterLayout(MODULES, (4, 3), HEAD)
AFTER = AdapterLayout(MODULES, (2, 3), HEAD)


def optimizer_of(kind: str, **changes: float) -> ServerOptimizer:
    constants = {"learning_rate": 0.1, "beta1": 0.5, "beta2": 0.75, "tau": 0.5, **changes}
    return ServerOptimizer(kind, **constants)


def random_values(num_values: int, seed: int) -> Tensor:
    return torch.randn(num_values, generator=torch.Generator().manual_seed(seed))


# The step.

# Updates 1, -2, 2 with eta 0.1, beta1 1/2, beta2 3/4, tau 1/2: m = 1/2, -3/4, 5/8 (momentum: 1, -3/2, 5/4);
# v from 1/4: adagrad 5/4, 21/4, 37/4; adam 7/16, 85/64, 511/256; yogi 1/2, 3/2, 5/2. Last, an update
# of 1, below sqrt(v): m = 13/16 (13/8), v = 41/4, 1789/1024, and yogi turns round: 9/4.
MOVES = {
    "momentum": ([1, -3 / 2, 5 / 4, 13 / 8], []),
    "fedadagrad": ([1 / 2, -3 / 4, 5 / 8, 13 / 16], [5 / 4, 21 / 4, 37 / 4, 41 / 4]),
    "fedadam": ([1 / 2, -3 / 4, 5 / 8, 13 / 16], [7 / 16, 85 / 64, 511 / 256, 1789 / 1024]),
    "fedyogi": ([1 / 2, -3 / 4, 5 / 8, 13 / 16], [1 / 2, 3 / 2, 5 / 2, 9 / 4]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_hand_sized_steps(kind: str) -> None:
    optimizer, (firsts, seconds) = optimizer_of(kind), MOVES[kind]
    moments = initial_moments(1, optimizer)
    for number, update in enumerate((1.0, -2.0, 2.0, 1.0)):
        step = server_step(optimizer, moments, torch.tensor([update]))
        size = math.sqrt(seconds[number]) + 0.5 if seconds else 1.0
        assert moments.first.tolist() == pytest.approx(firsts[number : number + 1], rel=1e-6)
        assert moments.second.tolist() == pytest.approx(seconds[number : number + 1], rel=1e-6)
        assert step.item() == pytest.approx(0.1 * firsts[number] / size, rel=1e-6)


def paper(optimizer: ServerOptimizer, updates: Sequence[Tensor]) -> Tensor:
    """The last step of FedOpt's algorithm 2, line by line in float64."""
    _, eta, beta1, beta2, tau = vars(optimizer).values()
    m, v = torch.zeros(len(updates[0])).double(), torch.full((len(updates[0]),), tau**2).double()
    for update in updates:
        delta = update.double()
        m = beta1 * m + (1 - beta1) * delta
        if optimizer.kind == "fedadagrad":
            v = v + delta**2
        elif optimizer.kind == "fedyogi":
            v = v - (1 - beta2) * delta**2 * torch.sign(v - delta**2)
        else:
            v = beta2 * v + (1 - beta2) * delta**2
    return eta * m / (v.sqrt() + tau)


@pytest.mark.parametrize("kind", ADAPTIVE)
@LAWS
@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0, 0.99), st.floats(0, 0.999), st.floats(1e-3, 1))
def test_steps_are_those_of_the_paper(
    kind: str, seed: int, num_rounds: int, beta1: float, beta2: float, tau: float
) -> None:
    optimizer = optimizer_of(kind, beta1=beta1, beta2=beta2, tau=tau)
    moments = initial_moments(20, optimizer)
    updates = [random_values(20, seed + number) for number in range(num_rounds)]
    for update in updates:
        step = server_step(optimizer, moments, update)
    wanted = paper(optimizer, updates)
    if kind == "fedyogi":  # its sign may turn on a rounding where v and the square meet
        met = (step.double() - wanted).abs() > 1e-4 * wanted.abs().max()
        assert int(met.sum()) <= 1
        step, wanted = step[~met], wanted[~met]
    assert torch.allclose(step.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_step_leaves_the_update_and_renews_nothing_but_itself(kind: str) -> None:
    optimizer, update = optimizer_of(kind), random_values(33, 0)
    moments, before = initial_moments(33, optimizer), update.clone()
    first, second = moments.first, moments.second
    step = server_step(optimizer, moments, update)
    assert torch.equal(update, before)
    assert moments.first is first
    assert moments.second is second
    kept = {tensor.data_ptr() for tensor in (first, second, update) if tensor.numel()}
    assert step.data_ptr() not in kept
    assert (step.dtype, step.shape) == (torch.float32, update.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_moments(kind: str) -> None:
    moments = initial_moments(3, optimizer_of(kind, tau=0.25))
    assert moments.first.tolist() == [0, 0, 0]
    assert moments.second.tolist() == ([] if kind == "momentum" else [0.0625] * 3)
    assert moments.first.dtype == moments.second.dtype == torch.float32


def test_momentum_without_memory_is_fedavg() -> None:
    optimizer, update = optimizer_of("momentum", learning_rate=1.0, beta1=0.0), random_values(9, 1)
    moments = initial_moments(9, optimizer)
    assert all(torch.equal(server_step(optimizer, moments, update), update) for _ in range(3))


@LAWS
@given(st.integers(0, 10**6), st.floats(0, 0.999))
def test_yogi_moves_by_its_share_of_the_square_and_stays_positive(seed: int, beta2: float) -> None:
    optimizer = optimizer_of("fedyogi", beta2=beta2)
    moments = initial_moments(50, optimizer)
    for number in range(4):
        update, before = random_values(50, seed + number), moments.second.clone()
        server_step(optimizer, moments, update)
        moved = (moments.second - before).double().abs()
        largest = (1 - beta2) * update.double().square()
        assert bool((moved <= largest + 1e-6 * (1 + before)).all())
        assert bool((moments.second >= 0).all())


@LAWS
@given(st.integers(0, 10**6))
def test_adagrad_never_forgets_and_adam_does(seed: int) -> None:
    adagrad, adam = optimizer_of("fedadagrad"), optimizer_of("fedadam")
    kept, faded = initial_moments(50, adagrad), initial_moments(50, adam)
    for number in range(4):
        update, before = random_values(50, seed + number), kept.second.clone()
        server_step(adagrad, kept, update)
        server_step(adam, faded, update)
        assert bool((kept.second >= before).all())
        assert bool((faded.second <= kept.second).all())


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_scale_of_the_updates_does_not_show_where_tau_is_small(kind: str) -> None:
    optimizer, update = optimizer_of(kind, tau=1e-9), random_values(20, 2)
    steps = [
        server_step(optimizer, initial_moments(20, optimizer), scale * update) for scale in (1.0, 1000.0)
    ]
    assert torch.allclose(steps[0], steps[1], rtol=1e-4)


# The map of a cut.


class Case(NamedTuple):
    mean: Factors
    lora_rank: int

    def cut(self) -> tuple[Factors, CutMap]:
        svd = svd_of_product(self.mean)
        return factors_of(svd, 0, self.lora_rank), cut_map(self.mean, svd, self.lora_rank)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    out_features, in_features = draw(st.integers(2, 12)), draw(st.integers(2, 12))
    old_rank = draw(st.integers(1, min(out_features, in_features)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    a = torch.randn(old_rank, in_features, generator=generator)
    b = torch.randn(out_features, old_rank, generator=generator)
    return Case(Factors(a, b), draw(st.integers(0, old_rank)))


def noise_of(mean: Factors, lora_rank: int) -> float:
    """What float32 can do to the map's last direction: U is off by 1e-7, then divided by s."""
    s = svd_of_product(mean).s
    return float(3e-6 * (1 + s[0] / s[lora_rank - 1])) if lora_rank else 0.0


@LAWS
@given(cases())
def test_the_map_is_the_cut(case: Case) -> None:
    new, one = case.cut()
    noise = noise_of(*case)
    assert one.a.shape == (case.lora_rank, case.mean.lora_rank)
    assert one.b.shape == (case.mean.lora_rank, case.lora_rank)
    assert one.a.dtype == one.b.dtype == torch.float32
    assert torch.allclose(one.a @ case.mean.a, new.a, rtol=0, atol=noise)
    assert torch.allclose(case.mean.b @ one.b, new.b, rtol=0, atol=noise * (1 + float(new.b.norm())))


@LAWS
@given(cases())
def test_new_coordinates_are_taken_back_by_one_map_and_given_by_the_other(case: Case) -> None:
    _, one = case.cut()
    atol = 10 * noise_of(*case)
    assert torch.allclose(one.a @ one.b, torch.eye(case.lora_rank), rtol=0, atol=atol)


def test_hand_sized_map() -> None:
    # B A = diag(2, 8): the second direction is the stronger one, U = V = swapped axes.
    mean = Factors(torch.diag(torch.tensor([2.0, 4.0])), torch.diag(torch.tensor([1.0, 2.0])))
    new, one = Case(mean, 1).cut()
    c = INITIAL_ROW_NORM
    assert one.a.flatten().tolist() == pytest.approx([0, c * 2 / 8])
    assert one.b.flatten().tolist() == pytest.approx([0, 4 / c])
    assert new.a.flatten().tolist() == pytest.approx([0, c])
    assert new.b.flatten().tolist() == pytest.approx([0, 8 / c])


@pytest.mark.parametrize("learnt", [0, 1, 2])
def test_directions_without_singular_value_have_no_past(learnt: int) -> None:
    b = random_values(24, 3).view(6, 4).clone()
    b[:, learnt:] = 0
    new, one = Case(Factors(random_values(28, 4).view(4, 7), b), 3).cut()
    past = [float(row.abs().max()) > 0 for row in one.a]
    assert (
        past
        == [float(column.abs().max()) > 0 for column in one.b.mT]
        == [True] * learnt + [False] * (3 - learnt)
    )
    assert bool(torch.isfinite(one.a).all() and torch.isfinite(one.b).all())
    assert float(new.b[:, learnt:].abs().max()) <= 1e-5


def test_rounding_noise_is_no_direction() -> None:
    # Rank 2 in fact: the third singular value is what float32 leaves, and its U means nothing.
    mean = Factors(random_values(28, 4).view(4, 7), random_values(12, 3).view(6, 2).repeat(1, 2))
    _, one = Case(mean, 3).cut()
    assert 0 < float(svd_of_product(mean).s[2]) < 1e-5
    assert float(one.a[2].abs().max()) == float(one.b[:, 2].abs().max()) == 0
    assert float(one.a[1].abs().max()) > 0


def test_the_map_is_that_of_the_aggregator() -> None:
    clients = [
        Factors(random_values(28, seed).view(4, 7), random_values(24, -seed).view(6, 4)) for seed in (1, 2)
    ]
    mean = Factors((clients[0].a + clients[1].a) / 2, (clients[0].b + clients[1].b) / 2)
    total = ModuleSum(clients, [0.5, 0.5], AGGREGATORS["factors"], mean)
    active, one = total.cut(3, 2).active, cut_map(mean, total.svd, 2)
    assert torch.allclose(one.a @ mean.a, active.a, atol=1e-5)
    assert torch.allclose(mean.b @ one.b, active.b, atol=1e-5)


# What is carried.


def identity_map(lora_rank: int) -> CutMap:
    return CutMap(torch.eye(lora_rank), torch.eye(lora_rank))


def random_maps(seed: int) -> list[CutMap]:
    first = [random_values(8, seed + place).view(shape) for place, shape in enumerate([(2, 4), (4, 2)])]
    second = [random_values(9, seed + place).view(3, 3) for place in (2, 3)]
    return [CutMap(*first), CutMap(*second)]


def random_moments(seed: int) -> Moments:
    return Moments(
        random_values(BEFORE.num_values, seed), random_values(BEFORE.num_values, seed + 1).square()
    )


@LAWS
@given(st.integers(0, 10**6))
def test_moments_move_with_the_factors_and_with_the_squares(seed: int) -> None:
    moments, maps = random_moments(seed), random_maps(seed)
    before = Moments(moments.first.clone(), moments.second.clone())
    carried = carry(moments, BEFORE, AFTER, maps)
    for old, new, power in ((moments.first, carried.first, 1), (moments.second, carried.second, 2)):
        assert new.shape == (AFTER.num_values,)
        for one, part, moved in zip(maps, BEFORE.factors(old), AFTER.factors(new), strict=True):
            wanted = Factors(
                one.a.double() ** power @ part.a.double(), part.b.double() @ one.b.double() ** power
            )
            assert torch.allclose(moved.a.double(), wanted.a, atol=1e-4)
            assert torch.allclose(moved.b.double(), wanted.b, atol=1e-4)
        assert torch.equal(AFTER.whole_values(new), BEFORE.whole_values(old))
    assert bool((carried.second >= 0).all())
    assert torch.equal(moments.first, before.first)
    assert torch.equal(moments.second, before.second)


@LAWS
@given(st.permutations(range(4)), st.permutations(range(3)), st.integers(0, 10**6))
def test_a_selection_of_directions_selects_their_moments(
    order: list[int], other: list[int], seed: int
) -> None:
    chosen = (order[:2], other)
    maps = [
        CutMap(torch.eye(old)[kept], torch.eye(old)[:, kept])
        for old, kept in zip(BEFORE.lora_ranks, chosen, strict=True)
    ]
    moments = random_moments(seed)
    carried = carry(moments, BEFORE, AFTER, maps)
    variate = carry_variate(moments.first, BEFORE, AFTER, maps)
    for old, new in (
        (moments.first, carried.first),
        (moments.second, carried.second),
        (moments.first, variate),
    ):
        for kept, part, moved in zip(chosen, BEFORE.factors(old), AFTER.factors(new), strict=True):
            assert torch.equal(moved.a, part.a[kept])
            assert torch.equal(moved.b, part.b[:, kept])


@pytest.mark.parametrize(("part", "other"), [("a", "b"), ("b", "a")])
def test_a_buffer_of_one_factor_carries_that_one(part: Literal["a", "b"], other: str) -> None:
    before, after = replace(BEFORE, parts=part), replace(AFTER, parts=part)
    both, one_factor = random_moments(13), Moments(torch.empty(before.num_values), torch.empty(0))
    before.whole_values(one_factor.first).copy_(BEFORE.whole_values(both.first))
    for source, target in zip(BEFORE.factors(both.first), before.factors(one_factor.first), strict=True):
        getattr(target, part).copy_(getattr(source, part))
    carried = AFTER.factors(carry(both, BEFORE, AFTER, random_maps(13)).first)
    got = carry(one_factor, before, after, random_maps(13)).first
    for wanted, factors in zip(carried, after.factors(got), strict=True):
        assert torch.equal(getattr(factors, part), getattr(wanted, part))
        assert getattr(factors, other).numel() == 0
    assert torch.equal(after.whole_values(got), BEFORE.whole_values(both.first))


def test_identity_maps_keep_every_bit() -> None:
    moments, maps = random_moments(5), [identity_map(lora_rank) for lora_rank in BEFORE.lora_ranks]
    carried = carry(moments, BEFORE, BEFORE, maps)
    assert torch.equal(carried.first, moments.first)
    assert torch.equal(carried.second, moments.second)
    assert torch.equal(carry_variate(moments.first, BEFORE, BEFORE, maps), moments.first)


@pytest.mark.parametrize("carrying", [carry, lambda moments, *rest: carry_variate(moments.first, *rest)])
@pytest.mark.parametrize("num_maps", [0, 1, 3])
def test_maps_that_do_not_fit_are_refused(
    carrying: Callable[[Moments, AdapterLayout, AdapterLayout, Sequence[CutMap]], object], num_maps: int
) -> None:
    with pytest.raises(ValueError, match="zip"):
        carrying(random_moments(0), BEFORE, AFTER, (random_maps(0) * 2)[:num_maps])
    with pytest.raises(RuntimeError):
        carrying(random_moments(0), BEFORE, AFTER, [identity_map(4), identity_map(3)])
    with pytest.raises(RuntimeError):
        carrying(
            random_moments(0), BEFORE, AFTER, [CutMap(torch.ones(1, 4), torch.ones(4, 1)), identity_map(3)]
        )


@pytest.mark.parametrize("kind", KINDS)
def test_steps_go_on_after_a_cut_to_nothing_learnt(kind: str) -> None:
    optimizer = optimizer_of(kind)
    moments = initial_moments(BEFORE.num_values, optimizer)
    server_step(optimizer, moments, random_values(BEFORE.num_values, 6))
    maps = [CutMap(torch.zeros(2, 4), torch.zeros(4, 2)), identity_map(3)]
    carried = carry(moments, BEFORE, AFTER, maps)
    assert carried.second.numel() == (0 if kind == "momentum" else AFTER.num_values)
    still = server_step(optimizer, carried, torch.zeros(AFTER.num_values))
    factors = AFTER.factors(still)
    assert float(factors[0].a.abs().max()) == float(factors[0].b.abs().max()) == 0
    assert float(factors[1].a.abs().min()) > 0
    step = server_step(optimizer, carried, random_values(AFTER.num_values, 7))
    # v = 0 is safe: the denominator is at least tau, and m at most the updates' share.
    assert step.shape == (AFTER.num_values,)
    assert bool(torch.isfinite(step).all())


def gradients(product: Factors, rest: Tensor, target: Tensor) -> Factors:
    """Gradients of a loss of B A + rest that is not quadratic."""
    a, b = product.a.clone().requires_grad_(), product.b.clone().requires_grad_()
    (b @ a + rest - target).cosh().sum().backward()  # type: ignore[no-untyped-call]
    assert a.grad is not None
    assert b.grad is not None
    return Factors(a.grad, b.grad)


def flat_of(factors: Factors) -> Tensor:
    return torch.cat([factors.a.flatten(), factors.b.flatten()])


def assert_gradient_is_carried(mean: Factors, new: Factors, rest: Tensor, one: CutMap) -> None:
    before = AdapterLayout((LinearShape("q", 6, 7),), (mean.lora_rank,))
    after = replace(before, lora_ranks=(new.lora_rank,))
    target = random_values(42, 8).view(6, 7)
    old_gradient = flat_of(gradients(mean, torch.zeros(6, 7), target))
    carried = carry_variate(old_gradient, before, after, [one])
    wanted = flat_of(gradients(new, rest, target))
    assert torch.allclose(carried, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    # The law tells it from the rule for displacements.
    moved = carry(Moments(old_gradient, torch.empty(0)), before, after, [one]).first
    assert not torch.allclose(moved, wanted, rtol=0.1, atol=0.1 * float(wanted.abs().max()))


def test_a_carried_gradient_is_the_gradient_where_no_energy_is_lost() -> None:
    # Rank 4 in name, 2 in fact: both columns of B twice.
    b = random_values(12, 9).view(6, 2).repeat(1, 2)
    mean = Factors(random_values(28, 10).view(4, 7), b)
    new, one = Case(mean, 2).cut()
    assert energy(new) == pytest.approx(energy(mean), rel=1e-5)
    assert_gradient_is_carried(mean, new, torch.zeros(6, 7), one)


def test_a_carried_gradient_is_the_gradient_where_the_rest_is_frozen() -> None:
    mean = Factors(random_values(28, 11).view(4, 7), random_values(24, 12).view(6, 4))
    svd = svd_of_product(mean)
    new, frozen = factors_of(svd, 0, 2), factors_of(svd, 2, 4)
    assert energy(concatenate([new, frozen])) == pytest.approx(energy(mean), rel=1e-5)
    assert_gradient_is_carried(mean, new, frozen.b @ frozen.a, cut_map(mean, svd, 2))
