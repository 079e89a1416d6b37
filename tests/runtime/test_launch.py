"""Runs as users start them: real processes, real kills, real bad input."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import support
import torch
from safetensors.torch import load_file

from mpifedlora.core.privacy import spent_epsilon
from mpifedlora.errors import AdapterError, ConfigError, DataError, MpiFedLoraError
from mpifedlora.io.results import read_results
from mpifedlora.runtime import launch, worker

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "mpifedlora"]
# Without checkpoints, nobody needs an older state of a client.
TWO_WITHOUT_CHECKPOINTS = ("federation.num_rounds=2", "checkpoint.every=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("launch")
    support.make_run_file(made)
    return made


def run(folder, out, *settings, overwrite=False):
    return launch.run(folder / "run.toml", settings, out, overwrite)


def start(folder, out, *settings, processes=0, env=None, **options):
    command = [*PROGRAM, "run", str(folder / "run.toml"), "--out", str(out)]
    command += [part for setting in settings for part in ("--set", setting)]
    return spawn(command, processes, env, **options)


def spawn(command, processes=0, env=None, **options):
    if processes:
        mpirun = ["mpirun", "-n", str(processes)]
        command = ["bash", "-c", '. tests/mpi_env.sh && exec "$0" "$@"', *mpirun, *command]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


def finish(process, seconds=120):
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"the run must end within {seconds} s, and did not:\n{output}")
    return process.returncode, output


def test_leaves_results_adapter_and_run_file(folder, tmp_path, capsys):
    out = tmp_path / "deep" / "run"
    assert run(folder, out) == 0
    assert file_names(out) == ["adapter", "checkpoints", "results.h5", "run.toml"]
    results = read_results(out / "results.h5")
    assert results.status == "finished"
    info = results.info
    assert (info.collect, info.gpu_buffers) == ("handed over", "none")
    assert (info.uplink_dtype, info.downlink_dtype) == ("float32", "float32")
    assert results.rounds["round_num"].tolist() == [1, 2, 3, 4]
    assert (np.diff(results.rounds["uplink_bytes"]) <= 0).all()
    assert results.rounds["uplink_bytes"][-1] < results.rounds["uplink_bytes"][0]
    assert not np.isnan(results.rounds["eval_accuracy"]).any()
    printed = capsys.readouterr().out
    assert printed.count("round ") >= 4
    assert "less sent" in printed
    assert "updates are handed over in memory; ready " in printed


def test_wire_dtypes_are_told_and_send_less(folder, tmp_path, capsys):
    dtypes = ("transport.uplink_dtype=int8", "transport.downlink_dtype=bfloat16")
    assert run(folder, tmp_path / "run", "federation.method=fedit", *dtypes, "federation.num_rounds=2") == 0
    results = read_results(tmp_path / "run" / "results.h5")
    assert (results.info.uplink_dtype, results.info.downlink_dtype) == ("int8", "bfloat16")
    assert ", as int8 up and bfloat16 down; ready " in capsys.readouterr().out
    # Rank 4: 8 scales and 256 values in 8 modules, 8 and 384 in 4; a head of 3 rows of 32 and 3 values.
    up = 8 * (8 * 4 + 256) + 4 * (8 * 4 + 384) + (3 * 4 + 96) + (4 + 3)
    values = 8 * 256 + 4 * 384 + 99
    assert results.rounds["uplink_bytes"].tolist() == [4 * (128 + up)] * 2
    assert results.rounds["downlink_bytes"].tolist() == [4 * (128 + 96), 4 * (128 + 96 + 2 * values)]


@pytest.mark.parametrize("uplink", ["int8", "float32"])
def test_error_feedback_keeps_what_the_clients_have_lost(folder, tmp_path, uplink):
    out = tmp_path / "run"
    settings = (f"transport.uplink_dtype={uplink}", "transport.downlink_dtype=int8")
    feedback = ("federation.method=fedit", "transport.error_feedback=true", *TWO_WITHOUT_CHECKPOINTS)
    assert run(folder, out, *feedback, *settings) == 0
    kept = [f"client-{client:05d}.round-00002.safetensors" for client in range(4)]
    if uplink == "float32":  # then only the server has lost anything
        assert not (out / "client_states").exists()
    else:
        assert file_names(out / "client_states") == kept
        assert set(load_file(out / "client_states" / kept[0])) == {"lost"}


def test_training_learns(folder, tmp_path):
    settings = ("federation.num_rounds=8", "training.local_steps=10", "data.alpha=100")
    run(folder, tmp_path / "r", *settings)
    accuracy = read_results(tmp_path / "r" / "results.h5").rounds["eval_accuracy"]
    assert accuracy[-1] > 0.7


def test_run_file_left_behind_repeats_the_run(folder, tmp_path):
    run(folder, tmp_path / "a", "federation.method=fedit", "annealing.schedule=cosine")
    assert launch.run(tmp_path / "a" / "run.toml", [], tmp_path / "b", False) == 0
    files = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_a_folder_with_a_run_is_refused_unless_overwritten(folder, tmp_path):
    out = tmp_path / "run"
    run(folder, out, "federation.num_rounds=1", "initiating.rounds=0")
    before = (out / "results.h5").read_bytes()
    with pytest.raises(ConfigError, match="or --overwrite"):
        run(folder, out)
    assert (out / "results.h5").read_bytes() == before
    fedavg = ("federation.method=fedavg", "federation.num_rounds=1")
    assert run(folder, out, *fedavg, overwrite=True) == 0
    assert file_names(out) == ["base_model", "checkpoints", "results.h5", "run.toml"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (["lora.rank_mx=3"], ConfigError, "rank_max"),
        (["training.batch_size=0"], ConfigError, "batch_size must be at least 1, got 0"),
        (["lora.rank_min=9"], ConfigError, "rank_min must be at most rank_max"),
        (["data.source=./nothing.csv"], DataError, "nothing.csv"),
        (["data.label_column=colour"], DataError, "label_column must name a column, got 'colour'"),
        (["model.name=./nowhere"], AdapterError, "must be a model folder that exists"),
        (['lora.target_modules=["querry"]'], AdapterError, 'did you mean "query"'),
        (["lora.target_modules=.*attn.*"], AdapterError, "must match linear layers"),
        (['lora.modules_to_save=["clasifier"]'], AdapterError, "modules_to_save"),
        (["federation.cohort_size=5"], ConfigError, "cohort_size must be at most num_clients"),
        (["evaluation.split=validation"], ConfigError, "needs a validation part"),
        (["federation.num_clients=100000"], DataError, "clients"),
        (
            ["transport.chunk_bytes=1535"],  # 4 * (32 + 64) values of 4 bytes
            ConfigError,
            r"chunk_bytes must hold the largest module's A and B, 1536 bytes .*, got 1535; raise it",
        ),
        (["transport.collect=reduce"], ConfigError, "needs federation.reproducible = false"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_error_and_leaves_nothing(folder, tmp_path, settings, error, message):
    out = tmp_path / "run"
    with pytest.raises(error, match=message.replace("(", r"\(")) as caught:
        run(folder, out, *settings)
    assert isinstance(caught.value, MpiFedLoraError)
    assert not out.exists()


def test_model_folder_without_weights(folder, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(AdapterError, match="must hold weights"):
        run(folder, tmp_path / "run", f"model.name={tmp_path / 'model'}")


@pytest.mark.parametrize("place", ["file/run", "/proc/run"])
def test_out_that_cannot_be_written(folder, tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out must be"):
        run(folder, tmp_path / place)


def test_more_clients_than_examples_are_told_once(folder, tmp_path, capsys):
    settings = [
        "data.alpha=0.01",
        "federation.num_clients=12",
        "federation.num_rounds=1",
        "initiating.rounds=0",
    ]
    assert run(folder, tmp_path / "run", *settings) == 0
    results = read_results(tmp_path / "run" / "results.h5")
    without = np.flatnonzero(results.info.label_table.sum(axis=1) == 0)
    assert len(without)
    assert not results.clients["participated"][:, without].any()
    assert capsys.readouterr().out.count("have no examples") == 1


def test_a_diverging_client_is_left_out_and_named(folder, tmp_path, capsys):
    settings = [
        "training.learning_rate=1e30",
        "training.learning_rate_schedule=constant",
        "training.optimizer=sgd",
        "faults.max_failures=9",
    ]
    assert run(folder, tmp_path / "run", *settings, "training.grad_clip=0") == 0
    results = read_results(tmp_path / "run" / "results.h5")
    assert results.rounds["num_participants"].min() == 0
    assert set(results.clients["outcome"][results.rounds["num_participants"] == 0].flat) == {"not finite"}
    assert "is not finite and was left out" in capsys.readouterr().out


# one client that sends something else


def spoil(monkeypatch, client_id, round_num, change):
    """Let one client of one round send something else than it has trained."""
    train_client = worker.train_client

    def spoiled(model, task, examples, settings, plan, its_id, values, memory, is_late):
        result = train_client(model, task, examples, settings, plan, its_id, values, memory, is_late)
        if (its_id, plan.round_num) != (client_id, round_num):
            return result
        change(values, result.memory)
        return replace(result, is_finite=bool(values.isfinite().all()))

    monkeypatch.setattr(worker, "train_client", spoiled)


def fill_with_nan(values, memory):
    for tensor in (values, *memory.values()):
        tensor.fill_(np.nan)


def outcomes_but(round_num, client_id, outcome, num_rounds=4):
    table = np.full((num_rounds, 4), "used", dtype="U16")
    table[round_num - 1, client_id] = outcome
    return table.tolist()


@pytest.mark.parametrize("method", ["sa-fedlora", "fedsa-lora", "fedavg"])
def test_a_client_whose_values_are_no_numbers_is_left_out_of_its_round_alone(
    folder, tmp_path, capsys, monkeypatch, method
):
    spoil(monkeypatch, 1, 2, fill_with_nan)
    assert run(folder, tmp_path / "run", f"federation.method={method}") == 0
    results = read_results(tmp_path / "run" / "results.h5")
    assert results.clients["outcome"].tolist() == outcomes_but(2, 1, "not finite")
    assert results.rounds["num_participants"].tolist() == [4, 3, 4, 4]
    assert results.clients["participated"].sum(axis=1).tolist() == [4, 3, 4, 4]
    assert np.isnan(results.clients["train_loss"]).sum() == 1
    assert np.isfinite(results.rounds["train_loss"]).all()
    assert np.isfinite(results.rounds["eval_loss"]).all()
    printed = capsys.readouterr().out
    assert printed.count("warning:") == 1
    assert "warning: round 2: the update of client 1 is not finite and was left out" in printed


def test_an_update_above_the_bound_is_left_out_of_its_round_alone(folder, tmp_path, capsys, monkeypatch):
    spoil(monkeypatch, 2, 3, lambda values, memory: values.mul_(1e3))
    assert run(folder, tmp_path / "run", "aggregation.norm_bound=100") == 0
    results = read_results(tmp_path / "run" / "results.h5")
    assert results.clients["outcome"].tolist() == outcomes_but(3, 2, "above bound")
    assert results.clients["num_examples"][2].tolist()[2] == 0
    printed = capsys.readouterr().out
    assert "warning: round 3: the update of client 2 is above aggregation.norm_bound" in printed


def test_where_all_updates_are_refused_the_model_stays(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "run", "aggregation.norm_bound=1e-9") == 0
    results = read_results(tmp_path / "run" / "results.h5")
    assert set(results.clients["outcome"].flat) == {"above bound"}
    assert not results.clients["participated"].any()
    assert results.rounds["num_participants"].tolist() == [0, 0, 0, 0]
    assert np.isnan(results.rounds["train_loss"]).all()
    for measured in ("eval_accuracy", "eval_loss", "eval_macro_f1"):
        assert len(set(results.rounds[measured])) == 1
    assert results.rounds["module_ranks"][:, 0].tolist() == [4, 3, 2, 1]  # planned cuts are made
    printed = capsys.readouterr().out
    assert printed.count("is above aggregation.norm_bound and was left out") == 16
    for round_num in (1, 2, 3, 4):
        assert f"warning: round {round_num}: no update could be used" in printed


def test_krum_says_whom_it_has_not_chosen(folder, tmp_path, monkeypatch):
    spoil(monkeypatch, 0, 2, lambda values, memory: values.add_(10))
    settings = ("aggregation.robust=multi-krum", "aggregation.num_byzantine=0", "federation.num_rounds=2")
    assert run(folder, tmp_path / "run", *settings) == 0
    outcome = read_results(tmp_path / "run" / "results.h5").clients["outcome"]
    # Of four updates two are kept in each round, and never the spoiled one.
    assert [sorted(row) for row in outcome.tolist()] == [["not chosen"] * 2 + ["used"] * 2] * 2
    assert outcome[1, 0] == "not chosen"


# what clients keep


def last_used(results):
    """By client id, the last round whose update was used; 0 for none."""
    used = results.clients["outcome"] == "used"
    rounds = results.rounds["round_num"][:, None] * used
    return rounds.max(axis=0).tolist()


def file_names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("measured_on", ["server", "workers"])
def test_personal_runs_leave_what_each_client_has_kept_last(folder, tmp_path, capsys, measured_on):
    out = tmp_path / "run"
    settings = ("federation.method=fedsa-lora", "federation.cohort_size=2", "federation.num_rounds=3")
    assert run(folder, out, *settings, "checkpoint.every=0", f"evaluation.on={measured_on}") == 0
    results = read_results(out / "results.h5")
    assert (results.info.eval_model, results.info.is_private, results.info.reproducible) == (
        "personal",
        False,
        True,
    )
    last = last_used(results)
    # Six places for four clients: some have trained twice, and their first version is gone.
    assert (results.clients["outcome"] == "used").sum(axis=1).tolist() == [2, 2, 2]
    assert set(results.clients["outcome"].flat) == {"used", "absent"}
    kept = [(client, round_num) for client, round_num in enumerate(last) if round_num]
    assert file_names(out / "client_states") == [
        f"client-{client:05d}.round-{round_num:05d}.safetensors" for client, round_num in kept
    ]
    assert file_names(out / "client_adapters") == [f"client-{client:05d}" for client, _ in kept]
    for name in file_names(out / "client_adapters"):
        assert file_names(out / "client_adapters" / name) == [
            "adapter_config.json",
            "adapter_model.safetensors",
        ]
    assert file_names(out) == ["client_adapters", "client_states", "results.h5", "run.toml"]
    assert np.isnan(results.rounds["aggregation_error"]).all()
    assert "client_adapters" in capsys.readouterr().out


def test_personal_models_measure_alike_on_server_and_workers(folder, tmp_path):
    rounds = []
    for place in ("server", "workers"):
        settings = ("federation.method=fedsa-lora", "federation.num_rounds=2", f"evaluation.on={place}")
        run(folder, tmp_path / place, *settings)
        rounds.append(read_results(tmp_path / place / "results.h5").rounds)
    for measured in ("eval_accuracy", "eval_loss", "eval_macro_f1"):
        assert rounds[0][measured].tolist() == rounds[1][measured].tolist()


def test_a_refused_client_goes_on_from_the_state_that_was_committed(folder, tmp_path, monkeypatch):
    spoil(monkeypatch, 1, 2, fill_with_nan)
    out = tmp_path / "run"
    assert run(folder, out, "federation.method=fedsa-lora", *TWO_WITHOUT_CHECKPOINTS) == 0
    assert last_used(read_results(out / "results.h5")) == [2, 1, 2, 2]
    # What the refused update came with is gone, the state before it is not.
    assert file_names(out / "client_states") == [
        f"client-{client:05d}.round-{round_num:05d}.safetensors"
        for client, round_num in enumerate([2, 1, 2, 2])
    ]
    committed = load_file(out / "client_states" / "client-00001.round-00001.safetensors")
    exported = load_file(out / "client_adapters" / "client-00001" / "adapter_model.safetensors")
    modules = read_results(out / "results.h5").info.module_names
    own_b = [exported[f"base_model.model.{name}.lora_B.weight"].reshape(-1) for name in modules]
    assert torch.equal(torch.cat(own_b), committed["personal"])


def test_scaffold_commits_one_variate_a_client(folder, tmp_path):
    out = tmp_path / "run"
    assert run(folder, out, "federation.method=scaffold", *TWO_WITHOUT_CHECKPOINTS) == 0
    names = [f"client-{client:05d}.round-00002.safetensors" for client in range(4)]
    assert file_names(out / "client_states") == names
    assert set(load_file(out / "client_states" / names[0])) == {"variate"}
    assert file_names(out) == ["base_model", "client_states", "results.h5", "run.toml"]


def test_a_new_run_takes_away_what_the_clients_of_the_old_one_kept(folder, tmp_path):
    out, short = tmp_path / "run", ("federation.num_rounds=1", "initiating.rounds=0")
    run(folder, out, "federation.method=fedsa-lora", *short)
    assert run(folder, out, *short, overwrite=True) == 0
    assert file_names(out) == ["adapter", "checkpoints", "results.h5", "run.toml"]
    assert len(file_names(out / "checkpoints")) == 1


# privacy


DP = (
    "federation.method=ffa-lora",
    "federation.num_rounds=2",
    "privacy.clip_norm=0.5",
    "privacy.noise_multiplier=1.0",
    "aggregation.weights=equal",
    "federation.sampling=poisson",
    "federation.cohort_size=2",
)


def test_a_private_run_tells_what_it_has_spent_and_claims_no_reproducibility(folder, tmp_path, capsys):
    pytest.importorskip("dp_accounting")
    assert run(folder, tmp_path / "run", *DP) == 0
    results = read_results(tmp_path / "run" / "results.h5")
    epsilon = results.rounds["epsilon"]
    assert np.isfinite(epsilon).all()
    assert (np.diff(epsilon) > 0).all()
    assert epsilon[0] > 0
    assert epsilon[-1] == pytest.approx(spent_epsilon(2, 0.5, 1.0, 1e-5))
    assert (results.info.is_private, results.info.reproducible) == (True, False)
    printed = capsys.readouterr().out
    assert "come from the system's entropy" in printed
    assert "devices or threads differ" not in printed


def test_a_fixed_noise_seed_repeats_the_bits_and_is_not_private(folder, tmp_path, capsys):
    pytest.importorskip("dp_accounting")
    for name in "ab":
        assert run(folder, tmp_path / name, *DP, "privacy.noise_seed=3") == 0
    first, again = (read_results(tmp_path / name / "results.h5") for name in "ab")
    assert (first.info.is_private, first.info.reproducible) == (False, True)
    assert "this run is not private" in capsys.readouterr().out
    files = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
    for name in ("train_loss", "eval_loss", "epsilon", "uplink_bytes", "num_participants"):
        np.testing.assert_array_equal(first.rounds[name], again.rounds[name])
    assert first.clients["outcome"].tolist() == again.clients["outcome"].tolist()


def test_a_missing_accountant_is_told_before_anything_is_trained(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match="dp-accounting"):
        run(folder, tmp_path / "run", *DP)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "epsilon"),
    [(("federation.method=ffa-lora", *DP[2:3], *DP[4:5]), np.inf), (("federation.method=ffa-lora",), np.nan)],
    ids=["clipped", "neither"],
)
def test_without_noise_nothing_is_private(folder, tmp_path, settings, epsilon):
    pytest.importorskip("dp_accounting")
    run(folder, tmp_path / "run", *settings, "federation.num_rounds=1")
    results = read_results(tmp_path / "run" / "results.h5")
    np.testing.assert_array_equal(results.rounds["epsilon"], [epsilon])
    assert (results.info.is_private, results.info.reproducible) == (False, True)


def test_a_round_without_any_client_is_told_and_changes_nothing(folder, tmp_path, capsys):
    settings = (
        "federation.method=fedit",
        "federation.sampling=poisson",
        "federation.cohort_size=1",
        "federation.num_rounds=10",
        "training.local_steps=1",
    )
    assert run(folder, tmp_path / "run", *settings) == 0
    results = read_results(tmp_path / "run" / "results.h5")
    empty = np.flatnonzero(results.rounds["num_participants"] == 0)
    assert 0 < len(empty) < 10
    assert set(results.clients["outcome"][empty].flat) == {"absent"}
    assert not results.rounds["uplink_bytes"][empty].any()
    assert not results.rounds["downlink_bytes"][empty].any()
    later = [number for number in empty if number]
    assert results.rounds["eval_loss"][later].tolist() == [
        results.rounds["eval_loss"][number - 1] for number in later
    ]
    printed = capsys.readouterr().out
    for number in empty:
        assert (
            f"warning: round {number + 1}: no client took part; the global state stays as it was" in printed
        )


@pytest.mark.slow
def test_bad_input_under_mpirun_is_told_once(folder, tmp_path):
    code, output = finish(start(folder, tmp_path / "run", "lora.rank_mx=3", processes=3))
    assert code != 0
    assert output.count("error:") == 1
    assert "rank_max" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "setting", ["lora.rank_mx=3", "data.source=./none.csv", 'lora.target_modules=["querry"]']
)
def test_bad_input_is_told_before_torch_is_loaded(folder, tmp_path, setting):
    # Loading it takes seconds in every process; the answer must not.
    arguments = ["run", str(folder / "run.toml"), "--out", str(tmp_path / "run"), "--set", setting]
    command = [sys.executable, "-X", "importtime", "-m", "mpifedlora", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "error: " in done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "transformers", "peft", "mpi4py.MPI"}


# Training fails, and only there.
FAILING = """
from mpifedlora.training.tasks import classification

def build(setup):
    base, task = classification(setup)
    task.loss = None
    return base, task
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 3])
def test_where_all_clients_fail_the_job_ends_and_says_why(tmp_path, processes):
    (tmp_path / "failing.py").write_text(FAILING)
    support.make_run_file(tmp_path)
    settings = ["task.name=failing.py:build", "data.label_column=label"]
    code, output = finish(start(tmp_path, tmp_path / "run", *settings, processes=processes))
    assert code == 1, output
    assert "failed in round 1 on client " in output
    assert "failed in round 3 on client " in output
    assert "3 failures in a row" in output


# Several federations in one launch, each on a communicator of its own.
MONITORED = """
import json, sys
from pathlib import Path
from mpi4py import MPI
from mpifedlora.runtime import launch
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
for name, settings in json.loads(sys.argv[3]).items():
    settings = [*settings, "federation.num_rounds=2"]
    assert launch.run(folder / "run.toml", settings, out / name, False, comm=MPI.COMM_WORLD) == 0
"""
PARTS = "transport.chunk_bytes=1536"
COUNTED = {
    "in parts": [PARTS],
    "measured on workers": [PARTS, "evaluation.on=workers", "transport.uplink_dtype=int8"],
    "more to send": ["federation.method=fedavg", "federation.cohort_size=3", "transport.chunk_bytes=1"],
    "whole": ["transport.pipeline=false"],
    "summed": [
        "federation.method=fedit",
        "federation.reproducible=false",
        "transport.collect=reduce",
        "transport.reduce_dtype=float64",
    ],
}


@pytest.mark.slow
def test_open_mpi_counts_the_same_bytes(folder, tmp_path):
    """The bytes of every kind of collect against the MPI library's own monitoring of its collectives."""
    started = time.monotonic()
    env = {
        "OMPI_MCA_pml_monitoring_enable": "2",
        "OMPI_MCA_pml_monitoring_enable_output": "3",
        "OMPI_MCA_pml_monitoring_filename": str(tmp_path / "monitor"),
    }
    command = [sys.executable, "-c", MONITORED, str(folder), str(tmp_path), json.dumps(COUNTED)]
    code, output = finish(spawn(command, 3, env), seconds=240)
    assert code == 0, output
    infos = [read_results(tmp_path / name / "results.h5").info for name in COUNTED]
    kinds = ["gather in parts"] * 3 + ["gather", "reduce"]
    assert [info.collect for info in infos] == kinds
    # Counted from mpirun's start.
    assert 0.5 < infos[0].startup_s < infos[-1].startup_s < time.monotonic() - started + 0.1
    if not (tmp_path / "monitor.0.prof").exists():
        pytest.skip("needs Open MPI's monitoring component")
    text = (tmp_path / "monitor.0.prof").read_text()
    pattern = r"MPI COMM (\d+) DUP FROM .*\nO2A\t0\t(\d+) bytes.*\nA2O\t0\t(\d+) bytes"
    counted = sorted(tuple(map(int, found)) for found in re.findall(pattern, text))
    counted = [found for found in counted if any(found[1:])]  # signs of life go from one to another
    ours = [read_results(tmp_path / name / "results.h5").rounds["mpi_bytes"].sum() for name in COUNTED]
    assert [one_to_all + all_to_one for _, one_to_all, all_to_one in counted] == ours


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 3])
def test_killed_by_sigkill_leaves_its_finished_rounds(folder, tmp_path, processes):
    out = tmp_path / "run"
    process = start(folder, out, "federation.num_rounds=100000", processes=processes)
    deadline = time.monotonic() + 100
    rounds = 0
    while rounds < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
        if (out / "results.h5").exists():
            with h5py.File(out / "results.h5") as file:
                rounds = len(file["rounds/round_num"])
    os.killpg(process.pid, signal.SIGKILL)
    if processes:  # mpirun gives each process a group of its own
        subprocess.run(["pkill", "-KILL", "-f", str(out)], check=False)
    process.communicate()
    with h5py.File(out / "results.h5") as file:
        finished = file["rounds/round_num"][:]
        assert file.attrs["status"] == "running"
    assert len(finished) >= 3
    np.testing.assert_array_equal(finished, np.arange(1, len(finished) + 1))


@pytest.mark.slow
def test_a_disk_that_fills_up_is_named_and_harms_nothing(folder, tmp_path):
    out = tmp_path / "run"
    assert run(folder, out) == 0
    size = (out / "results.h5").stat().st_size
    other = tmp_path / "other"

    def limit():  # what a full disk does to a file that grows
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 2048, size + 2048))

    code, output = finish(start(folder, other, "federation.num_rounds=60", preexec_fn=limit))
    assert code == 1
    for kind in ("results", "checkpoints"):  # with its moments, a checkpoint is too large as well
        assert output.count(f"warning: {kind} must be writable") == 1
    results = read_results(other / "results.h5")
    assert 3 < len(results.rounds["round_num"]) < 60
    assert "round 60/60" in output


def test_tasks_of_srun_that_do_not_see_each_other_are_refused(folder, tmp_path):
    for task in ("0", "1"):
        env = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": task}
        code, output = finish(start(folder, tmp_path / "run", env=env))
        assert code == 2
        assert ("must form one MPI job" in output) == (task == "0")
        assert ("mpirun" in output) == (task == "0")
    assert not (tmp_path / "run").exists()
