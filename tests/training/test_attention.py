"""Attention in float32 under autocast on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel

from mpifedlora.training.attention import use_float32_attention


class _Kernels(TorchDispatchMode):
    """Notes the data type that each attention kernel is given."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if "attention" in str(func):
            self.dtypes.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def _model() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    return BertModel(config, add_pooling_layer=False)


def _gradient(model: BertModel, is_mixed: bool) -> torch.Tensor:
    ids = torch.arange(14).reshape(2, 7)
    mask = torch.tensor([[1] * 7, [1, 1, 1, 1, 0, 0, 0]])
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_mixed):
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    (hidden.float() ** 3 * mask[..., None]).sum().backward()
    return torch.cat(
        [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    )


@pytest.mark.parametrize("is_mixed", [True, False])
def test_the_kernel_sees_float32(is_mixed: bool) -> None:
    use_float32_attention()
    model = _model()
    with _Kernels() as kernels:
        _gradient(model, is_mixed)
    assert kernels.dtypes == {torch.float32}


def test_gradients_under_autocast_are_those_of_float32_but_for_rounding() -> None:
    use_float32_attention()
    model = _model()
    exact, mixed = _gradient(model, is_mixed=False), _gradient(model, is_mixed=True)
    assert torch.linalg.vector_norm(mixed - exact) < 0.02 * torch.linalg.vector_norm(exact)
    assert not torch.equal(mixed, exact)
