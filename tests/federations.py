"""Whole federations on a communicator, each made once, and what they leave behind."""

import atexit
import shutil
import tempfile
import time
from pathlib import Path

import support
import torch
from safetensors.torch import load_file

from mpifedlora.core.methods import METHODS
from mpifedlora.io.results import read_results
from mpifedlora.runtime import launch

# Timings differ, and more workers hear more broadcasts; all else must be equal to the last bit.
NOT_COMPARED = {"train_s", "collect_s", "aggregate_s", "broadcast_s", "evaluate_s", "round_s", "mpi_bytes"}

HEADER_UP, NUM_MODULES = 128, 12
HEADER_DOWN = 128 + 8 * NUM_MODULES


TWO_OF_FOUR = "federation.cohort_size=2"
UNLIKE = "lora.client_ranks=[1, 2, 4]"
VALIDATION = "data.validation_fraction=0.2"
PRIVATE = ["privacy.clip_norm=0.5", "privacy.noise_multiplier=1.0", "privacy.noise_seed=3"]
PRIVATE += ["aggregation.weights=equal"]
CUSTOM = "federation.method=custom"
EXACT = "aggregation.kind=product"
SMALL = "transport.chunk_bytes=1536"  # as few bytes as a part may have: most are of one module

PRESETS = {name: [f"federation.method={name}"] for name in METHODS if name != "custom"}
VARIANTS = {
    "hetlora, ranks": [*PRESETS["hetlora"], UNLIKE],
    "flexlora, ranks": [*PRESETS["flexlora"], UNLIKE],
    "flora, ranks": [*PRESETS["flora"], UNLIKE],
    "annealed ranks, cohort": [EXACT, UNLIKE, TWO_OF_FOUR],
    "rolora, cohort": [*PRESETS["rolora"], TWO_OF_FOUR, SMALL],
    "fedsa-lora, cohort": [*PRESETS["fedsa-lora"], TWO_OF_FOUR, "evaluation.on=workers", SMALL],
    "own head": [
        CUSTOM,
        SMALL,
        "training.personal=b-and-head",
        "evaluation.model=personal",
        "aggregation.kind=factors",
        "annealing.schedule=constant",
        "initiating.rounds=0",
    ],
    "flora, cohort": [*PRESETS["flora"], TWO_OF_FOUR],
    "scaffold with cuts": [
        CUSTOM,
        TWO_OF_FOUR,
        "training.control_variates=true",
        "training.optimizer=sgd",
        "aggregation.kind=factors",
        "initiating.mu=0",
    ],
    "fedyogi with cuts": [CUSTOM, "aggregation.kind=factors", "server_optimizer.kind=fedyogi"],
    "residual with cuts": [CUSTOM, "aggregation.kind=residual"],
    "exact sums, cohort": [EXACT, TWO_OF_FOUR, SMALL],
    "spectral": [EXACT, "annealing.allocation=spectral"],
    "metropolis": [EXACT, "annealing.schedule=metropolis", "annealing.cut=drop", VALIDATION],
    "target": ["annealing.schedule=target", VALIDATION, SMALL],
    "median": [EXACT, "aggregation.robust=median", SMALL],
    "multi-krum": ["aggregation.robust=multi-krum", "aggregation.num_byzantine=0"],
    "private ffa-lora": [*PRESETS["ffa-lora"], *PRIVATE, TWO_OF_FOUR, "federation.sampling=poisson"],
    "private fedavg": [*PRESETS["fedavg"], *PRIVATE],
}
RUNS = {**PRESETS, **VARIANTS}


def meet(comm):
    """Wait for all processes, asleep: in a collective they would take the cores from those at work."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.002)


def shared_folder():
    """Return a folder with a run file that all processes share; every process calls it."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    made = tempfile.mkdtemp(prefix="mpifedlora-") if world.rank == 0 else None
    shared = Path(world.bcast(made))
    if world.rank == 0:
        atexit.register(shutil.rmtree, shared, ignore_errors=True)
        support.make_run_file(shared)
    world.Barrier()
    return shared


def federate(folder, name, settings, comm, done={}):  # noqa: B006 (each run is made once a session)
    """Return the output folder of a run."""
    out = folder / f"{name}-{comm.size}"
    if out not in done:
        done[out] = settings, launch.run(folder / "run.toml", settings, out, True, comm=comm)
    assert done[out] == (settings, 0)
    return out


def contents(out):
    """Return everything but times: arrays of the results, and tensors and texts of the other files."""
    results = read_results(out / "results.h5")
    arrays = {**results.rounds, **{f"clients/{key}": value for key, value in results.clients.items()}}
    found = {key: value.tobytes() for key, value in arrays.items() if key.split("/")[-1] not in NOT_COMPARED}
    for file in sorted(out.rglob("*.*")):
        if file.parent.name == "checkpoints":
            continue  # they name the workers
        name = str(file.relative_to(out))
        if file.suffix == ".safetensors":
            found |= {f"{name}:{key}": value.numpy().tobytes() for key, value in load_file(file).items()}
        elif file.suffix == ".json":
            found[name] = file.read_bytes()
    return found


def assert_same_bits(folder, name, settings, comm, like=None):
    """Compare everything but times with a run on one process alone.

    Args:
        folder: of the run file.
        name: of the run.
        settings: of the run.
        comm: that it is made on.
        like: name and settings of the run on one process; by default the same.
    """
    from mpi4py import MPI

    out = federate(folder, name, settings, comm)
    if comm.rank == 0 and (comm.size > 1 or like):
        found, wanted = contents(out), contents(federate(folder, *(like or (name, settings)), MPI.COMM_SELF))
        assert found.keys() == wanted.keys()
        assert [key for key in found if found[key] != wanted[key]] == []


def assert_close(out, other):
    """Compare the weights that two runs leave behind, up to what the order of a sum may change."""
    found, wanted = weights(out), weights(other)
    assert found.keys() == wanted.keys() != set()
    for name, weight in found.items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-3, atol=1e-4, msg=name)


def weights(out):
    """Return what a run has trained, by name: products of factors, since their basis is any, and the rest."""
    stored = {}
    for file in sorted(out.rglob("*_model/*.safetensors")) + sorted(out.rglob("adapter/*.safetensors")):
        stored |= load_file(file)
    products = {
        name: stored[name.replace("lora_A", "lora_B")] @ a for name, a in stored.items() if "lora_A" in name
    }
    return products | {name: weight for name, weight in stored.items() if "lora_" not in name}


def values_of(hidden=32, inner=64, num_layers=2, num_labels=3):
    """Values of all weights, of the head, and of one rank of every module, from the tiny model's sizes."""
    embeddings = (200 + 64 + 2) * hidden + 2 * hidden
    layer = 4 * (hidden * hidden + hidden) + 2 * hidden * inner + inner + hidden + 4 * hidden
    head = num_labels * hidden + num_labels
    per_rank = num_layers * (4 * 2 * hidden + 2 * (hidden + inner))
    return embeddings + num_layers * layer + head, head, per_rank
