from dataclasses import replace

import numpy as np
import pytest
import torch
from support import build_model, make_plan, random_values

from mpifedlora.io.datasets import read_dataset
from mpifedlora.runtime.evaluation import Evaluation
from mpifedlora.training.base import build_base
from mpifedlora.training.tasks import ClassificationTask, load_tokenizer

# Which of the 21 examples each of four clients is measured on, in batches of 4: 3, 0, 1 and 2 batches.
OWNED = [[20, 3, 7, 1, 0, 15, 9, 8, 4], [], [2, 11, 19, 14], [5, 6, 10, 12, 13, 16, 17, 18]]


@pytest.fixture(scope="module")
def task(tiny_model_folder):
    return ClassificationTask(load_tokenizer(str(tiny_model_folder)), max_length=24)


@pytest.fixture(scope="module")
def examples(tiny_csv):
    return read_dataset(str(tiny_csv)).test.take(range(21))


@pytest.fixture(scope="module")
def evaluation(task, examples):
    return Evaluation(task, examples, batch_size=4, precision="float32")


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    model = build_model(tiny_model_folder)
    model.state = model.initial_state(make_plan(model))
    model.state += random_values(len(model.state), 0, 0.1)
    return model


def parts_of(evaluation, model, num_parts, plan=None):
    plan = plan or make_plan(model)
    return [evaluation.predictions(model, plan, part, num_parts) for part in range(num_parts)]


@pytest.mark.parametrize("num_parts", [1, 2, 3, 9])
def test_any_number_of_parts_gives_the_same_bits(evaluation, model, num_parts):
    whole = evaluation.metrics(parts_of(evaluation, model, 1))
    assert evaluation.metrics(parts_of(evaluation, model, num_parts)) == whole


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5, 9])
def test_counts_are_the_lengths_of_the_predictions(evaluation, model, num_parts):
    counts = evaluation.counts(num_parts)
    assert [len(part) for part in parts_of(evaluation, model, num_parts)] == counts
    assert sum(counts) == 21


def test_batches_hold_each_example_once_by_length(evaluation):
    order = np.concatenate([batch.indices for batch in evaluation.batches])
    assert sorted(order.tolist()) == list(range(21))
    assert (np.diff(evaluation.examples.lengths[order]) >= 0).all()
    assert [len(batch.indices) for batch in evaluation.batches] == [4, 4, 4, 4, 4, 1]
    assert {batch.client_id for batch in evaluation.batches} == {None}


def test_metrics_are_those_of_single_examples(evaluation, model):
    model.bind(make_plan(model), model.state)
    model.train(False)
    losses, hits = [], []
    for index, label in enumerate(evaluation.raw.labels):
        batch, labels = evaluation.task.collate(evaluation.examples, np.array([index]))
        with torch.no_grad():
            logits = model(batch)
        losses.append(evaluation.task.loss(logits, labels).item())
        hits.append(int(logits.argmax()) == label)
    metrics = evaluation.metrics(parts_of(evaluation, model, 2))
    assert metrics.loss == pytest.approx(np.mean(losses), rel=1e-4)
    assert metrics.accuracy == pytest.approx(np.mean(hits))
    assert 0 < metrics.macro_f1 < 1


def test_measuring_does_not_change_the_state(evaluation, model):
    before = model.state.clone()
    parts_of(evaluation, model, 1)
    assert torch.equal(model.state, before)


def test_texts_are_tokenised_once_and_only_where_they_are_measured(task, examples, monkeypatch):
    calls = []
    encode = task.encode
    monkeypatch.setattr(task, "encode", lambda *given: calls.append(1) or encode(*given))
    evaluation = Evaluation(task, examples, 4, "float32")
    assert evaluation.counts(3) == [8, 8, 5]
    assert calls == []
    assert len(evaluation.batches) == 6
    assert len(evaluation.batches) == 6
    assert calls == [1]


# each client's own model


class Kept:
    """What each client has kept: a B of its own, but for client 3, which has not trained yet."""

    def __init__(self, num_values):
        self.num_values = num_values
        self.asked = []

    def __call__(self, plan, client_id):
        self.asked.append((plan.round_num, client_id))
        return {} if client_id == 3 else {"personal": self.own_b(client_id)}

    def own_b(self, client_id):
        return random_values(self.num_values, client_id, 0.3)


@pytest.fixture(scope="module")
def personal_plan(model):
    return make_plan(model, keeps_b=True, workers=(0,) * 4, round_num=7)


@pytest.fixture
def kept(model, personal_plan):
    return Kept(personal_plan.personal_layout(model.shapes, 0).num_values)


@pytest.fixture
def personal(task, examples, kept):
    parts = [np.array(owned, dtype=np.int64) for owned in OWNED]
    return Evaluation(task, examples, 4, "float32", parts, kept)


def test_personal_batches_hold_each_example_once_and_one_client(personal):
    measured = {0: [], 1: [], 2: [], 3: []}
    for client_id, indices in personal.batches:
        measured[client_id] += indices.tolist()
    assert {client: sorted(indices) for client, indices in measured.items()} == {
        client: sorted(owned) for client, owned in enumerate(OWNED)
    }
    assert [len(batch.indices) for batch in personal.batches] == [4, 4, 1, 4, 4, 4]
    for owned in measured.values():
        assert (np.diff(personal.examples.lengths[owned]) >= 0).all()


@pytest.mark.parametrize("num_parts", [1, 2, 3, 5, 9])
def test_personal_counts_are_the_lengths_of_the_predictions(personal, model, personal_plan, num_parts):
    counts = personal.counts(num_parts)
    assert [len(part) for part in parts_of(personal, model, num_parts, personal_plan)] == counts
    assert sum(counts) == 21


@pytest.mark.parametrize("num_parts", [2, 3, 5, 9])
def test_any_number_of_parts_gives_the_same_bits_of_personal_models(
    personal, model, personal_plan, num_parts
):
    whole = personal.metrics(parts_of(personal, model, 1, personal_plan))
    assert personal.metrics(parts_of(personal, model, num_parts, personal_plan)) == whole


def test_each_client_is_measured_with_its_own_b(tiny_model_folder, personal, model, personal_plan, kept):
    layout = personal_plan.layout(model.shapes)
    own_layout = personal_plan.personal_layout(model.shapes, 0)
    losses, predicted = np.zeros(21), np.zeros(21, np.int64)
    for client_id, owned in enumerate(OWNED):
        base = build_base(str(tiny_model_folder), num_labels=3, dropout=0.0).module.eval()
        own = [part.b for part in layout.factors(model.state)]
        if client_id != 3:
            own = [part.b for part in own_layout.factors(kept.own_b(client_id))]
        with torch.no_grad():
            for module, part, b in zip(model.shapes.modules, layout.factors(model.state), own, strict=True):
                base.get_submodule(module.name).weight += 2.0 * b @ part.a
            for parameter, value in zip(
                base.classifier.parameters(), layout.whole_tensors(model.state), strict=True
            ):
                parameter.copy_(value)
            for index in owned:
                batch, labels = personal.task.collate(personal.examples, np.array([index]))
                logits = base(**batch).logits
                losses[index] = personal.task.loss(logits, labels)
                predicted[index] = logits.argmax()
    metrics = personal.metrics(parts_of(personal, model, 2, personal_plan))
    assert metrics.loss == pytest.approx(losses.mean(), rel=1e-4)
    assert metrics.accuracy == pytest.approx((predicted == personal.raw.labels).mean())
    shared = Evaluation(personal.task, personal.raw, 4, "float32")
    common = shared.metrics([shared.predictions(model, personal_plan)])
    assert abs(common.loss - metrics.loss) > 0.01  # one B for all is something else


def test_what_a_client_has_kept_is_asked_for_once_and_of_the_plan_at_hand(
    personal, model, personal_plan, kept
):
    personal.predictions(model, personal_plan)
    personal.predictions(model, replace(personal_plan, round_num=8), 1, 2)  # every second batch
    assert kept.asked == [(7, 0), (7, 2), (7, 3), (8, 0), (8, 2), (8, 3)]


def test_measuring_own_models_does_not_change_the_state(personal, model, personal_plan):
    before = model.state.clone()
    parts_of(personal, model, 1, personal_plan)
    assert torch.equal(model.state, before)


def test_clients_without_any_example_leave_empty_predictions(task, examples, model, personal_plan, kept):
    none = examples.take(range(0))
    parts = [np.zeros(0, np.int64)] * 4
    evaluation = Evaluation(task, none, 4, "float32", parts, kept)
    assert evaluation.counts(2) == [0, 0]
    assert evaluation.predictions(model, personal_plan).shape == (0, 2)
    assert kept.asked == []
