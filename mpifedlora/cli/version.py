"""`mpifedlora version`: what is installed, for bug reports."""

from __future__ import annotations

import platform

import click

_LIBRARIES = ("torch", "mpi4py", "peft", "transformers", "h5py")


@click.command("version", epilog="\b\nExample:\n  mpifedlora version --verbose")
@click.option("--verbose", is_flag=True, help="Also show the versions of the libraries underneath.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with the libraries; null: not installed.")
def command(verbose: bool, as_json: bool) -> None:
    """Show the version of mpifedlora and of Python."""
    import json

    names = ("mpifedlora", *(_LIBRARIES if verbose or as_json else ()))
    found = {name: _version(name) for name in names}
    found = {"mpifedlora": found.pop("mpifedlora"), "Python": platform.python_version(), **found}
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for name, version in found.items():
        click.echo(f"{name:<14}{version or 'not installed'}")


def _version(package: str) -> str | None:
    # The metadata is read, not the package: importing torch and mpi4py costs seconds and starts MPI.
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
