import copy
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support import (
    bound_logits,
    build_model,
    flatten,
    frozen_message,
    join,
    make_batch,
    make_plan,
    plain_logits,
    random_values,
)
from torch.nn import functional

from mpifedlora.core.fresh import initial_adapter
from mpifedlora.core.layout import DENSE, AdapterLayout, Factors
from mpifedlora.errors import AdapterError
from mpifedlora.io.adapter_files import write_adapter
from mpifedlora.training.base import build_base

BATCH = make_batch()
LABELS = torch.tensor([0, 2, 1])


@pytest.fixture(scope="module")
def base(tiny_model_folder):
    return build_base(str(tiny_model_folder), num_labels=3, dropout=0.0)


@pytest.fixture
def model(tiny_model_folder):
    return build_model(tiny_model_folder)


def random_state(layout, seed=0):
    return random_values(layout.num_values, seed)


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
    assert torch.allclose(grad, expected, rtol=1e-5, atol=1e-6)


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
    logits = bound_logits(model, plan, first)
    assert not torch.equal(bound_logits(model, plan, second), logits)
    assert torch.equal(first, before)
    assert torch.equal(bound_logits(model, plan, first), logits)


@pytest.mark.parametrize("lora_ranks", [4, 2, 1, [1, 2, 3, 4] * 3])
def test_the_scaling_stays_alpha_over_rank_max_after_cuts(model, tiny_model_folder, lora_ranks):
    model.bind(make_plan(model), random_state(model.shapes.adapter([4] * 12)))
    plan = make_plan(model, lora_ranks)
    layout = plan.layout(model.shapes)
    flat = random_state(layout)
    expected = merged_logits(tiny_model_folder, model, layout.factors(flat), layout.whole_tensors(flat))
    assert torch.allclose(bound_logits(model, plan, flat), expected, atol=1e-4)


def merged_logits(folder, model, factors, head):
    """The logits of the base model with 8 / 4 * B @ A added to its weights, without any LoRA layer."""
    base = build_base(str(folder), num_labels=3, dropout=0.0).module
    with torch.no_grad():
        for module, part in zip(model.shapes.modules, factors, strict=True):
            base.get_submodule(module.name).weight += 8.0 / 4 * part.b @ part.a
        for parameter, value in zip(base.classifier.parameters(), head, strict=True):
            parameter.copy_(value)
    return plain_logits(base)


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


# what backward needs, and keeps


SCOPES = {
    "adapter": {},
    "b-only": {"scope": "b"},
    "a-only": {"scope": "a"},
    "whole": {"scope": "full"},
    "frozen": {"frozen_ranks": (1,) * 12, "sends_state": True},
}


@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in SCOPES), ("frozen", "bfloat16")])
def test_frozen_weights_get_no_gradient(tiny_model_folder, name, dtype):
    model = build_model(tiny_model_folder, dtype=dtype)
    plan = make_plan(model, 2, **SCOPES[name])
    model.receive(plan, random_values(plan.message_values(model.shapes), scale=0.05))
    layout = plan.trained_layout(model.shapes, 0)
    flat, grad = random_state(layout), torch.zeros(layout.num_values)
    model.bind(plan, flat, grad, 0)
    model.train(True)
    functional.cross_entropy(model(BATCH), LABELS).backward()
    parameters = list(model.peft_model.parameters())
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    requiring = [parameter for parameter in parameters if parameter.requires_grad]
    for tensors, buffer in ((grads, grad), (requiring, flat)):
        factors = [getattr(pair, part) for pair in layout.factors(buffer) for part in layout.parts]
        views = factors + layout.whole_tensors(buffer)
        assert {tensor.data_ptr() for tensor in tensors} == {view.data_ptr() for view in views}


class Kept:
    """Storages that autograd keeps, but for the model's own weights, and those of modules' outputs."""

    def __init__(self, model):
        self.weights = {value.untyped_storage().data_ptr() for value in model.peft_model.parameters()}
        self.storages = {}  # by address; holding them keeps an address from being used twice
        self.outputs = {}  # by module name

    def note(self, name):
        def hook(module, inputs, output):
            found = output if torch.is_tensor(output) else output[0]
            self.outputs[name] = found.untyped_storage()

        return hook

    def pack(self, value):
        storage = value.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.storages[storage.data_ptr()] = storage
        return value

    @property
    def num_bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


def kept_in_training(folder, target_modules):
    """Make a forward pass, and return what is kept of it."""
    model = build_model(folder, target_modules=target_modules)
    plan = make_plan(model)
    flat = random_state(plan.layout(model.shapes))
    model.bind(plan, flat, torch.zeros_like(flat))
    model.train(True)
    kept, encoder = Kept(model), model.peft_model.base_model.model.encoder
    kept.weights.add(flat.untyped_storage().data_ptr())
    for name, module in encoder.named_modules():
        module.register_forward_hook(kept.note(name))
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda value: value):
        kept.loss = functional.cross_entropy(model(BATCH), LABELS)
    return kept


def test_nothing_below_the_first_adapted_layer_is_kept(tiny_model_folder):
    above = [f"encoder.encoder.layer.1.{name}.dense" for name in ("intermediate", "output")]
    kept = kept_in_training(tiny_model_folder, above)
    first = "encoder.layer.1.attention.output"  # its output is the input of the first adapted layer
    below = {
        name: storage
        for name, storage in kept.outputs.items()
        if name and not name.startswith(("encoder.layer.1.intermediate", "encoder.layer.1.output"))
    }
    inside = {storage.data_ptr() for storage in below.values()} - {below[first].data_ptr()}
    assert len(inside) > 12
    assert below[first].data_ptr() in kept.storages
    assert not inside & set(kept.storages)


LAYER = "encoder.encoder.layer.1."
PARTS = ["attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense"]


@pytest.mark.parametrize(
    ("target_modules", "num_narrow", "num_wide"),
    [
        # A layer: its input, q, k, v, attention's output, twice the input of a LayerNorm, and the first
        # one's output; the wide input of the activation, and its output for the next A.
        ("all-linear", 2 * 8, 2 * 2),
        ([LAYER + part for part in PARTS], 8, 2),
        ([LAYER + "intermediate.dense"], 2, 1),
        ([LAYER + "output.dense"], 1, 1),
    ],
    ids=["both-layers", "last-layer", "its-mlp", "its-last-linear"],
)
def test_what_is_kept_is_what_gradients_need(tiny_model_folder, target_modules, num_narrow, num_wide):
    """3 texts of 5 tokens, hidden size 32, intermediate size 64."""
    kept = kept_in_training(tiny_model_folder, target_modules)
    sizes = [storage.nbytes() // 4 for storage in kept.storages.values()]
    assert sizes.count(3 * 5 * 32) == num_narrow
    assert sizes.count(3 * 5 * 64) == num_wide
    rest = [size for size in sizes if size not in (3 * 5 * 32, 3 * 5 * 64)]
    assert max(rest) <= 3 * 32  # the pooled features; scores, masks and what has the LoRA rank are smaller


# partial messages


class Wire:
    """A transport's buffer: each message overwrites the last one, and beside it all is nan."""

    def __init__(self, model):
        self.model = model
        self.buffer = torch.empty(model.shapes.full().num_values)

    def send(self, plan, seed):
        """Let the model receive a random message; return what its state was."""
        self.buffer.fill_(torch.nan)
        message = self.buffer[: plan.message_values(self.model.shapes)]
        message.copy_(random_values(len(message), seed))
        layout = plan.segments(self.model.shapes).state
        state = plan.split(self.model.shapes, message).state.clone()
        self.model.receive(plan, message)
        return layout.factors(state), layout.whole_tensors(state)


def parts_of(model, plan):
    layout = plan.layout(model.shapes)
    return layout.factors(model.state), layout.whole_tensors(model.state)


def assert_same(tensors, others):
    assert all(torch.equal(*pair) for pair in zip(tensors, others, strict=True))


def clones(factors, part):
    return [getattr(pair, part).clone() for pair in factors]


def clones_of_head(model, plan):
    return [tensor.clone() for tensor in parts_of(model, plan)[1]]


def first_round(model, scope, **fields):
    """Receive round 1, which holds no state; return plan, A and B."""
    plan = make_plan(model, scope=scope, **fields)
    model.receive(plan, torch.empty(0))
    factors = parts_of(model, plan)[0]
    return plan, clones(factors, "a"), clones(factors, "b")


@pytest.mark.parametrize(
    ("fields", "sent", "kept"),
    [
        ({"scope": "b"}, "b", "a"),
        ({"scope": "adapter", "keeps_b": True}, "a", "b"),
        ({"scope": "adapter", "keeps_b": True, "keeps_head": True}, "a", "b"),
    ],
    ids=["b-only", "own-b", "own-b-and-head"],
)
def test_what_is_never_sent_stays_as_drawn(model, fields, sent, kept):
    plan, a, b = first_round(model, **fields)
    first, wire, first_head = {"a": a, "b": b}, Wire(model), clones_of_head(model, plan)
    for round_num in (2, 3, 4):
        plan = replace(plan, round_num=round_num, sends_state=True, sends_parts=sent)
        factors, head = wire.send(plan, seed=round_num)
        wire.buffer.fill_(torch.nan)  # the state is the model's own: the next message may come
        got, got_head = parts_of(model, plan)
        assert_same(clones(got, sent), clones(factors, sent))
        assert_same(clones(got, kept), first[kept])
        assert_same(got_head, first_head if plan.keeps_head else head)
    assert all(part.any() for part in first["a"])
    assert not any(part.any() for part in first["b"])


def test_alternating_messages_keep_the_other_factor(model):
    plan, a, b = first_round(model, "b")
    expected, wire = {"a": a, "b": b}, Wire(model)
    for round_num in range(2, 7):
        trained, sent = ("a", "b") if round_num % 2 == 0 else ("b", "a")
        plan = replace(plan, round_num=round_num, scope=trained, sends_state=True, sends_parts=sent)
        factors, head = wire.send(plan, seed=round_num)
        expected[sent] = clones(factors, sent)
        got, got_head = parts_of(model, plan)
        assert_same(clones(got, "a"), expected["a"])
        assert_same(clones(got, "b"), expected["b"])
        assert_same(got_head, head)
    assert not torch.equal(expected["a"][0], a[0])


def test_a_whole_message_is_not_copied(model):
    plan = make_plan(model, sends_state=True)
    message = random_values(plan.message_values(model.shapes))
    model.receive(plan, message)
    assert model.state.data_ptr() == message.data_ptr()
    assert model.start(plan, 0, {}).data_ptr() == message.data_ptr()


def test_a_whole_message_is_copied_where_a_partial_one_may_follow(model):
    plan = make_plan(model, scope="b", sends_state=True, sends_parts="ab")
    message = random_values(plan.message_values(model.shapes))
    sent = message.clone()
    model.receive(plan, message)
    message.fill_(torch.nan)
    assert torch.equal(model.state, sent)


def test_a_restart_draws_all_factors_anew(model):
    plan, first, _ = first_round(model, "adapter")
    wire, drawn = Wire(model), [first]
    for round_num in (2, 3):
        plan = replace(plan, round_num=round_num, sends_state=True, sends_parts="")
        _, head = wire.send(plan, seed=round_num)
        assert len(wire.buffer[~wire.buffer.isnan()]) == 3 * 32 + 3  # the head alone is sent
        factors, got_head = parts_of(model, plan)
        assert_same(got_head, head)
        assert not any(part.b.any() for part in factors)
        bounds = [part.a.shape[1] ** -0.5 for part in factors]
        assert all(part.a.abs().max() <= most for part, most in zip(factors, bounds, strict=True))
        drawn.append(clones(factors, "a"))
    assert not any(torch.equal(*pair) for one in (0, 1) for pair in zip(drawn[one], drawn[2], strict=True))
    other = make_plan(model, round_num=3)
    assert_same(clones(other.layout(model.shapes).factors(model.initial_state(other)), "a"), drawn[2])


# what a client starts from, and what it trains


def test_a_client_of_a_lower_rank_starts_from_the_leading_directions(tiny_model_folder, model):
    plan = make_plan(model, 3, client_ranks=(1, 2, 4), workers=(0, 0, 0), sends_state=True)
    layout = plan.layout(model.shapes)
    model.receive(plan, random_state(layout))
    factors, head = parts_of(model, plan)
    for client_id, lora_rank in ((0, 1), (1, 2), (2, 3)):
        flat = model.start(plan, client_id, {})
        leading = [Factors(part.a[:lora_rank], part.b[:, :lora_rank]) for part in factors]
        assert torch.equal(flat, flatten(leading, head))
        expected = merged_logits(tiny_model_folder, model, leading, head)
        assert torch.allclose(bound_logits(model, plan, flat, client_id), expected, atol=1e-4)
    assert model.start(plan, 2, {}).data_ptr() == model.state.data_ptr()
    whole = merged_logits(tiny_model_folder, model, factors, head)
    assert torch.allclose(bound_logits(model, plan, model.state), whole, atol=1e-4)


@pytest.mark.parametrize("keeps_head", [False, True])
def test_a_client_trains_the_shared_a_with_what_is_its_own(tiny_model_folder, model, keeps_head):
    fields = {"keeps_b": True, "keeps_head": keeps_head, "workers": (0, 0)}
    first_round(model, "adapter", **fields)
    plan = make_plan(model, round_num=2, sends_state=True, sends_parts="a", **fields)
    Wire(model).send(plan, seed=1)
    factors, head = parts_of(model, plan)
    num_b, num_head = 4 * sum(module.out_features for module in model.shapes.modules), 3 * 32 + 3
    kept = random_values(num_b + num_head * keeps_head, 2)
    own_b = AdapterLayout(model.shapes.modules, (4,) * 12, (), "b").factors(kept[:num_b])
    own_head = [kept[num_b:-3].view(3, 32), kept[-3:]] if keeps_head else head
    mine = [Factors(a, b) for (a, _), (_, b) in zip(factors, own_b, strict=True)]
    flat = model.start(plan, 1, {"personal": kept})
    assert torch.equal(flat, flatten(mine, own_head))
    expected = merged_logits(tiny_model_folder, model, mine, own_head)
    assert torch.allclose(bound_logits(model, plan, flat, 1), expected, atol=1e-4)
    # Before its first round a client has no B: it is the base model with the shared head.
    zero = [Factors(part.a, torch.zeros_like(part.b)) for part in factors]
    assert torch.equal(model.start(plan, 0, {}), flatten(zero, head))


@pytest.mark.parametrize(("scope", "held", "fixed"), [("b", ["b"], "a"), ("a", ["a"], "b")])
def test_only_what_is_trained_gets_gradients(model, scope, held, fixed):
    plan = make_plan(model, 3, scope=scope)
    layout = plan.layout(model.shapes)
    model.state = random_state(layout)
    flat = model.start(plan, 0, {})
    own = model.shapes.adapter([3] * 12, scope)
    assert len(flat) == own.num_values < layout.num_values
    grad = torch.zeros_like(flat)
    model.bind(plan, flat, grad, client_id=0)
    functional.cross_entropy(model(BATCH), LABELS).backward()
    names = [name for name, value in model.peft_model.named_parameters() if value.requires_grad]
    assert {name.split(".")[-3][-1].lower() for name in names if ".lora_" in name} == set(held)
    assert len(names) == 12 + 2
    assert {name for name, value in model.peft_model.named_parameters() if value.grad is not None} == set(
        names
    )
    assert all(getattr(part, scope).any() for part in own.factors(grad))
    # As whole model: the same gradients, and those of the fixed factor beside them.
    both = torch.zeros_like(model.state)
    model.bind(plan, model.state, both)
    functional.cross_entropy(model(BATCH), LABELS).backward()
    expected = [getattr(part, scope) for part in layout.factors(both)]
    got = [getattr(part, scope) for part in own.factors(grad)]
    assert all(torch.allclose(*pair, atol=1e-6) for pair in zip(got, expected, strict=True))
    assert all(getattr(part, fixed).any() for part in layout.factors(both))


def test_scopes_may_follow_each_other_in_any_order(model):
    logits = {}
    for scope in ("b", "a", "adapter", "a", "full", "b", "adapter", "full", "a"):
        plan = make_plan(model, scope=scope)
        # The whole model starts as it is: the adapters after it have the base that they had before.
        is_full = scope == "full"
        model.state = model.initial_state(plan) if is_full else random_state(plan.layout(model.shapes))
        flat = model.start(plan, 0, {}).clone()
        grad = torch.zeros_like(flat)
        model.bind(plan, flat, grad, client_id=0)
        model.train(False)
        functional.cross_entropy(output := model(BATCH), LABELS).backward()
        assert torch.count_nonzero(grad) > 0.8 * len(grad) or is_full  # of 200 tokens few are in the batch
        before = logits.setdefault(scope, (output.detach(), grad))
        assert torch.equal(output.detach(), before[0])
        assert torch.equal(grad, before[1])
    assert torch.equal(logits["a"][0], logits["b"][0])  # one state, whatever is trained
    assert torch.equal(logits["a"][0], logits["adapter"][0])


# control variates over cuts


def test_kept_variates_go_through_every_later_cut(model):
    def cut(round_num, before, after, seed):
        plan = make_plan(
            model,
            after,
            round_num=round_num,
            mapped_ranks=(before,) * 12,
            has_variates=True,
            sends_state=True,
        )
        message = random_values(plan.message_values(model.shapes), seed)
        model.receive(plan, message)
        sides = plan.segments(model.shapes).maps.whole_tensors(plan.split(model.shapes, message).maps.clone())
        message.fill_(torch.nan)  # the maps are kept, the buffer is not
        return list(zip(sides[::2], sides[1::2], strict=True))

    def through(layout, flat, maps):
        """The chain rule: dL/dA' = b^T dL/dA, and dL/dB' = dL/dB a^T."""
        pairs = zip(layout.factors(flat), maps, strict=True)
        factors = [Factors(b.mT @ part.a, part.b @ a.mT) for part, (a, b) in pairs]
        return flatten(factors, layout.whole_tensors(flat))

    first, second = cut(3, 4, 3, seed=1), cut(5, 3, 1, seed=2)
    assert [tuple(side.shape) for side in (*first[0], *second[0])] == [(3, 4), (4, 3), (1, 3), (3, 1)]
    oldest = random_state(model.shapes.adapter([4] * 12))
    between = through(model.shapes.adapter([4] * 12), oldest, first)
    newest = through(model.shapes.adapter([3] * 12), between, second)
    assert torch.allclose(model.carried(oldest, 2), newest, atol=1e-5)
    assert torch.allclose(model.carried(between, 3), newest, atol=1e-5)  # of the round that the cut opened
    assert torch.allclose(model.carried(between, 4), newest, atol=1e-5)
    assert torch.equal(model.carried(newest, 5), newest)


# freeze


def received_logits(model, plan, message):
    model.receive(plan, message)
    return bound_logits(model, plan, model.state)


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
    expected = bound_logits(uncut, whole, flatten(joined, head))
    got = received_logits(model, plan, message)
    assert (got - expected).abs().max() <= tolerance
    assert (bound_logits(model, plan, model.state) - expected).abs().max() <= tolerance
    base = bound_logits(uncut, plan, model.state)
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
    state = plan.split(model.shapes, message).state
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
    kept = model.shapes.frozen(first.frozen_ranks).factors(first.split(model.shapes, message).frozen)
    both = [join(*pair) for pair in zip(joined, kept, strict=True)]
    got = received_logits(model, second, later)
    expected = bound_logits(uncut, make_plan(uncut, [part.lora_rank for part in both]), flatten(both, head))
    assert (got - expected).abs().max() <= tolerance


# what is added to the base weights


def test_whole_matrices_are_added_like_their_factors(tiny_model_folder):
    whole, factored = (build_model(tiny_model_folder) for _ in range(2))
    before = {name: value.clone() for name, value in whole.adapted_weights().items()}
    ranks = (3, 0, 2, DENSE) * 3
    dense_plan = make_plan(whole, 2, frozen_ranks=ranks, sends_state=True)
    plan = replace(
        dense_plan, frozen_ranks=tuple(5 if lora_rank == DENSE else lora_rank for lora_rank in ranks)
    )
    message = frozen_message(factored, plan)[0]
    parts = plan.split(factored.shapes, message)
    kept = factored.shapes.frozen(plan.frozen_ranks).factors(parts.frozen)
    sent = torch.empty(dense_plan.message_values(whole.shapes))
    target = dense_plan.split(whole.shapes, sent)
    target.state.copy_(parts.state)
    layout = whole.shapes.frozen(ranks)
    for to, part, lora_rank in zip(layout.factors(target.frozen), kept, ranks, strict=True):
        if lora_rank != DENSE:
            to.a.copy_(part.a)
            to.b.copy_(part.b)
    products = [part.b @ part.a for part, lora_rank in zip(kept, ranks, strict=True) if lora_rank == DENSE]
    for matrix, product in zip(layout.whole_tensors(target.frozen), products, strict=True):
        matrix.copy_(product)
    assert len(products) == 3
    logits = received_logits(factored, plan, message)
    assert (received_logits(whole, dense_plan, sent) - logits).abs().max() <= 1e-5
    sent.fill_(torch.nan)
    added = zip(before.items(), whole.adapted_weights().values(), kept, strict=True)
    for (name, old), new, part in added:
        assert torch.allclose(new, old + 8.0 / 4 * part.b @ part.a, atol=1e-5), name
        assert torch.equal(new, old) == (part.lora_rank == 0)


def test_a_stack_goes_into_the_base_round_after_round(tiny_model_folder, model):
    """FLoRA: [w_1 B_1 ... w_K B_K] and [A_1; ...; A_K] are frozen, and the adapter starts anew."""
    sums = [
        Factors(torch.zeros(0, m.in_features), torch.zeros(m.out_features, 0)) for m in model.shapes.modules
    ]
    for round_num in (2, 3):
        clients = [model.shapes.adapter([lora_rank] * 12) for lora_rank in (2, 4)]
        trained = [part.factors(random_state(part, 10 * round_num + i)) for i, part in enumerate(clients)]
        weighted = [
            join(Factors(one.a, 0.25 * one.b), Factors(two.a, 0.75 * two.b))
            for one, two in zip(*trained, strict=True)
        ]
        sums = [join(*pair) for pair in zip(sums, weighted, strict=True)]
        head = [random_values(96, round_num).view(3, 32), random_values(3, round_num)]
        plan = make_plan(model, round_num=round_num, frozen_ranks=(6,) * 12, sends_state=True, sends_parts="")
        logits = received_logits(model, plan, flatten(weighted, head))
        assert torch.allclose(logits, merged_logits(tiny_model_folder, model, sums, head), atol=1e-4)
    assert set(model.adapted_weights()) == {f"{module.name}.weight" for module in model.shapes.modules}


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
    expected = bound_logits(model, full, flat)
    plan = make_plan(model, round_num=2, sends_base=True, sends_state=True, sends_parts="")
    message = flat.clone()  # every weight, and no factor: those are derived
    assert plan.message_values(model.shapes) == len(message)
    assert (received_logits(model, plan, message) - expected).abs().max() <= 1e-5
    assert not any(parameter.requires_grad for parameter in model._body)
    head = flat[model.shapes.base().num_values :]
    assert torch.equal(model.state, initial_adapter(model.shapes, (4,) * 12, head, 0, round_num=2))
    assert all(part.a.any() for part in plan.layout(model.shapes).factors(model.state))
    message.fill_(torch.nan)  # base and state are the model's own
    assert (bound_logits(model, plan, model.state) - expected).abs().max() <= 1e-5


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
    assert torch.allclose(bound_logits(model, plan, state), plain_logits(base.module), atol=1e-6)


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


@pytest.mark.parametrize("lora_ranks", [4, 1, [1, 2, 3, 4] * 3])
def test_rslora_scales_by_the_root_of_rank_max_and_survives_cut_and_export(
    tiny_model_folder, tmp_path, lora_ranks
):
    model = build_model(tiny_model_folder, use_rslora=True)
    assert model.scaling == 8.0 / 2
    plan = make_plan(model, lora_ranks)
    layout = plan.layout(model.shapes)
    flat = random_state(layout)
    logits = bound_logits(model, plan, flat)
    base = build_base(str(tiny_model_folder), num_labels=3, dropout=0.0).module
    with torch.no_grad():
        for module, part in zip(model.shapes.modules, layout.factors(flat), strict=True):
            base.get_submodule(module.name).weight += 4.0 * part.b @ part.a
        for parameter, value in zip(base.classifier.parameters(), layout.whole_tensors(flat), strict=True):
            parameter.copy_(value)
    assert torch.allclose(logits, plain_logits(base), atol=1e-4)
    write_adapter(tmp_path, *model.export(layout.factors(flat), layout.whole_tensors(flat)))
    fresh = build_base(str(tiny_model_folder), num_labels=3, dropout=0.0, seed=9).module
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.allclose(plain_logits(loaded), logits, atol=1e-4)
