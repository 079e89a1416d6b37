from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpifedlora.core.cohort import assign_clients, choose_cohort, draw_poisson_cohort, share_out_files

LAWS = settings(max_examples=25, deadline=None)
SEEDS, ROUNDS = st.integers(0, 2**32 - 1), st.integers(1, 10_000)
ELIGIBLE = st.lists(st.integers(0, 50), min_size=1, max_size=12, unique=True)
LOADS = st.lists(st.integers(0, 40), min_size=1, max_size=6)


@LAWS
@given(ELIGIBLE, st.none() | st.integers(1, 14), SEEDS, ROUNDS)
def test_cohort_has_its_size_without_doubles(
    eligible: list[int], size: int | None, seed: int, round_num: int
) -> None:
    cohort = choose_cohort(eligible, size, seed, round_num)
    assert len(cohort) == min(size or len(eligible), len(eligible))
    assert list(cohort) == sorted(set(cohort))
    assert set(cohort) <= set(eligible)
    assert all(type(client_id) is int for client_id in cohort)


@LAWS
@given(ELIGIBLE, st.integers(1, 14), SEEDS, ROUNDS)
def test_cohort_is_pure_in_seed_and_round(eligible: list[int], size: int, seed: int, round_num: int) -> None:
    wanted = choose_cohort(eligible, size, seed, round_num)
    choose_cohort(eligible, size, seed, round_num + 1)
    assert choose_cohort(eligible, size, seed, round_num) == wanted


def test_rounds_and_seeds_differ_and_everybody_is_drawn() -> None:
    cohorts = [choose_cohort(range(20), 5, 0, round_num) for round_num in range(1, 41)]
    assert len(set(cohorts)) > 35
    assert {client_id for cohort in cohorts for client_id in cohort} == set(range(20))
    assert len({choose_cohort(range(20), 5, seed, 1) for seed in range(40)}) > 35


def test_draws_are_even() -> None:
    num_drawn = [0] * 10
    for round_num in range(1, 1001):
        for client_id in choose_cohort(range(10), 3, 7, round_num):
            num_drawn[client_id] += 1
    # Binomial(1000, 0.3): mean 300, standard deviation 14.5.
    assert all(abs(times - 300) < 5 * 14.5 for times in num_drawn)


@LAWS
@given(ELIGIBLE, st.floats(0, 1), SEEDS)
def test_a_poisson_cohort_is_a_sorted_subset_without_doubles(
    eligible: list[int], probability: float, seed: int
) -> None:
    cohort = draw_poisson_cohort(eligible, probability, np.random.default_rng(seed))
    assert list(cohort) == sorted(set(cohort))
    assert set(cohort) <= set(eligible)
    assert all(type(client_id) is int for client_id in cohort)
    assert draw_poisson_cohort(eligible, probability, np.random.default_rng(seed)) == cohort


@LAWS
@given(ELIGIBLE, SEEDS)
def test_at_rate_0_nobody_takes_part_and_at_rate_1_everybody(eligible: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    assert draw_poisson_cohort(eligible, 0.0, generator) == ()
    assert draw_poisson_cohort(eligible, 1.0, generator) == tuple(sorted(eligible))


def test_nobody_is_drawn_of_nobody() -> None:
    assert draw_poisson_cohort([], 0.5, np.random.default_rng(0)) == ()


@pytest.mark.parametrize("probability", [0.05, 0.3, 0.9])
def test_each_client_takes_part_on_its_own_at_the_rate(probability: float) -> None:
    num_rounds, eligible, generator = 4000, [11, 2, 7, 30, 5], np.random.default_rng(3)
    cohorts = [draw_poisson_cohort(eligible, probability, generator) for _ in range(num_rounds)]
    deviation = math.sqrt(probability * (1 - probability) * num_rounds)
    for client_id in eligible:
        times = sum(client_id in cohort for cohort in cohorts)
        assert abs(times - probability * num_rounds) < 4.5 * deviation
    # Independent: the size is Binomial(5, p), so its variance is 5 p (1 - p), and pairs meet at p^2.
    sizes = np.array([len(cohort) for cohort in cohorts])
    variance = len(eligible) * probability * (1 - probability)
    assert abs(sizes.mean() - len(eligible) * probability) < 4.5 * math.sqrt(variance / num_rounds)
    assert sizes.var() == pytest.approx(variance, rel=0.15)
    pairs, meeting = sum({2, 30} <= set(cohort) for cohort in cohorts), probability**2
    assert abs(pairs - meeting * num_rounds) < 4.5 * math.sqrt(meeting * (1 - meeting) * num_rounds)


@LAWS
@given(LOADS, st.integers(1, 9))
def test_every_client_has_exactly_one_worker(loads: list[int], num_workers: int) -> None:
    cohort = [3 * place for place in range(len(loads))]
    workers = assign_clients(cohort, dict(zip(cohort, loads, strict=True)), num_workers)
    assert sorted(workers) == cohort
    assert set(workers.values()) <= set(range(num_workers))


@LAWS
@given(LOADS, st.integers(1, 3))
def test_the_longest_worker_is_within_four_thirds_of_the_best(loads: list[int], num_workers: int) -> None:
    def longest(places: tuple[int, ...]) -> int:
        per_worker = [0] * num_workers
        for place, load in zip(places, loads, strict=True):
            per_worker[place] += load
        return max(per_worker)

    got = assign_clients(range(len(loads)), dict(enumerate(loads)), num_workers)
    best = min(map(longest, product(range(num_workers), repeat=len(loads))))
    # Graham's bound in whole numbers: 4/3 - 1/(3 m).
    assert longest(tuple(got[place] for place in range(len(loads)))) * 3 * num_workers <= best * (
        4 * num_workers - 1
    )


def test_equal_clients_are_spread_evenly_also_without_load() -> None:
    for load in (0, 5):
        workers = assign_clients(range(6), dict.fromkeys(range(6), load), 3)
        assert sorted(workers.values()) == [0, 0, 1, 1, 2, 2]


def test_more_workers_than_clients_leave_some_idle() -> None:
    workers = assign_clients([4, 7], {4: 1, 7: 9}, 5)
    assert workers == {7: 0, 4: 1}


def test_nobody_to_assign() -> None:
    assert assign_clients([], {}, 2) == {}


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_the_order_of_the_cohort_does_not_matter(order: list[int]) -> None:
    assert assign_clients(order, {0: 4, 1: 4, 2: 7, 3: 1}, 2) == {2: 0, 0: 1, 1: 1, 3: 0}


NAMES = st.sets(st.sampled_from("abcdefghij"), max_size=10)


@LAWS
@given(st.lists(NAMES, min_size=1, max_size=4))
def test_every_file_goes_to_one_worker_that_sees_it(seen: list[set[str]]) -> None:
    owners = share_out_files(seen)
    assert list(owners) == sorted(set().union(*seen))
    assert all(name in seen[worker_id] for name, worker_id in owners.items())


@LAWS
@given(NAMES, st.integers(1, 4))
def test_files_that_all_workers_see_are_shared_out_evenly(names: set[str], num_workers: int) -> None:
    owners = list(share_out_files([names] * num_workers).values())
    counts = [owners.count(worker_id) for worker_id in range(num_workers)]
    assert max(counts) - min(counts) <= 1
