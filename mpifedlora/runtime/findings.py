"""Findings of `doctor`, and how children are asked for them."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from mpifedlora.io.children import Answer, ask
from mpifedlora.transport.mpi.gpu import without_launcher

State = Literal["ok", "note", "wrong"]
PROBE_TIMEOUT_S = 120.0


class Finding(NamedTuple):
    """One thing that was looked at.

    Args:
        name: of it.
        state: `ok`; `note`: runs work, but something is good to know; `wrong`: what runs need is broken.
        text: what was found.
        advice: what to do, where something is to be done.
    """

    name: str
    state: State
    text: str
    advice: str = ""


def probe(module: str, *arguments: str, timeout_s: float = PROBE_TIMEOUT_S) -> Answer:
    """Ask a module in a child process that knows of no launcher."""
    command = [sys.executable, "-m", module, *arguments]
    return ask(command, timeout_s, without_launcher() | {"TRANSFORMERS_VERBOSITY": "error"})


def broken(name: str, answer: Answer, advice: str) -> Finding:
    """Return what a child that failed tells."""
    return Finding(name, "wrong", f"fails ({answer.problem or 'no answer'}): {answer.last_line}", advice)


def finding_lines(finding: Finding, width: int) -> list[str]:
    """Return a finding as lines: what was found, and what to do."""
    wrap = partial(textwrap.wrap, width=max(40, width), subsequent_indent=" " * 20, break_on_hyphens=False)
    lines = wrap(f"{finding.state:<6}{finding.name:<14}{finding.text}")
    return lines + (wrap(f"{'':<20}-> {finding.advice}") if finding.advice else [])


def as_values(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return findings as JSON values."""
    is_ok = all(one.state != "wrong" for one in findings)
    return {"ok": is_ok, "findings": [one._asdict() for one in findings]}
