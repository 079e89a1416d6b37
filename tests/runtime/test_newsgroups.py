"""The demo's run file on real weights and real data, in small, over real MPI and in one process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mpifedlora.io import data_fetch
from mpifedlora.io.results import read_results
from mpifedlora.runtime.data import read_data
from mpifedlora.transport.inprocess import Alone

ROOT = Path(__file__).parents[2]
SMALL = [
    "federation.num_clients=4",
    "federation.num_rounds=3",
    "initiating.rounds=1",
    "annealing.heating_rounds=0",
    "training.local_steps=2",
    "training.batch_size=8",
    "evaluation.max_examples=100",
    "evaluation.every=3",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(
            entry.present for entry in data_fetch.available() if entry.name in ("20newsgroups", "minilm")
        ),
        reason="needs real data and weights: mpifedlora data fetch 20newsgroups minilm",
    ),
]


def federate(out, launcher, *settings):
    command = [
        *launcher,
        sys.executable,
        "-m",
        "mpifedlora",
        "run",
        "examples/newsgroups.toml",
        "--out",
        str(out),
    ]
    command += [part for setting in (*SMALL, *settings) for part in ("--set", setting)]
    shell = ["bash", "-c", '. tests/mpi_env.sh && exec "$@"', "run", *command]
    subprocess.run(shell, cwd=ROOT, check=True, timeout=280, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return read_results(out / "results.h5")


def test_one_process_and_five_give_the_same_bits_and_fewer_bytes(tmp_path):
    alone = federate(tmp_path / "alone", [])
    together = federate(tmp_path / "together", ["mpirun", "-n", "5"])
    assert together.info.num_workers == 4
    for name in (
        "train_loss",
        "eval_accuracy",
        "eval_loss",
        "aggregation_error",
        "uplink_bytes",
        "downlink_bytes",
    ):
        assert alone.rounds[name].tobytes() == together.rounds[name].tobytes(), name
    files = [
        (tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes()
        for run in ("alone", "together")
    ]
    assert files[0] == files[1]
    assert (np.diff(together.rounds["uplink_bytes"]) < 0).sum() == 2
    assert together.rounds["module_ranks"].max() == 16
    assert together.rounds["module_ranks"].min() == 2


def test_readme_recipe_gives_the_logits_of_the_federated_model(tmp_path):
    import torch
    from peft import PeftModel

    from mpifedlora import load_base_model
    from mpifedlora.io.run_file import read_run_file
    from mpifedlora.runtime import setup
    from mpifedlora.training.tasks import load_tokenizer

    out = tmp_path / "run"
    results = federate(out, [], "annealing.cut=freeze")
    model = PeftModel.from_pretrained(load_base_model(out), str(out / "adapter")).eval()
    config = read_run_file(out / "run.toml").config
    tokenizer = load_tokenizer(setup.model_path("minilm"))
    replica = setup.build_replica(config, read_data(config, Alone()), "cpu", out / "client_states")
    texts = list(replica.evaluation.raw.texts)
    batch = tokenizer(
        texts, truncation=True, max_length=config.data.max_length, padding=True, return_tensors="pt"
    )
    with torch.inference_mode():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = torch.from_numpy(replica.evaluation.raw.labels)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert accuracy == pytest.approx(results.rounds["eval_accuracy"][-1])
    assert loss == pytest.approx(results.rounds["eval_loss"][-1], abs=1e-5)


def test_one_full_round_of_forty_sends_less_than_the_paper_claims(tmp_path):
    settings = ["federation.num_clients=2", "federation.num_rounds=40", "initiating.scope=full"]
    settings += ["training.local_steps=1", "training.batch_size=1", "evaluation.every=40"]
    settings += ["annealing.heating_rounds=2"]
    results = federate(tmp_path / "run", [], *settings)
    assert results.rounds["stage"].tolist().count("initiating") == 1
    assert results.rounds["module_ranks"][:2].max(axis=1).tolist() == [0, 16]
    assert results.baselines.reduction_vs_full_model >= 0.9362
