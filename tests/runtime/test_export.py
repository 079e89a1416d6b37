"""Exported models: they load with plain PEFT and transformers, and give the run's own figures."""

import re
from pathlib import Path

import numpy as np
import pytest
import support
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from mpifedlora import load_base_model, read_results
from mpifedlora.errors import CheckpointError, ConfigError
from mpifedlora.io.run_file import read_run_file
from mpifedlora.runtime import launch
from mpifedlora.runtime.data import read_data
from mpifedlora.runtime.export import export
from mpifedlora.transport.inprocess import Alone

KEEP = ("checkpoint.keep=4",)
RUNS = {
    "cut": ("annealing.cut=drop",),
    "frozen": (),
    "stock": ("model.head=stock", "lora.target_modules=['query', 'value']"),
    "half": ("model.dtype=bfloat16", "federation.method=fedit", "federation.num_rounds=2"),
    "initiated whole": ("initiating.scope=full",),
    "stack": ("federation.method=flora",),
    "whole": ("federation.method=fedavg",),
    "own B": ("federation.method=fedsa-lora",),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    run_file, done = support.make_run_file(folder), {}

    def run(name):
        if name not in done:
            done[name] = folder / name.replace(" ", "-")
            assert launch.run(run_file, [*KEEP, *RUNS[name]], done[name], False) == 0
        return done[name]

    return run


def figures(logits_of, run_folder):
    """Return loss and accuracy on the run's test examples of what gives logits for a batch."""
    config = read_run_file(run_folder / "run.toml").config
    test = read_data(config, Alone()).dataset.test
    tokenizer = AutoTokenizer.from_pretrained(config.model.name)
    batch = tokenizer(
        list(test.columns["text"]), return_tensors="pt", padding=True, truncation=True, max_length=24
    )
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = logits_of(batch).float()
    labels = torch.from_numpy(np.asarray(test.labels))
    loss = functional.cross_entropy(logits, labels).item()
    return loss, (logits.argmax(1) == labels).float().mean().item()


def assert_are_of_round(found, run_folder, round_num, tolerance=1e-5):
    rounds = read_results(run_folder).rounds
    assert found[0] == pytest.approx(rounds["eval_loss"][round_num - 1], abs=tolerance)
    assert found[1] == pytest.approx(rounds["eval_accuracy"][round_num - 1], abs=1e-6)


def lines_of(card, out):
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code.replace("FOLDER", str(out))


def run_card(out, batch):
    """Run the lines that an adapter's or a merged model's card shows, on a batch of our own."""
    code = lines_of((out / "README.md").read_text(), out)
    names = {"ours": batch}
    code = re.sub(r"^batch = .*$", "batch = ours", code, flags=re.MULTILINE)
    exec(code, names)
    return names


@pytest.mark.parametrize("name", ["cut", "frozen", "stock", "initiated whole", "stack"])
@pytest.mark.parametrize("round_num", [2, 4])
def test_an_adapter_gives_the_figures_of_its_round(made, tmp_path, name, round_num):
    run_folder, out = made(name), tmp_path / "out"
    told = export(run_folder, out, round_num, merges=False)
    assert f"adapter after round {round_num} in {out}" in told
    names = run_card(out, None)
    assert_are_of_round(
        figures(lambda batch: names["model"](**batch).logits, run_folder), run_folder, round_num
    )


@pytest.mark.parametrize("name", ["cut", "frozen", "stock", "initiated whole", "stack", "whole"])
def test_a_merged_model_gives_them_without_this_package(made, tmp_path, name):
    run_folder, out = made(name), tmp_path / "out"
    export(run_folder, out, 3, merges=True)
    found = figures(lambda batch: run_card(out, batch)["logits"], run_folder)
    assert_are_of_round(found, run_folder, 3)
    code = lines_of((out / "README.md").read_text(), out)
    assert "mpifedlora" not in code
    names = {}
    exec(code, names)  # with its own text
    assert names["logits"].shape == (1, 3)
    if name == "stock":
        model = AutoModelForSequenceClassification.from_pretrained(out)
        assert model.config.id2label == {0: "animals", 1: "food", 2: "music"}


def test_a_vision_transformer_is_merged_with_what_makes_its_images_numbers(tmp_path):
    image = pytest.importorskip("PIL.Image")
    support.make_images(tmp_path / "images" / "train", 36, seed=1)
    test = support.make_images(tmp_path / "images" / "test", 12, seed=2)
    vit = support.make_vit(tmp_path / "vit")
    (vit / "preprocessor_config.json").write_text('{"image_mean": [0.3], "image_std": [0.2]}')
    settings = ["task.name=image-classification", f"model.name={vit}", f"data.source={tmp_path}/images",
                "initiating.scope=full", "initiating.mu=0", "federation.num_clients=3"]  # fmt: skip
    run_folder, out = tmp_path / "run", tmp_path / "out"
    assert launch.run(support.make_run_file(tmp_path), settings, run_folder, False) == 0
    export(run_folder, out, merges=True)

    card = ModelCard.load(out / "README.md")
    assert card.data.pipeline_tag == "image-classification"
    code = lines_of(card.text, out)
    assert "mpifedlora" not in code
    files = sorted(test.rglob("*.png"))
    names = {"ours": [image.open(file) for file in files]}
    exec(re.sub(r"^images = .*$", "images = ours", code, flags=re.MULTILINE), names)
    labels = torch.tensor([names["model"].config.label2id[file.parent.name] for file in files])
    loss = functional.cross_entropy(names["logits"], labels).item()
    found = loss, (names["logits"].argmax(1) == labels).float().mean().item()
    assert_are_of_round(found, run_folder, 4)


def test_half_precision_stays_what_it_is(made, tmp_path):
    run_folder = made("half")
    export(run_folder, tmp_path / "adapter", merges=False)
    model = PeftModel.from_pretrained(load_base_model(tmp_path / "adapter"), tmp_path / "adapter").eval()
    found = figures(lambda batch: model(**batch).logits, run_folder)
    assert_are_of_round(found, run_folder, 2)
    export(run_folder, tmp_path / "merged", merges=True)
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    found = figures(lambda batch: run_card(tmp_path / "merged", batch)["logits"], run_folder)
    assert found[0] == pytest.approx(read_results(run_folder).rounds["eval_loss"][1], abs=0.05)


def test_the_ranks_are_those_of_the_round(made, tmp_path):
    ranks = read_results(made("cut")).rounds["module_ranks"]
    for round_num in (1, 3):
        export(made("cut"), tmp_path / str(round_num), round_num, merges=False)
        tensors = load_file(tmp_path / str(round_num) / "adapter_model.safetensors")
        found = [tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name]
        # After a round the model has the ranks of the next one.
        assert found == ranks[round_num].tolist()
    last = load_file(made("cut") / "adapter" / "adapter_model.safetensors")
    export(made("cut"), tmp_path / "last", merges=False)
    found = load_file(tmp_path / "last" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in last.items())


def test_clients_own_models(made, tmp_path):
    run_folder = made("own B")
    with pytest.raises(
        ConfigError, match=r"--client must be given .* under fedsa-lora; name one of 0, 1, 2, 3"
    ):
        export(run_folder, tmp_path / "out", merges=False)
    with pytest.raises(ConfigError, match="trained by round 4, got 7"):
        export(run_folder, tmp_path / "out", client_id=7, merges=False)
    export(run_folder, tmp_path / "out", client_id=2, merges=False)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    left = load_file(run_folder / "client_adapters" / "client-00002" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in left.items())
    export(run_folder, tmp_path / "merged", client_id=2, merges=True)
    names = run_card(tmp_path / "out", None)
    batch = support.make_batch()
    with torch.no_grad():
        wanted = names["model"](**batch).logits
    torch.testing.assert_close(run_card(tmp_path / "merged", batch)["logits"], wanted, rtol=0, atol=1e-5)
    assert "Client 2's own model" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(made, tmp_path):
    with pytest.raises(ConfigError, match="--client needs a method whose clients keep"):
        export(made("cut"), tmp_path / "out", client_id=1, merges=False)
    with pytest.raises(ConfigError, match="add --merge"):
        export(made("whole"), tmp_path / "out", merges=False)
    with pytest.raises(
        CheckpointError, match=r"got 9 \(in .*: 1, 2, 3, 4\); a run keeps the last checkpoint.keep"
    ):
        export(made("cut"), tmp_path / "out", 9, merges=False)
    with pytest.raises(CheckpointError, match="a run's folder must hold results"):
        export(tmp_path / "nothing", tmp_path / "out", merges=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(ConfigError, match="OUT must be a new or empty folder"):
        export(made("cut"), tmp_path / "out", merges=False)


def test_a_run_without_checkpoints_says_what_to_do(tmp_path):
    run_file = support.make_run_file(tmp_path)
    launch.run(
        run_file,
        ["checkpoint.every=0", "federation.num_rounds=1", "initiating.rounds=0"],
        tmp_path / "r",
        False,
    )
    with pytest.raises(CheckpointError, match=r"adapter/ is that of its last round; checkpoint\.every = 1"):
        export(tmp_path / "r", tmp_path / "out", merges=False)


def test_the_card_is_what_the_hub_reads(made, tmp_path):
    out = tmp_path / "topics"
    export(made("cut"), out, 3, merges=False)
    card = ModelCard.load(out / "README.md")
    results = read_results(made("cut"))
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-classification")
    assert {"federated-learning", "lora", "sa-fedlora"} <= set(card.data.tags)
    assert card.data.base_model is None  # a folder is nobody else's
    by_type = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert by_type["accuracy"] == pytest.approx(results.rounds["eval_accuracy"][2], abs=1e-4)
    assert by_type["f1"] == pytest.approx(results.rounds["eval_macro_f1"][2], abs=1e-4)
    assert f"| accuracy | {results.rounds['eval_accuracy'][2]:.4f} |" in card.text
    assert "| rounds | 3, the last in stage annealing |" in card.text
    assert Path(out / "run.toml").is_file()


OWN_TASK = """
import numpy as np
from mpifedlora.core.metrics import Metrics
from mpifedlora.training.task import TextTask

class Length(TextTask):
    statistics = ("error",)
    metric_names = ("rmse",)

    def encode(self, columns, labels):
        lengths = np.array([len(text) for text in columns["text"]], np.float32)
        return self.encode_texts(columns["text"], {"labels": lengths})

    def loss(self, outputs, targets):
        return (outputs[:, 0].float() - targets / 50).square().mean()

    def measure(self, model, inputs, targets):
        return (model(inputs).float() - targets[:, None] / 50).cpu()

    def metrics(self, statistics, examples):
        mean_square = float((statistics.astype(float) ** 2).mean())
        return Metrics(loss=mean_square, others={"rmse": 50 * mean_square**0.5})

def build(setup):
    task = Length(setup.tokenizer(), setup.max_length, setup.device, setup.cache)
    return setup.classifier(num_outputs=1), task
"""


def test_a_task_of_ones_own(tmp_path):
    run_file = support.make_run_file(tmp_path)
    (tmp_path / "length.py").write_text(OWN_TASK)
    settings = [f"task.name={tmp_path}/length.py:build", "data.partition=iid", "federation.num_rounds=2"]
    assert launch.run(run_file, settings, tmp_path / "run", False) == 0
    for merges in (False, True):
        out = tmp_path / f"out-{merges}"
        export(tmp_path / "run", out, merges=merges)
        card = ModelCard.load(out / "README.md")
        assert card.data.pipeline_tag is None
        assert f"| rmse | {read_results(tmp_path / 'run').rounds['eval_metrics'][1, 0]:.4f} |" in card.text
    batch = support.make_batch()
    merged = run_card(tmp_path / "out-True", batch)["logits"]
    with torch.no_grad():
        wanted = run_card(tmp_path / "out-False", None)["model"](**batch).logits
    torch.testing.assert_close(merged, wanted, rtol=0, atol=1e-5)
