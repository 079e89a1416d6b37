import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support import (
    bound_logits,
    build_model,
    flatten,
    frozen_message,
    make_plan,
    plain_logits,
    random_values,
)
from torch import nn

from mpifedlora.core.layout import Factors, LinearShape, ModelShapes, TensorShape
from mpifedlora.errors import AdapterError
from mpifedlora.io.adapter_files import write_adapter
from mpifedlora.training.base import build_base
from mpifedlora.training.lora_layers import (
    ACTIVE,
    adapt,
    export_adapter,
    find_linears,
    is_inside,
    lora_layer,
    nothing,
    set_factors,
    trained,
)

LAYER = "encoder.encoder.layer.{}."
ENDINGS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


@pytest.fixture(scope="module")
def base(tiny_model_folder):
    return build_base(str(tiny_model_folder), num_labels=3, dropout=0.0)


@pytest.fixture
def model(tiny_model_folder):
    return build_model(tiny_model_folder)


# find_linears


def test_all_linear_finds_every_linear_layer_but_the_head(base):
    found = find_linears(base.module, "all-linear", base.head_names)
    assert list(found) == [LAYER.format(number) + ending for number in range(2) for ending in ENDINGS]
    assert found[LAYER.format(1) + "output.dense"].weight.shape == (32, 64)


def test_all_linear_without_exclusions_finds_the_head_too(base):
    assert "classifier" in find_linears(base.module, "all-linear")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["value", "query"], ["0.attention.self.query", "0.attention.self.value"]),
        (["output.dense"], ["0.attention.output.dense", "0.output.dense"]),
        ([LAYER.format(0) + "attention.self.key"], ["0.attention.self.key"]),
        (r".*layer\.0\..*\.(query|key)", ["0.attention.self.query", "0.attention.self.key"]),
        (r"encoder\.encoder\.layer\.0\.intermediate\.dense", ["0.intermediate.dense"]),
    ],
)
def test_targets_are_endings_full_names_or_a_regex(base, targets, expected):
    found = find_linears(base.module, targets, base.head_names)
    assert [name for name in found if ".layer.0." in name] == ["encoder.encoder.layer." + x for x in expected]


@pytest.mark.parametrize("targets", [["uery"], ["classifier"], ["query", "embeddings"], "layer.0"])
def test_a_target_that_matches_nothing_is_named(base, targets):
    with pytest.raises(AdapterError, match="which matches none"):
        find_linears(base.module, targets, base.head_names)


@pytest.mark.parametrize("target", ["qeury", "attention.self.qury"])
def test_the_nearest_name_is_offered(base, target):
    with pytest.raises(AdapterError, match='did you mean "query"'):
        find_linears(base.module, [target], base.head_names)


def test_a_bare_name_is_no_regex_for_the_whole_name(base):
    with pytest.raises(AdapterError, match=r'did you mean the list \["query"\]'):
        find_linears(base.module, "query", base.head_names)


def test_a_malformed_regex_is_an_adapter_error(base):
    with pytest.raises(AdapterError, match="regular expression"):
        find_linears(base.module, "*query", base.head_names)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("head", True), ("head.weight", True), ("header.weight", False), ("a.head.weight", False), ("", False)],
)
def test_only_the_module_itself_and_what_lies_in_it_is_inside(name, expected):
    assert is_inside(name, ["tail", "head"]) == expected
    assert not is_inside(name, [])


# one layer


class OneLayer(nn.Module):
    """x @ W.T, as small as PEFT takes it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2, bias=False)
        self.inner.weight.data = torch.tensor([[1.0, 0.0, 2.0], [0.0, -1.0, 1.0]])

    def forward(self, x):
        return self.inner(x)


X = torch.tensor([[1.0, 2.0, 3.0]])
FACTORS = {
    1: Factors(torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[2.0], [1.0]])),
    2: Factors(torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.0, 3.0]])),
}


@pytest.fixture
def layer():
    peft_model = adapt(OneLayer(), ["inner"], {"lora_dropout": 0.0, "bias": "none"})
    layer = lora_layer(peft_model, "inner")
    layer.scaling[ACTIVE] = 0.5
    return layer


# X @ W.T is (7, 1); A X is -2 (and 2): rank 1 adds 0.5 * (-4, -2), rank 2 another 0.5 * (0, 6).
@pytest.mark.parametrize(("lora_rank", "expected"), [(1, [5.0, 0.0]), (2, [5.0, 3.0])])
def test_factors_of_any_rank_are_added_with_the_scaling(layer, lora_rank, expected):
    parameters = set_factors(layer, ACTIVE, FACTORS[lora_rank])
    assert layer(X).tolist() == [expected]
    assert layer.r[ACTIVE] == lora_rank
    assert (layer.lora_A[ACTIVE].out_features, layer.lora_B[ACTIVE].in_features) == (lora_rank, lora_rank)
    assert [parameter.data_ptr() for parameter in parameters] == [x.data_ptr() for x in FACTORS[lora_rank]]


def test_factors_of_the_same_rank_keep_the_parameters(layer):
    first = set_factors(layer, ACTIVE, FACTORS[2])
    again = set_factors(layer, ACTIVE, Factors(*(part.clone() for part in FACTORS[2])))
    other = set_factors(layer, ACTIVE, FACTORS[1])
    assert [id(parameter) for parameter in first] == [id(parameter) for parameter in again]
    assert not {id(parameter) for parameter in first} & {id(parameter) for parameter in other}


def test_a_parameter_that_is_not_trained_has_no_gradient(layer):
    a, b = set_factors(layer, ACTIVE, FACTORS[1])
    assert trained(a, True) == [a]
    layer(X).sum().backward()
    assert a.grad is not None
    assert trained(a, False) == []
    assert (a.requires_grad, a.grad) == (False, None)
    layer(X).sum().backward()
    assert a.grad is None
    assert b.grad is not None


def test_nothing_adds_nothing(layer):
    set_factors(layer, ACTIVE, nothing(layer))
    assert layer(X).tolist() == [[7.0, 1.0]]
    assert nothing(layer).lora_rank == 1


# export


def exported_logits(model, folder, factors, head, base):
    settings, tensors = model.export(factors, head)
    write_adapter(folder, settings, tensors)
    return plain_logits(PeftModel.from_pretrained(base, folder))


def frozen_plan(model, kind):
    active, frozen = (2, (2,) * 12) if kind == "uniform" else ([1, 2, 3, 1] * 3, (3, 0, 1, 2) * 3)
    return make_plan(model, active, frozen_ranks=frozen, sends_state=True)


def received_logits(model, plan, message):
    model.receive(plan, message)
    return bound_logits(model, plan, model.state)


@pytest.mark.parametrize("kind", ["uniform", "mixed"])
@pytest.mark.parametrize("more", [[], ["encoder.embeddings.LayerNorm"]])
def test_the_export_gives_the_federated_logits(tiny_model_folder, tmp_path, base, kind, more):
    model = build_model(tiny_model_folder, modules_to_save=more)
    plan = frozen_plan(model, kind)
    message, joined, head = frozen_message(model, plan)
    expected = received_logits(model, plan, message)
    got = exported_logits(model, tmp_path, joined, head, copy.deepcopy(base.module))
    assert (got - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("lora_ranks", [[1] * 12, [3] + [1] * 11, [1, 2] * 6])
def test_the_export_of_any_ranks_gives_the_federated_logits(model, tmp_path, base, lora_ranks):
    plan = make_plan(model, lora_ranks)
    layout = plan.layout(model.shapes)
    flat = random_values(layout.num_values)
    expected = bound_logits(model, plan, flat)
    factors, head = layout.factors(flat), layout.whole_tensors(flat)
    got = exported_logits(model, tmp_path, factors, head, copy.deepcopy(base.module))
    assert (got - expected).abs().max() <= 1e-5
    assert (got - plain_logits(base.module)).abs().max() > 0.1  # the adapter matters


def test_the_export_of_a_bfloat16_model_gives_the_federated_logits(tiny_model_folder, tmp_path):
    model = build_model(tiny_model_folder, dtype="bfloat16")
    plan = frozen_plan(model, "mixed")
    message, joined, head = frozen_message(model, plan)
    expected = received_logits(model, plan, message)
    base = build_base(str(tiny_model_folder), num_labels=3, dtype="bfloat16", dropout=0.0).module
    got = exported_logits(model, tmp_path, joined, head, base)
    assert (got - expected).abs().max() <= 0.3


def test_the_export_names_ranks_and_alphas_that_differ(model, tmp_path):
    layout = model.shapes.adapter([3, 1] + [3] * 10)
    flat = random_values(layout.num_values)
    settings, tensors = model.export(layout.factors(flat), layout.whole_tensors(flat))
    odd = model.shapes.modules[1].name
    assert (settings["r"], settings["lora_alpha"]) == (3, 6.0)
    assert settings["rank_pattern"] == {odd: 1}
    assert settings["alpha_pattern"] == {odd: 2.0}
    assert settings["target_modules"] == sorted(module.name for module in model.shapes.modules)
    write_adapter(tmp_path, settings, tensors)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 12 * 2 + 2
    assert torch.equal(flatten_named(stored, model), flat)


def flatten_named(stored, model):
    factors = [
        [stored[f"base_model.model.{module.name}.lora_{part}.weight"] for part in "AB"]
        for module in model.shapes.modules
    ]
    return flatten(factors, [stored[f"base_model.model.{shape.name}"] for shape in model.shapes.head])


def test_an_export_by_hand():
    shapes = ModelShapes(
        (LinearShape("q", 2, 3), LinearShape("v", 2, 3)), (TensorShape("head.bias", (2,)),), ()
    )
    head, options = (
        torch.tensor([5.0, 6.0]),
        {"lora_dropout": 0.1, "modules_to_save": ["head"], "bias": "none"},
    )
    settings, tensors = export_adapter(shapes, [FACTORS[1], FACTORS[2]], [head], 1.5, options)
    # alpha / r is 1.5 in both modules: 3 / 2, and 1.5 / 1.
    assert (settings["r"], settings["lora_alpha"]) == (2, 3.0)
    assert (settings["rank_pattern"], settings["alpha_pattern"]) == ({"q": 1}, {"q": 1.5})
    assert (settings["target_modules"], settings["modules_to_save"]) == (["q", "v"], ["head"])
    assert (settings["lora_dropout"], settings["inference_mode"]) == (0.1, True)
    prefix = "base_model.model."
    assert {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "q.lora_A.weight": (1, 3),
        "q.lora_B.weight": (2, 1),
        "v.lora_A.weight": (2, 3),
        "v.lora_B.weight": (2, 2),
        "head.bias": (2,),
    }
    assert torch.equal(tensors[prefix + "v.lora_B.weight"], FACTORS[2].b)
