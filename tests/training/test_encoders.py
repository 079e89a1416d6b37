"""Sequence classification with any encoder: the head that fits, adapters, and what is trained."""

import pytest
import torch
from language_models import VOCABULARY, make_tokenizer
from support import make_batch, make_plan, random_values
from transformers import AutoConfig, AutoModel

from mpifedlora.core.tasks import check_length
from mpifedlora.errors import ConfigError
from mpifedlora.io.model_files import check_positions
from mpifedlora.runtime.setup import check_quantization
from mpifedlora.training.base import build_base
from mpifedlora.training.models import FederatedModel

WIDE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = {
    "bert": WIDE,
    "roberta": WIDE,
    "distilbert": {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2},
    "deberta-v2": WIDE
    | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "pooler_hidden_size": 16},
    "modernbert": WIDE | {"global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2},
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    config = AutoConfig.for_model(
        request.param,
        vocab_size=max(VOCABULARY, 200),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **KINDS[request.param],
    )
    torch.manual_seed(5)
    AutoModel.from_config(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.mark.parametrize("head", ["stock", "mean_pooling"])
def test_a_step_trains_adapter_and_head_alone(folder, head):
    base = build_base(str(folder), num_labels=3, head=head, dropout=0.0)
    assert base.head_names
    model = FederatedModel(base, rank_max=2, alpha=4.0)
    assert len(model.shapes.modules) >= 8  # four or more in each of two layers
    plan = make_plan(model, 2)
    flat = model.initial_state(plan)
    flat += random_values(len(flat), 1, 0.05)
    grad = torch.zeros_like(flat)
    body = [parameter.clone() for parameter in model._body]
    model.bind(plan, flat, grad)
    model.train(True)
    first = model(make_batch())
    assert first.shape == (3, 3)
    assert first.dtype == torch.float32
    torch.nn.functional.cross_entropy(first, torch.tensor([0, 1, 2])).backward()
    layout = plan.layout(model.shapes)
    for factors in layout.factors(grad):
        assert factors.a.abs().max() > 0
        assert factors.b.abs().max() > 0
    flat.sub_(grad, alpha=0.1)
    model.train(False)
    with torch.no_grad():
        assert not torch.allclose(model(make_batch()), first)
    assert all(torch.equal(old, new) for old, new in zip(body, model._body, strict=True))


@pytest.mark.parametrize("head", ["stock", "mean_pooling"])
def test_padding_does_not_change_the_logits(folder, head):
    module = build_base(str(folder), num_labels=3, head=head, dropout=0.0).module.eval()
    batch = make_batch()
    alone = {name: value[2:, :3] for name, value in batch.items()}
    with torch.no_grad():
        torch.testing.assert_close(module(**batch).logits[2:], module(**alone).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"model_type": "bert", "max_position_embeddings": 512}, 512),
        ({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "gpt2", "n_positions": 1024}, 1024),
        ({"model_type": "deberta-v2", "max_position_embeddings": 512, "position_biased_input": False}, None),
        ({"model_type": "bloom"}, None),
    ],
)
def test_examples_are_no_longer_than_the_models_positions(config, longest):
    check_length(config, longest or 100_000, "m")
    if longest is not None:
        with pytest.raises(ConfigError, match=rf"got {longest + 1} and {longest} \(m\); lower"):
            check_length(config, longest + 1, "m")


def test_a_folder_tells_its_positions_before_anything_is_loaded(tiny_model_folder, tmp_path):
    check_positions(str(tiny_model_folder), 64)
    with pytest.raises(ConfigError, match="got 65 and 64"):
        check_positions(str(tiny_model_folder), 65)
    (tmp_path / "config.json").write_text("{")
    check_positions(str(tmp_path), 65)
    check_positions("some/hub-name", 65)


def test_quantised_weights_need_a_gpu_everywhere():
    check_quantization("none", "cpu")
    with pytest.raises(ConfigError, match="needs a GPU for every process, the server too, got cpu"):
        check_quantization("nf4", "cpu")
