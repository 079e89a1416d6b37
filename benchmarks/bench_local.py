"""Time local training against a plain loop of PyTorch and PEFT, on 20 Newsgroups.

    python benchmarks/bench_local.py [--quick] [--json FILE]

MiniLM, LoRA of rank 16 on all linear layers, batches of 16 posts of up to 128 tokens, one thread. Both
sides take their batches from the same function, in turn in one process. The plain loop is as anybody would
write it with PEFT: fused AdamW over the parameters, `clip_grad_norm_`, `zero_grad(set_to_none=True)`.

Batches by length are compared with the plain loop's random ones at up to 256 tokens, on a few posts that
stand for all: batches taken evenly from those of the whole training part by length. bfloat16 runs under
autocast; a CPU without instructions for it takes several times longer than in float32, with either loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers.utils import logging

from mpifedlora.core.batches import batch_indices, length_batches
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.seeding import numpy_generator
from mpifedlora.io.datasets import read_dataset
from mpifedlora.io.token_cache import cached_tokens
from mpifedlora.runtime.setup import model_path
from mpifedlora.training.base import build_base
from mpifedlora.training.local import LocalSettings, train_client
from mpifedlora.training.lora_layers import find_linears
from mpifedlora.training.models import FederatedModel
from mpifedlora.training.task import EncodedExamples, load_tokenizer
from mpifedlora.training.tasks import ClassificationTask

NUM_LABELS, LORA_RANK, ALPHA, LEARNING_RATE, GRAD_CLIP = 20, 16, 32.0, 1e-3, 1.0
MAX_LENGTH = 128
LONG = 256  # what MiniLM was trained for; at 128 nine tokens in ten are no padding, and little is to win


class Ours:
    """`train_client`, as a worker calls it."""

    def __init__(self, task: ClassificationTask) -> None:
        base = build_base(model_path("minilm"), num_labels=NUM_LABELS, dropout=0.0)
        self.task = task
        self.model = FederatedModel(base, rank_max=LORA_RANK, alpha=ALPHA, device=str(task.device))
        num_modules = len(self.model.shapes.modules)
        ranks, none = (LORA_RANK,) * num_modules, (0,) * num_modules
        self.plan = RoundPlan(1, "annealing", "adapter", ranks, none, (0,), learning_rate=LEARNING_RATE)
        self.model.receive(self.plan, torch.empty(0))
        self.values = torch.empty(self.plan.row_values(self.model.shapes, 0))

    def train(self, examples: EncodedExamples, settings: LocalSettings) -> float:
        """Train one client; return its mean loss."""
        return train_client(self.model, self.task, examples, settings, self.plan, 0, self.values).train_loss


class Plain:
    """The same training, written with PEFT's own model and parameters."""

    def __init__(self, task: ClassificationTask) -> None:
        base = build_base(model_path("minilm"), num_labels=NUM_LABELS, dropout=0.0)
        names = list(find_linears(base.module, "all-linear", base.head_names))
        config = LoraConfig(
            r=LORA_RANK, lora_alpha=ALPHA, target_modules=names, modules_to_save=[*base.head_names]
        )
        self.task = task
        self.model: Any = get_peft_model(base.module, config).to(task.device).train()
        self.trained = [value for value in self.model.parameters() if value.requires_grad]

    def train(self, examples: EncodedExamples, settings: LocalSettings) -> float:
        """Take the steps that `Ours.train` takes; return the mean loss."""
        optimizer = torch.optim.AdamW(self.trained, LEARNING_RATE, weight_decay=0.0, fused=True)
        sizes = len(examples), settings.batch_size, settings.local_steps, settings.local_epochs
        losses = []
        for indices in batch_indices(*sizes, numpy_generator(settings.seed, "batches", 1, 0)):
            batch, labels = self.task.collate(examples, indices)
            optimizer.zero_grad(set_to_none=True)
            with _autocast(settings.precision, self.task.device):
                logits = self.model(**batch).logits
            loss = functional.cross_entropy(logits.float(), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, GRAD_CLIP)
            optimizer.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())


def _autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _read(task: ClassificationTask) -> EncodedExamples:
    train = read_dataset("20newsgroups").train
    return task.encode(train.columns, train.labels)


def _stand_in(examples: EncodedExamples, batch_size: int, num_batches: int) -> EncodedExamples:
    """Return a few posts whose batches by length are spread evenly over those of all posts."""
    batches = length_batches(examples.lengths, batch_size)
    places = (np.arange(num_batches) + 0.5) * len(batches) / num_batches
    return examples.take(np.concatenate([batches[place] for place in places.astype(np.int64)]))


class Bench:
    """Both loops, the posts, and the report."""

    def __init__(self) -> None:
        logging.set_verbosity_error()
        torch.set_num_threads(1)
        torch.manual_seed(0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = load_tokenizer(model_path("minilm"))
        lengths = (MAX_LENGTH, LONG)
        tasks = [ClassificationTask(tokenizer, length, device, cached_tokens) for length in lengths]
        self.ours, self.plain = Ours(tasks[0]), Plain(tasks[0])
        self.posts, self.long_posts = map(_read, tasks)
        self.report = common.Report("bench_local")

    def compare(self, settings: LocalSettings, repeats: int) -> None:
        """Compare on the same batches."""
        name = f"{settings.precision}: ours / plain throughput, {settings.batch_size} x {MAX_LENGTH} tokens"
        self._compare(name, self.posts, settings, settings, repeats, at_least=1.0)

    def compare_bucketed(self, settings: LocalSettings, repeats: int) -> None:
        """Compare batches by length with the plain loop's random ones, in one epoch of the same posts."""
        assert settings.local_steps is not None
        posts = _stand_in(self.long_posts, settings.batch_size, settings.local_steps)
        bucketed = replace(settings, batching="bucketed")
        name = f"{settings.precision}: bucketed / plain throughput, {settings.batch_size} x {LONG} tokens"
        self._compare(name, posts, settings, bucketed, repeats, at_least=1.3)

    def _compare(
        self,
        name: str,
        posts: EncodedExamples,
        theirs: LocalSettings,
        own: LocalSettings,
        repeats: int,
        at_least: float,
    ) -> None:
        assert own.local_steps is not None
        pair = common.alternate(
            lambda: self.plain.train(posts, theirs), lambda: self.ours.train(posts, own), repeats
        )
        num_examples = own.local_steps * own.batch_size
        for side, seconds in (("plain", pair.first_s), ("ours", pair.second_s)):
            throughput = [num_examples / value for value in seconds]
            self.report.samples(f"{name}, {side} (examples/s)", throughput, batch_size=own.batch_size)
        self.report.ratio(name, pair.ratio, at_least=at_least)


def _settings(precision: str, batch_size: int, num_steps: int) -> LocalSettings:
    return LocalSettings(batch_size, num_steps, None, "adamw", 0.0, 0.0, GRAD_CLIP, precision, seed=0)


def _draw(report: common.Report) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        axes = figure.subplots()
        by_label: dict[str, list[float]] = {}
        for sample in report._samples:
            by_label.setdefault(sample["label"], []).append(sample["value"])
        names = list(report._ratios)
        for index, (side, label) in enumerate((("plain", "plain loop"), ("ours", "the package"))):
            medians = [float(np.median(by_label[f"{name}, {side} (examples/s)"])) for name in names]
            places = [place + 0.4 * index - 0.2 for place in range(len(names))]
            axes.barh(places, medians, height=0.38, color=common.COLORS[index], label=label)
        ticks = [name.replace(" / plain throughput, ", "\n").replace(": ours", "") for name in names]
        axes.set(yticks=range(len(names)), yticklabels=ticks, xlabel="examples/s, median")
        axes.invert_yaxis()
        axes.legend(loc="lower right")

    return draw


@common.options
def main(quick: bool, json_path: Path | None) -> int:
    """Time local training against a plain loop of PyTorch and PEFT."""
    bench = Bench()
    bench.compare(_settings("float32", 16, num_steps=1 if quick else 4), repeats=5 if quick else 8)
    bench.compare_bucketed(_settings("float32", 16, num_steps=4 if quick else 8), repeats=2 if quick else 3)
    bench.compare(_settings("bfloat16", 4 if quick else 16, num_steps=1), repeats=5 if quick else 8)
    return bench.report.finish(json_path, _draw(bench.report))


if __name__ == "__main__":
    main()
