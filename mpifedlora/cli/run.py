"""`mpifedlora run`: train the federation that a run file describes."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from mpifedlora.cli.options import settings_option


@click.command(
    "run",
    epilog="\b\nExample:\n"
    "  mpirun -n 5 mpifedlora run examples/newsgroups.toml --out runs/demo --set lora.rank_min=4",
)
@click.argument("run_file", required=False, type=click.Path(path_type=Path))
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder for the results, by default runs/NAME for NAME.toml; one that holds a run is refused.",
)
@settings_option
@click.option("--overwrite", is_flag=True, help="Replace the run that --out holds.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on after the last checkpoint in --out, or start where there is none yet. Without RUN_FILE, "
    "the run.toml there counts.",
)
def command(
    run_file: Path | None, out: Path | None, overrides: tuple[str, ...], overwrite: bool, resume: bool
) -> None:
    """Train the federation that RUN_FILE describes.

    RUN_FILE is TOML; docs/configuration.md lists its keys. Under mpirun, MPI rank 0 is the server and
    the other processes are workers; without mpirun everything runs in this process, with the same result.

    After SIGUSR2, or when Slurm's time limit comes near, the run ends with the round in hand and exit
    code 85; --resume takes it up again, bit for bit, on any number of workers.

    DIR gets results.h5 (metrics and bytes of every round), adapter/ (the trained adapter, as PEFT loads
    it), run.toml (the resolved configuration, itself a run file) and checkpoints/.
    """
    from mpifedlora.runtime import launch

    if run_file is None and (out is None or not resume):
        raise click.UsageError("RUN_FILE must be given, got none; name it, or go on with --resume --out DIR")
    if overwrite and resume:
        raise click.UsageError("--overwrite and --resume exclude each other; choose one")
    folder = out or Path("runs", run_file.stem if run_file else "")
    sys.exit(launch.run(run_file, overrides, folder, overwrite, resumes=resume))
