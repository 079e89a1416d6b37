"""A model, a data set and a run file so small that a whole federation takes seconds.

Everything comes from fixed seeds, so that all processes of a job make the same files. Each function
may be called by several processes at once on the same path: files appear whole, the marking one last.
"""

from __future__ import annotations

import csv
import json
import os
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = tuple(first + second + end for first in "bdklmn" for second in "aeiou" for end in ("", *"fgprst"))[
    :195
]
LABELS = ("animals", "food", "music")
TOPIC_WORDS = dict(zip(LABELS, (WORDS[:15], WORDS[15:30], WORDS[30:45]), strict=True))
COMMON_WORDS = WORDS[45:105]

RUN: dict[str, dict[str, Any]] = {
    "model": {"dropout": 0.0},
    "data": {"alpha": 1.0, "max_length": 24},
    "federation": {"num_clients": 4, "num_rounds": 4, "seed": 0},
    "lora": {"rank_max": 4, "rank_min": 1, "alpha": 8.0},
    "initiating": {"rounds": 1},
    "annealing": {"heating_rounds": 0, "schedule": "linear"},
    "training": {"local_steps": 2, "batch_size": 4, "threads": 1, "device": "cpu", "learning_rate": 1e-2},
    "evaluation": {"batch_size": 8},
}


def make_model(folder: Path) -> Path:
    """Write a BERT of random weights with its tokenizer; mean pooling is what it asks for.

    Hidden size 32, 2 layers, 2 heads, intermediate size 64, 200 tokens, 64 positions.

    Returns:
        The folder. One that holds a model already is left as it is.
    """
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            _write_model(Path(made))
            # config.json says that the folder is whole.
            for file in Path(made).iterdir():
                if file.is_file() and file.name != "config.json":
                    _move(file, folder / file.name)
            _move(Path(made) / "1_Pooling" / "config.json", folder / "1_Pooling" / "config.json")
            _move(Path(made) / "config.json", folder / "config.json")
    return folder


def make_vit(folder: Path) -> Path:
    """Write a vision transformer of random weights: 6 x 6 grey images, 2 layers, 8 wide.

    Returns:
        The folder.
    """
    import torch
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(image_size=6, patch_size=3, num_channels=1, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def make_images(folder: Path, num_images: int, seed: int) -> Path:
    """Write 6 x 6 grey images in a subfolder for each of three labels, whose brightness tells the label.

    Returns:
        The folder.
    """
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(seed)
    for number in range(num_images):
        label = number % 3
        pixels = generator.integers(80 * label, 80 * label + 90, (6, 6), np.uint8)
        (folder / LABELS[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / LABELS[label] / f"{number:03d}.png")
    return folder


def make_csv(path: Path, num_rows: int = 120) -> Path:
    """Write rows `text,label` whose words tell the label; labels are equally frequent.

    Texts have 2 to 14 words, of which about half belong to the label's topic.

    Returns:
        The path. A file that is there already is left as it is.
    """
    if not path.is_file():
        generator = random.Random(7)
        rows = [(_text(generator, LABELS[row % 3]), LABELS[row % 3]) for row in range(num_rows)]
        generator.shuffle(rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as made:
            file = Path(made) / "rows.csv"
            with file.open("w", newline="") as stream:
                csv.writer(stream).writerows([("text", "label"), *rows])
            _move(file, path)
    return path


def make_run_file(folder: Path, text: str = "") -> Path:
    """Write `run.toml` for the tiny model and data in the same folder, which are made if missing.

    4 clients, 4 rounds, rank 4 to 1, 2 local steps of 4 examples, 1 thread.

    Args:
        folder: where `model/`, `data.csv` and `run.toml` go.
        text: TOML tables; their keys are added to those of `RUN`, or replace them.

    Returns:
        The run file.
    """
    tables = {name: dict(table) for name, table in RUN.items()}
    tables["model"]["name"] = str(make_model(folder / "model").absolute())
    tables["data"]["source"] = str(make_csv(folder / "data.csv").absolute())
    for name, table in _parse(text).items():
        if "local_epochs" in table:
            tables[name].pop("local_steps", None)
        tables.setdefault(name, {}).update(table)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        file = Path(made) / "run.toml"
        file.write_text("\n".join(_table_text(name, table) for name, table in tables.items()))
        _move(file, folder / "run.toml")
    return folder / "run.toml"


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)


def _write_model(folder: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(SPECIAL_TOKENS) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        BertModel(config).save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )


def _text(generator: random.Random, label: str) -> str:
    words = [generator.choice(TOPIC_WORDS[label]) for _ in range(generator.randint(1, 7))]
    words += [generator.choice(COMMON_WORDS) for _ in range(generator.randint(1, 7))]
    generator.shuffle(words)
    return " ".join(words)


def _parse(text: str) -> dict[str, dict[str, Any]]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    return tomllib.loads(text)


def _table_text(name: str, table: dict[str, Any]) -> str:
    # JSON's texts, numbers, booleans and lists are TOML's too.
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    return "\n".join([f"[{name}]", *lines, ""])


def build_model(folder: Path, *, dtype: str = "float32", seed: int = 0, **options: Any) -> Any:
    """Return a `FederatedModel` of 3 labels, rank 4 and scaling 2, without dropout in its base.

    Args:
        folder: of the model.
        dtype: of the base weights.
        seed: of head and adapter.
        options: of `FederatedModel`, or `base_dropout`.
    """
    from mpifedlora.training.base import build_base
    from mpifedlora.training.models import FederatedModel

    dropout = options.pop("base_dropout", 0.0)
    base = build_base(str(folder), num_labels=3, dtype=dtype, dropout=dropout, seed=seed)
    return FederatedModel(base, **{"rank_max": 4, "alpha": 8.0, "seed": seed, **options})


def make_plan(model: Any, lora_ranks: int | Sequence[int] = 4, **fields: Any) -> Any:
    """Return a `RoundPlan` of round 1 for one client; `lora_ranks` is one for all modules, or one each."""
    from mpifedlora.core.plan import RoundPlan

    num_modules = len(model.shapes.modules)
    ranks = (lora_ranks,) * num_modules if isinstance(lora_ranks, int) else tuple(lora_ranks)
    plan = {
        "round_num": 1,
        "stage": "annealing",
        "scope": "adapter",
        "frozen_ranks": (0,) * num_modules,
        "workers": (0,),
    }
    return RoundPlan(**{**plan, "lora_ranks": ranks, **fields})


def random_values(num_values: int, seed: int = 0, scale: float = 0.2) -> Any:
    """Return normal numbers (num_values,) float32, from a seed of their own."""
    import torch

    return torch.randn(num_values, generator=torch.Generator().manual_seed(seed)) * scale


def make_batch() -> dict[str, Any]:
    """Return three padded texts as the tiny model takes them."""
    import torch

    ids = [[2, 9, 30, 44, 3], [2, 70, 8, 3, 0], [2, 120, 3, 0, 0]]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor([[int(i > 0) for i in row] for row in ids]),
    }


def bound_logits(model: Any, plan: Any, flat: Any, client_id: int | None = None) -> Any:
    """Return a federated model's logits of `make_batch` with some values in it."""
    import torch

    model.bind(plan, flat, client_id=client_id)
    model.train(False)
    with torch.no_grad():
        return model(make_batch())


def plain_logits(module: Any) -> Any:
    """Return a transformers or PEFT model's logits of `make_batch`."""
    import torch

    with torch.no_grad():
        return module.eval()(**make_batch()).logits


def frozen_message(model: Any, plan: Any, seed: int = 0) -> tuple[Any, list[Any], list[Any]]:
    """Return a random message, and the un-cut adapter that it came from: joined factors, and the head."""
    message = random_values(plan.message_values(model.shapes), seed)
    parts, layout = plan.split(model.shapes, message), plan.layout(model.shapes)
    kept = model.shapes.frozen(plan.frozen_ranks).factors(parts.frozen)
    pairs = zip(layout.factors(parts.state), kept, strict=True)
    return message, [join(*pair) for pair in pairs], layout.whole_tensors(parts.state)


def join(*parts: Any) -> Any:
    """Return factors whose product is the sum of the parts' products."""
    import torch

    from mpifedlora.core.layout import Factors

    return Factors(torch.cat([part.a for part in parts]), torch.cat([part.b for part in parts], dim=1))


def flatten(factors: Sequence[Any], head: Sequence[Any]) -> Any:
    """Return factors and head as one flat tensor."""
    import torch

    parts = [part for pair in factors for part in pair] + list(head)
    return torch.cat([part.reshape(-1) for part in parts])
