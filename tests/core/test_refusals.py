from __future__ import annotations

import re
from contextlib import AbstractContextManager

import pytest

from mpifedlora.core.method_config import RunTables
from mpifedlora.core.refusals import bars, needs, refuse, switch, value_of

TABLES = RunTables.model_validate(
    {
        "model": {"name": "minilm"},
        "data": {"source": "20newsgroups"},
        "aggregation": {"kind": "stack", "norm_bound": 2.5},
        "training": {"control_variates": True},
        "lora": {"client_ranks": [4, 8]},
    }
)


def refused_as(message: str) -> AbstractContextManager[object]:
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_a_switch_is_written_as_in_a_run_file() -> None:
    assert value_of(TABLES, "lora.client_ranks") == [4, 8]
    keys = ("aggregation.kind", "aggregation.norm_bound", "training.control_variates", "lora.client_ranks")
    assert [switch(TABLES, key).partition(" = ")[2] for key in keys] == ['"stack"', "2.5", "true", "[4, 8]"]
    assert switch(TABLES, "aggregation.kind") == 'aggregation.kind = "stack"'


def test_a_refusal_says_what_must_hold_what_was_got_and_what_to_do() -> None:
    with refused_as("this must hold, got that; do something"):
        refuse("this must hold", "that", "do something")


@pytest.mark.parametrize(
    ("allowed", "wanted"),
    [
        (("product",), '"product"'),
        (("product", "factors"), '"product" or "factors"'),
        (("product", "factors", "zero-pad"), '"product", "factors" or "zero-pad"'),
    ],
)
def test_a_need_names_all_that_would_do_and_sets_the_first(allowed: tuple[str, ...], wanted: str) -> None:
    with refused_as(
        f'x.y = "z" needs aggregation.kind = {wanted} (it is so), got "stack"; set aggregation.kind = '
        '"product", or leave x.y out'
    ):
        needs(TABLES, 'x.y = "z"', "aggregation.kind", *allowed, why="it is so")


def test_what_is_met_or_absent_is_let_pass() -> None:
    needs(TABLES, "x.y", "aggregation.kind", "product", "stack", why="")
    needs(TABLES, "x.y", "training.control_variates", True, why="")
    bars(TABLES, "x.y", "privacy.clip_norm", "")


def test_truths_and_numbers_are_written_as_in_a_run_file() -> None:
    with refused_as(
        "x.y needs training.control_variates = false (why), got true; set training.control_variates = false, "
        "or leave x.y out"
    ):
        needs(TABLES, "x.y", "training.control_variates", False, why="why")


def test_a_bar_names_both_keys() -> None:
    with refused_as(
        "x.y = 3 must stand without aggregation.norm_bound (why), got aggregation.norm_bound = 2.5; leave "
        "aggregation.norm_bound or x.y out"
    ):
        bars(TABLES, "x.y = 3", "aggregation.norm_bound", "why")
