"""What several verbs share: the option `--set`, and what a shell completes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click
from click.shell_completion import BashComplete, CompletionItem, ZshComplete, add_completion_class

F = TypeVar("F", bound=Callable[..., Any])
COMPLETE_VARIABLE = "_MPIFEDLORA_COMPLETE"


def settings_option(function: F) -> F:
    """Add the option `--set`, whose keys and values a shell completes."""
    option = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Override one key of the run file (repeatable). The value is read as TOML, else as text.",
        shell_complete=complete_setting,
    )
    return option(function)


def complete_setting(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the keys of a run file that begin so; behind the `=` of a key, its values."""
    from mpifedlora.core.config_keys import setting_keys, setting_values

    key, equals, value = incomplete.partition("=")
    if not equals:
        return [f"{one}=" for one in setting_keys() if one.startswith(key)]
    return [f"{key}={one}" for one in _with_packaged(key, setting_values(key)) if one.startswith(value)]


def _with_packaged(key: str, values: Iterable[str]) -> list[str]:
    from mpifedlora.io.data_fetch import PACKAGED

    kinds = {"data.source": "data", "model.name": "model"}
    return [*values, *(name for name, entry in PACKAGED.items() if entry.kind == kinds.get(key))]


def complete_packaged(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Return the names of packaged data and weights that begin so."""
    from mpifedlora.io.data_fetch import PACKAGED

    return [name for name in PACKAGED if name.startswith(incomplete)]


class _Bash(BashComplete):
    """Completion for Bash, which sees `key=value` as three words, and replaces the last of them alone."""

    # A key that is complete wants its value next, and no space.
    source_template = BashComplete.source_template.replace(
        "    return 0\n",
        "    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace\n    return 0\n",
        1,
    )
    joined = ""  # what comes before the last word in the text that it belongs to

    def get_completion_args(self) -> tuple[list[str], str]:
        args, incomplete = super().get_completion_args()
        merged: list[str] = []
        for word in [*args, incomplete]:
            goes_on = merged and (word == "=" or merged[-1].endswith("="))
            merged = [*merged[:-1], merged[-1] + word] if goes_on else [*merged, word]
        if merged[-1] != incomplete:
            self.joined = merged[-1].rpartition("=")[0] + "="
        return merged[:-1], merged[-1]

    def format_completion(self, item: CompletionItem) -> str:
        return f"{item.type},{str(item.value).removeprefix(self.joined)}"


class _Zsh(ZshComplete):
    """Completion for Zsh: no space behind a key either. Fish does so by itself."""

    source_template = ZshComplete.source_template.replace(
        "        compadd -U -V unsorted -a completions\n",
        "        local -a after; [[ $completions[1] == *= ]] && after=(-S '')\n"
        '        compadd "${after[@]}" -U -V unsorted -a completions\n',
        1,
    )


def prepare_completion() -> None:
    """Take this file's completion for Bash and Zsh, where a shell asks."""
    if COMPLETE_VARIABLE in os.environ:
        add_completion_class(_Bash)
        add_completion_class(_Zsh)
