"""`mpifedlora compare`: a table and figures of several runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from mpifedlora.io.compare import Comparison

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(
    "compare",
    epilog="\b\nExample:\n  mpifedlora compare runs/sa-fedlora runs/fedit --latex table.tex --out figures",
)
@click.argument("folders", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--metric",
    metavar="NAME",
    help="What to compare: accuracy, macro_f1, loss, perplexity, or another that all runs have. By default "
    "the accuracy, or else the first that all have.",
)
@click.option(
    "--target",
    metavar="VALUE",
    type=float,
    help="Value of the metric that bytes and rounds are counted up to; by default 5 % short of the best.",
)
@click.option(
    "--less-is-better/--more-is-better",
    "is_less_better",
    default=None,
    help="Of the metric; by default as its name tells: less of losses, errors and perplexities.",
)
@click.option("--csv", "csv_file", metavar="FILE", type=_FILE, help="Write the table as CSV.")
@click.option("--latex", "latex_file", metavar="FILE", type=_FILE, help="Write it as LaTeX (booktabs).")
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Draw the figures into this folder, as PNG and SVG (needs matplotlib).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    folders: tuple[Path, ...],
    metric: str | None,
    target: float | None,
    is_less_better: bool | None,
    csv_file: Path | None,
    latex_file: Path | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Compare the runs in the folders DIR: a metric, bytes, and bytes to reach a given value of it.

    Runs that differ by their seed only are one row, with mean and standard deviation. A row is
    efficient if no other ends as good for less bytes. Runs that cannot be compared as
    they are (other data, clients, rounds or evaluation) are named.
    """
    from mpifedlora.io import compare

    comparison = compare.read_comparison(folders, target, metric=metric, is_less_better=is_less_better)
    if csv_file:
        compare.write_csv(csv_file, [compare.numbers(row, comparison.metric) for row in comparison.rows])
    if latex_file:
        compare.write_latex(latex_file, comparison)
    files = compare.write_figures(comparison, out) if out else []
    if as_json:
        _show_json(comparison, files)
    else:
        _show_table(comparison, files)


def _show_json(comparison: Comparison, files: list[Path]) -> None:
    import json

    from mpifedlora.io.compare import as_json

    click.echo(json.dumps({**as_json(comparison), "figures": [str(path) for path in files]}, indent=2))


def _show_table(comparison: Comparison, files: list[Path]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mpifedlora.io.compare import cells, short_head, target_line

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(short_head(comparison.metric)):
        table.add_column(name, justify="right" if place else "left", overflow="fold")
    for row in comparison.rows:
        table.add_row(*map(Text, cells(row)))
    # Where nobody watches, as wide as it gets: no cell is broken.
    console = Console() if sys.stdout.isatty() else Console(width=250)
    console.print(table)
    click.echo(target_line(comparison))
    for note in comparison.notes:
        click.echo(f"not comparable as they are: {note}")
    for path in files:
        click.echo(path)
