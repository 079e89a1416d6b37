import dataclasses

import numpy as np
import pytest
import torch
from support import make_run_file

from mpifedlora.core.aggregation import AGGREGATORS, weighted_mean
from mpifedlora.core.annealer import Guidance
from mpifedlora.core.layout import LinearShape, ModelShapes, TensorShape
from mpifedlora.core.methods import METHODS
from mpifedlora.core.plan import ABSENT
from mpifedlora.core.robust import coordinate_median
from mpifedlora.core.screening import Screening
from mpifedlora.core.server_optimizer import ServerOptimizer
from mpifedlora.core.switches import Switches
from mpifedlora.core.wire import WireFormat
from mpifedlora.errors import ConfigError, TrainingError
from mpifedlora.io.run_file import read_run_file
from mpifedlora.runtime.method import (
    build_switches,
    check_parts,
    choose_collect,
    client_keeps_state,
    expected_cohort,
    has_private_noise,
    rank_schedule,
    wire_format,
)

SIZES = [10, 0, 7, 40]
DP = (
    "federation.method=ffa-lora",
    "privacy.clip_norm=0.5",
    "privacy.noise_multiplier=2",
    "aggregation.weights=equal",
)
POISSON = ("federation.sampling=poisson", "federation.cohort_size=2", "federation.num_rounds=20")


def config_of(run_file, *overrides):
    return read_run_file(run_file, overrides).config


def switches_of(run_file, *overrides, num_workers=2):
    return build_switches(config_of(run_file, *overrides), SIZES, num_workers)


EXACT = "aggregation.kind=product"

# presets

# What differs from the defaults of `Switches`, or from rank 4 to 1 over 4 rounds after 1 of initiating.
PRESETS = {
    "sa-fedlora": {
        "budgets": [4, 3, 2, 1],
        "stages": ["initiating"] + 3 * ["annealing"],
        "aggregator": AGGREGATORS["factors"],
        "optimizer": "momentum",
    },
    "fedavg": {"scope": "full", "scopes": ["full"] * 4},
    "fedprox": {"scope": "full", "scopes": ["full"] * 4, "mu": 0.01},
    "scaffold": {
        "scope": "full",
        "scopes": ["full"] * 4,
        "has_variates": True,
        "weights": "equal",
    },
    "fedavgm": {"scope": "full", "scopes": ["full"] * 4, "optimizer": "momentum"},
    "fedadam": {"scope": "full", "scopes": ["full"] * 4, "optimizer": "fedadam"},
    "fedit": {"aggregator": AGGREGATORS["factors"]},
    "ffa-lora": {"aggregator": AGGREGATORS["factors"], "scope": "b-only", "scopes": ["b"] * 4},
    "rolora": {
        "aggregator": AGGREGATORS["factors"],
        "scope": "alternating",
        "scopes": ["b", "a", "b", "a"],
    },
    "fedsa-lora": {"aggregator": AGGREGATORS["factors"], "keeps_b": True},
    "flora": {"aggregator": AGGREGATORS["stack"]},
    "fedex-lora": {"aggregator": AGGREGATORS["residual"]},
    "flexlora": {"aggregator": AGGREGATORS["product"]},
    "hetlora": {"aggregator": AGGREGATORS["zero-pad"], "weights": "frobenius"},
    "custom": {"budgets": [4, 3, 2, 1], "stages": ["initiating"] + 3 * ["annealing"]},
}


def test_every_preset_is_looked_at():
    assert set(PRESETS) == set(METHODS)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_set_the_switches_of_their_methods(tiny_run_file, name):
    switches = switches_of(tiny_run_file, f"federation.method={name}")
    wanted = dict(PRESETS[name])
    rounds = (1, 2, 3, 4)
    assert [switches.schedule.budget(t) for t in rounds] == wanted.pop("budgets", [4] * 4)
    assert [switches.schedule.stage(t) for t in rounds] == wanted.pop("stages", ["annealing"] * 4)
    assert [switches.round_scope(t) for t in rounds] == wanted.pop("scopes", ["adapter"] * 4)
    assert switches.mu(4) == wanted.pop("mu", 0.0)
    optimizer = switches.optimizer
    assert (optimizer.kind if optimizer else "none") == wanted.pop("optimizer", "none")
    assert switches.combiner is weighted_mean
    assert switches.noise is None
    defaults = {field.name: field.default for field in dataclasses.fields(Switches)}
    for switch in ("scope", "keeps_b", "keeps_head", "has_variates", "client_ranks", "aggregator", "weights"):
        assert getattr(switches, switch) == wanted.pop(switch, defaults[switch]), switch
    assert switches.freezes
    assert not switches.is_spectral
    assert (switches.screening.norm_bound, switches.screening.krum) == (None, "")
    assert wanted == {}


@pytest.mark.parametrize(
    ("method", "keeps"), [("fedsa-lora", True), ("scaffold", True), ("sa-fedlora", False), ("rolora", False)]
)
def test_who_keeps_state_is_known_before_anything_is_loaded(tiny_run_file, method, keeps):
    config = config_of(tiny_run_file, f"federation.method={method}")
    assert client_keeps_state(config) == keeps
    assert build_switches(config, SIZES, 2).client_keeps_state == keeps


@pytest.mark.parametrize(
    ("personal", "keeps_b", "keeps_head"),
    [("none", False, False), ("b", True, False), ("b-and-head", True, True)],
)
def test_what_stays_with_a_client(tiny_run_file, personal, keeps_b, keeps_head):
    measured = "global" if personal == "none" else "personal"
    switches = switches_of(
        tiny_run_file,
        "federation.method=custom",
        f"training.personal={personal}",
        f"evaluation.model={measured}",
        "aggregation.kind=factors",
        "annealing.schedule=constant",
        "initiating.rounds=0",
    )
    assert (switches.keeps_b, switches.keeps_head) == (keeps_b, keeps_head)
    assert switches.client_keeps_state == keeps_b


# stages


def test_learning_rates_follow_scope_and_schedule(tiny_run_file):
    switches = switches_of(
        tiny_run_file,
        "training.learning_rate=0.1",
        "training.full_learning_rate=0.01",
        "training.learning_rate_schedule=linear",
    )
    assert [switches.learning_rate(t, "adapter") for t in (1, 2, 3, 4)] == pytest.approx(
        [0.1, 0.075, 0.05, 0.025]
    )
    assert switches.learning_rate(3, "b") == switches.learning_rate(3, "a") == pytest.approx(0.05)
    assert switches.learning_rate(3, "full") == pytest.approx(0.005)
    warm = switches_of(
        tiny_run_file,
        "training.learning_rate=0.1",
        "training.learning_rate_schedule=linear",
        "training.warmup_rounds=2",
    )
    assert [warm.learning_rate(t, "adapter") for t in (1, 2, 3, 4)] == pytest.approx(
        [0.1 / 3, 0.05, 0.05, 0.025]
    )
    late = switches_of(
        tiny_run_file,
        "training.full_learning_rate=0.01",
        "training.learning_rate=0.1",
        "training.learning_rate_schedule=constant",
        "training.warmup_rounds=1",
        "initiating.scope=full",
        "initiating.rounds=1",
    )
    rates = [late.learning_rate(1, "full"), *(late.learning_rate(t, "adapter") for t in (2, 3, 4))]
    assert rates == pytest.approx([0.01, 0.05, 0.1, 0.1])
    constant = switches_of(tiny_run_file, "training.learning_rate_schedule=constant")
    assert {constant.learning_rate(t, "adapter") for t in (1, 2, 3, 4)} == {0.01}


def test_mu_belongs_to_the_stages(tiny_run_file):
    stages = ["federation.method=custom", "initiating.rounds=3", "initiating.mu=0.5", "training.mu=0.25"]
    constant = switches_of(tiny_run_file, *stages)
    assert [constant.mu(t) for t in (1, 2, 3, 4)] == [0.5, 0.5, 0.5, 0.25]
    linear = switches_of(tiny_run_file, *stages, "initiating.mu_schedule=linear")
    assert [linear.mu(t) for t in (1, 2, 3, 4)] == pytest.approx([0.5, 0.25, 0.0, 0.25])


def test_schedule_scope_and_cut_come_from_the_run_file(tiny_run_file):
    switches = switches_of(tiny_run_file, "initiating.scope=full", "annealing.cut=drop")
    assert (switches.initiating_scope, switches.scope, switches.freezes) == ("full", "adapter", False)
    assert [switches.round_scope(t) for t in (1, 2, 3, 4)] == ["full", "adapter", "adapter", "adapter"]
    assert [switches.schedule.budget(t) for t in (1, 2, 3, 4)] == [4, 3, 2, 1]
    assert [switches.schedule.stage(t) for t in (1, 2)] == ["initiating", "annealing"]


def test_every_key_of_the_schedule_arrives(tiny_run_file):
    schedule = rank_schedule(
        config_of(
            tiny_run_file,
            "federation.num_rounds=30",
            "initiating.rounds=3",
            "annealing.schedule=step",
            "annealing.heating_rounds=2",
            "annealing.cooling_rounds=7",
            "annealing.num_steps=5",
            "annealing.exponential_end=0.25",
            "lora.rank_max=9",
            "lora.rank_min=2",
        )
    )
    got = dataclasses.asdict(schedule)
    assert (got.pop("kind"), got.pop("num_rounds"), got.pop("exponential_end")) == ("step", 30, 0.25)
    assert got == {
        "initiating_rounds": 3,
        "heating_rounds": 2,
        "cooling_rounds": 7,
        "num_steps": 5,
        "rank_max": 9,
        "rank_min": 2,
    }


def test_measured_schedules_have_their_guidance(tiny_run_file):
    switches = switches_of(
        tiny_run_file,
        "annealing.schedule=target",
        "annealing.cut_step=2",
        "annealing.tolerance=0.125",
        "annealing.metropolis_temperature=0.5",
        "annealing.allocation=spectral",
        "data.validation_fraction=0.2",
    )
    assert switches.guidance == Guidance(2, 0.125, 0.5)
    assert switches.schedule.is_measured
    assert switches.is_spectral


# ranks


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("lora.client_ranks=[1, 4]", (1, 4, 1, 4)),
        ("lora.client_capacities=[1, 0.5, 0.1]", (4, 2, 1, 4)),
        ("lora.client_ranks=[4]", ()),  # no limit at all
        ("lora.client_capacities=[1]", ()),
    ],
)
def test_client_ranks_are_repeated_over_the_clients(tiny_run_file, setting, expected):
    assert switches_of(tiny_run_file, EXACT, setting).client_ranks == expected


# aggregation


def test_the_robust_mean_takes_the_place_of_the_mean(tiny_run_file):
    median = switches_of(tiny_run_file, EXACT, "aggregation.robust=median")
    assert median.combiner is coordinate_median
    # Of 5 sorted values, trimming two on each side leaves the middle one.
    settings = (EXACT, "aggregation.robust=trimmed-mean", "aggregation.num_byzantine=2")
    settings += ("federation.num_clients=5",)
    trimmed = switches_of(tiny_run_file, *settings)
    values = [torch.tensor([x]) for x in (9.0, -50.0, 3.0, 70.0, 4.0)]
    assert trimmed.combiner(values, [0.2] * 5, torch.empty(1)).tolist() == [4.0]
    assert trimmed.screening.krum == ""
    assert trimmed.screening.least == 5


def test_as_many_must_be_left_as_the_run_asks_for(tiny_run_file):
    assert switches_of(tiny_run_file).screening.least == 1
    assert switches_of(tiny_run_file, "faults.min_clients=3").screening.least == 3
    robust = ["aggregation.robust=trimmed-mean", "aggregation.num_byzantine=1", "faults.min_clients=2"]
    assert switches_of(tiny_run_file, EXACT, *robust).screening.least == 3


@pytest.mark.parametrize("kind", ["krum", "multi-krum"])
def test_krum_and_the_bound_screen_the_updates(tiny_run_file, kind):
    settings = ("aggregation.num_byzantine=2", "federation.num_clients=7", "aggregation.norm_bound=1.5")
    switches = switches_of(tiny_run_file, f"aggregation.robust={kind}", *settings)
    assert switches.screening == Screening(1.5, kind, 2)
    assert switches.combiner is weighted_mean


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["kind=momentum"], ServerOptimizer("momentum", 1.0, 0.9, 0.99, 1e-3)),
        (["kind=fedyogi"], ServerOptimizer("fedyogi", 1e-2, 0.9, 0.99, 1e-3)),
        (
            ["kind=fedadagrad", "learning_rate=0.5", "beta1=0", "beta2=0.5", "tau=0.25"],
            ServerOptimizer("fedadagrad", 0.5, 0.0, 0.5, 0.25),
        ),
    ],
)
def test_the_server_optimizer_has_its_own_rates(tiny_run_file, settings, expected):
    overrides = [f"server_optimizer.{setting}" for setting in settings]
    switches = switches_of(tiny_run_file, "federation.method=custom", "aggregation.kind=factors", *overrides)
    assert switches.optimizer == expected


def test_variates_are_averaged_over_the_clients_with_examples(tiny_run_file):
    config = config_of(tiny_run_file, "federation.method=scaffold")
    assert build_switches(config, SIZES, 1).num_eligible == 3
    assert build_switches(config, [0, 0, 0, 0], 1).num_eligible == 1  # never divided by 0


# privacy


def drawn(switches):
    return torch.randn(4, generator=copy_of(switches.noise.generator))


def copy_of(generator):
    other = torch.Generator()
    other.set_state(generator.get_state())
    return other


def test_noise_is_of_the_clipping_norm_and_the_expected_cohort(tiny_run_file):
    noise = switches_of(tiny_run_file, *DP, *POISSON).noise
    assert (noise.clip_norm, noise.noise_multiplier, noise.expected_cohort) == (0.5, 2.0, 2)
    everyone = switches_of(tiny_run_file, *DP).noise
    assert everyone.expected_cohort == 4
    clipped = switches_of(tiny_run_file, *DP, "privacy.noise_multiplier=0").noise
    assert (clipped.clip_norm, clipped.noise_multiplier) == (0.5, 0.0)


def test_noise_comes_from_entropy_unless_a_seed_is_given(tiny_run_file):
    first, second = (drawn(switches_of(tiny_run_file, *DP)) for _ in range(2))
    assert not torch.equal(first, second)
    fixed = [drawn(switches_of(tiny_run_file, *DP, f"privacy.noise_seed={seed}")) for seed in (5, 5, 6)]
    assert torch.equal(fixed[0], fixed[1])
    assert not torch.equal(fixed[0], fixed[2])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((), True),
        (("privacy.noise_seed=5",), False),
        (("privacy.noise_seed=0",), False),
        (("privacy.noise_multiplier=0",), False),
    ],
)
def test_only_noise_that_nobody_can_repeat_is_private(tiny_run_file, settings, expected):
    assert has_private_noise(config_of(tiny_run_file, *DP, *settings)) == expected
    assert not has_private_noise(config_of(tiny_run_file))


# cohorts


def cohorts_of(switches, num_rounds=20):
    plans = [switches.choose_workers(t, ()) for t in range(1, num_rounds + 1)]
    return [tuple(i for i, worker in enumerate(plan) if worker != ABSENT) for plan in plans]


def test_clients_without_examples_never_train(tiny_run_file):
    workers = switches_of(tiny_run_file).choose_workers(1, ())
    assert len(workers) == 4
    assert workers[1] == ABSENT
    assert {workers[client] for client in (0, 2, 3)} == {0, 1}


def test_cohorts_are_drawn_anew_each_round_and_the_same_for_any_workers(tiny_run_file):
    overrides = ["federation.cohort_size=2", "federation.num_rounds=20"]
    cohorts = []
    for num_workers in (1, 3):
        switches = switches_of(tiny_run_file, *overrides, num_workers=num_workers)
        assert all(max(switches.choose_workers(t, ())) < num_workers for t in range(1, 21))
        cohorts.append(cohorts_of(switches))
    assert cohorts[0] == cohorts[1]
    assert all(len(cohort) == 2 for cohort in cohorts[0])
    assert set(cohorts[0]) == {(0, 2), (0, 3), (2, 3)}


@pytest.mark.parametrize("sampling", ["fixed", "poisson"])
def test_clients_that_are_set_aside_are_not_chosen(tiny_run_file, sampling):
    settings = ["federation.cohort_size=2", "federation.num_rounds=20", f"federation.sampling={sampling}"]
    switches = switches_of(tiny_run_file, *settings, "faults.max_failures=5")
    assert switches.max_failures == 5
    cohorts = [np.flatnonzero(np.array(switches.choose_workers(t, [2])) != ABSENT) for t in range(1, 21)]
    assert {client_id for cohort in cohorts for client_id in cohort} == {0, 3}
    if sampling == "fixed":  # others take the place
        assert all(len(cohort) == 2 for cohort in cohorts)


def test_without_any_client_that_can_train_there_is_no_round(tiny_run_file):
    switches = switches_of(tiny_run_file)
    with pytest.raises(TrainingError, match="got all set aside after 3 failures in a row"):
        switches.choose_workers(7, [0, 2, 3])


def test_clients_are_spread_by_their_load(tiny_run_file, tmp_path):
    even = switches_of(tiny_run_file, num_workers=3).choose_workers(1, ())
    assert sorted(even[client] for client in (0, 2, 3)) == [0, 1, 2]
    run_file = make_run_file(tmp_path, "[training]\nlocal_epochs = 1\n")
    by_size = switches_of(run_file, num_workers=2).choose_workers(1, ())
    assert by_size[0] == by_size[2] != by_size[3]  # 10 and 7 examples here, 40 there


@pytest.mark.parametrize("settings", [(), (*DP, "privacy.noise_seed=1")], ids=["plain", "noise-seed"])
def test_poisson_cohorts_come_from_the_seed(tiny_run_file, settings):
    first, again = (cohorts_of(switches_of(tiny_run_file, *settings, *POISSON)) for _ in range(2))
    other = cohorts_of(switches_of(tiny_run_file, *settings, *POISSON, "federation.seed=1"))
    assert first == again != other
    assert {len(cohort) for cohort in first} >= {1, 2}  # of any size
    assert set().union(*first) == {0, 2, 3}  # client 1 has no examples


def test_poisson_cohorts_under_privacy_come_from_entropy(tiny_run_file):
    # Two draws of 20 rounds and 3 clients at one half each are equal once in 2^60.
    switches = switches_of(tiny_run_file, *DP, *POISSON)
    first, again = cohorts_of(switches), cohorts_of(switches)
    assert first != again
    assert set().union(*first) <= {0, 2, 3}


def test_each_client_takes_part_with_one_probability(tiny_run_file):
    settings = ("federation.sampling=poisson", "federation.cohort_size=1", "federation.num_rounds=1000")
    cohorts = cohorts_of(switches_of(tiny_run_file, *settings), 1000)
    shares = [np.mean([client in cohort for cohort in cohorts]) for client in (0, 2, 3)]
    assert shares == pytest.approx([0.25] * 3, abs=0.06)  # more than four standard errors
    together = np.mean([{0, 2} <= set(cohort) for cohort in cohorts])
    assert together == pytest.approx(1 / 16, abs=0.035)  # independently
    assert min(map(len, cohorts)) == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [((), 4), (("federation.cohort_size=3",), 3), (POISSON, 2), (("federation.num_clients=9",), 9)],
)
def test_the_expected_cohort_is_the_one_asked_for(tiny_run_file, settings, expected):
    assert expected_cohort(config_of(tiny_run_file, *settings)) == expected


# how updates cross

# Rank 4: 4 * (5 + 7) and 4 * (9 + 4) values, and a head of 6; the whole model has 35 + 36 + 6.
SHAPES = ModelShapes(
    (LinearShape("q", 5, 7), LinearShape("v", 9, 4)),
    (TensorShape("head", (3, 2)),),
    (TensorShape("q.weight", (5, 7)), TensorShape("v.weight", (9, 4))),
)
ADAPTER_VALUES, FULL_VALUES = 48 + 52 + 6, 35 + 36 + 6
FREE = "federation.reproducible=false"
FEDAVG, FEDIT = "federation.method=fedavg", "federation.method=fedit"


def test_the_wire_format_comes_from_the_run_file(tiny_run_file):
    assert wire_format(config_of(tiny_run_file)) == WireFormat("float32", "float32", False, 0)
    settings = ("transport.uplink_dtype=int8", "transport.downlink_dtype=bfloat16", "federation.seed=5")
    feedback = (FEDIT, "transport.error_feedback=true")
    config = config_of(tiny_run_file, *settings, *feedback)
    assert wire_format(config) == WireFormat("int8", "bfloat16", True, 5)
    assert build_switches(config, SIZES, 2).wire == WireFormat("int8", "bfloat16", True, 5)


@pytest.mark.parametrize(("uplink", "keeps"), [("int8", True), ("float32", False)])
def test_who_rounds_its_updates_keeps_what_was_lost(tiny_run_file, uplink, keeps):
    settings = (f"transport.uplink_dtype={uplink}", "transport.downlink_dtype=int8")
    config = config_of(tiny_run_file, FEDIT, "transport.error_feedback=true", *settings)
    assert client_keeps_state(config) == keeps
    assert build_switches(config, SIZES, 2).client_keeps_state == keeps


@pytest.mark.parametrize("settings", [[FEDAVG], [FEDIT], []])
@pytest.mark.parametrize("available_bytes", [0, 1, None])
def test_auto_never_leaves_what_is_reproducible(tiny_run_file, settings, available_bytes):
    assert choose_collect(config_of(tiny_run_file, *settings), SHAPES, available_bytes) == "gather"


@pytest.mark.parametrize(
    ("settings", "needed_bytes"),
    [
        ([FEDAVG], 4 * 4 * FULL_VALUES),
        ([FEDIT], 4 * 4 * ADAPTER_VALUES),
        ([FEDIT, "federation.cohort_size=3"], 3 * 4 * ADAPTER_VALUES),
        (
            ["aggregation.kind=factors", "federation.method=custom", "initiating.scope=full"],
            4 * 4 * FULL_VALUES,
        ),
        (["aggregation.kind=factors", "federation.method=custom"], 4 * 4 * ADAPTER_VALUES),
        (
            ["aggregation.kind=factors", "federation.method=custom", "initiating.scope=full"]
            + ["initiating.rounds=0"],
            4 * 4 * ADAPTER_VALUES,
        ),
    ],
)
def test_auto_adds_up_on_the_way_what_would_take_more_than_half_of_the_memory(
    tiny_run_file, settings, needed_bytes
):
    config = config_of(tiny_run_file, *settings, FREE)
    assert choose_collect(config, SHAPES, 2 * needed_bytes) == "gather"
    assert choose_collect(config, SHAPES, 2 * needed_bytes - 1) == "reduce"
    assert choose_collect(config, SHAPES, None) == "gather"


@pytest.mark.parametrize(
    "settings",
    [
        [EXACT],  # a product of factors is no plain mean
        [FEDAVG, "aggregation.robust=median"],
        [FEDIT, "transport.uplink_dtype=bfloat16"],
        ["federation.method=scaffold"],
    ],
)
def test_auto_gathers_what_cannot_be_added_up(tiny_run_file, settings):
    assert choose_collect(config_of(tiny_run_file, *settings, FREE), SHAPES, 1) == "gather"


def test_what_is_asked_for_is_taken(tiny_run_file):
    for collect, available_bytes in (("reduce", 2**40), ("gather", 1)):
        config = config_of(tiny_run_file, FEDAVG, FREE, f"transport.collect={collect}")
        assert choose_collect(config, SHAPES, available_bytes) == collect
    assert build_switches(config, SIZES, 2, reduces=True).reduces
    assert not build_switches(config, SIZES, 2).reduces


@pytest.mark.parametrize(
    ("dtype", "least"), [("float32", 4 * 52), ("bfloat16", 2 * 52), ("int8", 52 + 4 * 8)]
)
def test_a_part_holds_the_largest_module(tiny_run_file, dtype, least):
    settings = (f"transport.uplink_dtype={dtype}", FEDIT)
    check_parts(config_of(tiny_run_file, *settings), SHAPES)
    check_parts(config_of(tiny_run_file, *settings, f"transport.chunk_bytes={least}"), SHAPES)
    message = (
        f"transport.chunk_bytes must hold the largest module's A and B, {least} bytes \\(v\\), "
        f"got {least - 1}; raise it, or leave it out"
    )
    with pytest.raises(ConfigError, match=message):
        check_parts(config_of(tiny_run_file, *settings, f"transport.chunk_bytes={least - 1}"), SHAPES)


def test_tensors_of_a_whole_model_may_be_larger_than_a_part(tiny_run_file):
    check_parts(config_of(tiny_run_file, FEDAVG, "transport.chunk_bytes=1"), SHAPES)
