import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import flatten

from mpifedlora import load_base_model
from mpifedlora.errors import AdapterError, CheckpointError
from mpifedlora.io.results import read_results
from mpifedlora.runtime import federation
from mpifedlora.runtime.launch import run

FEW_ROUNDS = ["federation.num_rounds=3", "evaluation.every=3"]
RUNS = {
    "freeze": [],
    "drop": ["annealing.cut=drop"],
    "full-then-adapter": ["initiating.scope=full"],
    "more-modules": [
        "lora.modules_to_save=['encoder.embeddings.LayerNorm']",
        "lora.target_modules=['query']",
    ],
    "stock": ["model.head=stock", "federation.method=fedit", "lora.dropout=0.1"],
    "fedavg": ["federation.method=fedavg"],
    "bfloat16": ["model.dtype=bfloat16", "initiating.scope=full"],
    "fedex": ["federation.method=fedex-lora"],
    "flora": ["federation.method=flora", "lora.client_ranks=[1, 4]", "federation.cohort_size=3"],
    "residual-annealed": ["federation.method=custom", "aggregation.kind=residual", "initiating.scope=full"],
    "flora-workers": ["federation.method=flora", "evaluation.on=workers"],
    "ffa": ["federation.method=ffa-lora"],
    "rolora-workers": ["federation.method=rolora", "evaluation.on=workers", "federation.cohort_size=2"],
    "fedavg-workers": [
        "federation.method=fedavg",
        "aggregation.kind=residual",
        "evaluation.on=workers",
    ],
}
PERSONAL = {
    "fedsa": ["federation.method=fedsa-lora"],
    "fedsa-workers": ["federation.method=fedsa-lora", "evaluation.on=workers", "federation.cohort_size=3"],
    "own-head": [
        "federation.method=custom",
        "training.personal=b-and-head",
        "evaluation.model=personal",
        "aggregation.kind=factors",
        "annealing.schedule=constant",
        "initiating.rounds=0",
    ],
}


class Finished:
    """A finished run: its folder, and the server's model and test examples in memory."""

    def __init__(self, out, replica, coordinator):
        self.out = out
        self.replica, self.coordinator = replica, coordinator
        self.evaluation = replica.evaluation
        self.accuracy = read_results(out / "results.h5").rounds["eval_accuracy"][-1]
        everything = np.arange(len(self.evaluation.raw.labels))
        self.batch, self.labels = self.evaluation.task.collate(self.evaluation.examples, everything)
        model, plan = replica.model, coordinator.next_plan
        model.bind(plan, coordinator.state)
        model.train(False)
        with torch.no_grad():
            self.logits = model(self.batch)

    def load(self):
        base = load_base_model(self.out)
        if (self.out / "adapter").exists():
            return PeftModel.from_pretrained(base, self.out / "adapter")
        return base

    def logits_of(self, module):
        with torch.no_grad():
            return module(**self.batch).logits


@pytest.fixture(scope="module")
def finished(tiny_folder, tiny_run_file, tmp_path_factory):
    """Run once what is asked for, and keep it."""
    runs = {}

    def get(name):
        if name not in runs:
            out = tmp_path_factory.mktemp("runs") / name
            seen = []
            make_server = federation._server

            def spy(config, coordinator, replica, *others):
                seen.append((replica, coordinator))
                return make_server(config, coordinator, replica, *others)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(federation, "_server", spy)
                assert run(tiny_run_file, [*FEW_ROUNDS, *{**RUNS, **PERSONAL}[name]], out, False) == 0
            runs[name] = Finished(out, *seen[0])
        return runs[name]

    return get


@pytest.mark.parametrize("name", RUNS)
def test_the_loaded_model_gives_the_federated_logits(finished, name):
    done = finished(name)
    loaded = done.load()
    assert not loaded.training
    logits = done.logits_of(loaded)
    assert (logits - done.logits).abs().max() <= 1e-5
    assert (logits.argmax(dim=1) == done.labels).float().mean().item() == pytest.approx(done.accuracy)


@pytest.mark.parametrize("name", PERSONAL)
def test_each_clients_adapter_gives_its_logits(finished, name):
    done = finished(name)
    model, plan = done.replica.model, done.coordinator.next_plan
    shared = plan.layout(model.shapes)
    predicted = np.full(len(done.labels), -1)
    seen = []
    for client_id, round_num in enumerate(done.coordinator.state_rounds):
        assert round_num > 0  # three rounds of three clients of four: all have trained
        folder = done.out / "client_adapters" / f"client-{client_id:05d}"
        logits = done.logits_of(PeftModel.from_pretrained(load_base_model(done.out), folder))
        # The global A and head, and what the client's own file holds of the round that was finished last.
        file = done.out / "client_states" / f"client-{client_id:05d}.round-{round_num:05d}.safetensors"
        kept = load_file(file)["personal"]
        own = plan.personal_layout(model.shapes, client_id)
        b = [part.b for part in own.factors(kept)]
        pairs = [(part.a, b) for part, b in zip(shared.factors(done.coordinator.state), b, strict=True)]
        head = own.whole_tensors(kept) or shared.whole_tensors(done.coordinator.state)
        model.bind(plan, flatten(pairs, head), client_id=client_id)
        model.train(False)
        with torch.no_grad():
            assert (model(done.batch) - logits).abs().max() <= 1e-5
        (share,) = (part.indices for part in done.evaluation.shares if part.client_id == client_id)
        predicted[share] = logits[share].argmax(dim=1)
        seen.append(logits)
    assert (predicted == done.labels.numpy()).mean() == pytest.approx(done.accuracy)
    assert all((seen[0] - other).abs().max() > 1e-3 for other in seen[1:])


@pytest.mark.parametrize("name", ["fedex", "flora", "freeze"])
def test_only_what_goes_into_the_base_is_left_behind_as_base_weights(finished, name):
    done = finished(name)
    file = done.out / "base_model" / "model.safetensors"
    assert file.exists() == (name != "freeze")
    if name != "freeze":
        modules = {f"{module.name}.weight" for module in done.replica.model.shapes.modules}
        assert set(load_file(file)) == modules


@pytest.mark.parametrize("name", ["freeze", "full-then-adapter"])
def test_without_the_adapter_the_logits_are_others(finished, name):
    done = finished(name)
    assert (done.logits_of(load_base_model(done.out)) - done.logits).abs().max() > 1e-2


def test_a_frozen_run_exports_at_most_rank_max(finished):
    config = json.loads((finished("freeze").out / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(finished("freeze").out / "adapter" / "adapter_model.safetensors")
    exported = {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name}
    assert max(exported) == config["r"] <= 4
    assert min(exported) > 1  # more than the last round's active rank
    assert config["lora_alpha"] / config["r"] == 2.0


def test_a_dropped_run_exports_the_last_rank(finished):
    config = json.loads((finished("drop").out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (1, 2.0, {})


@pytest.mark.parametrize(
    ("name", "left_behind"),
    [
        ("freeze", {"adapter", "checkpoints", "results.h5", "run.toml"}),
        ("full-then-adapter", {"adapter", "base_model", "checkpoints", "results.h5", "run.toml"}),
        ("fedavg", {"base_model", "checkpoints", "results.h5", "run.toml"}),
        ("flora", {"adapter", "base_model", "checkpoints", "results.h5", "run.toml"}),
        ("fedsa", {"client_adapters", "client_states", "checkpoints", "results.h5", "run.toml"}),
    ],
)
def test_what_is_left_behind(finished, name, left_behind):
    assert {path.name for path in finished(name).out.iterdir()} == left_behind


@pytest.mark.parametrize(("name", "holds_head"), [("full-then-adapter", False), ("fedavg", True)])
def test_trained_base_weights_are_complete(finished, name, holds_head):
    stored = load_file(finished(name).out / "base_model" / "model.safetensors")
    names = {name for name, _ in load_base_model(finished(name).out).named_parameters()}
    assert set(stored) == (names if holds_head else {x for x in names if not x.startswith("classifier")})
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_a_folder_without_a_run_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError):
        load_base_model(tmp_path)


def test_base_weights_of_another_model_are_an_adapter_error(finished, tmp_path):
    done = finished("fedavg")
    for name in ("results.h5", "run.toml"):
        (tmp_path / name).write_bytes((done.out / name).read_bytes())
    (tmp_path / "base_model").mkdir()
    save_file({"encoder.unknown.weight": torch.zeros(2)}, tmp_path / "base_model" / "model.safetensors")
    with pytest.raises(AdapterError, match=r"base weights must fit the model, got encoder\.unknown\.weight"):
        load_base_model(tmp_path)
