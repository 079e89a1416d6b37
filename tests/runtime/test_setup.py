import gc
import subprocess
import sys

import numpy as np
import pytest
import torch
from support import flatten, random_values

from mpifedlora.core.history import Trained
from mpifedlora.core.partition import label_table
from mpifedlora.core.plan import RoundPlan
from mpifedlora.errors import AdapterError, ConfigError
from mpifedlora.io.model_files import check_targets
from mpifedlora.io.run_file import read_run_file
from mpifedlora.runtime.data import read_data
from mpifedlora.runtime.exporting import TrainedModel
from mpifedlora.runtime.setup import (
    build_replica,
    choose_device,
    choose_threads,
    collect_rarely,
    model_path,
)
from mpifedlora.transport.inprocess import Alone


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


@pytest.mark.parametrize(("visible_and_workers", "expected"), DEVICES.items())
def test_gpus_go_to_the_workers_in_turn_and_the_server_takes_one_that_is_left(visible_and_workers, expected):
    num_visible, num_workers = visible_and_workers
    assert [
        choose_device("auto", num_visible, index, num_workers) for index in range(num_workers + 1)
    ] == expected
    assert {choose_device("cpu", num_visible, index, num_workers) for index in range(num_workers + 1)} == {
        "cpu"
    }


def test_cuda_needs_a_gpu_for_every_worker_but_none_for_the_server():
    assert choose_device("cuda", 1, 0, 2) == choose_device("cuda", 1, 1, 2) == "cuda:0"
    assert choose_device("cuda", 0, 2, 2) == "cpu"
    with pytest.raises(ConfigError, match=r"needs a GPU on every worker, got none \(worker 1"):
        choose_device("cuda", 0, 1, 2)


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


# data and model


def test_data_is_shared_out_completely(tiny_run_file):
    data = read_data(config_of(tiny_run_file), Alone())
    assert len(data.parts) == 4
    owned = sorted(int(index) for part in data.parts for index in part)
    assert owned == list(range(len(data.dataset.train)))
    assert data.label_table().sum() == len(owned)


def replica_of(run_file, folder, *overrides):
    config = config_of(run_file, *overrides)
    return build_replica(config, read_data(config, Alone()), "cpu", folder / "client_states")


def test_every_example_of_the_test_part_is_measured_with_the_global_model(tiny_run_file, tmp_path):
    replica = replica_of(
        tiny_run_file, tmp_path, "data.validation_fraction=0.25", "privacy.clip_norm=0.5", *FFA
    )
    (share,) = replica.evaluation.shares
    assert share.client_id is None
    assert share.indices.tolist() == list(range(len(replica.data.dataset.test)))
    assert list(replica.evaluation.raw.texts) == list(replica.data.dataset.test.texts)
    assert list(replica.held_out.raw.texts) == list(replica.data.dataset.validation.texts)
    assert len(replica.held_out.raw.labels) == 24  # a quarter of 120 less 24 of testing
    assert replica.settings.clip_norm == 0.5
    assert not (tmp_path / "client_states").exists()


FFA = ("federation.method=ffa-lora", "aggregation.weights=equal")


def test_personal_models_share_the_test_part_out_by_their_mix_of_labels(tiny_run_file, tmp_path):
    replica = replica_of(tiny_run_file, tmp_path, "federation.method=fedsa-lora", "data.alpha=0.1")
    shares = replica.evaluation.shares
    assert [share.client_id for share in shares] == [0, 1, 2, 3]
    measured = np.concatenate([share.indices for share in shares])
    assert sorted(measured.tolist()) == list(range(len(replica.data.dataset.test)))
    owned = replica.data.label_table()
    shared = label_table([share.indices for share in shares], replica.evaluation.raw.labels, 3)
    proportional = owned / owned.sum(axis=0) * np.bincount(replica.evaluation.raw.labels, minlength=3)
    assert (abs(shared - proportional) < 1).all()
    # Measured with a quarter of the examples: it is a share of those.
    fewer = replica_of(tiny_run_file, tmp_path, "federation.method=fedsa-lora", "evaluation.max_examples=6")
    assert sorted(np.concatenate([share.indices for share in fewer.evaluation.shares])) == list(range(6))


def test_a_personal_adapter_is_the_global_a_with_the_clients_own_part(tiny_run_file, tmp_path):
    replica = replica_of(tiny_run_file, tmp_path, "federation.method=fedsa-lora")
    shapes = replica.model.shapes
    plan = RoundPlan(
        2, "annealing", "adapter", (4,) * 12, (0,) * 12, (0,) * 4, state_rounds=(0, 1, 0, 0), keeps_b=True
    )
    replica.model.state = random_values(plan.layout(shapes).num_values)
    own = plan.personal_layout(shapes, 1)
    kept = random_values(own.num_values, seed=1)
    replica.memory.store.write(1, 1, {"personal": kept})
    trained = Trained(shapes, plan, replica.model.state, [])
    config = config_of(tiny_run_file, "federation.method=fedsa-lora")
    model = TrainedModel(config, replica.model, trained, replica.memory)
    assert (model.keeps_b, model.has_adapter, model.clients) == (True, False, [1])
    factors, head = model.adapter(1)
    expected = plan.layout(shapes).factors(replica.model.state)
    assert all(torch.equal(got.a, wanted.a) for got, wanted in zip(factors, expected, strict=True))
    assert torch.equal(flatten([(part.b,) for part in factors], []), kept)
    assert torch.equal(flatten([], head), plan.layout(shapes).whole_values(replica.model.state))
    assert (tmp_path / "client_states").is_dir()


def test_all_examples_are_tokenised_once_when_a_client_is_first_trained(tiny_run_file, tmp_path, monkeypatch):
    replica = replica_of(tiny_run_file, tmp_path)
    calls = []
    encode = replica.task.encode
    monkeypatch.setattr(replica.task, "encode", lambda *given: calls.append(1) or encode(*given))
    examples_of = replica.examples_of()
    assert calls == []
    first, other = examples_of(2), examples_of(3)
    assert examples_of(2) is first
    assert other.tokens is first.tokens
    assert len(calls) == 1
    train, owned = replica.data.dataset.train, replica.data.parts[2]
    assert first.labels.tolist() == train.labels[owned].tolist()
    alone = encode({"text": [train.texts[i] for i in owned]}, train.labels[owned])
    everything = np.arange(len(owned))
    got, wanted = (replica.task.collate(examples, everything)[0] for examples in (first, alone))
    assert torch.equal(got["input_ids"], wanted["input_ids"])


def test_the_tokens_of_each_part_are_kept_in_the_cache_folder(tiny_run_file, tmp_path, monkeypatch):
    monkeypatch.setenv("MPIFEDLORA_CACHE", str(tmp_path / "cache"))
    for _ in range(2):
        replica = replica_of(tiny_run_file, tmp_path, "data.validation_fraction=0.25")
        assert len(replica.examples_of()(0)) == len(replica.data.parts[0])
        assert len(replica.evaluation.examples) == len(replica.data.dataset.test)
        assert len(replica.held_out.examples) == len(replica.data.dataset.validation)
        assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 3
        monkeypatch.setattr("mpifedlora.training.tasks.ClassificationTask.tokenize", None)  # not called again


@pytest.mark.parametrize("batching", ["shuffled", "bucketed"])
def test_the_run_file_says_what_makes_a_batch(tiny_run_file, tmp_path, batching):
    replica = replica_of(tiny_run_file, tmp_path, f"training.batching={batching}")
    assert replica.settings.batching == batching


@pytest.mark.parametrize("is_asked", [True, False])
def test_the_model_is_compiled_where_that_is_asked_for(tiny_run_file, tmp_path, monkeypatch, is_asked):
    compiled = []
    monkeypatch.setattr(
        "mpifedlora.training.models.FederatedModel.compile", lambda self: compiled.append(self)
    )
    options = ["training.compile=true", "federation.reproducible=false"] if is_asked else []
    replica = replica_of(tiny_run_file, tmp_path, *options)
    assert compiled == ([replica.model] if is_asked else [])


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


# start-up


@pytest.fixture
def own_thresholds():
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.usefixtures("own_thresholds")
def test_garbage_is_looked_for_less_often_than_python_would():
    collect_rarely()
    gc.collect()
    before = gc.get_stats()[0]["collections"]
    kept = [[] for _ in range(9000)]
    assert gc.get_stats()[0]["collections"] == before
    kept += [[] for _ in range(3000)]
    assert gc.get_stats()[0]["collections"] > before  # still looked for


def test_a_run_begins_before_anything_heavy_is_imported():
    code = "import sys; from mpifedlora.runtime import launch; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "peft", "h5py", "mpi4py"} & set(ended.stdout.split())
