from __future__ import annotations

from itertools import chain
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpifedlora.core.metrics import ClientMetrics, Metrics, classification_metrics, mean_metrics

LAWS = settings(max_examples=25, deadline=None)
Pairs = list[tuple[int, int]]
PAIRS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40)


def measure(pairs: Pairs, losses: list[float] | None = None) -> Metrics:
    predicted, labels = np.array(pairs, np.int64).T
    return classification_metrics(np.array(losses or [0.0] * len(pairs), "f4"), predicted, labels)


def f1_of(label: int, pairs: Pairs) -> float:
    hits = sum(1 for predicted, true in pairs if predicted == true == label)
    num_predicted = sum(1 for predicted, _ in pairs if predicted == label)
    num_true = sum(1 for _, true in pairs if true == label)
    precision = hits / num_predicted if num_predicted else 0.0
    recall = hits / num_true if num_true else 0.0
    return 2 * precision * recall / (precision + recall) if hits else 0.0


@LAWS
@given(PAIRS)
def test_macro_f1_is_the_mean_over_labels_that_occur_or_are_predicted(pairs: Pairs) -> None:
    labels = {label for pair in pairs for label in pair}
    wanted = sum(f1_of(label, pairs) for label in labels) / len(labels)
    assert measure(pairs).macro_f1 == pytest.approx(wanted, abs=1e-12)


@LAWS
@given(PAIRS)
def test_accuracy_is_the_share_of_hits(pairs: Pairs) -> None:
    hits = sum(predicted == true for predicted, true in pairs)
    assert measure(pairs).accuracy == pytest.approx(hits / len(pairs))


@LAWS
@given(PAIRS, st.randoms(use_true_random=False))
def test_the_order_of_examples_does_not_matter(pairs: Pairs, random: Random) -> None:
    assert measure(random.sample(pairs, len(pairs))) == measure(pairs)


def test_hand_sized() -> None:
    # Label 0: precision 1/1, recall 1/2; label 2: 0 of 1 and 0 of 1; label 5: precision 1/2, recall 1/1.
    metrics = measure([(0, 0), (2, 0), (5, 5), (5, 2)], [1.0, 2.0, 3.0, 6.0])
    assert metrics[:3] == pytest.approx((3.0, 0.5, (2 / 3 + 0 + 2 / 3) / 3))


def test_perfect_and_wholly_wrong() -> None:
    assert measure([(3, 3), (1, 1)])[1:3] == (1.0, 1.0)
    assert measure([(3, 1), (1, 3)])[1:3] == (0.0, 0.0)


def test_many_losses_are_summed_in_double_precision() -> None:
    losses = np.full(2**20, 0.1, "f4")
    zeros = np.zeros(2**20, np.int64)
    mean = classification_metrics(losses, zeros, zeros).loss
    assert mean == pytest.approx(float(np.float32(0.1)), rel=1e-12)


# The mean over clients

CLIENTS = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=9), min_size=1, max_size=6
)


@LAWS
@given(CLIENTS.filter(any), st.integers(0, 9))
def test_the_mean_over_clients_is_loss_and_accuracy_of_all_examples(clients: list[Pairs], seed: int) -> None:
    losses = [[Random(seed).random() for _ in pairs] for pairs in clients]
    parts = [
        ClientMetrics(len(pairs), measure(pairs, own) if pairs else Metrics(float("nan")))
        for pairs, own in zip(clients, losses, strict=True)
    ]
    found, whole = mean_metrics(parts), measure([*chain(*clients)], [*chain(*losses)])
    assert found[:2] == pytest.approx(whole[:2], rel=1e-6)
    found_f1 = [part.metrics.macro_f1 for part in parts if part.num_examples]
    assert min(found_f1) - 1e-9 <= found.macro_f1 <= max(found_f1) + 1e-9


def test_other_metrics_are_averaged_by_examples_too() -> None:
    parts = [ClientMetrics(n, Metrics(1.0, others={"rmse": value})) for n, value in ((1, 2.0), (3, 4.0))]
    assert mean_metrics(parts).others == {"rmse": 3.5}
    assert mean_metrics([]).others == {}
