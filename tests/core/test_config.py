from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mpifedlora.core.config import LARGEST_INT, RunConfig

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
    ],
)
def test_values_at_the_edge_are_taken(section: str, key: str, value: Any) -> None:
    assert getattr(getattr(build(**{section: {key: value}}), section), key) == value


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"lora": {"rank_max": 8, "rank_min": 16}}, "rank_min must be at most rank_max, got 16 and 8"),
        ({"federation": {"num_clients": 4, "cohort_size": 5}}, "cohort_size must be at most num_clients"),
        ({"training": {"local_steps": 1, "local_epochs": 1}}, "only one of local_steps and local_epochs"),
        ({"data": {"source": "x", "partition": "column"}}, "needs partition_column"),
        ({"federation": {"num_rounds": 1}}, "initiating.rounds must be at most federation.num_rounds"),
        ({"annealing": {"cooling_rounds": 17}}, "must fit into the 18 rounds"),
        ({"evaluation": {"split": "validation"}}, "needs a validation part"),
    ],
)
def test_rules_between_keys(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(**tables)


def test_constant_schedule_needs_no_room_for_cooling() -> None:
    config = build(federation={"num_rounds": 2}, annealing={"schedule": "constant", "cooling_rounds": 50})
    assert config.annealing.cooling_rounds == 50
