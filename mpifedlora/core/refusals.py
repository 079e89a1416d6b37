"""How a rule between the tables of a run file says no."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from mpifedlora.core.method_config import RunTables


def value_of(config: RunTables, key: str) -> Any:
    """Return what a dotted key has."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def switch(config: RunTables, key: str) -> str:
    """Return a key and its value as a run file has them."""
    return f"{key} = {json.dumps(value_of(config, key))}"


def refuse(what: str, got: str, remedy: str) -> NoReturn:
    """Raise for a combination that makes no sense.

    Args:
        what: must hold.
        got: in its place.
        remedy: to take.

    Raises:
        ValueError: always.
    """
    raise ValueError(f"{what}, got {got}; {remedy}")


def needs(config: RunTables, subject: str, key: str, *allowed: str | float | bool, why: str) -> None:
    """Refuse a switch unless another has one of the values with which it makes sense."""
    if value_of(config, key) in allowed:
        return
    names = [json.dumps(value) for value in allowed]
    wanted = " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    refuse(
        f"{subject} needs {key} = {wanted} ({why})",
        json.dumps(value_of(config, key)),
        f"set {key} = {names[0]}, or leave {subject.partition(' ')[0]} out",
    )


def bars(config: RunTables, subject: str, key: str, why: str) -> None:
    """Refuse a switch beside a key that has a value."""
    if value_of(config, key) is not None:
        refuse(
            f"{subject} must stand without {key} ({why})",
            switch(config, key),
            f"leave {key} or {subject.partition(' ')[0]} out",
        )


def needs_one_scope(config: RunTables, subject: str, why: str) -> None:
    """Refuse a switch where the initiating stage trains something else than the rounds after it."""
    if config.initiating.rounds and config.initiating.scope != config.training.scope:
        refuse(
            f"{subject} needs the same scope in all rounds ({why})",
            f"{switch(config, 'initiating.scope')} and {switch(config, 'training.scope')}",
            f"set initiating.rounds = 0, or leave {subject.partition(' ')[0]} out",
        )
