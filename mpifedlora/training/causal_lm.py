"""Instruction tuning of causal language models: the loss is on responses only.

An example is a list of pieces of text, each of them prompt or response. Every piece is tokenised by itself,
so that a prompt has the same tokens with and without its response. In the array of tokens those of responses
are written as their complement (below 0).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from mpifedlora.core.metrics import Metrics
from mpifedlora.errors import ConfigError, DataError
from mpifedlora.training.base import BaseModel
from mpifedlora.training.task import (
    IGNORED,
    Batch,
    Cache,
    Columns,
    EncodedExamples,
    Indices,
    Model,
    Task,
    TaskSetup,
    TextTask,
    Tokens,
)

Pieces = list[tuple[str, bool]]
Turns = list[dict[str, str]]


class CausalLMTask(TextTask):
    """Next-token prediction of responses.

    Args:
        tokenizer: of the base model (a transformers fast tokenizer).
        max_length: tokens of an example; a longer one loses its beginning.
        device: where batches go.
        cache: see `TextTask`.
        template: `auto` or `plain`, see `[task] template`.
        packing: whether training batches put several examples into one row.
        mask_dtype: of the attention mask of packed rows: the base model's.
    """

    statistics: tuple[str, ...] = ("loss_sum", "num_tokens", "num_right")
    metric_names: tuple[str, ...] = ("perplexity", "token_accuracy")

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        device: str = "cpu",
        cache: Cache | None = None,
        *,
        template: str = "auto",
        packing: bool = False,
        mask_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(tokenizer, max_length, device, cache)
        self.uses_template = template == "auto" and bool(getattr(tokenizer, "chat_template", None))
        self.packing, self.mask_dtype = packing, mask_dtype

    def encode(self, columns: Columns, labels: Indices) -> EncodedExamples:
        """Tokenise prompts and responses, or whole conversations."""
        if "messages" in columns:
            conversations = [json.loads(text) for text in columns["messages"]]
        else:
            pairs = zip(columns["prompt"], columns["response"], strict=True)
            conversations = [list(map(_turn, ("user", "assistant"), pair)) for pair in pairs]
        split = self._split_by_template if self.uses_template else self._split_plainly
        return self.encode_texts([json.dumps(split(turns)) for turns in conversations], {"labels": labels})

    def _split_plainly(self, turns: Turns) -> Pieces:
        end = self.tokenizer.eos_token or "\n"
        return [
            (turn["content"] + end, True) if turn["role"] == "assistant" else (turn["content"] + "\n", False)
            for turn in turns
        ]

    def _split_by_template(self, turns: Turns) -> Pieces:
        """Cut what the template writes where a response begins and where it ends."""
        pieces: Pieces = []
        done = ""
        for number, turn in enumerate(turns):
            if turn["role"] == "assistant":
                before = self._written(turns[:number], is_prompt=True)
                after = self._written(turns[: number + 1], is_prompt=False)
                if not (before.startswith(done) and after.startswith(before)):
                    raise DataError(
                        "a chat template must only add to what it wrote of the turns before, got one that "
                        'rewrites them; set task.template = "plain"'
                    )
                pieces += [(before[len(done) :], False), (after[len(before) :], True)]
                done = after
        return pieces

    def _written(self, turns: Turns, *, is_prompt: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=is_prompt)
        return text

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Return the tokens of examples that are written as JSON; those of responses as complements."""
        pieces = [[*map(tuple, json.loads(text))] for text in texts]
        plain = [piece for example in pieces for piece, _ in example]
        ids = iter(self.tokenizer(plain, add_special_tokens=False)["input_ids"] if plain else [])
        rows = [self._row(example, ids) for example in pieces]
        if not rows:
            return np.zeros(0, np.int32), np.zeros(0, np.int64)
        return np.concatenate(rows), np.array([len(row) for row in rows], np.int64)

    def _row(self, example: Pieces, ids: Any) -> npt.NDArray[np.int32]:
        parts = [np.array(self._first_ids, np.int32)]
        for _, is_response in example:
            tokens = np.array(next(ids), np.int32)
            parts.append(~tokens if is_response else tokens)
        row = np.concatenate(parts)[-self.max_length :]
        if not (row[1:] < 0).any():  # an empty response of a tokenizer without an end
            row = np.concatenate([row, [~self.pad_token_id]]).astype(np.int32)[-self.max_length :]
        return row

    @property
    def _first_ids(self) -> list[int]:
        # A template writes its beginning itself.
        begin = self.tokenizer.bos_token_id
        adds = begin is not None and self.tokenizer("a")["input_ids"][0] == begin
        return [begin] if adds and not self.uses_template else []

    def collate(self, examples: EncodedExamples, indices: Indices, *, is_training: bool = False) -> Batch:
        """Make rows of examples: padded, or packed where that is asked for and they are trained on.

        Returns:
            The model's inputs, and targets (rows, tokens): the token that comes next, where it is one of a
            response, else `IGNORED`.
        """
        if is_training and self.packing:
            return self._packed(examples, indices)
        marked, mask = examples.padded(indices, self.pad_token_id)
        inputs = {"input_ids": _ids(marked), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        return self.on_device(inputs, _targets(marked, np.zeros_like(mask)))

    def _packed(self, examples: EncodedExamples, indices: Indices) -> Batch:
        rows = first_fit(examples.lengths[indices], self.max_length)
        width = max(int(examples.lengths[indices[row]].sum()) for row in rows)
        marked = np.full((len(rows), width), self.pad_token_id, np.int64)
        segments, positions = np.zeros_like(marked), np.zeros_like(marked)
        for number, row in enumerate(rows):
            place = 0
            for segment, index in enumerate(indices[row], start=1):
                start, length = examples.starts[index], examples.lengths[index]
                here = slice(place, place + length)
                marked[number, here] = examples.tokens[start : start + length]
                segments[number, here], positions[number, here] = segment, np.arange(length)
                place += length
        is_first = np.diff(segments, axis=1, prepend=0) != 0
        inputs = {
            "input_ids": _ids(marked),
            "position_ids": torch.from_numpy(positions),
            "attention_mask": separating_mask(segments, self.mask_dtype),
        }
        return self.on_device(inputs, _targets(marked, is_first))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of the responses' tokens, in float32."""
        is_target = targets != IGNORED
        return functional.cross_entropy(outputs[is_target].float(), targets[is_target])

    def measure(self, model: Model, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        """Return (examples, 3) float32: sum of the tokens' losses, number of tokens, how many are right.

        A token is right where the model would choose it after the right beginning. So greedy generation gives
        the response, end included, if and only if all of its tokens are right.
        """
        logits, is_target = model(inputs), targets != IGNORED
        chosen, wanted = logits[is_target].float(), targets[is_target]
        found = torch.zeros(3, *targets.shape, device=targets.device)
        found[0][is_target] = functional.cross_entropy(chosen, wanted, reduction="none")
        found[1][is_target] = 1.0
        found[2][is_target] = (chosen.argmax(dim=1) == wanted).float()
        return found.sum(dim=2).t().cpu()

    def metrics(self, statistics: npt.NDArray[np.float32], examples: EncodedExamples) -> Metrics:
        """Return the loss of a token, the share of responses that are right throughout, and more."""
        loss_sum, num_tokens, num_right = statistics.astype(np.float64).T
        loss = float(loss_sum.sum() / num_tokens.sum())
        others = {
            "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": float(num_right.sum() / num_tokens.sum()),
        }
        return Metrics(loss, float((num_right == num_tokens).mean()), others=others)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _ids(marked: Indices) -> Tensor:
    return torch.from_numpy(np.where(marked < 0, ~marked, marked))


def _targets(marked: Indices, is_first: npt.NDArray[np.bool_]) -> Tensor:
    """Return what comes after each token: the next one, if it is of a response in the same example."""
    follows = np.full(marked.shape, IGNORED, np.int64)
    is_target = (marked[:, 1:] < 0) & ~is_first[:, 1:]
    follows[:, :-1] = np.where(is_target, ~marked[:, 1:], IGNORED)
    return torch.from_numpy(follows)


def first_fit(lengths: Indices, capacity: int) -> list[list[int]]:
    """Put examples into rows, each into the first that has room; returns the examples of each row.

    >>> first_fit(np.array([5, 6, 3, 4]), 10)
    [[0, 2], [1, 3]]
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths.tolist()):
        row = next((number for number, left in enumerate(room) if length <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= length
    return rows


def separating_mask(segments: Indices, dtype: torch.dtype) -> Tensor:
    """Return what is added to the attention scores, (rows, 1, tokens, tokens), so that segments are apart.

    Args:
        segments: (rows, tokens), a number for each example of a row.
        dtype: of the mask.
    """
    numbers = torch.from_numpy(segments)
    is_seen = (numbers[:, :, None] == numbers[:, None, :]).tril()
    mask = torch.zeros(is_seen.shape, dtype=dtype).masked_fill_(~is_seen, torch.finfo(dtype).min)
    return mask[:, None]


def causal_lm(setup: TaskSetup) -> tuple[BaseModel, Task]:
    """Build a causal language model, and its tuning on responses."""
    base = setup.language_model()
    task = CausalLMTask(
        setup.tokenizer(),
        setup.max_length,
        setup.device,
        setup.cache,
        template=setup.template,
        packing=setup.packing,
        mask_dtype=getattr(torch, setup.dtype),
    )
    if setup.packing and next(base.module.parameters()).device.type != "meta":
        check_packing(base, task)
    return base, task


def check_packing(base: BaseModel, task: CausalLMTask) -> None:
    """Check on two short examples that a model computes the same of them packed and apart.

    Raises:
        ConfigError: if it does not, or cannot.
    """
    window = getattr(base.module.config, "sliding_window", None)
    limit = 5e-2 if task.mask_dtype != torch.float32 else 1e-3
    why = (
        f"a sliding window of {window} tokens, shorter than data.max_length"
        if (window is not None and window < task.max_length)
        else _difference(base, limit, task.mask_dtype)
    )
    if why:
        raise ConfigError(
            "task.packing = true needs a model that takes a mask and positions for each row, got "
            f"{why} ({type(base.module).__name__}); set task.packing = false"
        )


def _difference(base: BaseModel, limit: float, dtype: torch.dtype) -> str:
    ids = torch.tensor([[1, 2, 3, 2, 1, 3, 3]])
    segments = np.array([[1, 1, 1, 2, 2, 2, 2]])
    inputs = {
        "input_ids": ids,
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]),
        "attention_mask": separating_mask(segments, dtype),
    }
    base.module.eval()
    try:
        with torch.no_grad():
            packed = base.module(**inputs).logits[0]
            apart = [base.module(input_ids=part).logits[0] for part in (ids[:, :3], ids[:, 3:])]
    except Exception as error:  # whatever a model says to a mask that it does not know
        return f"{type(error).__name__}: {error}"
    difference = float((packed - torch.cat(apart)).abs().max() / packed.abs().max())
    return "" if difference <= limit else f"logits that differ by {difference:.1e}"
