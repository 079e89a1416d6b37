"""The server's side of a run: rounds, results, and what is left behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from mpifedlora.core.agreement import Status
from mpifedlora.core.config import RunConfig
from mpifedlora.core.parts import pays
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.privacy import spent_epsilon
from mpifedlora.core.rounds import Coordinator
from mpifedlora.core.switches import Switches
from mpifedlora.errors import CheckpointError
from mpifedlora.io.checkpoints import CheckpointStore
from mpifedlora.io.output_folder import (
    CHECKPOINTS_FOLDER,
    RESULTS_FILE,
    FolderLock,
    hold_output_folder,
    prepare_output_folder,
)
from mpifedlora.io.process import available_bytes, seconds_since_start
from mpifedlora.io.results import ResultsWriter
from mpifedlora.io.results_schema import Event, RoundRow, RunInfo
from mpifedlora.io.run_file import ResolvedRun, write_run_file
from mpifedlora.runtime.announcement import first_lines
from mpifedlora.runtime.callbacks import Callback, Callbacks, Outcome, Run
from mpifedlora.runtime.checkpointing import Checkpointer, Resumption, snapshot
from mpifedlora.runtime.exporting import TrainedModel
from mpifedlora.runtime.gpu_buffers import used_gpu_buffers
from mpifedlora.runtime.interruption import EXIT_INTERRUPTED, Interruption
from mpifedlora.runtime.method import build_switches, choose_collect, expected_cohort, has_private_noise
from mpifedlora.runtime.progress import Progress
from mpifedlora.runtime.resuming import Resumable
from mpifedlora.runtime.server import Server
from mpifedlora.runtime.setup import Replica
from mpifedlora.runtime.tracking import Tracking
from mpifedlora.transport.base import ServerTransport

EXIT_OK, EXIT_NOT_SAVED = 0, 1


@dataclass(frozen=True)
class Start:
    """How a run begins and may end.

    Args:
        lock: of its folder.
        interruption: what may end it early.
        callbacks: told of the run.
        shows_progress: whether the terminal is one of them.
        resumable: results that it goes on from.
        resumption: state that it goes on from.
    """

    lock: FolderLock
    interruption: Interruption
    callbacks: Sequence[Callback] = ()
    shows_progress: bool = True
    resumable: Resumable | None = None
    resumption: Resumption | None = None


def conduct(
    out: Path,
    resolved: ResolvedRun,
    replica: Replica,
    transport: ServerTransport,
    library: str,
    statuses: Sequence[Status],
    start: Start,
) -> Outcome:
    """Run all rounds, write results while they come in, and the adapter at the end.

    A disk that refuses does not end the run: each failed write is told and tried again with the
    next round.

    Args:
        out: folder for the results.
        resolved: the configuration.
        replica: the server's copy of model and data.
        transport: to the workers.
        library: name and version of what carries the messages.
        statuses: of all processes, the server's first.
        start: what the run goes on from, who is told of it, and what may end it early.

    Returns:
        Exit code (0, 1 if something could not be saved, or 85 where the run ended early) and results.
    """
    config = resolved.config
    progress = [Progress(config.federation.num_rounds)] if start.shows_progress else []
    callbacks = Callbacks([*progress, *map(Tracking, config.tracking.tools), *start.callbacks])
    run_file = write_run_file(config)
    prepare_output_folder(out, run_file, resumes=start.resumable is not None)
    start.lock.take()
    reduces = choose_collect(config, replica.model.shapes, available_bytes()) == "reduce"
    switches = _switches(config, replica, transport, reduces=reduces)
    model = replica.model
    coordinator = Coordinator(model.shapes, switches, model.initial_state, config.federation.seed)
    collect = _describe_collect(config, coordinator, transport)
    info = _run_info(config, replica, transport, library, statuses, collect)
    rows: list[RoundRow] = []
    events: list[Event] = []
    if start.resumable is not None:
        _, rows, created, events = start.resumable
        info = replace(info, created=created)
    writer = ResultsWriter(out / RESULTS_FILE, info, rows, events)
    if rows:
        writer.note(f"resumed after round {rows[-1].round_num}")

    def warn(text: str) -> None:
        callbacks.on_warning(text)
        writer.note(text)

    server = _server(config, coordinator, replica, transport, callbacks, start, warn)
    if start.resumption is not None:
        start.resumption.restore(server)
        writer.set_baselines(server.baselines())
    lines = (*first_lines(resolved, info, model.shapes.full().num_values, out), *_resumed(rows))
    run = Run(out, config, info, writer.rows, lines, start.interruption.ask, warn)
    saver = _Saver(callbacks, partial(hold_output_folder, out, run_file, start.lock))
    checkpointer = _checkpointer(out, config, replica, coordinator)
    try:
        callbacks.on_start(run)
        saver.attempt(writer.write)
        _run_rounds(server, writer, saver, callbacks, checkpointer, config)
    except BaseException:
        writer.set_status("failed")
        saver.attempt(writer.write)
        saver.attempt(checkpointer.settle)
        with suppress(Exception):  # what has ended the run is told
            callbacks.on_end(writer.results())
        raise
    is_saved = saver.attempt(checkpointer.settle)
    is_whole = len(writer.rows) == config.federation.num_rounds
    writer.set_status("finished" if is_whole else "interrupted")
    if is_whole:
        final = TrainedModel(config, model, coordinator.trained, replica.memory)
        is_saved = saver.attempt(lambda: final.write_all(out)) and is_saved
    is_saved = saver.attempt(writer.write) and is_saved
    results = writer.results()
    callbacks.on_end(results)
    if not is_saved:
        return Outcome(EXIT_NOT_SAVED, results)
    return Outcome(EXIT_OK if is_whole else EXIT_INTERRUPTED, results)


def _resumed(rows: Sequence[RoundRow]) -> list[str]:
    return [f"resumed after round {rows[-1].round_num}"] if rows else []


def _checkpointer(out: Path, config: RunConfig, replica: Replica, coordinator: Coordinator) -> Checkpointer:
    keep = config.checkpoint.keep
    store = CheckpointStore(out / CHECKPOINTS_FOLDER, keep)
    store.remove_after(coordinator.next_plan.round_num - 1)  # damaged ones, which come anew
    return Checkpointer(store, replica.memory.store, keep, coordinator.state_rounds)


class _Saver:
    """Writes, and tells each failure once instead of ending the run.

    Args:
        callbacks: who is told.
        hold: sees to it that the run's folder is there, and says whether it had to make it again.
    """

    def __init__(self, callbacks: Callbacks, hold: Callable[[], bool]) -> None:
        self.callbacks, self.hold = callbacks, hold
        self.failures: set[str] = set()  # that were told

    def attempt(self, write: Callable[[], None]) -> bool:
        """Say whether it was written."""
        try:
            if self.hold():
                lost = (
                    "the run's folder was removed, and is made again: results hold every round, checkpoints"
                )
                self.callbacks.on_warning(f"{lost} begin anew")
            write()
        except CheckpointError as error:
            if str(error) not in self.failures:
                self.callbacks.on_warning(str(error))
            self.failures.add(str(error))
            return False
        return True


def _switches(config: RunConfig, replica: Replica, transport: ServerTransport, *, reduces: bool) -> Switches:
    sizes = replica.data.sizes
    device = str(replica.model.device)
    return build_switches(
        config, sizes, transport.num_workers, pins=replica.data.pins, reduces=reduces, device=device
    )


def _describe_collect(config: RunConfig, coordinator: Coordinator, transport: ServerTransport) -> str:
    switches, chosen = coordinator.switches, config.transport
    if not transport.can_stream:
        return "handed over"
    if switches.reduces:
        return "reduce"
    # A `full` stage before the adapter's rounds does not name the run.
    plan = replace(coordinator.next_plan, scope=switches.round_scope(switches.schedule.num_rounds))
    is_worth_it = pays(plan, coordinator.shapes, switches.wire, chosen.chunk_bytes)
    return "gather in parts" if chosen.pipeline and switches.is_local and is_worth_it else "gather"


def _server(
    config: RunConfig,
    coordinator: Coordinator,
    replica: Replica,
    transport: ServerTransport,
    callbacks: Callbacks,
    start: Start,
    warn: Callable[[str], None],
) -> Server:
    return Server(
        coordinator,
        transport,
        replica,
        evaluate_every=config.evaluation.every,
        evaluates_on_workers=config.evaluation.on == "workers",
        epsilon=partial(_epsilon, config),
        warn=warn,
        started=lambda plan: callbacks.on_round_start(plan.round_num, plan.stage, _mean_rank(plan)),
        pipeline=config.transport.pipeline,
        part_bytes=config.transport.chunk_bytes,
        reduce_dtype=config.transport.reduce_dtype,
        ends_early=start.interruption.is_due,
        keeps_states=config.checkpoint.every > 0,
        policy=config.faults.policy,
    )


def _epsilon(config: RunConfig, num_rounds: int) -> float:
    privacy = config.privacy
    if privacy.clip_norm is None:
        return math.nan
    rate = expected_cohort(config) / config.federation.num_clients
    return spent_epsilon(num_rounds, rate, privacy.noise_multiplier, privacy.delta)


def _mean_rank(plan: RoundPlan) -> float:
    return sum(plan.lora_ranks) / len(plan.lora_ranks) if plan.scope != "full" else 0.0


def _run_rounds(
    server: Server,
    writer: ResultsWriter,
    saver: _Saver,
    callbacks: Callbacks,
    checkpointer: Checkpointer,
    config: RunConfig,
) -> None:
    every, num_rounds = config.checkpoint.every, config.federation.num_rounds
    for row in server.rounds():
        writer.add(row)
        writer.set_baselines(server.baselines())
        is_cut_short = server.is_last and row.round_num < num_rounds
        is_due = every > 0 and (row.round_num % every == 0 or row.round_num == num_rounds)
        # A checkpoint counts on its rounds' rows, so it comes after them.
        if saver.attempt(writer.write) and (is_due or is_cut_short):
            taken = snapshot(server, config)
            saver.attempt(partial(checkpointer.save, row.round_num, taken))
        callbacks.on_round_end(row)


def _run_info(
    config: RunConfig,
    replica: Replica,
    transport: ServerTransport,
    library: str,
    statuses: Sequence[Status],
    collect: str,
) -> RunInfo:
    startup_s = seconds_since_start()
    return RunInfo(
        package_version=version("mpifedlora"),
        config=config.model_dump_json(),
        method=config.federation.method,
        model=config.model.name,
        dataset=config.data.source,
        num_clients=config.federation.num_clients,
        num_workers=transport.num_workers,
        seed=config.federation.seed,
        mpi_library=library,
        survives_lost_workers=transport.is_fault_tolerant,
        devices=tuple(status.device for status in statuses),
        eval_model=config.evaluation.model,
        is_private=has_private_noise(config),
        reproducible=_is_reproducible(config, statuses),
        collect=collect,
        uplink_dtype=config.transport.uplink_dtype,
        downlink_dtype=config.transport.downlink_dtype,
        gpu_buffers=used_gpu_buffers([status.device for status in statuses[1:]]),
        startup_s=math.nan if startup_s is None else startup_s,
        module_names=tuple(module.name for module in replica.model.shapes.modules),
        label_names=replica.data.dataset.label_names,
        label_table=replica.data.label_table(),
        client_names=tuple(replica.data.client_names),
        metric_names=replica.task.metric_names,
    )


def _is_reproducible(config: RunConfig, statuses: Sequence[Status]) -> bool:
    are_alike = len({status.device for status in statuses}) == 1
    return config.federation.reproducible and are_alike and not has_private_noise(config)
