from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from mpifedlora.core.combinations import RULES
from mpifedlora.core.config import RunConfig
from mpifedlora.core.method_config import RunTables
from mpifedlora.core.methods import apply_method

Switches = dict[str, Any]


def tables_of(switches: Switches) -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = {"model": {"name": "minilm"}, "data": {"source": "20newsgroups"}}
    for key, value in switches.items():
        section, _, name = key.partition(".")
        tables.setdefault(section, {})[name] = value
    return tables


def build(switches: Switches) -> RunConfig:
    return RunConfig.model_validate(tables_of(switches))


def refusal(switches: Switches) -> str:
    with pytest.raises(ValidationError) as caught:
        build(switches)
    (error,) = caught.value.errors()
    assert error["loc"] == ()
    return error["msg"].removeprefix("Value error, ")


def kind(value: str) -> Switches:
    return {"aggregation.kind": value}


ONE_STAGE: Switches = {"initiating.rounds": 0}
FIXED: Switches = {"annealing.schedule": "constant", "aggregation.kind": "factors"}
B_ONLY: Switches = {"training.scope": "b-only", **FIXED}
ALTERNATING: Switches = {"training.scope": "alternating", **FIXED}
PERSONAL: Switches = {"training.personal": "b", "evaluation.model": "personal", **FIXED, **ONE_STAGE}
FULL: Switches = {"training.scope": "full", "initiating.scope": "full"}
FEDADAM: Switches = {"server_optimizer.kind": "fedadam"}
SCAFFOLD: Switches = {"training.control_variates": True, "training.optimizer": "sgd", "initiating.mu": 0.0}
LATE: Switches = {
    "faults.late": "next-round",
    "faults.round_deadline_s": 1.0,
    "federation.reproducible": False,
}
PRIVATE: Switches = {"privacy.clip_norm": 1.0, "aggregation.weights": "equal"}
RANKS: Switches = {"lora.client_ranks": [4, 8]}
METROPOLIS: Switches = {
    "annealing.schedule": "metropolis",
    "annealing.cut": "drop",
    "data.validation_fraction": 0.1,
}
OWN_PARTS: Switches = {"data.partition": "files", "evaluation.on": "workers"}
TARGET: Switches = {"annealing.schedule": "target", "data.validation_fraction": 0.1}
REDUCE: Switches = {"transport.collect": "reduce", "federation.reproducible": False}
FED_BACK: Switches = {"transport.error_feedback": True, "transport.uplink_dtype": "int8"}

# What is taken, the change that makes no sense beside it, and a part of what is then said.
NEAR_MISSES: list[tuple[Switches, Switches, str]] = [
    # stages
    (
        {"federation.num_rounds": 5},
        {"initiating.rounds": 6},
        "at most federation.num_rounds, got 6 and 5; lower",
    ),
    (
        FULL,
        {"initiating.scope": "adapter"},
        'after an adapter, got initiating.scope = "adapter" and training.scope',
    ),
    (
        {"annealing.cooling_rounds": 16},
        {"annealing.cooling_rounds": 19},
        "(2 of initiating.rounds, 2 of annealing.heating_rounds, 19 of cooling), got 20; raise it, or lower "
        "annealing.cooling_rounds",
    ),
    (TARGET, {"annealing.heating_rounds": 18}, "num_rounds must be at least 21"),
    (
        {"federation.num_rounds": 5},
        {"federation.num_rounds": 3},
        "must be at least 5 (2 of initiating.rounds, 2 of annealing.heating_rounds, 1 of cooling), got 3; "
        "raise it, or lower annealing.heating_rounds to 0",
    ),
    # a fixed or kept factor
    (
        B_ONLY,
        {"annealing.schedule": "linear"},
        'training.scope = "b-only" needs annealing.schedule = "constant" (a fixed or kept factor cannot be '
        'cut), got "linear"; set annealing.schedule = "constant", or leave training.scope out',
    ),
    (B_ONLY, kind("product"), 'needs aggregation.kind = "factors" (a fixed or kept factor is averaged as'),
    (B_ONLY, {"annealing.allocation": "spectral"}, 'needs annealing.allocation = "uniform"'),
    (B_ONLY, RANKS, 'training.scope = "b-only" must stand without lora.client_ranks'),
    (B_ONLY, {"lora.client_capacities": [0.5]}, "got lora.client_capacities = [0.5]; leave"),
    (
        ALTERNATING,
        {"annealing.schedule": "cosine"},
        'training.scope = "alternating" needs annealing.schedule',
    ),
    (ALTERNATING, kind("stack"), 'set aggregation.kind = "factors"'),
    (PERSONAL, {"annealing.schedule": "linear"}, 'training.personal = "b" needs annealing.schedule = "const'),
    (PERSONAL, kind("product"), 'training.personal = "b" needs aggregation.kind = "factors"'),
    (PERSONAL, {"annealing.allocation": "spectral"}, 'needs annealing.allocation = "uniform"'),
    (PERSONAL, RANKS, "must stand without lora.client_ranks"),
    # a B that stays with its client
    (PERSONAL, {"training.scope": "b-only"}, 'personal = "b" needs training.scope = "adapter"'),
    (PERSONAL, {"training.scope": "full"}, 'personal = "b" needs training.scope = "adapter"'),
    (PERSONAL, {"initiating.rounds": 1}, "needs initiating.rounds = 0"),
    (
        PERSONAL | {"aggregation.weights": "equal"},
        {"aggregation.weights": "frobenius"},
        'needs aggregation.weights = "examples" or "equal" (the server never sees B), got "frobenius"',
    ),
    (PERSONAL, {"aggregation.robust": "krum"}, 'needs aggregation.robust = "none"'),
    (PERSONAL, {"aggregation.norm_bound": 1.0}, "must stand without aggregation.norm_bound"),
    (PERSONAL, FEDADAM, 'needs training.personal = "none" (the server never sees B)'),
    (
        PERSONAL,
        {"training.control_variates": True, "training.optimizer": "sgd"},
        'training.control_variates = true needs training.personal = "none"',
    ),
    (
        PERSONAL,
        {"evaluation.model": "global"},
        '(a personal method has no global model to measure), got "global"; set evaluation.model = "person',
    ),
    ({}, {"evaluation.model": "personal"}, 'evaluation.model = "personal" needs training.personal = "b"'),
    # a rank for each client
    (RANKS | ONE_STAGE, FULL, 'lora.client_ranks needs training.scope = "adapter"'),
    (RANKS, {"initiating.scope": "full"}, "lora.client_ranks needs the same scope in all rounds"),
    (RANKS | ONE_STAGE | {"initiating.scope": "full"}, {"initiating.rounds": 1}, "set initiating.rounds = 0"),
    (RANKS | kind("zero-pad"), kind("factors"), 'needs aggregation.kind = "product", "zero-pad" or "stack"'),
    (RANKS | kind("stack"), kind("residual"), 'got "residual"; set aggregation.kind = "product", or leave'),
    ({"lora.client_capacities": [1.0]}, kind("factors"), "lora.client_capacities needs aggregation.kind"),
    (RANKS, {"training.control_variates": True}, "SCAFFOLD with rank lists"),
    (RANKS, FEDADAM, 'lora.client_ranks needs server_optimizer.kind = "none"'),
    (
        RANKS | {"federation.num_clients": 2},
        {"federation.num_clients": 1},
        "lora.client_ranks must have at most federation.num_clients entries, got 2 and 1; shorten",
    ),
    # a server that keeps moments
    (
        FEDADAM | kind("factors"),
        kind("product"),
        "(every SVD gives a new basis, so moments of the last round",
    ),
    (FEDADAM | kind("factors"), kind("stack"), "(the adapter is restarted every round"),
    (FEDADAM | kind("factors"), kind("residual"), "no longer be what the exact residual completes"),
    (FEDADAM | kind("factors"), kind("zero-pad"), "the zeros of a padded factor are no step of its client"),
    (FEDADAM | B_ONLY, {"training.scope": "alternating"}, "moments of the last round belong to the other fa"),
    (FEDADAM | FULL | kind("stack"), {**ONE_STAGE, "training.scope": "adapter"}, 'kind = "fedadam" needs'),
    # control variates
    (SCAFFOLD | FULL, {"training.optimizer": "adamw"}, "(variates are mean gradients, (x - y) / (steps * le"),
    (SCAFFOLD | FULL, {"training.momentum": 0.9}, "needs training.momentum = 0 ("),
    (SCAFFOLD | FULL, {"training.mu": 0.1}, "needs training.mu = 0 ("),
    (SCAFFOLD | FULL, {"training.head_rate_factor": 4.0}, "needs training.head_rate_factor = 1.0 ("),
    (SCAFFOLD | FULL, {"initiating.mu": 0.1}, "needs initiating.mu = 0 ("),
    (SCAFFOLD | FULL | ONE_STAGE | {"initiating.mu": 0.1}, {"initiating.rounds": 1}, "needs initiating.mu"),
    (SCAFFOLD | kind("factors"), kind("product"), "so variates of the last round mean nothing"),
    (SCAFFOLD | kind("factors"), {"initiating.scope": "full"}, "needs the same scope in all rounds"),
    (SCAFFOLD | B_ONLY | ONE_STAGE, {"initiating.rounds": 1}, "needs the same scope in all rounds"),
    (SCAFFOLD | B_ONLY | ONE_STAGE, {"training.scope": "alternating"}, "variates of the last round belong"),
    # robust means
    (
        {"aggregation.robust": "krum", "federation.num_clients": 5},
        {"federation.num_clients": 4},
        'robust = "krum" needs a cohort of at least 2 * aggregation.num_byzantine + 3 = 5 clients, got '
        "federation.num_clients = 4; raise federation.num_clients, or lower aggregation.num_byzantine",
    ),
    (
        {"aggregation.robust": "multi-krum", "aggregation.num_byzantine": 2, "federation.cohort_size": 7},
        {"federation.cohort_size": 6},
        "+ 3 = 7 clients, got federation.cohort_size = 6; raise federation.cohort_size",
    ),
    (
        {"aggregation.robust": "trimmed-mean", "federation.num_clients": 3},
        {"federation.num_clients": 2},
        "+ 1 = 3 clients, got federation.num_clients = 2",
    ),
    ({"aggregation.robust": "median"}, kind("factors"), "(in the space of factors the basis is arbitrary)"),
    ({"aggregation.robust": "trimmed-mean"}, kind("zero-pad"), 'needs aggregation.kind = "product"'),
    (
        {"aggregation.robust": "median", **FULL, **kind("factors")},
        {**ONE_STAGE, "training.scope": "adapter"},
        '"median" needs aggregation.kind = "product" (in the space of factors',
    ),
    (
        {"aggregation.robust": "median", **B_ONLY, **ONE_STAGE},
        {"initiating.rounds": 1},
        "needs the same scope in all rounds (in the space of factors",
    ),
    (ALTERNATING | ONE_STAGE | {"aggregation.robust": "median"}, {"initiating.rounds": 2}, "the same scope"),
    (kind("factors") | {"aggregation.robust": "krum"}, {"aggregation.robust": "median"}, 'got "factors"'),
    # privacy
    (
        PRIVATE | FULL | {"privacy.noise_multiplier": 0.5},
        {"privacy.clip_norm": None},
        "privacy.noise_multiplier needs privacy.clip_norm (noise without clipping is no privacy), got none",
    ),
    ({"privacy.noise_multiplier": 0.0}, {"privacy.noise_multiplier": 0.1}, "noise without clipping"),
    (
        PRIVATE | FULL,
        {**ONE_STAGE, "training.scope": "adapter"},
        'needs training.scope = "b-only" or "full" (clipping factors does not bound their product, and noise '
        'in A multiplies noise in B, under aggregation.kind = "product" as under "factors": FFA-LoRA, '
        'arXiv 2403.12313), got "adapter"; set training.scope = "b-only", or leave privacy.clip_norm out',
    ),
    (PRIVATE | B_ONLY | ONE_STAGE, {"training.scope": "alternating"}, 'got "alternating"'),
    (PRIVATE | B_ONLY | ONE_STAGE, {"initiating.rounds": 1}, "privacy.clip_norm needs the same scope in all"),
    (PRIVATE | FULL, {"aggregation.weights": "examples"}, 'needs aggregation.weights = "equal" (one client'),
    (PRIVATE | FULL, {"aggregation.robust": "median"}, 'clip_norm needs aggregation.robust = "none"'),
    (PRIVATE | FULL, {"aggregation.norm_bound": 1.0}, "clip_norm must stand without aggregation.norm_bound"),
    (PRIVATE | FULL, SCAFFOLD, "privacy.clip_norm needs training.control_variates = false"),
    (
        PRIVATE | FULL | {"federation.cohort_size": 4, "federation.sampling": "poisson"},
        {"federation.sampling": "fixed"},
        'privacy.clip_norm needs federation.sampling = "poisson"',
    ),
    # what is added to the base, and cuts
    (
        kind("stack"),
        {"model.dtype": "bfloat16"},
        'kind = "stack" needs model.dtype = "float32" (what is added',
    ),
    (kind("residual"), {"model.dtype": "float16"}, 'kind = "residual" needs model.dtype = "float32"'),
    (kind("stack") | FULL | {"model.dtype": "bfloat16"}, {"training.scope": "adapter"}, "model.dtype"),
    (METROPOLIS, {"annealing.cut": "freeze"}, 'schedule = "metropolis" needs annealing.cut = "drop"'),
    (
        METROPOLIS | kind("zero-pad"),
        kind("residual"),
        '"product", "factors" or "zero-pad" (under residual the',
    ),
    (METROPOLIS | kind("factors"), kind("stack"), '"product", "factors" or "zero-pad"'),
    (METROPOLIS, {"data.validation_fraction": 0.0}, '"metropolis" needs a validation part, got data.valid'),
    (METROPOLIS | ONE_STAGE, FULL, 'schedule = "metropolis" needs training.scope = "adapter"'),
    (TARGET, {"data.validation_fraction": 0.0}, 'annealing.schedule = "target" needs a validation part'),
    (TARGET | ONE_STAGE, FULL, 'annealing.schedule = "target" needs training.scope = "adapter"'),
    (TARGET | kind("residual"), kind("stack"), "(under stack nothing is carried over a cut)"),
    (
        {"annealing.allocation": "spectral"},
        kind("stack"),
        '"spectral" needs aggregation.kind = "product", "fa',
    ),
    ({"annealing.allocation": "spectral"}, FULL, '"spectral" needs training.scope = "adapter"'),
    # weights and evaluation
    ({"aggregation.weights": "frobenius"}, FULL, '"frobenius" needs training.scope = "adapter" (it is the'),
    (B_ONLY, {"aggregation.weights": "frobenius"}, '"frobenius" needs training.scope = "adapter"'),
    (
        {"aggregation.weights": "frobenius"},
        {"initiating.scope": "full"},
        "needs the same scope in all rounds",
    ),
    (
        {"evaluation.split": "validation", "data.validation_fraction": 0.1},
        {"data.validation_fraction": 0.0},
        'evaluation.split = "validation" needs a validation part, got data.validation_fraction = 0; set',
    ),
    # what clients hold out
    (
        OWN_PARTS,
        {"evaluation.on": "server"},
        'data.partition = "files" without data.test_source needs evaluation.on = "workers" (what a client',
    ),
    (
        OWN_PARTS,
        {"evaluation.split": "validation"},
        'evaluation.split = "validation" needs a validation part',
    ),
    (
        OWN_PARTS | {"data.validation_fraction": 0.1},
        {"annealing.schedule": "target"},
        'annealing.schedule = "target" needs data.test_source under data.partition = "files" (the server',
    ),
    # sums on the way
    (
        REDUCE | kind("factors"),
        {"federation.reproducible": True},
        'transport.collect = "reduce" needs federation.reproducible = false (the order of the sum, and so '
        "its bits, depend on the number of workers), got true; set federation.reproducible = false, or leave "
        "transport.collect out",
    ),
    (
        REDUCE | kind("factors"),
        kind("product"),
        'transport.collect = "reduce" needs aggregation.kind = "factors" (only a mean of values can be added',
    ),
    (REDUCE | kind("factors"), kind("zero-pad"), 'got "zero-pad"; set aggregation.kind = "factors"'),
    (REDUCE | FULL | kind("stack"), {**ONE_STAGE, "training.scope": "adapter"}, 'got "stack"; set aggr'),
    (
        REDUCE | kind("factors") | {"aggregation.weights": "equal"},
        {"aggregation.weights": "frobenius"},
        'transport.collect = "reduce" needs aggregation.weights = "examples" or "equal" (only a mean',
    ),
    (
        REDUCE | kind("factors"),
        {"aggregation.robust": "krum"},
        'transport.collect = "reduce" needs aggregation.robust = "none" (only a mean',
    ),
    (
        REDUCE | FULL,
        {"aggregation.norm_bound": 1.0},
        'transport.collect = "reduce" must stand without aggregation.norm_bound (only a mean of values can '
        "be added up on the way), got aggregation.norm_bound = 1.0; leave aggregation.norm_bound or "
        "transport.collect out",
    ),
    (
        REDUCE | FULL | {"aggregation.weights": "equal"},
        {"privacy.clip_norm": 1.0},
        "must stand without privacy.clip_norm (the server clips each update again), got privacy.clip_norm = ",
    ),
    (REDUCE | FULL, SCAFFOLD, 'transport.collect = "reduce" needs training.control_variates = false ('),
    (
        REDUCE | FULL | {"transport.downlink_dtype": "int8"},
        {"transport.uplink_dtype": "bfloat16"},
        'needs transport.uplink_dtype = "float32" (MPI adds up floats), got "bfloat16"; set',
    ),
    # rounding
    (
        SCAFFOLD | FULL,
        {"transport.downlink_dtype": "bfloat16"},
        'transport.downlink_dtype = "bfloat16" needs training.control_variates = false (variates are kept, '
        "and their rounding would add up), got true; set training.control_variates = false, or leave "
        "transport.downlink_dtype out",
    ),
    (SCAFFOLD | FULL, {"transport.uplink_dtype": "int8"}, 'transport.uplink_dtype = "int8" needs training.c'),
    (
        kind("stack") | {"transport.downlink_dtype": "float16"},
        {"transport.downlink_dtype": "int8"},
        'transport.downlink_dtype = "int8" needs aggregation.kind = "product", "factors" or "zero-pad" (an '
        'exact sum is what stack and residual are for), got "stack"; set aggregation.kind = "product"',
    ),
    (
        {"transport.uplink_dtype": "int8"},
        kind("residual"),
        'transport.uplink_dtype = "int8" needs aggregation',
    ),
    # losses that are added later
    (
        FED_BACK | kind("factors"),
        kind("product"),
        'transport.error_feedback = true needs aggregation.kind = "factors" (every SVD gives a new basis, so '
        'losses of the last round mean nothing), got "product"; set aggregation.kind = "factors", or leave '
        "transport.error_feedback out",
    ),
    (FED_BACK | kind("factors"), kind("zero-pad"), "and losses would take them for one"),
    (FED_BACK | B_ONLY, {"training.scope": "alternating"}, "(losses of the last round belong to the other"),
    (
        PERSONAL | {"transport.uplink_dtype": "int8"},
        FED_BACK,
        "error_feedback = true needs training.personal",
    ),
    (
        FED_BACK | FULL,
        {"transport.uplink_dtype": "float32"},
        "transport.error_feedback = true needs a wire dtype that rounds, got transport.uplink_dtype = "
        '"float32" and transport.downlink_dtype = "float32"; set one of them, for example to "int8", or '
        "leave transport.error_feedback out",
    ),
    # faults
    (
        PRIVATE | FULL,
        {"faults.min_clients": 2},
        "privacy.clip_norm needs faults.min_clients = 1 (one client more or less would decide over all "
        "others), got 2",
    ),
    (
        {"federation.num_clients": 4, "faults.min_clients": 4},
        {"faults.min_clients": 5},
        "faults.min_clients must be at most federation.num_clients, got 5 and 4; lower faults.min_clients, "
        "or raise federation.num_clients",
    ),
    (
        {"federation.cohort_size": 2, "faults.min_clients": 2},
        {"faults.min_clients": 3},
        "faults.min_clients must be at most federation.cohort_size, got 3 and 2",
    ),
    (
        {"faults.round_deadline_s": 1.0, "federation.reproducible": False},
        {"federation.reproducible": True},
        "faults.round_deadline_s needs federation.reproducible = false (who is late depends on the machine "
        "and its load), got true; set federation.reproducible = false, or leave faults.round_deadline_s out",
    ),
    (
        LATE,
        {"faults.round_deadline_s": None},
        'faults.late = "next-round" needs faults.round_deadline_s (without a deadline nobody is',
    ),
    (LATE, {"initiating.scope": "full"}, "what was trained in one stage has no place in the other"),
    (LATE | ONE_STAGE, ALTERNATING, "the next round trains the other factor"),
    (
        LATE,
        kind("factors"),
        'faults.late = "next-round" needs aggregation.kind = "product" or "stack" (a cut gives the mean',
    ),
    (LATE | FIXED | ONE_STAGE, PERSONAL, "B and head of the client would be of one round, and A of another"),
    (LATE | FIXED, SCAFFOLD, "a variate is the mean gradient of steps from one state"),
    (LATE | FULL, PRIVATE, "the accountant counts what a client trains in one round"),
    (LATE, {"aggregation.weights": "frobenius"}, "a norm as the weight leaves no place"),
    (LATE, {"aggregation.robust": "median"}, "what sorts or chooses updates has no weights"),
    # tasks
    (
        {},
        {"task.name": "clasification"},
        "task.name must be one of classification, causal-lm, image-classification, or FILE.py:",
    ),
    (
        {"model.quantize": "nf4"},
        {"initiating.scope": "full"},
        "weights in 8 or 4 bits are neither trained nor added to",
    ),
    (
        {"task.name": "causal-lm", "data.partition": "iid"},
        {"data.partition": "shards"},
        'data.partition = "shards" shares out by label, got task.name = "causal-lm", which has none',
    ),
    ({}, {"task.packing": True}, "only a language model reads prompts and responses"),
    ({}, {"lora.use_dora": True}, "which is not linear in B A"),
    # compilation
    (
        {"training.compile": True, "federation.reproducible": False},
        {"federation.reproducible": True},
        "training.compile = true needs federation.reproducible = false (compiled kernels give other bits "
        "than eager ones, and on other machines), got true; set federation.reproducible = false, or leave "
        "training.compile out",
    ),
]


@pytest.mark.parametrize(("taken", "change", "part"), NEAR_MISSES)
def test_combinations_that_make_no_sense_are_refused(taken: Switches, change: Switches, part: str) -> None:
    build(taken)
    message = refusal(taken | change)
    assert part in message
    # One fact and one remedy: the place is put between them.
    assert re.fullmatch(r"[^;]+, got [^;]+; [^;]+[^.]", message)


def test_every_rule_refuses_something() -> None:
    def first_to_refuse(switches: Switches) -> Callable[[RunTables], None] | None:
        tables = RunTables.model_validate(tables_of(switches))
        for rule in RULES:
            try:
                rule(tables)
            except ValueError:
                return rule
        return None

    assert {first_to_refuse(taken | change) for taken, change, _ in NEAR_MISSES} == set(RULES)


@pytest.mark.parametrize(
    "switches",
    [
        FEDADAM | FULL,
        FEDADAM | B_ONLY,
        FEDADAM | kind("factors") | {"annealing.cut": "drop"},
        SCAFFOLD | FEDADAM | FULL,
        PRIVATE | FEDADAM | B_ONLY | ONE_STAGE,
        PRIVATE | FULL | {"privacy.noise_multiplier": 1.0, "privacy.noise_seed": 3},
        RANKS | {"annealing.cut": "freeze"},
        RANKS | kind("zero-pad") | {"aggregation.weights": "frobenius"},
        METROPOLIS | {"annealing.allocation": "spectral"},
        B_ONLY | {"aggregation.robust": "median", "initiating.scope": "full"},
        TARGET | {"annealing.cut": "freeze"},
        ALTERNATING | {"aggregation.robust": "krum", "aggregation.norm_bound": 1.0},
        {"federation.sampling": "poisson", "federation.cohort_size": 8},
        REDUCE | FULL | FEDADAM | kind("stack"),
        REDUCE | ALTERNATING | {"transport.downlink_dtype": "int8", "transport.reduce_dtype": "float64"},
        REDUCE | PERSONAL,
        {
            "transport.collect": "auto",
            "transport.uplink_dtype": "bfloat16",
            "transport.downlink_dtype": "int8",
        },
        FULL | kind("residual") | {"transport.uplink_dtype": "int8", "transport.downlink_dtype": "float16"},
        FED_BACK | B_ONLY | {"initiating.scope": "full"},
        FULL | kind("product") | {"transport.error_feedback": True, "transport.downlink_dtype": "bfloat16"},
        PRIVATE | FED_BACK | FULL,
    ],
)
def test_combinations_that_make_sense_are_taken(switches: Switches) -> None:
    config = build(switches)
    for key, value in switches.items():
        section, _, name = key.partition(".")
        assert getattr(getattr(config, section), name) == value


def test_a_preset_with_an_exact_sum_is_not_sent_as_int8() -> None:
    tables = tables_of({"federation.method": "flora", "transport.uplink_dtype": "int8"})
    with pytest.raises(ValidationError, match=r"an exact sum is what stack .*got \"stack\""):
        RunConfig.model_validate(apply_method(tables)[0])


@pytest.mark.parametrize("value", ["product", "factors", "zero-pad", "stack", "residual"])
@pytest.mark.parametrize("cut", ["drop", "freeze"])
def test_switches_of_adapters_have_no_effect_on_the_whole_model(value: str, cut: str) -> None:
    build(
        FULL | kind(value) | {"annealing.cut": cut, "model.dtype": "bfloat16", "aggregation.robust": "median"}
    )
