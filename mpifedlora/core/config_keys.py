"""The keys of a run file, and the values that some of them choose from."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from mpifedlora.core.config import RunConfig
from mpifedlora.core.methods import METHODS


def setting_keys() -> list[str]:
    """Return the dotted keys of all tables, in the order of the reference."""
    return [f"{section}.{name}" for section, table in _tables() for name in table.model_fields]


def setting_values(key: str) -> list[str]:
    """Return what a key may be, as in a run file, where there are a few choices; else nothing.

    Args:
        key: dotted.

    >>> setting_values("annealing.cut"), setting_values("training.compile"), setting_values("lora.rank_max")
    (['drop', 'freeze'], ['true', 'false'], [])
    """
    if key == "federation.method":
        return list(METHODS)
    section, _, name = key.partition(".")
    table = dict(_tables()).get(section)
    return (
        []
        if table is None or name not in table.model_fields
        else _choices(table.model_fields[name].annotation)
    )


def _tables() -> Iterator[tuple[str, Any]]:
    for section, field in RunConfig.model_fields.items():
        yield section, field.annotation


def _choices(annotation: Any) -> list[str]:
    if annotation is bool:
        return ["true", "false"]
    origin = get_origin(annotation)
    if origin is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if origin in (Union, types.UnionType):
        return [choice for one in get_args(annotation) for choice in _choices(one)]
    return []
