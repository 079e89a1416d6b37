"""The reference of the run file, written from the models themselves.

What a key may hold is said here once; `docs/configuration.md` and the messages of
`mpifedlora.io.config_errors` use the same words.
"""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, cast

from mpifedlora.core.config import RunConfig
from mpifedlora.core.methods import METHODS, Method
from mpifedlora.core.sections import LARGEST_INT, Section

Schema = Mapping[str, Any]

_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "object": "a table",
}
_ITEMS = {"integer": "whole numbers", "number": "numbers", "string": "texts"}
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}
_INTRODUCTION = f"""
# The run file

<!-- Written by `python -m mpifedlora.io.config_reference`; a test holds it equal to the models. -->

A run is described by one TOML file. Only `model.name` and `data.source` must be given. Unknown keys and
values out of range are errors, and several errors are reported together. Whole numbers go up to
{LARGEST_INT}; numbers are finite.

- `--set section.key=value` (repeatable) overrides the file. The value is read as TOML, else as text:
  `--set data.source=reuters-r8`, `--set training.local_steps=4`,
  `--set 'lora.target_modules=["query", "value"]'` (quoted, or the shell takes the quotes away). An override
  of one of `training.local_steps` and `training.local_epochs` takes the other one out of the file.
- Relative paths in `model.name`, `data.source`, `data.test_source` and `task.name` are looked up in the
  current directory, then beside the run file.
- The [method](#methods) sets some keys itself; what the file says otherwise is ignored, and said so.
- The resolved configuration is kept with the results as `run.toml`, and is a run file again.
""".lstrip()


def section_models() -> dict[str, type[Section]]:
    """Return the model of each table of the run file, in the file's order.

    Returns:
        Section name to model.

    >>> list(section_models())[:2]
    ['model', 'data']
    """
    return {name: cast(type[Section], field.annotation) for name, field in RunConfig.model_fields.items()}


@cache
def section_schema(section: str) -> Schema:
    """Return the JSON schemas of one table's keys.

    Args:
        section: A table of the run file.

    Returns:
        Key to schema: type, bounds, default, description.

    >>> section_schema("lora")["rank_max"]["default"]
    16
    """
    properties: dict[str, Any] = section_models()[section].model_json_schema()["properties"]
    if section == "federation":
        # The model knows no preset: they are checked where they are applied.
        properties["method"]["enum"] = list(METHODS)
    return properties


def describe_bounds(schema: Schema, with_largest: bool = False) -> str:
    """Say the range of a number in words.

    Args:
        schema: One key's schema.
        with_largest: Also say the bound that every whole number has.

    Returns:
        Such as `at least 0 and below 1`; empty without bounds.

    >>> describe_bounds({"minimum": 0, "exclusiveMaximum": 1.0})
    'at least 0 and below 1'
    """
    bounds = {word: schema[word] for word in _BOUNDS if word in schema}
    if not with_largest and bounds.get("maximum") == LARGEST_INT:
        del bounds["maximum"]
    return " and ".join(_BOUNDS[word].format(f"{value:.12g}") for word, value in bounds.items())


def alternatives_of(schema: Schema) -> list[Schema]:
    """Return the schemas that a value may fit, `null` left out.

    Args:
        schema: One key's schema.

    Returns:
        One schema, or several for a union.

    >>> alternatives_of({"anyOf": [{"type": "string"}, {"type": "null"}]})
    [{'type': 'string'}]
    """
    return [option for option in schema.get("anyOf", [schema]) if option.get("type") != "null"]


def describe_requirement(schema: Schema) -> str:
    """Say what a value must be, in words that follow `must be`.

    Args:
        schema: One key's schema.

    Returns:
        Such as `a whole number, at least 1`.

    >>> describe_requirement(section_schema("lora")["rank_max"])
    'a whole number, at least 1'
    """
    return " or ".join(_describe_option(option) for option in alternatives_of(schema))


def _describe_option(schema: Schema) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(json.dumps(value) for value in schema["enum"])
    if schema["type"] == "array":
        items = schema["items"]
        bounds, kind = describe_bounds(items), "these" if "enum" in items else _ITEMS[items["type"]]
        return (
            f"a list of {kind}" + f", each {bounds}" * bool(bounds) + ", not empty" * ("minItems" in schema)
        )
    details = describe_bounds(schema) or ("not empty" if "minLength" in schema else "")
    kind = _KINDS[schema["type"]]
    return f"{kind}, {details}" if details else kind


def configuration_reference() -> str:
    """Write the reference of all keys and methods as Markdown.

    Returns:
        The text of `docs/configuration.md`.

    >>> "| `rank_max` | a whole number, at least 1 | `16` |" in configuration_reference()
    True
    """
    parts = [_INTRODUCTION, *map(_section_part, section_models()), _methods_part()]
    return "\n".join(parts)


def _section_part(section: str) -> str:
    title = inspect.getdoc(section_models()[section]) or ""
    summary = title.partition("\n\n")[0].partition(": ")[2]
    rows = [_row(key, schema) for key, schema in section_schema(section).items()]
    head = ["| Key | Type and range | Default | Meaning |", "|---|---|---|---|"]
    return "\n".join([f"## `[{section}]`", "", summary[:1].upper() + summary[1:], "", *head, *rows, ""])


def _row(key: str, schema: Schema) -> str:
    cells = [f"`{key}`", describe_requirement(schema), _default(schema), schema.get("description", "")]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(schema: Schema) -> str:
    if "default" not in schema:
        # An empty list or table comes from a factory, which a schema does not show.
        return {"array": "`[]`", "object": "`{}`"}.get(schema.get("type", ""), "must be given")
    return "none" if schema["default"] is None else f"`{json.dumps(schema['default'])}`"


def _methods_part() -> str:
    head = ["| Method | What it is | Paper | Sets | Defaults to |", "|---|---|---|---|---|"]
    summary = (
        "`federation.method` names a preset. What it sets wins over the run file; what it defaults to "
        "applies where the file is silent, and goes together: a file that names one of its kinds chooses all "
        'of it itself. `sa-fedlora` with `aggregation.kind = "product"` takes exact sums and no momentum.'
    )
    return "\n".join(
        ["## Methods", "", *textwrap.wrap(summary, 110), "", *head, *map(_method_row, METHODS.values()), ""]
    )


def _method_row(method: Method) -> str:
    cells = [f"`{method.name}`", method.title, method.paper or "-"]
    cells += [", ".join(_assignments(switches)) or "-" for switches in (method.settings, method.defaults)]
    return "| " + " | ".join(cells) + " |"


def _assignments(switches: Mapping[str, Any]) -> Iterator[str]:
    return (f"`{key} = {json.dumps(value)}`" for key, value in switches.items())


if __name__ == "__main__":
    print(configuration_reference(), end="")
