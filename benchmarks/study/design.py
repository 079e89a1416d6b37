"""What the study runs: settings, arms, and the trials of each stage.

A *setting* is a data set and a federation; an *arm* is a method with what it may choose from. A run has a
setting, an arm, its learning rate, a seed, and the part of the data that it is measured on: choices are
made on `validation` (a tenth of the training data), and reported on `test`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Switches = Mapping[str, Any]

SEEDS = (0, 1, 2)
ADAPTER_RATES = (2.5e-4, 5e-4, 1e-3)
FULL_RATES = (3e-4, 6e-4, 1.2e-3)
SCALING, ADAPTER_HEAD, FULL_HEAD = 32.0, 8.0, 10.0  # found by the stage `search`
ADAPTER_KEY, FULL_KEY = "training.learning_rate", "training.full_learning_rate"

COMMON: Switches = {
    "model.name": "minilm",
    "model.dropout": 0.0,
    "data.partition": "dirichlet",
    "data.alpha": 0.5,
    "data.max_length": 32,
    "data.validation_fraction": 0.1,
    "federation.num_clients": 8,
    "federation.num_rounds": 40,
    "training.local_steps": 4,
    "training.batch_size": 8,
    "training.precision": "bfloat16",
    "training.threads": 1,
    "evaluation.max_examples": 2000,
    "checkpoint.every": 0,
}

TUNED: Mapping[str, str] = {"20newsgroups": "20newsgroups", "r52": "reuters-r52"}  # setting -> data source
LONGER: Mapping[str, str] = {f"{name}-80-rounds": name for name in TUNED}  # twice the rounds of a setting
FIRST = next(iter(TUNED))  # whose choices the settings that are not tuned take over
LOCAL_SEED = 0
# What examples/make_tiny_vit.py and make_tiny_lm.py write, from the root of the repository.
VIT, LANGUAGE_MODEL = "runs/study/vit-tiny", "runs/study/tiny-lm"
SMALL_TRAINING: Switches = {"federation.num_rounds": 20, "training.precision": "float32"}


def client_setting(setting: str, client_id: int) -> str:
    """Return the setting in which one client of another setting's federation is alone."""
    return f"{setting}-client-{client_id}"


def client_file(setting: str, client_id: int) -> str:
    """Return the file with a client's training examples, from the root of the repository."""
    return f"runs/study/clients/{setting}-seed{LOCAL_SEED}/{client_id}.jsonl"


SETTINGS: Mapping[str, Switches] = {
    "20newsgroups": {"data.source": "20newsgroups"},
    "r52": {"data.source": "reuters-r52"},
    "20newsgroups-iid": {"data.source": "20newsgroups", "data.partition": "iid"},
    "20newsgroups-dirichlet-0.1": {"data.source": "20newsgroups", "data.alpha": 0.1},
    "20newsgroups-64-clients": {
        "data.source": "20newsgroups",
        "federation.num_clients": 64,
        "federation.cohort_size": 8,
    },
    **{
        setting: {"data.source": TUNED[name], "federation.num_rounds": 80} for setting, name in LONGER.items()
    },
    "mnist": {  # from random weights, as the next: no trained ones come with a package
        **SMALL_TRAINING,
        "task.name": "image-classification",
        "model.name": VIT,
        "data.source": "mnist-5k",
        "training.local_steps": 20,
        "training.batch_size": 32,
    },
    "instructions": {
        **SMALL_TRAINING,
        "task.name": "causal-lm",
        "task.packing": True,
        "model.name": f"{LANGUAGE_MODEL}/model",
        "data.source": f"{LANGUAGE_MODEL}/instructions.jsonl",
        "data.label_column": "way",
        "data.max_length": 96,
        "lora.modules_to_save": ["model.embed_tokens", "lm_head"],
        "training.local_steps": 8,
        "training.batch_size": 16,
    },
    **{
        client_setting(name, k): {
            "data.source": client_file(name, k),
            "data.test_source": source,
            "data.partition": "iid",
            "federation.num_clients": 1,
        }
        for name, source in TUNED.items()
        for k in range(COMMON["federation.num_clients"])
    },
}


@dataclass(frozen=True)
class Arm:
    """A method under study.

    Args:
        name: of the arm.
        about: one line for tables.
        switches: what it sets.
        rates: learning rates that it may choose from.
        rate_key: what the learning rate sets.
        follows: arm whose choice of the learning rate it takes over, without runs of its own.
        variant: change of the package that it runs with, of `variants.py`.
    """

    name: str
    about: str
    switches: Switches
    rates: tuple[float, ...] = ADAPTER_RATES
    rate_key: str = ADAPTER_KEY
    follows: str | None = None
    variant: str = ""

    def settings(self, setting: str) -> dict[str, Any]:
        """Return all switches of its runs in a setting but seed, learning rate and evaluation."""
        return {**COMMON, **SETTINGS[setting], **self.switches}


def _lora(rank: int) -> Switches:
    return {
        "lora.rank_max": rank,
        "lora.alpha": SCALING * rank,
        "training.head_rate_factor": ADAPTER_HEAD,
    }


ANNEALED: Switches = {
    "federation.method": "sa-fedlora",
    **_lora(12),
    "lora.rank_min": 2,
    "initiating.rounds": 2,
    "initiating.scope": "adapter",
    "initiating.mu": 0.01,
    "annealing.schedule": "linear",
    "annealing.heating_rounds": 2,
    "annealing.cut": "freeze",
    "annealing.rate_exponent": 0.0,
    "aggregation.kind": "product",
}
PUBLISHED: Switches = {
    "initiating.scope": "full",
    "initiating.rounds": 1,
    "training.full_learning_rate": 3e-4,
}
APART: Switches = {**ANNEALED, "federation.method": "custom", "aggregation.kind": "factors"}
MOMENTUM: Switches = {
    "server_optimizer.kind": "momentum",
    "server_optimizer.learning_rate": 1.5,
    "server_optimizer.beta1": 0.5,
}
LATE: Switches = {
    **ANNEALED,
    **_lora(9),
    "annealing.heating_rounds": 24,
    "aggregation.kind": "factors",
    **MOMENTUM,
}
LATE_FULL: Switches = {
    **LATE,
    **PUBLISHED,
    **_lora(20),
    "lora.rank_min": 8,
    "training.full_learning_rate": 6e-4,
    "server_optimizer.learning_rate": 1.0,
}
EXACT_RATED: Switches = {**ANNEALED, "annealing.rate_exponent": 1.0}
RATED: Switches = {**APART, **MOMENTUM, "server_optimizer.learning_rate": 1.0, "annealing.rate_exponent": 1.0}
FIXED: Switches = {
    "federation.method": "custom",
    "aggregation.kind": "factors",
    "initiating.rounds": 0,
    "annealing.schedule": "constant",
}
# The same examples and steps: each of the 4 is one of all 8 clients together.
CENTRAL: Switches = {"federation.num_clients": 1, "data.partition": "iid", "training.batch_size": 64}
FULL: Mapping[str, Any] = {"rates": FULL_RATES, "rate_key": FULL_KEY}

FEDAVG: Switches = {"federation.method": "fedavg", "training.head_rate_factor": FULL_HEAD}
FEDPROX: Switches = {**FEDAVG, "federation.method": "fedprox"}
FEDIT: Switches = {"federation.method": "fedit"}

CORE: tuple[Arm, ...] = (
    Arm("central-full", "all data in one place, whole model", {**FEDAVG, **CENTRAL}, **FULL),
    Arm("central-lora", "all data in one place, rank 16", {**FEDIT, **_lora(16), **CENTRAL}),
    Arm("fedavg", "FedAvg, whole model", FEDAVG, **FULL),
    Arm("fedprox", "FedProx, whole model", FEDPROX, **FULL),
    Arm("fedavgm", "FedAvgM, whole model: momentum on the server", {
        **FEDAVG, **MOMENTUM, "federation.method": "fedavgm", "server_optimizer.learning_rate": 1.0,
    }, **FULL),
    Arm("fedit-r16", "FedIT, rank 16", {**FEDIT, **_lora(16)}),
    Arm("fedit-r8", "FedIT, rank 8: the bytes of SA-FedLoRA", {**FEDIT, **_lora(8)}),
    Arm("fedit-r8-momentum", "FedIT, rank 8, momentum on the server", {**FIXED, **_lora(8), **MOMENTUM}),
    Arm("fedit-r2", "FedIT, rank 2", {**FEDIT, **_lora(2)}, (5e-4, 1e-3, 2e-3)),
    Arm("ffa-lora", "FFA-LoRA, rank 16", {"federation.method": "ffa-lora", **_lora(16)}),
    Arm("flora", "FLoRA, rank 16", {"federation.method": "flora", **_lora(16)}),
    Arm("fedex-lora", "FedEx-LoRA, rank 16", {"federation.method": "fedex-lora", **_lora(16)}),
    Arm("flexlora", "FlexLoRA, rank 16", {"federation.method": "flexlora", **_lora(16)}),
    Arm("sa-published", "SA-FedLoRA as published: a `full` round, then `drop`", {
        **ANNEALED, **_lora(16), **PUBLISHED, "annealing.cut": "drop",
    }),
    Arm("sa-full", "SA-FedLoRA, a `full` round, then `freeze`, exact sums", {
        **ANNEALED, **_lora(16), **PUBLISHED,
    }),
    Arm("sa-adapter", "SA-FedLoRA, adapter only, exact sums", ANNEALED),
    Arm("sa-factors", "SA-FedLoRA, adapter only, A and B averaged apart", APART),
    Arm("sa-exact-rated", "SA-FedLoRA, adapter only, exact sums, rate follows the rank", EXACT_RATED),
    Arm("sa-rated", "SA-FedLoRA, adapter only, as by default: momentum, rate follows the rank", RATED),
    Arm("sa-late", "SA-FedLoRA, adapter only, rank 9 to 2 late, momentum on the server", LATE),
    Arm("sa-late-bfloat16", "the same, bfloat16 on the wire", {
        **LATE, "transport.uplink_dtype": "bfloat16", "transport.downlink_dtype": "bfloat16",
    }, follows="sa-late"),
    Arm("sa-full-momentum", "SA-FedLoRA, a `full` round, then rank 24 to 12, momentum on the server", {
        **LATE_FULL, **_lora(24), "lora.rank_min": 12, "annealing.heating_rounds": 2,
    }),
    Arm("sa-late-full", "SA-FedLoRA, a `full` round, then rank 20 to 8 late, momentum on the server",
        LATE_FULL),
)  # fmt: skip

# What is run on small models of random weights.
SMALL_RATES = (1e-3, 2e-3, 4e-3)
SMALL_ANNEALED: Switches = {
    "federation.method": "sa-fedlora",
    "lora.rank_max": 8,
    "lora.rank_min": 2,
    "initiating.scope": "full",
    "initiating.mu": 0.0,
    "training.full_learning_rate": 2e-3,
    "annealing.schedule": "linear",
    "annealing.heating_rounds": 2,
    "annealing.cut": "freeze",
    "annealing.rate_exponent": 0.0,
    "aggregation.kind": "product",
}
SMALL: tuple[Arm, ...] = (
    Arm("small-fedavg", "FedAvg, whole model", {"federation.method": "fedavg"}, SMALL_RATES, FULL_KEY),
    Arm("small-fedavgm", "FedAvgM, whole model: momentum on the server", {
        **MOMENTUM, "federation.method": "fedavgm", "server_optimizer.learning_rate": 1.0,
    }, SMALL_RATES, FULL_KEY),
    Arm("small-fedit-r8", "FedIT, rank 8", {**FEDIT, "lora.rank_max": 8}, SMALL_RATES),
    Arm("small-fedit-r8-momentum", "FedIT, rank 8, momentum on the server", {
        **FIXED, **MOMENTUM, "lora.rank_max": 8, "server_optimizer.learning_rate": 1.0,
    }, SMALL_RATES),
    *(
        Arm(
            f"small-sa-{rounds}",
            f"SA-FedLoRA, {rounds} `full` round{'s' * (rounds > 1)} of 20, then rank 8 to 2",
            {**SMALL_ANNEALED, "initiating.rounds": rounds},
            SMALL_RATES,
        )
        for rounds in (1, 10)
    ),
    *(
        Arm(
            f"small-sa-{rounds}-rated",
            f"the same, {rounds} `full` round{'s' * (rounds > 1)}, rate follows the rank",
            {**SMALL_ANNEALED, "initiating.rounds": rounds, "annealing.rate_exponent": 1.0},
            SMALL_RATES,
        )
        for rounds in (1, 10)
    ),
    *(
        Arm(
            f"small-sa-{rounds}-default",
            f"as by default, {rounds} `full` round{'s' * (rounds > 1)}: momentum, rate follows the rank",
            {
                **SMALL_ANNEALED,
                **MOMENTUM,
                "server_optimizer.learning_rate": 1.0,
                "aggregation.kind": "factors",
                "initiating.rounds": rounds,
                "annealing.rate_exponent": 1.0,
            },
            SMALL_RATES,
        )
        for rounds in (1, 10)
    ),
)  # fmt: skip
SMALL_SETTINGS = ("mnist", "instructions")

# What each client reaches alone. No mean over clients takes the noise out of its steps: they must be shorter.
LOCAL_FULL_RATES = (5e-5, 1e-4, 3e-4)
LOCAL_ADAPTER_RATES = (6e-5, 1.2e-4, 2.5e-4)
LOCAL: tuple[Arm, ...] = (
    Arm("local-full", "each client alone, whole model", FEDAVG, LOCAL_FULL_RATES, FULL_KEY),
    Arm("local-lora", "each client alone, rank 16", {**FEDIT, **_lora(16)}, LOCAL_ADAPTER_RATES),
)

# How the step sizes of A, B and the head were found, at rank 16. Under Adam a step moves s B A by about
# s times the learning rate through B and by the learning rate through A, so the scaling s sets their ratio
# (what LoRA+, arXiv 2402.12354, does with two learning rates); the head has a factor of its own.
SEARCHED: tuple[tuple[float, float, float, int], ...] = (  # scaling, rate, factor of the head, warm-up rounds
    (2, 4e-3, 1, 0),
    (4, 4e-3, 1, 0),
    (8, 1e-3, 4, 0),
    (8, 2e-3, 4, 0),
    (8, 2e-3, 4, 10),
    (16, 5e-4, 8, 0),
    (16, 1e-3, 4, 0),
    (16, 1e-3, 4, 8),
    (32, 5e-4, 8, 0),
)
SEARCH: tuple[Arm, ...] = tuple(
    Arm(
        f"search-s{scaling:g}-h{head:g}-w{warmup}-{rate:g}",
        f"scaling {scaling:g}, learning rate {rate:g}, head {head:g} times that, {warmup} rounds of warm-up",
        {
            **ANNEALED,
            "lora.rank_max": 16,
            "lora.alpha": 16.0 * scaling,
            "training.head_rate_factor": head,
            "training.warmup_rounds": warmup,
        },
        (rate,),
    )
    for scaling, rate, head, warmup in SEARCHED
)

# How the server's step was found, at a fixed rank of 8, and which schedules and methods were tried with it.
SERVER_STEPS: tuple[tuple[float, float, float], ...] = (  # momentum, step, learning rate
    (0.5, 0.5, 1e-3),
    (0.5, 0.7, 1e-3),
    (0.5, 1.0, 5e-4),
    (0.5, 1.0, 7e-4),
    (0.7, 0.35, 1e-3),
    (0.7, 0.6, 1e-3),
    (0.9, 0.3, 5e-4),
)


FULL_21: Switches = {**LATE_FULL, **_lora(21), "lora.rank_min": 14}


def _momentum(beta: float, step: float) -> Switches:
    return {**MOMENTUM, "server_optimizer.beta1": beta, "server_optimizer.learning_rate": step}


TRIED: tuple[Arm, ...] = (
    *(
        Arm(
            f"server-m{beta:g}-s{step:g}-{rate:g}",
            f"fixed rank 8, momentum {beta:g}, server's step {step:g}",
            {**FIXED, **_lora(8), **_momentum(beta, step)},
            (rate,),
        )
        for beta, step, rate in SERVER_STEPS
    ),
    Arm("tried-12-to-2", "rank 12 to 2 early, momentum 0.5, server's step 0.7", {
        **APART, **_momentum(0.5, 0.7),
    }, (1e-3,)),
    Arm("tried-late-s0.7", "rank 9 to 2 late, momentum 0.5, server's step 0.7", {
        **APART, **_lora(9), "annealing.heating_rounds": 24, **_momentum(0.5, 0.7),
    }, (1e-3,)),
    Arm("tried-late-s1", "rank 9 to 2 late, momentum 0.5, server's step 1", {
        **APART, **_lora(9), "annealing.heating_rounds": 24, **_momentum(0.5, 1.0),
    }, (5e-4,)),
    Arm("tried-9-to-6", "rank 9 to 6 from round 16 on, momentum 0.5, server's step 1", {
        **APART, **_lora(9), "lora.rank_min": 6, "annealing.heating_rounds": 14, **_momentum(0.5, 1.0),
    }, (5e-4,)),
    *(
        Arm(f"tried-full-s{step:g}", f"a `full` round, rank 24 to 12, momentum 0.5, server's step {step:g}", {
            **APART, **PUBLISHED, **_lora(24), "lora.rank_min": 12,
            "training.full_learning_rate": 6e-4, **_momentum(0.5, step),
        }, (5e-4,))
        for step in (1.0, 1.5)
    ),
    Arm("tried-late-rate-1", "rank 9 to 2 late, momentum 0.5, step 1.5, rate_exponent 1", {
        **LATE, "annealing.rate_exponent": 1.0,
    }, (5e-4,)),
    Arm("tried-12-to-2-rate-2", "rank 12 to 2 early, momentum 0.5, step 1, rate_exponent 2", {
        **RATED, "annealing.rate_exponent": 2.0,
    }, (5e-4,)),
    Arm("tried-full-rated", "a `full` round, rank 24 to 12, momentum 0.5, step 1, rate_exponent 1", {
        **APART, **PUBLISHED, **_lora(24), "lora.rank_min": 12, "training.full_learning_rate": 6e-4,
        **_momentum(0.5, 1.0), "annealing.rate_exponent": 1.0,
    }, (5e-4,)),
    Arm("tried-factors-rated", "rank 12 to 2 early, plain averages of A and B, rate_exponent 1", {
        **APART, "annealing.rate_exponent": 1.0,
    }, (1e-3,)),
    Arm("tried-full-exact-rated", "a `full` round, rank 16 to 2 early, exact sums, rate_exponent 1", {
        **EXACT_RATED, **PUBLISHED, **_lora(16),
    }, (5e-4,)),
    Arm("tried-late-exact", "rank 9 to 2 late, exact sums, no momentum", {
        **ANNEALED, **_lora(9), "annealing.heating_rounds": 24,
    }, (5e-4,)),
    Arm("tried-full-late-exact", "a `full` round, rank 20 to 8 late, exact sums, no momentum", {
        **ANNEALED, **PUBLISHED, **_lora(20), "lora.rank_min": 8, "annealing.heating_rounds": 24,
        "training.full_learning_rate": 6e-4,
    }, (5e-4,)),
    Arm("tried-full-21-14-plain", "a `full` round, rank 21 to 14 late, plain averages of A and B", {
        **FULL_21, "server_optimizer.kind": "none",
    }, (5e-4,)),
    Arm("tried-full-21-14", "a `full` round, rank 21 to 14 late, momentum 0.5, server's step 1", {
        **FULL_21,
    }, (2.5e-4,)),
    Arm("tried-full-steep", "a `full` round at 1.2e-3, rank 20 to 8 late, momentum 0.5, server's step 1", {
        **LATE_FULL, "training.full_learning_rate": 1.2e-3,
    }, (5e-4,)),
    Arm("tried-full-twice", "two `full` rounds, rank 8 to 4 late, momentum 0.5, server's step 1", {
        **LATE_FULL, **_lora(8), "lora.rank_min": 4, "initiating.rounds": 2,
    }, (5e-4,)),
    *(
        Arm(f"tried-full-subspace-{scaling}",
            f"a `full` round, rank 20 to 8 late, A starts in its update's directions, scaling {scaling}",
            {**LATE_FULL, "lora.alpha": 20.0 * scaling}, (5e-4,), variant="update-subspace")
        for scaling in (32, 8, 2)
    ),
    *(
        Arm(f"tried-fedavg-{name}", f"FedAvg, {about} not trained", FEDAVG, (6e-4,), FULL_KEY, variant=name)
        for name, about in (("frozen-embeddings", "embeddings"), ("frozen-norms", "layer norms"))
    ),
    Arm("tried-rolora", "RoLoRA, fixed rank 16: A and B in turn, the bytes of rank 8", {
        "federation.method": "rolora", **_lora(16),
    }, (1e-3,)),
)  # fmt: skip

# One factor at a time from `sa-adapter`, at its learning rate.
ABLATIONS: tuple[Arm, ...] = tuple(
    Arm(f"sa-adapter+{name}", about, {**ANNEALED, **changes}, follows="sa-adapter")
    for name, about, changes in (
        ("drop", "directions that are cut are discarded", {"annealing.cut": "drop"}),
        ("cosine", "cosine cooling", {"annealing.schedule": "cosine"}),
        ("cubic", "cubic cooling", {"annealing.schedule": "cubic"}),
        ("exponential", "exponential cooling", {"annealing.schedule": "exponential"}),
        ("constant-rate", "constant learning rate", {"training.learning_rate_schedule": "constant"}),
        ("linear-rate", "linear learning rate", {"training.learning_rate_schedule": "linear"}),
        ("heating-8", "8 rounds of heating instead of 2", {"annealing.heating_rounds": 8}),
        ("heating-0", "no heating", {"annealing.heating_rounds": 0}),
        ("rank-min-1", "the rank ends at 1", {"lora.rank_min": 1}),
        ("rank-min-4", "the rank ends at 4", {"lora.rank_min": 4}),
        ("no-initiating", "no initiating stage", {"initiating.rounds": 0}),
        ("mu-0", "initiating without penalty", {"initiating.mu": 0.0}),
        ("mu-0.1", "initiating with mu 0.1", {"initiating.mu": 0.1}),
        ("upper-half", "only the three upper layers, rank 22 to 4", {
            **_lora(22), "lora.rank_min": 4, "lora.target_modules": r".*layer\.[345]\..*",
        }),
        ("spectral", "ranks shared out by singular values", {"annealing.allocation": "spectral"}),
        ("target", "cut while the held-out accuracy bears it", {"annealing.schedule": "target"}),
        ("metropolis", "cuts tried before they are sent (drop)", {
            "annealing.schedule": "metropolis", "annealing.cut": "drop",
        }),
        ("bfloat16-wire", "bfloat16 both ways", {
            "transport.uplink_dtype": "bfloat16", "transport.downlink_dtype": "bfloat16",
        }),
        ("int8-wire", "int8 both ways", {
            "transport.uplink_dtype": "int8", "transport.downlink_dtype": "int8",
        }),
        *(
            (f"rate-{power:g}", f"learning rate times (rank_max / rank) ^ {power:g}", {
                "annealing.rate_exponent": power,
            })
            for power in (0.5, 1.0, 2.0)
        ),
        *((f"r{rank}", f"rank_max {rank}", _lora(rank)) for rank in (4, 8, 11, 16)),
    )
) + (
    Arm("sa-adapter+balanced-split", "a cut shares the singular values between A and B", ANNEALED,
        follows="sa-adapter", variant="balanced-split"),
    Arm("sa-adapter+cut-first", "each client's update is cut before the sum", ANNEALED,
        follows="sa-adapter", variant="cut-first"),
)  # fmt: skip

ARMS: Mapping[str, Arm] = {arm.name: arm for arm in (*CORE, *SMALL, *LOCAL, *SEARCH, *TRIED, *ABLATIONS)}
# What is run in the settings beside the core's: in other federations, and with twice the rounds.
FACTORS: Mapping[str, tuple[str, ...]] = dict.fromkeys(
    ("20newsgroups-iid", "20newsgroups-dirichlet-0.1", "20newsgroups-64-clients"),
    ("fedavg", "fedit-r8", "sa-adapter", "sa-rated"),
)
LONGER_ARMS = ("fedavg", "fedit-r8", "sa-rated")
BESIDE: Mapping[str, tuple[str, ...]] = {**FACTORS, **dict.fromkeys(LONGER, LONGER_ARMS)}


def arms_of(setting: str) -> Iterable[Arm]:
    """Return the arms that are run in a setting."""
    if setting in TUNED:
        return (*CORE, *(SEARCH + TRIED + ABLATIONS if setting == FIRST else ()))
    if setting in SMALL_SETTINGS:
        return SMALL
    return [ARMS[name] for name in BESIDE[setting]] if setting in BESIDE else LOCAL


@dataclass(frozen=True)
class Trial:
    """One run.

    Args:
        setting: of `SETTINGS`.
        arm: of `ARMS`.
        rate: learning rate.
        seed: of the federation.
        split: `validation` or `test`.
    """

    setting: str
    arm: str
    rate: float
    seed: int
    split: str

    @property
    def name(self) -> str:
        """The folder of its results."""
        return f"{self.setting}/{self.arm}/{self.split}-{self.rate:g}-seed{self.seed}"

    def overrides(self) -> dict[str, Any]:
        """Return what it sets beside its arm's run file."""
        every = 40 if self.arm.startswith("local") else 8 if self.split == "test" else 20
        return {
            ARMS[self.arm].rate_key: self.rate,
            "federation.seed": self.seed,
            "evaluation.split": self.split,
            "evaluation.every": every,
        }


Rates = Mapping[tuple[str, str], float]
TUNING_SETTINGS = (*TUNED, *SMALL_SETTINGS, *(client_setting(name, 0) for name in TUNED))


def search() -> Iterator[Trial]:
    """Yield the runs that were made to find the step sizes, on held-out training data."""
    yield from (Trial(FIRST, arm.name, arm.rates[0], 0, "validation") for arm in SEARCH + TRIED)


def tuning() -> Iterator[Trial]:
    """Yield the runs that choose learning rates."""
    for setting in TUNING_SETTINGS:
        for arm in arms_of(setting):
            if arm.follows is None and arm in CORE + SMALL + LOCAL:
                yield from (Trial(setting, arm.name, rate, 0, "validation") for rate in arm.rates)


def core(rates: Rates) -> Iterator[Trial]:
    """Yield the runs of the main tables, seed by seed, so that what is cut short is a whole table."""
    for seed in SEEDS:
        for setting in TUNED:
            yield from (Trial(setting, arm.name, rates[setting, arm.name], seed, "test") for arm in CORE)


def local(rates: Rates) -> Iterator[Trial]:
    """Yield the runs of the clients of one federation, each alone with its data."""
    for setting in TUNED:
        for arm in LOCAL:
            for k in range(COMMON["federation.num_clients"]):
                alone = client_setting(setting, k)
                yield Trial(alone, arm.name, rates[alone, arm.name], LOCAL_SEED, "test")


def factors(rates: Rates) -> Iterator[Trial]:
    """Yield the runs in the other settings."""
    for seed in SEEDS:
        for setting, arms in BESIDE.items():
            yield from (Trial(setting, arm, rates[setting, arm], seed, "test") for arm in arms)


def small(rates: Rates) -> Iterator[Trial]:
    """Yield the runs of small models of random weights: images, and a language model."""
    for seed in SEEDS:
        for setting in SMALL_SETTINGS:
            yield from (Trial(setting, arm.name, rates[setting, arm.name], seed, "test") for arm in SMALL)


def ablations(rates: Rates) -> Iterator[Trial]:
    """Yield the runs that change one factor, measured on held-out training data."""
    for seed in SEEDS:
        for arm in (ARMS["sa-adapter"], *ABLATIONS):
            yield Trial(FIRST, arm.name, rates[FIRST, arm.name], seed, "validation")


def source_of_rate(setting: str, arm: str) -> tuple[str, str]:
    """Return the setting and the arm whose tuning chooses the learning rate of an arm in a setting."""
    if setting in TUNING_SETTINGS:
        return setting, ARMS[arm].follows or arm
    tuned = next((name for name in TUNED if setting.startswith(name)), FIRST)
    place = client_setting(tuned, 0) if setting.startswith(f"{tuned}-client-") else tuned
    return place, ARMS[arm].follows or arm
