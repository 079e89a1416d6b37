"""`mpifedlora methods`: the presets and the switches that define them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click


@click.command("methods", epilog="\b\nExample:\n  mpifedlora methods --json")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(as_json: bool) -> None:
    """Show the methods: their papers and the switches that they set.

    A method is a preset of the run file's keys ([federation] method). The keys that it sets win over the
    run file; its defaults apply where the run file is silent, and go together: a file that names one of
    their kinds chooses all of them itself. `custom` leaves every switch to the file.
    The table leaves out what is the run file's default anyway; --json has every key.
    """
    click.echo(_as_json() if as_json else _as_table())


def _as_json() -> str:
    import dataclasses
    import json

    from mpifedlora.core.methods import METHODS

    return json.dumps([dataclasses.asdict(method) for method in METHODS.values()], indent=2)


def _as_table() -> str:
    from mpifedlora.core.methods import METHODS

    blocks = []
    for method in METHODS.values():
        head = [f"{method.name:<12}{method.title}"] + [f"{'':<12}{method.paper}"] * bool(method.paper)
        blocks += [*head, *_lines("", method.settings), *_lines("default ", method.defaults), ""]
    return "\n".join(blocks).rstrip()


def _lines(word: str, switches: Mapping[str, Any]) -> list[str]:
    import json
    import textwrap

    from mpifedlora.core.method_config import default_of

    unlike = [f"{key}~=~{json.dumps(value)}" for key, value in switches.items() if value != default_of(key)]
    if switches and not unlike:
        unlike = ["(the run file's defaults)"]
    indent = " " * 12
    lines = textwrap.wrap(", ".join(unlike), 100, initial_indent=indent + word, subsequent_indent=indent)
    return [line.replace("~", " ") for line in lines]
