"""A coordinator restored from a snapshot goes on as the one that it was taken of, to the last bit."""

from dataclasses import replace

import pytest
import torch
from core.cases import CASES, SHAPES, over
from core.played import federation

from mpifedlora.core.plan import ABSENT
from mpifedlora.core.planning import given_to, without_training
from mpifedlora.core.snapshot import history, model_state, restore, take

TAKEN_AFTER = 2


def assert_equal(one, other):
    assert one.next_plan == other.next_plan
    for name in ("message", "state"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    size = one.switches.wire.message_bytes(one.next_plan, SHAPES)  # up to whole units, bytes are anything
    assert torch.equal(one.wire[:size], other.wire[:size])
    assert (one.variate is None) == (other.variate is None)
    assert one.variate is None or torch.equal(one.variate, other.variate)
    for name in ("budget", "best_accuracy", "is_cutting"):
        assert getattr(one.annealer, name) == getattr(other.annealer, name), name
    assert one.failures == other.failures
    assert one.state_rounds == other.state_rounds
    assert len(one.history) == len(other.history)
    for mine, its in zip(one.history, other.history, strict=True):
        assert mine.plan == its.plan
        assert torch.equal(mine.values, its.values)


@over(CASES)
def test_restored_goes_on_alike(case):
    rounds = federation(case)
    if rounds[0].plan.reduces:
        pytest.skip("a sum has no updates to give again")
    one, two = case.coordinator(), case.coordinator()
    for index, played in enumerate(rounds):
        if index == TAKEN_AFTER:
            snapshot = take(one)
            restore(two, snapshot)
            assert_equal(one, two)
            assert torch.equal(model_state(snapshot.tensors, SHAPES), one.state)
            assert len(history(snapshot.tensors, SHAPES)) == len(one.history)
        for coordinator in (one, two) if index >= TAKEN_AFTER else (one,):
            coordinator.finish(played.updates)
        if index >= TAKEN_AFTER:
            assert_equal(one, two)


def test_what_does_not_fit_is_refused():
    case = CASES[0]
    played = federation(case)[0]
    coordinator = case.coordinator()
    coordinator.finish(played.updates)
    snapshot = take(coordinator)
    short = {**snapshot.tensors, "message": snapshot.tensors["message"][:-1]}
    with pytest.raises(ValueError, match="message must have"):
        restore(case.coordinator(), snapshot._replace(tensors=short))
    missing = {name: tensor for name, tensor in snapshot.tensors.items() if name != "message"}
    with pytest.raises(ValueError, match="message must have"):
        restore(case.coordinator(), snapshot._replace(tensors=missing))


def test_fewer_workers():
    plan = federation(CASES[0])[0].plan
    assert given_to((0, 3, ABSENT, 2, 1), [0, 2], 2) == (0, 1, ABSENT, 1, 0)
    assert given_to((0, 3, ABSENT, 2, 1), [0, 2], 2, leaves_out=True) == (ABSENT, 1, ABSENT, ABSENT, 0)
    assert without_training(plan).cohort == ()
    assert replace(without_training(plan), workers=plan.workers) == plan
