from dataclasses import replace

import numpy as np
import pytest
import torch
from support import LABELS, build_model, make_plan
from torch.nn import functional

from mpifedlora.core.batches import batch_indices
from mpifedlora.core.seeding import numpy_generator
from mpifedlora.io.datasets import read_dataset
from mpifedlora.training.base import build_base
from mpifedlora.training.local import LocalSettings, predict, train_client
from mpifedlora.training.tasks import ClassificationTask, load_tokenizer

SETTINGS = LocalSettings(
    batch_size=4,
    local_steps=5,
    local_epochs=None,
    optimizer="adamw",
    weight_decay=0.01,
    momentum=0.0,
    grad_clip=1.0,
    precision="float32",
    seed=0,
)
SGD = replace(SETTINGS, optimizer="sgd", weight_decay=0.0, grad_clip=0.0, local_steps=3)


@pytest.fixture(scope="module")
def task(tiny_model_folder):
    return ClassificationTask(load_tokenizer(str(tiny_model_folder)), max_length=24)


@pytest.fixture(scope="module")
def examples(task, tiny_csv):
    train = read_dataset(str(tiny_csv)).train
    return task.encode(train.texts, train.labels)


@pytest.fixture(scope="module")
def few(task):
    return task.encode(["ba da", "bas bef ka"], np.array([0, 2]))


@pytest.fixture
def model(tiny_model_folder):
    return build_model(tiny_model_folder)


def start(model, plan, seed=0):
    """Let the model receive a state in which no factor is zero, and return a copy of it."""
    state = model.initial_state(plan)
    state += torch.randn(state.shape, generator=torch.Generator().manual_seed(seed)) * 0.05
    model.state = state
    return state.clone()


def train(model, task, examples, settings, plan, client_id=0):
    values = torch.full((model.state.numel(),), torch.nan)
    return train_client(model, task, examples, settings, plan, client_id, values), values


def plain_model(folder, model, plan, state):
    """The same model as separate parameters in the order of the flat state, and no LoRA layers.

    Under the adapter scope each adapted weight is computed from its factors: W + scaling * B @ A.
    """
    base = build_base(str(folder), num_labels=3, dropout=0.0).module
    layout = plan.layout(model.shapes)
    pairs = [part for factors in layout.factors(state) for part in factors]
    parameters = [part.clone().requires_grad_() for part in pairs + layout.whole_tensors(state)]
    fixed = {name: value.detach() for name, value in base.named_parameters()}

    def forward(batch):
        weights = dict(fixed)
        for number, module in enumerate(layout.modules):
            a, b = parameters[2 * number : 2 * number + 2]
            weights[module.name + ".weight"] = fixed[module.name + ".weight"] + 2.0 * b @ a
        whole = parameters[2 * len(layout.modules) :]
        weights |= {shape.name: value for shape, value in zip(layout.whole, whole, strict=True)}
        return torch.func.functional_call(base, weights, kwargs=batch).logits

    return parameters, forward


def plain_training(folder, model, task, examples, settings, plan, state):
    parameters, forward = plain_model(folder, model, plan, state)
    received = [parameter.detach().clone() for parameter in parameters]
    options = {"lr": plan.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, momentum=settings.momentum, **options)
    else:
        optimizer = torch.optim.AdamW(parameters, **options)
    losses, penalties = [], []
    generator = numpy_generator(settings.seed, "batches", plan.round_num, 0)
    for indices in batch_indices(
        len(examples), settings.batch_size, settings.local_steps, settings.local_epochs, generator
    ):
        batch, labels = task.collate(examples, indices)
        loss = functional.cross_entropy(forward(batch), labels)
        penalty = sum(((new - old) ** 2).sum() for new, old in zip(parameters, received, strict=True))
        penalty = plan.mu / 2 * penalty
        optimizer.zero_grad()
        (loss + penalty).backward()
        if settings.grad_clip:
            torch.nn.utils.clip_grad_norm_(parameters, settings.grad_clip)
        optimizer.step()
        losses.append(loss.item())
        penalties.append(penalty.item())
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    return flat, np.mean(losses), np.mean(penalties)


@pytest.mark.parametrize("scope", ["adapter", "full"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_decay": 0.0, "grad_clip": 0.0},
        {"optimizer": "sgd", "momentum": 0.9, "grad_clip": 0.5},
        {"optimizer": "sgd", "local_steps": None, "local_epochs": 1, "batch_size": 32},
    ],
    ids=["adamw", "adamw-plain", "sgd-momentum", "sgd-epoch"],
)
def test_training_equals_a_plain_loop(tiny_model_folder, model, task, examples, scope, changes):
    settings = replace(SETTINGS, **changes)
    plan = make_plan(model, 3, scope=scope, learning_rate=1e-3, mu=5.0)
    state = start(model, plan)
    result, values = train(model, task, examples, settings, plan)
    expected, loss, penalty = plain_training(tiny_model_folder, model, task, examples, settings, plan, state)
    assert (values - expected).abs().max() <= 1e-5
    assert (values - state).abs().max() >= 5e-4
    assert result.train_loss == pytest.approx(loss, rel=1e-4)
    assert result.penalty == pytest.approx(penalty, rel=1e-3)
    assert result.penalty > 0
    assert result.is_finite


def test_the_received_state_stays_as_it_was(model, task, examples):
    for scope in ("adapter", "full"):
        plan = make_plan(model, scope=scope, learning_rate=1e-2, mu=0.1)
        state = start(model, plan)
        _, first = train(model, task, examples, SETTINGS, plan, client_id=0)
        _, other = train(model, task, examples, SETTINGS, plan, client_id=1)
        _, again = train(model, task, examples, SETTINGS, plan, client_id=0)
        assert torch.equal(model.state, state)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_the_proximal_term_pulls_towards_the_received_state(model, task, examples):
    plan = make_plan(model, learning_rate=1e-4)
    state = start(model, plan)
    distances, penalties = [], []
    for mu in (0.0, 100.0, 1000.0):
        result, values = train(model, task, examples, replace(SGD, local_steps=8), replace(plan, mu=mu))
        distances.append((values - state).norm().item())
        penalties.append(result.penalty)
    assert distances[0] > 1.01 * distances[1] > 1.1 * distances[2] > 0
    assert penalties[0] == 0
    assert min(penalties[1:]) > 0


def test_the_penalty_is_reported_apart_from_the_task_loss(model, task, examples):
    plan = make_plan(model, learning_rate=0.01, mu=3.0)
    state = start(model, plan)
    one, values = train(model, task, examples, replace(SGD, local_steps=1), plan)
    assert one.penalty == 0  # at the received state
    two, _ = train(model, task, examples, replace(SGD, local_steps=2), plan)
    assert two.penalty == pytest.approx(3.0 / 2 * (values - state).square().sum().item() / 2, rel=1e-4)
    without, _ = train(model, task, examples, replace(SGD, local_steps=2), replace(plan, mu=0.0))
    assert without.train_loss == two.train_loss


def test_a_client_with_fewer_examples_than_a_batch_gives_all_of_them(model, tiny_model_folder, task, few):
    plan = make_plan(model, learning_rate=1e-3)
    state = start(model, plan)
    result, values = train(model, task, few, SETTINGS, plan)
    assert result.num_steps == 5
    expected, loss, _ = plain_training(tiny_model_folder, model, task, few, SETTINGS, plan, state)
    assert (values - expected).abs().max() <= 1e-5
    assert result.train_loss == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(("num_epochs", "num_steps"), [(None, 3), (1, 3), (2, 6)])
def test_local_epochs_are_passes_over_the_examples(model, task, num_epochs, num_steps):
    ten = task.encode([f"ba da {word}" for word in ["ka"] * 10], np.arange(10) % 3)
    plan = make_plan(model, learning_rate=1e-3)
    start(model, plan)
    settings = replace(SETTINGS, local_steps=None, local_epochs=num_epochs)
    assert train(model, task, ten, settings, plan)[0].num_steps == num_steps


def test_dropout_depends_on_seed_round_and_client_alone(tiny_model_folder, task, few):
    # One example: all batches are the same, and only dropout can differ.
    one = first_of(few)
    model = build_model(tiny_model_folder, base_dropout=0.1, dropout=0.2)
    plan = make_plan(model, learning_rate=1e-2)
    start(model, plan)
    _, first = train(model, task, one, SGD, plan)
    torch.rand(5)
    others = [
        train(model, task, one, SGD, plan)[1],
        train(model, task, one, SGD, plan, client_id=1)[1],
        train(model, task, one, SGD, replace(plan, round_num=2))[1],
        train(model, task, one, replace(SGD, seed=1), plan)[1],
    ]
    assert [torch.equal(first, other) for other in others] == [True, False, False, False]


def first_of(examples):
    end = examples.offsets[1]
    return type(examples)(examples.tokens[:end], examples.offsets[:2], examples.labels[:1])


def test_without_dropout_clients_with_equal_examples_train_alike(model, task, few):
    plan = make_plan(model, learning_rate=1e-2)
    start(model, plan)
    one = first_of(few)
    results = [train(model, task, one, SGD, plan, client_id=client_id)[1] for client_id in (0, 1)]
    assert torch.equal(*results)


def test_no_clipping_is_what_a_huge_limit_does(model, task, examples):
    plan = make_plan(model, learning_rate=1e-2)
    start(model, plan)
    trained = {
        limit: train(model, task, examples, replace(SGD, grad_clip=limit), plan)[1]
        for limit in (0.0, 1e9, 1e-3)
    }
    assert torch.equal(trained[0.0], trained[1e9])
    assert (trained[1e-3] - model.state).norm() <= 3 * 1e-2 * 1e-3 * 1.001 < 1e-2
    assert (trained[0.0] - model.state).norm() > 1e-3


def test_bfloat16_runs_under_autocast_and_trains_float32(model, task, examples):
    plan = make_plan(model, learning_rate=1e-3)
    start(model, plan)
    exact, wanted = train(model, task, examples, SGD, plan)
    rough, values = train(model, task, examples, replace(SGD, precision="bfloat16"), plan)
    assert values.dtype == torch.float32
    assert not torch.equal(values, wanted)
    assert rough.is_finite
    assert rough.train_loss == pytest.approx(exact.train_loss, rel=0.1)
    moves = values - model.state, wanted - model.state
    assert functional.cosine_similarity(*moves, dim=0) > 0.9


@pytest.mark.parametrize("scope", ["adapter", "full"])
def test_a_bfloat16_base_trains(tiny_model_folder, task, examples, scope):
    model = build_model(tiny_model_folder, dtype="bfloat16")
    plan = make_plan(model, scope=scope, learning_rate=1e-3)
    state = start(model, plan)
    result, values = train(model, task, examples, SGD, plan)
    assert result.is_finite
    assert values.dtype == torch.float32
    assert not torch.equal(values, state)


def test_an_update_that_blew_up_is_reported(model, task, examples):
    plan = make_plan(model, learning_rate=1e30)
    state = start(model, plan)
    result, values = train(model, task, examples, SGD, plan)
    assert not result.is_finite
    assert not torch.isfinite(values).all()
    assert torch.equal(model.state, state)


@pytest.mark.parametrize(("scope", "learning_rate"), [("adapter", 5e-3), ("full", 2e-3)])
def test_training_lowers_the_loss(model, task, examples, scope, learning_rate):
    plan = make_plan(model, scope=scope, learning_rate=learning_rate)
    model.state = model.initial_state(plan)
    batches = [np.arange(len(examples))]
    before = predict(model, task, examples, batches, plan, "float32")
    _, values = train(model, task, examples, replace(SETTINGS, local_steps=40, batch_size=8), plan)
    model.state = values
    after = predict(model, task, examples, batches, plan, "float32")
    assert after[:, 0].mean() < 0.6 * before[:, 0].mean()
    correct = after[:, 1].numpy() == examples.labels
    assert correct.mean() > 0.6 > 1 / len(LABELS)


def test_predictions_come_in_the_order_of_the_batches(model, task, examples):
    plan = make_plan(model)
    start(model, plan)
    rows = predict(model, task, examples, [np.array([5, 3]), np.array([0])], plan, "float32")
    single = [predict(model, task, examples, [np.array([index])], plan, "float32")[0] for index in (5, 3, 0)]
    assert torch.allclose(rows, torch.stack(single), atol=1e-4)
    assert predict(model, task, examples, [], plan, "float32").shape == (0, 2)
