"""`mpifedlora submit`: a run as a Slurm job."""

from __future__ import annotations

from pathlib import Path

import click

from mpifedlora.cli.options import settings_option


@click.command(
    "submit",
    epilog="\b\nExample:\n  mpifedlora submit RUN.toml --nodes 2 --gpus-per-node 4 --time 4:00:00 --dry-run",
)
@click.argument("run_file", type=click.Path(path_type=Path))
@click.option("--nodes", "num_nodes", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--gpus-per-node", type=click.IntRange(min=0), default=0, help="GPUs on each node; 0: none.")
@click.option(
    "--clients-per-gpu",
    type=click.IntRange(min=1),
    help="Clients that a GPU trains at the same time, each in a worker of its own; 1 by default.",
)
@click.option(
    "--workers-per-node",
    type=click.IntRange(min=1),
    help="Workers on each node where there are no GPUs; 1 by default.",
)
@click.option("--time", "time_limit", required=True, metavar="LIMIT", help="Minutes, H:MM:SS or D-HH:MM:SS.")
@click.option(
    "--mem", "memory", metavar="SIZE", help="Memory of each node, such as 64G; checked against the run."
)
@click.option(
    "--gpu-memory",
    metavar="SIZE",
    help="Memory that each GPU has, such as 40G: the run is checked against it.",
)
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder for the results; a run in it is continued. By default runs/NAME-JOBID.",
)
@settings_option
@click.option(
    "--array",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="A job array: a task for each line of FILE, which has one or more SECTION.KEY=VALUE; its results "
    "go to DIR/1, DIR/2, ...",
)
@click.option(
    "--sbatch", "extra", multiple=True, metavar="OPTION", help="One more option of sbatch (repeatable)."
)
@click.option(
    "--launcher", default="mpirun", show_default=True, metavar="TEXT", help="Such as 'srun --mpi=pmix'."
)
@click.option("--dry-run", is_flag=True, help="Print the script, and submit nothing.")
def command(
    run_file: Path,
    num_nodes: int,
    gpus_per_node: int,
    clients_per_gpu: int | None,
    workers_per_node: int | None,
    time_limit: str,
    memory: str | None,
    gpu_memory: str | None,
    out: Path | None,
    overrides: tuple[str, ...],
    array: Path | None,
    extra: tuple[str, ...],
    launcher: str,
    dry_run: bool,
) -> None:
    """Submit the run that RUN_FILE describes as a Slurm job.

    The job has one process for the server and one for each worker. What they need of memory is estimated from
    the run file and the model's folder, and shown on standard error. Before its time limit, when it is
    preempted or loses a node, it goes back to the queue and continues where it was. slurm/README.md tells
    more.
    """
    from mpifedlora.io import slurm_script, slurm_submit

    job = slurm_script.Job(
        name=slurm_submit.job_name(run_file),
        run_file=str(run_file.absolute()),
        out=None if out is None else str(out.expanduser().absolute()),
        folder=str(Path.cwd()),
        programs=slurm_submit.programs_folder(),
        num_nodes=num_nodes,
        gpus_per_node=gpus_per_node,
        workers_per_node=slurm_script.count_workers(gpus_per_node, clients_per_gpu, workers_per_node),
        time_limit=time_limit,
        settings=overrides,
        sweep=() if array is None else slurm_submit.read_sweep(array),
        extra=extra,
        launcher=launcher,
        memory=memory,
        gpu_memory=gpu_memory,
    )
    for line in slurm_submit.check(job):
        click.echo(line, err=True)
    script = slurm_script.job_script(job)
    if dry_run:
        click.echo(script, nl=False)
    else:
        click.echo(slurm_submit.describe(job, slurm_submit.submit_script(script)))
