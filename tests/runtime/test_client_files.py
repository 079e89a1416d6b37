"""Clients that have a file each: read by their workers alone, with the same results as from one source."""

import json

import federations
import numpy as np
import pytest
import support
from client_folders import CLIENTS, read_rows, run_watched, write_clients, write_rows

from mpifedlora.errors import ConfigError, DataError
from mpifedlora.io.results import read_results
from mpifedlora.io.run_file import read_run_file
from mpifedlora.runtime import launch
from mpifedlora.runtime.data import read_data
from mpifedlora.transport.inprocess import Alone

SETTINGS = ["federation.num_rounds=2", "data.partition=files"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Run file, `clients/` with a file each, `test.csv`, and `one.csv` with all rows and their owners."""
    made = tmp_path_factory.mktemp("files")
    support.make_run_file(made)
    rows = read_rows(made / "data.csv")
    write_clients(made / "clients", rows[:96])
    write_rows(made / "test.csv", ("text", "label"), rows[96:])
    owned = [(*row, CLIENTS[number % 4]) for number, row in enumerate(rows[:96])]
    write_rows(made / "one.csv", ("text", "label", "owner"), owned)
    return made


def settings(folder, **changes):
    sources = {"source": folder / "clients", "test_source": folder / "test.csv", **changes}
    return [*SETTINGS, *(f"data.{key}={json.dumps(str(value))}" for key, value in sources.items())]


def data_of(folder, *more, **changes):
    return read_data(
        read_run_file(folder / "run.toml", [*settings(folder, **changes), *more]).config, Alone()
    )


@pytest.fixture(scope="module")
def alone(folder):
    out = folder / "alone"
    assert launch.run(folder / "run.toml", settings(folder), out, False) == 0
    return out


def test_the_results_are_those_of_one_source_with_owners(folder, alone):
    out = folder / "shared"
    shared = [
        "federation.num_rounds=2",
        'data.partition="column"',
        "data.partition_column=owner",
        f"data.source={folder / 'one.csv'}",
        f"data.test_source={folder / 'test.csv'}",
    ]
    assert launch.run(folder / "run.toml", shared, out, False) == 0
    found, wanted = federations.contents(alone), federations.contents(out)
    assert [key for key in found if found[key] != wanted[key]] == []


def test_results_name_the_clients(alone):
    info = read_results(alone / "results.h5").info
    assert info.client_names == CLIENTS
    assert info.label_table.sum(axis=1).tolist() == [24] * 4


@pytest.mark.slow
def test_over_mpi_nobody_but_its_worker_opens_a_clients_file(folder, alone, tmp_path):
    out, notes = folder / "watched", tmp_path / "notes"
    opened, output = run_watched(folder / "run.toml", folder / "clients", out, notes, settings(folder))
    assert opened == [[], ["ann.csv", "clients", "cy.csv"], ["bob.jsonl", "clients", "dot.jsonl"]]
    found, wanted = federations.contents(out), federations.contents(alone)
    assert [key for key in found if found[key] != wanted[key]] == []
    assert "ann" in output


# What is wrong with a file


def spoil(folder, made, name, content):
    """Copy the clients' files, with another content for one of them."""
    made.mkdir()
    for file in (folder / "clients").iterdir():
        (made / file.name).write_bytes(file.read_bytes())
    (made / name).write_text(content)
    return made


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cy.csv", "", r"at least one example, got none \(.*cy\.csv\)"),
        ("cy.csv", "text,label\na,food\nb\n", r"1 fields under a header of 2 \(.*cy\.csv:3\)"),
        ("cy.csv", "text,kind\na,food\n", r"label_column must name a column, got 'label'.*cy\.csv"),
        ("dot.jsonl", '{"text": "a", "label": "food"}\n{"text": "b"}\n', r"'label'.*dot\.jsonl:2"),
        ("dot.jsonl", "{", r"must be a JSON object.*dot\.jsonl:1"),
        (
            "cy.csv",
            "text,label\na,food\nb,sport\n",
            r"label must be one of .*'sport' \(.*cy\.csv, row 2\).*data\.labels",
        ),
        ("notes.txt", "?", r"must end in \.csv.*notes\.txt"),
        ("cy.jsonl", '{"text": "a", "label": "food"}', r"one file each, got two of 'cy'"),
        ("eve.csv", "text,label\na,food\n", r"num_clients must be .* got 4 and 5 files.*num_clients = 5"),
    ],
)
def test_what_is_wrong_with_a_clients_file_is_named(folder, tmp_path, name, content, message):
    made = spoil(folder, tmp_path / "clients", name, content)
    with pytest.raises((ConfigError, DataError), match=message):
        data_of(folder, f"data.labels={json.dumps(list(support.LABELS))}", source=made)


def test_a_missing_folder_is_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"folder of one file a client .* got No such file .*nowhere"):
        data_of(folder, source=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.max_examples=5", r"without max_examples .* got 5"),
        ('data.labels=["food", "music"]', r"label must be one of 'food', 'music', got 'animals'"),
    ],
)
def test_settings_that_do_not_go_with_files(folder, setting, message):
    with pytest.raises((ConfigError, DataError), match=message):
        data_of(folder, setting)


def test_labels_given_are_numbered_as_they_stand(folder):
    data = data_of(folder, 'data.labels=["music", "food", "animals", "sport"]')
    assert data.dataset.label_names == ("music", "food", "animals", "sport")
    assert data.label_table().shape == (4, 4)
    assert not data.label_table()[:, 3].any()


def test_a_validation_part_comes_from_the_source_to_test_on(folder):
    data = data_of(folder, "data.validation_fraction=0.25")
    assert len(data.dataset.validation) == 6
    assert len(data.dataset.test) == 18
    assert len(data.dataset.train) == 0


def test_a_file_of_a_lost_worker_is_read_when_it_is_needed(folder, tmp_path):
    whole = data_of(folder)
    part = type(whole)(whole.dataset, whole.files, whole.folder, whole.counts, whole.pins, own={})
    for client_id in range(4):
        wanted, found = (data.encoded_by(lambda examples: examples)(client_id) for data in (whole, part))
        assert found.texts == wanted.texts
        assert np.array_equal(found.labels, wanted.labels)


def test_a_file_that_has_changed_since_is_no_clients(folder, tmp_path):
    made = spoil(folder, tmp_path / "clients", "cy.csv", "text,label\na,food\nb,music\n")
    whole = data_of(folder, source=made)
    (made / "cy.csv").write_text("text,label\na,food\nb,food\n")
    part = type(whole)(whole.dataset, whole.files, whole.folder, whole.counts, whole.pins, own={})
    with pytest.raises(DataError, match=r"must stay as it was .*cy\.csv"):
        part.encoded_by(lambda examples: examples)(2)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["animals", "food", "music", "food"], r"labels must differ, got 'food' twice"),
        (["food"], "at least 2 labels"),
    ],
)
def test_labels_that_number_nothing_are_refused(folder, labels, message):
    with pytest.raises(DataError, match=message):
        data_of(folder, f"data.labels={json.dumps(labels)}")
