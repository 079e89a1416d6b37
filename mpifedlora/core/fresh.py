"""The adapter that a run, or a restart, begins with: drawn from the seed by every process alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpifedlora.core.layout import ModelShapes
from mpifedlora.core.seeding import torch_seed


def initial_adapter(
    shapes: ModelShapes, lora_ranks: Sequence[int], head: Tensor, seed: int, round_num: int = 1
) -> Tensor:
    """Return a flat adapter that starts anew: A from U(-1/sqrt(in), 1/sqrt(in)), B = 0.

    Args:
        shapes: of the model.
        lora_ranks: one a module.
        head: (values of the head,) float32.
        seed: of the run; the same bits on every process.
        round_num: the round that trains it first; each has its own draw.

    References:
        LoRA, arXiv 2106.09685, section 4.1; the bounds are those of PEFT's Kaiming initialisation.
    """
    layout = shapes.adapter(lora_ranks)
    flat = torch.zeros(layout.num_values)
    generator = torch.Generator().manual_seed(torch_seed(seed, "adapter", round_num - 1))
    for factors in layout.factors(flat):
        bound = 1 / math.sqrt(factors.a.shape[1])
        factors.a.uniform_(-bound, bound, generator=generator)
    layout.whole_values(flat).copy_(head)
    return flat
