"""Instruction tuning: what the loss goes by, packing, and what is measured."""

import json
import math

import numpy as np
import pytest
import torch
from language_models import TEMPLATE, make_language_model
from support import WORDS, make_plan, random_values

from mpifedlora.errors import ConfigError, DataError
from mpifedlora.training.causal_lm import CausalLMTask, causal_lm, check_packing
from mpifedlora.training.models import FederatedModel
from mpifedlora.training.task import IGNORED, EncodedExamples, TaskSetup, load_tokenizer

PROMPTS = ("ba da", "ka", "bas bef ka da", "da")
RESPONSES = ("bef ba", "da ka bas", "ba", "ka ka ka ba")
COLUMNS = {"prompt": PROMPTS, "response": RESPONSES}
LABELS = np.zeros(4, np.int64)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_language_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def templated(tmp_path_factory):
    return make_language_model(tmp_path_factory.mktemp("templated"), template=TEMPLATE)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    return make_language_model(
        tmp_path_factory.mktemp("gpt2"), "gpt2", attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
    )


def build(folder, max_length=24, **options):
    base, task = causal_lm(TaskSetup(str(folder), (), max_length, **options))
    model = FederatedModel(base, rank_max=4, alpha=8.0)
    plan = make_plan(model)
    model.state = model.initial_state(plan) + random_values(plan.layout(model.shapes).num_values, 1, 0.1)
    model.bind(plan, model.state)
    model.train(False)
    return model, task


def shown(task, examples, index):
    """Return an example's tokens, those of responses in brackets."""
    start, length = examples.starts[index], examples.lengths[index]
    marked = examples.tokens[start : start + length].tolist()
    words = task.tokenizer.convert_ids_to_tokens([~token if token < 0 else token for token in marked])
    return " ".join(f"[{word}]" if token < 0 else word for word, token in zip(words, marked, strict=True))


def test_plain_prompts_and_responses(llama):
    task = CausalLMTask(load_tokenizer(str(llama)), 24)
    assert not task.uses_template
    examples = task.encode({"prompt": ("ba da", ""), "response": ("ka </s>", "")}, LABELS[:2])
    assert shown(task, examples, 0) == "ba da [ka] [</s>] [</s>]"
    assert shown(task, examples, 1) == "[</s>] [<pad>]"  # without any text there is a target too


def test_the_chat_template_is_cut_where_responses_begin_and_end(templated):
    task = CausalLMTask(load_tokenizer(str(templated)), 24)
    examples = task.encode({"prompt": ("ba da",), "response": ("ka bef",)}, LABELS[:1])
    assert shown(task, examples, 0) == "<user> ba da </s> <assistant> [ka] [bef] [</s>]"
    plain = CausalLMTask(task.tokenizer, 24, template="plain")
    assert "<user>" not in shown(plain, plain.encode(COLUMNS, LABELS), 0)


def test_every_answer_of_a_conversation_is_learned(templated):
    task = CausalLMTask(load_tokenizer(str(templated)), 24)
    turns = [("user", "ba"), ("assistant", "ka"), ("user", "da"), ("assistant", "bef")]
    talk = json.dumps([{"role": role, "content": content} for role, content in turns])
    expected = "<user> ba </s> <assistant> [ka] [</s>] <user> da </s> <assistant> [bef] [</s>]"
    assert shown(task, task.encode({"messages": (talk,)}, LABELS[:1]), 0) == expected


def test_a_template_that_rewrites_what_it_wrote_is_refused(templated):
    tokenizer = load_tokenizer(str(templated))
    tokenizer.chat_template = "{{ messages | length }} {% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r'set task\.template = "plain"'):
        CausalLMTask(tokenizer, 24).encode(COLUMNS, LABELS)


def test_a_long_example_loses_its_beginning(llama):
    task = CausalLMTask(load_tokenizer(str(llama)), 6)
    examples = task.encode({"prompt": (" ".join(WORDS[:30]),), "response": ("ka da",)}, LABELS[:1])
    assert examples.lengths.tolist() == [6]
    assert shown(task, examples, 0).split()[0] in WORDS[20:30]


def test_targets_are_the_next_tokens_of_responses(llama):
    task = CausalLMTask(load_tokenizer(str(llama)), 24)
    examples = task.encode(COLUMNS, LABELS)
    inputs, targets = task.collate(examples, np.array([2, 1]))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert ids.shape == targets.shape == mask.shape
    for row, index in enumerate([2, 1]):
        start, length = examples.starts[index], examples.lengths[index]
        marked = examples.tokens[start : start + length]
        wanted = [~token if token < 0 else IGNORED for token in marked[1:].tolist()]
        assert targets[row, : length - 1].tolist() == wanted
        assert (targets[row, length - 1 :] == IGNORED).all()
        assert mask[row].sum() == length


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_and_padded_batches_have_the_same_loss_and_gradient(request, name):
    folder = request.getfixturevalue(name)
    found = {}
    for packing in (False, True):
        model, task = build(folder, max_length=14, packing=packing)
        examples = task.encode(COLUMNS, LABELS)
        inputs, targets = task.collate(examples, np.arange(4), is_training=True)
        plan, flat = make_plan(model), model.state.clone()
        grad = torch.zeros_like(flat)
        model.bind(plan, flat, grad)
        loss = task.loss(model(inputs), targets)
        loss.backward()
        found[packing] = inputs["input_ids"].shape[0], (targets != IGNORED).sum(), loss.item(), grad
    assert (found[False][0], found[True][0]) == (4, 2)
    assert found[False][1] == found[True][1]
    assert found[True][2] == pytest.approx(found[False][2], rel=1e-5)
    torch.testing.assert_close(found[True][3], found[False][3], rtol=1e-3, atol=1e-6)


def test_a_packed_example_sees_only_itself(llama):
    model, task = build(llama, packing=True)
    logits = []
    for other in ("ba da", "ka bas"):
        examples = task.encode({"prompt": (other, "ka"), "response": ("bef", "da ba")}, LABELS[:2])
        inputs, _ = task.collate(examples, np.arange(2), is_training=True)
        with torch.no_grad():
            logits.append(model(inputs)[0])
    first = int(examples.lengths[0])
    assert torch.equal(logits[0][first:], logits[1][first:])
    assert not torch.allclose(logits[0][:first], logits[1][:first])


@pytest.mark.parametrize("kind", ["bloom", "opt"])
def test_models_that_cannot_tell_rows_apart_are_refused(tmp_path, kind):
    sizes = {"n_layer": 1, "n_head": 2} if kind == "bloom" else {"ffn_dim": 16, "word_embed_proj_dim": 16}
    folder = make_language_model(tmp_path, kind, **sizes)
    build(folder)
    try:
        build(folder, packing=True)
    except ConfigError as error:
        assert "set task.packing = false" in str(error)  # noqa: PT017
    else:
        assert kind == "opt"  # OPT takes both by now


def test_a_sliding_window_shorter_than_the_rows_is_refused(tmp_path):
    folder = make_language_model(tmp_path, "mistral", sliding_window=8, num_key_value_heads=2)
    base, task = causal_lm(TaskSetup(str(folder), (), 8, packing=True))
    task.max_length = 9
    with pytest.raises(ConfigError, match="a sliding window of 8 tokens"):
        check_packing(base, task)


def test_a_response_counts_as_right_if_and_only_if_greedy_generation_gives_it(llama):
    model, task = build(llama)
    prompt = torch.tensor([[7, 9, 11]])
    greedy = model.peft_model.base_model.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        use_cache=True,
    )[0, 3:].tolist()
    wrong = [*greedy[:-1], (greedy[-1] + 1) % 50]
    for response, is_right in ((greedy, True), (wrong, False)):
        tokens = np.array([7, 9, 11, *(~token for token in response)], np.int32)
        examples = EncodedExamples(tokens, np.array([0]), np.array([len(tokens)]), {"labels": LABELS[:1]})
        with torch.no_grad():
            statistics = task.measure(model, *task.collate(examples, np.array([0])))
        assert statistics[0, 1] == 5
        assert (task.metrics(statistics.numpy(), examples).accuracy == 1.0) == is_right


def test_the_perplexity_is_weighted_by_tokens(llama):
    model, task = build(llama)
    examples = task.encode(COLUMNS, LABELS)
    with torch.no_grad():
        one_by_one = [task.collate(examples, np.array([index])) for index in range(4)]
        losses = [task.loss(model(inputs), targets).item() for inputs, targets in one_by_one]
        counts = [int((targets != IGNORED).sum()) for _, targets in one_by_one]
        statistics = task.measure(model, *task.collate(examples, np.arange(4)))
    assert len(set(counts)) > 1
    metrics = task.metrics(statistics.numpy(), examples)
    assert metrics.loss == pytest.approx(np.average(losses, weights=counts), rel=1e-4)
    assert metrics.others["perplexity"] == pytest.approx(math.exp(metrics.loss))
    assert 0 <= metrics.others["token_accuracy"] <= 1


def test_gpt2s_layers_are_adapted_as_linear_layers_and_go_back(gpt2):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from mpifedlora.training.base import build_base, linears_to_conv1ds

    stock = AutoModelForCausalLM.from_pretrained(gpt2).eval()
    model, _ = build(gpt2)
    names = {module.name.rpartition(".")[2] for module in model.shapes.modules}
    assert names == {"c_attn", "c_proj", "c_fc"}
    ids = torch.tensor([[7, 9, 11]])
    base = build_base(str(gpt2), num_labels=0, head="causal-lm").module.eval()
    with torch.no_grad():
        wanted = stock(ids).logits
        torch.testing.assert_close(base(ids).logits, wanted, rtol=1e-4, atol=1e-5)
        linears_to_conv1ds(base)
        assert torch.equal(base(ids).logits, wanted)
    assert stock.state_dict().keys() == base.state_dict().keys()
    plan = make_plan(model)
    layout = plan.layout(model.shapes)
    settings, tensors = model.export(layout.factors(model.state), [])
    with torch.no_grad():
        federated = model({"input_ids": ids})
    from mpifedlora.io.adapter_files import write_adapter

    folder = gpt2.parent / "adapter"
    write_adapter(folder, settings, tensors)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(stock, folder).eval()(input_ids=ids).logits
    torch.testing.assert_close(loaded, federated, rtol=1e-4, atol=1e-5)
