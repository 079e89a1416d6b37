"""`mpifedlora doctor`: whether this machine is ready for a run."""

from __future__ import annotations

import sys

import click


@click.command("doctor", epilog="\b\nExample:\n  mpifedlora doctor || echo 'mend what is wrong first'")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(as_json: bool) -> None:
    """Look at this machine, and say of each thing `ok` or what to do.

    Python, packages, torch and GPUs, MPI against mpirun, a real exchange of two processes, faults
    (ULFM), Slurm, HDF5, folders, threads, data. What is heavy is tried in child processes, so that a
    crash is an answer. The exit code is 1 where something is `wrong`, that is, broken for a run.
    """
    import json

    from rich.console import Console

    from mpifedlora.runtime import doctor, findings

    width, found = Console().width, []
    for finding in doctor.examine():
        found.append(finding)
        if not as_json:
            click.echo("\n".join(findings.finding_lines(finding, width)))
    values = findings.as_values(found)
    if as_json:
        click.echo(json.dumps(values, indent=2))
    sys.exit(0 if values["ok"] else 1)
