"""Write a small vision transformer with random weights: `python make_tiny_vit.py FOLDER`.

28 x 28 grey images in 16 patches, 4 layers, 64 wide, 138 thousand parameters. No small vision transformer
with trained weights comes from a package index, so `vision.toml` trains this one from scratch, which its
first stage (`initiating.scope = "full"`) is good for.
"""

import sys

import torch
from transformers import ViTConfig, ViTModel

torch.manual_seed(0)
config = ViTConfig(
    image_size=28,
    patch_size=7,
    num_channels=1,
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=128,
)
folder = sys.argv[1] if len(sys.argv) > 1 else "vit-tiny"
ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
print(f"{folder}: a vision transformer of random weights")
