"""Write one file a client from 20 Newsgroups, as sites would have them: `python per_client_files.py FOLDER`.

FOLDER gets six files of posts, each with its own mix of topics.
"""

import json
import sys
from pathlib import Path

from mpifedlora.core.partition import partition
from mpifedlora.io.datasets import read_dataset

SITES = ("bergen", "graz", "lyon", "porto", "split", "turku")


def write(path, examples, label_names):
    """Write examples as JSON, one a line."""
    rows = zip(examples.texts, examples.labels, strict=True)
    lines = [json.dumps({"text": text, "label": label_names[label]}) for text, label in rows]
    path.write_text("\n".join(lines) + "\n")
    print(f"{path}: {len(lines)} posts")


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "clients")
folder.mkdir(parents=True, exist_ok=True)
data = read_dataset("20newsgroups")
parts = partition("dirichlet", data.train.labels, len(SITES), seed=0, alpha=0.5)
for site, part in zip(SITES, parts, strict=True):
    write(folder / f"{site}.jsonl", data.train.take(part), data.label_names)
