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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mpifedlora.core.config import RunConfig
from mpifedlora.core.methods import apply_method
from mpifedlora.core.sections import Section
from mpifedlora.core.tasks import is_own
from mpifedlora.errors import ConfigError
from mpifedlora.io.config_errors import Origin, explain, locate, shorten
from mpifedlora.io.data_fetch import PACKAGED
from mpifedlora.io.overrides import Override, apply_overrides, make_override, parse_override, plain_table
from mpifedlora.io.task_files import digest_of, split_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Tables = dict[str, Any]

_LARGEST_FILE_BYTES = 64 * 1024
_MOST_ERRORS = 10
_PATH_KEYS = ("model.name", "data.source", "data.test_source", "task.name")
_TOML_MESSAGE = re.compile(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)")


@dataclass(frozen=True)
class ResolvedRun:
    """A checked configuration, and the keys of the run file that its method overruled."""

    config: RunConfig
    ignored_keys: tuple[str, ...]


def read_run_file(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> ResolvedRun:
    """Read a run file, apply overrides and its method, and check everything.

    Relative paths in `model.name`, `data.source`, `data.test_source` and `task.name` are looked up in the
    current directory, then beside the run file.

    Args:
        path: A TOML file of at most 64 KiB.
        overrides: Texts `section.key=value`, the value in TOML or else plain text; the last one wins.

    Returns:
        The resolved configuration and the ignored keys.

    Raises:
        ConfigError: The file, an override, a key or a value is wrong; one line per error, at most 10.
    """
    return _resolve(Path(path), [parse_override(text) for text in overrides])


def resolve_run(
    run: str | os.PathLike[str] | Mapping[str, Mapping[str, Any]], overrides: Mapping[str, Any]
) -> ResolvedRun:
    """Check a run as a script gives it: a run file or its tables, with overrides by dotted key.

    Args:
        run: Path of a run file, or what one holds.
        overrides: `section.key` to value.

    Returns:
        See `read_run_file`.

    Raises:
        ConfigError: See `read_run_file`.

    >>> tables = {"model": {"name": "minilm"}, "data": {"source": "reuters-r8"}}
    >>> resolve_run(tables, {"lora.rank_max": 8}).config.lora.rank_max
    8
    """
    changes = [make_override(key, value) for key, value in overrides.items()]
    if not isinstance(run, Mapping):
        return _resolve(Path(run), changes)
    tables = {name: plain_table(table) for name, table in run.items()}
    return _with_digest(_check(apply_overrides(tables, changes), _trace("the run's tables", tables, changes)))


def _resolve(file: Path, changes: Sequence[Override]) -> ResolvedRun:
    tables = _parse(_read_text(file), file)
    origin = _trace(_name(file), tables, changes)
    return _with_digest(_check(_resolve_paths(apply_overrides(tables, changes), file.parent), origin))


def _with_digest(run: ResolvedRun) -> ResolvedRun:
    """Make a task's own file part of the configuration, which all processes and a resumed run compare."""
    task = run.config.task
    if not is_own(task.name):
        return run
    found = task.model_copy(update={"sha256": digest_of(task.name, task.sha256)})
    return replace(run, config=run.config.model_copy(update={"task": found}))


def write_run_file(config: RunConfig) -> str:
    """Write a resolved configuration as the text of a run file.

    Args:
        config: What `read_run_file` returned.

    Returns:
        TOML that `read_run_file` reads back to an equal configuration, each key under its description.
        Keys without a value are left out.

    >>> tables = {"model": {"name": "minilm"}, "data": {"source": "reuters-r8"}}
    >>> 'source = "reuters-r8"' in write_run_file(RunConfig.model_validate(tables))
    True
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

    >>> tables = {"model": {"name": "minilm"}, "data": {"source": "reuters-r8"}}
    >>> len(config_digest(RunConfig.model_validate(tables)))
    64
    """
    tables = {
        name: {key: _canonical(value) for key, value in table.items()}
        for name, table in config.model_dump(mode="json").items()
    }
    text = json.dumps(tables, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    # -0.0 equals 0.0 but is written otherwise.
    return value + 0.0 if isinstance(value, float) else value


def _read_text(file: Path) -> str:
    try:
        is_regular = stat.S_ISREG(os.stat(file).st_mode)
        # Opening a pipe could wait for ever, and only one process could read it.
        content = _read_bytes(file) if is_regular else b""
    except FileNotFoundError:
        raise ConfigError(_missing(file)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"the run file must be readable, got {reason} ({_name(file)}); check the path"
        ) from None
    if not is_regular:
        raise ConfigError(f"the run file must be a regular file, got {_what_is(file)}; name a .toml file")
    return _decode(content, file)


def _read_bytes(file: Path) -> bytes:
    with open(file, "rb") as stream:
        return stream.read(_LARGEST_FILE_BYTES + 1)


def _name(file: Path) -> str:
    return shorten(str(file), longest=300)


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
        what = "brackets nested too deeply" if isinstance(error, RecursionError) else "too long a number"
        raise ConfigError(
            f"the run file must be plain TOML, got {what} ({_name(file)}); shorten it"
        ) from None


def _explain_syntax(message: str, text: str, file: Path) -> str:
    match = _TOML_MESSAGE.fullmatch(message)
    what, number, column = match.groups() if match else (message, None, None)
    lines = text.rstrip().split("\n")
    line = lines[int(number) - 1 if number and int(number) <= len(lines) else -1].strip()
    place = f"line {number}, column {column}" if number else "at its end"
    fact = f"the run file must be valid TOML, got `{shorten(line)}` ({_name(file)}, {place}: {shorten(what)})"
    return f"{fact}; texts need double quotes, lists square brackets, and no key may stand twice"


def _trace(name: str, tables: Tables, changes: Sequence[Override]) -> Origin:
    new_tables = {change.section: change.text for change in changes if change.section not in tables}
    return Origin(name, new_tables | {change.dotted: change.text for change in changes})


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
    is_here = value in PACKAGED or not value or _exists(value)
    return beside if not is_here and _exists(beside) else value


def _exists(value: str) -> bool:
    return os.path.exists(str(split_name(value)[0]) if is_own(value) else value)


def _check(tables: Tables, origin: Origin) -> ResolvedRun:
    try:
        resolved, ignored = apply_method(tables)
    except ConfigError as error:
        message = locate(str(error), origin.of(str(error).partition(" ")[0]))
        # Without its method a run may break a rule that spans tables and the method would have kept.
        others = [line for key, line in _problems(tables, origin).items() if key]
        raise _errors([message, *others]) from None
    if problems := _problems(resolved, origin):
        raise _errors(list(problems.values()))
    return ResolvedRun(RunConfig.model_validate(resolved), ignored)


def _problems(tables: Tables, origin: Origin) -> dict[str, str]:
    try:
        RunConfig.model_validate(tables)
    except ValidationError as error:
        return explain(error, tables, origin)
    return {}


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
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)} = {_write_value(item)}' for key, item in value.items())}}}"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but JSON leaves DEL bare and would split what lies beyond U+FFFF.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return json.dumps(value)
