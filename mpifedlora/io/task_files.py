"""A task of a user's own: the file that the run file names, its digest, and its code.

This is the one place where the package runs code that it reads. The user names the file in the run file or on
the command line; its SHA-256 becomes part of the configuration, and so of the record of the run.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from mpifedlora.errors import ConfigError


def split_name(name: str) -> tuple[Path, str]:
    """Return file and function of `FILE.py:FUNCTION`.

    >>> split_name("tasks/mine.py:build")
    (PosixPath('tasks/mine.py'), 'build')
    """
    file, _, function = name.rpartition(":")
    return Path(file).expanduser(), function


def digest_of(name: str, sha256: str | None = None) -> str:
    """Return the SHA-256 of a task's file, once it is known to define the function; nothing is run.

    Args:
        name: `FILE.py:FUNCTION`.
        sha256: what it must be, or None.

    Raises:
        ConfigError: if the file is missing, is no Python, lacks the function, or has changed.
    """
    file, function = split_name(name)
    content = _read(file, name)
    found = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, found):
        raise ConfigError(
            f"task.sha256 must be that of the task's file, got {sha256[:12] if sha256 else ''}... and "
            f"{found[:12]}... ({file}): the file has changed since the run; put the old one back, or start "
            "anew without task.sha256"
        )
    _check_defines(content, file, function)
    return found


def load_builder(name: str, sha256: str | None) -> Callable[..., Any]:
    """Run a task's file and return its function.

    Args:
        name: `FILE.py:FUNCTION`.
        sha256: of the file, as the configuration has it.

    Raises:
        ConfigError: as `digest_of`, or if the file raises.
    """
    digest_of(name, sha256)
    file, function = split_name(name)
    module = ModuleType(file.stem)
    module.__file__ = str(file)
    content = _read(file, name)
    try:
        code = compile(content, str(file), "exec")
        sys.modules.setdefault(module.__name__, module)  # dataclasses look their module up
        exec(code, module.__dict__)
        found: Callable[..., Any] = getattr(module, function)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"the file of a task must be Python that runs, got {type(error).__name__}: {error} "
            f"({place.filename}:{place.lineno}); correct it"
        ) from error
    return found


def _read(file: Path, name: str) -> bytes:
    if file.suffix != ".py" or not file.is_file():
        raise ConfigError(
            f"task.name must name a Python file that exists and a function in it, got {name}; write "
            '"FILE.py:FUNCTION", the path relative to the run file or the current directory'
        )
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"the file of a task must be readable, got {error}; check its permissions"
        ) from error


def _check_defines(content: bytes, file: Path, function: str) -> None:
    try:
        body = ast.parse(content).body
    except (SyntaxError, ValueError) as error:
        raise ConfigError(
            f"the file of a task must be valid Python, got {error} ({file}); correct it"
        ) from error
    names = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    if function not in names:
        raise ConfigError(
            f"task.name must name a function of its file, got {function!r} where there are "
            f"{', '.join(names) or 'none'} ({file}); define it, or name another"
        )
