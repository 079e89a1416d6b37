"""One client's local training, and the measurement of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpifedlora.core.batches import Indices, batch_indices
from mpifedlora.core.seeding import numpy_generator, torch_seed
from mpifedlora.core.wire import RoundPlan
from mpifedlora.training.models import FederatedModel
from mpifedlora.training.tasks import ClassificationTask, EncodedExamples

# What is larger is as good as infinite: products of such values overflow float32.
LARGEST_VALUE = 1e15


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


@dataclass(frozen=True)
class LocalResult:
    """What one client's training gave, beside the trained values."""

    num_steps: int
    train_loss: float
    penalty: float
    is_finite: bool


def train_client(
    model: FederatedModel,
    task: ClassificationTask,
    examples: EncodedExamples,
    settings: LocalSettings,
    plan: RoundPlan,
    client_id: int,
    values: Tensor,
) -> LocalResult:
    """Train one client from the model's received state, in place in its row of the uplink.

    The parameters, gradients and optimiser state are one flat tensor each: a step is one fused
    optimiser call, one norm, one addition of the proximal gradient mu * (theta - theta_received).

    Args:
        model: bound to this client's values until the next call.
        task: tokens to batches, logits to loss.
        examples: of the client, at least one.
        settings: of the run.
        plan: of the round.
        client_id: 0..num_clients-1.
        values: (num_values,) float32 on the CPU, overwritten with what was trained.
    """
    reference = model.state.to(model.device)
    flat = values.copy_(reference) if model.device.type == "cpu" else reference.clone()
    grad = torch.zeros_like(flat)
    optimizer = _optimizer(flat, grad, settings, plan.learning_rate)
    model.bind(plan, flat, grad)
    model.train(True)
    torch.manual_seed(torch_seed(settings.seed, "dropout", plan.round_num, client_id))
    losses, penalties = [], []
    for indices in _batches(examples, settings, plan.round_num, client_id):
        batch, labels = task.collate(examples, indices)
        grad.zero_()
        with _autocast(settings.precision, model.device):
            logits = model(batch)
        loss = task.loss(logits, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        penalties.append(_add_proximal(flat, reference, grad, plan.mu))
        _clip(grad, settings.grad_clip)
        optimizer.step()
    if flat is not values:
        values.copy_(flat)
    is_finite = bool((flat.abs() < LARGEST_VALUE).all())
    return LocalResult(len(losses), _mean(losses), _mean(penalties), is_finite)


def _batches(
    examples: EncodedExamples, settings: LocalSettings, round_num: int, client_id: int
) -> Iterator[Indices]:
    generator = numpy_generator(settings.seed, "batches", round_num, client_id)
    yield from batch_indices(
        len(examples), settings.batch_size, settings.local_steps, settings.local_epochs, generator
    )


def _optimizer(
    flat: Tensor, grad: Tensor, settings: LocalSettings, learning_rate: float
) -> torch.optim.Optimizer:
    parameter = nn.Parameter(flat)
    parameter.grad = grad
    decay = settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            [parameter], learning_rate, momentum=settings.momentum, weight_decay=decay, fused=True
        )
    return torch.optim.AdamW([parameter], learning_rate, weight_decay=decay, fused=True)


def _add_proximal(flat: Tensor, reference: Tensor, grad: Tensor, mu: float) -> Tensor:
    if mu == 0:
        return torch.zeros((), device=flat.device)
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
    task: ClassificationTask,
    examples: EncodedExamples,
    batches: Iterable[Indices],
    plan: RoundPlan,
    precision: str,
) -> Tensor:
    """Measure the model's received state on some batches.

    Args:
        model: it has received the plan's message.
        task: tokens to batches, logits to losses.
        examples: where the batches point to.
        batches: index arrays.
        plan: of the round that the state opens.
        precision: `float32` or `bfloat16`.

    Returns:
        (examples, 2) float32: loss and predicted label, in the order of the batches.
    """
    model.bind(plan, model.state.to(model.device))
    model.train(False)
    parts = [torch.empty(0, 2)]
    with torch.inference_mode(), _autocast(precision, model.device):
        for indices in batches:
            batch, labels = task.collate(examples, indices)
            parts.append(task.predictions(model(batch), labels))
    return torch.cat(parts)
