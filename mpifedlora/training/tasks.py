"""Sequence classification: texts to tokens, tokens to padded batches, logits to loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

Indices = npt.NDArray[np.int64]
Tokens = tuple[npt.NDArray[np.int32], Indices]
Tokenize = Callable[[Sequence[str]], Tokens]


@dataclass(frozen=True)
class EncodedExamples:
    """Token ids of some texts, in one array that other sets of examples may share.

    Args:
        tokens: (total tokens,) int32, in memory or mapped from a file.
        starts: (num_examples,) int64, text i is tokens[starts[i]:starts[i] + lengths[i]].
        lengths: tokens of each text (num_examples,) int64.
        labels: (num_examples,) int64.
    """

    tokens: npt.NDArray[np.int32]
    starts: Indices
    lengths: Indices
    labels: Indices

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Indices) -> EncodedExamples:
        """Return some of the examples, over the same tokens."""
        return EncodedExamples(self.tokens, self.starts[indices], self.lengths[indices], self.labels[indices])


class ClassificationTask:
    """Cross-entropy on one label a text.

    Args:
        tokenizer: of the base model (a transformers fast tokenizer).
        max_length: tokens a text is cut to.
        device: where batches go.
        cache: returns `tokenize(texts)`, or what that gave before for equal texts and `settings`.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        device: str = "cpu",
        cache: Callable[[Sequence[str], str, Tokenize], Tokens] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.device = torch.device(device)
        self.pad_token_id = tokenizer.pad_token_id or 0
        # What any other kind of tokenizer depends on cannot be told.
        self._cache = cache if hasattr(tokenizer, "backend_tokenizer") else None

    def encode(self, texts: Sequence[str], labels: Indices) -> EncodedExamples:
        """Tokenise texts, each cut to max_length tokens, or take what the cache has of them."""
        if self._cache is None:
            tokens, lengths = self.tokenize(texts)
        else:
            tokens, lengths = self._cache(texts, self.settings, self.tokenize)
        return EncodedExamples(tokens, np.cumsum(lengths) - lengths, lengths, labels)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Return all token ids (total tokens,) int32, and the number of each text's (num_texts,) int64."""
        if not len(texts):
            return np.zeros(0, np.int32), np.zeros(0, np.int64)
        ids = self.tokenizer(
            list(texts), truncation=True, max_length=self.max_length, return_attention_mask=False
        )["input_ids"]
        # A tokenizer without special tokens leaves nothing of an empty text, which no model takes.
        ids = [row or [self.pad_token_id] for row in ids]
        return np.concatenate(ids).astype(np.int32), np.array([len(row) for row in ids], np.int64)

    @cached_property
    def settings(self) -> str:
        """All that the tokens of a text depend on."""
        serialised = json.loads(self.tokenizer.backend_tokenizer.to_str())
        for state in ("truncation", "padding"):  # of the last call
            del serialised[state]
        options = [self.max_length, self.tokenizer.truncation_side, self.pad_token_id]
        splits = getattr(self.tokenizer, "split_special_tokens", False)
        libraries = [version("tokenizers"), version("transformers")]
        return json.dumps([*options, splits, *libraries, serialised])

    def collate(self, examples: EncodedExamples, indices: Indices) -> tuple[dict[str, Tensor], Tensor]:
        """Pad some examples to the longest of them.

        Returns:
            The model's inputs, `input_ids` and `attention_mask` (examples, tokens) int64, and labels.
        """
        lengths = examples.lengths[indices]
        mask = np.arange(lengths.max()) < lengths[:, None]
        starts = np.repeat(examples.starts[indices] - np.cumsum(lengths) + lengths, lengths)
        ids = np.full(mask.shape, self.pad_token_id, np.int64)
        ids[mask] = examples.tokens[starts + np.arange(len(starts))]
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
