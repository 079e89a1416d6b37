"""Named methods: presets of the run file's orthogonal switches.

A preset's `settings` define the method and win over the run file; its `defaults` apply where the run
file is silent, and go together: a file that names one of their kinds chooses all of them itself. No method
has code of its own: the round loop reads nothing but the switches.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mpifedlora.errors import ConfigError

Value = bool | str | int | float
Table = dict[str, Any]

DEFAULT_METHOD = "sa-fedlora"
_ABSENT = object()


@dataclass(frozen=True)
class Method:
    """A preset: what it is called, where it comes from, which switches it sets.

    Keys of `settings` and `defaults` are dotted, as in `training.mu`.

    >>> METHODS["fedit"].settings["aggregation.kind"]
    'factors'
    """

    name: str
    title: str
    paper: str
    settings: Mapping[str, Value] = field(default_factory=dict)
    defaults: Mapping[str, Value] = field(default_factory=dict)


_PLAIN_CLIENTS: Mapping[str, Value] = {
    "training.mu": 0.0,
    "training.personal": "none",
    "training.control_variates": False,
}
_NO_OTHER: Mapping[str, Value] = {**_PLAIN_CLIENTS, "server_optimizer.kind": "none"}
_FIXED_RANK = {
    "initiating.rounds": 0,
    "annealing.schedule": "constant",
    "annealing.allocation": "uniform",
    **_NO_OTHER,
}
_FULL = {"training.scope": "full", **_FIXED_RANK}
_ADAPTER = {"training.scope": "adapter", **_FIXED_RANK}

_PRESETS = (
    Method(
        "sa-fedlora",
        "Simulated annealing: LoRA with a falling rank",
        "arXiv 2405.09394 v1",
        settings={"training.scope": "adapter", **_PLAIN_CLIENTS},
        # The best that docs/study.md found.
        defaults={
            "aggregation.kind": "factors",
            "server_optimizer.kind": "momentum",
            "server_optimizer.beta1": 0.5,
        },
    ),
    Method("fedavg", "Federated averaging of the whole model", "arXiv 1602.05629", settings=_FULL),
    Method(
        "fedprox",
        "Federated averaging of the whole model with a proximal term",
        "arXiv 1812.06127",
        settings={key: value for key, value in _FULL.items() if key != "training.mu"},
        defaults={"training.mu": 0.01},
    ),
    Method(
        "scaffold",
        "Federated averaging of the whole model, each client's drift corrected by control variates",
        "arXiv 1910.06378",
        settings={
            **_FULL,
            "training.control_variates": True,
            "aggregation.weights": "equal",
            "training.optimizer": "sgd",
            "training.momentum": 0.0,
            "training.head_rate_factor": 1.0,
        },
        defaults={"training.full_learning_rate": 0.3},
    ),
    Method(
        "fedavgm",
        "Federated averaging of the whole model, momentum on the server",
        "arXiv 1909.06335",
        settings={**_FULL, "server_optimizer.kind": "momentum"},
    ),
    Method(
        "fedadam",
        "Federated averaging of the whole model, Adam on the server",
        "arXiv 2003.00295",
        settings={**_FULL, "server_optimizer.kind": "fedadam"},
    ),
    Method(
        "fedit",
        "LoRA at a fixed rank, A and B averaged apart",
        "arXiv 2305.05644",
        settings={**_ADAPTER, "aggregation.kind": "factors"},
    ),
    Method(
        "ffa-lora",
        "LoRA with a fixed A: B alone is trained and averaged",
        "arXiv 2403.12313",
        settings={**_ADAPTER, "training.scope": "b-only", "aggregation.kind": "factors"},
    ),
    Method(
        "rolora",
        "LoRA whose B and A are trained and averaged in turn",
        "arXiv 2409.02346 v1, later 2502.01755",
        settings={**_ADAPTER, "training.scope": "alternating", "aggregation.kind": "factors"},
    ),
    Method(
        "fedsa-lora",
        "LoRA whose A is shared and whose B stays with its client",
        "arXiv 2410.01463",
        settings={**_ADAPTER, "training.personal": "b", "aggregation.kind": "factors"},
        defaults={"evaluation.model": "personal"},
    ),
    Method(
        "flora",
        "LoRA stacked: every round the clients' exact sum goes into the base and LoRA starts afresh",
        "arXiv 2409.05976",
        settings={**_ADAPTER, "aggregation.kind": "stack"},
    ),
    Method(
        "fedex-lora",
        "LoRA with A and B averaged apart, what that misses of the exact sum put into the base",
        "arXiv 2410.09432",
        settings={**_ADAPTER, "aggregation.kind": "residual"},
    ),
    Method(
        "flexlora",
        "LoRA with a rank for each client, the exact sum cut to it by SVD",
        "arXiv 2402.11505",
        settings={**_ADAPTER, "aggregation.kind": "product"},
    ),
    Method(
        "hetlora",
        "LoRA with a rank for each client, padded with zeros and weighted by norm",
        "arXiv 2401.06432",
        settings={**_ADAPTER, "aggregation.kind": "zero-pad", "aggregation.weights": "frobenius"},
    ),
    Method("custom", "Every switch as the run file says", ""),
)
METHODS: Mapping[str, Method] = {method.name: method for method in _PRESETS}


def find_method(name: str) -> Method:
    """Return the preset of that name.

    Args:
        name: One of `METHODS`.

    Returns:
        The preset.

    Raises:
        ConfigError: No preset has that name; the message has the nearest one.

    >>> find_method("fedavg").paper
    'arXiv 1602.05629'
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name.lower(), METHODS, n=1)
    remedy = f'did you mean "{near[0]}"?' if near else "see `mpifedlora methods`"
    shown = ascii(name if len(name) <= 60 else name[:57] + "...")
    raise ConfigError(f"federation.method must be one of {', '.join(METHODS)}, got {shown}; {remedy}")


def apply_method(raw: Mapping[str, Any]) -> tuple[Table, tuple[str, ...]]:
    """Put the chosen preset's switches into a run file's tables.

    Tables or names of a wrong type are passed on as they are: the models report them.

    Args:
        raw: The run file as nested tables, `federation.method` included (`sa-fedlora` if it is silent).

    Returns:
        New nested tables, and the dotted keys that the file set to something else and that are
        therefore ignored.

    Raises:
        ConfigError: Unknown method, or `fedprox` without its proximal term.

    >>> tables, ignored = apply_method({"federation": {"method": "fedavg"}, "training": {"mu": 0.1}})
    >>> tables["training"]["scope"], tables["training"]["mu"], ignored
    ('full', 0.0, ('training.mu',))
    """
    method = find_method(_chosen_name(raw))
    _check_proximal_term(method, raw)
    tables = {name: dict(table) if isinstance(table, Mapping) else table for name, table in raw.items()}
    silent = {key: value for key, value in method.defaults.items() if _get(raw, key) is _ABSENT}
    chosen = any(key.endswith(".kind") for key in method.defaults.keys() - silent)
    for key, value in {**method.settings, **({} if chosen else silent)}.items():
        _put(tables, key, value)
    return tables, tuple(
        key for key, value in method.settings.items() if _get(raw, key) not in (_ABSENT, value)
    )


def _chosen_name(raw: Mapping[str, Any]) -> str:
    name = _get(raw, "federation.method")
    if name is _ABSENT:
        return DEFAULT_METHOD
    # A name that is no text is left to the models, and no preset may get in their way.
    return name if isinstance(name, str) else "custom"


def _check_proximal_term(method: Method, raw: Mapping[str, Any]) -> None:
    mu = _get(raw, "training.mu")
    if method.name == "fedprox" and mu == 0 and not isinstance(mu, bool):
        raise ConfigError(
            f"training.mu must be above 0 with method fedprox, got {mu}; without its proximal term "
            'fedprox is fedavg: set training.mu, or federation.method = "fedavg"'
        )


def _get(raw: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    table = raw.get(section, {})
    return table.get(name, _ABSENT) if isinstance(table, Mapping) else _ABSENT


def _put(tables: Table, key: str, value: Value) -> None:
    section, _, name = key.partition(".")
    table = tables.setdefault(section, {})
    if isinstance(table, dict):
        table[name] = value
