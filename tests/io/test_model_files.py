import json

import pytest
import torch
from safetensors.torch import save_file
from support import build_model

from mpifedlora.core.config import RunConfig
from mpifedlora.core.memory_estimate import Matrix, estimate_memory
from mpifedlora.io.model_files import read_model_sizes

# The tiny model has 2 layers, hidden size 32, intermediate size 64.
ATTENTION, UP, DOWN = Matrix(32, 32), Matrix(64, 32), Matrix(32, 64)


def test_sizes_are_those_of_the_loaded_model(tiny_model_folder):
    sizes = read_model_sizes(str(tiny_model_folder), "all-linear")
    shapes = build_model(tiny_model_folder).shapes
    assert sorted(sizes.adapted) == sorted(Matrix(*module[1:]) for module in shapes.modules)
    assert sizes.adapter_values(4) == shapes.adapter((4,) * len(shapes.modules)).factor_values
    pooler = 32 * 32 + 32  # of the file; mean pooling leaves it out
    assert sizes.base_values == shapes.base().num_values + pooler
    assert (sizes.num_layers, sizes.hidden_size, sizes.num_heads, sizes.max_tokens) == (2, 32, 2, 64)


def test_targets_are_endings_or_an_expression(tiny_model_folder):
    folder = str(tiny_model_folder)
    assert read_model_sizes(folder, ["query", "value"]).adapted == (ATTENTION,) * 4
    assert read_model_sizes(folder, ["intermediate.dense"]).adapted == (UP,) * 2
    assert read_model_sizes(folder, r".*layer\.1\.output\.dense").adapted == (DOWN,)
    assert len(read_model_sizes(folder, ["nothing"]).adapted) == 12  # a bound; the loaded model will refuse


def test_other_weight_files_leave_it_to_the_configuration(tiny_model_folder, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_model_folder / "config.json").read_bytes())
    sizes, exact = (read_model_sizes(str(folder), "all-linear") for folder in (tmp_path, tiny_model_folder))
    assert sorted(sizes.linears) == sorted(exact.linears)
    matrices = 200 * 32 + 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert sizes.base_values == matrices
    llama = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({**llama, "hidden_act": "silu", "vocab_size": 5}))
    assert read_model_sizes(str(tmp_path), "all-linear").base_values == 5 * 8 + 4 * 64 + 3 * 128
    (tmp_path / "config.json").write_text(
        json.dumps({"n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": None})
    )
    assert read_model_sizes(str(tmp_path), "all-linear").base_values == 4 * 64 + 2 * 256


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"hidden_size": "x"}'])
def test_what_tells_nothing(tmp_path, text):
    assert read_model_sizes("some/hub-name", "all-linear") is None
    (tmp_path / "config.json").write_text(text)
    assert read_model_sizes(str(tmp_path), "all-linear") is None


def test_a_language_models_head_and_embeddings_carry_no_adapter(tmp_path):
    names = ["wte", "lm_head", "h.0.attn.q_proj", "score"]
    save_file({f"{name}.weight": torch.zeros(4, 4) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"n_embd": 4, "n_layer": 1, "n_head": 1}))
    assert read_model_sizes(str(tmp_path), "all-linear").adapted == (Matrix(4, 4),)


def test_activations_are_bounded(tiny_model_folder):
    """What a real step keeps for its backward pass lies below the bound, and not far."""
    sizes = read_model_sizes(str(tiny_model_folder), "all-linear")
    tables = {"model": {"name": "m"}, "data": {"source": "d.csv", "max_length": 40}}
    tables |= {"training": {"batch_size": 6}, "lora": {"rank_max": 4}, "evaluation": {"batch_size": 1}}
    bound = estimate_memory(RunConfig.model_validate(tables), sizes, 1, on_gpu=False).worker
    model = build_model(tiny_model_folder)
    model.train(True)
    weights = {parameter.data_ptr() for parameter in model.peft_model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = {"input_ids": torch.ones(6, 40, dtype=torch.long), "attention_mask": torch.ones(6, 40).long()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch).sum()
        held = sum(kept.values())
    assert 0.3 * bound.parts["activations"] < held < bound.parts["activations"]
