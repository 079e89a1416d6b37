"""Overrides of a run file's keys, as `--set section.key=value` gives them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpifedlora.errors import ConfigError
from mpifedlora.io.config_errors import shorten

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Tables = dict[str, Any]

ALTERNATIVES = (("training.local_steps", "training.local_epochs"),)
"""Groups of keys of which a run has at most one: to override one is to take the others out of the file."""

_DOTTED_KEY = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")


@dataclass(frozen=True)
class Override:
    """One key's new value; `text` is how the user wrote it, cut to one short line."""

    section: str
    key: str
    value: Any
    text: str

    @property
    def dotted(self) -> str:
        """The dotted key."""
        return f"{self.section}.{self.key}"


def parse_override(text: str) -> Override:
    """Read one override.

    Args:
        text: `section.key=value`; the value is read as TOML, else as text.

    Returns:
        The override.

    Raises:
        ConfigError: No such form, or a value that begins like a TOML list, table or text and is none.

    >>> parse_override("lora.rank_max=8").value, parse_override("data.source=reuters-r8").value
    (8, 'reuters-r8')
    """
    name, equals, value = text.partition("=")
    match = _DOTTED_KEY.fullmatch(name.strip())
    shown = shorten(text)
    if not equals or match is None:
        example = "for example --set training.local_steps=4"
        raise ConfigError(f"--set must be section.key=value, got {shown}; {example}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"--set must be UTF-8 text, got {shown}; check the terminal's encoding") from None
    return Override(match[1], match[2], _parse_value(value.strip(), shown), f"--set {shown}")


def make_override(dotted_key: str, value: Any) -> Override:
    """Return the override that a script gives as a key and a value.

    Args:
        dotted_key: `section.key`.
        value: what the run file would hold; paths and tuples are taken as texts and lists.

    Raises:
        ConfigError: No such form.

    >>> make_override("lora.target_modules", ("query", "value")).value
    ['query', 'value']
    """
    match = _DOTTED_KEY.fullmatch(dotted_key)
    if match is None:
        example = 'for example {"training.local_steps": 4}'
        raise ConfigError(
            f"an override's key must be section.key, got {shorten(repr(dotted_key))}; {example}"
        )
    return Override(match[1], match[2], _plain(value), f"override {shorten(f'{dotted_key}={value!r}')}")


def plain_table(table: Any) -> Any:
    """Return a table as TOML would hold it: paths as texts, tuples as lists, without the keys set to None.

    >>> from pathlib import Path
    >>> plain_table({"name": Path("model"), "dropout": None})
    {'name': 'model'}
    """
    if not isinstance(table, Mapping):
        return table
    return {key: _plain(value) for key, value in table.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _parse_value(value: str, shown: str) -> Any:
    try:
        tables = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        tables = {}
    if list(tables) == ["value"]:
        return tables["value"]
    if value.startswith(("[", "{", '"', "'")):
        # The shell takes unprotected quotes away: as text, [query] would pass for a regular expression.
        fact = f"a --set value that begins with {value[0]} must be valid TOML, got {shown}"
        raise ConfigError(f'{fact}; put the whole in quotes for the shell, as in \'section.key=["a", "b"]\'')
    return value


def apply_overrides(tables: Tables, overrides: Sequence[Override]) -> Tables:
    """Put overrides into a run file's tables; the last one of a key wins.

    Args:
        tables: The run file; what should be a table and is none stays, to be reported by the models.
        overrides: In the order given.

    Returns:
        New nested tables.

    >>> steps = parse_override("training.local_steps=4")
    >>> apply_overrides({"training": {"local_epochs": 1, "batch_size": 8}}, [steps])
    {'training': {'batch_size': 8, 'local_steps': 4}}
    """
    named = {override.dotted for override in overrides}
    replaced = {rival for group in ALTERNATIVES if named & set(group) for rival in group}
    changed = {name: _without(replaced, name, table) for name, table in tables.items()}
    for override in overrides:
        table = changed.setdefault(override.section, {})
        if isinstance(table, dict):
            table[override.key] = override.value
    return changed


def _without(dotted_keys: set[str], name: str, table: Any) -> Any:
    if not isinstance(table, dict):
        return table
    return {key: value for key, value in table.items() if f"{name}.{key}" not in dotted_keys}
