"""The tables of a run file that any federated run has, and what every table is made of.

The tables that make the method are in `mpifedlora.core.method_config`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LARGEST_INT = 2**31 - 1
"""Largest whole number of every key but the seeds: it fits the message header and MPI's counts."""

PositiveInt = Annotated[int, Field(ge=1, le=LARGEST_INT)]
Count = Annotated[int, Field(ge=0, le=LARGEST_INT)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


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
    quantize: Literal["none", "int8", "nf4"] = Field(
        "none",
        description="Base weights of the linear layers in 8 or 4 bits (QLoRA, arXiv 2305.14314); needs a GPU "
        "for every process, and the package bitsandbytes.",
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
        description="`20newsgroups`, `reuters-r8`, `reuters-r52`, `mnist-5k` (see `mpifedlora data`), a "
        "local `.csv`, `.jsonl` or `.parquet` file, a folder of images with a subfolder a label, or a hub "
        'name (needs the package `datasets`); under `partition = "files"` a folder with a file, or one of '
        "images, for each client.",
    )
    text_column: str = Field("text", description="Column with the text.")
    image_column: str = Field("image", description="Column with the image, where the source has columns.")
    label_column: str | None = Field(
        None,
        description="Column with the label (text or integer); `label` by default where the task has labels. "
        "Any other task may name one too: `dirichlet` and `shards` share out by it.",
    )
    prompt_column: str = Field("prompt", description="Column with the prompt, under `causal-lm`.")
    response_column: str = Field("response", description="Column with the response, under `causal-lm`.")
    messages_column: str | None = Field(
        None,
        description="Column with a whole conversation instead, a list of {role, content}, under `causal-lm`.",
    )
    columns: list[str] | None = Field(
        None,
        min_length=1,
        description="Columns that a task of your own reads, under their names; by default `text_column` as "
        "`text`.",
    )
    labels: list[str] | None = Field(
        None,
        min_length=1,
        description="Names that labels may have, in the order of their numbers; any other is an error. By "
        "default those that are there, sorted.",
    )
    test_source: str | None = Field(
        None,
        description="A second file or source to test on; without it the source's own test part, or, under "
        '`partition = "files"`, a part of each client\'s file.',
    )
    test_fraction: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of the examples split off for testing (stratified by label, from the seed) "
        "where the source has no test part; under `files` of each client's, without `test_source`.",
    )
    validation_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the training examples held out for choices (stratified, from the seed); under "
        "`files` of each client's, or of `test_source` where there is one.",
    )
    partition: Literal["iid", "dirichlet", "quantity", "shards", "column", "files"] = Field(
        "dirichlet",
        description="How training examples are shared out among the clients. `dirichlet`: each client "
        "gets its own mix of labels; `quantity`: its own share of the examples, drawn from Dir(alpha); "
        "`files`: they are not, each client has a file in the folder `source`, which its worker alone reads.",
    )
    alpha: Positive = Field(
        0.5,
        description="Concentration of the Dirichlet distribution under `dirichlet` and `quantity`; smaller "
        "is less alike.",
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

    @model_validator(mode="after")
    def _files_are_read_whole(self) -> DataConfig:
        if self.partition == "files" and self.max_examples is not None:
            raise ValueError(
                'partition = "files" must stand without max_examples (clients\' files are read whole), got '
                f"{self.max_examples}; leave max_examples out, or shorten the files"
            )
        return self


class FederationConfig(Section):
    """`[federation]`: who takes part, for how long, by which method."""

    method: str = Field("sa-fedlora", description="A preset of `mpifedlora methods`, or `custom`.")
    num_clients: PositiveInt = Field(8, description="Clients in the federation.")
    num_rounds: PositiveInt = Field(20, description="Plan-train-aggregate cycles.")
    cohort_size: PositiveInt | None = Field(
        None,
        description="Clients drawn for each round from the seed (under `poisson`: their expected number); "
        "all of them by default.",
    )
    sampling: Literal["fixed", "poisson"] = Field(
        "fixed",
        description="`fixed`: cohort_size clients in every round; `poisson`: every client takes part "
        "independently with probability cohort_size / num_clients, which is what the privacy accountant "
        "assumes.",
    )
    seed: Seed = Field(0, description="Every random stream starts from it.")
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
        if self.sampling == "poisson" and self.cohort_size is None:
            raise ValueError(
                'sampling = "poisson" needs cohort_size (each client takes part with probability '
                "cohort_size / num_clients), got none; set cohort_size, or leave sampling out"
            )
        return self


class EvaluationConfig(Section):
    """`[evaluation]`: what is measured, when and where."""

    model: Literal["global", "personal"] = Field(
        "global",
        description="`global`: the server's model; `personal`: each client's own model on its share of the "
        "examples, which has the client's mix of labels, or on what it has held out itself.",
    )

    every: PositiveInt = Field(1, description="Evaluate after every so many rounds, and the last.")
    max_examples: PositiveInt | None = Field(
        None, description="At most so many examples are used (drawn from the seed)."
    )
    on: Literal["server", "workers"] = Field(
        "server",
        description="`server`: while the workers train; `workers`: shared out before they train, or each "
        "client's held-out part by its worker (docs/data.md).",
    )
    split: Literal["test", "validation"] = Field(
        "test", description="`validation` for choices; needs data.validation_fraction."
    )
    batch_size: PositiveInt = Field(64, description="Examples per forward pass.")


WireDtype = Literal["float32", "bfloat16", "float16", "int8"]


class TransportConfig(Section):
    """`[transport]`: how messages and updates cross between the processes."""

    collect: Literal["auto", "gather", "reduce"] = Field(
        "auto",
        description="`gather`: the server receives every client's update, and sums them in client order; "
        "`reduce`: the workers add theirs up on the way, the server holds one update whatever the cohort, "
        "and the bits depend on the number of workers; `auto`: `gather`, unless federation.reproducible is "
        "false, the method is a plain mean, and the cohort's updates would not fit into memory.",
    )
    pipeline: bool = Field(
        True,
        description="Under `gather`, where the method works module by module: take in one part of the "
        "updates while the part before is aggregated and the one before that goes out. The same bits.",
    )
    chunk_bytes: PositiveInt | None = Field(
        None,
        description="Bytes of one client's update in a part, at least the largest module's; by default "
        "512 KiB to 3 MiB by the number of clients, or the largest module.",
    )
    uplink_dtype: WireDtype = Field(
        "float32",
        description="What a client's update is sent as. Other than `float32`: the change since the "
        "broadcast, rounded; `int8`: stochastically, with one scale a LoRA direction or a row of a matrix.",
    )
    downlink_dtype: WireDtype = Field(
        "float32", description="What the global state is sent as; the server goes on from what it sent."
    )
    error_feedback: bool = Field(
        False,
        description="Add to each message what the rounding of the last one has lost. Needs a basis that "
        "lasts: `factors`, `b-only` or the whole model.",
    )
    reduce_dtype: Literal["float32", "float64"] = Field(
        "float32", description="What the workers add up in under `reduce`."
    )
    gpu_buffers: Literal["auto", "staged", "direct"] = Field(
        "auto",
        description="How updates leave a GPU. `direct`: MPI reads GPU memory (it must be CUDA-aware); "
        "`staged`: by way of page-locked memory; `auto`: `direct` where a trial transfer works.",
    )


class CheckpointConfig(Section):
    """`[checkpoint]`: what a run that was cut short goes on from."""

    every: Count = Field(1, description="Rounds between checkpoints; 0: only where a run is interrupted.")
    keep: PositiveInt = Field(2, description="How many of the latest checkpoints stay.")


class FaultsConfig(Section):
    """`[faults]`: what happens when a client or a worker fails."""

    policy: Literal["repeat", "continue", "abort"] = Field(
        "repeat",
        description="What a worker that dies means under `mpirun --with-ft ulfm`. `repeat`: the round begins "
        "again, its clients go to the other workers; `continue`: it begins again without these clients; "
        "`abort`: the run ends.",
    )

    worker_timeout_s: Positive | None = Field(
        300.0,
        description="Seconds of silence after which a process that is stopped, or on a node that hangs, ends "
        "the job, which can be resumed; needs an MPI with threads (MPI_THREAD_MULTIPLE).",
    )
    min_clients: PositiveInt = Field(
        1,
        description="Updates that must be usable for a round to change the model; with fewer the round is "
        "lost, and the global state stands.",
    )
    max_failures: PositiveInt = Field(
        3,
        description="Rounds in a row in which a client fails (it raises, runs out of memory, or its values "
        "are not finite) after which it is no longer chosen; rounds without it do not count.",
    )
    round_deadline_s: Positive | None = Field(
        None,
        description="Seconds that a worker has for its clients of a round. A client that is then in training "
        "(looked at between its steps) or still waits is left out as late. Such a run is not reproducible.",
    )
    late: Literal["drop", "next-round"] = Field(
        "drop",
        description="What becomes of the steps that a late client has taken. `drop`: nothing; `next-round`: "
        "in its next round it starts from the new global state plus the change that it had made, takes the "
        "steps that it still owes, and its update counts less.",
    )
    late_exponent: NonNegative = Field(
        0.5,
        description="Under `next-round` an update that began s rounds ago counts (1 + s)^-late_exponent "
        "times; 0: as much as any other.",
    )


Tool = Literal["none", "tensorboard", "mlflow", "wandb"]


class TrackingConfig(Section):
    """`[tracking]`: experiment trackers that the server's process tells of the run."""

    tool: Tool | list[Tool] = Field(
        "none",
        description="`tensorboard`, `mlflow`, `wandb`, or a list of them; each writes to `tracking/` in the "
        "run's folder, without a network. Needs the tool's package: see docs/trackers.md.",
    )
    project: str = Field(
        "mpifedlora", min_length=1, description="Experiment (MLflow) or project (wandb) of the run."
    )

    @property
    def tools(self) -> list[Tool]:
        """Return the trackers, each once."""
        named = self.tool if isinstance(self.tool, list) else [self.tool]
        return [tool for tool in dict.fromkeys(named) if tool != "none"]


class PrivacyConfig(Section):
    """`[privacy]`: differential privacy of the clients: clip each update, add noise to their sum."""

    clip_norm: Positive | None = Field(
        None, description="Largest norm of a client's update; a larger one is scaled down to it."
    )
    noise_multiplier: NonNegative = Field(
        0.0, description="Standard deviation of the noise on the sum, in units of clip_norm."
    )
    delta: float = Field(
        1e-5, gt=0, lt=1, description="The privacy accountant reports the epsilon of this delta."
    )
    noise_seed: Seed | None = Field(
        None, description="Fixes the noise for tests: the run is marked as not private."
    )
