"""From pydantic's errors to sentences: what must hold, got what (where); what to do."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mpifedlora.io.config_reference import (
    Schema,
    alternatives_of,
    describe_bounds,
    describe_requirement,
    section_models,
    section_schema,
)

Tables = Mapping[str, Any]

_LONGEST_VALUE = 60
_LARGEST_SHOWN = 10**18
_REMEDIES = {
    "greater_than": "raise it",
    "greater_than_equal": "raise it",
    "less_than": "lower it",
    "less_than_equal": "lower it",
}
_ADVICE: dict[tuple[str, type], str] = {
    ("integer", str): "write a number without quotes",
    ("number", str): "write a number without quotes",
    ("boolean", str): "write true or false without quotes",
    ("boolean", int): "write true or false",
    ("integer", bool): "write a number",
    ("number", bool): "write a number",
    ("integer", float): "write a whole number",
    **{("array", kind): "put square brackets around it" for kind in (str, int, float)},
    **{("string", kind): "put it in quotes" for kind in (bool, int, float)},
}


@dataclass(frozen=True)
class Origin:
    """Where each key was set: in the run file or by an override.

    `overrides` maps a dotted key, or a table that only overrides mention, to the override's text.

    >>> origin = Origin("run.toml", {"lora.alpha": "--set lora.alpha=0"})
    >>> origin.of("lora.alpha"), origin.of("lora.rank_max"), origin.of("")
    ('--set lora.alpha=0', 'run.toml: [lora]', 'run.toml')
    """

    file: str
    overrides: Mapping[str, str]

    def of(self, key: str) -> str:
        """Return the place of a dotted key, of a table, or (empty key) of the whole."""
        section = key.partition(".")[0]
        at_file = f"{self.file}: [{section}]" if section in section_models() else self.file
        return self.overrides.get(key, at_file)


def show(value: object) -> str:
    """Write a value of any kind as one short line.

    Args:
        value: What TOML can hold.

    Returns:
        Printable text, close to TOML, of at most 60 characters.

    >>> show({"a": 1}), show(True), show(["q", 2])
    ('a table', 'true', '["q", 2]')
    """
    if isinstance(value, list):
        return shorten(f"[{', '.join(map(_show_scalar, value[:_LONGEST_VALUE]))}]")
    return shorten(_show_scalar(value))


def shorten(text: str, longest: int = _LONGEST_VALUE) -> str:
    """Cut a text to one short printable line.

    Args:
        text: Any text.
        longest: Characters that may remain, at least 3.

    Returns:
        The text itself where it is short and printable.

    >>> shorten("abcdefgh", 6)
    'abc...'
    """
    line = text[: longest + 1]
    line = line if line.isprintable() else ascii(line)[1:-1]
    return line if len(line) <= longest else line[: longest - 3] + "..."


def _show_scalar(value: object) -> str:
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, (str, bool)):
        return json.dumps(value[:_LONGEST_VALUE] if isinstance(value, str) else value)
    if isinstance(value, int) and abs(value) > _LARGEST_SHOWN:
        # Python refuses to write out whole numbers of more than 4300 digits.
        return "a huge number"
    return "[...]" if isinstance(value, list) else str(value)


def locate(message: str, place: str) -> str:
    """Put the place into a message that has none.

    Args:
        message: `what must hold, got what; what to do`.
        place: Where the value stands.

    Returns:
        `what must hold, got what (place); what to do`.

    >>> locate("lora.alpha must be above 0, got 0; raise it", "run.toml: [lora]")
    'lora.alpha must be above 0, got 0 (run.toml: [lora]); raise it'
    """
    fact, separator, remedy = message.partition("; ")
    return f"{fact} ({place}){separator}{remedy}"


def explain(error: ValidationError, tables: Tables, origin: Origin) -> dict[str, str]:
    """Turn pydantic's errors into one sentence each.

    Args:
        error: What checking the tables raised.
        tables: The tables that were checked.
        origin: Where each key was set.

    Returns:
        One line per dotted key or table, in the models' order; a rule that spans tables has the empty key.
    """
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False, include_input=False):
        # A union reports each of its members, and a list each of its items: the first is enough.
        lines.setdefault(".".join(map(str, detail["loc"][:2])), _explain_one(detail, tables, origin))
    return lines


def _explain_one(detail: ErrorDetails, tables: Tables, origin: Origin) -> str:
    kind, names = detail["type"], [str(name) for name in detail["loc"][:2]]
    place = origin.of(".".join(names))
    if kind == "value_error":
        return locate(detail["msg"].removeprefix("Value error, "), place)
    if kind == "missing":
        return locate(_missing(*names), f"{origin.file}: [{names[0]}]")
    if kind == "extra_forbidden":
        return locate(_unknown_key(*names) if len(names) > 1 else _unknown_table(names[0], tables), place)
    if len(names) == 1:
        return locate(_no_table(names[0], tables), origin.file)
    section, key = names
    return locate(
        f"{section}.{key} {_wrong_value(kind, section_schema(section)[key], tables[section][key])}", place
    )


def _missing(section: str, key: str = "") -> str:
    schemas = section_schema(section)
    wanted = key or next(name for name, schema in schemas.items() if "default" not in schema)
    meaning = schemas[wanted]["description"].rstrip(".")
    return f"{section}.{wanted} must be given, got nothing; add {wanted} to [{section}]: {meaning}"


def _no_table(name: str, tables: Tables) -> str:
    return f"[{name}] must be a table, got {show(tables[name])}; write it as [{name}]"


def _unknown_key(section: str, key: str) -> str:
    known = list(section_schema(section))
    remedy = _near(key, known) or _elsewhere(key) or f"known keys are {', '.join(known)}"
    return f"[{section}] must hold known keys only, got {shorten(key) or repr(key)}; {remedy}"


def _unknown_table(name: str, tables: Tables) -> str:
    known = list(section_models())
    remedy = _near(name, known) or f"known tables are {', '.join(known)}"
    if isinstance(tables[name], Mapping):
        return f"the run file must hold known tables only, got [{shorten(name)}]; {remedy}"
    return f"the run file must hold keys in tables only, got {shorten(name)}; {_elsewhere(name) or remedy}"


def _near(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name[:_LONGEST_VALUE].lower(), known, n=1)
    return f"did you mean {matches[0]}?" if matches else ""


def _elsewhere(key: str) -> str:
    homes = [f"[{section}]" for section in section_models() if key in section_schema(section)]
    return f"{key} belongs in {' or '.join(homes)}" if homes else ""


def _wrong_value(kind: str, schema: Schema, value: object) -> str:
    got = f"got {show(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be finite, {got}; write a finite number"
    (option, *_) = alternatives_of(schema)
    # A bound may also be that of a list's items.
    if kind in _REMEDIES and not isinstance(value, list):
        bounds = describe_bounds(option, with_largest=kind.startswith("less"))
        return f"must be {bounds}, {got}; {_REMEDIES[kind]}{_or_default(schema, ', or leave it out')}"
    return f"must be {describe_requirement(schema)}, {got}; {_remedy(option, value, schema)}"


def _remedy(option: Schema, value: object, schema: Schema) -> str:
    if "enum" in option:
        near = isinstance(value, str) and _near(value, option["enum"])
        return near or "choose one of them"
    if isinstance(value, list) and "items" in option:
        is_text = option["items"]["type"] == "string"
        return (
            "put each in quotes" if is_text else "correct the list" + _or_default(schema, ", or leave it out")
        )
    advice = _ADVICE.get((option["type"], type(value)))
    return advice or _or_default(schema, "leave it out") or "give one"


def _or_default(schema: Schema, words: str) -> str:
    if "default" not in schema:
        return ""
    return words if schema["default"] is None else f"{words} for {json.dumps(schema['default'])}"
