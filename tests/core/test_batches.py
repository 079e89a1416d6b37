from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpifedlora.core.batches import Indices, batch_indices, length_batches, steps_of

LAWS = settings(max_examples=25, deadline=None)
SIZES, BATCHES = st.integers(1, 25), st.integers(1, 9)
LENGTHS = st.lists(st.integers(0, 30), max_size=30)


def draw_batches(
    num_examples: int, batch_size: int, steps: int | None, epochs: int | None, seed: int = 0
) -> list[Indices]:
    generator = np.random.default_rng(seed)
    return list(batch_indices(num_examples, batch_size, steps, epochs, generator))


@LAWS
@given(SIZES, BATCHES, st.integers(1, 3))
def test_each_pass_gives_every_example_once(num_examples: int, batch_size: int, epochs: int) -> None:
    batches = draw_batches(num_examples, batch_size, None, epochs)
    per_pass = len(batches) // epochs
    for start in range(0, len(batches), per_pass):
        assert sorted(np.concatenate(batches[start : start + per_pass])) == list(range(num_examples))


@LAWS
@given(SIZES, BATCHES, st.integers(1, 20))
def test_steps_are_taken_over_as_many_passes_as_needed(n: int, batch_size: int, steps: int) -> None:
    batches, per_pass = draw_batches(n, batch_size, steps, None), -(-n // batch_size)
    assert len(batches) == steps
    for start in range(0, steps, per_pass):
        seen = np.concatenate(batches[start : start + per_pass])
        assert len(set(seen.tolist())) == len(seen)


@LAWS
@given(SIZES, BATCHES, st.none() | st.integers(1, 20), st.none() | st.integers(1, 3))
def test_steps_are_known_beforehand(n: int, batch_size: int, steps: int | None, epochs: int | None) -> None:
    assert len(draw_batches(n, batch_size, steps, epochs)) == steps_of(n, batch_size, steps, epochs)


@LAWS
@given(SIZES, BATCHES)
def test_only_the_last_batch_of_a_pass_is_short(num_examples: int, batch_size: int) -> None:
    sizes = [len(batch) for batch in draw_batches(num_examples, batch_size, None, 1)]
    assert set(sizes[:-1]) <= {batch_size}
    assert 1 <= sizes[-1] <= batch_size


def test_a_client_smaller_than_a_batch_gives_all_it_has() -> None:
    assert [sorted(batch) for batch in draw_batches(3, 16, 2, None)] == [[0, 1, 2]] * 2


def test_one_pass_is_made_if_nothing_is_said() -> None:
    assert [len(batch) for batch in draw_batches(5, 2, None, None)] == [2, 2, 1]


def test_the_generator_fixes_the_batches() -> None:
    first, again, other = (np.concatenate(draw_batches(20, 4, None, 2, seed)).tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert first[:20] != first[20:]


@LAWS
@given(LENGTHS, BATCHES)
def test_length_batches_cover_in_order_of_length(lengths: list[int], batch_size: int) -> None:
    batches = length_batches(np.array(lengths, np.int64), batch_size)
    order = [int(index) for batch in batches for index in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[index] for index in order] == sorted(lengths)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)


@pytest.mark.parametrize(("batch_size", "wanted"), [(2, [[1, 3], [0, 2]]), (3, [[1, 3, 0], [2]])])
def test_hand_sized_length_batches(batch_size: int, wanted: list[list[int]]) -> None:
    got = length_batches(np.array([5, 2, 9, 2]), batch_size)
    assert [batch.tolist() for batch in got] == wanted
