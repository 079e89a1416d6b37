"""What a task is: examples to numbers, a loss, and a measurement; see docs/tasks.md."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpifedlora.core.metrics import Metrics
from mpifedlora.core.seeding import torch_seed
from mpifedlora.training.base import NO_CODE, BaseModel, build_base, not_loadable

Indices = npt.NDArray[np.int64]
Tokens = tuple[npt.NDArray[np.int32], Indices]
Tokenize = Callable[[Sequence[str]], Tokens]
Cache = Callable[[Sequence[str], str, Tokenize], Tokens]
Columns = Mapping[str, Any]
"""Columns of equal length by name: tuples of what a row held, or arrays (num_examples, ...)."""
Batch = tuple[dict[str, Tensor], Tensor]
"""What the model is called with, and the targets of the loss."""

IGNORED = -100
"""A target of whole numbers that the loss leaves out."""


class Model(Protocol):
    """The model as a task sees it."""

    def __call__(self, inputs: dict[str, Tensor], /) -> Tensor:
        """Return what the base model gives as its logits."""


class Task(Protocol):
    """What the clients' models learn: three things to do, `encode`, `loss` and `measure`.

    Args:
        statistics: names of what `measure` returns of each example.
        metric_names: of what `metrics` returns beside loss, accuracy and macro-F1.
    """

    statistics: tuple[str, ...]
    metric_names: tuple[str, ...]

    def encode(self, columns: Columns, labels: Indices) -> EncodedExamples:
        """Turn examples into numbers, once a process.

        Args:
            columns: of the examples, as the run file names them.
            labels: label numbers (num_examples,), zeros where there are none.
        """

    def collate(self, examples: EncodedExamples, indices: Indices, *, is_training: bool = False) -> Batch:
        """Make a batch of some examples, on the device: inputs of the model, and targets of the loss."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss over the targets (those that are `IGNORED` left out), a scalar in float32."""

    def measure(self, model: Model, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        """Return what is to be known of each example: (examples, statistics) float32, on the CPU."""

    def metrics(self, statistics: npt.NDArray[np.float32], examples: EncodedExamples) -> Metrics:
        """Make the metrics of all examples' statistics (num_examples, statistics)."""


@dataclass(frozen=True)
class EncodedExamples:
    """Examples as numbers: token ids in one array that other sets of examples may share, and columns.

    Args:
        tokens: (total tokens,) int32, in memory or mapped from a file.
        starts: (num_examples,) int64, example i is tokens[starts[i]:starts[i] + lengths[i]].
        lengths: tokens of each example (num_examples,) int64; ones where there are no tokens.
        columns: what else an example has, by name: arrays (num_examples, ...).
    """

    tokens: npt.NDArray[np.int32]
    starts: Indices
    lengths: Indices
    columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)

    @staticmethod
    def without_tokens(columns: Mapping[str, npt.NDArray[Any]]) -> EncodedExamples:
        """Return examples that have nothing but their columns, as images do."""
        num_examples = len(next(iter(columns.values())))
        starts, lengths = np.zeros(num_examples, np.int64), np.ones(num_examples, np.int64)
        return EncodedExamples(np.zeros(0, np.int32), starts, lengths, columns)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def labels(self) -> Indices:
        """The column `labels`."""
        labels: Indices = self.columns["labels"]
        return labels

    def take(self, indices: Indices) -> EncodedExamples:
        """Return some of the examples, over the same tokens."""
        columns = {name: column[indices] for name, column in self.columns.items()}
        return EncodedExamples(self.tokens, self.starts[indices], self.lengths[indices], columns)

    def padded(self, indices: Indices, padding: int) -> tuple[Indices, npt.NDArray[np.bool_]]:
        """Return token ids (examples, tokens), filled up to the longest example, and which are real."""
        lengths = self.lengths[indices]
        mask = np.arange(lengths.max()) < lengths[:, None]
        starts = np.repeat(self.starts[indices] - np.cumsum(lengths) + lengths, lengths)
        ids = np.full(mask.shape, padding, np.int64)
        ids[mask] = self.tokens[starts + np.arange(len(starts))]
        return ids, mask


@dataclass(frozen=True)
class TaskSetup:
    """What a task is built from: the run file's `[model]`, `[data]` and `[task]`, and the data's labels.

    Args:
        model: folder or hub name of the base model.
        label_names: of the data.
        max_length: tokens an example is cut to.
        device: where batches go.
        seed: of the run.
        head: see `build_base`.
        dtype: see `build_base`.
        dropout: see `build_base`.
        template: of `[task]`.
        packing: of `[task]`.
        options: of `[task]`, for a task of one's own.
        cache: see `TextTask`.
    """

    model: str
    label_names: Sequence[str]
    max_length: int
    device: str = "cpu"
    seed: int = 0
    head: str = "auto"
    dtype: str = "float32"
    dropout: float | None = None
    template: str = "auto"
    packing: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    cache: Cache | None = None

    def classifier(self, num_outputs: int | None = None) -> BaseModel:
        """Load the base model with a fresh linear head, of one output a label by default."""
        return build_base(
            self.model,
            num_labels=len(self.label_names) if num_outputs is None else num_outputs,
            head=self.head,
            dtype=self.dtype,
            dropout=self.dropout,
            seed=torch_seed(self.seed, "head"),
        )

    def language_model(self) -> BaseModel:
        """Load the base model as a causal language model, which has no head of its own."""
        return build_base(self.model, num_labels=0, head="causal-lm", dtype=self.dtype, dropout=self.dropout)

    def tokenizer(self) -> Any:
        """Load the base model's tokenizer."""
        return load_tokenizer(self.model)


class TextTask:
    """The half of a task on texts that is common to them: the column `text` becomes padded token ids.

    Args:
        tokenizer: of the base model (a transformers fast tokenizer).
        max_length: tokens a text is cut to.
        device: where batches go.
        cache: returns `tokenize(texts)`, or what that gave before for equal texts and `settings`.
    """

    statistics: tuple[str, ...] = ("loss",)
    metric_names: tuple[str, ...] = ()

    def __init__(
        self, tokenizer: Any, max_length: int, device: str = "cpu", cache: Cache | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.device = torch.device(device)
        self.pad_token_id = tokenizer.pad_token_id or 0
        # What any other kind of tokenizer depends on cannot be told.
        self._cache = cache if hasattr(tokenizer, "backend_tokenizer") else None

    def encode(self, columns: Columns, labels: Indices) -> EncodedExamples:
        """Tokenise texts, each cut to max_length tokens, or take what the cache has of them."""
        return self.encode_texts(columns["text"], {"labels": labels})

    def encode_texts(self, texts: Sequence[str], columns: Mapping[str, npt.NDArray[Any]]) -> EncodedExamples:
        """Tokenise texts, and put columns beside them; `labels` are the targets of a batch."""
        if self._cache is None:
            tokens, lengths = self.tokenize(texts)
        else:
            tokens, lengths = self._cache(texts, self.settings, self.tokenize)
        return EncodedExamples(tokens, np.cumsum(lengths) - lengths, lengths, columns)

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

    def collate(self, examples: EncodedExamples, indices: Indices, *, is_training: bool = False) -> Batch:
        """Pad some examples to the longest of them.

        Returns:
            The model's inputs, `input_ids` and `attention_mask` (examples, tokens) int64, and labels.
        """
        ids, mask = examples.padded(indices, self.pad_token_id)
        batch = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask.astype(np.int64)),
        }
        return self.on_device(batch, torch.from_numpy(examples.labels[indices]))

    def on_device(self, inputs: dict[str, Tensor], targets: Tensor) -> Batch:
        """Move a batch to the device."""
        moved = {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}
        return moved, targets.to(self.device, non_blocking=True)


def num_targets(targets: Tensor) -> int:
    """Return how many targets a loss is the mean over."""
    if targets.is_floating_point():
        return len(targets)
    return int((targets != IGNORED).sum())


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer that belongs to a model folder or hub name.

    Raises:
        AdapterError: if there is none, or it is damaged.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **NO_CODE)
    # The Rust library's errors, of damaged files, have no common base.
    except Exception as error:
        raise not_loadable(name, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
