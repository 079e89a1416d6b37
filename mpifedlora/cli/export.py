"""`mpifedlora export`: a run's model for others."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("export", epilog="\b\nExample:\n  mpifedlora export runs/demo exported/demo --round 9 --merge")
@click.argument("run_folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--round", "round_num", type=click.IntRange(min=1), help="A round with a checkpoint; by default the last."
)
@click.option(
    "--client",
    "client_id",
    type=click.IntRange(min=0),
    help="Whose own model, under methods whose clients keep their B.",
)
@click.option(
    "--merge", is_flag=True, help="Add the adapter to the base weights: a plain transformers folder."
)
def command(run_folder: Path, out: Path, round_num: int | None, client_id: int | None, merge: bool) -> None:
    """Write the model of a run in DIR to a folder OUT, with a model card.

    OUT gets the adapter as PEFT loads it, or with --merge a whole model with its tokenizer, as transformers
    loads it, and README.md, a model card with the run's figures and the lines that load the model. Rounds
    come from checkpoints: the last [checkpoint] keep of a run stay.
    """
    from mpifedlora.runtime.export import export

    run_folder, out = run_folder.expanduser(), out.expanduser()
    click.echo(export(run_folder, out, round_num, client_id, merges=merge))
