"""The tables of a run file that make the method: what is trained, exchanged, aggregated and kept.

With `mpifedlora.core.sections` they are all its tables (`RunTables`).
"""

from __future__ import annotations

from fractions import Fraction
from itertools import cycle, islice
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mpifedlora.core.sections import (
    CheckpointConfig,
    Count,
    DataConfig,
    EvaluationConfig,
    FaultsConfig,
    FederationConfig,
    ModelConfig,
    NonNegative,
    Positive,
    PositiveInt,
    PrivacyConfig,
    Section,
    TrackingConfig,
    TransportConfig,
)
from mpifedlora.core.task_config import TaskConfig

Scope = Literal["adapter", "full"]
TrainingScope = Literal["adapter", "full", "b-only", "alternating"]
AggregationKind = Literal["product", "factors", "zero-pad", "stack", "residual"]
RankSchedule = Literal["constant", "linear", "cosine", "cubic", "exponential", "step", "metropolis", "target"]
Capacity = Annotated[float, Field(gt=0, le=1)]


class LoraSection(Section):
    """`[lora]`: the adapter. Its scaling is constant over the whole run."""

    rank_max: PositiveInt = Field(16, description="LoRA rank that annealing starts from.")
    rank_min: PositiveInt = Field(2, description="LoRA rank that cooling ends at.")
    client_ranks: list[PositiveInt] | None = Field(
        None,
        min_length=1,
        description="LoRA rank of each client; a shorter list is repeated over the clients.",
    )
    client_capacities: list[Capacity] | None = Field(
        None,
        min_length=1,
        description="Relative capacity of each client: its rank is the largest whole number up to "
        "capacity * rank_max, at least 1; a shorter list is repeated.",
    )
    alpha: Positive = Field(32.0, description="Numerator of the scaling alpha / rank_max.")
    use_rslora: bool = Field(
        False, description="Scaling alpha / sqrt(rank_max) instead (rsLoRA, arXiv 2312.03732)."
    )
    use_dora: bool = Field(
        False, description="Refused: DoRA's magnitudes (arXiv 2402.09353) survive no exact sum and no cut."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: list[str] | str = Field(
        "all-linear",
        description="Names (or endings of names) of the linear layers to adapt, a regular expression, "
        "or `all-linear`: every linear layer but the head.",
    )
    modules_to_save: list[str] = Field(
        default_factory=list,
        description="Modules trained and exchanged whole beside the task head, which always is.",
    )

    @model_validator(mode="after")
    def _ranks_are_ordered(self) -> LoraSection:
        if self.rank_min > self.rank_max:
            raise ValueError(
                f"rank_min must be at most rank_max, got {self.rank_min} and {self.rank_max}; swap them"
            )
        if not self.target_modules:
            raise ValueError('target_modules must name at least one layer, got none; use "all-linear"')
        return self

    @model_validator(mode="after")
    def _client_ranks_fit(self) -> LoraSection:
        if self.client_ranks is not None and self.client_capacities is not None:
            raise ValueError(
                f"only one of client_ranks and client_capacities may be given, got {self.client_ranks} and "
                f"{self.client_capacities}; remove one"
            )
        if self.client_ranks and max(self.client_ranks) > self.rank_max:
            raise ValueError(
                f"client_ranks must be at most rank_max, got {max(self.client_ranks)} and {self.rank_max}; "
                "lower the client rank above rank_max, or raise rank_max"
            )
        return self


class InitiatingConfig(Section):
    """`[initiating]`: stage 1 of SA-FedLoRA, training with a proximal penalty."""

    rounds: Count = Field(2, description="Rounds of the initiating stage; 0 leaves it out.")
    scope: Scope = Field(
        "adapter",
        description="`adapter`: adapter and head at rank_max; `full`: every weight of the model is "
        "trained and exchanged, and LoRA starts on the aggregated model.",
    )
    mu: NonNegative = Field(0.01, description="Weight of (mu/2) * ||theta - theta_received||^2.")
    mu_schedule: Literal["constant", "linear"] = Field(
        "constant", description="`linear`: mu falls to 0 by the stage's last round."
    )


class AnnealingConfig(Section):
    """`[annealing]`: stage 2 of SA-FedLoRA, the rank budget as a falling temperature."""

    schedule: RankSchedule = Field(
        "linear",
        description="Shape of the cooling. `metropolis`: each further cut is tried on the held-out examples "
        "and taken or not; `target`: cutting goes on while the held-out accuracy bears it.",
    )
    heating_rounds: Count = Field(2, description="Rounds at full budget before cooling begins.")
    cooling_rounds: PositiveInt | None = Field(
        None, description="Rounds until the budget is rank_min; by default all that remain."
    )
    cut: Literal["drop", "freeze"] = Field(
        "freeze",
        description="What becomes of directions beyond the budget: `drop` discards them, `freeze` "
        "sends them once more and keeps them fixed from then on.",
    )
    exponential_end: float = Field(
        0.01, gt=0, lt=1, description="Smallest factor of the `exponential` schedule (tau_end)."
    )
    num_steps: PositiveInt = Field(4, description="Equal stairs of the `step` schedule.")
    allocation: Literal["uniform", "spectral"] = Field(
        "uniform",
        description="How the budget is shared out among the modules. `uniform`: the same rank everywhere; "
        "`spectral`: the directions with the largest singular value per value sent, at least one each.",
    )
    rate_exponent: NonNegative = Field(
        1.0,
        description="As the rank falls, training.learning_rate is multiplied by (rank at the start / rank) "
        "to the power of this, both means over the modules. Under Adam a step moves B @ A by about the rank "
        "times the learning rate: 1 makes up for that, 0 does not.",
    )
    cut_step: PositiveInt = Field(1, description="Ranks that `metropolis` and `target` cut at a time.")
    tolerance: NonNegative = Field(
        0.01,
        description="`target`: cutting goes on while the held-out accuracy stays within this of its best; "
        "then it stops for good.",
    )
    metropolis_temperature: Positive = Field(
        0.01,
        description="`metropolis` accepts a cut that raises the held-out loss by x with probability "
        "exp(-x / (metropolis_temperature * tau)), tau the linear temperature of the round.",
    )


class AggregationConfig(Section):
    """`[aggregation]`: how the clients' adapters become one."""

    kind: AggregationKind = Field(
        "product",
        description="`product`: the exact weighted sum of B @ A, cut to the budget by SVD; `factors`: "
        "the means of A and of B apart (biased); `zero-pad`: the same where ranks differ, smaller ones "
        "filled up with zeros; `stack`: the clients' factors side by side, which every client adds to the "
        "base before it starts afresh; `residual`: `factors`, and what they miss of the exact sum goes "
        "into the base.",
    )
    weights: Literal["examples", "equal", "frobenius"] = Field(
        "examples",
        description="What a client counts by: its number of examples; `equal`: all count the same; "
        "`frobenius`: by the norm of the client's B @ A (HetLoRA).",
    )
    robust: Literal["none", "median", "trimmed-mean", "krum", "multi-krum"] = Field(
        "none", description="What takes the mean's place where some clients may send anything."
    )
    num_byzantine: Count = Field(
        1,
        description="Clients that `krum` and `multi-krum` must withstand, and that `trimmed-mean` trims on "
        "each side.",
    )
    norm_bound: Positive | None = Field(
        None, description="An update whose norm is above it is left out of the round."
    )


class TrainingConfig(Section):
    """`[training]`: one client's local training in one round."""

    scope: TrainingScope = Field(
        "adapter",
        description="What is trained after the initiating stage, always with the head. `full`: every weight "
        "of the model; `b-only`: A stays as drawn from the seed (FFA-LoRA); `alternating`: B in odd rounds, "
        "A in even rounds (RoLoRA).",
    )
    personal: Literal["none", "b", "b-and-head"] = Field(
        "none",
        description="What stays with each client. `b`: its own B, and it shares A and the head (FedSA-LoRA); "
        "`b-and-head`: the head too, as that paper's code does for classification.",
    )
    control_variates: bool = Field(
        False, description="Correct each client's drift by variates that it and the server keep (SCAFFOLD)."
    )
    local_steps: PositiveInt | None = Field(None, description="Optimiser steps per client and round.")
    local_epochs: PositiveInt | None = Field(
        None, description="Passes over the client's examples instead; 1 if neither is given."
    )
    batch_size: PositiveInt = Field(16, description="Examples per step.")
    accumulation_steps: PositiveInt = Field(
        1,
        description="Parts that a step's batch is computed in, one after another: the same gradient with "
        "less memory.",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Keep only the inputs of the model's layers, and compute the rest again in the "
        "backward pass: the same gradients with less memory and more time.",
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="Fresh at each round's start.")
    learning_rate: Positive = Field(4e-3, description="Step size where the adapter is trained.")
    full_learning_rate: Positive = Field(
        3e-4, description="Step size where the whole model is trained (`scope = full`)."
    )
    head_rate_factor: Positive = Field(
        1.0,
        description="Step size of the task head and of lora.modules_to_save over that of the rest; under "
        "SGD too.",
    )
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Factor on the learning rate over the rounds, from 1 towards 0."
    )
    warmup_rounds: Count = Field(
        0,
        description="Rounds in which the learning rate rises in equal steps to what the schedule says, from "
        "the first round on that trains what `scope` says.",
    )
    weight_decay: NonNegative = Field(0.0, description="Decoupled decay under AdamW, L2 under SGD.")
    momentum: float = Field(0.0, ge=0, lt=1, description="Momentum of SGD.")
    grad_clip: NonNegative = Field(1.0, description="Largest gradient norm; 0 leaves it unclipped.")
    mu: NonNegative = Field(0.0, description="Proximal weight after the initiating stage (FedProx).")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="`bfloat16` runs the model under autocast."
    )
    batching: Literal["shuffled", "bucketed"] = Field(
        "shuffled",
        description="`bucketed`: examples of similar length share a batch, so that little is padded; which "
        "examples, and the order of the batches, still come from the seed.",
    )
    compile: bool = Field(
        False,
        description="Compile the model's forward and backward passes (torch.compile); needs "
        "federation.reproducible = false, and pays where many rounds have one rank.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="`auto`: a GPU where the node has one for the worker, else the CPU."
    )
    threads: PositiveInt | None = Field(
        None, description="CPU threads per process; by default the node's cores are shared out."
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if self.local_steps is not None and self.local_epochs is not None:
            raise ValueError(
                f"only one of local_steps and local_epochs may be given, got {self.local_steps} and "
                f"{self.local_epochs}; remove one"
            )
        return self


class ServerOptimizerConfig(Section):
    """`[server_optimizer]`: what the server makes of the clients' mean update."""

    kind: Literal["none", "momentum", "fedadam", "fedyogi", "fedadagrad"] = Field(
        "none", description="`none`: the clients' mean is the new model; else a step towards it."
    )
    learning_rate: Positive | None = Field(
        None,
        description="Step size of the server; by default 1.0 under `momentum`, 0.01 under the adaptive ones.",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment, or the momentum.")
    beta2: float = Field(0.99, ge=0, lt=1, description="Decay of the second moment (`fedadam`, `fedyogi`).")
    tau: Positive = Field(1e-3, description="Added to the root of the second moment (adaptivity).")


class RunTables(Section):
    """The tables of a run file, each of them right by itself."""

    model: ModelConfig
    data: DataConfig
    task: TaskConfig = TaskConfig()  # type: ignore[call-arg]
    federation: FederationConfig = FederationConfig()  # type: ignore[call-arg]
    lora: LoraSection = LoraSection()  # type: ignore[call-arg]
    initiating: InitiatingConfig = InitiatingConfig()  # type: ignore[call-arg]
    annealing: AnnealingConfig = AnnealingConfig()  # type: ignore[call-arg]
    aggregation: AggregationConfig = AggregationConfig()  # type: ignore[call-arg]
    training: TrainingConfig = TrainingConfig()  # type: ignore[call-arg]
    server_optimizer: ServerOptimizerConfig = ServerOptimizerConfig()  # type: ignore[call-arg]
    privacy: PrivacyConfig = PrivacyConfig()  # type: ignore[call-arg]
    evaluation: EvaluationConfig = EvaluationConfig()  # type: ignore[call-arg]
    transport: TransportConfig = TransportConfig()  # type: ignore[call-arg]
    checkpoint: CheckpointConfig = CheckpointConfig()  # type: ignore[call-arg]
    faults: FaultsConfig = FaultsConfig()  # type: ignore[call-arg]
    tracking: TrackingConfig = TrackingConfig()  # type: ignore[call-arg]

    @property
    def rounds_before_scope(self) -> int:
        """Rounds of a `full` initiating stage, before what `training.scope` says is trained."""
        return self.initiating.rounds if self.initiating.scope == "full" != self.training.scope else 0


def default_of(key: str) -> Any:
    """Return the value that a key has where the run file is silent.

    Args:
        key: Dotted, of a table all of whose keys have a default.

    >>> default_of("training.scope")
    'adapter'
    """
    section, _, name = key.partition(".")
    return getattr(RunTables.model_fields[section].default, name)


def ranks_of_clients(config: RunTables) -> tuple[int, ...]:
    """Return the LoRA rank of each client before any cut.

    Args:
        config: Of the run; `lora.client_ranks` or `lora.client_capacities` is repeated over the clients.

    Returns:
        `num_clients` ranks from 1 to rank_max; rank_max everywhere where neither is given.

    >>> tables = {"model": {"name": "minilm"}, "data": {"source": "reuters-r8"}}
    >>> tables |= {"federation": {"num_clients": 3}, "lora": {"client_capacities": [0.5, 0.01]}}
    >>> ranks_of_clients(RunTables.model_validate(tables))
    (8, 1, 8)
    """
    lora = config.lora
    if lora.client_capacities is not None:
        # As the number is written: in binary, 0.29 * 100 is below 29.
        exact = [Fraction(str(capacity)) * lora.rank_max for capacity in lora.client_capacities]
        ranks = [max(1, int(product)) for product in exact]
    else:
        ranks = lora.client_ranks or [lora.rank_max]
    return tuple(islice(cycle(ranks), config.federation.num_clients))
