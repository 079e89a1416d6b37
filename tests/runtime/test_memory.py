import pytest
import torch

from mpifedlora.core.plan import RoundPlan
from mpifedlora.errors import CheckpointError
from mpifedlora.io.client_store import ClientStore
from mpifedlora.runtime.memory import Memory


def plan_of(round_num, *state_rounds):
    """A plan that names, by client id, the round whose client state holds."""
    num_clients = max(1, len(state_rounds))
    return RoundPlan(
        round_num, "annealing", "adapter", (1,), (0,), (0,) * num_clients, state_rounds=state_rounds
    )


def state(value):
    return {"personal": torch.full((3,), value), "variate": torch.full((2,), -value)}


def assert_holds(recalled, value):
    assert {name: tensor.tolist() for name, tensor in recalled.items()} == {
        "personal": [value] * 3,
        "variate": [-value] * 2,
    }


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "client_states"


@pytest.fixture
def memory(folder):
    return Memory(ClientStore(folder))


def test_before_its_first_finished_round_a_client_has_kept_nothing(memory, folder):
    assert memory.recall(plan_of(1, 0, 0), 1) == {}
    memory.keep(plan_of(1, 0, 0), 1, state(1.0))
    assert memory.recall(plan_of(2, 0, 0), 1) == {}  # written, but the round has not finished with it
    assert_holds(memory.recall(plan_of(2, 0, 1), 1), 1.0)


def test_the_plan_says_which_version_holds(memory):
    for round_num in (1, 2, 3):
        memory.keep(plan_of(round_num, 0), 0, state(float(round_num)))
    for round_num in (1, 2, 3):
        assert_holds(memory.recall(plan_of(9, round_num), 0), float(round_num))


def test_clients_are_kept_apart(memory):
    for client_id in (0, 1, 2):
        memory.keep(plan_of(4, 0, 0, 0), client_id, state(float(client_id)))
    for client_id in (2, 0, 1):
        assert_holds(memory.recall(plan_of(5, 4, 4, 4), client_id), float(client_id))


def test_another_process_recalls_what_this_one_kept(memory, folder):
    memory.keep(plan_of(1, 0), 0, state(2.5))
    assert_holds(Memory(ClientStore(folder)).recall(plan_of(2, 1), 0), 2.5)


def test_a_round_done_again_replaces_what_it_had_written(memory):
    memory.keep(plan_of(2, 1), 0, state(1.0))
    memory.keep(plan_of(2, 1), 0, state(5.0))
    assert_holds(memory.recall(plan_of(3, 2), 0), 5.0)


def test_a_method_without_memory_leaves_no_trace(memory, folder):
    assert memory.recall(plan_of(3), 0) == {}
    memory.keep(plan_of(3), 0, {})
    assert not folder.exists()


def test_a_version_that_is_gone_is_an_error_and_never_a_fresh_start(memory):
    memory.keep(plan_of(1, 0), 0, state(1.0))
    with pytest.raises(CheckpointError, match="storage that every worker sees"):
        memory.recall(plan_of(3, 2), 0)
