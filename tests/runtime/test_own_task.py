"""A task of a user's own in a whole run: the example, and the one that docs/tasks.md shows."""

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import support
import torch

from mpifedlora.errors import CheckpointError, ConfigError
from mpifedlora.io.results import read_results
from mpifedlora.io.task_files import load_builder
from mpifedlora.runtime import launch
from mpifedlora.runtime.loading import load_base_model

ROOT = Path(__file__).parents[2]
SHORT = ["federation.num_rounds=3", "initiating.rounds=1", "annealing.heating_rounds=1"]


@pytest.fixture(scope="module")
def folder(tiny_folder, tiny_run_file):
    return tiny_folder


@pytest.fixture(scope="module")
def example_run(folder):
    (folder / "topics.py").write_text((ROOT / "examples" / "own_task.py").read_text())
    settings = [*SHORT, "task.name=topics.py:build", "data.label_column=label", "task.options={gamma = 1.0}"]
    assert launch.run(folder / "run.toml", settings, folder / "own-task", True) == 0
    return folder / "own-task"


def test_the_example_trains_with_its_loss_and_its_metric_is_in_the_results(example_run):
    results = read_results(example_run / "results.h5")
    assert results.info.metric_names == ("top3_accuracy",)
    top3 = results.rounds["eval_metrics"][:, 0]
    assert (top3 == 1.0).all()  # of three labels
    assert (results.rounds["eval_accuracy"] < 1).any()


def test_the_loss_of_the_example_is_the_focal_loss():
    build = load_builder(f"{ROOT}/examples/own_task.py:build", None)
    focal = build.__globals__["FocalTopics"].loss(
        SimpleNamespace(gamma=2.0), torch.zeros(2, 4), torch.tensor([1, 3])
    )
    assert focal.item() == pytest.approx((1 - 0.25) ** 2 * np.log(4))


def test_its_file_is_part_of_the_record_and_may_not_change(example_run, folder):
    config = json.loads(read_results(example_run / "results.h5").info.config)
    assert config["task"]["options"] == {"gamma": 1.0}
    assert len(config["task"]["sha256"]) == 64
    load_base_model(example_run)
    content = (folder / "topics.py").read_text()
    (folder / "topics.py").write_text(content + "\n")
    try:
        with pytest.raises(ConfigError, match="the file has changed since the run"):
            launch.run(None, [], example_run, False, resumes=True)
        settings = [*SHORT, "task.name=topics.py:build", "data.label_column=label"]
        settings += ["task.options={gamma = 1.0}", "federation.num_rounds=4"]
        with pytest.raises(CheckpointError, match=r"task\.sha256 was"):
            launch.run(folder / "run.toml", settings, example_run, False, resumes=True)
        with pytest.raises(ConfigError, match="the file has changed since the run"):
            load_base_model(example_run)
    finally:
        (folder / "topics.py").write_text(content)


def test_the_documented_task_learns_a_number(folder):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tasks.md").read_text(), re.DOTALL)
    (folder / "mytask.py").write_text(blocks[0])
    draw = random.Random(3)
    with (folder / "houses.jsonl").open("w") as file:
        for _ in range(96):
            words = draw.choices(support.WORDS, k=6)
            price = 100 * sum(word in support.WORDS[:60] for word in words)
            file.write(json.dumps({"text": " ".join(words), "price": price}) + "\n")
    settings = [*SHORT, "task.name=mytask.py:build", "task.options={scale = 100.0}"]
    settings += [f"data.source={folder}/houses.jsonl", 'data.columns=["text", "price"]']
    settings += ["data.partition=iid", "training.local_steps=8", "evaluation.on=workers"]
    assert launch.run(folder / "run.toml", settings, folder / "houses", True) == 0
    results = read_results(folder / "houses" / "results.h5")
    assert results.info.label_names == ("unlabelled",)
    assert results.info.label_table.sum() == 77  # a fifth is held out
    rmse = results.rounds["eval_metrics"][:, 0]
    assert rmse == pytest.approx(100 * results.rounds["eval_loss"] ** 0.5)
    assert rmse[-1] < rmse[0]
    assert np.isnan(results.rounds["eval_accuracy"]).all()
