"""`mpifedlora report`: figures and a page of a run."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report", epilog="\b\nExample:\n  mpifedlora report runs/demo")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the report; by default `report` in the run's folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the paths of page and figures as JSON.")
def command(folder: Path, out: Path | None, as_json: bool) -> None:
    """Draw the figures of the run in DIR, and write one page with all of them.

    report.html needs no network and no other file; figures/ has each figure as PNG and SVG. A run may
    still be going on, or have been interrupted: the report shows the rounds that are finished.

    Needs matplotlib: pip install 'mpifedlora[plot]'.
    """
    import json

    from mpifedlora.io.report import write_report

    report = write_report(folder, out)
    if as_json:
        click.echo(json.dumps({"page": str(report.page), "figures": [str(path) for path in report.figures]}))
        return
    click.echo(f"page     {report.page}")
    click.echo(f"figures  {len(report.figures)} files in {report.page.parent / 'figures'}")
