"""From a checked configuration to the switches of its method."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mpifedlora.core.batches import steps_of
from mpifedlora.core.cohort import assign_clients, choose_cohort, draw_poisson_cohort
from mpifedlora.core.combinations import check_reducible
from mpifedlora.core.config import RunConfig
from mpifedlora.core.method_config import ranks_of_clients
from mpifedlora.core.schedule import RankSchedule, learning_rate_factor, proximal_weight, warmup_factor
from mpifedlora.core.seeding import numpy_generator
from mpifedlora.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from mpifedlora.core.annealer import Guidance
    from mpifedlora.core.lateness import Carried
    from mpifedlora.core.layout import ModelShapes
    from mpifedlora.core.robust import Combiner
    from mpifedlora.core.screening import Screening
    from mpifedlora.core.server_optimizer import ServerOptimizer
    from mpifedlora.core.server_update import GaussianNoise
    from mpifedlora.core.switches import Switches
    from mpifedlora.core.wire import WireFormat


def build_switches(
    config: RunConfig,
    sizes: Sequence[int],
    num_workers: int,
    *,
    pins: Sequence[int] = (),
    reduces: bool = False,
    device: str = "cpu",
) -> Switches:
    """Turn a configuration into the switches of its method.

    Args:
        config: of the run.
        sizes: training examples of each client.
        num_workers: processes that train.
        pins: the worker that trains each client; empty where any worker may.
        reduces: whether the workers add up their clients' updates.
        device: where the server decomposes sums.
    """
    from mpifedlora.core.aggregation import AGGREGATORS
    from mpifedlora.core.switches import Switches

    training, initiating, annealing = config.training, config.initiating, config.annealing
    return Switches(
        schedule=rank_schedule(config),
        learning_rate=partial(_learning_rate, config),
        rate_exponent=annealing.rate_exponent,
        choose_workers=partial(_choose_workers, config, sizes, num_workers, pins),
        max_failures=config.faults.max_failures,
        initiating_scope=initiating.scope,
        scope=training.scope,
        keeps_b=training.personal != "none",
        keeps_head=training.personal == "b-and-head",
        has_variates=training.control_variates,
        num_eligible=max(1, sum(size > 0 for size in sizes)),
        client_ranks=_client_ranks(config),
        aggregator=AGGREGATORS[config.aggregation.kind],
        weights=config.aggregation.weights,
        combiner=_combiner(config),
        optimizer=_server_optimizer(config),
        noise=_noise(config),
        screening=_screening(config),
        freezes=annealing.cut == "freeze",
        is_spectral=annealing.allocation == "spectral",
        guidance=_guidance(config),
        mu=partial(_mu, config),
        wire=wire_format(config),
        late_exponent=config.faults.late_exponent if config.faults.late == "next-round" else None,
        reduces=reduces,
        device=device,
    )


def wire_format(config: RunConfig) -> WireFormat:
    """Return what messages and updates are sent as."""
    from mpifedlora.core.wire import WireFormat

    transport = config.transport
    return WireFormat(
        transport.uplink_dtype, transport.downlink_dtype, transport.error_feedback, config.federation.seed
    )


def check_parts(config: RunConfig, shapes: ModelShapes) -> None:
    """Check that a part of an update can hold the largest module.

    Raises:
        ConfigError: if transport.chunk_bytes is smaller.
    """
    from mpifedlora.core.codec import piece_bytes

    layout = shapes.adapter(uniform_ranks(config, shapes))
    sizes = piece_bytes(config.transport.uplink_dtype, layout)[: len(shapes.modules)]
    chunk_bytes, largest = config.transport.chunk_bytes, max(sizes)
    if config.training.scope != "full" and chunk_bytes is not None and chunk_bytes < largest:
        name = shapes.modules[sizes.index(largest)].name
        raise ConfigError(
            f"transport.chunk_bytes must hold the largest module's A and B, {largest} bytes ({name}), got "
            f"{chunk_bytes}; raise it, or leave it out"
        )


def choose_collect(config: RunConfig, shapes: ModelShapes, available_bytes: int | None) -> str:
    """Return how updates are collected, `gather` or `reduce`.

    `auto` never leaves what is reproducible; else it reduces where the cohort's updates would take more
    than half of the server's memory, and the method allows it.

    Args:
        config: of the run.
        shapes: of the model.
        available_bytes: of memory, or None where that is not known.
    """
    if config.transport.collect != "auto":
        return config.transport.collect
    try:
        check_reducible(config)
    except ValueError:
        return "gather"
    layout = shapes.adapter(uniform_ranks(config, shapes))
    if config.training.scope == "full" or (config.initiating.rounds and config.initiating.scope == "full"):
        layout = shapes.full()
    needed = expected_cohort(config) * 4 * layout.num_values
    return "reduce" if available_bytes is not None and needed > available_bytes / 2 else "gather"


def uniform_ranks(config: RunConfig, shapes: ModelShapes) -> tuple[int, ...]:
    """Return each module's rank before any cut."""
    from mpifedlora.core.allocation import uniform

    return uniform(config.lora.rank_max, shapes.modules)


def rank_schedule(config: RunConfig) -> RankSchedule:
    """Return the schedule of stages and rank budgets."""
    annealing = config.annealing
    return RankSchedule(
        kind=annealing.schedule,
        num_rounds=config.federation.num_rounds,
        initiating_rounds=config.initiating.rounds,
        heating_rounds=annealing.heating_rounds,
        cooling_rounds=annealing.cooling_rounds,
        rank_max=config.lora.rank_max,
        rank_min=config.lora.rank_min,
        exponential_end=annealing.exponential_end,
        num_steps=annealing.num_steps,
    )


def expected_cohort(config: RunConfig) -> int:
    """Return how many clients take part in a round, on average under Poisson sampling."""
    return config.federation.cohort_size or config.federation.num_clients


def has_private_noise(config: RunConfig) -> bool:
    """Say whether noise that nobody can take away protects the clients."""
    return config.privacy.noise_multiplier > 0 and config.privacy.noise_seed is None


def client_keeps_state(config: RunConfig) -> bool:
    """Say whether clients keep something between rounds."""
    training, transport = config.training, config.transport
    keeps_losses = transport.error_feedback and transport.uplink_dtype != "float32"
    keeps_progress = config.faults.late == "next-round"
    return training.personal != "none" or training.control_variates or keeps_losses or keeps_progress


def carried_progress(config: RunConfig) -> Carried:
    """Return how the change that a late client has made is taken into its next round."""
    if config.faults.late == "drop":
        return ""
    has_new_basis = config.aggregation.kind in ("product", "stack") and config.training.scope == "adapter"
    return "products" if has_new_basis else "values"


def _learning_rate(config: RunConfig, round_num: int, scope: str) -> float:
    training = config.training
    rate = training.full_learning_rate if scope == "full" else training.learning_rate
    kind, num_rounds = training.learning_rate_schedule, config.federation.num_rounds
    return rate * learning_rate_factor(kind, round_num, num_rounds) * _warmup(config, round_num)


def _warmup(config: RunConfig, round_num: int) -> float:
    since = round_num - config.rounds_before_scope
    return warmup_factor(config.training.warmup_rounds, since) if since > 0 else 1.0


def _mu(config: RunConfig, round_num: int) -> float:
    initiating = config.initiating
    if round_num > initiating.rounds:
        return config.training.mu
    return proximal_weight(initiating.mu, initiating.mu_schedule, round_num, initiating.rounds)


def _client_ranks(config: RunConfig) -> tuple[int, ...]:
    ranks = ranks_of_clients(config)
    return () if set(ranks) == {config.lora.rank_max} else ranks


def _combiner(config: RunConfig) -> Combiner:
    from mpifedlora.core.aggregation import weighted_mean
    from mpifedlora.core.robust import coordinate_median, trimmed_mean

    if config.aggregation.robust == "median":
        return coordinate_median
    if config.aggregation.robust == "trimmed-mean":
        return trimmed_mean(config.aggregation.num_byzantine)
    return weighted_mean


def _server_optimizer(config: RunConfig) -> ServerOptimizer | None:
    from mpifedlora.core.server_optimizer import ServerOptimizer

    chosen = config.server_optimizer
    if chosen.kind == "none":
        return None
    default = 1.0 if chosen.kind == "momentum" else 1e-2
    rate = chosen.learning_rate or default
    return ServerOptimizer(chosen.kind, rate, chosen.beta1, chosen.beta2, chosen.tau)


def _noise(config: RunConfig) -> GaussianNoise | None:
    import torch

    from mpifedlora.core.server_update import GaussianNoise

    privacy = config.privacy
    if privacy.clip_norm is None:
        return None
    seed = secrets.randbits(63) if privacy.noise_seed is None else privacy.noise_seed
    generator = torch.Generator().manual_seed(seed)
    is_fixed = privacy.noise_seed is not None
    return GaussianNoise(
        privacy.clip_norm, privacy.noise_multiplier, expected_cohort(config), generator, is_fixed
    )


def _screening(config: RunConfig) -> Screening:
    from mpifedlora.core.screening import Screening

    aggregation = config.aggregation
    kind = aggregation.robust if aggregation.robust in ("krum", "multi-krum") else ""
    needed = 2 * aggregation.num_byzantine + 1 if aggregation.robust == "trimmed-mean" else 1
    least = max(needed, config.faults.min_clients)
    return Screening(aggregation.norm_bound, kind, aggregation.num_byzantine, least)


def _guidance(config: RunConfig) -> Guidance:
    from mpifedlora.core.annealer import Guidance

    annealing = config.annealing
    return Guidance(annealing.cut_step, annealing.tolerance, annealing.metropolis_temperature)


def _choose_workers(
    config: RunConfig,
    sizes: Sequence[int],
    num_workers: int,
    pins: Sequence[int],
    round_num: int,
    set_aside: Sequence[int],
) -> tuple[int, ...]:
    training = config.training
    eligible = [client_id for client_id, size in enumerate(sizes) if size and client_id not in set_aside]
    if set_aside and not eligible:
        raise TrainingError(
            f"round {round_num} needs a client that can train, got all set aside after "
            f"{config.faults.max_failures} failures in a row; see the workers' lines on standard error, or "
            "lower training.learning_rate where values were not finite"
        )
    cohort = _choose_cohort(config, eligible, round_num)
    load = {
        client_id: training.batch_size
        * steps_of(sizes[client_id], training.batch_size, training.local_steps, training.local_epochs)
        for client_id in cohort
    }
    workers = dict(enumerate(pins)) if pins else assign_clients(cohort, load, num_workers)
    chosen = {client_id: workers[client_id] for client_id in cohort}
    return tuple(chosen.get(client_id, -1) for client_id in range(len(sizes)))


def _choose_cohort(config: RunConfig, eligible: Sequence[int], round_num: int) -> tuple[int, ...]:
    federation = config.federation
    if federation.sampling == "fixed":
        return choose_cohort(eligible, federation.cohort_size, federation.seed, round_num)
    probability = expected_cohort(config) / federation.num_clients
    # Sampling amplifies privacy only as long as nobody can tell who took part.
    generator = (
        np.random.default_rng(secrets.randbits(128))
        if has_private_noise(config)
        else numpy_generator(federation.seed, "cohort", round_num)
    )
    return draw_poisson_cohort(eligible, probability, generator)
