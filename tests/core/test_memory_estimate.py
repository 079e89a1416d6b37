from dataclasses import replace

import pytest

from mpifedlora.core.config import RunConfig
from mpifedlora.core.memory_estimate import (
    CUDA_CONTEXT_BYTES,
    LIBRARIES_BYTES,
    Footprint,
    Matrix,
    MemoryEstimate,
    ModelSizes,
    estimate_memory,
)

# Two layers of one matrix each: 1,000 weights in all, of which A and B have 3 + 4 a rank and layer.
MODEL = ModelSizes(
    base_values=1000,
    linears=(Matrix(3, 4), Matrix(3, 4)),
    adapted=(Matrix(3, 4), Matrix(3, 4)),
    num_layers=2,
    hidden_size=4,
    num_heads=2,
    max_tokens=16,
)
HEAD = 2 * (4 + 1)
RANK_2 = 2 * 2 * (3 + 4) + HEAD


def config(**tables):
    given = {
        "model": {"name": "m"},
        "data": {"source": "d.csv", "max_length": 8},
        "lora": {"rank_max": 2, "rank_min": 1},
        "federation": {"method": "custom", "num_clients": 6, "reproducible": False},
        "initiating": {"rounds": 0},
        "training": {"batch_size": 5},
        "evaluation": {"batch_size": 5},
        "transport": {"pipeline": False},
        "checkpoint": {"every": 0},
    }
    for name, table in tables.items():
        given[name] = {**given.get(name, {}), **table}
    return RunConfig.model_validate(given)


def parts(footprint, constant=LIBRARIES_BYTES):
    """Return the parts but for the constant, without the spare tenth."""
    assert footprint.parts["libraries"] == constant
    return {name: 10 * size // 11 for name, size in footprint.parts.items() if name != "libraries"}


def test_a_worker_on_a_cpu():
    estimate = estimate_memory(config(), MODEL, 3, on_gpu=False)
    assert estimate.values == RANK_2 == 38
    assert estimate.gpu is None
    # Of each of 5 * 8 tokens: both layers' inputs and outputs, two LoRA directions each, four more vectors,
    # and two rows of scores of each head.
    a_token = 2 * (3 + 4) + 2 * 2 + 2 * 4 * 4 + 2 * 2 * 2 * 8
    assert parts(estimate.worker) == {
        "base weights": 4 * 1000,
        "message and state": 4 * 3 * RANK_2,  # the state, the message, and what a cut freezes
        "updates of its clients": 4 * 2 * RANK_2,
        "gradients": 4 * RANK_2,
        "optimiser": 4 * 2 * RANK_2,
        "activations": 4 * 5 * 8 * a_token,
    }
    assert estimate.worker.total - estimate.worker.least == estimate.worker.parts["activations"]


def test_a_worker_with_a_gpu_trains_there():
    estimate = estimate_memory(config(), MODEL, 3, on_gpu=True)
    on_gpu = parts(estimate.gpu, CUDA_CONTEXT_BYTES)
    assert set(on_gpu) == {"base weights", "update in training", "gradients", "optimiser", "activations"}
    assert on_gpu["update in training"] == 4 * 2 * RANK_2  # what it starts from, and what it makes of it
    assert "gradients" not in estimate.worker.parts


@pytest.mark.parametrize(("kind", "moments"), [("none", 0), ("momentum", 1), ("fedadam", 2), ("fedyogi", 2)])
def test_the_server_holds_its_moments_before_and_after_a_round(kind, moments):
    tables = {"aggregation": {"kind": "factors"}, "server_optimizer": {"kind": kind}}
    server = parts(estimate_memory(config(**tables), MODEL, 3, on_gpu=False).server)
    assert server.get("optimiser", 0) == 2 * moments * 4 * RANK_2


def test_the_server_holds_whole_rows_or_parts_of_them():
    plain = parts(estimate_memory(config(), MODEL, 3, on_gpu=False).server)
    assert plain["updates of the cohort"] == 2 * 4 * 6 * RANK_2
    large = replace(MODEL, adapted=(Matrix(10**6, 10**6),))
    pipelined = config(transport={"pipeline": True})
    in_parts = parts(estimate_memory(pipelined, large, 3, on_gpu=False).server)
    assert in_parts["updates of the cohort"] == 2**24  # of all clients, in two parts
    reduce = config(transport={"collect": "reduce"}, aggregation={"kind": "factors"})
    summed = parts(estimate_memory(reduce, MODEL, 3, on_gpu=False).server)
    assert summed["updates of the cohort"] == 2 * 4 * RANK_2


@pytest.mark.parametrize(
    ("tables", "part", "expected"),
    [
        ({"training": {"optimizer": "sgd"}}, "optimiser", None),
        ({"training": {"optimizer": "sgd", "momentum": 0.9}}, "optimiser", 4 * RANK_2),
        ({"model": {"dtype": "bfloat16"}}, "base weights", 2 * 1000),
        ({"training": {"precision": "bfloat16"}}, "base weights", 4 * 1000 + 2 * 1000),
        ({"annealing": {"cut": "drop"}}, "message and state", 4 * 2 * RANK_2),
        ({"initiating": {"rounds": 1, "scope": "full"}}, "gradients", 4 * (1000 + HEAD)),
        ({"federation": {"cohort_size": 3}}, "updates of its clients", 4 * RANK_2),
        ({"transport": {"uplink_dtype": "int8"}}, "updates of its clients", 2 * RANK_2),
        ({"transport": {"uplink_dtype": "int8"}}, "update in training", 4 * RANK_2),
        ({"lora": {"client_ranks": [1]}}, "gradients", 4 * (2 * (3 + 4) + HEAD)),
    ],
)
def test_what_the_configuration_changes(tables, part, expected):
    assert parts(estimate_memory(config(**tables), MODEL, 3, on_gpu=False).worker).get(part) == expected


def test_a_model_reads_no_more_tokens_than_it_can():
    short, long = config(data={"max_length": 16}), config(data={"max_length": 512})
    assert estimate_memory(short, MODEL, 3, on_gpu=False) == estimate_memory(long, MODEL, 3, on_gpu=False)


def test_a_node_shares_base_weights_at_best():
    process = Footprint({"libraries": 10, "base weights": 100, "activations": 1000})
    estimate = MemoryEstimate(process, process, None, 1)
    assert estimate.node_bytes(3, has_server=True) == 4 * 1110
    assert estimate.least_node_bytes(3, has_server=True) == 4 * 10 + 100
    assert estimate.least_node_bytes(3, has_server=False) == 3 * 10 + 100
