"""The run file: TOML to a checked configuration, and back.

Whatever is wrong with a run file or an override is a `ConfigError` that names the file, the key and
the value; several errors are reported together.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import stat
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mpifedlora.core.config import RunConfig, Section
from mpifedlora.core.methods import apply_method
from mpifedlora.errors import ConfigError
from mpifedlora.io.config_errors import Origin, explain, locate, shorten
from mpifedlora.io.data_fetch import PACKAGED

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Tables = dict[str, Any]

_LARGEST_FILE_BYTES = 64 * 1024
_MOST_ERRORS = 10
_ALTERNATIVES = (("training.local_steps", "training.local_epochs"),)
_PATH_KEYS = ("model.name", "data.source", "data.test_source")
_DOTTED_KEY = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")
_TOML_MESSAGE = re.compile(
    r"(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)"
)


@dataclass(frozen=True)
class ResolvedRun:
    """A checked configuration, and the keys of the run file that its method overruled."""

    config: RunConfig
    ignored_keys: tuple[str, ...]


@dataclass(frozen=True)
class _Override:
    section: str
    key: str
    value: Any
    text: str

    @property
    def dotted(self) -> str:
        return f"{self.section}.{self.key}"


def read_run_file(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ResolvedRun:
    """Read a run file, apply overrides and its method, and check everything.

    Relative paths in `model.name`, `data.source` and `data.test_source` are looked up in the current
    directory, then beside the run file.

    Args:
        path: A TOML file of at most 64 KiB.
        overrides: Texts `section.key=value`, the value in TOML or else plain text; the last one wins.

    Returns:
        The resolved configuration and the ignored keys.

    Raises:
        ConfigError: The file, an override, a key or a value is wrong; one line per error, at most 10.
    """
    file = Path(path)
    tables = _parse(_read_text(file), file)
    changes = [_read_override(text) for text in overrides]
    origin = _trace(file, tables, changes)
    return _check(_resolve_paths(_override(tables, changes), file.parent), origin)


def write_run_file(config: RunConfig) -> str:
    """Write a resolved configuration as the text of a run file.

    Args:
        config: What `read_run_file` returned.

    Returns:
        TOML that `read_run_file` reads back to an equal configuration, each key under its description.
        Keys without a value are left out.
    """
    head = "# The resolved configuration of one run, itself a run file.\n"
    parts = (_write_table(name, getattr(config, name)) for name in type(config).model_fields)
    return "\n".join([head, *parts])


def config_digest(config: RunConfig) -> str:
    """Digest a configuration, to compare it between processes and between runs.

    Args:
        config: The resolved configuration.

    Returns:
        SHA-256 over its canonical JSON, 64 hexadecimal digits; equal for equal configurations.
    """
    tables = {
        name: {key: _canonical(value) for key, value in table.items()}
        for name, table in config.model_dump(mode="json").items()
    }
    text = json.dumps(tables, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: Any) -> Any:
    # -0.0 equals 0.0 but is written otherwise.
    return value + 0.0 if isinstance(value, float) else value


def _read_text(file: Path) -> str:
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):
            raise ConfigError(f"the run file must be a regular file, got {_what_is(file)}; name a .toml file")
        with open(file, "rb") as stream:
            content = stream.read(_LARGEST_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(_missing(file)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"the run file must be readable, got {reason} ({_name(file)}); check the path"
        ) from None
    return _decode(content, file)


def _name(file: Path) -> str:
    return shorten(str(file), longest=4096)


def _what_is(file: Path) -> str:
    return f"{'the folder' if file.is_dir() else 'a device or a pipe,'} {_name(file)}"


def _missing(file: Path) -> str:
    near = difflib.get_close_matches(file.name, _neighbours(file.parent), n=1)
    remedy = f"did you mean {_name(file.parent / near[0])}?" if near else "check the path"
    looked = _name(Path(os.path.abspath(file)))
    return f"the run file must exist, got {_name(file)} (looked for {looked}); {remedy}"


def _neighbours(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if name.endswith(".toml"))
    except OSError:
        return []


def _decode(content: bytes, file: Path) -> str:
    if len(content) > _LARGEST_FILE_BYTES:
        limit = f"{_LARGEST_FILE_BYTES // 1024} KiB"
        raise ConfigError(
            f"the run file must be at most {limit}, got more ({_name(file)}); is it a run file?"
        )
    try:
        # Some editors put a byte order mark first, which TOML does not know.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{content[error.start]:02x} at offset {error.start}"
        raise ConfigError(
            f"the run file must be UTF-8 text, got {byte} ({_name(file)}); save it as UTF-8"
        ) from None


def _parse(text: str, file: Path) -> Tables:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(_explain_syntax(str(error), text, file)) from None
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or brackets nested a thousand deep.
        what = "nested too deeply" if isinstance(error, RecursionError) else "a number that is too long"
        raise ConfigError(f"the run file must be plain TOML, got one with {what} ({_name(file)})") from None


def _explain_syntax(message: str, text: str, file: Path) -> str:
    match = _TOML_MESSAGE.fullmatch(message)
    what = match["what"] if match else message
    if match and match["line"]:
        line, column = match["line"], match["column"]
        got = f"`{shorten(text.split(chr(10))[int(line) - 1].strip())}`"
        place = f"{_name(file)}, line {line}, column {column}"
    else:
        got, place = "an unfinished line", f"{_name(file)}, at its end"
    remedy = "texts need double quotes, lists square brackets, each key its own line"
    return f"the run file must be valid TOML, got {got} ({place}: {shorten(what)}); {remedy}"


def _read_override(text: str) -> _Override:
    name, equals, value = text.partition("=")
    match = _DOTTED_KEY.fullmatch(name.strip())
    shown = shorten(text)
    if not equals or match is None:
        raise ConfigError(
            f"--set must be section.key=value, got {shown}; for example --set training.local_steps=4"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"--set must be text in UTF-8, got {shown}; check the terminal's encoding"
        ) from None
    return _Override(match[1], match[2], _read_value(value.strip(), shown), f"--set {shown}")


def _read_value(value: str, shown: str) -> Any:
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


def _trace(file: Path, tables: Tables, changes: Sequence[_Override]) -> Origin:
    new_tables = {change.section: change.text for change in changes if change.section not in tables}
    return Origin(_name(file), new_tables | {change.dotted: change.text for change in changes})


def _override(tables: Tables, changes: Sequence[_Override]) -> Tables:
    """Return new tables; tables of a wrong type stay as they are, to be reported."""
    named = {change.dotted for change in changes}
    replaced = {rival for group in _ALTERNATIVES if named & set(group) for rival in group}
    changed = {
        name: {key: value for key, value in table.items() if f"{name}.{key}" not in replaced}
        if isinstance(table, dict)
        else table
        for name, table in tables.items()
    }
    for change in changes:
        table = changed.setdefault(change.section, {})
        if isinstance(table, dict):
            table[change.key] = change.value
    return changed


def _resolve_paths(tables: Tables, folder: Path) -> Tables:
    found = dict(tables)
    for section, _, key in (dotted.partition(".") for dotted in _PATH_KEYS):
        table = found.get(section)
        if isinstance(table, dict) and isinstance(table.get(key), str):
            found[section] = {**table, key: _resolve_path(table[key], folder)}
    return found


def _resolve_path(value: str, folder: Path) -> str:
    # os.path.exists, unlike Path.exists, calls an impossible name absent instead of raising.
    beside = os.path.join(folder, value)
    is_here = value in PACKAGED or not value or os.path.exists(value)
    return beside if not is_here and os.path.exists(beside) else value


def _check(tables: Tables, origin: Origin) -> ResolvedRun:
    try:
        resolved, ignored = apply_method(tables)
    except ConfigError as error:
        message = locate(str(error), origin.of(str(error).partition(" ")[0]))
        raise _errors([message, *_problems(tables, origin)]) from None
    if problems := _problems(resolved, origin):
        raise _errors(problems)
    return ResolvedRun(RunConfig.model_validate(resolved), ignored)


def _problems(tables: Tables, origin: Origin) -> list[str]:
    try:
        RunConfig.model_validate(tables)
    except ValidationError as error:
        return explain(error, tables, origin)
    return []


def _errors(lines: list[str]) -> ConfigError:
    more = len(lines) - _MOST_ERRORS
    return ConfigError("\n".join(lines[:_MOST_ERRORS] + [f"and {more} more errors"] * (more > 0)))


def _write_table(name: str, section: Section) -> str:
    lines = [f"[{name}]"]
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if value is not None:
            lines += [*_comment(field.description or ""), f"{key} = {_write_value(value)}"]
    return "\n".join([*lines, ""])


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, 100, initial_indent="# ", subsequent_indent="# ")


def _write_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_write_value, value))}]"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but JSON leaves DEL bare and would split what lies beyond U+FFFF.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
