import pytest
import torch
from support import make_run_file

from mpifedlora.core.plan import ABSENT
from mpifedlora.errors import AdapterError
from mpifedlora.io.model_files import check_targets
from mpifedlora.io.run_file import read_run_file
from mpifedlora.runtime.method import build_switches
from mpifedlora.runtime.setup import choose_threads, model_path, read_data

SIZES = [10, 0, 7, 40]


def config_of(run_file, *overrides):
    return read_run_file(run_file, overrides).config


# devices

DEVICES = {
    # visible GPUs, workers on the node: each worker's device, then the server's
    (0, 2): ["cpu", "cpu", "cpu"],
    (1, 1): ["cuda:0", "cpu"],
    (1, 3): ["cuda:0", "cuda:0", "cuda:0", "cpu"],
    (2, 1): ["cuda:0", "cuda:1"],
    (2, 3): ["cuda:0", "cuda:1", "cuda:0", "cpu"],
    (4, 3): ["cuda:0", "cuda:1", "cuda:2", "cuda:3"],
    (4, 4): ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cpu"],
    (8, 2): ["cuda:0", "cuda:1", "cuda:2"],
    (1, 0): ["cuda:0"],  # a node with the server alone
    (0, 0): ["cpu"],
}


@pytest.mark.parametrize(
    ("requested", "num_cores", "num_sharing", "expected"),
    [
        (None, 16, 1, 16),
        (None, 16, 4, 4),
        (None, 16, 5, 3),  # never more than there are
        (None, 4, 4, 1),  # a cpuset of 4 cores on a node of 64, shared by 4 processes
        (None, 2, 5, 1),
        (None, 1, 1, 1),  # bound to a core of its own
        (3, 2, 5, 3),
    ],
)
def test_threads_are_a_share_of_the_cores(requested, num_cores, num_sharing, expected):
    assert choose_threads(requested, num_cores, num_sharing) == expected


# switches


def switches_of(run_file, *overrides, num_workers=2):
    return build_switches(config_of(run_file, *overrides), SIZES, num_workers)


def test_learning_rates_follow_scope_and_schedule(tiny_run_file):
    switches = switches_of(
        tiny_run_file,
        "training.learning_rate=0.1",
        "training.full_learning_rate=0.01",
        "training.learning_rate_schedule=linear",
    )
    assert [switches.learning_rate(t, "adapter") for t in (1, 2, 3, 4)] == pytest.approx(
        [0.1, 0.075, 0.05, 0.025]
    )
    assert switches.learning_rate(3, "full") == pytest.approx(0.005)
    constant = switches_of(tiny_run_file, "training.learning_rate_schedule=constant")
    assert {constant.learning_rate(t, "adapter") for t in (1, 2, 3, 4)} == {0.01}


def test_mu_belongs_to_the_stages(tiny_run_file):
    stages = ["federation.method=custom", "initiating.rounds=3", "initiating.mu=0.5", "training.mu=0.25"]
    constant = switches_of(tiny_run_file, *stages)
    assert [constant.mu(t) for t in (1, 2, 3, 4)] == [0.5, 0.5, 0.5, 0.25]
    linear = switches_of(tiny_run_file, *stages, "initiating.mu_schedule=linear")
    assert [linear.mu(t) for t in (1, 2, 3, 4)] == pytest.approx([0.5, 0.25, 0.0, 0.25])


def test_schedule_scope_and_cut_come_from_the_run_file(tiny_run_file):
    switches = switches_of(tiny_run_file, "initiating.scope=full", "annealing.cut=drop")
    assert (switches.initiating_scope, switches.scope, switches.freezes) == ("full", "adapter", False)
    assert [switches.schedule.budget(t) for t in (1, 2, 3, 4)] == [4, 3, 2, 1]
    assert [switches.schedule.stage(t) for t in (1, 2)] == ["initiating", "annealing"]
    whole = switches_of(tiny_run_file, "federation.method=fedavg")
    assert whole.scope == "full"
    assert whole.schedule.stage(1) == "annealing"
    assert switches_of(tiny_run_file).freezes


def test_clients_without_examples_never_train(tiny_run_file):
    workers = switches_of(tiny_run_file).choose_workers(1)
    assert len(workers) == 4
    assert workers[1] == ABSENT
    assert {workers[client] for client in (0, 2, 3)} == {0, 1}


def test_cohorts_are_drawn_anew_each_round_and_the_same_for_any_workers(tiny_run_file):
    overrides = ["federation.cohort_size=2", "federation.num_rounds=20"]
    cohorts = []
    for num_workers in (1, 3):
        choose = switches_of(tiny_run_file, *overrides, num_workers=num_workers).choose_workers
        plans = [choose(t) for t in range(1, 21)]
        assert all(max(plan) < num_workers for plan in plans)
        cohorts.append([tuple(i for i, worker in enumerate(plan) if worker != ABSENT) for plan in plans])
    assert cohorts[0] == cohorts[1]
    assert all(len(cohort) == 2 for cohort in cohorts[0])
    assert set(cohorts[0]) == {(0, 2), (0, 3), (2, 3)}


def test_clients_are_spread_by_their_load(tiny_run_file, tmp_path):
    even = switches_of(tiny_run_file, num_workers=3).choose_workers(1)
    assert sorted(even[client] for client in (0, 2, 3)) == [0, 1, 2]
    run_file = make_run_file(tmp_path, "[training]\nlocal_epochs = 1\n")
    by_size = switches_of(run_file, num_workers=2).choose_workers(1)
    assert by_size[0] == by_size[2] != by_size[3]  # 10 and 7 examples here, 40 there


def test_data_is_shared_out_completely(tiny_run_file):
    data = read_data(config_of(tiny_run_file))
    assert len(data.parts) == 4
    owned = sorted(int(index) for part in data.parts for index in part)
    assert owned == list(range(len(data.dataset.train)))
    assert data.label_table().sum() == len(owned)
    assert data.eligible == [client for client, part in enumerate(data.parts) if len(part)]


def test_a_model_name_is_a_path_or_a_hub_name(tiny_model_folder):
    assert model_path(str(tiny_model_folder)) == str(tiny_model_folder)
    assert model_path("owner/name") == "owner/name"
    assert "minilm" in model_path("minilm").lower()


def test_torch_has_one_thread(tiny_model_folder):
    assert torch.get_num_threads() == 1


# the cheap look at the model


@pytest.mark.parametrize("content", [b"", b"no weights at all", b"\x02" + bytes(7) + b"[]"])
def test_damaged_weights_are_left_to_the_loading_of_the_model(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    check_targets(str(tmp_path), ["query"])


def test_a_misspelt_target_is_found_without_loading_the_model(tiny_model_folder):
    check_targets(str(tiny_model_folder), ["query", "attention.output.dense"])
    with pytest.raises(AdapterError, match='did you mean "query"'):
        check_targets(str(tiny_model_folder), ["qury"])
