"""What a training step keeps for its backward pass, and what it trains."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from peft.tuners.lora import Linear
from support import build_model, make_batch, make_plan, random_values
from torch.autograd.graph import saved_tensors_hooks
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mpifedlora.training import fused
from mpifedlora.training.fused import FusedLinear
from mpifedlora.training.local import LocalSettings, train_client
from mpifedlora.training.tasks import ClassificationTask, load_tokenizer

# The tiny model has 2 layers; hidden size 32, intermediate size 64.
UPPER = ["layer.1.intermediate.dense", "layer.1.output.dense"]
ONE_STEP = LocalSettings(
    batch_size=3,
    local_steps=1,
    local_epochs=None,
    optimizer="adamw",
    weight_decay=0.0,
    momentum=0.0,
    grad_clip=1.0,
    precision="float32",
    seed=0,
)


@pytest.fixture(scope="module")
def task(tiny_model_folder):
    return ClassificationTask(load_tokenizer(str(tiny_model_folder)), max_length=24)


@pytest.fixture(scope="module")
def examples(task):
    """Three texts of 5 tokens each."""
    return task.encode({"text": ["ba da ka", "bas bef ka", "da da da"]}, np.array([0, 2, 1]))


def train_one_step(model, task, examples, settings=ONE_STEP, **fields):
    plan = make_plan(model, learning_rate=1e-3, **fields)
    model.state = model.initial_state(plan)
    model.state += random_values(len(model.state), 0, 0.05)  # no factor is zero
    values = torch.full((plan.row_values(model.shapes, 0),), torch.nan)
    result = train_client(model, task, examples, settings, plan, 0, values)
    assert result.num_steps == 1
    assert not torch.equal(values, model.state)


def kept_around(module, run):
    """Run, and return the shapes kept for the backward pass before, within and after a module's forward."""
    phases = [[]]
    hooks = [
        module.register_forward_pre_hook(lambda *_: phases.append([])),
        module.register_forward_hook(lambda *_: phases.append([])),
    ]
    with saved_tensors_hooks(
        lambda value: phases[-1].append(tuple(value.shape)) or value, lambda value: value
    ):
        run()
    for hook in hooks:
        hook.remove()
    before, within, after = phases
    return before, within, after


STEPS = {
    "plain": ({}, {}),
    "dropout in the base": ({"base_dropout": 0.1}, {}),
    "proximal": ({}, {"mu": 0.1}),
}


@pytest.mark.parametrize("case", STEPS)
def test_nothing_is_kept_below_the_first_adapted_layer(tiny_model_folder, task, examples, case):
    options, fields = STEPS[case]
    model = build_model(tiny_model_folder, target_modules=UPPER, **options)
    before, within, after = kept_around(
        model._layers[0], lambda: train_one_step(model, task, examples, **fields)
    )
    assert before == []
    # 15 tokens, LoRA rank 4: B for A's gradient, the input for A's, (tokens, rank) for B's; nothing for the
    # input's own gradient, so neither the weight (64, 32) nor A (4, 32).
    assert within == [(64, 4), (15, 32), (15, 4)]
    assert (15, 64) in after  # the second adapted layer's input
    assert (32, 64) in after  # and its weight: the gradient goes on to the first


def test_under_autocast_nothing_is_kept_below_either(tiny_model_folder, task, examples):
    model = build_model(tiny_model_folder, target_modules=UPPER)
    settings = replace(ONE_STEP, precision="bfloat16")
    before, within, _ = kept_around(model._layers[0], lambda: train_one_step(model, task, examples, settings))
    assert before == []
    assert sorted(within) == [(15, 4), (15, 32), (64, 4)]


def test_with_b_alone_the_first_adapted_layer_does_not_keep_its_input(tiny_model_folder, task, examples):
    model = build_model(tiny_model_folder, target_modules=UPPER)
    before, within, _ = kept_around(
        model._layers[0], lambda: train_one_step(model, task, examples, scope="b")
    )
    assert before == []
    assert within == [(15, 4)]


def test_the_whole_model_keeps_something_below(tiny_model_folder, task, examples):
    """So the tests above would see it."""
    model = build_model(tiny_model_folder, target_modules=UPPER)
    before, _, _ = kept_around(model._layers[0], lambda: train_one_step(model, task, examples, scope="full"))
    assert len(before) > 20


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_only_adapter_and_head_have_gradients_and_an_optimizer(tiny_model_folder, task, examples, optimizer):
    model = build_model(tiny_model_folder, target_modules=UPPER)
    made = []
    hook = register_optimizer_step_pre_hook(lambda made_by, *_: made.append(made_by))
    train_one_step(model, task, examples, replace(ONE_STEP, optimizer=optimizer))
    hook.remove()
    (trained,) = [parameter for group in made[0].param_groups for parameter in group["params"]]
    # LoRA rank 4 on (64, 32) and (32, 64), and a head of 3 labels.
    assert trained.numel() == 2 * 4 * (64 + 32) + 3 * (32 + 1)
    state = [value.numel() for value in made[0].state[trained].values() if value.numel() > 1]
    assert state == ([trained.numel()] * 2 if optimizer == "adamw" else [])
    first, end = trained.data_ptr(), trained.data_ptr() + 4 * trained.numel()
    for name, parameter in model.peft_model.named_parameters():
        is_trained = "lora_" in name or ".modules_to_save." in name
        assert parameter.requires_grad == is_trained, name
        assert (parameter.grad is not None) == is_trained, name
        assert (first <= parameter.data_ptr() < end) == is_trained, name


def kept_bytes(model, precision):
    """Bytes of activations that the backward pass of one call needs, each tensor once whatever its views."""
    parameters = {value.untyped_storage().data_ptr() for value in model.peft_model.parameters()}
    held = {}

    def hold(value):
        held[value.untyped_storage().data_ptr()] = value
        return value

    with saved_tensors_hooks(hold, lambda value: value):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(make_batch())
        logits.float().square().sum().backward()
    kept = [value.untyped_storage().nbytes() for place, value in held.items() if place not in parameters]
    return sum(kept)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("fields", [{}, {"scope": "b"}], ids=["adapter", "b-only"])
@pytest.mark.parametrize("targets", ["all-linear", UPPER], ids=["all", "upper"])
def test_fused_layers_keep_no_more_than_pefts_own(tiny_model_folder, monkeypatch, targets, fields, precision):
    kept = {}
    for kind in (FusedLinear, Linear):
        monkeypatch.setattr(fused, "FusedLinear", kind)
        model = build_model(tiny_model_folder, target_modules=targets)
        assert {type(layer) for layer in model._layers} == {kind}
        plan = make_plan(model, **fields)
        model.state = model.initial_state(plan)
        flat = model.start(plan, 0, {}).clone()
        model.bind(plan, flat, torch.zeros_like(flat), 0)
        model.train(True)
        kept[kind] = kept_bytes(model, precision)
    assert 0 < kept[FusedLinear] <= kept[Linear]


# gradient checkpointing


def gradient_and_bytes(folder, *, recomputes, **options):
    model = build_model(folder, **options)
    if recomputes:
        model.checkpoint_activations()
    plan = make_plan(model)
    model.state = model.initial_state(plan)
    flat = model.start(plan, 0, {}) + random_values(len(model.state), 3, 0.1)
    grad = torch.zeros_like(flat)
    model.bind(plan, flat, grad, 0)
    model.train(True)
    torch.manual_seed(4)
    num_bytes = kept_bytes(model, "float32")
    return grad, num_bytes


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recomputed_activations_give_the_same_gradient_and_less_is_kept(tiny_model_folder, dropout):
    (plain, much), (again, less) = (
        gradient_and_bytes(tiny_model_folder, recomputes=each, base_dropout=dropout) for each in (False, True)
    )
    assert plain.abs().max() > 0
    assert torch.equal(plain, again)
    assert less < much / 3


def test_recomputing_keeps_nothing_below_the_first_adapted_layer_either(tiny_model_folder, task, examples):
    model = build_model(tiny_model_folder, target_modules=UPPER)
    model.checkpoint_activations()
    kept = []
    with saved_tensors_hooks(lambda value: kept.append(tuple(value.shape)) or value, lambda value: value):
        hook = model._layers[0].register_forward_pre_hook(lambda *_: kept.append("first adapted layer"))
        train_one_step(model, task, examples)
        hook.remove()
    assert (32, 32) not in kept[: kept.index("first adapted layer")]  # no weight of the layers below
    assert (4, 32) not in kept[: kept.index("first adapted layer")]
