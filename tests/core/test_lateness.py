import pytest
import torch

from mpifedlora.core.aggregation import AGGREGATORS
from mpifedlora.core.lateness import Progress, go_on, staleness_weight, without_progress
from mpifedlora.core.layout import AdapterLayout, LinearShape, ModelShapes, TensorShape
from mpifedlora.core.rounds import Coordinator
from mpifedlora.core.schedule import RankSchedule
from mpifedlora.core.switches import Switches
from mpifedlora.core.wire import LATE, POSTPONED, ClientUpdate, SummedRows, UpdateHeader, WireFormat

ONE_BY_TWO = (LinearShape("m", 2, 2),)
HEAD = (TensorShape("head", (1,)),)
RANK_1, RANK_2 = (AdapterLayout(ONE_BY_TWO, (lora_rank,), HEAD) for lora_rank in (1, 2))


def product(layout, flat):
    ((a, b),) = layout.factors(flat)
    return b @ a


def test_values_are_the_new_state_and_the_change():
    # A = (1, 2), B = (3, 4), head 5; then by 0.5 more in A's first value, and 1 less in the head.
    progress = Progress(3, 2, (1,), torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([1.5, 2, 3, 4, 4]))
    state = torch.tensor([10.0, 20, 30, 40, 50])
    assert go_on(progress, RANK_1, state, "values").tolist() == [10.5, 20, 30, 40, 49]
    assert state.tolist() == [10, 20, 30, 40, 50]


def test_products_are_the_new_product_and_the_change_of_it():
    """The change of the product is 1 in its first place; old and new factors have nothing in common."""
    started = torch.tensor([1.0, 0, 2, 0, 5])  # A = (1, 0), B = (2, 0): B A has a 2 in its first place
    trained = torch.tensor([3.0, 0, 1, 0, 7])  # now it has a 3
    state = torch.tensor([-1.0, 0, -4, 0, 50])  # and the new state a 4
    found = go_on(Progress(1, 1, (1,), started, trained), RANK_1, state, "products")
    torch.testing.assert_close(product(RANK_1, found), torch.tensor([[5.0, 0], [0, 0]]))
    assert found[-1] == 52


def test_a_cut_leaves_the_strongest_directions():
    # At rank 2 the change was diag(3, 1); the new rank is 1, and the new state is 0.
    started = torch.tensor([1.0, 0, 0, 1, 0, 0, 0, 0, 0])
    trained = torch.tensor([1.0, 0, 0, 1, 3, 0, 0, 1, 0])
    assert product(RANK_2, trained).tolist() == [[3, 0], [0, 1]]
    found = go_on(Progress(1, 1, (2,), started, trained), RANK_1, torch.zeros(5), "products")
    torch.testing.assert_close(product(RANK_1, found), torch.tensor([[3.0, 0], [0, 0]]))


def test_a_larger_rank_holds_all_and_stays_trainable():
    progress = Progress(1, 1, (1,), torch.tensor([1.0, 0, 0, 0, 0]), torch.tensor([1.0, 0, 2, 0, 0]))
    found = go_on(progress, RANK_2, torch.zeros(9), "products")
    torch.testing.assert_close(product(RANK_2, found), torch.tensor([[2.0, 0], [0, 0]]))
    assert bool((RANK_2.factors(found)[0].a.abs().sum(1) > 0).all())


def test_progress_is_kept_beside_what_a_client_keeps_anyway():
    progress = Progress(3, 17, (4, 2), torch.ones(3), torch.zeros(3))
    kept = {"lost": torch.ones(2), **progress.pack()}
    found = Progress.unpack(kept)
    assert found[:3] == (3, 17, (4, 2))
    assert torch.equal(found.started, progress.started)
    assert torch.equal(found.trained, progress.trained)
    assert set(without_progress(kept)) == {"lost"}
    assert Progress.unpack(without_progress(kept)) is None
    whole_model = Progress(1, 2, (), torch.ones(1), torch.ones(1))
    assert Progress.unpack(whole_model.pack())[:3] == (1, 2, ())


def test_weights_fall_with_the_rounds():
    assert [staleness_weight(rounds, 1.0) for rounds in (0, 1, 4)] == [1, 0.5, 0.2]
    assert staleness_weight(7, 0.0) == 1
    assert staleness_weight(3, 0.5) == pytest.approx(0.5)


# What the server makes of it


SHAPES = ModelShapes(ONE_BY_TWO, HEAD, ())


def make_coordinator(**switches):
    return Coordinator(
        SHAPES,
        Switches(
            schedule=RankSchedule("constant", 9, 0, 0, 1, 1),
            learning_rate=lambda round_num, scope: 0.1,
            choose_workers=lambda round_num, set_aside: (0, 0, 0),
            aggregator=AGGREGATORS["factors"],
            late_exponent=1.0,
            **switches,
        ),
        lambda plan: torch.zeros(plan.layout(SHAPES).num_values),
        0,
    )


def header(client_id, staleness=0, fault="", num_examples=10):
    is_finite = not fault
    return UpdateHeader(
        client_id, num_examples, 2, 0.5, 0.0, 1.0, is_finite, fault=fault, staleness=staleness
    )


def finish(coordinator, headers, values, how):
    """Finish a round in each of the ways that a server has; `values` are all of one number."""
    rows = [torch.full((5,), value) for value in values]
    if how == "whole":
        coordinator.finish(
            [ClientUpdate(**vars(one), values=row) for one, row in zip(headers, rows, strict=True)]
        )
    elif how == "sum":
        total = sum(coordinator.switches.counts(one) * row for one, row in zip(headers, rows, strict=True))
        coordinator.finish_sum(headers, total)
    else:
        stream = coordinator.stream(headers, 1)
        clients = [one.client_id for one in headers]
        padded = [torch.zeros(64, dtype=torch.uint8) for _ in rows]
        for buffer, row in zip(padded, rows, strict=True):
            buffer[:20] = row.view(torch.uint8)
        for part in stream.parts:
            span = slice(part.uplink.start, part.uplink.stop)
            sent = {client: buffer[span] for client, buffer in zip(clients, padded, strict=True)}
            stream.take(part, sent, lambda: None)
        coordinator.commit(stream)


WAYS = ["whole", "sum", "parts"]


@pytest.mark.parametrize("how", WAYS)
def test_a_late_update_counts_less(how):
    """One round late it counts a half, by 1 / (1 + 1): (4 + 4 + 0.5 * 9) / 2.5."""
    coordinator = make_coordinator()
    finish(coordinator, [header(0), header(1), header(2, staleness=1)], [4.0, 4.0, 9.0], how)
    torch.testing.assert_close(coordinator.state, torch.full((5,), 12.5 / 2.5))


def test_examples_count_as_well():
    coordinator = make_coordinator()
    headers = [header(0, num_examples=30), header(1, staleness=2, num_examples=90)]
    finish(coordinator, headers, [1.0, 2.0], "whole")
    torch.testing.assert_close(coordinator.state, torch.full((5,), 1.5))


@pytest.mark.parametrize("how", WAYS)
def test_the_plan_names_the_round_in_which_a_late_client_stopped(how):
    coordinator = make_coordinator()
    finish(coordinator, [header(0), header(1, fault=POSTPONED), header(2, fault=LATE)], [1.0, 0.0, 0.0], how)
    assert coordinator.next_plan.state_rounds == (0, 1, 0)
    finish(coordinator, [header(0), header(1, fault=LATE), header(2, fault=POSTPONED)], [1.0, 0.0, 0.0], how)
    assert coordinator.next_plan.state_rounds == (0, 1, 2)  # nothing new of client 1: the old version holds
    finish(coordinator, [header(0), header(1, staleness=2), header(2, fault=POSTPONED)], [1.0, 1.0, 0.0], how)
    assert coordinator.next_plan.state_rounds == (0, 0, 3)  # client 1 has handed it in


def test_what_clients_keep_anyway_is_named_too():
    coordinator = make_coordinator(wire=WireFormat("bfloat16", "float32", has_feedback=True))
    updates = [ClientUpdate(**vars(header(0)), values=torch.ones(5))]
    updates.append(ClientUpdate(**vars(header(1, fault=POSTPONED)), values=torch.zeros(5)))
    coordinator.finish(updates)
    assert coordinator.next_plan.state_rounds == (1, 1, 0)


def test_sums_on_the_way_count_alike():
    rows = SummedRows([20, 20], 5, "float32")
    plan = make_coordinator().next_plan
    for index, (value, staleness) in enumerate([(4.0, 0), (9.0, 1)]):
        rows.wire(index).view(torch.float32)[:] = value
        header(index, staleness).write(rows, index, plan)
        rows.close(index, 10 * staleness_weight(staleness, 1.0))
    assert rows.total.tolist() == [10 * 4 + 5 * 9] * 5
    assert UpdateHeader.read(rows.headers[1], plan, 1, 20) == header(1, 1)
