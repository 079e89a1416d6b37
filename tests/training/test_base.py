import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from support import build_model, make_plan, random_values
from transformers import BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from mpifedlora.errors import AdapterError
from mpifedlora.training.base import FEATURE_SCALE, MeanPoolingClassifier, build_base, load_weights

SHORT, LONG = [2, 9, 30, 3], [2, 44, 7, 91, 150, 23, 3]


@pytest.fixture
def stock_folder(tiny_model_folder, tmp_path):
    """The same weights without the pooling file."""
    folder = tmp_path / "stock"
    shutil.copytree(tiny_model_folder, folder, ignore=shutil.ignore_patterns("1_Pooling"))
    return folder


def build(folder, **options):
    return build_base(str(folder), num_labels=3, **options)


def logits_of(module, rows):
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        return module.eval()(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("head", ["mean_pooling", "stock"])
def test_padding_does_not_change_the_logits(tiny_model_folder, head):
    module = build(tiny_model_folder, head=head).module
    alone = logits_of(module, [SHORT])
    assert alone.abs().max() > 0.01
    assert torch.allclose(logits_of(module, [SHORT, LONG])[0], alone[0], atol=1e-5)


def test_mean_pooling_is_the_mean_of_the_token_features(tiny_model_folder):
    module = build(tiny_model_folder).module.eval()
    with torch.no_grad():
        hidden = module.encoder(input_ids=torch.tensor([SHORT])).last_hidden_state[0]
        expected = module.classifier(FEATURE_SCALE * hidden.mean(dim=0))
    assert torch.allclose(logits_of(module, [SHORT, LONG])[0], expected, atol=1e-5)


def test_auto_means_mean_pooling_where_the_folder_asks_for_it(tiny_model_folder, stock_folder):
    pooled, stock = build(tiny_model_folder), build(stock_folder)
    assert isinstance(pooled.module, MeanPoolingClassifier)
    assert isinstance(stock.module, BertForSequenceClassification)
    assert pooled.head_names == stock.head_names == ("classifier",)
    assert isinstance(build(stock_folder, head="mean_pooling").module, MeanPoolingClassifier)


def test_auto_heeds_a_pooling_file_that_asks_for_something_else(stock_folder):
    (stock_folder / "1_Pooling").mkdir()
    (stock_folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": false}')
    assert isinstance(build(stock_folder).module, BertForSequenceClassification)


def test_what_a_stock_checkpoint_lacks_is_part_of_the_head(tiny_model_folder, tmp_path):
    build(tiny_model_folder).module.encoder.save_pretrained(tmp_path)  # without the pooler
    assert build(tmp_path).head_names == ("bert.pooler.dense", "classifier")


@pytest.mark.parametrize("num_labels", [3, 5])
def test_a_trained_head_is_kept_where_it_fits(tiny_model_folder, tmp_path, num_labels):
    trained = build(tiny_model_folder, head="stock", seed=5).module
    trained.save_pretrained(tmp_path)
    again = build_base(str(tmp_path), num_labels=num_labels, head="stock")
    assert again.head_names == ("classifier",)
    assert torch.equal(again.module.classifier.weight, trained.classifier.weight) == (num_labels == 3)


def test_a_trained_head_may_have_any_name(tmp_path):
    sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_labels=3, pad_token_id=0)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    assert build(tmp_path).head_names == ("score",)


@pytest.mark.parametrize("head", ["mean_pooling", "stock"])
def test_the_head_depends_on_the_seed_alone(tiny_model_folder, head):
    weights = []
    for seed in (0, 0, 1):
        torch.rand(3)
        weights.append(build(tiny_model_folder, head=head, seed=seed).module.classifier.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_head_is_float32_on_any_base(tiny_model_folder):
    module = build(tiny_model_folder, dtype="bfloat16").module
    assert module.encoder.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    assert logits_of(module, [SHORT]).dtype == torch.float32
    expected = logits_of(build(tiny_model_folder).module, [SHORT])
    assert torch.allclose(logits_of(module, [SHORT]), expected, atol=0.3)


@pytest.mark.parametrize("head", ["mean_pooling", "stock"])
@pytest.mark.parametrize(("dropout", "expected"), [(0.3, 0.3), (0.0, 0.0), (None, 0.1)])
def test_dropout_reaches_all_dropout_layers(tiny_model_folder, head, dropout, expected):
    module = build(tiny_model_folder, head=head, dropout=dropout).module
    layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Dropout)]
    assert len(layers) >= 7
    assert {layer.p for layer in layers} == {expected}


def test_without_dropout_training_mode_changes_nothing(tiny_model_folder):
    module = build(tiny_model_folder, dropout=0.0).module
    expected = logits_of(module, [LONG])
    with torch.no_grad():
        got = module.train()(input_ids=torch.tensor([LONG]), attention_mask=torch.ones(1, len(LONG))).logits
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("head", ["auto", "mean_pooling", "stock"])
def test_a_missing_model_is_an_adapter_error(tmp_path, head):
    with pytest.raises(AdapterError, match=r"model\.name must be a pre-trained model.*nowhere"):
        build(tmp_path / "nowhere", head=head)


@pytest.mark.parametrize("content", [None, b"no weights at all"])
def test_missing_or_damaged_weights_are_an_adapter_error(stock_folder, content):
    (stock_folder / "model.safetensors").unlink()
    if content is not None:
        (stock_folder / "model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError, match=r"model\.name must be a pre-trained model"):
        build(stock_folder)


def test_weights_are_loaded_by_name(tiny_model_folder):
    base = build(tiny_model_folder)
    weights = {name: torch.randn_like(value) for name, value in base.module.named_parameters()}
    module = load_weights(base, weights)
    assert not module.training
    assert all(torch.equal(value, weights[name]) for name, value in module.named_parameters())


def test_trained_weights_are_not_rounded_to_the_base_dtype(tiny_model_folder):
    base = build(tiny_model_folder, dtype="bfloat16")
    name = "encoder.embeddings.word_embeddings.weight"
    value = torch.randn_like(base.module.get_parameter(name), dtype=torch.float32)
    assert torch.equal(load_weights(base, {name: value}).get_parameter(name), value)


@pytest.mark.parametrize(("name", "shape"), [("classifier.weight", (4, 32)), ("classifier.weigth", (3, 32))])
def test_weights_that_do_not_fit_are_an_adapter_error(tiny_model_folder, name, shape):
    with pytest.raises(AdapterError, match=rf"base weights must fit the model, got {name} \({shape[0]}, 32"):
        load_weights(build(tiny_model_folder), {name: torch.zeros(shape)})


# the weights' file, mapped


def mapped_names(module, folder):
    """Names of the parameters that lie in private maps of weight files in a folder."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    maps = [line for line in lines if line[-1].startswith(str(folder)) and line[-1].endswith(".safetensors")]
    assert {line[1] for line in maps} <= {"rw-p"}
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in maps]
    return {
        name
        for name, value in module.named_parameters()
        if any(start <= value.data_ptr() < end for start, end in ranges)
    }


def names_without_head(module):
    return {name for name, _ in module.named_parameters() if not name.startswith("classifier.")}


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="maps are looked up as Linux shows them")


@on_linux
@pytest.mark.parametrize("head", ["mean_pooling", "stock"])
def test_the_base_weights_are_a_map_of_their_file(tiny_model_folder, head):
    module = build(tiny_model_folder, head=head).module
    assert mapped_names(module, tiny_model_folder) == names_without_head(module)


@on_linux
@pytest.mark.parametrize(("dtype", "shard_size"), [("float32", "20KB"), ("bfloat16", "5GB")])
def test_shards_and_other_dtypes_are_mapped_too(tiny_model_folder, tmp_path, dtype, shard_size):
    encoder = build(tiny_model_folder, dtype=dtype).module.encoder
    encoder.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    module = build(tmp_path, head="mean_pooling", dtype=dtype).module
    assert mapped_names(module, tmp_path) == names_without_head(module)
    expected = dict(encoder.named_parameters())
    assert all(torch.equal(value, expected[name]) for name, value in module.encoder.named_parameters())


@on_linux
def test_a_model_with_lora_layers_still_holds_no_copy_of_its_base(tiny_model_folder):
    module = build_model(tiny_model_folder).peft_model
    own = re.compile(r"lora_[AB]|\.classifier\.")
    base = {name for name, _ in module.named_parameters() if not own.search(name)}
    assert len(base) > 30
    assert mapped_names(module, tiny_model_folder) == base


def test_adding_to_the_base_weights_changes_one_process_and_never_the_file(tiny_model_folder):
    file = tiny_model_folder / "model.safetensors"
    before = file.read_bytes()
    model, twin = build_model(tiny_model_folder), build_model(tiny_model_folder)
    expected = twin.adapted_weights()
    plan = make_plan(model, frozen_ranks=(2,) * 12)
    model.receive(plan, random_values(plan.message_values(model.shapes)))
    assert not any(torch.equal(value, expected[name]) for name, value in model.adapted_weights().items())
    fresh = build_model(tiny_model_folder).adapted_weights()
    assert all(torch.equal(value, fresh[name]) for name, value in twin.adapted_weights().items())
    assert file.read_bytes() == before
