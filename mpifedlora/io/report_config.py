"""The report's sections on the configuration: the schedule's formula, and every key with its value."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from mpifedlora.core.formulas import Formula, rank_formula, rate_formula
from mpifedlora.core.method_config import RunTables
from mpifedlora.core.methods import METHODS
from mpifedlora.io.html import Html, element, join, link_papers, math, table
from mpifedlora.io.results_schema import RunInfo


def config_tables(info: RunInfo) -> dict[str, dict[str, Any]]:
    """Return the run's configuration as tables of keys; empty where it is no such thing."""
    try:
        tables: Any = json.loads(info.config)
    except (ValueError, RecursionError):
        return {}
    named = tables.items() if isinstance(tables, dict) else ()
    return {name: keys for name, keys in named if isinstance(keys, dict)}


def num_planned_rounds(info: RunInfo) -> int | None:
    """Return the rounds that the run was to have, None where its configuration does not tell."""
    planned = config_tables(info).get("federation", {}).get("num_rounds")
    return planned if isinstance(planned, int) else None


def formula_section(info: RunInfo) -> Html:
    """Return the formulas of rank budget and learning rate, with the run's numbers and their source."""
    try:
        config = RunTables.model_validate_json(info.config)
    except ValidationError:
        return element("p", "This version of mpifedlora does not know the run's configuration.")
    budget = rank_formula(config)
    method = METHODS.get(info.method)
    parts = [_formula("LoRA rank of round t", budget)] if budget else []
    if budget is None:
        parts.append(element("p", "The whole model is trained: there is no LoRA rank."))
    elif config.initiating.rounds and config.initiating.scope == "full":
        parts.append(element("p", "In the initiating stage the whole model is trained, without LoRA."))
    parts.append(_formula("Learning rate of round t", rate_formula(config)))
    if method and method.paper:
        parts.append(
            element("p", f"{info.method}: {method.title}. ", link_papers(method.paper), class_="quiet")
        )
    return join(parts)


def _formula(title: str, formula: Formula) -> Html:
    lines = [element("p", math(f"{left} = {right}"), class_="math") for left, right in formula.equations]
    values = join(
        (element("span", math(f"{k} = {v:g}"), class_="one") for k, v in formula.values.items()), ", "
    )
    parts = [element("h3", title), *lines, element("p", "with ", values, class_="math")]
    if formula.notes:
        parts.append(element("p", _sentence(formula.notes)))
    if formula.source:
        parts.append(element("p", "Source: ", link_papers(formula.source), class_="quiet"))
    return element("div", join(parts), class_="formula")


def _sentence(text: str) -> str:
    return f"{text[0]}{text[1:]}."


def config_section(info: RunInfo) -> Html:
    """Return every table of the run file; what differs from the default is set off."""
    tables = config_tables(info)
    if not tables:
        return element("p", "The results hold no configuration.")
    words = (
        "In bold: what is not the run file's default. run.toml beside the results is the same as a run file."
    )
    cards = [_card(name, keys) for name, keys in tables.items()]
    return join([element("p", words, class_="quiet"), element("div", join(cards), class_="config")])


def _card(name: str, keys: dict[str, Any]) -> Html:
    return element("section", element("h3", f"[{name}]"), table((), _rows(name, keys)))


def _rows(name: str, keys: dict[str, Any]) -> Iterator[tuple[object, object]]:
    defaults = _defaults(name)
    for key, value in keys.items():
        shown = "none" if value is None else json.dumps(value, ensure_ascii=False)
        is_default = key in defaults and defaults[key] == value
        yield (key, shown) if is_default else (element("b", key), element("b", shown))


def _defaults(name: str) -> dict[str, Any]:
    if name not in RunTables.model_fields:
        return {}
    fields: dict[str, Any] = getattr(RunTables.model_fields[name].annotation, "model_fields", {})
    undefined: Any = PydanticUndefined
    defaults = {key: one.get_default(call_default_factory=True) for key, one in fields.items()}
    return {key: value for key, value in defaults.items() if value is not undefined}
