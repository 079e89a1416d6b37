"""Asking a child process: whatever happens to it, a crash or a hang, is an answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a child has said.

    Args:
        values: the JSON object in the last line of its output; None where it failed or printed none.
        text: all of its output, standard error included.
        problem: how it failed, or an empty text.
    """

    values: dict[str, Any] | None
    text: str
    problem: str

    @property
    def last_line(self) -> str:
        """The last line that says something."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip(" -*\t")]
        return lines[-1] if lines else ""


def ask(command: Sequence[str], timeout_s: float, environment: Mapping[str, str] | None = None) -> Answer:
    """Run a command to its end, and return its answer.

    Args:
        command: program and arguments.
        timeout_s: after which it is ended, with the processes that it has started.
        environment: of the child; this process's by default.
    """
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=None if environment is None else dict(environment),
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return Answer(None, "", error.strerror or str(error))
    try:
        text, _ = child.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # its own session: nobody else's processes
        text, _ = child.communicate()
        return Answer(None, text, f"no end within {timeout_s:.0f} s")
    if child.returncode:
        how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        return Answer(None, text, how)
    return Answer(_last_object(text), text, "")


def _last_object(text: str) -> dict[str, Any] | None:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            return found if isinstance(found, dict) else None
    return None
