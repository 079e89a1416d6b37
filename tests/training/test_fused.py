import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from support import build_model, make_plan, random_values
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from mpifedlora.training import fused
from mpifedlora.training.fused import FusedLinear, _Fused

DOUBLE = {"dtype": torch.float64}


class OneLayer(nn.Module):
    """The smallest model that PEFT adapts."""

    def __init__(self, has_bias=True):
        super().__init__()
        self.linear = nn.Linear(5, 7, bias=has_bias)

    def forward(self, x):
        return self.linear(x)


def models(has_bias=True, **options):
    """Return models with PEFT's own layer and with a fused one, of the same values, B included."""
    made = []
    for kind in (Linear, FusedLinear):
        torch.manual_seed(0)
        config = LoraConfig(r=3, lora_alpha=6, target_modules=["linear"], init_lora_weights=False, **options)
        config._register_custom_module({nn.Linear: kind})
        made.append(get_peft_model(OneLayer(has_bias), config))
    return made


def layer_of(model):
    return model.base_model.model.linear


def layers(has_bias=True, **options):
    """Return the two layers."""
    both = [layer_of(model) for model in models(has_bias, **options)]
    assert [type(layer) for layer in both] == [Linear, FusedLinear]
    return both


def outcome(layer, x, weights):
    """The output, and the gradients of x, A and B."""
    x = x.clone().requires_grad_()
    out = layer(x)
    parameters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    (out * weights.to(out.dtype)).sum().backward()
    return [out.detach(), x.grad, *(parameter.grad for parameter in parameters)]


@pytest.fixture
def calls(monkeypatch):
    """The calls of the fused step."""
    made, apply = [], _Fused.apply
    monkeypatch.setattr(fused._Fused, "apply", lambda *given: made.append(given) or apply(*given))
    return made


@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 5), (5,)], ids=["rows", "batch", "one"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_gives_what_pefts_layer_gives(calls, shape, has_bias):
    plain, layer = (made.double() for made in layers(has_bias))
    x = random_values(torch.Size(shape).numel()).view(shape).double()
    weights = random_values(torch.Size(shape).numel() // 5 * 7, 1).view(*shape[:-1], 7)
    for got, wanted in zip(outcome(layer, x, weights), outcome(plain, x, weights), strict=True):
        assert got.shape == wanted.shape
        assert torch.allclose(got, wanted, rtol=1e-12, atol=1e-14)
    assert len(calls) == 1
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("needed", list(itertools.product((True, False), repeat=3))[:-1], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_gradients_are_those_of_finite_differences(needed, has_bias):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 5), "weight": (7, 5), "bias": (7,), "a": (3, 5), "b": (7, 3)}
    given = {name: torch.randn(shape, generator=generator, **DOUBLE) for name, shape in shapes.items()}
    for name, is_needed in zip(("x", "a", "b"), needed, strict=True):
        given[name].requires_grad_(is_needed)
    given["bias"] = given["bias"] if has_bias else None
    assert torch.autograd.gradcheck(_Fused.apply, (*given.values(), 1.5))


def test_a_gradient_that_lies_in_memory_otherwise_is_right():
    """As attention's gradients do, which come transposed."""
    plain, layer = (made.double() for made in layers())
    grads = []
    for made in (plain, layer):
        x = random_values(30).view(2, 3, 5).double().requires_grad_()
        made(x.transpose(0, 1)).transpose(1, 2).square().sum().backward()
        grads.append(x.grad)
    assert torch.allclose(*grads, rtol=1e-12)


@pytest.mark.parametrize(
    ("needs_x", "needs_a", "needs_b", "kept"),
    [
        (True, True, True, "weight a b rows low"),
        (False, True, True, "b rows low"),
        (True, False, True, "weight a b low"),  # FFA-LoRA
        (True, True, False, "weight a b rows"),
        (False, False, True, "low"),  # its first layer
        (True, False, False, "weight a b"),
    ],
)
def test_only_what_a_gradient_needs_is_kept(needs_x, needs_a, needs_b, kept):
    sizes = {(12, 11): "rows", (12, 2): "low", (7, 11): "weight", (2, 11): "a", (7, 2): "b"}
    x = torch.ones(4, 3, 11, requires_grad=needs_x)
    a, b = torch.ones(2, 11, requires_grad=needs_a), torch.ones(7, 2, requires_grad=needs_b)
    found = []
    with saved_tensors_hooks(lambda value: found.append(value.shape), lambda nothing: nothing):
        _Fused.apply(x, torch.ones(7, 11), torch.ones(7), a, b, 2.0)
    assert [sizes[tuple(shape)] for shape in found] == kept.split()


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_computes_in_bfloat16_and_keeps_the_parameters_type(calls, base_dtype):
    plain, layer = layers()
    for made in (plain, layer):
        made.base_layer.to(base_dtype)
    x, weights = random_values(40).view(8, 5), random_values(56, 1).view(8, 7)
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = outcome(layer, x, weights), outcome(plain, x, weights)
    assert len(calls) == 1
    assert {value.dtype for value in calls[0][:5]} == {torch.bfloat16}
    assert [value.dtype for value in got] == [value.dtype for value in wanted]
    for value, other in zip(got, wanted, strict=True):
        assert torch.allclose(value.float(), other.float(), rtol=0.05, atol=0.02)


LEFT_TO_PEFT = {
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "bfloat16 base": lambda layer: layer.base_layer.to(torch.bfloat16),
    "dropout": lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.5)}),
}


@pytest.mark.parametrize("case", LEFT_TO_PEFT)
def test_what_is_not_one_plain_adapter_is_left_to_peft(calls, case):
    plain, layer = layers()
    x = random_values(20).view(4, 5)
    usual = layer(x)
    calls.clear()
    x = x.bfloat16() if case == "bfloat16 base" else x
    results = []
    for made in (plain, layer):
        LEFT_TO_PEFT[case](made)
        torch.manual_seed(1)
        results.append(made(x))
    assert torch.equal(*results)
    assert calls == []
    assert case == "merged" or not torch.equal(results[1], usual)


def test_dropout_is_left_to_peft_in_training_only(calls):
    _, layer = layers(lora_dropout=0.5)
    x = random_values(20).view(4, 5)
    layer(x)
    assert calls == []
    layer.eval()
    layer(x)
    assert len(calls) == 1


def test_two_adapters_are_left_to_peft(calls):
    x = random_values(20).view(4, 5)
    results = []
    for model in models():
        torch.manual_seed(3)
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["linear"], init_lora_weights=False)
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
        results.append(layer_of(model)(x))
    assert torch.equal(*results)
    assert calls == []


def test_all_adapted_layers_of_a_model_are_fused(tiny_model_folder, calls):
    model = build_model(tiny_model_folder)
    plan = make_plan(model)
    model.bind(plan, model.initial_state(plan))
    assert {type(layer) for layer in model._layers} == {FusedLinear}
    model({"input_ids": torch.tensor([[2, 9, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)})
    assert len(calls) == len(model._layers) == 12
