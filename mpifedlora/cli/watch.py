"""`mpifedlora watch`: a run seen from another terminal."""

from __future__ import annotations

import sys
from pathlib import Path

import click

_EPILOG = """\b
Exit code:
  0   the run has finished
  1   it has failed
  3   it goes on, or has not begun (--once)
  75  its process has ended without a word (killed): resume it
  85  it was interrupted: resume it, or wait for Slurm to do so

\b
Example:
  mpifedlora watch runs/demo
"""


@click.command("watch", epilog=_EPILOG)
@click.argument("out", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--once", is_flag=True, help="Print one frame and end.")
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks at the folder.",
)
def command(out: Path, once: bool, interval_s: float) -> None:
    """Watch the run that writes to DIR, from any machine that sees the folder.

    Shows rounds, accuracy, loss, rank, bytes, slow and failing clients, events and the time left, until
    the run ends. DIR need not exist yet. Where the output is no terminal, a line for each round is printed.
    Ctrl-C ends the watching, never the run.
    """
    from mpifedlora.runtime import watch

    sys.exit(watch.watch(out.expanduser(), interval_s, is_once=once))
