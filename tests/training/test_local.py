import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import LABELS, build_model, make_plan, random_values
from torch.nn import functional

from mpifedlora.core.batches import batch_indices
from mpifedlora.core.seeding import numpy_generator
from mpifedlora.errors import ConfigError
from mpifedlora.io.datasets import read_dataset
from mpifedlora.training.base import build_base
from mpifedlora.training.local import (
    DeadlinePassed,
    Drift,
    LocalSettings,
    _shares,
    predict,
    train_client,
)
from mpifedlora.training.tasks import ClassificationTask, load_tokenizer

ROOT = Path(__file__).parents[2]
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
    return task.encode(train.columns, train.labels)


@pytest.fixture(scope="module")
def few(task):
    return task.encode({"text": ["ba da", "bas bef ka"]}, np.array([0, 2]))


@pytest.fixture
def model(tiny_model_folder):
    return build_model(tiny_model_folder)


def start(model, plan, seed=0):
    """Let the model receive a state in which no factor is zero, and return a copy of it."""
    state = model.initial_state(plan)
    state += random_values(len(state), seed, 0.05)
    model.state = state
    return state.clone()


def train(model, task, examples, settings, plan, client_id=0, memory=None, **options):
    values = torch.full((plan.row_values(model.shapes, client_id),), torch.nan)
    kept = memory or {}
    result = train_client(model, task, examples, settings, plan, client_id, values, kept, **options)
    return result, values


class Replay:
    """The same model as separate parameters and no LoRA layers, trained by a loop of its own.

    Under the adapter scopes each adapted weight is computed from its factors: W + scaling * B @ A.

    Args:
        folder: of the model.
        model: with the received state.
        plan: of the round.
        lora_rank: of the client, whose factors are the leading directions of the state's.
        personal: what the client has kept under `keeps_b`: B, and the head under `keeps_head`.
        dtype: of all arithmetic.
    """

    def __init__(self, folder, model, plan, lora_rank=None, personal=None, dtype=torch.float32):
        self.base = build_base(str(folder), num_labels=3, dropout=0.0).module.to(dtype)
        self.base.classifier._forward_pre_hooks.clear()  # it makes float32 of whatever comes
        self.fixed = {name: value.detach() for name, value in self.base.named_parameters()}
        self.layout = plan.layout(model.shapes)
        state = model.state.to(dtype)
        self.a = [part.a[:lora_rank].clone() for part in self.layout.factors(state)]
        self.b = [part.b[:, :lora_rank].clone() for part in self.layout.factors(state)]
        self.whole = [tensor.clone() for tensor in self.layout.whole_tensors(state)]
        if personal is not None:
            self.b, rest = take(personal.to(dtype), self.b)
            self.whole = take(rest, self.whole)[0] if plan.keeps_head else self.whole
        pairs = [part for pair in zip(self.a, self.b, strict=True) for part in pair]
        factors = {"a": self.a, "b": self.b}.get(plan.scope, pairs)
        self.trained = [parameter.requires_grad_() for parameter in [*factors, *self.whole]]
        shared = self.a if plan.keeps_b else factors
        self.shared = [*shared, *([] if plan.keeps_head else self.whole)]
        self.personal = [*self.b, *(self.whole if plan.keeps_head else [])] if plan.keeps_b else []
        self.received = [parameter.detach().clone() for parameter in self.trained]

    def __call__(self, batch):
        weights = dict(self.fixed)
        for module, a, b in zip(self.layout.modules, self.a, self.b, strict=True):
            weights[module.name + ".weight"] = self.fixed[module.name + ".weight"] + 2.0 * b @ a
        weights |= {shape.name: value for shape, value in zip(self.layout.whole, self.whole, strict=True)}
        return torch.func.functional_call(self.base, weights, kwargs=batch).logits

    def losses(self, task, examples, settings, round_num, client_id):
        """Yield the loss of each batch, once the step on the last one has been taken."""
        generator = numpy_generator(settings.seed, "batches", round_num, client_id)
        lengths = examples.lengths if settings.batching == "bucketed" else None
        for indices in batch_indices(
            len(examples),
            settings.batch_size,
            settings.local_steps,
            settings.local_epochs,
            generator,
            lengths,
        ):
            batch, labels = task.collate(examples, indices)
            yield functional.cross_entropy(self(batch), labels)

    def train(self, task, examples, settings, plan, client_id=0):
        """Return mean loss and penalty."""
        options = {"lr": plan.learning_rate, "weight_decay": settings.weight_decay}
        head = [shape.name.startswith("classifier") for shape in self.layout.whole]
        names = [False] * (len(self.trained) - len(head)) + head
        rates = [plan.learning_rate * (settings.head_rate_factor if is_head else 1) for is_head in names]
        groups = [{"params": [one], "lr": rate} for one, rate in zip(self.trained, rates, strict=True)]
        if settings.optimizer == "sgd":
            optimizer = torch.optim.SGD(groups, momentum=settings.momentum, **options)
        else:
            optimizer = torch.optim.AdamW(groups, **options)
        losses, penalties = [], []
        for loss in self.losses(task, examples, settings, plan.round_num, client_id):
            pairs = zip(self.trained, self.received, strict=True)
            penalty = plan.mu / 2 * sum(((new - old) ** 2).sum() for new, old in pairs)
            optimizer.zero_grad()
            (loss + penalty).backward()
            if settings.grad_clip:
                torch.nn.utils.clip_grad_norm_(self.trained, settings.grad_clip)
            optimizer.step()
            losses.append(loss.item())
            penalties.append(penalty.item())
        return np.mean(losses), np.mean(penalties)


def take(flat, like):
    """Cut a flat tensor into tensors of some shapes, and the rest."""
    pieces = torch.split(
        flat, [*(tensor.numel() for tensor in like), len(flat) - sum(map(torch.numel, like))]
    )
    return [piece.view(tensor.shape).clone() for piece, tensor in zip(pieces, like, strict=False)], pieces[-1]


def flat_of(tensors):
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def has_gradient(replay):
    """Say which values are compared: softmax ignores biases of keys; AdamW divides noise by noise there."""
    factors = torch.ones(sum(part.numel() for part in replay.shared[: -len(replay.layout.whole)]))
    whole = [torch.full(shape.shape, float("key.bias" not in shape.name)) for shape in replay.layout.whole]
    return torch.cat([factors, flat_of(whole)])


@pytest.mark.parametrize("scope", ["adapter", "full"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_decay": 0.0, "grad_clip": 0.0},
        {"optimizer": "sgd", "momentum": 0.9, "grad_clip": 0.5},
        {"optimizer": "sgd", "local_steps": None, "local_epochs": 1, "batch_size": 32},
        {"batching": "bucketed"},
        {"head_rate_factor": 8.0},
        {"head_rate_factor": 4.0, "optimizer": "sgd"},
    ],
    ids=["adamw", "adamw-plain", "sgd-momentum", "sgd-epoch", "bucketed", "head-rate", "sgd-head-rate"],
)
def test_training_equals_a_plain_loop(tiny_model_folder, model, task, examples, scope, changes):
    settings = replace(SETTINGS, **changes)
    plan = make_plan(model, 3, scope=scope, learning_rate=1e-3, mu=5.0)
    state = start(model, plan)
    result, values = train(model, task, examples, settings, plan)
    replay = Replay(tiny_model_folder, model, plan)
    loss, penalty = replay.train(task, examples, settings, plan)
    assert ((values - flat_of(replay.shared)).abs() * has_gradient(replay)).max() <= 1e-5
    assert (values - state).abs().max() >= 5e-4
    assert result.train_loss == pytest.approx(loss, rel=1e-4)
    assert result.penalty == pytest.approx(penalty, rel=1e-3)
    assert result.penalty > 0
    assert result.is_finite
    assert result.memory == {}


# what is trained, and what is sent


PARTS = {
    "b-only": {"scope": "b"},
    "a-only": {"scope": "a"},
    "lower-rank": {"client_ranks": (4, 2), "workers": (0, 0)},
    "own-b": {"keeps_b": True},
    "own-b-and-head": {"keeps_b": True, "keeps_head": True},
}
ROW_VALUES = {  # 12 linears of in + out = 64 (8 of them) and 96 (4), half of it A; a head of 99
    "b-only": 3 * 448 + 99,
    "a-only": 3 * 448 + 99,
    "lower-rank": 2 * 896 + 99,
    "own-b": 3 * 448 + 99,
    "own-b-and-head": 3 * 448,
}


@pytest.mark.parametrize("name", PARTS)
def test_training_a_part_equals_a_plain_loop(tiny_model_folder, model, task, examples, name):
    plan = make_plan(model, 3, learning_rate=1e-3, mu=5.0, **PARTS[name])
    state = start(model, plan)
    num_personal = plan.personal_layout(model.shapes, 1).num_values
    personal = random_values(num_personal, 1, 0.05) if plan.keeps_b else None
    memory = {"personal": personal.clone()} if plan.keeps_b else {}
    result, values = train(model, task, examples, SETTINGS, plan, 1, memory)
    replay = Replay(tiny_model_folder, model, plan, 2 if name == "lower-rank" else 3, personal)
    received = flat_of(replay.shared)
    loss, penalty = replay.train(task, examples, SETTINGS, plan, client_id=1)
    assert len(values) == ROW_VALUES[name]
    assert (values - flat_of(replay.shared)).abs().max() <= 1e-5
    assert (values - received).abs().max() >= 5e-4
    assert result.train_loss == pytest.approx(loss, rel=1e-4)
    assert result.penalty == pytest.approx(penalty, rel=1e-3)
    assert result.is_finite
    assert torch.equal(model.state, state)
    assert set(result.memory) == ({"personal"} if plan.keeps_b else set())
    if plan.keeps_b:
        assert (result.memory["personal"] - flat_of(replay.personal)).abs().max() <= 1e-5
        assert (result.memory["personal"] - personal).abs().max() >= 5e-4
        assert torch.equal(memory["personal"], personal)


@pytest.mark.parametrize(("scope", "fixed"), [("b", "A"), ("a", "B")])
def test_a_fixed_factor_keeps_its_bits(model, task, examples, scope, fixed):
    plan = make_plan(model, scope=scope, learning_rate=1e-2)
    state = start(model, plan)
    factors = plan.layout(model.shapes).factors(state)
    train(model, task, examples, SETTINGS, plan)
    for layer, part in zip(model._layers, factors, strict=True):
        got = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
        wanted = {"A": part.a, "B": part.b}
        assert torch.equal(got[fixed], wanted[fixed])
        assert not torch.equal(got[scope.upper()], wanted[scope.upper()])
    assert torch.equal(model.state, state)


def test_a_client_goes_on_from_what_it_has_kept(model, task, examples):
    plan = make_plan(model, keeps_b=True, learning_rate=1e-2)
    start(model, plan)
    first, row = train(model, task, examples, SETTINGS, plan)
    again, same = train(
        model, task, examples, SETTINGS, plan, memory={"personal": personal_start(model, plan)}
    )
    assert torch.equal(row, same)  # without a memory it starts with what is global
    assert torch.equal(first.memory["personal"], again.memory["personal"])
    later, other = train(model, task, examples, SETTINGS, plan, memory=first.memory)
    assert not torch.equal(other, row)
    assert not torch.equal(later.memory["personal"], first.memory["personal"])


def personal_start(model, plan):
    return flat_of([part.b for part in plan.layout(model.shapes).factors(model.state)])


def test_a_b_that_blew_up_marks_the_update_though_it_is_not_sent(model, task, examples):
    plan = make_plan(model, keeps_b=True, learning_rate=1e-30)
    start(model, plan)
    plan.layout(model.shapes).factors(model.state)[0].a[0] = 0  # what B is multiplied with
    own = personal_start(model, plan)
    own[0] = 1e16
    result, values = train(model, task, examples, SGD, plan, memory={"personal": own})
    assert values.abs().max() < 10
    assert result.memory["personal"].isfinite().all()
    assert not result.is_finite
    own[0] = 1e14
    assert train(model, task, examples, SGD, plan, memory={"personal": own})[0].is_finite


# control variates


VARIATES = {
    "full": {"scope": "full"},
    "adapter": {"scope": "adapter"},
    "b-only": {"scope": "b"},
}


def scaffold_round(replay, task, examples, settings, plan, own, mean):
    """SCAFFOLD, arXiv 1910.06378, algorithm 1, lines 10 to 12 with option II, in float64.

    Returns:
        y, and c_k+.
    """
    x = flat_of(replay.shared)
    correction = take(mean - own, replay.trained)[0]
    for loss in replay.losses(task, examples, settings, plan.round_num, 0):
        grads = torch.autograd.grad(loss, replay.trained, allow_unused=True)  # a full model's unused tokens
        with torch.no_grad():
            for y, grad, term in zip(replay.trained, grads, correction, strict=True):
                y -= plan.learning_rate * (term if grad is None else grad + term)
    y = flat_of(replay.shared)
    return y, own - mean + (x - y) / (settings.local_steps * plan.learning_rate)


@pytest.mark.parametrize("name", VARIATES)
def test_control_variates_are_those_of_scaffold(tiny_model_folder, model, task, few, name):
    plan = make_plan(model, 2, learning_rate=0.02, has_variates=True, state_rounds=(3,), round_num=5)
    plan = replace(plan, **VARIATES[name])
    start(model, plan)
    num_values = plan.trained_layout(model.shapes).num_values
    own, mean = (random_values(num_values, seed, 0.1) for seed in (1, 2))
    model.variate = mean.clone()
    memory = {"variate": own.clone()}
    result, values = train(model, task, few, SGD, plan, memory=memory)
    replay = Replay(tiny_model_folder, model, plan, 2, dtype=torch.float64)
    y, new = scaffold_round(replay, task, few, SGD, plan, own.double(), mean.double())
    assert len(values) == 2 * num_values
    assert (values[:num_values] - y).abs().max() <= 1e-6
    # A step of 0.02 times 3 turns roundings of y into some more of the variate.
    assert (values[num_values:] - (new - own)).abs().max() <= 2e-5
    assert (result.memory["variate"] - new).abs().max() <= 2e-5
    assert (new - own).abs().max() > 0.1
    assert set(result.memory) == {"variate"}
    assert result.is_finite
    assert torch.equal(memory["variate"], own)
    assert torch.equal(model.variate, mean)


@pytest.mark.parametrize("name", VARIATES)
def test_without_variates_yet_the_first_round_is_plain_sgd(model, task, examples, name):
    plan = make_plan(model, learning_rate=0.02, **VARIATES[name])
    state = start(model, plan)
    _, plain = train(model, task, examples, SGD, plan)
    with_variates = replace(plan, has_variates=True, state_rounds=(0,))
    result, values = train(model, task, examples, SGD, with_variates)
    row, change = values[: len(plain)], values[len(plain) :]
    assert torch.equal(row, plain)
    # c_k+ is the mean gradient: x - y is learning rate times the sum of the steps' gradients.
    x = model.start(plan, 0, {})
    assert torch.allclose(change * 0.02 * SGD.local_steps, x - plain, atol=1e-7)
    assert torch.equal(result.memory["variate"], change)
    assert torch.equal(model.state, state)


def test_equal_variates_of_client_and_server_correct_nothing(model, task, examples):
    plan = make_plan(model, learning_rate=0.02, has_variates=True, state_rounds=(1,), round_num=2)
    start(model, plan)
    same = random_values(plan.shared_layout(model.shapes).num_values, 3, 0.1)
    model.variate = same
    _, values = train(model, task, examples, SGD, plan, memory={"variate": same.clone()})
    _, plain = train(model, task, examples, SGD, replace(plan, has_variates=False))
    assert torch.equal(values[: len(plain)], plain)


def test_the_gradient_is_clipped_and_the_correction_is_not(model, task, examples):
    plan = make_plan(model, learning_rate=0.1, has_variates=True, state_rounds=(1,), round_num=2)
    state = start(model, plan)
    own, mean = (random_values(len(state), seed, 0.1) for seed in (1, 2))
    model.variate = mean
    settings = replace(SGD, grad_clip=1e-9)
    _, values = train(model, task, examples, settings, plan, memory={"variate": own})
    expected = state - SGD.local_steps * 0.1 * (mean - own)
    assert torch.allclose(values[: len(state)], expected, atol=1e-6)


def test_drift_by_hand():
    # x - y is (0.5, -1); over 2 steps of 0.25 that is (1, -2); c_k is (4, 8) and c is (5, 6).
    drift = Drift(own=torch.tensor([4.0, 8.0]), correction=torch.tensor([1.0, -2.0]))
    x, y = torch.tensor([1.0, 1.0]), torch.tensor([0.5, 2.0])
    change = drift.finish(x, y, 2 * 0.25)
    assert drift.own.tolist() == [0.0, 0.0]  # c_k - c + (1, -2)
    assert change.tolist() == [-4.0, -8.0]
    assert (x.tolist(), y.tolist()) == ([1.0, 1.0], [0.5, 2.0])


# a bound on the update


@pytest.mark.parametrize("fields", [{"scope": "b"}, {"scope": "full"}], ids=["b-only", "full"])
def test_an_update_is_cut_to_the_bound_in_its_direction(model, task, examples, fields):
    plan = make_plan(model, learning_rate=1e-2, **fields)
    start(model, plan)
    begun = model.start(plan, 0, {}).double()
    _, free = train(model, task, examples, SETTINGS, plan)
    norm = float((free - begun).norm())
    for share in (0.5, 1e-2):
        bound = share * norm
        _, values = train(model, task, examples, replace(SETTINGS, clip_norm=bound), plan)
        update = values.double() - begun
        # The update is added to what was received: that rounds, and the server clips once more.
        assert bound * (1 - 1e-5) < float(update.norm()) <= bound * (1 + 1e-6)
        cosine = float((update * (free - begun)).sum() / update.norm() / norm)
        assert cosine == pytest.approx(1, abs=1e-6)
    _, values = train(model, task, examples, replace(SETTINGS, clip_norm=1.01 * norm), plan)
    assert torch.allclose(values, free, rtol=2e-7, atol=2e-7)  # only rounded
    assert not torch.equal(free, begun.float())


def test_a_bound_keeps_what_is_not_finite_visible(model, task, examples):
    plan = make_plan(model, scope="b", learning_rate=1e30)
    start(model, plan)
    result, values = train(model, task, examples, replace(SGD, clip_norm=0.5), plan)
    assert not result.is_finite
    assert not torch.isfinite(values).all()


# laws of training


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
    replay = Replay(tiny_model_folder, model, plan)
    loss, _ = replay.train(task, few, SETTINGS, plan)
    assert (values - flat_of(replay.shared)).abs().max() <= 1e-5
    assert not torch.equal(values, state)
    assert result.train_loss == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(("num_epochs", "num_steps"), [(None, 3), (1, 3), (2, 6)])
def test_local_epochs_are_passes_over_the_examples(model, task, num_epochs, num_steps):
    ten = task.encode({"text": [f"ba da {word}" for word in ["ka"] * 10]}, np.arange(10) % 3)
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
    return examples.take(np.arange(1))


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
    model.bind(plan, model.state)
    before = predict(model, task, examples, batches, "float32")
    _, values = train(model, task, examples, replace(SETTINGS, local_steps=40, batch_size=8), plan)
    model.bind(plan, values)
    after = predict(model, task, examples, batches, "float32")
    assert after[:, 0].mean() < 0.6 * before[:, 0].mean()
    correct = after[:, 1].numpy() == examples.labels
    assert correct.mean() > 0.6 > 1 / len(LABELS)


def test_predictions_come_in_the_order_of_the_batches(model, task, examples):
    plan = make_plan(model)
    model.bind(plan, start(model, plan))
    rows = predict(model, task, examples, [np.array([5, 3]), np.array([0])], "float32")
    single = [predict(model, task, examples, [np.array([index])], "float32")[0] for index in (5, 3, 0)]
    assert torch.allclose(rows, torch.stack(single), atol=1e-4)
    assert predict(model, task, examples, [], "float32").shape == (0, 2)


# compiled


@pytest.mark.slow
def test_a_compiled_model_trains_like_the_plain_one(tiny_model_folder, task, examples):
    """At two ranks, and in two clients' buffers of the same rank."""
    adapted = [f"layer.1.{name}.dense" for name in ("intermediate", "output")]
    plain, compiled = (build_model(tiny_model_folder, target_modules=adapted) for _ in range(2))
    compiled.compile()
    made = []
    forward = compiled._compiled
    compiled._compiled = lambda **batch: made.append(1) or forward(**batch)
    for lora_rank, client_id in ((3, 0), (3, 1), (2, 0)):
        plan = make_plan(plain, lora_rank, learning_rate=1e-3, workers=(0, 0))
        start(plain, plan)
        compiled.state = plain.state.clone()
        wanted, values = train(plain, task, examples, SETTINGS, plan, client_id)
        result, got = train(compiled, task, examples, SETTINGS, plan, client_id)
        assert (got - values).abs().max() <= 1e-5
        assert (values - plain.state).abs().max() >= 5e-4
        assert result.train_loss == pytest.approx(wanted.train_loss, rel=1e-5)
    assert len(made) == 3 * SETTINGS.local_steps
    compiled.bind(plan, got)
    predict(compiled, task, examples, [np.arange(4)], "float32")
    assert len(made) == 3 * SETTINGS.local_steps  # measuring is not compiled


def test_compiling_without_a_compiler_is_refused(model, monkeypatch):
    def fail(function):
        raise RuntimeError("No working C++ compiler found in ('g++',)\nand much more")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(ConfigError, match=r"got No working C\+\+ compiler .*\(cpu\); install g\+\+"):
        model.compile()
    assert model._compiled is None


@pytest.mark.slow
def test_a_missing_compiler_is_found(tiny_model_folder, tmp_path):
    code = (
        "from pathlib import Path; from support import build_model; "
        f"build_model(Path({str(tiny_model_folder)!r})).compile()"
    )
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "ConfigError: training.compile = true needs a compiler that torch can use" in ended.stderr


# a deadline, and what is left of a client that was given up


class Clock:
    """Says that it is late when asked for the given time."""

    def __init__(self, late_at):
        self.asked, self.late_at = 0, late_at

    def is_late(self):
        self.asked += 1
        return self.asked == self.late_at


def given_up(model, task, examples, plan, clock, client_id=1):
    values = torch.empty(plan.row_values(model.shapes, client_id))
    with pytest.raises(DeadlinePassed):
        train_client(model, task, examples, SGD, plan, client_id, values, is_late=clock.is_late)


@pytest.mark.parametrize("late_at", [1, 2, 3])
def test_the_clock_is_asked_before_each_step(model, task, examples, late_at):
    plan = make_plan(model)
    start(model, plan)
    forwards = []
    model.peft_model.register_forward_pre_hook(lambda *_: forwards.append(1))
    given_up(model, task, examples, plan, Clock(late_at))
    assert len(forwards) == late_at - 1


@pytest.mark.parametrize("changes", [{}, {"scope": "full"}, {"scope": "b"}])
def test_a_late_client_goes_on_as_if_it_had_not_been_late(model, task, examples, changes):
    """From the same state, with batches drawn alike and an optimiser that remembers nothing."""
    plan = make_plan(model, learning_rate=0.1, **changes)
    start(model, plan)
    carrying = replace(SGD, carried="values")
    wanted, values = train(model, task, examples, carrying, plan)
    with pytest.raises(DeadlinePassed) as passed:
        train(model, task, examples, carrying, plan, is_late=Clock(3).is_late)
    kept = passed.value.progress.pack()
    with pytest.raises(DeadlinePassed) as again:
        train(model, task, examples, carrying, plan, memory=kept, is_late=Clock(1).is_late)
    assert again.value.progress is None  # it has taken no step: what was kept before stands
    found, same = train(model, task, examples, carrying, plan, memory=kept)
    torch.testing.assert_close(same, values, rtol=1e-4, atol=1e-6)
    assert (found.num_steps, found.staleness, wanted.staleness) == (wanted.num_steps, 0, 0)


def test_progress_adds_up_over_the_rounds(model, task, examples):
    plan, carrying = make_plan(model, learning_rate=0.1), replace(SGD, carried="products")
    start(model, plan)
    with pytest.raises(DeadlinePassed) as first:
        train(model, task, examples, carrying, plan, is_late=Clock(2).is_late)
    later = replace(plan, round_num=plan.round_num + 1)
    with pytest.raises(DeadlinePassed) as second:
        train(
            model,
            task,
            examples,
            carrying,
            later,
            memory=first.value.progress.pack(),
            is_late=Clock(2).is_late,
        )
    progress = second.value.progress
    assert (progress.begun, progress.num_steps) == (plan.round_num, 2)
    last = replace(plan, round_num=plan.round_num + 4)
    result, _ = train(model, task, examples, carrying, last, memory=progress.pack())
    assert (result.num_steps, result.staleness) == (3, 4)


def test_what_is_not_finite_is_not_gone_on_from(model, task, examples):
    plan = make_plan(model, learning_rate=1e30)
    start(model, plan)
    wild = replace(SGD, carried="values", grad_clip=0.0)
    with pytest.raises(DeadlinePassed) as passed:
        train(model, task, examples, wild, plan, is_late=Clock(3).is_late)
    assert passed.value.progress is None


def test_a_client_that_has_taken_its_last_step_is_not_late(model, task, examples):
    plan, clock = make_plan(model), Clock(4)
    start(model, plan)
    values = torch.empty(plan.row_values(model.shapes, 0))
    train_client(model, task, examples, SGD, plan, 0, values, is_late=clock.is_late)
    assert clock.asked == 3


@pytest.mark.parametrize("changes", [{}, {"scope": "full"}, {"keeps_b": True}, {"has_variates": True}])
@pytest.mark.parametrize("end", ["late", "raises"])
def test_after_a_client_was_given_up_the_next_trains_as_if_it_had_not_been(
    model, task, examples, changes, end
):
    plan = make_plan(model, learning_rate=0.1, **changes)
    state = start(model, plan)
    wanted = train(model, task, examples, SGD, plan)
    if end == "late":
        given_up(model, task, examples, plan, Clock(3))
    else:
        with pytest.raises(RuntimeError, match="no memory"):
            train_with_broken_backward(model, task, examples, plan)
    assert torch.equal(model.state, state)
    result, values = train(model, task, examples, SGD, plan)
    assert torch.equal(values, wanted[1])
    assert (result.train_loss, result.num_steps) == (wanted[0].train_loss, wanted[0].num_steps)


def train_with_broken_backward(model, task, examples, plan):
    """Raise in the second step, in the midst of the backward pass: some gradients are there."""
    passes = []

    def fail(module, gradients, outputs):
        passes.append(1)
        if len(passes) == 2:
            raise RuntimeError("no memory")

    module = model.peft_model.get_submodule(f"base_model.model.{model.shapes.modules[3].name}")
    handle = module.register_full_backward_hook(fail)
    try:
        train(model, task, examples, SGD, plan, client_id=1)
    finally:
        handle.remove()


@pytest.mark.parametrize("accumulation_steps", [2, 3, 5, 99])
@pytest.mark.parametrize("batch_size", [5, 8])
def test_a_batch_in_parts_trains_as_the_batch_in_one(model, task, examples, batch_size, accumulation_steps):
    settings = replace(SETTINGS, batch_size=batch_size, optimizer="sgd")
    plan = make_plan(model, learning_rate=0.05)
    start(model, plan)
    results = {}
    for steps in (1, accumulation_steps):
        values = torch.empty(plan.row_values(model.shapes, 0))
        result = train_client(
            model, task, examples, replace(settings, accumulation_steps=steps), plan, 0, values
        )
        results[steps] = values, result.train_loss, result.num_steps
    (one, loss, num_steps), (parts, same, as_many) = results.values()
    assert num_steps == as_many
    assert same == pytest.approx(loss, rel=1e-5)
    assert (one - model.state).abs().max() > 1e-3
    torch.testing.assert_close(parts, one, rtol=1e-4, atol=1e-6)


def test_parts_count_by_their_targets():
    """Where examples have unlike numbers of targets, the mean of the parts' means is not the batch's mean."""
    batches = [({}, torch.tensor([[3, -100, 4]])), ({}, torch.tensor([[-100, -100, 5], [-100, -100, -100]]))]
    assert _shares(batches) == [2 / 3, 1 / 3]
    assert _shares([({}, torch.tensor([0.5, 1.5])), ({}, torch.tensor([2.5]))]) == [2 / 3, 1 / 3]
