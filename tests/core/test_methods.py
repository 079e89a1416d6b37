from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpifedlora.core.config import RunConfig
from mpifedlora.core.methods import DEFAULT_METHOD, METHODS, apply_method, find_method
from mpifedlora.core.sections import FederationConfig
from mpifedlora.errors import ConfigError


def choose(method: str, **tables: Any) -> dict[str, Any]:
    return {"federation": {"method": method}, **tables}


def test_default_is_the_models_default() -> None:
    assert FederationConfig.model_validate({}).method == DEFAULT_METHOD
    silent, named = apply_method({})[0], apply_method(choose(DEFAULT_METHOD))[0]
    assert {**silent, "federation": {"method": DEFAULT_METHOD}} == named


# What defines each method, read from its paper: scope, aggregation of an adapter, and what else it adds.
DEFINED = {
    "sa-fedlora": ("adapter", None, {"server_optimizer.kind": "momentum"}),
    "fedavg": ("full", None, {}),
    "fedprox": ("full", None, {"training.mu": 0.01}),
    "scaffold": (
        "full",
        None,
        {
            "training.control_variates": True,
            "training.optimizer": "sgd",
            "aggregation.weights": "equal",
        },
    ),
    "fedavgm": ("full", None, {"server_optimizer.kind": "momentum"}),
    "fedadam": ("full", None, {"server_optimizer.kind": "fedadam"}),
    "fedit": ("adapter", "factors", {}),
    "ffa-lora": ("b-only", "factors", {}),
    "rolora": ("alternating", "factors", {}),
    "fedsa-lora": ("adapter", "factors", {"training.personal": "b", "evaluation.model": "personal"}),
    "flora": ("adapter", "stack", {}),
    "fedex-lora": ("adapter", "residual", {}),
    "flexlora": ("adapter", "product", {}),
    "hetlora": ("adapter", "zero-pad", {"aggregation.weights": "frobenius"}),
}
PLAIN = {
    "training.mu": 0.0,
    "training.personal": "none",
    "training.control_variates": False,
    "training.optimizer": "adamw",
    "server_optimizer.kind": "none",
    "aggregation.weights": "examples",
    "evaluation.model": "global",
}


def value_of(config: RunConfig, dotted: str) -> Any:
    section, _, key = dotted.partition(".")
    return getattr(getattr(config, section), key)


def test_methods_are_those_of_the_papers() -> None:
    assert [*DEFINED, "custom"] == list(METHODS)
    assert all(re.match(r"arXiv \d{4}\.\d{5}", METHODS[name].paper) for name in DEFINED)


@pytest.mark.parametrize("name", DEFINED)
def test_a_minimal_file_is_enough(name: str) -> None:
    tables, ignored = apply_method(choose(name, model={"name": "m"}, data={"source": "d"}))
    config = RunConfig.model_validate(tables)
    scope, kind, more = DEFINED[name]
    assert (config.training.scope, METHODS[name].settings.get("aggregation.kind"), ignored) == (
        scope,
        kind,
        (),
    )
    assert {key: value_of(config, key) for key in PLAIN} == PLAIN | more
    is_annealed = name == "sa-fedlora"
    assert (config.aggregation.kind, config.server_optimizer.beta1) == ("factors", 0.5) or not is_annealed
    assert (config.initiating.rounds == 0, config.annealing.schedule == "constant") == (not is_annealed,) * 2


def test_annealing_and_a_server_optimizer_go_together_where_the_basis_lasts() -> None:
    momentum = {"server_optimizer": {"kind": "momentum"}, "aggregation": {"kind": "factors"}}
    tables, ignored = apply_method(
        choose("sa-fedlora", model={"name": "m"}, data={"source": "d"}, **momentum)
    )
    assert (RunConfig.model_validate(tables).server_optimizer.kind, ignored) == ("momentum", ())


@pytest.mark.parametrize("name", DEFINED)
def test_one_override_makes_another_method_of_a_file(name: str) -> None:
    tables, _ = apply_method(
        choose(
            name,
            model={"name": "m"},
            data={"source": "d"},
            initiating={"rounds": 2, "scope": "adapter", "mu": 0.01},
            annealing={"schedule": "cubic", "cut": "freeze", "allocation": "spectral", "heating_rounds": 3},
            training={"optimizer": "adamw", "momentum": 0.5, "mu": 0.1},
        )
    )
    assert RunConfig.model_validate(tables).federation.method == name


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_switches_are_keys_of_the_models(method: Any) -> None:
    tables, _ = apply_method(choose(method.name, model={"name": "m"}, data={"source": "d"}))
    config = RunConfig.model_validate(tables)
    for dotted, value in {**method.settings, **method.defaults}.items():
        assert value_of(config, dotted) == value


def test_settings_win_and_the_ignored_keys_are_named() -> None:
    raw = choose("fedavg", training={"mu": 0.5, "scope": "full"}, initiating={"rounds": 3})
    tables, ignored = apply_method(raw)
    assert (tables["training"]["mu"], tables["training"]["scope"]) == (0.0, "full")
    assert tables["initiating"] == {"rounds": 0}
    assert ignored == ("initiating.rounds", "training.mu")


def test_defaults_apply_where_the_file_is_silent() -> None:
    assert apply_method(choose("fedprox"))[0]["training"]["mu"] == 0.01
    tables, ignored = apply_method(choose("fedprox", training={"mu": 0.3}))
    assert (tables["training"]["mu"], ignored) == (0.3, ())
    assert apply_method(choose("scaffold"))[0]["training"]["full_learning_rate"] == 0.3
    tables, ignored = apply_method(choose("scaffold", training={"full_learning_rate": 0.5}))
    assert (tables["training"]["full_learning_rate"], ignored) == (0.5, ())


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({}, ("factors", "momentum", 0.5)),
        ({"server_optimizer": {"beta1": 0.9}}, ("factors", "momentum", 0.9)),
        ({"aggregation": {"weights": "equal"}}, ("factors", "momentum", 0.5)),
        ({"aggregation": {"kind": "product"}}, ("product", "none", 0.9)),
        ({"aggregation": {"kind": "factors"}}, ("factors", "none", 0.9)),
        ({"server_optimizer": {"kind": "none"}}, ("product", "none", 0.9)),
    ],
)
def test_defaults_go_together(table: dict[str, Any], expected: tuple[Any, ...]) -> None:
    tables, ignored = apply_method(choose("sa-fedlora", model={"name": "m"}, data={"source": "d"}, **table))
    config = RunConfig.model_validate(tables)
    keys = ("aggregation.kind", "server_optimizer.kind", "server_optimizer.beta1")
    assert (tuple(value_of(config, key) for key in keys), ignored) == (expected, ())


@pytest.mark.parametrize("mu", [0, 0.0, -0.0])
def test_fedprox_without_its_term_is_refused(mu: float) -> None:
    with pytest.raises(ConfigError, match=r"training\.mu must be above 0 .* fedprox is fedavg"):
        apply_method(choose("fedprox", training={"mu": mu}))


def test_custom_leaves_every_switch() -> None:
    raw = choose("custom", training={"scope": "full", "mu": 1.0}, aggregation={"kind": "factors"})
    assert apply_method(raw) == (raw, ())


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("fedvag", 'did you mean "fedavg"'),
        ("FedProx", 'did you mean "fedprox"'),
        ("zzz", "mpifedlora methods"),
        ("", "mpifedlora methods"),
        ("line\nbreak" * 99, "mpifedlora methods"),
    ],
)
def test_unknown_method(name: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy) as caught:
        find_method(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("raw", [{"federation": 3}, {"federation": {"method": 3}}, {"training": []}])
def test_wrong_types_are_left_to_the_models(raw: dict[str, Any]) -> None:
    tables, ignored = apply_method(raw)
    assert ignored == ()
    assert {name: tables[name] for name in raw} == raw


values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
keys = st.sampled_from(["scope", "rounds", "schedule", "kind", "mu", "personal", "control_variates", "other"])
sections = st.sampled_from(
    ["training", "initiating", "annealing", "aggregation", "server_optimizer", "evaluation", "other"]
)
raws = st.dictionaries(sections, values | st.dictionaries(keys, values, max_size=4), max_size=5)


@settings(deadline=None, max_examples=60)
@given(raws, st.sampled_from([name for name in METHODS if name != "fedprox"]))
def test_applying_twice_is_applying_once(tables: dict[str, Any], name: str) -> None:
    raw = choose(name, **tables)
    before = copy.deepcopy(raw)
    once, ignored = apply_method(raw)
    assert repr(raw) == repr(before)
    assert repr(apply_method(once)) == repr((once, ()))
    assert set(ignored) <= set(METHODS[name].settings)
