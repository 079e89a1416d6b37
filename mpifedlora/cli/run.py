"""`mpifedlora run`: train the federation that a run file describes."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command(
    "run",
    epilog="\b\nExample:\n"
    "  mpirun -n 5 mpifedlora run examples/newsgroups.toml --out runs/demo --set lora.rank_min=4",
)
@click.argument("run_file", type=click.Path(path_type=Path))
@click.option(
    "--out",
    required=True,
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder for the results; one that holds a run already is refused.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Override one key of the run file (repeatable). The value is read as TOML, else as text.",
)
@click.option("--overwrite", is_flag=True, help="Replace the run that --out holds.")
def command(run_file: Path, out: Path, overrides: tuple[str, ...], overwrite: bool) -> None:
    """Train the federation that RUN_FILE describes.

    RUN_FILE is TOML; docs/configuration.md lists its keys. Under mpirun, MPI rank 0 is the server and
    the other processes are workers; without mpirun everything runs in this process, with the same result.

    DIR gets results.h5 (metrics and bytes of every round), adapter/ (the trained adapter, as PEFT loads
    it) and run.toml (the resolved configuration, itself a run file).
    """
    from mpifedlora.runtime import launch

    sys.exit(launch.run(run_file, overrides, out, overwrite))
