from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpifedlora.core.partition import (
    IntArray,
    label_table,
    partition,
    share_alike,
    split_by_owner,
    split_stratified,
)
from mpifedlora.errors import ConfigError, DataError

KINDS = ("iid", "dirichlet", "quantity", "shards", "column")
Case = tuple[IntArray, int, dict[str, Any]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_clients, shards_per_client = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    num_examples = draw(st.integers(num_clients * shards_per_client, 80))
    numbers = st.integers(0, 5)
    labels = draw(st.lists(numbers, min_size=num_examples, max_size=num_examples))
    owners = draw(st.permutations([i % (num_clients + draw(numbers)) for i in range(num_examples)]))
    alpha = draw(st.sampled_from([1e-300, 0.01, 0.5, 1.0, 100.0, 1.7e308]))
    given_names = {"alpha": alpha, "shards_per_client": shards_per_client, "owners": 10 * np.array(owners)}
    return np.array(labels), num_clients, given_names


def even_labels(num_labels: int = 5, per_label: int = 200) -> IntArray:
    return np.repeat(np.arange(num_labels), per_label)


def as_lists(parts: list[IntArray]) -> list[list[int]]:
    return [part.tolist() for part in parts]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(case=cases(), seed=st.integers(0, 2**32 - 1))
def test_every_kind_is_a_disjoint_cover_of_sorted_parts(kind: str, case: Case, seed: int) -> None:
    labels, num_clients, given_names = case
    if kind == "column" and len(np.unique(given_names["owners"])) < num_clients:
        return
    parts = partition(kind, labels, num_clients, seed, **given_names)
    assert len(parts) == num_clients
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    assert as_lists(parts) == as_lists(partition(kind, labels, num_clients, seed, **given_names))


@given(st.integers(1, 9), st.integers(0, 60), st.integers(0, 99))
def test_iid_sizes_differ_by_at_most_one(num_clients: int, more: int, seed: int) -> None:
    parts = partition("iid", np.zeros(num_clients + more, np.int64), num_clients, seed)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 99))
def test_shards_sizes_and_labels_are_bounded(case: Case, seed: int) -> None:
    labels, num_clients, given_names = case
    per_client = given_names["shards_per_client"]
    sizes = [
        len(part) for part in partition("shards", labels, num_clients, seed, shards_per_client=per_client)
    ]
    assert max(sizes) - min(sizes) <= per_client


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "quantity", "shards"])
def test_the_seed_matters(kind: str) -> None:
    drawn = {str(as_lists(partition(kind, even_labels(), 4, seed))) for seed in range(5)}
    assert len(drawn) == 5


def test_shards_of_one_label_do_not_follow_the_order_of_the_file() -> None:
    parts = partition("shards", np.zeros(40, np.int64), 2, 0, shards_per_client=1)
    assert sorted(as_lists(parts)) != [list(range(20)), list(range(20, 40))]


def test_column_does_not_draw() -> None:
    owners = np.arange(12) % 5
    assert as_lists(partition("column", owners, 4, 0, owners=owners)) == as_lists(
        partition("column", owners, 4, 1, owners=owners)
    )


def test_small_alpha_gives_each_label_to_one_client() -> None:
    table = label_table(partition("dirichlet", even_labels(), 4, 0, alpha=1e-6), even_labels(), 5)
    assert sorted(table.max(axis=0).tolist()) == [200] * 5


@pytest.mark.parametrize("alpha", [1e9, 1.7e308])
def test_large_alpha_gives_every_client_the_same_labels(alpha: float) -> None:
    table = label_table(partition("dirichlet", even_labels(), 4, 0, alpha=alpha), even_labels(), 5)
    assert np.abs(table - 50).max() <= 1


@pytest.mark.parametrize("alpha", [0.3, 1.0, 10.0])
def test_dirichlet_shares_have_the_mean_and_variance_of_the_distribution(alpha: float) -> None:
    labels = even_labels(num_labels=400, per_label=100)
    shares = label_table(partition("dirichlet", labels, 4, 0, alpha=alpha), labels, 400) / 100
    # Dir(alpha) over k clients: mean 1/k, variance (1/k)(1 - 1/k) / (k alpha + 1).
    assert shares.mean(axis=1) == pytest.approx([0.25] * 4, abs=0.05)
    assert shares.var() == pytest.approx(0.25 * 0.75 / (4 * alpha + 1), rel=0.15)


def test_smaller_alpha_is_less_alike() -> None:
    def spread(alpha: float) -> float:
        parts = partition("dirichlet", even_labels(), 4, 3, alpha=alpha)
        return float(label_table(parts, even_labels(), 5).std())

    assert spread(0.05) > spread(1.0) > spread(100.0)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 10.0])
def test_quantity_shares_have_the_mean_and_variance_of_the_distribution(alpha: float) -> None:
    labels = np.zeros(400, np.int64)
    draws = [partition("quantity", labels, 4, seed, alpha=alpha) for seed in range(400)]
    shares = np.array([[len(part) for part in parts] for parts in draws]) / 400
    # Dir(alpha) over k clients: mean 1/k, variance (1/k)(1 - 1/k) / (k alpha + 1).
    assert shares.mean(axis=0) == pytest.approx([0.25] * 4, abs=0.05)
    assert shares.var() == pytest.approx(0.25 * 0.75 / (4 * alpha + 1), rel=0.15)


def test_quantity_skews_sizes_and_not_labels() -> None:
    labels = even_labels(num_labels=4, per_label=5000)
    table = label_table(partition("quantity", labels, 4, 0, alpha=1.0), labels, 4)
    sizes = table.sum(axis=1)
    assert sizes.max() > 2 * sizes.min() > 200
    # Of m examples drawn at random, a label that has a quarter gets m/4 with a deviation below sqrt(3m)/4.
    assert (np.abs(table - sizes[:, None] / 4) <= np.sqrt(3 * sizes[:, None])).all()


def test_quantity_draws_without_looking_at_the_labels() -> None:
    drawn = [as_lists(partition("quantity", labels, 3, 5)) for labels in (even_labels(), np.arange(1000))]
    assert drawn[0] == drawn[1]


def test_quantity_of_small_and_large_alpha() -> None:
    sizes = [
        [len(part) for part in partition("quantity", even_labels(), 4, 0, alpha=alpha)]
        for alpha in (1e-6, 1.7e308)
    ]
    assert sorted(sizes[0]) == [0, 0, 0, 1000]
    assert sizes[1] == [250] * 4


def test_shards_give_a_client_few_labels() -> None:
    labels = np.tile(np.arange(10), 40)
    table = label_table(partition("shards", labels, 10, 0, shards_per_client=2), labels, 10)
    assert (table > 0).sum(axis=1).max() <= 2
    assert table.sum(axis=1).tolist() == [40] * 10


def test_shards_by_hand() -> None:
    labels = np.array([1, 0, 1, 0])
    parts = partition("shards", labels, 2, 0, shards_per_client=1)
    assert sorted(as_lists(parts)) == [[0, 2], [1, 3]]


def test_column_gives_each_client_one_owner() -> None:
    owners = np.array([30, 10, 20, 10, 30])
    assert as_lists(partition("column", np.zeros(5, np.int64), 3, 0, owners=owners)) == [[1, 3], [2], [0, 4]]


def test_column_deals_out_more_owners_round_robin() -> None:
    owners = np.array([4, 3, 2, 1, 0])
    assert as_lists(partition("column", np.zeros(5, np.int64), 2, 0, owners=owners)) == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize(
    ("kind", "num_clients", "given_names", "error", "message"),
    [
        (
            "quality",
            2,
            {},
            ConfigError,
            "partition must be one of iid, dirichlet, quantity, shards, column, got 'quality'",
        ),
        ("iid", 0, {}, ConfigError, "num_clients must be above 0, got 0"),
        ("dirichlet", 2, {"alpha": 0.0}, ConfigError, "alpha must be above 0, got 0.0"),
        ("dirichlet", 2, {"alpha": float("nan")}, ConfigError, "alpha must be above 0, got nan"),
        ("quantity", 2, {"alpha": 0.0}, ConfigError, "alpha must be above 0, got 0.0"),
        ("shards", 2, {"shards_per_client": 0}, ConfigError, "shards_per_client must be above 0, got 0"),
        ("iid", 7, {}, DataError, "got 7 clients and 6 examples"),
        ("shards", 2, {"shards_per_client": 4}, DataError, r"at most the 6 training examples, got 2 \* 4"),
        ("column", 2, {}, DataError, "needs an owner per example, got none; set data.partition_column"),
        ("column", 2, {"owners": np.arange(5)}, DataError, "got 5 owners of 6 examples"),
        (
            "column",
            3,
            {"owners": np.arange(6) % 2},
            DataError,
            "at most the 2 distinct owners .*, got 3; lower",
        ),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    kind: str, num_clients: int, given_names: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        partition(kind, np.zeros(6, np.int64), num_clients, 0, **given_names)


@given(st.lists(st.integers(0, 4), max_size=60), st.floats(0, 1, exclude_max=True), st.integers(0, 99))
def test_a_stratified_split_is_a_cover_in_proportion(numbers: list[int], fraction: float, seed: int) -> None:
    labels = np.array(numbers, np.int64)
    rest, held_out = split_stratified(labels, fraction, seed, "test-split")
    assert sorted([*rest.tolist(), *held_out.tolist()]) == list(range(len(labels)))
    assert (np.diff(rest) > 0).all()
    assert (np.diff(held_out) > 0).all()
    counts = np.bincount(labels, minlength=5)
    held_out_counts = np.bincount(labels[held_out], minlength=5)
    assert (np.abs(held_out_counts - counts * fraction) <= 1 + 1e-9).all()
    assert (held_out_counts[counts > 0] < counts[counts > 0]).all()


@given(st.integers(2, 40), st.floats(0, 0.5))
def test_a_stratified_split_holds_out_the_whole_share_of_labels_with_many_examples(
    per_label: int, fraction: float
) -> None:
    labels = even_labels(num_labels=7, per_label=per_label)
    _, held_out = split_stratified(labels, fraction, 0, "test-split")
    assert len(held_out) == np.rint(len(labels) * fraction)


def test_a_stratified_split_by_hand() -> None:
    labels = np.array([0] * 8 + [1] * 4 + [2])
    _, held_out = split_stratified(labels, 0.25, 0, "test-split")
    assert np.bincount(labels[held_out], minlength=3).tolist() == [2, 1, 0]


def test_a_stratified_split_rounds_up_where_the_remainder_is_largest() -> None:
    labels = np.array([0] * 5 + [1] * 7 + [2] * 5)
    _, held_out = split_stratified(labels, 0.25, 0, "test-split")
    assert np.bincount(labels[held_out]).tolist() == [1, 2, 1]


def test_a_stratified_split_depends_on_seed_and_purpose_only() -> None:
    labels = even_labels()
    keys = [(0, "test-split"), (1, "test-split"), (0, "validation-split")]
    held_out = [split_stratified(labels, 0.2, *key)[1].tolist() for key in keys]
    assert held_out[0] == split_stratified(labels, 0.2, *keys[0])[1].tolist()
    assert held_out[0] != held_out[1] != held_out[2] != held_out[0]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_share_outside_its_range_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"must be in \[0, 1\), got"):
        split_stratified(np.zeros(3, np.int64), fraction, 0, "test-split")


def test_label_table_by_hand() -> None:
    table = label_table([np.array([0, 1]), np.array([], np.int64)], np.array([2, 2, 0]), 4)
    assert table.tolist() == [[0, 0, 2, 0], [0, 0, 0, 0]]
    assert table.dtype == np.int64


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 99))
def test_label_tables_add_up_to_the_whole(case: Case, seed: int) -> None:
    labels, num_clients, _ = case
    table = label_table(partition("dirichlet", labels, num_clients, seed), labels, 6)
    assert table.sum(axis=0).tolist() == np.bincount(labels, minlength=6).tolist()


Shared = tuple[IntArray, IntArray, list[IntArray]]


@st.composite
def shared(draw: st.DrawFn) -> Shared:
    num_clients, num_labels = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    columns = st.lists(st.integers(0, 9) | st.just(0), min_size=num_clients, max_size=num_clients)
    table = np.array(draw(st.lists(columns, min_size=num_labels, max_size=num_labels)), np.int64).T
    labels = np.array(draw(st.lists(st.integers(0, num_labels - 1), max_size=60)), np.int64)
    return table, labels, share_alike(table, labels, draw(st.integers(0, 99)), "client-test")


@given(shared())
def test_other_examples_are_shared_out_once_each(case: Shared) -> None:
    table, labels, parts = case
    assert len(parts) == len(table)
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))


@given(shared())
def test_other_examples_are_shared_out_in_proportion(case: Shared) -> None:
    table, labels, parts = case
    got = label_table(parts, labels, table.shape[1])
    weights = np.where(table.any(axis=0), table, 1)
    exact = weights * np.bincount(labels, minlength=table.shape[1]) / weights.sum(axis=0)
    assert (np.abs(got - exact) < 1).all()
    assert (got[weights == 0] == 0).all()
    # Largest remainder: whoever gets one more was cut by at least as much as whoever does not.
    for taken, fraction in zip((got > exact).T, (exact - np.floor(exact)).T, strict=True):
        assert fraction[taken].min(initial=1) >= fraction[~taken].max(initial=0) - 1e-9


@pytest.mark.parametrize(
    ("counts", "num_examples", "expected"),
    [
        ([3, 1], 4, [3, 1]),
        ([3, 1], 6, [5, 1]),  # 4.5 and 1.5: the tie goes to the lower client
        ([1, 3, 0], 6, [2, 4, 0]),  # 1.5 and 4.5
        ([2, 3, 5], 7, [1, 2, 4]),  # 1.4, 2.1 and 3.5
        ([1, 1, 1], 5, [2, 2, 1]),
        ([5, 4, 1], 1, [1, 0, 0]),
        ([0, 0, 0], 5, [2, 2, 1]),  # nobody's label
        ([0, 7, 0], 5, [0, 5, 0]),
        ([3_000_000_000, 1_000_000_000], 4, [3, 1]),
    ],
)
def test_other_examples_by_hand(counts: list[int], num_examples: int, expected: list[int]) -> None:
    table = np.array([[9, count] for count in counts])
    parts = share_alike(table, np.ones(num_examples, np.int64), 0, "client-test")
    assert [len(part) for part in parts] == expected


def test_no_other_examples() -> None:
    assert as_lists(share_alike(np.ones((2, 3), np.int64), np.zeros(0, np.int64), 0, "client-test")) == [
        [],
        [],
    ]


def test_other_examples_depend_on_seed_and_purpose_only() -> None:
    labels, table = even_labels(), np.ones((4, 5), np.int64)
    keys = [(0, "client-test"), (1, "client-test"), (0, "another")]
    drawn = [as_lists(share_alike(table, labels, *key)) for key in keys]
    assert drawn[0] == as_lists(share_alike(table, labels, *keys[0]))
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]


def test_other_examples_of_a_label_do_not_follow_the_order_of_the_file() -> None:
    parts = share_alike(np.array([[1], [1]]), np.zeros(40, np.int64), 0, "client-test")
    assert as_lists(parts) != [list(range(20)), list(range(20, 40))]


@settings(max_examples=40, deadline=None)
@given(cases(), st.integers(0, 99))
def test_the_training_examples_themselves_are_shared_out_as_they_were(case: Case, seed: int) -> None:
    labels, num_clients, _ = case
    table = label_table(partition("dirichlet", labels, num_clients, seed), labels, 6)
    again = share_alike(table, labels, seed, "client-test")
    assert label_table(again, labels, 6).tolist() == table.tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.data())
def test_what_is_drawn_of_all_clients_goes_back_to_each_of_them(
    sizes: list[int], data: st.DataObject
) -> None:
    owned = [(client_id, index) for client_id, size in enumerate(sizes) for index in range(size)]
    chosen = sorted(data.draw(st.sets(st.sampled_from(range(len(owned)))))) if owned else []
    parts = split_by_owner(np.array(chosen, np.int64), sizes)
    found = [(client_id, index) for client_id, part in enumerate(parts) for index in part.tolist()]
    assert found == [owned[place] for place in chosen]
    assert len(parts) == len(sizes)
