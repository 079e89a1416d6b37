import numpy as np
import pytest
import torch
from support import build_model, make_plan

from mpifedlora.io.datasets import read_dataset
from mpifedlora.runtime.evaluation import Evaluation
from mpifedlora.training.tasks import ClassificationTask, load_tokenizer


@pytest.fixture(scope="module")
def evaluation(tiny_model_folder, tiny_csv):
    examples = read_dataset(str(tiny_csv)).test.take(range(21))
    task = ClassificationTask(load_tokenizer(str(tiny_model_folder)), max_length=24)
    return Evaluation(task, examples.texts, examples.labels, batch_size=4, precision="float32")


@pytest.fixture(scope="module")
def model(tiny_model_folder):
    model = build_model(tiny_model_folder)
    model.state = model.initial_state(make_plan(model))
    model.state += torch.randn(model.state.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    return model


def parts_of(evaluation, model, num_parts):
    return [evaluation.predictions(model, make_plan(model), part, num_parts) for part in range(num_parts)]


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
    order = np.concatenate(evaluation.batches)
    assert sorted(order.tolist()) == list(range(21))
    assert (np.diff(evaluation.examples.lengths[order]) >= 0).all()
    assert [len(batch) for batch in evaluation.batches] == [4, 4, 4, 4, 4, 1]


def test_metrics_are_those_of_single_examples(evaluation, model):
    model.bind(make_plan(model), model.state)
    model.train(False)
    losses, hits = [], []
    for index, label in enumerate(evaluation.labels):
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
