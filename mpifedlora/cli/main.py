"""The command group and the console entry point."""

from __future__ import annotations

import importlib
import sys
import traceback

import click

from mpifedlora.cli.options import prepare_completion
from mpifedlora.errors import MpiFedLoraError, TrainingError

VERBS = (
    "run",
    "plan",
    "doctor",
    "watch",
    "results",
    "report",
    "compare",
    "export",
    "submit",
    "data",
    "methods",
    "version",
)

_INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group that imports a verb's file when the verb is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of a first reading."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return one verb's command, or None where there is no such verb."""
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"mpifedlora.cli.{cmd_name}").command
        return command if isinstance(command, click.Command) else None


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\b\nExample:\n  mpirun -n 5 mpifedlora run examples/newsgroups.toml --out runs/demo",
)
def main() -> None:
    """Federated LoRA fine-tuning as one MPI job.

    MPI rank 0 is the server, every other process a worker that trains some of the clients; without
    mpirun the whole federation runs in one process. Messages shrink as the LoRA rank is annealed.
    """


def entry() -> None:
    """Run the command line and exit: 0 if all went well, 1 if training failed, 2 for a wrong input."""
    sys.exit(_exit_code())


def _exit_code() -> int:
    prepare_completion()
    try:
        result = main.main(prog_name="mpifedlora", standalone_mode=False)
    except TrainingError as error:
        traceback.print_exception(error)
        click.echo(f"error: {error}", err=True)
        return 1
    except MpiFedLoraError as error:
        click.echo("error: " + str(error).replace("\n", "\n       "), err=True)
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        return _INTERRUPTED
    return result if isinstance(result, int) else 0
