"""In which keys configurations differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Tables = Mapping[str, Mapping[str, Any]]

CHANGES_NO_NUMBER = (
    "checkpoint.",
    "tracking.",
    "faults.policy",
    "faults.worker_timeout_s",
    "transport.pipeline",
    "transport.chunk_bytes",
    "transport.gpu_buffers",
)
"""Keys, and beginnings of keys, that change no number of a run."""


def differing_keys(configs: Sequence[Tables]) -> dict[str, list[Any]]:
    """Return the keys whose values are not the same in all configurations, with the value in each.

    Args:
        configs: tables of keys; a missing key counts as None.

    >>> differing_keys([{"lora": {"rank_max": 8, "rank_min": 2}}, {"lora": {"rank_max": 4, "rank_min": 2}}])
    {'lora.rank_max': [8, 4]}
    """
    keys = sorted({(table, key) for config in configs for table, values in config.items() for key in values})
    found = {f"{table}.{key}": [config.get(table, {}).get(key) for config in configs] for table, key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}
