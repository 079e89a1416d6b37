"""One client's local training, and the measurement of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, nn

from mpifedlora.core.batches import Indices, batch_indices
from mpifedlora.core.codec import LARGEST_VALUE
from mpifedlora.core.lateness import Carried, Progress, go_on
from mpifedlora.core.layout import copy_common
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.privacy import clip
from mpifedlora.core.seeding import numpy_generator, torch_seed
from mpifedlora.training.models import FederatedModel
from mpifedlora.training.task import Batch, EncodedExamples, Task, num_targets


@dataclass(frozen=True)
class LocalSettings:
    """How a client trains in every round; see `[training]`."""

    batch_size: int
    local_steps: int | None
    local_epochs: int | None
    optimizer: str
    weight_decay: float
    momentum: float
    grad_clip: float
    precision: str
    seed: int
    clip_norm: float | None = None
    batching: str = "shuffled"
    carried: Carried = ""
    head_rate_factor: float = 1.0
    accumulation_steps: int = 1


@dataclass(frozen=True)
class LocalResult:
    """What one client's training gave, beside the trained values.

    Args:
        num_steps: optimiser steps, with those that were taken in rounds before.
        train_loss: mean task loss.
        penalty: mean proximal penalty.
        is_finite: whether all values are.
        memory: what the client keeps for its next round, flat tensors by name.
        staleness: rounds since it began.
    """

    num_steps: int
    train_loss: float
    penalty: float
    is_finite: bool
    memory: dict[str, Tensor]
    staleness: int = 0


class DeadlinePassed(Exception):
    """A client was still training at the round's deadline.

    Args:
        num_steps: that it has taken in this round.
    """

    def __init__(self, num_steps: int = 0) -> None:
        super().__init__(f"after {num_steps} steps")
        self.num_steps = num_steps
        self.progress: Progress | None = None  # what it goes on from, where that is kept


def train_client(
    model: FederatedModel,
    task: Task,
    examples: EncodedExamples,
    settings: LocalSettings,
    plan: RoundPlan,
    client_id: int,
    values: Tensor,
    memory: Mapping[str, Tensor] = MappingProxyType({}),
    is_late: Callable[[], bool] = lambda: False,
) -> LocalResult:
    """Train one client from the model's received state, in place in its row of the uplink if it can be.

    The parameters, gradients and optimiser state are one flat tensor each: a step is one fused
    optimiser call, one norm, one addition of the proximal gradient mu * (theta - theta_received).

    Args:
        model: bound to this client's values until the next call.
        task: examples to batches, outputs to loss.
        examples: of the client, at least one.
        settings: of the run.
        plan: of the round.
        client_id: 0..num_clients-1.
        values: (row_values,) float32, overwritten with what the client returns; on the model's device it
            is trained in place.
        memory: what the client kept from its last round.
        is_late: asked before each step.

    Raises:
        DeadlinePassed: if it says so; `values` then hold nothing of use. How far the client has come goes
            with it where `settings.carried` says how to go on.
    """
    start = model.start(plan, client_id, memory)
    reference = start.to(model.device)
    shared = plan.shared_layout(model.shapes, client_id)
    fits = shared == plan.trained_layout(model.shapes, client_id)
    is_in_place = fits and values.device == model.device
    flat = values[: start.numel()].copy_(reference) if is_in_place else reference.clone()
    drift = _drift(model, plan, client_id, memory, reference) if plan.has_variates else None
    before = Progress.unpack(memory) if settings.carried else None
    if before is not None:
        trained = plan.trained_layout(model.shapes, client_id)
        flat.copy_(go_on(before, trained, start, settings.carried))
    taken = before.num_steps if before else 0
    try:
        losses, penalties = _steps(
            model, task, examples, settings, plan, client_id, flat, reference, drift, is_late, taken
        )
    except DeadlinePassed as passed:
        if settings.carried and passed.num_steps and _is_finite(flat):
            passed.progress = _progress(model, plan, client_id, before, passed.num_steps, start, flat)
        raise
    if settings.clip_norm is not None:
        _clip_update(flat, reference, settings.clip_norm)
    if not is_in_place:
        trained = plan.trained_layout(model.shapes, client_id)
        copy_common(trained, flat, shared, values[: shared.num_values])
    kept = _personal(model, plan, client_id, flat)
    if drift is not None:
        change = drift.finish(reference, flat, len(losses) * plan.learning_rate)
        values[shared.num_values :].copy_(change)
        kept["variate"] = drift.own.cpu()
    is_finite = _is_finite(values) and (is_in_place or _is_finite(flat))
    staleness = plan.round_num - before.begun if before else 0
    return LocalResult(taken + len(losses), _mean(losses), _mean(penalties), is_finite, kept, staleness)


def _is_finite(values: Tensor) -> bool:
    if not values.numel():
        return True
    low, high = torch.aminmax(values)  # in one pass, without a copy; a nan makes both nan
    return bool((low > -LARGEST_VALUE) & (high < LARGEST_VALUE))


def _progress(
    model: FederatedModel,
    plan: RoundPlan,
    client_id: int,
    before: Progress | None,
    num_steps: int,
    start: Tensor,
    flat: Tensor,
) -> Progress:
    ranks = plan.trained_layout(model.shapes, client_id).lora_ranks
    begun = before.begun if before else plan.round_num
    taken = num_steps + (before.num_steps if before else 0)
    return Progress(begun, taken, ranks, start.cpu(), flat.to("cpu", copy=True))


class Drift:
    """A client's control variate in one round: the gradient is corrected by c - c_k.

    Args:
        own: c_k, (num_values,).
        correction: c - c_k.

    References:
        SCAFFOLD, arXiv 1910.06378, algorithm 1, option II.
    """

    def __init__(self, own: Tensor, correction: Tensor) -> None:
        self.own, self.correction = own, correction

    def finish(self, reference: Tensor, flat: Tensor, distance: float) -> Tensor:
        """Set c_k to c_k - c + (x - y) / (steps * learning rate), and return its change."""
        change = (reference - flat).div_(distance).sub_(self.correction).sub_(self.own)
        self.own = self.own + change
        return change


def _drift(
    model: FederatedModel, plan: RoundPlan, client_id: int, memory: Mapping[str, Tensor], like: Tensor
) -> Drift:
    own, mean = torch.zeros_like(like), torch.zeros_like(like)  # before there are any
    if "variate" in memory:
        own = model.carried(memory["variate"], plan.state_rounds[client_id]).to(like.device)
    if model.variate.numel():
        mean = model.variate.to(like.device)
    return Drift(own, mean - own)


def _steps(
    model: FederatedModel,
    task: Task,
    examples: EncodedExamples,
    settings: LocalSettings,
    plan: RoundPlan,
    client_id: int,
    flat: Tensor,
    reference: Tensor,
    drift: Drift | None,
    is_late: Callable[[], bool],
    taken: int,
) -> tuple[list[Tensor], list[Tensor]]:
    grad = torch.zeros_like(flat)
    optimizer = _optimizer(flat, grad, model.shapes.head_values, settings, plan.learning_rate)
    model.bind(plan, flat, grad, client_id)
    model.train(True)
    torch.manual_seed(torch_seed(settings.seed, "dropout", plan.round_num, client_id))
    losses: list[Tensor] = []
    penalties: list[Tensor] = []
    for indices in islice(_batches(examples, settings, plan.round_num, client_id), taken, None):
        if is_late():
            raise DeadlinePassed(len(losses))
        grad.zero_()
        losses.append(_add_gradient(model, task, examples, indices, settings))
        if plan.mu:
            penalties.append(_add_proximal(flat, reference, grad, plan.mu))
        _clip(grad, settings.grad_clip)
        if drift is not None:
            grad.add_(drift.correction)
        optimizer.step()
    return losses, penalties


def _add_gradient(
    model: FederatedModel, task: Task, examples: EncodedExamples, indices: Indices, settings: LocalSettings
) -> Tensor:
    """Add the gradient of a batch's mean loss, computed in parts, and return the loss."""
    parts = np.array_split(indices, min(settings.accumulation_steps, len(indices)))
    batches = [task.collate(examples, part, is_training=True) for part in parts]
    total = torch.zeros((), device=model.device)
    for (inputs, targets), share in zip(batches, _shares(batches), strict=True):
        with _autocast(settings.precision, model.device):
            outputs = model(inputs)
        loss = task.loss(outputs, targets) * share
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


def _shares(batches: Sequence[Batch]) -> list[float]:
    """Return what part of the whole batch's targets each part has."""
    if len(batches) == 1:
        return [1.0]  # counting would wait for the GPU
    counts = [num_targets(targets) for _, targets in batches]
    return [count / sum(counts) for count in counts]


def _clip_update(flat: Tensor, reference: Tensor, largest_norm: float) -> None:
    flat.sub_(reference)
    clip(flat, largest_norm)
    flat.add_(reference)


def _personal(model: FederatedModel, plan: RoundPlan, client_id: int, own: Tensor) -> dict[str, Tensor]:
    if not plan.keeps_b:
        return {}
    layout = plan.personal_layout(model.shapes, client_id)
    trained = plan.trained_layout(model.shapes, client_id)
    return {"personal": copy_common(trained, own, layout, torch.empty(layout.num_values))}


def _batches(
    examples: EncodedExamples, settings: LocalSettings, round_num: int, client_id: int
) -> Iterator[Indices]:
    generator = numpy_generator(settings.seed, "batches", round_num, client_id)
    lengths = examples.lengths if settings.batching == "bucketed" else None
    return batch_indices(
        len(examples), settings.batch_size, settings.local_steps, settings.local_epochs, generator, lengths
    )


def _optimizer(
    flat: Tensor, grad: Tensor, head_values: int, settings: LocalSettings, learning_rate: float
) -> torch.optim.Optimizer:
    """Return an optimiser of flat values, the last of which are the head's."""
    sizes = [len(flat) - head_values, head_values] if settings.head_rate_factor != 1 else [len(flat)]
    groups: list[dict[str, object]] = []
    rates = (learning_rate, learning_rate * settings.head_rate_factor)
    for values, gradient, rate in zip(
        torch.split(flat, sizes), torch.split(grad, sizes), rates, strict=False
    ):
        parameter = nn.Parameter(values)
        parameter.grad = gradient
        groups.append({"params": [parameter], "lr": rate})
    decay = settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, weight_decay=decay, fused=True)
    return torch.optim.AdamW(groups, weight_decay=decay, fused=True)


def _add_proximal(flat: Tensor, reference: Tensor, grad: Tensor, mu: float) -> Tensor:
    difference = flat - reference
    grad.add_(difference, alpha=mu)
    return difference.square().sum() * (mu / 2)


def _clip(grad: Tensor, largest: float) -> None:
    if largest:
        grad.mul_((largest / (torch.linalg.vector_norm(grad) + 1e-6)).clamp_max(1))


def _mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).mean()) if values else 0.0


def _autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def predict(
    model: FederatedModel,
    task: Task,
    examples: EncodedExamples,
    batches: Iterable[Indices],
    precision: str,
) -> Tensor:
    """Measure the model as it is bound on some batches.

    Args:
        model: bound to the values to measure.
        task: what is measured.
        examples: where the batches point to.
        batches: index arrays.
        precision: `float32` or `bfloat16`.

    Returns:
        (examples, statistics) float32, in the order of the batches.
    """
    model.train(False)
    parts = [torch.empty(0, len(task.statistics))]
    with torch.inference_mode(), _autocast(precision, model.device):
        parts += [task.measure(model, *task.collate(examples, indices)) for indices in batches]
    return torch.cat(parts)
