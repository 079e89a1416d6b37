"""How much memory a run takes, from its configuration and the sizes of its model alone: no torch, no MPI.

What is exchanged, trained and kept has closed forms. What a training step keeps for its backward pass is
a bound: every linear layer's input and output, four more tensors of the hidden size a layer, and the
attention scores, all in float32. Python, its libraries and a GPU's context are constants. The examples
themselves are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from mpifedlora.core.method_config import RunTables, ranks_of_clients

_FLOAT = 4
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
_MB = 10**6

LIBRARIES_BYTES = 600 * _MB
"""Resident memory of a process that has loaded torch, transformers, PEFT and MPI; see docs/reliability.md."""
CUDA_HOST_BYTES = 2_500 * _MB
"""Further host memory of a process that uses a GPU: driver, kernels, page-locked pools."""
CUDA_CONTEXT_BYTES = 600 * _MB
"""GPU memory of a process before it has allocated any: context, kernels, cuBLAS workspace."""
BASE = "base weights"
_PARTS_IN_FLIGHT, _PART_BYTES, _LEAST_IN_FLIGHT_BYTES = 2, 2**20, 2**24
_SPARE = 10
"""One part in so many is added to all but the constants: for allocators' rounding and gaps."""


class Matrix(NamedTuple):
    """A linear layer's weight (out_features, in_features)."""

    out_features: int
    in_features: int


@dataclass(frozen=True)
class ModelSizes:
    """What of a model its memory depends on.

    Args:
        base_values: all weights without the head.
        linears: the linear layers of all blocks.
        adapted: those of them that carry an adapter.
        num_layers: blocks.
        hidden_size: features of a token.
        num_heads: of attention.
        max_tokens: that the model takes, or None where it does not say.
    """

    base_values: int
    linears: tuple[Matrix, ...]
    adapted: tuple[Matrix, ...]
    num_layers: int
    hidden_size: int
    num_heads: int
    max_tokens: int | None = None

    def adapter_values(self, lora_rank: int) -> int:
        """Return the values of all A and B at a rank; a module's own is at most its smaller side.

        >>> ModelSizes(0, (), (Matrix(3, 4), Matrix(1, 9)), 1, 4, 1).adapter_values(2)  # 2 * 7 + 1 * 10
        24
        """
        return sum(min(lora_rank, *module) * sum(module) for module in self.adapted)


@dataclass(frozen=True)
class Footprint:
    """Bytes by what takes them.

    Args:
        parts: by name; what is nothing is left out.
    """

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())

    @property
    def least(self) -> int:
        """What has a closed form: all but the activations, whose bound may lie well above them."""
        return self.total - self.parts.get("activations", 0)


class MemoryEstimate(NamedTuple):
    """What a run takes at its peak.

    Args:
        server: host memory of the server.
        worker: host memory of a worker.
        gpu: of a worker's share of a GPU, or None without GPUs.
        values: trained and sent by a client in its largest round.
    """

    server: Footprint
    worker: Footprint
    gpu: Footprint | None
    values: int

    def node_bytes(self, num_workers: int, *, has_server: bool) -> int:
        """Return the host memory of a node.

        >>> MemoryEstimate(Footprint({"a": 5}), Footprint({"a": 3}), None, 0).node_bytes(2, has_server=True)
        11
        """
        return num_workers * self.worker.total + has_server * self.server.total

    def least_node_bytes(self, num_workers: int, *, has_server: bool) -> int:
        """Return what a node must have at least: no activations, and base weights that all processes share.

        Processes map the weights from one file as long as none of them changes them.
        """
        processes = num_workers * [self.worker] + has_server * [self.server]
        base = [process.parts.get(BASE, 0) for process in processes]
        return sum(process.least for process in processes) - sum(base) + max(base, default=0)


def estimate_memory(
    config: RunTables, model: ModelSizes, num_workers: int, *, on_gpu: bool, num_labels: int = 2
) -> MemoryEstimate:
    """Estimate the memory of a run's processes at their peaks.

    Args:
        config: of the run.
        model: whose base weights all processes hold.
        num_workers: that share the cohort's clients out.
        on_gpu: whether the workers train on GPUs; the server then measures on its CPU.
        num_labels: of the task.

    References:
        The attention scores of a layer, and the bound that this one lies above: Korthikanti et al., Reducing
        Activation Recomputation in Large Transformer Models, arXiv 2205.05198, section 4.1.
    """
    values = _trained_values(config, model, num_labels)
    clients = -(-_largest_cohort(config) // num_workers)
    rows = {"updates of its clients": _rows_bytes(config, values, clients)}
    base = {BASE: _base_bytes(config, model)}
    message = {"message and state": 2 * _FLOAT * values + _sent_once_bytes(config, model, values)}
    kept = {"variates and losses of rounding": _FLOAT * values * _kept_vectors(config)}
    training = {
        "update in training": _FLOAT * values * (2 if on_gpu else _is_apart(config)),
        "gradients": _FLOAT * values,
        "optimiser": _FLOAT * values * _optimizer_vectors(config),
        "activations": _activation_bytes(config, model),
    }
    if on_gpu:
        libraries = LIBRARIES_BYTES + CUDA_HOST_BYTES
        worker = _footprint(libraries, base | message | rows | kept)
        gpu = _footprint(CUDA_CONTEXT_BYTES, base | training)
    else:
        worker, gpu = _footprint(LIBRARIES_BYTES, base | message | rows | kept | training), None
    return MemoryEstimate(_server(config, model, values, base | message), worker, gpu, values)


def _server(config: RunTables, model: ModelSizes, values: int, held: Mapping[str, int]) -> Footprint:
    moments = {"none": 0, "momentum": 1}.get(config.server_optimizer.kind, 2)
    vectors = 2 * moments + config.training.control_variates  # before and after the round
    in_checkpoint = 0 if config.checkpoint.every == 0 else 2 * held["message and state"]
    if _changes_base(config) and config.checkpoint.every:
        in_checkpoint += 2 * _FLOAT * model.base_values
    return _footprint(
        LIBRARIES_BYTES,
        {
            **held,
            "next message": _FLOAT * values,
            "updates of the cohort": _collected_bytes(config, values),
            "optimiser": _FLOAT * values * vectors,
            "checkpoint while it is written": in_checkpoint,
            "activations": _forward_bytes(config, model),
        },
    )


def _footprint(constant: int, parts: Mapping[str, int]) -> Footprint:
    own = {name: size - -size // _SPARE for name, size in parts.items() if size}
    return Footprint({"libraries": constant, **own})


def _trains_full(config: RunTables) -> bool:
    initiating = config.initiating
    return config.training.scope == "full" or (initiating.rounds > 0 and initiating.scope == "full")


def _changes_base(config: RunTables) -> bool:
    return _trains_full(config) or config.aggregation.kind in ("stack", "residual")


def _trained_values(config: RunTables, model: ModelSizes, num_labels: int) -> int:
    head = num_labels * (model.hidden_size + 1)
    if _trains_full(config):
        return model.base_values + head
    return model.adapter_values(max(ranks_of_clients(config))) + head


def _largest_cohort(config: RunTables) -> int:
    federation = config.federation
    is_drawn = federation.cohort_size is not None and federation.sampling == "fixed"
    return federation.cohort_size or 1 if is_drawn else federation.num_clients


def _base_bytes(config: RunTables, model: ModelSizes) -> int:
    held = model.base_values * _DTYPE_BYTES[config.model.dtype]
    has_cast = config.training.precision == "bfloat16" and config.model.dtype == "float32"
    return held + has_cast * held // 2  # autocast keeps the weights that it has cast until the step ends


def _sent_once_bytes(config: RunTables, model: ModelSizes, values: int) -> int:
    """Bytes of what one message may bring beside the state: base weights, or what is added to them."""
    if _trains_full(config):
        return 0  # then the state is the base weights
    if config.aggregation.kind in ("stack", "residual"):
        dense = sum(one.out_features * one.in_features for one in model.adapted)
        return _FLOAT * min(dense, values * _largest_cohort(config))
    return _FLOAT * values * (config.annealing.cut == "freeze")


def _rows_bytes(config: RunTables, values: int, num_clients: int) -> int:
    transport = config.transport
    size = values * _DTYPE_BYTES[transport.uplink_dtype] * (1 + config.training.control_variates)
    if transport.collect == "reduce":
        return size + values * _DTYPE_BYTES[transport.reduce_dtype]
    return size * num_clients


def _collected_bytes(config: RunTables, values: int) -> int:
    cohort, whole = _largest_cohort(config), _rows_bytes(config, values, _largest_cohort(config))
    if config.transport.collect == "reduce":
        return whole
    if _comes_in_parts(config):
        part = max(config.transport.chunk_bytes or 0, _PART_BYTES)
        return min(whole, max(_LEAST_IN_FLIGHT_BYTES, cohort * _PARTS_IN_FLIGHT * part))
    # Whole rows, and once more what is made of them: decoded values, or the factors of the exact sum.
    return whole + cohort * _FLOAT * values


def _comes_in_parts(config: RunTables) -> bool:
    aggregation, annealing, rank_max = config.aggregation, config.annealing, config.lora.rank_max
    is_plain = aggregation.robust in ("none", "median", "trimmed-mean") and aggregation.norm_bound is None
    is_local = annealing.allocation == "uniform" and annealing.schedule != "metropolis"
    return (
        (config.transport.pipeline and is_plain and is_local and set(ranks_of_clients(config)) == {rank_max})
        and (aggregation.kind in ("product", "factors", "zero-pad") and aggregation.weights != "frobenius")
        and not (config.training.control_variates or config.privacy.clip_norm is not None)
    )


def _kept_vectors(config: RunTables) -> int:
    return 4 * config.training.control_variates + config.transport.error_feedback


def _is_apart(config: RunTables) -> bool:
    """Say whether a client on a CPU trains elsewhere than in the row that is sent."""
    is_rounded = config.transport.uplink_dtype != "float32"
    return is_rounded or config.training.control_variates or config.training.personal != "none"


def _optimizer_vectors(config: RunTables) -> int:
    training = config.training
    return 2 if training.optimizer == "adamw" else int(training.momentum > 0)


def _tokens(config: RunTables, model: ModelSizes) -> int:
    return min(config.data.max_length, model.max_tokens or config.data.max_length)


def _layer_bytes(model: ModelSizes, batch_size: int, tokens: int, num_linear: int) -> int:
    linear = num_linear + 4 * model.hidden_size * max(1, model.num_layers)
    scores = 2 * model.num_heads * tokens * max(1, model.num_layers)  # after softmax, and after dropout
    return _FLOAT * batch_size * tokens * (linear + scores)


def _activation_bytes(config: RunTables, model: ModelSizes) -> int:
    num_linear = sum(sum(one) for one in model.linears)
    lora_rank, has_dropout = config.lora.rank_max, config.lora.dropout > 0
    num_lora = sum(lora_rank + has_dropout * 2 * one.in_features for one in model.adapted)
    tokens = _tokens(config, model)
    kept = _layer_bytes(model, config.training.batch_size, tokens, num_linear + num_lora)
    return max(kept, _forward_bytes(config, model))


def _forward_bytes(config: RunTables, model: ModelSizes) -> int:
    """Bytes of the forward pass of one evaluation batch: those of a layer at a time."""
    num_linear = sum(sum(one) for one in model.linears)
    whole = _layer_bytes(model, config.evaluation.batch_size, _tokens(config, model), num_linear)
    return -(-whole // max(1, model.num_layers))
