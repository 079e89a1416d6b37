"""Tiny causal language models with random weights, and a tokenizer of words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import support

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>"]
VOCABULARY = len(SPECIAL) + len(support.WORDS)


def make_tokenizer(folder: Path, *, template: str | None = None) -> Any:
    """Write a tokenizer of words; with a template it writes conversations by it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate([*SPECIAL, *support.WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


def make_language_model(
    folder: Path, kind: str = "llama", *, template: str | None = None, **sizes: Any
) -> Path:
    """Write a tiny model of a kind of transformers' into a folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    plain = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    plain |= {"max_position_embeddings": 64, "initializer_range": 0.2}
    small = {"gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.2}}
    config = AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **small.get(kind, plain) | sizes,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer(folder, template=template)
    return folder
