"""Make a tiny language model and instructions for it, without any download, for examples/causal_lm.toml.

    python examples/make_tiny_lm.py runs/tiny-lm

It writes a folder `model`, a Llama of about 0.2 M parameters with a tokenizer of bytes whose weights are
RANDOM (it knows no language), and `instructions.jsonl`: to say a word in capitals, twice, or its first one.
So a run shows that everything works, and what it learns comes from these examples alone. For real work give a
trained model: model.name = "a folder or a hub name".
"""

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WAYS = {"capitals": str.upper, "twice": lambda word: word + word, "first": lambda word: word[0]}
SYLLABLES = ["ba", "de", "fi", "go", "lu", "ma", "ne", "ri", "so", "tu"]


def make_model(folder: Path) -> None:
    """Write a Llama with random weights, and a tokenizer of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make_instructions(file: Path, count: int = 4000) -> None:
    """Write prompts with their responses; `way` is what a federation shares out by."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as lines:
        for _ in range(count):
            word = "".join(draw.choices(SYLLABLES, k=draw.randint(1, 3)))
            way = draw.choice(list(WAYS))
            row = {"prompt": f"{way}: {word}", "response": WAYS[way](word), "way": way}
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny-lm")
    out.mkdir(parents=True, exist_ok=True)
    make_model(out / "model")
    make_instructions(out / "instructions.jsonl")
    print(f"wrote {out}/model (random weights) and {out}/instructions.jsonl")
