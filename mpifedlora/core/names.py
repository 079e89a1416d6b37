"""Names of layers, and what to say about one that is not there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def describe_no_match(target: str, layer_names: Iterable[str], *, is_pattern: bool = False) -> str:
    """Say that a target module matches none of the linear layers, and which one may be meant.

    >>> describe_no_match("querry", ["a.query", "a.key"]).rpartition("; ")[2]
    'did you mean "query"?'
    """
    endings = sorted({name.rpartition(".")[2] for name in layer_names})
    near = difflib.get_close_matches(target.rpartition(".")[2], endings, n=1)
    advice = f'did you mean "{near[0]}"?' if near else 'use one of them, or "all-linear"'
    if is_pattern and near:
        advice = f'a text is a pattern for whole names: did you mean the list ["{near[0]}"]?'
    return (
        f"lora.target_modules must match linear layers of the model, got {target!r}, which matches none "
        f"(their names end in {', '.join(endings)}); {advice}"
    )
