"""The server: it plans rounds, takes the updates in, and measures while the workers train."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from mpifedlora.core.buffers import value_buffer
from mpifedlora.core.ledger import Ledger, Traffic, baseline_traffic, count_uplink
from mpifedlora.core.metrics import Measured, Metrics
from mpifedlora.core.parts import pays
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.planning import given_to, shrink, without_training
from mpifedlora.core.report import RoundReport
from mpifedlora.core.rounds import Coordinator
from mpifedlora.core.screening import USED
from mpifedlora.core.wire import POSTPONED, UpdateHeader
from mpifedlora.errors import RunLost, WorkerLost
from mpifedlora.io.results_schema import Baselines, RoundRow
from mpifedlora.runtime.round_warnings import round_warnings
from mpifedlora.runtime.rows import columns_by_client, measured, seconds_of_row
from mpifedlora.runtime.setup import Replica
from mpifedlora.runtime.stopwatch import Stopwatch
from mpifedlora.transport.base import ServerTransport, Takes

T = TypeVar("T")


class Server:
    """Drives the rounds of one federation.

    Args:
        coordinator: the protocol and the global state.
        transport: to the workers.
        replica: this process's copy of model and data, for measuring.
        evaluate_every: rounds; the last round is always measured.
        evaluates_on_workers: whether the workers measure before they train.
        epsilon: privacy spent after so many rounds.
        warn: where a line that wants attention goes.
        started: told of each round when its plan has gone out.
        pipeline: whether rounds are finished in parts where the method allows it.
        part_bytes: see `core.parts.parts_of`.
        reduce_dtype: what updates are added up in, where the method reduces.
        ends_early: whether the round in hand is to be the last of this job; asked once a round.
        keeps_states: whether checkpoints may still need older states of clients.
        policy: what a lost worker means: `repeat` the round, `continue` it without its clients, `abort`.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        transport: ServerTransport,
        replica: Replica,
        *,
        evaluate_every: int,
        evaluates_on_workers: bool,
        epsilon: Callable[[int], float],
        warn: Callable[[str], None],
        started: Callable[[RoundPlan], None],
        pipeline: bool = True,
        part_bytes: int | None = None,
        reduce_dtype: str = "float32",
        ends_early: Callable[[], bool] = lambda: False,
        keeps_states: bool = False,
        policy: str = "repeat",
    ) -> None:
        self.coordinator = coordinator
        self.transport = transport
        self.model, self.evaluation = replica.model, replica.evaluation
        self.held_out, self.store = replica.held_out, replica.memory.store
        self.evaluate_every = evaluate_every
        self.epsilon = epsilon
        self.evaluates_on_workers = evaluates_on_workers
        num_clients = len(coordinator.next_plan.workers)
        self.ledger = Ledger(num_clients, coordinator.switches.wire.downlink)
        self.past: list[Tensor] = []  # packed plans of all finished rounds
        self.cohort_sizes: list[int] = []
        self.sent = Traffic(0, 0)
        self.pipelines, self.part_bytes = pipeline and transport.can_stream, part_bytes
        self.reduce_dtype = reduce_dtype
        self._announced: RoundPlan | None = None  # what a stream has told the workers
        self.warn, self.started = warn, started
        self.ends_early, self.keeps_states, self.policy = ends_early, keeps_states, policy
        self.is_last = False  # whether the last round of this job is closed
        self._crossed = 0
        self._round_ended = time.perf_counter()

    def count(self, plans: Sequence[RoundPlan]) -> tuple[Traffic, Traffic]:
        """Count what finished rounds have sent; return the last one's uplink and downlink."""
        shapes, last = self.coordinator.shapes, (Traffic(0, 0), Traffic(0, 0))
        for plan in plans:
            uplink = count_uplink(plan, shapes, self.coordinator.switches.wire.uplink)
            last = uplink, self.ledger.count_downlink(plan, shapes)
            self.past.append(torch.from_numpy(plan.pack()))
            self.cohort_sizes.append(len(plan.cohort))
            self.sent += last[0] + last[1]
        return last

    def rounds(self) -> Iterator[RoundRow]:
        """Run the rounds that are left, and give each one's row as soon as its due evaluation is in.

        The row of a round that is measured comes while the workers already train the next one. Whenever a
        row is given, the coordinator stands where that round has ended.
        """
        waiting: RoundRow | None = None
        watch = Stopwatch()
        while not self.is_last and self.coordinator.next_plan.round_num <= self._num_rounds:
            plan = self.coordinator.plan(evaluates=waiting is not None and self.evaluates_on_workers)
            try:
                found = self._open(plan, watch, is_measured=waiting is not None)
                if waiting is not None and found is not None:
                    yield measured(waiting, found, watch.seconds["evaluate_s"])
                    waiting = None
                row = self._close(plan, watch)
            except WorkerLost as loss:
                self._go_on_without(loss)
                continue
            waiting = row if self._is_due(plan.round_num) else None
            if waiting is None:
                yield row
        if waiting is not None:
            yield self._measured_last(waiting, watch)
        else:
            self._surviving(self._stop)

    def _stop(self) -> None:
        self._broadcast(self.coordinator.next_plan.stopped(), self.coordinator.wire[:0])

    def _go_on_without(self, loss: WorkerLost) -> None:
        """Leave a lost worker behind: the round in hand is sent again, from its beginning."""
        if self.policy == "abort":
            raise RunLost(f'{loss}, and faults.policy = "abort"; resume it with --resume') from loss
        lost, coordinator = self.transport.repair(), self.coordinator
        self.evaluation.lose(lost, self.transport.num_workers)
        left, plan, self._announced = self.transport.num_workers, coordinator.next_plan, None
        self.is_last = False  # the round in hand is not closed
        coordinator.switches = shrink(coordinator.switches, lost, left)
        workers = given_to(plan.workers, lost, left, leaves_out=self.policy == "continue")
        coordinator.next_plan = replace(plan, workers=workers)
        self.warn(f"round {plan.round_num}: {loss}; the round begins again with {left} workers")

    def _surviving(self, step: Callable[[], T]) -> T:
        """Do a step again until no worker dies in it."""
        while True:
            try:
                return step()
            except WorkerLost as loss:
                self._go_on_without(loss)

    @property
    def _num_rounds(self) -> int:
        return self.coordinator.switches.schedule.num_rounds

    def _is_due(self, round_num: int) -> bool:
        return round_num % self.evaluate_every == 0 or round_num == self._num_rounds

    def _open(self, plan: RoundPlan, watch: Stopwatch, *, is_measured: bool) -> Measured | None:
        message = self.coordinator.message
        self._broadcast(plan, self.coordinator.wire)
        watch.lap("broadcast_s")
        self.started(plan)
        self.model.receive(plan, message)
        found = self._measure(plan) if is_measured else None
        if plan.round_num > 1 and self.coordinator.annealer.follows_accuracy:
            self.coordinator.annealer.note(self._held_out(plan).accuracy)
        watch.lap("evaluate_s")
        return found

    def _broadcast(self, plan: RoundPlan, wire: Tensor) -> None:
        if self._announced is None:
            self.transport.broadcast(plan, wire, takes=self._takes(plan))
        self._announced = None

    def _held_out(self, plan: RoundPlan) -> Metrics:
        return self.held_out.metrics([self.held_out.predictions(self.model, plan)])

    def _judge(self, plan: RoundPlan, message: Tensor) -> float:
        self.model.receive(plan, message)
        return self._held_out(plan).loss

    def _measure(self, plan: RoundPlan) -> Measured:
        evaluation, transport = self.evaluation, self.transport
        if not self.evaluates_on_workers:
            return evaluation.measured([evaluation.predictions(self.model, plan)])
        counts = evaluation.counts(transport.num_workers)
        return evaluation.measured(transport.collect_predictions(counts, evaluation.width, evaluation.dtype))

    def _close(self, plan: RoundPlan, watch: Stopwatch) -> RoundRow:
        self.is_last = plan.round_num == self._num_rounds
        if plan.cohort and self._takes_parts(plan):
            self.coordinator.foresee(self.part_bytes, **self._following(plan))
        headers = self.transport.collect_headers(plan)
        self.is_last = self.is_last or self.ends_early()
        watch.lap("wait_s")
        received = self.coordinator.wire
        report, aggregate_s = self._finish(plan, headers)
        self.coordinator.spare = received  # what was sent is trained on: its buffer is free
        watch.seconds["aggregate_s"] = aggregate_s
        watch.seconds["collect_s"] = watch.lap("finish_s") - aggregate_s
        uplink, downlink = self.count([plan])
        for line in round_warnings(plan, report, self.coordinator.failures, self.coordinator.switches):
            self.warn(line)
        if plan.state_rounds:
            self._remove_states(plan, report)
        train_s = np.zeros(self.transport.num_workers)
        for header in headers:
            train_s[plan.workers[header.client_id]] += header.train_s
        seconds = {**watch.seconds, "train_s": float(train_s.max()), "round_s": self._round_s()}
        return self._row(plan, report, (uplink.bytes, downlink.bytes), seconds)

    def _remove_states(self, plan: RoundPlan, report: RoundReport) -> None:
        for client_id, outcome in report.outcomes.items():
            if outcome not in (USED, POSTPONED):
                self.store.remove(client_id, plan.round_num)
            elif not self.keeps_states:
                self.store.remove_before(client_id, plan.round_num)

    def _finish(self, plan: RoundPlan, headers: Sequence[UpdateHeader]) -> tuple[RoundReport, float]:
        """Take in what the workers have trained; return also the seconds of aggregation."""
        coordinator = self.coordinator
        judge = self._judge if coordinator.annealer.needs_judge else None
        if headers and plan.reduces:
            total = value_buffer(plan.shared_layout(coordinator.shapes).num_values, self.reduce_dtype)
            self.transport.collect_sum(total)
            return _timed(lambda: coordinator.finish_sum(headers, total, judge))
        # A stream would announce a cohort to workers that are to measure and end.
        measures_and_ends = self.is_last and self.evaluates_on_workers and plan.round_num < self._num_rounds
        if headers and self._takes_parts(plan) and not measures_and_ends:
            return self._stream(plan, headers)
        updates = coordinator.updates(headers, self.transport.collect_rows(plan) if headers else [])
        return _timed(lambda: coordinator.finish(updates, judge))

    def _takes_parts(self, plan: RoundPlan) -> bool:
        """Say whether a round's rows may be taken in by parts."""
        coordinator = self.coordinator
        is_worth_it = pays(plan, coordinator.shapes, coordinator.switches.wire, self.part_bytes)
        return self.pipelines and coordinator.streams(plan) and is_worth_it

    def _takes(self, plan: RoundPlan) -> Takes:
        if plan.reduces:
            return ""
        return "parts" if self._takes_parts(plan) else "rows"

    def _following(self, plan: RoundPlan) -> dict[str, bool]:
        """Say what the workers do after a round, as `Coordinator.stream` is told."""
        evaluates = self._is_due(plan.round_num) and self.evaluates_on_workers
        return {"evaluates": evaluates, "stops": self.is_last and not evaluates}

    def _stream(self, plan: RoundPlan, headers: Sequence[UpdateHeader]) -> tuple[RoundReport, float]:
        aggregate_s = 0.0
        while True:
            stream = self.coordinator.stream(headers, self.part_bytes, **self._following(plan))
            aggregate_s += self.transport.stream(plan, stream, takes=self._takes(stream.announced))
            if not stream.refused:
                self._announced = stream.announced
                return self.coordinator.commit(stream), aggregate_s
            # A row that its header calls finite and is not: the others go on without it.
            left_out = stream.refused
            headers = [
                replace(each, is_finite=each.is_finite and each.client_id not in left_out) for each in headers
            ]

    def _row(
        self, plan: RoundPlan, report: RoundReport, num_bytes: tuple[int, int], seconds: dict[str, float]
    ) -> RoundRow:
        module_ranks = plan.lora_ranks if plan.scope != "full" else (0,) * len(plan.lora_ranks)
        return RoundRow(
            round_num=plan.round_num,
            stage=plan.stage,
            temperature=plan.temperature,
            lora_rank_mean=float(np.mean(module_ranks)),
            module_ranks=module_ranks,
            uplink_bytes=num_bytes[0],
            downlink_bytes=num_bytes[1],
            mpi_bytes=self._newly_crossed(),
            train_loss=report.train_loss,
            penalty=report.penalty,
            aggregation_error=report.aggregation_error,
            dropped_energy=report.dropped_energy,
            num_participants=len(report.participants),
            epsilon=self.epsilon(plan.round_num),
            **seconds_of_row(seconds),
            **columns_by_client(report, len(plan.workers)),
            eval_metrics=(math.nan,) * len(self.evaluation.task.metric_names),
        )

    def _round_s(self) -> float:
        before, self._round_ended = self._round_ended, time.perf_counter()
        return self._round_ended - before

    def _newly_crossed(self) -> int:
        before, self._crossed = self._crossed, self.transport.bytes_crossed
        return self._crossed - before

    def _measured_last(self, row: RoundRow, watch: Stopwatch) -> RoundRow:
        found = self._surviving(self._measure_again)
        self._surviving(self._stop)
        crossed = row.mpi_bytes + self._newly_crossed()
        return measured(replace(row, mpi_bytes=crossed), found, watch.lap("evaluate_s"))

    def _measure_again(self) -> Measured:
        # Whoever is to train then waits for a resumed run.
        plan = without_training(self.coordinator.plan(evaluates=self.evaluates_on_workers))
        if self.evaluates_on_workers:
            self._broadcast(plan, self.coordinator.wire)
        self.model.receive(plan, self.coordinator.message)
        return self._measure(plan)

    def baselines(self) -> Baselines:
        """Compare what was sent so far with FedAvg and fixed-rank LoRA on the same rounds and cohorts."""
        rank_max = self.coordinator.switches.schedule.rank_max
        full, fixed = baseline_traffic(self.coordinator.shapes, rank_max, self.cohort_sizes)
        return Baselines(
            sent_bytes=self.sent.bytes,
            full_model_bytes=full.bytes,
            fixed_rank_bytes=fixed.bytes,
            sent_values=self.sent.values,
            full_model_values=full.values,
            fixed_rank_values=fixed.values,
        )


def _timed(finish: Callable[[], RoundReport]) -> tuple[RoundReport, float]:
    started = time.perf_counter()
    return finish(), time.perf_counter() - started
