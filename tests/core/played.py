"""A federation whose training is played: what `test_rounds` and its siblings hold their laws over."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import cache, cached_property, partial

import torch
from core.cases import NUM_BODY, NUM_ROUNDS, SCALING, Case, initial_body
from core.played_worker import PlayedWorker, add_products, matrices
from torch import Tensor

from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.report import RoundReport
from mpifedlora.core.rounds import Coordinator
from mpifedlora.core.server_optimizer import Moments
from mpifedlora.core.wire import ClientUpdate


@dataclass(frozen=True)
class Played:
    """One round: what went out, what came back, and what there was after it.

    Args:
        sent: the worker as it sent the updates.
        updates: as they arrived; under `reduces` as they were sent.
        report: of the round.
        coordinator: after the round.
        got: the worker after it has received what the round has made.
        message: that it has received.
    """

    case: Case
    sent: PlayedWorker
    updates: list[ClientUpdate]
    report: RoundReport
    coordinator: Coordinator
    got: PlayedWorker
    message: Tensor

    @property
    def plan(self) -> RoundPlan:
        return self.sent.plan

    @property
    def next_plan(self) -> RoundPlan:
        return self.got.plan

    @cached_property
    def before(self) -> Tensor:
        """The model that the clients started from."""
        return self.sent.model()

    @cached_property
    def held(self) -> Tensor:
        """The model that the workers hold after the round."""
        return self.got.model()

    @cached_property
    def models(self) -> dict[int, Tensor]:
        """By client of the cohort, the model that it has trained."""
        return {client_id: self.sent.model_of(client_id) for client_id in self.plan.cohort}

    @property
    def used(self) -> list[int]:
        return [update.client_id for update in self.report.participants]

    @property
    def is_cut(self) -> bool:
        return self.next_plan.lora_ranks != self.plan.lora_ranks


JUNK = 0xEE  # of a buffer that is free: as a float32, a large one

Spoil = Callable[[int, list[ClientUpdate]], list[ClientUpdate]]
Judge = Callable[[PlayedWorker, RoundPlan, Tensor], float]


def play(
    case: Case,
    spoil: Spoil = lambda round_num, updates: updates,
    judge: Judge | None = None,
    accuracy: Callable[[int], float] = lambda round_num: 0.0,
) -> list[Played]:
    """Run a whole federation.

    Args:
        case: its switches.
        spoil: may change a round's updates on their way.
        judge: gives the loss of a plan and message, from the worker before it.
        accuracy: of the model that comes in with a round.
    """
    coordinator, worker, history = case.coordinator(), PlayedWorker(case), []
    worker.read(coordinator.plan(), coordinator.wire)
    for round_num in range(1, NUM_ROUNDS + 1):
        if round_num > 1:
            coordinator.annealer.note(accuracy(round_num))
        updates = spoil(round_num, [worker.train(client_id) for client_id in worker.plan.cohort])
        sent, received = worker.twin(), coordinator.wire
        headers, rows = worker.send(updates)
        judges = None if judge is None else partial(judge, sent)
        if sent.plan.reduces:
            report = coordinator.finish_sum(headers, rows.total, judges)
        else:
            updates = coordinator.updates(headers, [rows.wire(index) for index in range(len(rows))])
            report = coordinator.finish(updates, judges)
        coordinator.spare = received.fill_(JUNK)
        worker.read(coordinator.plan(), coordinator.wire)
        after = _snapshot(coordinator)
        history.append(Played(case, sent, updates, report, after, worker.twin(), worker.message))
    return history


def _snapshot(coordinator: Coordinator) -> Coordinator:
    """A copy without what later rounds change in place."""
    after, update = copy(coordinator), copy(coordinator.flat_update)
    for name in ("state", "message", "wire"):
        setattr(after, name, getattr(after, name).clone())
    after.history = list(after.history)
    after.variate = None if after.variate is None else after.variate.clone()
    if update.moments is not None:
        update.moments = Moments(update.moments.first.clone(), update.moments.second.clone())
    after.flat_update = update
    return after


def exported_model(played: Played) -> Tensor:
    """What a run would leave behind; folded directions are in the weights of the server's own model only."""
    coordinator, worker = played.coordinator, played.got
    changed = [tensor.reshape(-1).double() for tensor in coordinator.trained.base_weights().values()]
    if worker.plan.scope == "full":
        return torch.cat(changed)
    body = torch.cat(changed) if changed else initial_body(worker.seed)
    factors, head = coordinator.trained.adapter()
    body = add_products(worker.body if played.case.folds else body, factors)
    return torch.cat([body, *(tensor.reshape(-1).double() for tensor in head)])


@cache
def federation(case: Case) -> list[Played]:
    return play(case)


# Exact arithmetic on whole models.


def distance(one: Tensor, other: Tensor) -> float:
    """How far apart two tensors are, relative to the second."""
    return float((one - other).norm() / other.norm())


def client_weights(played: Played) -> Tensor:
    """The used clients' weights, of sum 1."""
    body = played.sent.body
    weigh: Callable[[int], float] = {
        "examples": lambda client_id: 10.0 + client_id,
        "equal": lambda client_id: 1.0,
        "frobenius": lambda client_id: float((played.models[client_id][:NUM_BODY] - body).norm()),
    }[played.case.weights]
    weights = torch.tensor([weigh(client_id) for client_id in played.used], dtype=torch.float64)
    return weights / weights.sum()


def mean_model(played: Played) -> Tensor:
    """The exact mean of the used clients' whole models; without any, the model that they received."""
    if not played.used:
        return played.before
    models = torch.stack([played.models[client_id] for client_id in played.used])
    return client_weights(played) @ models


def products(played: Played, model: Tensor) -> list[Tensor]:
    """What a model adds to the base weights of its round, by module: b @ a."""
    return [matrix / SCALING for matrix in matrices(model[:NUM_BODY] - played.sent.body)]


def tail_energy(matrix: Tensor, kept_rank: int) -> float:
    """Squared distance of a matrix to its best approximation of a rank (Eckart-Young)."""
    return float(torch.linalg.svdvals(matrix)[kept_rank:].square().sum())
