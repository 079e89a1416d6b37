from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpifedlora.core import batches as module
from mpifedlora.core.batches import Indices, batch_indices, length_batches, steps_of

LAWS = settings(max_examples=25, deadline=None)
SIZES, BATCHES = st.integers(1, 25), st.integers(1, 9)
LENGTHS = st.lists(st.integers(0, 30), max_size=30)
BATCHINGS = st.booleans()  # whether by length


def draw_batches(
    num_examples: int,
    batch_size: int,
    steps: int | None,
    epochs: int | None,
    seed: int = 0,
    by_length: bool = False,
) -> list[Indices]:
    generator = np.random.default_rng(seed)
    lengths = some_lengths(num_examples) if by_length else None
    return list(batch_indices(num_examples, batch_size, steps, epochs, generator, lengths))


def some_lengths(num_examples: int) -> Indices:
    return np.random.default_rng(num_examples).integers(1, 9, num_examples)


@LAWS
@given(SIZES, BATCHES, st.integers(1, 3), BATCHINGS)
def test_each_pass_gives_every_example_once(n: int, batch_size: int, epochs: int, by_length: bool) -> None:
    batches = draw_batches(n, batch_size, None, epochs, by_length=by_length)
    per_pass = len(batches) // epochs
    for start in range(0, len(batches), per_pass):
        assert sorted(np.concatenate(batches[start : start + per_pass])) == list(range(n))


@LAWS
@given(SIZES, BATCHES, st.integers(1, 20), BATCHINGS)
def test_steps_are_taken_over_as_many_passes_as_needed(
    n: int, batch_size: int, steps: int, by_length: bool
) -> None:
    batches, per_pass = draw_batches(n, batch_size, steps, None, by_length=by_length), -(-n // batch_size)
    assert len(batches) == steps
    for start in range(0, steps, per_pass):
        seen = np.concatenate(batches[start : start + per_pass])
        assert len(set(seen.tolist())) == len(seen)


@LAWS
@given(SIZES, BATCHES, st.none() | st.integers(1, 20), st.none() | st.integers(1, 3))
def test_steps_are_known_beforehand(n: int, batch_size: int, steps: int | None, epochs: int | None) -> None:
    assert len(draw_batches(n, batch_size, steps, epochs)) == steps_of(n, batch_size, steps, epochs)


@LAWS
@given(SIZES, BATCHES, BATCHINGS)
def test_only_the_last_batch_of_a_pass_is_short(num_examples: int, batch_size: int, by_length: bool) -> None:
    batches = draw_batches(num_examples, batch_size, None, 1, by_length=by_length)
    sizes = [len(batch) for batch in batches]
    assert set(sizes[:-1]) <= {batch_size}
    assert 1 <= sizes[-1] <= batch_size


def test_a_client_smaller_than_a_batch_gives_all_it_has() -> None:
    assert [sorted(batch) for batch in draw_batches(3, 16, 2, None)] == [[0, 1, 2]] * 2


def test_one_pass_is_made_if_nothing_is_said() -> None:
    assert [len(batch) for batch in draw_batches(5, 2, None, None)] == [2, 2, 1]


@pytest.mark.parametrize("by_length", [False, True])
def test_the_generator_fixes_the_batches(by_length: bool) -> None:
    first, again, other = (
        np.concatenate(draw_batches(20, 4, None, 2, seed, by_length)).tolist() for seed in (0, 0, 1)
    )
    assert first == again != other
    assert first[:20] != first[20:]


def test_without_lengths_batches_are_cut_from_one_permutation_a_pass() -> None:
    generator = np.random.default_rng(3)
    wanted = np.concatenate([generator.permutation(10), generator.permutation(10)])
    assert np.concatenate(draw_batches(10, 4, None, 2, seed=3)).tolist() == wanted.tolist()


# batches of similar length


@LAWS
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60), BATCHES, st.integers(1, 4), st.integers(0, 99))
def test_examples_of_similar_length_share_a_batch(
    lengths: list[int], batch_size: int, window: int, seed: int
) -> None:
    """Within each window of the drawn order, the batches are the neighbours in order of length."""
    given_lengths, drawn = np.array(lengths), np.random.default_rng(seed).permutation(len(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "WINDOW", window)
        generator = np.random.default_rng(seed)
        batches = list(batch_indices(len(lengths), batch_size, None, 1, generator, given_lengths))
    num_full = len(lengths) // batch_size * batch_size
    wanted = [
        chosen[start : start + batch_size]
        for part in range(0, num_full, window * batch_size)
        for chosen in [sort_by(drawn[part : min(part + window * batch_size, num_full)], given_lengths)]
        for start in range(0, len(chosen), batch_size)
    ]
    got = batches[: len(wanted)]
    assert sorted(batch.tolist() for batch in got) == sorted(wanted)
    assert np.concatenate([[], *batches[len(wanted) :]]).tolist() == drawn[num_full:].tolist()


def sort_by(indices: Indices, lengths: Indices) -> list[int]:
    return sorted(indices.tolist(), key=lambda index: int(lengths[index]))


def test_equally_long_examples_share_batches_by_chance() -> None:
    lengths = np.full(12, 7)
    first, other = (
        {frozenset(batch.tolist()) for batch in batch_indices(12, 4, None, 1, generator, lengths)}
        for generator in map(np.random.default_rng, (0, 1))
    )
    assert first != other


def test_batches_by_length_come_in_any_order() -> None:
    lengths = np.arange(40)
    firsts = [
        [int(batch.min()) for batch in batch_indices(40, 4, None, 1, np.random.default_rng(seed), lengths)]
        for seed in range(2)
    ]
    assert firsts[0] != firsts[1]
    assert sorted(firsts[0]) == sorted(firsts[1]) == list(range(0, 40, 4))  # one window: the same batches


def test_the_examples_that_are_left_over_are_of_any_length() -> None:
    lengths = np.arange(10)
    rests = {
        tuple(list(batch_indices(10, 4, None, 1, np.random.default_rng(seed), lengths))[-1].tolist())
        for seed in range(20)
    }
    assert len(rests) > 10


def test_little_is_padded() -> None:
    lengths = np.random.default_rng(0).integers(1, 128, 1600)
    padded = {
        by_length: sum(
            16 * lengths[batch].max()
            for batch in batch_indices(
                1600, 16, None, 1, np.random.default_rng(1), lengths if by_length else None
            )
        )
        for by_length in (False, True)
    }
    assert padded[True] < 1.05 * lengths.sum() < 1.7 * lengths.sum() < padded[False]


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
