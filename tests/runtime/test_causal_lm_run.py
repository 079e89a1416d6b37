"""Instruction tuning in a whole run: the small form of examples/causal_lm.toml."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from mpifedlora.core.seeding import numpy_generator
from mpifedlora.errors import ConfigError
from mpifedlora.io.compare import read_comparison
from mpifedlora.io.results import read_results
from mpifedlora.io.run_file import read_run_file
from mpifedlora.runtime import launch
from mpifedlora.runtime.loading import load_base_model
from mpifedlora.transport.inprocess import Alone

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = [
    "federation.num_rounds=5",
    "data.max_examples=300",
    "training.local_steps=4",
    "evaluation.max_examples=40",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm")
    subprocess.run([sys.executable, EXAMPLES / "make_tiny_lm.py", folder], check=True, capture_output=True)
    return folder


def settings_of(folder, *settings):
    return [f"model.name={folder}/model", f"data.source={folder}/instructions.jsonl", *SMALL, *settings]


@pytest.fixture(scope="module")
def run(folder):
    settings = settings_of(folder, "training.accumulation_steps=2", "training.gradient_checkpointing=true")
    assert (
        launch.run(EXAMPLES / "causal_lm.toml", [*settings, "lora.use_rslora=true"], folder / "run", True)
        == 0
    )
    return folder / "run"


def test_it_learns_and_its_metrics_are_in_the_results(run):
    results = read_results(run / "results.h5")
    assert results.info.metric_names == ("perplexity", "token_accuracy")
    perplexity, token_accuracy = results.rounds["eval_metrics"].T
    assert perplexity == pytest.approx(np.exp(results.rounds["eval_loss"]))
    assert perplexity[-1] < perplexity[0] < 300
    assert ((token_accuracy >= results.rounds["eval_accuracy"]) & (token_accuracy < 1)).all()
    assert results.rounds["module_ranks"][-1].max() < results.rounds["module_ranks"][0].max()


def test_runs_are_compared_by_their_perplexity(run, folder):
    settings = settings_of(folder, "federation.method=fedit", "federation.num_rounds=1")
    assert launch.run(EXAMPLES / "causal_lm.toml", settings, folder / "short", True) == 0
    rounds = read_results(run).rounds
    perplexity = rounds["eval_metrics"][:, 0]
    compared = read_comparison([run, folder / "short"], float(perplexity[2]), metric="perplexity")
    long, short = compared.rows
    assert long.final.mean == perplexity[-1] < short.final.mean
    assert long.rounds_to_target.mean == int((perplexity <= perplexity[2]).argmax()) + 1
    assert (long.num_reached, short.num_reached) == (1, 0)
    assert (long.is_efficient, short.is_efficient) == (True, True)  # the short one has sent less
    assert read_comparison([run]).metric.name == "accuracy"  # exact match


def test_the_loaded_adapter_gives_the_measured_loss(run, folder):
    from mpifedlora.runtime.data import read_data
    from mpifedlora.training.causal_lm import CausalLMTask
    from mpifedlora.training.task import load_tokenizer

    config = read_run_file(run / "run.toml").config
    test = read_data(config, Alone()).dataset.test
    generator = numpy_generator(config.federation.seed, "evaluation")
    chosen = test.take(np.sort(generator.permutation(len(test))[:40]))
    model = PeftModel.from_pretrained(load_base_model(run), run / "adapter").eval()
    task = CausalLMTask(load_tokenizer(str(folder / "model")), config.data.max_length)
    examples = task.encode(chosen.columns, chosen.labels)
    with torch.no_grad():
        inputs, targets = task.collate(examples, np.arange(len(examples)))
        loss = task.loss(model(**inputs).logits, targets)
    assert loss.item() == pytest.approx(read_results(run / "results.h5").rounds["eval_loss"][-1], rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["lora.use_dora=true"], "not linear in B A"),
        (["task.name=classification"], "task.packing"),
    ],
)
def test_what_does_not_go_together_is_refused(folder, settings, message):
    with pytest.raises(ConfigError, match=message):
        read_run_file(EXAMPLES / "causal_lm.toml", settings_of(folder, *settings))


def test_conversations_are_read_from_one_column(folder):
    talk = [{"role": "user", "content": "capitals: ba"}, {"role": "assistant", "content": "BA"}]
    with (folder / "talks.jsonl").open("w") as file:
        file.writelines(json.dumps({"messages": talk, "way": number % 2}) + "\n" for number in range(20))
    settings = settings_of(folder, f"data.source={folder}/talks.jsonl", "data.messages_column=messages")
    from mpifedlora.runtime.data import read_data

    config = read_run_file(EXAMPLES / "causal_lm.toml", [*settings, "data.partition=iid"]).config
    assert json.loads(read_data(config, Alone()).dataset.train.columns["messages"][0]) == talk
