"""`mpifedlora results`: a run's numbers, for people and for programs."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("results", epilog="\b\nExample:\n  mpifedlora results runs/demo --csv rounds.csv")
@click.argument("run_folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--csv", "csv_file", metavar="FILE", help="Write CSV to FILE, a row a round; - is standard output."
)
@click.option("--clients", is_flag=True, help="The clients: with --csv, a row a round and client.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --clients, the clients too.")
def command(run_folder: Path, csv_file: str | None, clients: bool, as_json: bool) -> None:
    """Print the results of the run in DIR, or convert them.

    The run may still go on. docs/results-format.md says what each name means. In CSV a number that a round
    does not have is an empty cell, in JSON it is null.
    """
    from mpifedlora.io import results_tables
    from mpifedlora.io.results import read_results

    if csv_file is not None and as_json:
        raise click.UsageError("--csv and --json exclude each other; choose one")
    results = read_results(run_folder.expanduser())
    if as_json:
        click.echo(results_tables.as_json(results, with_clients=clients))
    elif csv_file is not None:
        table = (results_tables.clients_table if clients else results_tables.rounds_table)(results)
        if csv_file == "-":
            click.echo(table.csv(), nl=False)
        else:
            results_tables.write_csv(Path(csv_file).expanduser(), table.csv())
    else:
        from mpifedlora.runtime import results_view

        lines = (results_view.client_lines if clients else results_view.run_lines)(results)
        click.echo("\n".join(lines))
