"""Whether a run fits into the memory that a job asks for."""

from __future__ import annotations

import re
from typing import NamedTuple

from mpifedlora.core.config import RunConfig
from mpifedlora.core.memory_estimate import MemoryEstimate, estimate_memory
from mpifedlora.errors import ConfigError
from mpifedlora.io.model_files import model_path, read_model_sizes
from mpifedlora.io.slurm_script import Job

_SIZE = re.compile(r"(\d+)([KMGT]?)B?", re.IGNORECASE)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class _Need(NamedTuple):
    what: str
    least: int
    most: int
    limit: int | None
    option: str
    advice: str


def parse_size(option: str, text: str) -> int:
    """Return the bytes that a size stands for, as Slurm reads it: a number alone is megabytes.

    Raises:
        ConfigError: if it is none.

    >>> parse_size("--mem", "64G") == 64 * 2**30, parse_size("--mem", "500")
    (True, 524288000)
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{option} must be a size such as 64G or 500M, got {text!r}; mend it")
    return int(match[1]) * _UNITS[match[2].upper() or "M"]


def check_memory(job: Job, config: RunConfig) -> list[str]:
    """Check what a run needs against the memory that its job has.

    What is sure to be too little is refused: without activations, and with base weights that all processes
    of a node share. What may be too little is told.

    Args:
        job: whose `memory`, or `--mem` among its other options, is for a node, and `gpu_memory` for a GPU.
        config: of the run.

    Returns:
        Lines to show: warnings, and what a node and a GPU need.

    Raises:
        ConfigError: if a node or a GPU has too little for certain, or an option is no size.
    """
    limits = _limit("--mem", job.memory or _among(job.extra)), _limit("--gpu-memory", job.gpu_memory)
    sizes = read_model_sizes(model_path(config.model.name), config.lora.target_modules)
    if sizes is None:
        unknown = f"memory is not checked: {config.model.name} is no folder with a config.json that tells"
        return [unknown] * any(limits)
    on_gpu = job.gpus_per_node > 0
    estimate = estimate_memory(config, sizes, job.num_workers, on_gpu=on_gpu)
    needs = _needs(job, estimate, *limits)
    return [*(line for need in needs for line in _judge(need)), _summary(needs, estimate)]


def _among(options: tuple[str, ...]) -> str | None:
    sizes = [
        re.split(r"[=\s]+", option, maxsplit=1)[1:] for option in options if re.match(r"--mem[=\s]", option)
    ]
    return sizes[-1][0] if sizes else None


def _limit(option: str, text: str | None) -> int | None:
    return (parse_size(option, text) or None) if text else None  # 0: all that the node has


def _needs(job: Job, estimate: MemoryEstimate, node_limit: int | None, gpu_limit: int | None) -> list[_Need]:
    workers = job.workers_per_node
    node = _Need(
        "the first node",
        estimate.least_node_bytes(workers, has_server=True),
        estimate.node_bytes(workers, has_server=True),
        node_limit,
        "--mem",
        "ask for more memory, or for fewer workers on a node",
    )
    if estimate.gpu is None:
        return [node]
    per_gpu = workers // job.gpus_per_node
    least, most = per_gpu * estimate.gpu.least, per_gpu * estimate.gpu.total
    advice = "lower training.batch_size or --clients-per-gpu, or ask for larger GPUs"
    return [node, _Need("a GPU", least, most, gpu_limit, "--gpu-memory", advice)]


def _judge(need: _Need) -> list[str]:
    if need.limit is None or need.most <= need.limit:
        return []
    got = f"{need.option} = {_size(need.limit)}"
    if need.least > need.limit:
        raise ConfigError(f"{need.what} must have at least {_size(need.least)}, got {got}; {need.advice}")
    return [f"warning: {need.what} may need up to {_size(need.most)}, got {got}; {need.advice}"]


def _summary(needs: list[_Need], estimate: MemoryEstimate) -> str:
    parts = [f"{need.what} {_size(need.least)} to {_size(need.most)}" for need in needs]
    return f"memory   {', '.join(parts)} (server {_size(estimate.server.total)}, worker " + (
        f"{_size(estimate.worker.total)}), without the examples"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f}G"
