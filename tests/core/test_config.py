from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mpifedlora.core.config import RunConfig
from mpifedlora.core.method_config import ranks_of_clients
from mpifedlora.core.sections import LARGEST_INT

MINIMAL: dict[str, dict[str, Any]] = {"model": {"name": "minilm"}, "data": {"source": "20newsgroups"}}


def build(**tables: Any) -> RunConfig:
    return RunConfig.model_validate({**MINIMAL, **tables})


def test_only_model_and_data_must_be_given() -> None:
    config = build()
    assert (config.lora.rank_max, config.lora.rank_min) == (16, 2)
    for name in MINIMAL:
        with pytest.raises(ValidationError):
            RunConfig.model_validate({key: table for key, table in MINIMAL.items() if key != name})


def test_values_are_fixed() -> None:
    with pytest.raises(ValidationError):
        build().lora.rank_max = 8


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("lora", "rank_max", True),
        ("lora", "rank_max", "16"),
        ("lora", "rank_max", 16.0),
        ("lora", "rank_max", 0),
        ("lora", "rank_max", LARGEST_INT + 1),
        ("lora", "alpha", True),
        ("lora", "alpha", "32"),
        ("lora", "alpha", 0),
        ("lora", "alpha", 10**400),
        ("lora", "dropout", 1.0),
        ("lora", "dropout", float("nan")),
        ("lora", "target_modules", []),
        ("lora", "target_modules", [1]),
        ("training", "learning_rate", float("inf")),
        ("training", "momentum", float("nan")),
        ("training", "mu", float("nan")),
        ("training", "optimizer", "AdamW"),
        ("data", "test_fraction", 0.0),
        ("data", "max_length", 1),
        ("federation", "seed", -1),
        ("federation", "seed", 2**32),
        ("federation", "reproducible", 1),
        ("model", "name", ""),
        ("evaluation", "everyy", 1),
        ("evaluation", "model", "local"),
        ("federation", "sampling", "bernoulli"),
        ("federation", "sampling", "poisson"),
        ("lora", "client_ranks", []),
        ("lora", "client_ranks", [0]),
        ("lora", "client_ranks", [4, True]),
        ("lora", "client_ranks", [17]),
        ("lora", "client_capacities", []),
        ("lora", "client_capacities", [0.0]),
        ("lora", "client_capacities", [0.5, 1.5]),
        ("lora", "client_capacities", [float("nan")]),
        ("initiating", "scope", "b-only"),
        ("training", "control_variates", 1),
        ("training", "personal", "a"),
        ("annealing", "cut_step", 0),
        ("annealing", "metropolis_temperature", 0.0),
        ("aggregation", "kind", "mean"),
        ("aggregation", "norm_bound", 0.0),
        ("server_optimizer", "beta1", 1.0),
        ("server_optimizer", "beta2", 1.0),
        ("server_optimizer", "tau", 0.0),
        ("server_optimizer", "learning_rate", 0.0),
        ("privacy", "clip_norm", 0.0),
        ("privacy", "noise_multiplier", -0.1),
        ("privacy", "delta", 0.0),
        ("privacy", "delta", 1.0),
        ("privacy", "noise_seed", -1),
        ("training", "compile", 1),
        ("transport", "collect", "gatherv"),
        ("transport", "pipeline", 1),
        ("transport", "chunk_bytes", 0),
        ("transport", "uplink_dtype", "float8"),
        ("transport", "downlink_dtype", "half"),
        ("transport", "error_feedback", "true"),
        ("transport", "reduce_dtype", "bfloat16"),
        ("transport", "gpu_buffers", "pinned"),
    ],
)
def test_wrong_values_are_refused(section: str, key: str, value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        build(**{section: {**MINIMAL.get(section, {}), key: value}})
    assert {error["loc"][0] for error in caught.value.errors()} == {section}


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("lora", "alpha", 32),
        ("lora", "target_modules", ["query"]),
        ("training", "learning_rate", 1e6),
        ("training", "grad_clip", 0),
        ("federation", "seed", 2**32 - 1),
        ("initiating", "rounds", 0),
        ("lora", "client_ranks", [1, 16]),
        ("lora", "client_capacities", [1, 1e-9]),
        ("annealing", "tolerance", 0.0),
        ("aggregation", "num_byzantine", 0),
        ("server_optimizer", "beta1", 0.0),
        ("privacy", "noise_multiplier", 0),
        ("data", "partition", "quantity"),
        ("transport", "chunk_bytes", 1),
    ],
)
def test_values_at_the_edge_are_taken(section: str, key: str, value: Any) -> None:
    tables = {section: {**MINIMAL.get(section, {}), key: value}}
    assert getattr(getattr(build(**tables), section), key) == value


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"lora": {"rank_max": 8, "rank_min": 16}}, "rank_min must be at most rank_max, got 16 and 8"),
        ({"federation": {"num_clients": 4, "cohort_size": 5}}, "cohort_size must be at most num_clients"),
        ({"federation": {"sampling": "poisson"}}, 'sampling = "poisson" needs cohort_size .* got none; set'),
        ({"training": {"local_steps": 1, "local_epochs": 1}}, "only one of local_steps and local_epochs"),
        (
            {"lora": {"rank_max": 8, "client_ranks": [4, 9]}},
            "client_ranks must be at most rank_max, got 9 and 8; lower the client rank above rank_max",
        ),
        (
            {"lora": {"client_ranks": [4], "client_capacities": [0.5]}},
            r"only one of client_ranks and client_capacities may be given, got \[4\] and \[0.5\]; remove one",
        ),
        ({"data": {"source": "x", "partition": "column"}}, "needs partition_column"),
        ({"federation": {"num_rounds": 1}}, "initiating.rounds must be at most federation.num_rounds"),
        ({"annealing": {"cooling_rounds": 17}}, "num_rounds must be at least 21 .*got 20; raise it"),
        ({"evaluation": {"split": "validation"}}, "needs a validation part"),
    ],
)
def test_rules_between_keys(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(**tables)


def test_constant_schedule_needs_no_room_for_cooling() -> None:
    config = build(federation={"num_rounds": 2}, annealing={"schedule": "constant", "cooling_rounds": 50})
    assert config.annealing.cooling_rounds == 50


def test_several_tables_may_be_wrong_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        build(lora={"rank_max": 0}, privacy={"delta": 2.0}, server_optimizer={"kind": "adam"})
    assert [error["loc"][0] for error in caught.value.errors()] == ["lora", "server_optimizer", "privacy"]


@pytest.mark.parametrize(
    ("num_clients", "lora", "ranks"),
    [
        (3, {"rank_max": 8}, (8, 8, 8)),
        (5, {"client_ranks": [4, 16]}, (4, 16, 4, 16, 4)),
        (2, {"client_ranks": [4, 16]}, (4, 16)),
        # 0.5 * 15 = 7.5, and 0.04 * 15 = 0.6 has no whole number but 0 below it.
        (4, {"rank_max": 15, "client_capacities": [0.5, 1, 0.04]}, (7, 15, 1, 7)),
        # In binary, 0.29 * 100 is 28.999999999999996.
        (1, {"rank_max": 100, "client_capacities": [0.29]}, (29,)),
        (1, {"client_capacities": [1e-9]}, (1,)),
    ],
)
def test_ranks_of_clients(num_clients: int, lora: dict[str, Any], ranks: tuple[int, ...]) -> None:
    assert ranks_of_clients(build(federation={"num_clients": num_clients}, lora=lora)) == ranks
