"""One process of bench_startup.py: `benchmarks/run.sh startup_process.py N KIND FILE`, KIND as in MEASURES.

The first process writes the list of all processes' findings to FILE as JSON, the server's first.
"""

from __future__ import annotations

import csv
import gc
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

RUN = """
[model]
name = "minilm"
[data]
source = "{source}"
partition = "iid"
[federation]
method = "fedit"
num_clients = {num_clients}
num_rounds = 1
[training]
local_steps = 1
batch_size = 4
threads = 1
device = "cpu"
[evaluation]
max_examples = 4
"""
MB = 1e6


def measure_run(comm: Any, folder: Path) -> dict[str, float]:
    """Run one round, and look at clock and memory when the first training step begins.

    Returns:
        `begin_s`, `first_step_s` (since mpirun was started; workers only), `libraries_s` of the time
        between them, and memory: of a worker at its first step, of the server at the end.
    """
    from mpifedlora.runtime import launch

    found = {"begin_s": age_s(), **import_libraries(is_rare=True)}
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    def look(*_: object) -> None:
        if "first_step_s" not in found:
            found.update(first_step_s=age_s(), **memory())

    register_optimizer_step_pre_hook(look)
    if comm.rank == 0:
        write_run(folder, comm.size)
    comm.Barrier()
    code = launch.run(folder / "run.toml", [], folder / "out", overwrite=True, comm=comm)
    assert code == 0, code
    return found if "first_step_s" in found else {**found, **memory()}


def write_run(folder: Path, num_processes: int) -> None:
    """Write a run file, and data so small that they take no time."""
    rows = [(f"{word} and some more words", word) for word in ("one", "two") for _ in range(40)]
    with (folder / "data.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *rows])
    text = RUN.format(source=folder / "data.csv", num_clients=2 * num_processes)
    (folder / "run.toml").write_text(text)


def measure_weights(comm: Any, folder: Path) -> dict[str, float]:
    """Read the base weights, all processes at once, and look how much memory they take; then copy them.

    Every other process imports the libraries at Python's own pace of garbage collection.

    Returns:
        `weights_mb`, and proportional memory (PSS) before, with the weights, and with copies too.
    """
    found = import_libraries(is_rare=comm.rank % 2 == 1)
    from mpifedlora.runtime.setup import model_path, quiet_libraries
    from mpifedlora.training.base import build_base

    quiet_libraries()

    def read() -> Any:
        return build_base(model_path("minilm"), num_labels=2).module

    read()  # whatever the first time takes once and for all
    gc.collect()
    # Nobody may change anything while another one looks.
    comm.Barrier()
    found["before_mb"] = memory()["pss_mb"]
    comm.Barrier()
    weights = list(read().parameters())
    total = sum(float(weight.detach().sum()) for weight in weights)  # every page is touched
    comm.Barrier()
    found["read_mb"] = memory()["pss_mb"]
    comm.Barrier()
    copies = [weight.detach().clone() for weight in weights]
    comm.Barrier()
    found["copied_mb"] = memory()["pss_mb"]
    comm.Barrier()
    assert total == sum(float(copy.sum()) for copy in copies)
    return {**found, "weights_mb": sum(weight.nbytes for weight in weights) / MB}


def import_libraries(*, is_rare: bool) -> dict[str, float]:
    """Import torch, transformers and PEFT; return the time: `libraries_s` and `libraries_cpu_s`."""
    from mpifedlora.runtime.setup import collect_rarely

    if is_rare:
        collect_rarely()
    started, cpu = time.perf_counter(), time.process_time()
    import peft  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoTokenizer, BertModel  # noqa: F401

    return {"libraries_s": time.perf_counter() - started, "libraries_cpu_s": time.process_time() - cpu}


def age_s() -> float:
    """Return the seconds since mpirun was started; NaN where the system does not tell."""
    from mpifedlora.io.process import seconds_since_start

    age = seconds_since_start()
    return math.nan if age is None else age


def memory() -> dict[str, float]:
    """Return this process's memory: resident, its share of it, and what is its own, as Linux counts them."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    names = {"rss_mb": "Rss", "pss_mb": "Pss", "private_dirty_mb": "Private_Dirty"}
    return {name: kib[key] * 1024 / MB for name, key in names.items()}


MEASURES = {"run": measure_run, "weights": measure_weights}


def main(kind: str, file: str) -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    found = comm.gather(MEASURES[kind](comm, Path(file).parent))
    if found is not None:
        Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
