"""The server's state between two rounds, as numbers and tensors that a checkpoint can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mpifedlora.core.history import Lasting, Trained
from mpifedlora.core.layout import ModelShapes
from mpifedlora.core.opening import Lost, prepare
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.planning import plan_round
from mpifedlora.core.rounds import Coordinator
from mpifedlora.core.server_optimizer import Moments


class Snapshot(NamedTuple):
    """A state by name: JSON values, and tensors in memory of their own."""

    numbers: dict[str, Any]
    tensors: dict[str, Tensor]


def take(coordinator: Coordinator) -> Snapshot:
    """Copy the state between two rounds; the coordinator may go on at once."""
    annealer, update = coordinator.annealer, coordinator.flat_update
    accuracy = annealer.best_accuracy
    numbers = {
        "budget": annealer.budget,
        "best_accuracy": accuracy if math.isfinite(accuracy) else None,
        "is_cutting": annealer.is_cutting,
        "state_rounds": list(coordinator.state_rounds),
        "failures": list(coordinator.failures),
    }
    tensors = {"plan": _packed(coordinator.next_plan), "message": coordinator.message}
    if not _holds_state(coordinator.shapes, coordinator.next_plan):
        tensors["state"] = coordinator.state
    if coordinator.switches.wire.downlink != "float32":
        tensors["wire"] = coordinator.wire
    if coordinator.variate is not None:
        tensors["variate"] = coordinator.variate
    if coordinator.lost is not None:
        tensors["lost"] = coordinator.lost.values
    if update.moments is not None:
        tensors |= {"moments.first": update.moments.first, "moments.second": update.moments.second}
    if update.noise is not None and update.noise.is_fixed:
        tensors["noise"] = update.noise.generator.get_state()
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    for index, (plan, values) in enumerate(coordinator.history):  # never changed in place
        copies |= {f"history.{index:05d}.plan": _packed(plan), f"history.{index:05d}.values": values}
    return Snapshot(numbers, copies)


def restore(coordinator: Coordinator, snapshot: Snapshot) -> None:
    """Make a coordinator as made for round 1 go on where a snapshot was taken.

    What the run file fixes (who trains, learning rates, ranks to come) follows the coordinator's own
    switches, so the run may have more rounds or other workers than it had.

    Args:
        coordinator: of the same model and method.
        snapshot: of `take`.

    Raises:
        ValueError: if the snapshot does not fit the model or the method.
    """
    numbers, tensors = snapshot
    annealer, update, shapes = coordinator.annealer, coordinator.flat_update, coordinator.shapes
    annealer.budget, annealer.is_cutting = int(numbers["budget"]), bool(numbers["is_cutting"])
    accuracy = numbers["best_accuracy"]
    annealer.best_accuracy = -math.inf if accuracy is None else float(accuracy)
    coordinator.state_rounds = _by_client(numbers["state_rounds"], len(coordinator.state_rounds))
    coordinator.failures = _by_client(numbers["failures"], len(coordinator.failures))
    saved = _unpacked(tensors["plan"], shapes)
    coordinator.next_plan = _planned_again(coordinator, saved)
    _restore_opening(coordinator, saved, tensors)
    coordinator.variate = tensors.get("variate")
    if "lost" in tensors:
        coordinator.lost = Lost(saved.segments(shapes).state, tensors["lost"])
    if "moments.first" in tensors:
        update.moments = Moments(tensors["moments.first"], tensors["moments.second"])
    if "noise" in tensors and update.noise is not None:
        update.noise.generator.set_state(tensors["noise"])
    coordinator.history = history(tensors, shapes)


def _by_client(values: Any, num_clients: int) -> list[int]:
    if not isinstance(values, list) or len(values) != num_clients:
        raise ValueError(f"a number for each of {num_clients} clients is needed, not {str(values)[:50]}")
    return [int(value) for value in values]


def _planned_again(coordinator: Coordinator, saved: RoundPlan) -> RoundPlan:
    by_client = coordinator.state_rounds, coordinator.failures
    plan = plan_round(
        coordinator.switches,
        coordinator.shapes,
        saved.round_num,
        saved.lora_ranks,
        saved.frozen_ranks,
        *by_client,
    )
    about_message = ("sends_base", "sends_state", "sends_parts", "mapped_ranks")
    again = replace(plan, **{name: getattr(saved, name) for name in about_message})
    if again.scope != saved.scope:
        raise ValueError(f"round {saved.round_num} must train the scope {saved.scope}, not {again.scope}")
    return again


def _restore_opening(coordinator: Coordinator, saved: RoundPlan, tensors: Mapping[str, Tensor]) -> None:
    shapes, wire = coordinator.shapes, coordinator.switches.wire
    opening = prepare(shapes, saved, wire)
    pairs: list[tuple[str, Tensor]] = [("message", opening.message)]
    if not _holds_state(shapes, saved):
        pairs.append(("state", opening.state))
    if wire.downlink != "float32":
        pairs.append(("wire", opening.wire))
    for name, target in pairs:
        if name not in tensors or tensors[name].shape != target.shape:
            raise ValueError(f"{name} must have {target.numel()} values, as the model and the method have it")
        target.copy_(tensors[name])
    _, coordinator.message, coordinator.state, coordinator.wire = opening


def history(tensors: Mapping[str, Tensor], shapes: ModelShapes) -> list[Lasting]:
    """Return what messages have brought once, from a snapshot's tensors."""
    names = sorted(name for name in tensors if name.startswith("history.") and name.endswith(".plan"))
    plans = (_unpacked(tensors[name], shapes) for name in names)
    return [
        Lasting(plan, tensors[f"{name.removesuffix('plan')}values"])
        for name, plan in zip(names, plans, strict=True)
    ]


def model_state(tensors: Mapping[str, Tensor], shapes: ModelShapes) -> Tensor:
    """Return the whole state (state values,), from a snapshot's tensors."""
    if "state" in tensors:
        return tensors["state"]
    state: Tensor = _unpacked(tensors["plan"], shapes).split(shapes, tensors["message"]).state
    return state


def trained(tensors: Mapping[str, Tensor], shapes: ModelShapes) -> Trained:
    """Return the global model that a snapshot's tensors hold."""
    plan = _unpacked(tensors["plan"], shapes)
    return Trained(shapes, plan, model_state(tensors, shapes), history(tensors, shapes))


def _holds_state(shapes: ModelShapes, plan: RoundPlan) -> bool:
    return bool(plan.segments(shapes).state == plan.layout(shapes))


def _packed(plan: RoundPlan) -> Tensor:
    return torch.from_numpy(plan.pack())


def _unpacked(packed: Tensor, shapes: ModelShapes) -> RoundPlan:
    return RoundPlan.unpack(packed.numpy(), len(shapes.modules))
