"""The text of an sbatch script, from a pure function.

The lines that start the run and continue it are `BODY`; `slurm/train.sbatch` has the same lines.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from mpifedlora.core.config import RunConfig
from mpifedlora.errors import ConfigError

BODY = """\
tasks=$((SLURM_JOB_NUM_NODES * workers_per_node + 1))
# shellcheck disable=SC2206 # a launcher may have options
launch=($launcher -n "$tasks")
if [ "$launcher" = mpirun ] && about=$(ompi_info 2>/dev/null); then
    # The server runs beside the first node's workers; by Slurm's counts each node would get one.
    hosts=$(scontrol show hostnames | awk -v workers="$workers_per_node" \\
        '{ printf "%s%s:%d", comma, $1, workers + (NR == 1); comma = "," }')
    # Slurm gives each job its cores. By itself mpirun may bind two jobs of a node to the same ones.
    launch+=(--host "$hosts" --bind-to none)
    # With ULFM a run survives workers that die. An Open MPI without it does not know the option.
    case $about in *"FT MPI support: yes"*) launch+=(--with-ft ulfm) ;; esac
fi

process='' signalled=''
hand_on() {
    signalled=yes
    if [ -n "$process" ]; then kill -USR2 "$process" 2>/dev/null || true; fi
}
trap hand_on USR2

echo "== job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on $SLURM_JOB_NODELIST: results in $out"
# By its path: mpirun puts a folder of its own before the PATH.
program=$(command -v mpifedlora)
# In the background: bash runs a trap only between commands. --resume starts anew where there is no run yet.
"${launch[@]}" "$program" run "$run_file" --out "$out" --resume "${settings[@]}" &
process=$!
status=0
wait "$process" || status=$?
# A trap ends `wait` early: only the next one has mpirun's own exit code.
while [ -n "$signalled" ]; do
    signalled=''
    status=0
    wait "$process" || status=$?
done
# Open MPI may return 0 for a job that it has lost, or that was signalled too early: the results know better.
if [ "$status" -eq 0 ] && ! "$program" watch "$out" --once >/dev/null 2>&1; then status=75; fi

# 85: the run stopped for the signal, with a checkpoint. 75: a process was lost, which may happen each time.
# Others would only repeat.
restarts=${SLURM_RESTART_COUNT:-0} most=${MAX_RESTARTS:-20}
if [ "$status" -eq 75 ] && [ "$restarts" -ge "$most" ]; then
    echo "== job $SLURM_JOB_ID lost a process after $restarts restarts, and ends: see why, and submit it" \\
        "again into $out" >&2
elif [ "$status" -eq 85 ] || [ "$status" -eq 75 ]; then
    echo "== job $SLURM_JOB_ID goes back to the queue, to continue"
    scontrol requeue "$SLURM_JOB_ID" || echo "== it cannot: to continue, submit it again into $out" >&2
fi
exit "$status"
"""

GRACE_S = 120
"""Seconds before the time limit at which a run is asked to stop; a round must end in that time."""

# What the number of processes or the printed places follow from.
_OWN_OPTIONS = (
    *("-a", "--array", "-J", "--job-name", "-N", "--nodes", "-n", "--ntasks", "--ntasks-per-node"),
    *("--gpus-per-node", "--gpus-per-task", "-o", "--output", "-t", "--time"),
)
# GPUs by other options: of each node, or of all nodes together; their kind may stand before the number.
_GPUS = re.compile(
    r"(--gres[=\s](.*,)?gpu|(?P<all>--gpus[=\s]|-G\s?))(:?[A-Za-z]\w*)?(:?(?P<number>\d+))?(,|$)"
)
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")


@dataclass(frozen=True)
class Job:
    """What one job asks for, and what it runs.

    Args:
        name: of the job; its log file begins with it.
        run_file: absolute path of the run file.
        out: absolute path of the results' folder; by default `runs/NAME-JOBID` below `folder`.
        folder: absolute path of the folder that the job is submitted from.
        programs: absolute path of the folder with `mpifedlora`.
        num_nodes: nodes of the allocation.
        gpus_per_node: GPUs asked for on each node; 0: none.
        workers_per_node: processes on each node that train clients.
        time_limit: as Slurm's `--time` takes it.
        settings: texts `section.key=value` that override the run file.
        sweep: settings of each task of a job array, on top of `settings`; none: no array.
        extra: more options of sbatch, which win over the script's own.
        launcher: what starts the processes.
        memory: of each node, as Slurm's `--mem` takes it; None: what the cluster gives.
        gpu_memory: that each GPU has, written in the same way; None: not known.
    """

    name: str
    run_file: str
    out: str | None
    folder: str
    programs: str
    num_nodes: int
    gpus_per_node: int
    workers_per_node: int
    time_limit: str
    settings: tuple[str, ...] = ()
    sweep: tuple[tuple[str, ...], ...] = ()
    extra: tuple[str, ...] = ()
    launcher: str = "mpirun"
    memory: str | None = None
    gpu_memory: str | None = None

    @property
    def num_workers(self) -> int:
        """Processes that train clients."""
        return self.num_nodes * self.workers_per_node

    def log_name(self, job_id: str) -> str:
        """Return the name of the log in the job's folder; `job_id` may be Slurm's own `%j`."""
        return f"{self.name}-{job_id}{'_%a' if self.sweep else ''}.out"

    def results(self, job_id: str) -> str:
        """Return the folder for the results, of an array the folder of its tasks' folders."""
        return self.out or f"{self.folder}/runs/{self.name}-{job_id}"


def count_workers(gpus_per_node: int, clients_per_gpu: int | None, workers_per_node: int | None) -> int:
    """Return the processes on a node that train clients.

    Args:
        gpus_per_node: GPUs of a node; 0: none.
        clients_per_gpu: clients that a GPU trains at the same time; by default 1.
        workers_per_node: for nodes without GPUs; by default 1.

    Raises:
        ConfigError: if the number that was given is not the one that counts.

    >>> count_workers(4, 2, None), count_workers(0, None, 6)
    (8, 6)
    """
    if gpus_per_node and workers_per_node is not None:
        raise ConfigError(
            f"--workers-per-node is for nodes without GPUs, got {workers_per_node} and "
            f"--gpus-per-node={gpus_per_node}; use --clients-per-gpu"
        )
    if not gpus_per_node and clients_per_gpu is not None:
        raise ConfigError(
            f"--clients-per-gpu needs --gpus-per-node of at least 1, got {clients_per_gpu} and no GPUs; "
            "use --workers-per-node for nodes without"
        )
    if gpus_per_node:
        return gpus_per_node * (clients_per_gpu or 1)
    return workers_per_node or 1


def check_job(job: Job, config: RunConfig) -> None:
    """Check an allocation against the run that it is for.

    Args:
        job: what is asked for.
        config: the resolved run file.

    Raises:
        ConfigError: if a worker would have no client, or devices, time limit or options do not fit.
    """
    federation = config.federation
    most = federation.num_clients if federation.sampling == "poisson" else _clients_of_a_round(config)
    if job.num_workers > most:
        raise ConfigError(
            f"the job's workers must be at most the clients of a round, got {job.num_workers} workers "
            f"({job.workers_per_node} a node) and {most} clients; ask for fewer nodes, GPUs or workers"
        )
    device = config.training.device
    if (device == "cpu" and job.gpus_per_node) or (device == "cuda" and not job.gpus_per_node):
        raise ConfigError(
            f'training.device = "{device}" must fit --gpus-per-node, got {job.gpus_per_node}; '
            "change one of them"
        )
    if not _TIME.fullmatch(job.time_limit):
        raise ConfigError(
            f"--time must be minutes, H:MM:SS or D-HH:MM:SS, got {job.time_limit!r}; "
            "for example --time 4:00:00"
        )
    if job.gpu_memory is not None and not job.gpus_per_node:
        raise ConfigError(
            f"--gpu-memory needs --gpus-per-node of at least 1, got {job.gpu_memory} and no GPUs; "
            "leave one out, or ask for GPUs"
        )
    for option in job.extra:
        _check_option(option)
        _check_gpus(option, job)


def _check_gpus(option: str, job: Job) -> None:
    """Check that an option of a site's own asks for the GPUs that the workers were counted by."""
    match = _GPUS.match(option)
    if match is None:
        return
    wanted = job.gpus_per_node * (job.num_nodes if match["all"] else 1)
    if int(match["number"] or 1) != wanted:
        raise ConfigError(
            f"--sbatch must ask for the GPUs that the workers are counted by, got {option} and "
            f"--gpus-per-node={job.gpus_per_node}; make them the same, else GPUs are left idle or missing"
        )


def _clients_of_a_round(config: RunConfig) -> int:
    return config.federation.cohort_size or config.federation.num_clients


def _check_option(option: str) -> None:
    if not option.startswith("-") or not option.isprintable():
        raise ConfigError(f"--sbatch must be one option of sbatch, got {option!r}; write --sbatch=--mem=64G")
    name = re.split(r"[=\s]", option, maxsplit=1)[0]
    # A short option may be joined with its value, as in -N4.
    if name in _OWN_OPTIONS or (not name.startswith("--") and name[:2] in _OWN_OPTIONS):
        raise ConfigError(
            f"--sbatch must not set what `mpifedlora submit` computes, got {option}; "
            "use its own option, or edit what --dry-run prints"
        )


def job_script(job: Job) -> str:
    """Write the sbatch script of a job.

    Args:
        job: what is asked for, checked by `check_job`.

    Returns:
        A bash script.
    """
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in _options(job)), ""]
    lines += ["set -euo pipefail", f'export PATH={shlex.quote(job.programs)}:"$PATH"', ""]
    lines += [f"run_file={shlex.quote(job.run_file)}", f"out={_out(job)}", f"settings=({_set(job.settings)})"]
    lines += _sweep(job.sweep)
    lines += [f"workers_per_node={job.workers_per_node}", f"launcher={shlex.quote(job.launcher)}", "", BODY]
    return "\n".join(lines)


def _options(job: Job) -> list[str]:
    gpus = [f"--gpus-per-node={job.gpus_per_node}"] if job.gpus_per_node else []
    array = [f"--array=1-{len(job.sweep)}"] if job.sweep else []
    return [
        f"--job-name={job.name}",
        f"--nodes={job.num_nodes}",
        f"--ntasks-per-node={job.workers_per_node + 1}",  # the server is one of the first node's
        *gpus,
        f"--time={job.time_limit}",
        *([f"--mem={job.memory}"] if job.memory else []),
        *array,
        # %j of a task of an array is a number of its own: name it by its array.
        f"--output={job.log_name('%A' if job.sweep else '%j')}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR2@{GRACE_S}",
        *job.extra,
    ]


def _out(job: Job) -> str:
    number = "$SLURM_ARRAY_JOB_ID" if job.sweep else "$SLURM_JOB_ID"
    folder = shlex.quote(job.out) if job.out else f"{shlex.quote(job.results(''))}{number}"
    return f"{folder}/$SLURM_ARRAY_TASK_ID" if job.sweep else folder


def _set(settings: Sequence[str]) -> str:
    return " ".join(f"--set {shlex.quote(setting)}" for setting in settings)


def _sweep(sweep: Sequence[Sequence[str]]) -> list[str]:
    if not sweep:
        return []
    cases = [f"    {task}) settings+=({_set(settings)}) ;;" for task, settings in enumerate(sweep, start=1)]
    return ["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"]
