"""Sequence classification: texts to tokens, tokens to padded batches, logits to loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EncodedExamples:
    """Token ids of many texts in one array.

    Args:
        tokens: (total tokens,) int32.
        offsets: (num_examples + 1,) int64, text i is tokens[offsets[i]:offsets[i + 1]].
        labels: (num_examples,) int64.
    """

    tokens: npt.NDArray[np.int32]
    offsets: Indices
    labels: Indices

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Indices:
        """Tokens of each text (num_examples,)."""
        return np.diff(self.offsets)


class ClassificationTask:
    """Cross-entropy on one label a text.

    Args:
        tokenizer: of the base model (a transformers fast tokenizer).
        max_length: tokens a text is cut to.
        device: where batches go.
    """

    def __init__(self, tokenizer: Any, max_length: int, device: str = "cpu") -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.device = torch.device(device)
        self.pad_token_id = tokenizer.pad_token_id or 0

    def encode(self, texts: Sequence[str], labels: Indices) -> EncodedExamples:
        """Tokenise texts, each cut to max_length tokens."""
        if not len(texts):
            return EncodedExamples(np.zeros(0, np.int32), np.zeros(1, np.int64), labels)
        ids = self.tokenizer(
            list(texts), truncation=True, max_length=self.max_length, return_attention_mask=False
        )["input_ids"]
        # A tokenizer without special tokens leaves nothing of an empty text, which no model takes.
        ids = [row or [self.pad_token_id] for row in ids]
        offsets = np.cumsum([0, *(len(row) for row in ids)])
        return EncodedExamples(np.concatenate(ids).astype(np.int32), offsets.astype(np.int64), labels)

    def collate(self, examples: EncodedExamples, indices: Indices) -> tuple[dict[str, Tensor], Tensor]:
        """Pad some examples to the longest of them.

        Returns:
            The model's inputs, `input_ids` and `attention_mask` (examples, tokens) int64, and labels.
        """
        lengths = examples.lengths[indices]
        mask = np.arange(lengths.max()) < lengths[:, None]
        starts = np.repeat(examples.offsets[indices] - np.cumsum(lengths) + lengths, lengths)
        ids = np.full(mask.shape, self.pad_token_id, np.int64)
        ids[mask] = examples.tokens[starts + np.arange(lengths.sum())]
        batch = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        }
        labels = torch.from_numpy(examples.labels[indices])
        on_device = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        return on_device, labels.to(self.device, non_blocking=True)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of a batch, in float32."""
        return functional.cross_entropy(logits.float(), labels)

    def predictions(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return (examples, 2) float32: each example's loss and predicted label."""
        losses = functional.cross_entropy(logits.float(), labels, reduction="none")
        return torch.stack([losses, logits.argmax(dim=1).float()], dim=1).cpu()


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer that belongs to a model folder or hub name."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
