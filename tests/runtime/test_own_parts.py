"""Clients that hold out a part of their own files: measured by their workers, told as metrics alone."""

import json
import math

import federations
import numpy as np
import pytest
import support
from client_folders import CLIENTS, FILES, read_rows, run_watched, write_clients, write_rows

from mpifedlora.errors import ConfigError, DataError
from mpifedlora.io.results import read_results
from mpifedlora.io.run_file import read_run_file
from mpifedlora.runtime import launch, setup
from mpifedlora.runtime.data import read_data
from mpifedlora.transport.inprocess import Alone

SETTINGS = ["federation.num_rounds=2", "data.partition=files", "evaluation.on=workers"]
PERSONAL = ["federation.method=fedsa-lora", "data.validation_fraction=0.25", "evaluation.split=validation"]
MEASURED = ("num_evaluated", "eval_loss", "eval_accuracy", "eval_macro_f1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run file, and `clients/` with a file of 30 examples each."""
    made = tmp_path_factory.mktemp("own")
    support.make_run_file(made)
    write_clients(made / "clients", read_rows(made / "data.csv"))
    return made


def settings(folder, *more):
    return [*SETTINGS, f"data.source={json.dumps(str(folder / 'clients'))}", *more]


def config_of(folder, *more):
    return read_run_file(folder / "run.toml", settings(folder, *more)).config


def data_of(folder, *more):
    return read_data(config_of(folder, *more), Alone())


def run(folder, name, *more):
    assert launch.run(folder / "run.toml", settings(folder, *more), folder / name, False) == 0
    return folder / name


@pytest.fixture(scope="module")
def alone(folder):
    return run(folder, "alone")


@pytest.fixture(scope="module")
def personal(folder):
    return run(folder, "personal", *PERSONAL)


# Who holds out what


def texts_of(data, part):
    return [set(data.own[client_id][part].texts) for client_id in range(len(data.files))]


def test_parts_share_out_each_file_by_label(folder):
    data = data_of(folder, "data.validation_fraction=0.25")
    sizes = [
        tuple(len(parts[name]) for name in ("train", "validation", "test")) for parts in data.own.values()
    ]
    assert sizes == [(18, 6, 6)] * 4
    for client_id, file in enumerate(FILES):
        whole = data.folder.read(file).table
        parts = [data.own[client_id][name] for name in ("train", "validation", "test")]
        assert sorted(text for part in parts for text in part.texts) == sorted(whole.columns["text"])
        for part, counts in zip(
            parts, (data.counts[name] for name in ("train", "validation", "test")), strict=True
        ):
            assert np.bincount(part.labels, minlength=3).tolist() == counts[client_id].tolist()
    assert data.label_table().tolist() == data.counts["train"].tolist()
    assert [len(data.dataset.part(name)) for name in ("train", "validation", "test")] == [0, 0, 0]


def test_what_a_file_holds_out_depends_on_the_seed_and_nothing_else(folder, tmp_path):
    """Neither on the other clients, nor on the labels that they bring."""
    whole = data_of(folder)
    support.make_run_file(tmp_path)
    (tmp_path / "clients").mkdir()
    (tmp_path / "clients" / "zoe.csv").write_bytes((folder / "clients" / "cy.csv").read_bytes())
    write_rows(tmp_path / "clients" / "abe.csv", ("text", "label"), [("x", "aardvarks"), ("y", "zebras")] * 5)
    other = data_of(tmp_path, "federation.num_clients=2")
    assert texts_of(other, "test")[1] == texts_of(whole, "test")[2]
    assert texts_of(data_of(folder), "test") == texts_of(whole, "test")
    assert texts_of(data_of(folder, "federation.seed=1"), "test") != texts_of(whole, "test")


def test_a_file_too_small_holds_nothing_out_and_all_of_them_are_refused(folder, tmp_path):
    support.make_run_file(tmp_path)
    write_clients(tmp_path / "clients", read_rows(folder / "data.csv"))
    write_rows(tmp_path / "clients" / "cy.csv", ("text", "label"), [("a", "food"), ("b", "music")])
    assert data_of(tmp_path).own_parts("test").sizes == [6, 6, 0, 6]
    with pytest.raises(
        DataError, match=r"test_fraction must hold out .* got 0\.01 .*raise data\.test_fraction"
    ):
        data_of(tmp_path, "data.test_fraction=0.01")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("evaluation.on=server", r'needs evaluation\.on = "workers" .* got evaluation\.on = "server"'),
        (
            "annealing.schedule=target",
            r'"target" needs data\.test_source .* sees nothing of what clients hold',
        ),
        ("evaluation.split=validation", r"needs a validation part"),
    ],
)
def test_settings_that_need_a_common_source(folder, setting, message):
    with pytest.raises(ConfigError, match=message):
        config_of(folder, setting)


# What is measured


def test_the_mean_over_clients_is_what_a_common_source_of_their_parts_gives(folder, alone):
    """The same run on two files that all see: who trains on what, and what is held out, are equal."""
    data = data_of(folder)
    for part in ("train", "test"):
        rows = [
            (text, data.dataset.label_names[label], name)
            for name, parts in zip(CLIENTS, data.own.values(), strict=True)
            for text, label in zip(parts[part].texts, parts[part].labels, strict=True)
        ]
        write_rows(folder / f"{part}.csv", ("text", "label", "owner"), rows)
    common = run(
        folder,
        "common",
        "data.partition=column",
        "data.partition_column=owner",
        f"data.source={folder / 'train.csv'}",
        f"data.test_source={folder / 'test.csv'}",
    )
    found, wanted = read_results(alone).rounds, read_results(common).rounds
    for name in ("eval_loss", "eval_accuracy"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-5)
    differing = {"eval_loss", "eval_accuracy", "eval_macro_f1", *(f"clients/{name}" for name in MEASURED)}
    found, wanted = federations.contents(alone), federations.contents(common)
    assert {key for key in found if found[key] != wanted[key]} <= differing


@pytest.mark.parametrize("name", ["alone", "personal"])
def test_results_have_each_client_and_the_mean_by_examples(name, request):
    results = read_results(request.getfixturevalue(name))
    counts = results.clients["num_evaluated"]
    assert counts.tolist() == [[6] * 4] * 2
    for metric in ("loss", "accuracy", "macro_f1"):
        by_client = results.clients[f"eval_{metric}"]
        assert (by_client * counts).sum(1) / counts.sum(1) == pytest.approx(results.rounds[f"eval_{metric}"])
        assert len(set(by_client[-1].tolist())) > 1
    hits = 6 * results.clients["eval_accuracy"]
    assert hits == pytest.approx(np.rint(hits))


def test_no_more_examples_are_measured_than_wanted(folder):
    config = config_of(folder, "evaluation.max_examples=9")
    evaluation = setup.build_replica(config, read_data(config, Alone()), "cpu", folder / "states").evaluation
    assert sum(map(len, evaluation.parts)) == 9
    assert all((part < 6).all() and len(set(part.tolist())) == len(part) for part in evaluation.parts)


# Where workers die


@pytest.fixture
def measuring(folder, tmp_path):
    """A replica of a worker that has read no file, of a run of three workers."""
    clients = tmp_path / "clients"
    support.make_run_file(tmp_path)
    write_clients(clients, read_rows(folder / "data.csv"))
    config = config_of(tmp_path)
    whole = read_data(config, Alone())
    part = type(whole)(whole.dataset, whole.files, whole.folder, whole.counts, (0, 1, 2, 0), own={})
    return clients, setup.build_replica(config, part, "cpu", tmp_path / "states")


def measure(replica, worker_id, num_workers):
    plan = support.make_plan(replica.model)
    replica.model.state = replica.model.initial_state(plan)
    return replica.evaluation.predictions(replica.model, plan, worker_id, num_workers)


def test_clients_of_a_lost_worker_are_measured_by_those_who_train_them_then(measuring):
    _, replica = measuring
    evaluation = replica.evaluation
    assert evaluation.counts(3) == [2, 1, 1]
    before = evaluation.measured([measure(replica, worker_id, 3) for worker_id in range(3)])
    evaluation.lose([1], 2)
    assert evaluation.counts(2) == [2, 2]
    after = evaluation.measured([measure(replica, worker_id, 2) for worker_id in range(2)])
    assert after == before
    assert sorted(after.by_client) == [0, 1, 2, 3]


def test_a_client_whose_file_is_lost_is_left_out_of_the_mean(measuring, capsys):
    clients, replica = measuring
    evaluation = replica.evaluation
    before = evaluation.measured([measure(replica, worker_id, 3) for worker_id in range(3)])
    evaluation.examples_of.cache_clear()
    (clients / "bob.jsonl").unlink()
    after = evaluation.measured([measure(replica, worker_id, 3) for worker_id in range(3)])
    assert after.by_client[1].num_examples == 0
    assert math.isnan(after.by_client[1].metrics.loss)
    assert {c: after.by_client[c] for c in (0, 2, 3)} == {c: before.by_client[c] for c in (0, 2, 3)}
    left = [before.by_client[c].metrics.loss for c in (0, 2, 3)]
    assert after.metrics.loss == pytest.approx(np.mean(left))
    assert "client 1 is not measured in round 1" in capsys.readouterr().err


# Over MPI


@pytest.mark.slow
def test_over_mpi_nobody_but_its_worker_opens_a_clients_file(folder, personal, tmp_path):
    out = folder / "watched"
    settings_of = settings(folder, *PERSONAL)
    opened, _ = run_watched(folder / "run.toml", folder / "clients", out, tmp_path / "notes", settings_of)
    assert opened == [[], ["ann.csv", "clients", "cy.csv"], ["bob.jsonl", "clients", "dot.jsonl"]]
    found, wanted = federations.contents(out), federations.contents(personal)
    assert [key for key in found if found[key] != wanted[key]] == []
