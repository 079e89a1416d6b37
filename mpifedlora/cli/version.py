"""`mpifedlora version`: what is installed, for bug reports."""

from __future__ import annotations

import platform

import click

_LIBRARIES = ("torch", "mpi4py", "peft", "transformers", "h5py")


@click.command("version", epilog="\b\nExample:\n  mpifedlora version --verbose")
@click.option("--verbose", is_flag=True, help="Also show the versions of the libraries underneath.")
def command(verbose: bool) -> None:
    """Show the version of mpifedlora and of Python."""
    click.echo(f"{'mpifedlora':<14}{_version('mpifedlora')}")
    click.echo(f"{'Python':<14}{platform.python_version()}")
    for library in _LIBRARIES if verbose else ():
        click.echo(f"{library:<14}{_version(library)}")


def _version(package: str) -> str:
    # The metadata is read, not the package: importing torch and mpi4py costs seconds and starts MPI.
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
