"""`mpifedlora plan`: what a run will cost, before it is queued."""

from __future__ import annotations

from pathlib import Path

import click

from mpifedlora.cli.options import settings_option


@click.command(
    "plan",
    epilog="\b\nExample:\n  mpifedlora plan examples/newsgroups.toml --workers 4 --plot plan.png",
)
@click.argument("run_file", type=click.Path(path_type=Path))
@settings_option
@click.option(
    "--workers",
    "num_workers",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes that train; one for each client of a round by default.",
)
@click.option(
    "--calibrate/--no-calibrate",
    default=None,
    help="Time some local steps of the model on this machine; by default if it has at most 200 M values.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option(
    "--plot",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Also draw ranks and bytes by round, as .png or .svg.",
)
def command(
    run_file: Path,
    overrides: tuple[str, ...],
    num_workers: int | None,
    calibrate: bool | None,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Show what the run of RUN_FILE will cost, without MPI and in seconds.

    Stages, ranks and bytes of every round, totals against FedAvg of the whole model and against a fixed
    rank, memory and time of a process, and who has which labels. The bytes are those that the run will
    send, to the byte; where trained values decide (spectral allocation, measured schedules), bounds.
    """
    import json

    from rich.console import Console

    from mpifedlora.io import plan_figure
    from mpifedlora.runtime import outlook, outlook_text

    if plot is not None:
        plan_figure.check_figure(plot)
    found = outlook.look_ahead(run_file, overrides, num_workers, calibrates=calibrate)
    if as_json:
        click.echo(json.dumps(outlook_text.outlook_values(found), indent=2))
    else:
        for line in outlook_text.outlook_lines(found, Console().width):
            click.echo(line)
    if plot is not None:
        plan_figure.write_plan_figure(plot, outlook_text.outlook_values(found))
        click.echo(f"figure in {plot}", err=True)
