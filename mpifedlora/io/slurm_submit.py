"""Handing a job to Slurm, and the list of a job array."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from mpifedlora.errors import ConfigError
from mpifedlora.io.run_file import read_run_file
from mpifedlora.io.slurm_memory import check_memory
from mpifedlora.io.slurm_script import Job, check_job

_JOB_ID = re.compile(r"(\d+)(;.*)?")


def job_name(run_file: Path) -> str:
    """Return a run file's name as a job's name, and the beginning of its log's.

    >>> job_name(Path("runs/my run.toml"))
    'my_run'
    """
    return re.sub(r"[^A-Za-z0-9._-]", "_", run_file.stem) or "mpifedlora"


def programs_folder() -> str:
    """Return the folder with this environment's `mpifedlora` (and the `mpirun` of a wheel)."""
    return str(Path(sys.executable).parent)


def read_sweep(path: Path) -> tuple[tuple[str, ...], ...]:
    """Read the list of a job array: one task a line, in the words of a shell, each `section.key=value`.

    Empty lines and lines that begin with # do not count.

    Args:
        path: the list.

    Returns:
        The settings of each task.

    Raises:
        ConfigError: if it cannot be read, or has no task.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--array must be a readable text file, got {path} ({error}); check it") from None
    numbered = ((number, line.strip()) for number, line in enumerate(lines, start=1))
    tasks = tuple(
        _words(line, number, path) for number, line in numbered if line and not line.startswith("#")
    )
    if not tasks:
        raise ConfigError(
            f"--array must have a line for each task, got none ({path}); write one setting a line"
        )
    return tasks


def _words(line: str, number: int, path: Path) -> tuple[str, ...]:
    try:
        return tuple(word for word in shlex.split(line) if word != "--set")
    except ValueError as error:
        raise ConfigError(
            f"a line of --array must be words as in a shell, got {line!r} ({path}, line {number}: {error}); "
            "close its quotes"
        ) from None


def check(job: Job) -> list[str]:
    """Check a job against its run file, with the settings of each task.

    Returns:
        Lines to show: see `mpifedlora.io.slurm_memory.check_memory`.

    Raises:
        ConfigError: if the run file, a setting or the allocation is wrong; of an array the task is named.
    """
    lines: list[str] = []
    for task, settings in enumerate(job.sweep or ((),), start=1):
        try:
            config = read_run_file(job.run_file, [*job.settings, *settings]).config
            check_job(job, config)
            lines += check_memory(job, config)
        except ConfigError as error:
            if not job.sweep:
                raise
            raise ConfigError(f"task {task} of the array ({' '.join(settings)}): {error}") from None
    return list(dict.fromkeys(lines))


def describe(job: Job, job_id: str) -> str:
    """Return what to print of a submitted job: its id, its processes and where to look."""
    log = f"{job.folder}/{job.log_name(job_id).replace('%a', 'TASK')}"
    folder = job.results(job_id) + "/TASK" * bool(job.sweep)
    tasks = f", {len(job.sweep)} tasks" if job.sweep else ""
    lines = [
        f"job {job_id}{tasks}: 1 server and {job.num_workers} workers on {job.num_nodes} nodes",
        f"state    squeue --job={job_id}",
        f"log      {log}",
        f"results  {folder}",
    ]
    return "\n".join(lines)


def submit_script(script: str) -> str:
    """Hand a script to sbatch.

    Args:
        script: its text; Slurm keeps a copy.

    Returns:
        The job's id.

    Raises:
        ConfigError: if there is no sbatch here, or it refuses the script; with its own words.
    """
    try:
        done = subprocess.run(
            ["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise ConfigError(
            f"sbatch must be on the PATH, got {error.strerror}; submit where Slurm is installed, or see the "
            "script with --dry-run"
        ) from None
    match = _JOB_ID.fullmatch(done.stdout.strip())
    if done.returncode or match is None:
        said = (done.stderr or done.stdout).strip()
        raise ConfigError(
            f"sbatch must accept the job, got exit code {done.returncode}: {said}; mend what it names, "
            "or add your cluster's options with --sbatch"
        )
    return match[1]
