"""The README.md of an exported model: a model card as the hub expects it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpifedlora.core.units import human_bytes
from mpifedlora.io.results import Results

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
POOLED_HEAD_FILE = "classifier.safetensors"


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card tells beside the run's results.

    Args:
        title: of the model.
        round_num: after which round the model is this.
        base_model: hub name or folder.
        is_merged: whether the folder holds a whole model, else an adapter.
        is_pooled: whether its head is a linear layer on mean-pooled features.
        feature_scale: factor of these features.
        max_length: tokens that texts were cut to.
        lora_ranks: of the adapter's modules; empty without an adapter.
        client_id: whose own model it is, if it is one's.
        pipeline: what the hub calls the task; empty for one of a user's own.
        class_name: of the model.
    """

    title: str
    round_num: int
    base_model: str
    is_merged: bool
    is_pooled: bool
    feature_scale: float
    max_length: int
    lora_ranks: Sequence[int]
    client_id: int | None = None
    pipeline: str = ""
    class_name: str = ""


def model_card(results: Results, facts: CardFacts) -> str:
    """Return the text of a model card: YAML front matter, figures of the run, and how to load the model."""
    parts = (_front_matter(results, facts), _about(results, facts), _figures(results, facts), _usage(facts))
    return "\n".join(parts)


def _front_matter(results: Results, facts: CardFacts) -> str:
    info = results.info
    lines = [f"library_name: {'transformers' if facts.is_merged else 'peft'}"]
    if _HUB_NAME.fullmatch(facts.base_model) and not Path(facts.base_model).exists():
        lines.append(f"base_model: {facts.base_model}")
    if facts.pipeline:
        lines.append(f"pipeline_tag: {facts.pipeline}")
    lines += [
        "tags:",
        *(f"- {_yaml(tag)}" for tag in ("federated-learning", "lora", "mpifedlora", info.method)),
    ]
    metrics = [(kind, name, value) for kind, name, value in _metrics(results, facts) if math.isfinite(value)]
    # The figures are those of the global model, or a mean over the clients' own.
    if metrics and facts.pipeline and facts.client_id is None:
        lines += [
            "model-index:",
            f"- name: {_yaml(facts.title)}",
            "  results:",
            "  - task:",
            f"      type: {facts.pipeline}",
            "    dataset:",
            f"      name: {_yaml(info.dataset)}",
            f"      type: {_yaml(Path(info.dataset).stem)}",
            "    metrics:",
        ]
        for kind, name, value in metrics:
            lines += [f"    - type: {kind}", f"      name: {_yaml(name)}", f"      value: {value:.6g}"]
    return "\n".join(["---", *lines, "---", ""])


def _yaml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # JSON's texts are YAML's


def _metrics(results: Results, facts: CardFacts) -> list[tuple[str, str, float]]:
    rounds, row = results.rounds, _row(results, facts)
    others = zip(results.info.metric_names, rounds["eval_metrics"][row], strict=True)
    return [
        ("accuracy", "accuracy", float(rounds["eval_accuracy"][row])),
        ("f1", "macro-F1", float(rounds["eval_macro_f1"][row])),
        ("loss", "loss", float(rounds["eval_loss"][row])),
        *((name, name.replace("_", " "), float(value)) for name, value in others),
    ]


def _row(results: Results, facts: CardFacts) -> int:
    return int(np.flatnonzero(results.rounds["round_num"] == facts.round_num)[0])


def _about(results: Results, facts: CardFacts) -> str:
    info = results.info
    whose = "" if facts.client_id is None else f" Client {facts.client_id}'s own model."
    what = "The whole model" if facts.is_merged else "A LoRA adapter"
    return (
        f"# {facts.title}\n\n"
        f"{what}, fine-tuned in a federation of {info.num_clients} clients by "
        f"mpifedlora {info.package_version} with the method `{info.method}`.{whose} "
        f"It is the model after round {facts.round_num}.\n"
    )


def _figures(results: Results, facts: CardFacts) -> str:
    info, rounds = results.info, results.rounds
    until = slice(0, _row(results, facts) + 1)
    up, down = (int(rounds[f"{way}link_bytes"][until].sum()) for way in ("up", "down"))
    cells = [("base model", f"`{facts.base_model}`"), ("data", f"`{info.dataset}`")]
    cells += [(name, f"{value:.4f}") for _, name, value in _metrics(results, facts) if math.isfinite(value)]
    if info.eval_model == "personal":
        cells.append(("measured", "each client's own model on its share of the examples"))
    elif results.clients["num_evaluated"].any():
        cells.append(("measured", "on what each client has held out, the mean by examples"))
    if facts.lora_ranks:
        least, most = min(facts.lora_ranks), max(facts.lora_ranks)
        cells.append(("LoRA rank", str(most) if least == most else f"{least} to {most}, by module"))
    cells += [
        ("rounds", f"{facts.round_num}, the last in stage {rounds['stage'][until][-1]}"),
        ("bytes sent", f"{human_bytes(up + down)} (up {human_bytes(up)}, down {human_bytes(down)})"),
        ("seed", str(info.seed)),
    ]
    epsilon = float(rounds["epsilon"][until][-1])
    if math.isfinite(epsilon):
        cells.append(("privacy spent", f"epsilon {epsilon:.3g}"))
    rows = "\n".join(f"| {name} | {value} |" for name, value in cells)
    return f"| | |\n|---|---|\n{rows}\n"


def _usage(facts: CardFacts) -> str:
    if not facts.is_merged:
        return _ADAPTER_POOLED if facts.is_pooled else _ADAPTER_STOCK
    if facts.pipeline == "image-classification":
        return _MERGED_IMAGES
    if not facts.is_pooled and facts.pipeline != "text-classification":
        return _MERGED_OTHER.replace("CLASS", facts.class_name)
    text = _MERGED_POOLED if facts.is_pooled else _MERGED_STOCK
    return text.replace("SCALE", f"{facts.feature_scale:g}").replace("LENGTH", str(facts.max_length))


_ADAPTER_STOCK = """## Use

```python
from mpifedlora import load_base_model
from peft import PeftModel

model = PeftModel.from_pretrained(load_base_model("FOLDER"), "FOLDER").eval()
```

`FOLDER` is this folder. Where it has no `base_model/`, the base model as transformers loads it, with as many
labels as `labels.json` has, does as well as `load_base_model`.
"""

_ADAPTER_POOLED = """## Use

```python
from mpifedlora import load_base_model
from peft import PeftModel

model = PeftModel.from_pretrained(load_base_model("FOLDER"), "FOLDER").eval()
```

`FOLDER` is this folder. `load_base_model` puts the head on the encoder, a linear layer on mean-pooled
features, which no class of transformers has.
"""

_MERGED_STOCK = """## Use

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForSequenceClassification.from_pretrained("FOLDER").eval()
batch = tokenizer(["a text"], return_tensors="pt", padding=True, truncation=True, max_length=LENGTH)
logits = model(**batch).logits
```

`FOLDER` is this folder.
"""

_MERGED_IMAGES = """## Use

```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("FOLDER")
model = AutoModelForImageClassification.from_pretrained("FOLDER").eval()
images = [Image.open("a.png")]
batch = processor(images, return_tensors="pt")
logits = model(**batch).logits
```

`FOLDER` is this folder.
"""

_MERGED_OTHER = """## Use

```python
from transformers import CLASS

model = CLASS.from_pretrained("FOLDER").eval()
```

`FOLDER` is this folder.
"""

_MERGED_POOLED = """## Use

`AutoModel` loads the fine-tuned encoder. The head is a linear layer on mean-pooled features, which no class
of transformers has: these lines apply it.

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
encoder = AutoModel.from_pretrained("FOLDER").eval()
head = load_file("FOLDER/classifier.safetensors")

batch = tokenizer(["a text"], return_tensors="pt", padding=True, truncation=True, max_length=LENGTH)
mask = batch["attention_mask"].unsqueeze(-1)
with torch.no_grad():
    hidden = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    features = (hidden * mask).sum(1) / mask.sum(1)
    logits = SCALE * features.float() @ head["weight"].T + head["bias"]
```

`FOLDER` is this folder; `config.json` has the labels' names.
"""
