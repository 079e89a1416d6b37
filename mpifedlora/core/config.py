"""The configuration of one run, as checked values.

One pydantic model per table of the run file. The models hold every rule that needs no file, no
network and no device; `mpifedlora.io.run_file` turns their errors into one readable message.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LARGEST_INT = 2**31 - 1
"""Largest whole number of every key but `seed`: it fits the message header and MPI's counts."""

PositiveInt = Annotated[int, Field(ge=1, le=LARGEST_INT)]
Count = Annotated[int, Field(ge=0, le=LARGEST_INT)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Scope = Literal["adapter", "full"]
RankSchedule = Literal["constant", "linear", "cosine", "cubic", "exponential", "step"]


class Section(BaseModel):
    """A table of the run file: unknown keys are errors, values are fixed once checked.

    Strict, so that `true` is no number and `"3"` is no whole number; a whole number still does as a float.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelConfig(Section):
    """`[model]`: the pre-trained base model that every client has before round 1."""

    name: str = Field(
        min_length=1,
        description="`minilm` (packaged weights), a local folder, or a hub name.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Data type of the base weights; adapters are always float32."
    )
    dropout: float | None = Field(
        None, ge=0, lt=1, description="Dropout inside the base model; by default the model's own."
    )
    head: Literal["auto", "mean_pooling", "stock"] = Field(
        "auto",
        description="Task head. `mean_pooling`: linear layer on mean-pooled token features, which fits "
        "sentence encoders; `stock`: the model's own sequence-classification head; `auto`: "
        "`mean_pooling` where the model folder says so (sentence-transformers' pooling file).",
    )


class DataConfig(Section):
    """`[data]`: where the examples come from and which client owns which."""

    source: str = Field(
        min_length=1,
        description="`20newsgroups`, `reuters-r8`, `reuters-r52` (see `mpifedlora data`), a local "
        "`.csv`, `.jsonl` or `.parquet` file, or a hub name (needs the package `datasets`).",
    )
    text_column: str = Field("text", description="Column with the text.")
    label_column: str = Field("label", description="Column with the label (text or integer).")
    test_source: str | None = Field(
        None, description="A second file or source to test on; without it the source's own test part."
    )
    test_fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of the examples split off for testing (stratified by label, from the seed) "
        "where the source has no test part.",
    )
    validation_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the training examples held out for choices (stratified, from the seed).",
    )
    partition: Literal["iid", "dirichlet", "shards", "column"] = Field(
        "dirichlet", description="How training examples are shared out among the clients."
    )
    alpha: Positive = Field(
        0.5, description="Concentration of the Dirichlet partition; smaller is less alike."
    )
    shards_per_client: PositiveInt = Field(2, description="Label-sorted shards a client gets under `shards`.")
    partition_column: str | None = Field(
        None, description="Column that names each example's owner under `column`."
    )
    max_length: int = Field(128, ge=2, le=LARGEST_INT, description="Tokens a text is cut to.")
    max_examples: PositiveInt | None = Field(
        None, description="At most so many training examples are used (drawn from the seed)."
    )

    @model_validator(mode="after")
    def _column_is_named(self) -> DataConfig:
        if self.partition == "column" and self.partition_column is None:
            raise ValueError('partition = "column" needs partition_column, got none; name the column')
        return self


class FederationConfig(Section):
    """`[federation]`: who takes part, for how long, by which method."""

    method: str = Field("sa-fedlora", description="A preset of `mpifedlora methods`, or `custom`.")
    num_clients: PositiveInt = Field(8, description="Clients in the federation.")
    num_rounds: PositiveInt = Field(20, description="Plan-train-aggregate cycles.")
    cohort_size: PositiveInt | None = Field(
        None, description="Clients drawn for each round from the seed; all of them by default."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Every random stream starts from it.")
    reproducible: bool = Field(
        True, description="Same bits for any number of workers; what would break it is refused."
    )

    @model_validator(mode="after")
    def _cohort_fits(self) -> FederationConfig:
        if self.cohort_size is not None and self.cohort_size > self.num_clients:
            raise ValueError(
                f"cohort_size must be at most num_clients, got {self.cohort_size} and "
                f"{self.num_clients}; lower cohort_size"
            )
        return self


class LoraSection(Section):
    """`[lora]`: the adapter. Its scaling alpha / rank_max is constant over the whole run."""

    rank_max: PositiveInt = Field(16, description="LoRA rank that annealing starts from.")
    rank_min: PositiveInt = Field(2, description="LoRA rank that cooling ends at.")
    alpha: Positive = Field(32.0, description="Numerator of the scaling alpha / rank_max.")
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

    schedule: RankSchedule = Field("linear", description="Shape of the cooling.")
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


class AggregationConfig(Section):
    """`[aggregation]`: how the clients' adapters become one."""

    kind: Literal["product", "factors"] = Field(
        "product",
        description="`product`: the exact weighted sum of B @ A, cut to the budget by SVD; `factors`: "
        "the means of A and of B apart (biased).",
    )


class TrainingConfig(Section):
    """`[training]`: one client's local training in one round."""

    scope: Scope = Field("adapter", description="What is trained after the initiating stage.")
    local_steps: PositiveInt | None = Field(None, description="Optimiser steps per client and round.")
    local_epochs: PositiveInt | None = Field(
        None, description="Passes over the client's examples instead; 1 if neither is given."
    )
    batch_size: PositiveInt = Field(16, description="Examples per step.")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="Fresh at each round's start.")
    learning_rate: Positive = Field(4e-3, description="Step size where the adapter is trained.")
    full_learning_rate: Positive = Field(
        3e-4, description="Step size where the whole model is trained (`scope = full`)."
    )
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Factor on the learning rate over the rounds, from 1 towards 0."
    )
    weight_decay: NonNegative = Field(0.0, description="Decoupled decay under AdamW, L2 under SGD.")
    momentum: float = Field(0.0, ge=0, lt=1, description="Momentum of SGD.")
    grad_clip: NonNegative = Field(1.0, description="Largest gradient norm; 0 leaves it unclipped.")
    mu: NonNegative = Field(0.0, description="Proximal weight after the initiating stage (FedProx).")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32", description="`bfloat16` runs the model under autocast."
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


class EvaluationConfig(Section):
    """`[evaluation]`: when and where the global model is measured."""

    every: PositiveInt = Field(1, description="Evaluate after every so many rounds, and the last.")
    max_examples: PositiveInt | None = Field(
        None, description="At most so many examples are used (drawn from the seed)."
    )
    on: Literal["server", "workers"] = Field(
        "server",
        description="`server`: while the workers train; `workers`: shared out before they train.",
    )
    split: Literal["test", "validation"] = Field(
        "test", description="`validation` for choices; needs data.validation_fraction."
    )
    batch_size: PositiveInt = Field(64, description="Examples per forward pass.")


class RunConfig(Section):
    """The whole run file, resolved."""

    model: ModelConfig
    data: DataConfig
    federation: FederationConfig = FederationConfig()  # type: ignore[call-arg]
    lora: LoraSection = LoraSection()  # type: ignore[call-arg]
    initiating: InitiatingConfig = InitiatingConfig()  # type: ignore[call-arg]
    annealing: AnnealingConfig = AnnealingConfig()  # type: ignore[call-arg]
    aggregation: AggregationConfig = AggregationConfig()  # type: ignore[call-arg]
    training: TrainingConfig = TrainingConfig()  # type: ignore[call-arg]
    evaluation: EvaluationConfig = EvaluationConfig()  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _sections_fit(self) -> RunConfig:
        initiating, annealing = self.initiating.rounds, self.federation.num_rounds - self.initiating.rounds
        if annealing < 0:
            raise ValueError(
                f"initiating.rounds must be at most federation.num_rounds, got {initiating} and "
                f"{self.federation.num_rounds}; lower initiating.rounds"
            )
        if initiating and self.initiating.scope == "adapter" and self.training.scope == "full":
            raise ValueError(
                'the whole model cannot be trained after an adapter, got initiating.scope = "adapter" and '
                'training.scope = "full"; set initiating.scope = "full", or initiating.rounds = 0'
            )
        planned = self.annealing.heating_rounds + (self.annealing.cooling_rounds or 1)
        if self.annealing.schedule != "constant" and 0 < annealing < planned:
            raise ValueError(
                f"annealing.heating_rounds and at least one round of cooling (annealing.cooling_rounds) must "
                f"fit into the {annealing} rounds after the initiating stage, got {planned} together; lower "
                "annealing.heating_rounds or initiating.rounds, or raise federation.num_rounds"
            )
        if self.evaluation.split == "validation" and self.data.validation_fraction == 0:
            raise ValueError(
                'evaluation.split = "validation" needs a validation part, got data.validation_fraction = 0; '
                "set data.validation_fraction, for example to 0.1"
            )
        return self
