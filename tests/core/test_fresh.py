from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpifedlora.core.fresh import initial_adapter
from mpifedlora.core.layout import LinearShape, ModelShapes, TensorShape

LAWS = settings(max_examples=25, deadline=None)
SEEDS = st.integers(0, 2**31)
ROUNDS = st.integers(1, 1000)
SHAPES = ModelShapes((LinearShape("q", 5, 4), LinearShape("v", 3, 9)), (TensorShape("head", (2, 3)),), ())
HEAD = torch.tensor([1.0, -2.0, 3.0, 0.0, 5.0, 1e30])
RANKS = st.tuples(st.integers(0, 4), st.integers(0, 3))
WIDE = ModelShapes((LinearShape("wide", 64, 256),), (), ())


def fresh(
    lora_ranks: tuple[int, int] = (2, 3), seed: int = 0, round_num: int = 1, head: Tensor = HEAD
) -> Tensor:
    return initial_adapter(SHAPES, lora_ranks, head, seed, round_num)


def all_a(flat: Tensor, lora_ranks: tuple[int, int] = (2, 3)) -> list[Tensor]:
    return [factors.a for factors in SHAPES.adapter(lora_ranks).factors(flat)]


@LAWS
@given(RANKS, SEEDS, ROUNDS)
def test_every_process_draws_the_same_bits(lora_ranks: tuple[int, int], seed: int, round_num: int) -> None:
    one = fresh(lora_ranks, seed, round_num)
    torch.rand(7)  # what else a process has drawn is no matter
    assert one.numpy().tobytes() == fresh(lora_ranks, seed, round_num).numpy().tobytes()
    assert one.dtype == torch.float32


def test_the_global_random_state_stays() -> None:
    before = torch.get_rng_state()
    fresh()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_starts_with_the_draw_of_round_one() -> None:
    assert torch.equal(initial_adapter(SHAPES, (2, 3), HEAD, 0), fresh(round_num=1))


@LAWS
@given(SEEDS, st.lists(ROUNDS, min_size=2, max_size=5, unique=True))
def test_each_round_has_a_draw_of_its_own(seed: int, rounds: list[int]) -> None:
    values = torch.cat(
        [part.flatten() for round_num in rounds for part in all_a(fresh((2, 3), seed, round_num))]
    )
    # 35 values a round of 2**24 possible ones each: a few may be equal, not a whole draw.
    assert len(values.unique()) > 35 * (len(rounds) - 1) + 30


def test_each_seed_and_module_has_a_draw_of_its_own() -> None:
    drawn = torch.cat(
        [part.flatten() * part.shape[1] ** 0.5 for seed in range(20) for part in all_a(fresh(seed=seed))]
    )
    assert len(drawn) == 20 * (2 * 4 + 3 * 9)
    assert len(drawn.unique()) > 690


@LAWS
@given(RANKS, SEEDS, ROUNDS)
def test_a_is_within_its_bounds_and_b_is_zero(lora_ranks: tuple[int, int], seed: int, round_num: int) -> None:
    flat = fresh(lora_ranks, seed, round_num)
    q, v = SHAPES.adapter(lora_ranks).factors(flat)
    assert bool((q.a.abs() <= 1 / 2).all())
    assert bool((v.a.abs() <= 1 / 3 + 1e-7).all())
    assert bool((torch.cat([q.b.flatten(), v.b.flatten()]) == 0).all())
    assert bool((torch.cat([q.a.flatten(), v.a.flatten()]) != 0).any()) or lora_ranks == (0, 0)


@pytest.mark.parametrize("round_num", [1, 2])
def test_a_is_uniform_between_its_bounds(round_num: int) -> None:
    a = WIDE.adapter((64,)).factors(initial_adapter(WIDE, (64,), torch.empty(0), 0, round_num))[0].a
    shares = torch.histc(a.double() * 16, bins=8, min=-1, max=1) / a.numel()  # bound: 1 / sqrt(256)
    # 16384 values: a share of 1/8 has a standard deviation of 0.0026.
    assert torch.allclose(shares, torch.full_like(shares, 1 / 8), atol=4 * 0.0026)
    assert float(a.abs().max()) == pytest.approx(1 / 16, rel=1e-3)
    # What PEFT draws: kaiming_uniform_(a=sqrt(5)) has the bound sqrt(6 / ((1 + 5) * in_features)).
    assert math.sqrt(6 / ((1 + 5) * 256)) == 1 / 16


@LAWS
@given(RANKS, SEEDS, ROUNDS)
def test_the_head_is_taken_as_it_is(lora_ranks: tuple[int, int], seed: int, round_num: int) -> None:
    flat, layout = fresh(lora_ranks, seed, round_num), SHAPES.adapter(lora_ranks)
    assert flat.numel() == layout.num_values
    assert torch.equal(layout.whole_values(flat), HEAD)
    other = fresh(lora_ranks, seed, round_num, head=torch.zeros(6))
    assert torch.equal(flat[: layout.factor_values], other[: layout.factor_values])


def test_the_head_is_copied() -> None:
    head = HEAD.clone()
    fresh(head=head).zero_()
    assert torch.equal(head, HEAD)
