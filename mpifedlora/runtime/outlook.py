"""What a run will be, before it is queued: rounds, bytes, memory, time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpifedlora.core.batches import steps_of
from mpifedlora.core.config import RunConfig
from mpifedlora.core.memory_estimate import MemoryEstimate, estimate_memory
from mpifedlora.errors import ConfigError
from mpifedlora.io.model_files import model_path, read_model_sizes
from mpifedlora.io.run_file import ResolvedRun, read_run_file
from mpifedlora.runtime import setup
from mpifedlora.runtime.building import read_shapes
from mpifedlora.runtime.data import FederatedData, read_data
from mpifedlora.runtime.method import (
    build_switches,
    check_parts,
    expected_cohort,
    has_private_noise,
)
from mpifedlora.transport.inprocess import Alone

if TYPE_CHECKING:
    from mpifedlora.core.forecast import RoundForecast
    from mpifedlora.core.layout import ModelShapes
    from mpifedlora.core.ledger import Traffic
    from mpifedlora.core.switches import Switches
    from mpifedlora.runtime.calibration import Speed

LARGEST_CALIBRATED = 200_000_000
"""Values of a base model that is loaded and run for a calibration nobody has asked for."""


@dataclass(frozen=True)
class Comparison:
    """What other methods would send in the same rounds, with as many clients, at one end of the forecast.

    Args:
        full: FedAvg of the whole model.
        fixed: LoRA at rank_max throughout.
    """

    full: Traffic
    fixed: Traffic


@dataclass(frozen=True)
class RoundTime:
    """Seconds of one round.

    Args:
        train_s: of the worker that trains longest.
        all_train_s: of all workers together.
        aggregate_s: of the server, after the last update.
        evaluate_s: of the measurement that is due with the round.
    """

    train_s: float
    all_train_s: float
    aggregate_s: float
    evaluate_s: float


@dataclass(frozen=True)
class Memory:
    """Memory of a run's processes, on CPUs and where the workers have GPUs."""

    on_cpus: MemoryEstimate
    on_gpus: MemoryEstimate


@dataclass(frozen=True)
class Outlook:
    """All that can be said of a run before it starts.

    Args:
        resolved: the configuration.
        data: and who owns it.
        shapes: of the model.
        num_workers: that share the clients out.
        rounds: in order.
        reasons: why bytes are bounds, where they are.
        low: what the lower bound compares with.
        high: what the upper bound compares with.
        memory: of a process, or None where the model's folder does not tell.
        speed: what a calibration has measured, if there was one.
    """

    resolved: ResolvedRun
    data: FederatedData
    shapes: ModelShapes
    num_workers: int
    rounds: Sequence[RoundForecast]
    reasons: Sequence[str]
    low: Comparison
    high: Comparison
    memory: Memory | None
    speed: Speed | None

    @property
    def config(self) -> RunConfig:
        """The configuration."""
        return self.resolved.config

    @property
    def is_exact(self) -> bool:
        """Whether every number of bytes is the run's own."""
        return all(one.is_exact for one in self.rounds)

    def so_far(self) -> list[Comparison]:
        """Return what the upper bound compares with after each round."""
        sizes = [len(one.high.plan.cohort) for one in self.rounds]
        return [_comparison(self.config, self.shapes, sizes[: number + 1]) for number in range(len(sizes))]

    def clients_per_worker(self) -> tuple[int, int]:
        """Return the fewest and the most clients that a worker trains in a round."""
        plans = (one.high.plan for one in self.rounds)
        counts = [len(plan.clients_of(worker)) for plan in plans for worker in range(self.num_workers)]
        return min(counts), max(counts)

    def times(self) -> list[RoundTime]:
        """Return what each round would take on workers like this machine; nothing if not calibrated."""
        return [] if self.speed is None else [self._time(one, self.speed) for one in self.rounds]

    def _time(self, one: RoundForecast, speed: Speed) -> RoundTime:
        config, plan = self.config, one.high.plan
        step_s = speed.step_s(plan.scope, sum(plan.lora_ranks) / len(plan.lora_ranks))
        loads = [0.0] * self.num_workers
        for client_id in plan.cohort:
            training, size = config.training, self.data.sizes[client_id]
            steps = steps_of(size, training.batch_size, training.local_steps, training.local_epochs)
            loads[plan.workers[client_id]] += steps * step_s
        num_rounds, every = config.federation.num_rounds, config.evaluation.every
        is_due = plan.round_num % every == 0 or plan.round_num == num_rounds
        evaluate_s = is_due * speed.evaluate_s
        return RoundTime(max(loads), sum(loads), speed.aggregate_s, evaluate_s)

    def round_s(self, *, is_shared: bool) -> list[float]:
        """Return the seconds of each round.

        Args:
            is_shared: whether all processes run on this machine's cores, else each has as many for itself.
        """
        on_server = self.config.evaluation.on == "server"
        durations = []
        for one in self.times():
            assert self.speed is not None
            share = 1 if on_server else self.num_workers
            apart = one.train_s, one.evaluate_s / share
            longest = max(apart) if on_server else sum(apart)  # the server measures while the others train
            if is_shared:
                work = self.speed.threads * (one.all_train_s + one.evaluate_s)
                longest = max(longest, work / self.speed.num_cores)
            durations.append(longest + one.aggregate_s)
        return durations


def look_ahead(
    run_file: Path,
    overrides: Sequence[str],
    num_workers: int | None = None,
    *,
    calibrates: bool | None = None,
) -> Outlook:
    """Look at a run before it starts.

    Args:
        run_file: of the run.
        overrides: `section.key=value` texts.
        num_workers: that share the clients out; by default one for each client of a round.
        calibrates: whether local steps are timed on this machine; by default where the model is small.

    Raises:
        MpiFedLoraError: as the run itself would.
    """
    setup.collect_rarely()
    setup.quiet_libraries()
    resolved = read_run_file(run_file, overrides)
    config = resolved.config
    if num_workers is not None and num_workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {num_workers}; leave it out")
    setup.check_inputs(config)
    num_workers = num_workers or expected_cohort(config)
    data = read_data(config, Alone())
    shapes = read_shapes(config, data.dataset.label_names)
    check_parts(config, shapes)
    return _look_ahead(resolved, data, shapes, num_workers, calibrates=calibrates)


def _look_ahead(
    resolved: ResolvedRun,
    data: FederatedData,
    shapes: ModelShapes,
    num_workers: int,
    *,
    calibrates: bool | None,
) -> Outlook:
    from mpifedlora.core.forecast import forecast

    config = resolved.config
    sizes = data.sizes
    hides_cohorts = config.federation.sampling == "poisson" and has_private_noise(config)
    # Where each client has a file, and all workers see all of them, the files are shared out in turn.
    pins = [client_id % num_workers for client_id in range(len(sizes))] if data.pins else []
    switches = build_switches(_everybody(config) if hides_cohorts else config, sizes, num_workers, pins=pins)
    is_late = config.faults.round_deadline_s is not None
    rounds = forecast(switches, shapes, hides_cohorts=hides_cohorts, may_leave_out=is_late)
    is_exact = all(one.is_exact for one in rounds)
    if calibrates is None:
        calibrates = shapes.full().num_values <= LARGEST_CALIBRATED
    low, high = _comparisons(config, shapes, rounds)
    return Outlook(
        resolved=resolved,
        data=data,
        shapes=shapes,
        num_workers=num_workers,
        rounds=rounds,
        reasons=[] if is_exact else _reasons(config, switches, hides_cohorts=hides_cohorts),
        low=low,
        high=high,
        memory=_memory(config, num_workers, len(data.dataset.label_names)),
        speed=_calibrate(config, data, switches, rounds, num_workers) if calibrates else None,
    )


def _everybody(config: RunConfig) -> RunConfig:
    """Return a configuration in which every client takes part in every round."""
    federation = config.federation.model_copy(update={"sampling": "fixed", "cohort_size": None})
    return config.model_copy(update={"federation": federation})


def _calibrate(
    config: RunConfig,
    data: FederatedData,
    switches: Switches,
    rounds: Sequence[RoundForecast],
    num_workers: int,
) -> Speed:
    from mpifedlora.runtime.calibration import calibrate

    return calibrate(config, data, switches, [one.high.plan for one in rounds], num_workers)


def _comparisons(
    config: RunConfig, shapes: ModelShapes, rounds: Sequence[RoundForecast]
) -> tuple[Comparison, Comparison]:
    low = [len(one.low.plan.cohort) for one in rounds]
    high = [len(one.high.plan.cohort) for one in rounds]
    return _comparison(config, shapes, low), _comparison(config, shapes, high)


def _comparison(config: RunConfig, shapes: ModelShapes, cohort_sizes: Sequence[int]) -> Comparison:
    from mpifedlora.core.ledger import baseline_traffic

    return Comparison(*baseline_traffic(shapes, config.lora.rank_max, cohort_sizes))


def _reasons(config: RunConfig, switches: Switches, *, hides_cohorts: bool) -> list[str]:
    schedule, aggregation = config.annealing.schedule, config.aggregation
    shows = switches.aggregator.folds or bool(switches.client_ranks)  # in the message, whose updates are used
    found = {
        f'annealing.schedule = "{schedule}" follows what is measured': switches.schedule.is_measured,
        'annealing.allocation = "spectral" follows the updates': switches.is_spectral,
        "who takes part comes from the system's entropy (privacy)": hides_cohorts,
        "aggregation.norm_bound may leave updates out": shows and aggregation.norm_bound is not None,
        f'aggregation.robust = "{aggregation.robust}" leaves updates out': shows
        and bool(switches.screening.krum),
        "faults.round_deadline_s may leave clients out": shows and config.faults.round_deadline_s is not None,
    }
    return [reason for reason, holds in found.items() if holds]


def _memory(config: RunConfig, num_workers: int, num_labels: int) -> Memory | None:
    sizes = read_model_sizes(model_path(config.model.name), config.lora.target_modules)
    if sizes is None:
        return None
    either = (
        estimate_memory(config, sizes, num_workers, on_gpu=on_gpu, num_labels=num_labels)
        for on_gpu in (False, True)
    )
    return Memory(*either)
