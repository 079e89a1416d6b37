"""The study's changes of the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from core.cases import SHAPES, Case
from support import build_model, make_batch, make_plan
from torch import nn
from torch.nn import functional
from variants import _cut, balanced, freeze, leading_rows, start_in_the_update

from mpifedlora.core.layout import Factors, LinearShape, ModelShapes, TensorShape
from mpifedlora.core.lowrank import INITIAL_ROW_NORM, factors_of, svd_of_product
from mpifedlora.core.rounds import Coordinator
from mpifedlora.core.screening import Contribution
from mpifedlora.core.wire import ClientUpdate
from mpifedlora.training import models
from mpifedlora.training.models import FederatedModel


def product(rank: int, seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, 7, generator=generator), torch.randn(5, rank, generator=generator))


def test_a_balanced_split_is_the_same_product_with_equal_norms() -> None:
    svd = svd_of_product(product(4, 0))
    ours, other = balanced(svd, 1, 3), factors_of(svd, 1, 3)
    torch.testing.assert_close(ours.b @ ours.a, other.b @ other.a)
    torch.testing.assert_close(ours.a.norm(dim=1), ours.b.norm(dim=0))


def test_updates_above_the_rank_are_cut_and_others_stay_as_they_are() -> None:
    factors = [product(4, 1), product(2, 2)]
    empty = torch.empty(0)
    strong, small = _cut(Contribution(None, factors, empty, empty), [3, 2])  # type: ignore[arg-type]
    assert strong.lora_rank == 3
    s = torch.linalg.svdvals(factors[0].b @ factors[0].a)
    error = torch.linalg.norm(factors[0].b @ factors[0].a - strong.b @ strong.a)
    torch.testing.assert_close(error, s[3])
    assert small is factors[1]


def test_leading_rows_are_those_of_the_change_of_each_adapted_weight() -> None:
    modules = LinearShape("first", 4, 2), LinearShape("second", 2, 3)
    body = (
        TensorShape("first.weight", (4, 2)),
        TensorShape("norm.weight", (3,)),
        TensorShape("second.weight", (2, 3)),
    )
    shapes = ModelShapes(modules, head=(TensorShape("head", (5,)),), body=body)
    before = torch.arange(17.0 + 5)
    after = before.clone()
    after[11:17] += torch.outer(torch.tensor([1.0, -2.0]), torch.tensor([0.0, 3.0, 4.0])).flatten()
    after[17:] = 99  # the head, which is not read
    rows = leading_rows(shapes, before, after)
    assert [len(one) for one in rows] == [2, 2]
    torch.testing.assert_close(rows[1][0], torch.tensor([0.0, 0.6, 0.8]), rtol=0, atol=1e-6)


def test_behind_full_rounds_server_and_clients_start_in_the_last_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Coordinator, "_advance_full", Coordinator._advance_full)
    monkeypatch.setattr(models, "initial_adapter", models.initial_adapter)
    start_in_the_update()
    coordinator = Case(initiating="full").coordinator()
    generator = torch.Generator().manual_seed(0)
    while coordinator.next_plan.scope == "full":
        before = coordinator.state.clone()
        after = before + torch.randn(before.shape, generator=generator)
        coordinator.finish([ClientUpdate(0, 1, 1, 0.0, 0.0, 0.0, True, after)])
    plan, state = coordinator.next_plan, coordinator.state
    layout = plan.layout(SHAPES)
    for factors, rows in zip(layout.factors(state), leading_rows(SHAPES, before, after), strict=True):
        expected = rows[: factors.lora_rank] * INITIAL_ROW_NORM
        torch.testing.assert_close(factors.a, expected, rtol=0, atol=1e-4)
        assert not factors.b.any()
    head = layout.whole_values(state)
    assert torch.equal(head, after[len(after) - len(head) :])
    mine = models.initial_adapter(SHAPES, plan.lora_ranks, head, coordinator.seed, plan.round_num)
    assert torch.equal(mine, state)


@pytest.mark.parametrize(("kind", "name"), [(nn.Embedding, "_embeddings."), (nn.LayerNorm, ".LayerNorm.")])
def test_what_is_frozen_has_gradients_of_zero_and_the_rest_its_own(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], name: str
) -> None:
    def gradients() -> dict[str, torch.Tensor]:
        model = build_model(tiny_model_folder)
        plan = make_plan(model, scope="full")
        layout = plan.layout(model.shapes)
        flat, grad = model.initial_state(plan), torch.zeros(layout.num_values)
        model.bind(plan, flat, grad)
        functional.cross_entropy(model(make_batch()), torch.tensor([0, 2, 1])).backward()
        return dict(zip((one.name for one in layout.whole), layout.whole_tensors(grad), strict=True))

    expected = gradients()
    monkeypatch.setattr(FederatedModel, "_enter", FederatedModel._enter)
    freeze(kind)
    found = gradients()
    frozen = {key for key in expected if name in key}
    assert frozen
    assert not any(found[key].any() for key in frozen)
    assert any(expected[key].any() for key in frozen)
    assert all(torch.equal(found[key], expected[key]) for key in expected.keys() - frozen)
