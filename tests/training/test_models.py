import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support import build_model, make_plan
from torch.nn import functional

from mpifedlora.core.layout import Factors
from mpifedlora.errors import AdapterError
from mpifedlora.io.adapter_files import write_adapter
from mpifedlora.training.base import build_base
from mpifedlora.training.models import find_linears

LAYER = "encoder.encoder.layer.{}."
ENDINGS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
BATCH = {
    "input_ids": torch.tensor([[2, 9, 30, 44, 3], [2, 70, 8, 3, 0], [2, 120, 3, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0]]),
}
LABELS = torch.tensor([0, 2, 1])


@pytest.fixture(scope="module")
def base(tiny_model_folder):
    return build_base(str(tiny_model_folder), num_labels=3, dropout=0.0)


@pytest.fixture
def model(tiny_model_folder):
    return build_model(tiny_model_folder)


def random_state(layout, seed=0):
    return torch.randn(layout.num_values, generator=torch.Generator().manual_seed(seed)) * 0.2


def logits_of(model, plan, flat):
    model.bind(plan, flat)
    model.train(False)
    with torch.no_grad():
        return model(BATCH)


def plain_logits(module):
    with torch.no_grad():
        return module.eval()(**BATCH).logits


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


def test_modules_to_save_must_exist(tiny_model_folder):
    with pytest.raises(AdapterError, match=r"modules_to_save.*did you mean \"encoder\.embeddings\""):
        build_model(tiny_model_folder, modules_to_save=["encoder.embedings"])


# bind


def plain_peft(folder, names, lora_rank=4, scaling=2.0):
    """The same model as PEFT makes it, with parameters of its own."""
    base = build_base(str(folder), num_labels=3, dropout=0.0)
    config = LoraConfig(
        r=lora_rank, lora_alpha=scaling * lora_rank, target_modules=names, modules_to_save=["classifier"]
    )
    return get_peft_model(base.module, config)


def plain_parameters(peft_model, names):
    inner = peft_model.base_model.model
    factors = [
        part["default"].weight
        for name in names
        for part in (inner.get_submodule(name).lora_A, inner.get_submodule(name).lora_B)
    ]
    return factors + list(inner.classifier.modules_to_save["default"].parameters())


def bound_parameters(model):
    return plain_parameters(model.peft_model, [module.name for module in model.shapes.modules])


def addresses(layout, flat):
    pairs = [part for factors in layout.factors(flat) for part in factors]
    return [view.data_ptr() for view in pairs + layout.whole_tensors(flat)]


def test_bound_tensors_and_gradients_lie_in_the_buffers(model):
    plan = make_plan(model, 3)
    layout = plan.layout(model.shapes)
    flat, grad = random_state(layout), torch.zeros(layout.num_values)
    model.bind(plan, flat, grad)
    functional.cross_entropy(model(BATCH), LABELS).backward()
    parameters = bound_parameters(model)
    assert [parameter.data_ptr() for parameter in parameters] == addresses(layout, flat)
    assert [parameter.grad.data_ptr() for parameter in parameters] == addresses(layout, grad)
    assert all(view.any() for view in (part for pair in layout.factors(grad) for part in pair))
    trained = {id(parameter) for parameter in model.peft_model.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in parameters}


def test_gradients_equal_those_of_a_plain_peft_model(model, tiny_model_folder):
    plan = make_plan(model)
    layout = plan.layout(model.shapes)
    flat, grad = random_state(layout), torch.zeros(layout.num_values)
    names = [module.name for module in model.shapes.modules]
    plain = plain_peft(tiny_model_folder, names).eval()
    for parameter, view in zip(plain_parameters(plain, names), views(layout, flat), strict=True):
        parameter.data.copy_(view)
    model.bind(plan, flat, grad)
    model.train(False)
    functional.cross_entropy(model(BATCH), LABELS).backward()
    functional.cross_entropy(plain(**BATCH).logits, LABELS).backward()
    expected = torch.cat([parameter.grad.reshape(-1) for parameter in plain_parameters(plain, names)])
    assert torch.allclose(grad, expected, rtol=1e-5, atol=1e-7)


def views(layout, flat):
    return [part for pair in layout.factors(flat) for part in pair] + layout.whole_tensors(flat)


def test_gradients_add_up_in_the_buffer(model):
    plan = make_plan(model, 2)
    layout = plan.layout(model.shapes)
    flat, grad = random_state(layout), torch.zeros(layout.num_values)
    model.bind(plan, flat, grad)
    model.train(False)
    functional.cross_entropy(model(BATCH), LABELS).backward()
    once = grad.clone()
    functional.cross_entropy(model(BATCH), LABELS).backward()
    assert torch.allclose(grad, 2 * once, atol=1e-6)


def test_binding_moves_no_data(model):
    plan = make_plan(model)
    layout = plan.layout(model.shapes)
    first, second = random_state(layout, 1), random_state(layout, 2)
    before = first.clone()
    logits = logits_of(model, plan, first)
    assert not torch.equal(logits_of(model, plan, second), logits)
    assert torch.equal(first, before)
    assert torch.equal(logits_of(model, plan, first), logits)


@pytest.mark.parametrize("lora_ranks", [4, 2, 1, [1, 2, 3, 4] * 3])
def test_the_scaling_stays_alpha_over_rank_max_after_cuts(model, tiny_model_folder, lora_ranks):
    model.bind(make_plan(model), random_state(model.shapes.adapter([4] * 12)))
    plan = make_plan(model, lora_ranks)
    layout = plan.layout(model.shapes)
    flat = random_state(layout)
    base = build_base(str(tiny_model_folder), num_labels=3, dropout=0.0).module
    with torch.no_grad():
        for module, factors in zip(model.shapes.modules, layout.factors(flat), strict=True):
            base.get_submodule(module.name).weight += 8.0 / 4 * factors.b @ factors.a
        for parameter, value in zip(base.classifier.parameters(), layout.whole_tensors(flat), strict=True):
            parameter.copy_(value)
    assert torch.allclose(logits_of(model, plan, flat), plain_logits(base), atol=1e-4)


def test_after_a_cut_a_step_changes_only_the_new_buffer(model):
    before = [parameter.clone() for parameter in model._body]
    old_plan, plan = make_plan(model, 4), make_plan(model, 2, round_num=2)
    old, flat = random_state(old_plan.layout(model.shapes)), random_state(plan.layout(model.shapes), 1)
    old_grad, grad = torch.zeros_like(old), torch.zeros_like(flat)
    model.bind(old_plan, old, old_grad)
    old_loss = functional.cross_entropy(model(BATCH), LABELS)
    old_loss.backward()  # its graph lives on, and remembers the old shapes
    copies = old.clone(), old_grad.clone(), flat.clone()
    model.bind(plan, flat, grad)
    optimizer = torch.optim.SGD(bound_parameters(model), 1e-4)
    loss = functional.cross_entropy(model(BATCH), LABELS)
    loss.backward()
    optimizer.step()
    assert torch.equal(old, copies[0])
    assert torch.equal(old_grad, copies[1])
    assert torch.allclose(flat, copies[2] - 1e-4 * grad)
    assert grad.any()
    assert all(torch.equal(*pair) for pair in zip(model._body, before, strict=True))
    assert functional.cross_entropy(model(BATCH), LABELS) < loss
    assert {layer.lora_A["default"].out_features for layer in model._layers} == {2}
    assert old_loss.grad_fn is not None


# freeze


def frozen_message(model, plan, seed=0):
    """A message with random frozen directions and state, and the un-cut adapter that it came from."""
    message = torch.randn(plan.message_values(model.shapes), generator=torch.Generator().manual_seed(seed))
    message *= 0.2
    _, frozen, state = plan.split(model.shapes, message)
    active = plan.layout(model.shapes).factors(state)
    kept = model.shapes.directions(plan.frozen_ranks).factors(frozen)
    joined = [join(*pair) for pair in zip(active, kept, strict=True)]
    return message, joined, plan.layout(model.shapes).whole_tensors(state)


def join(*parts):
    return Factors(torch.cat([part.a for part in parts]), torch.cat([part.b for part in parts], dim=1))


def flatten(factors, head):
    parts = [part for pair in factors for part in pair] + list(head)
    return torch.cat([part.reshape(-1) for part in parts])


def received_logits(model, plan, message):
    model.receive(plan, message)
    return logits_of(model, plan, model.state)


MIXED_ACTIVE, MIXED_FROZEN = [1, 2, 3, 1] * 3, (3, 0, 1, 2) * 3


def frozen_plan(model, kind):
    ranks = (2, (2,) * 12) if kind == "uniform" else (MIXED_ACTIVE, MIXED_FROZEN)
    return make_plan(model, ranks[0], frozen_ranks=ranks[1], sends_state=True)


@pytest.mark.parametrize("kind", ["uniform", "mixed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.3)])
def test_freezing_keeps_the_logits_of_the_uncut_adapter(tiny_model_folder, kind, dtype, tolerance):
    model, uncut = (build_model(tiny_model_folder, dtype=dtype) for _ in range(2))
    plan = frozen_plan(model, kind)
    message, joined, head = frozen_message(model, plan)
    whole = make_plan(uncut, [part.lora_rank for part in joined])
    expected = logits_of(uncut, whole, flatten(joined, head))
    got = received_logits(model, plan, message)
    assert (got - expected).abs().max() <= tolerance
    assert (logits_of(model, plan, model.state) - expected).abs().max() <= tolerance
    base = logits_of(uncut, plan, model.state)
    assert (base - expected).abs().max() > 3 * tolerance  # the frozen directions matter


@pytest.mark.parametrize(("dtype", "num_frozen"), [("float32", 0), ("bfloat16", 24)])
def test_only_other_bases_than_float32_keep_a_second_adapter(tiny_model_folder, dtype, num_frozen):
    model = build_model(tiny_model_folder, dtype=dtype)
    plan = frozen_plan(model, "uniform")
    received_logits(model, plan, frozen_message(model, plan)[0])
    frozen = [value for name, value in model.peft_model.named_parameters() if ".frozen." in name]
    assert len(frozen) == num_frozen
    assert not any(value.requires_grad for value in frozen)


@pytest.mark.parametrize("frozen_rank", [1, 2])
def test_a_step_leaves_the_second_adapter_alone(tiny_model_folder, frozen_rank):
    model = build_model(tiny_model_folder, dtype="bfloat16")
    plan = make_plan(model, 2, frozen_ranks=(frozen_rank,) * 12, sends_state=True)
    received_logits(model, plan, frozen_message(model, plan)[0])
    frozen = [value for name, value in model.peft_model.named_parameters() if ".frozen." in name]
    before = [value.clone() for value in frozen]
    flat = model.state.clone()
    model.bind(plan, flat, torch.zeros_like(flat))
    functional.cross_entropy(model(BATCH), LABELS).backward()
    torch.optim.SGD(bound_parameters(model), 0.1).step()
    assert not torch.equal(flat, model.state)
    assert all(torch.equal(*pair) for pair in zip(frozen, before, strict=True))
    assert all(value.grad is None and not value.requires_grad for value in frozen)


def test_frozen_directions_are_not_dropped_out(tiny_model_folder):
    model = build_model(tiny_model_folder, dtype="bfloat16", dropout=0.5)
    plan = frozen_plan(model, "uniform")
    message, _, _ = frozen_message(model, plan)
    _, _, state = plan.split(model.shapes, message)
    for factors in plan.layout(model.shapes).factors(state):
        factors.b.zero_()
    expected = received_logits(model, plan, message)
    model.train(True)
    with torch.no_grad():
        assert torch.equal(model(BATCH), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.3)])
def test_freezing_twice_adds_up(tiny_model_folder, dtype, tolerance):
    model, uncut = (build_model(tiny_model_folder, dtype=dtype) for _ in range(2))
    first = make_plan(model, 3, frozen_ranks=(1,) * 12, sends_state=True)
    second = make_plan(model, 1, frozen_ranks=(2, 0, 1) * 4, sends_state=True, round_num=2)
    message, _, _ = frozen_message(model, first)
    received_logits(model, first, message)
    later, joined, head = frozen_message(model, second, seed=1)
    kept = model.shapes.directions(first.frozen_ranks).factors(first.split(model.shapes, message)[1])
    both = [join(*pair) for pair in zip(joined, kept, strict=True)]
    got = received_logits(model, second, later)
    expected = logits_of(uncut, make_plan(uncut, [part.lora_rank for part in both]), flatten(both, head))
    assert (got - expected).abs().max() <= tolerance


# export


def exported_logits(model, folder, factors, head, base):
    settings, tensors = model.export(factors, head)
    write_adapter(folder, settings, tensors)
    return plain_logits(PeftModel.from_pretrained(base, folder))


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
    flat = random_state(layout)
    expected = logits_of(model, plan, flat)
    factors, head = layout.factors(flat), layout.whole_tensors(flat)
    got = exported_logits(model, tmp_path, factors, head, copy.deepcopy(base.module))
    assert (got - expected).abs().max() <= 1e-5


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
    flat = random_state(layout)
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
    names = [
        f"base_model.model.{module.name}.lora_{part}.weight"
        for module in model.shapes.modules
        for part in "AB"
    ]
    names += [f"base_model.model.{shape.name}" for shape in model.shapes.head]
    return torch.cat([stored[name].reshape(-1) for name in names])


# the whole model


def test_in_full_scope_all_base_weights_are_views_and_lora_is_off(model):
    plan = make_plan(model, scope="full")
    layout = plan.layout(model.shapes)
    flat, grad = model.initial_state(plan), torch.zeros(layout.num_values)
    model.bind(plan, flat, grad)
    functional.cross_entropy(model(BATCH), LABELS).backward()
    trained = [*model._body, *model._head]
    assert [parameter.data_ptr() for parameter in trained] == addresses(layout, flat)
    assert [parameter.grad.data_ptr() for parameter in trained] == addresses(layout, grad)
    assert all(layer.disable_adapters for layer in model._layers)
    requiring = {id(value) for value in model.peft_model.parameters() if value.requires_grad}
    assert requiring == {id(value) for value in trained}
    assert all(view.any() for view in layout.whole_tensors(grad)[-2:])  # the head


def test_full_gradients_equal_those_of_the_plain_model(model, base):
    plan = make_plan(model, scope="full")
    flat = model.initial_state(plan)
    grad = torch.zeros_like(flat)
    model.bind(plan, flat, grad)
    model.train(False)
    plain = copy.deepcopy(base.module).eval()
    functional.cross_entropy(model(BATCH), LABELS).backward()
    functional.cross_entropy(plain(**BATCH).logits, LABELS).backward()
    by_name = dict(plain.named_parameters())
    expected = torch.cat([by_name[shape.name].grad.reshape(-1) for shape in model.shapes.full().whole])
    assert torch.allclose(grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_opening_the_adapter_stage_keeps_the_logits_of_the_aggregated_model(tiny_model_folder, dtype):
    model = build_model(tiny_model_folder, dtype=dtype)
    full = make_plan(model, scope="full")
    flat = model.initial_state(full)
    flat += torch.randn(flat.shape, generator=torch.Generator().manual_seed(3)) * 0.02
    expected = logits_of(model, full, flat)
    plan = make_plan(model, round_num=2, sends_base=True, sends_state=True)
    message = torch.zeros(plan.message_values(model.shapes))
    base, _, state = plan.split(model.shapes, message)
    base.copy_(flat[: base.numel()])
    plan.layout(model.shapes).whole_values(state).copy_(flat[base.numel() :])
    for factors in plan.layout(model.shapes).factors(state):
        factors.a.normal_()
    assert (received_logits(model, plan, message) - expected).abs().max() <= 1e-5
    assert not any(parameter.requires_grad for parameter in model._body)
    message.zero_()  # the base is the model's own
    model.bind(plan, torch.zeros_like(state))
    assert model._body[0].any()


# what every process derives alike


@pytest.mark.parametrize("scope", ["adapter", "full"])
def test_initial_states_are_the_same_bits_on_every_process(tiny_model_folder, scope):
    torch.manual_seed(1)
    first = build_model(tiny_model_folder)
    torch.manual_seed(2)
    second = build_model(tiny_model_folder)
    other = build_model(tiny_model_folder, seed=1)
    states = [model.initial_state(make_plan(model, scope=scope)) for model in (first, second, other)]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    assert first.digest() == second.digest() != other.digest()


def test_the_adapter_starts_at_the_base_models_logits(model, base):
    plan = make_plan(model)
    state = model.initial_state(plan)
    factors = plan.layout(model.shapes).factors(state)
    assert all(not part.b.any() and 0 < part.a.abs().max() <= part.a.shape[1] ** -0.5 for part in factors)
    assert torch.allclose(logits_of(model, plan, state), plain_logits(base.module), atol=1e-6)


def test_receiving_without_a_state_gives_the_initial_one(model):
    plan = make_plan(model)
    model.receive(plan, torch.empty(0))
    assert torch.equal(model.state, model.initial_state(plan))


def test_digests_tell_weights_and_adapted_layers_apart(tiny_model_folder):
    first, same, other, fewer = (
        build_model(tiny_model_folder, target_modules=targets)
        for targets in ("all-linear", "all-linear", "all-linear", ["query"])
    )
    with torch.no_grad():
        other._body[4].reshape(-1)[-1] += 1e-3
    assert first.digest() == same.digest()
    assert len({first.digest(), other.digest(), fewer.digest()}) == 3
