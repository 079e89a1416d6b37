"""`mpifedlora results`: what it prints, and that its CSV and JSON are the file's own numbers."""

import csv
import io
import json
import math

import numpy as np
import pytest
from click.testing import CliRunner
from made_runs import NUM_CLIENTS, make_row, without_client, write_results

from mpifedlora.cli.results import command
from mpifedlora.errors import CheckpointError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("results") / "run"
    nan = math.nan
    rows = [make_row(1, eval_accuracy=nan, eval_loss=nan, eval_macro_f1=nan, eval_metrics=(nan,))]
    rows += [
        make_row(2, eval_metrics=(0.25,)),
        without_client(3, 5, "late", eval_metrics=(0.5,), epsilon=math.inf),
    ]
    write_results(made, rows, events=("client 5 is late",), metric_names=("top_3",))
    return made


def call(*arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)


def test_prints_rounds_sum_and_events(folder):
    lines = call(folder).output.splitlines()
    assert lines[0].startswith("sa-fedlora on 20newsgroups with minilm: running, begun 20")
    assert [line[:11] for line in lines[2:5]] == ["round  1/12", "round  2/12", "round  3/12"]
    assert "left" not in "".join(lines[2:5])
    text = "\n".join(lines)
    for part in ("final accuracy     0.733 (round 3)", "final top 3        0.500", "time in rounds     30s"):
        assert part in text
    assert lines[-1].endswith("after round 3: client 5 is late")


def test_prints_clients(folder):
    lines = call(folder, "--clients").output.splitlines()
    assert len(lines) == 1 + NUM_CLIENTS
    assert lines[1] == "     0         2       3  0.667   1s"
    assert lines[6] == "     5         2       2  6.000   6s       late 1"


def test_csv_has_every_number(folder, tmp_path):
    rows = list(csv.DictReader(io.StringIO(call(folder, "--csv", "-").output)))
    assert [int(row["round_num"]) for row in rows] == [1, 2, 3]
    assert (rows[0]["eval_accuracy"], rows[0]["eval_top_3"], rows[2]["eval_top_3"]) == ("", "", "0.5")
    assert float(rows[1]["eval_accuracy"]) == make_row(2).eval_accuracy
    assert (rows[0]["lora_rank_query"], rows[2]["stage"], rows[2]["epsilon"]) == ("16", "annealing", "inf")
    assert call(folder, "--csv", tmp_path / "rounds.csv").output == ""
    assert list(csv.DictReader((tmp_path / "rounds.csv").open())) == rows
    by_client = list(csv.DictReader(io.StringIO(call(folder, "--csv", "-", "--clients").output)))
    assert len(by_client) == 3 * NUM_CLIENTS
    last = by_client[-1]
    assert (last["round_num"], last["client_id"], last["outcome"], last["train_loss"]) == (
        "3",
        "5",
        "late",
        "",
    )


def test_json_has_every_number(folder):
    content = json.loads(call(folder, "--json", "--clients").output)
    assert (content["status"], content["info"]["config"]["lora"]["rank_max"]) == ("running", 16)
    assert content["rounds"]["eval_accuracy"] == [None, *(make_row(n).eval_accuracy for n in (2, 3))]
    assert content["rounds"]["epsilon"] == [None] * 3
    assert np.shape(content["clients"]["train_s"]) == (3, NUM_CLIENTS)
    assert content["baselines"]["reduction_vs_fixed_rank"] == 0.5
    assert content["events"][0]["num_finished"] == 3
    assert "clients" not in json.loads(call(folder, "--json").output)


def test_mistakes_say_what_to_do(folder, tmp_path):
    assert "choose one" in call(folder, "--csv", "-", "--json").output
    with pytest.raises(CheckpointError, match="name the --out"):
        call(tmp_path)
    with pytest.raises(CheckpointError, match="the file must be writable"):
        call(folder, "--csv", tmp_path / "no" / "rounds.csv")


def test_a_run_before_its_first_round(tmp_path):
    write_results(tmp_path, [])
    assert call(tmp_path).output.splitlines()[2].startswith("bytes sent")
    assert len(call(tmp_path, "--csv", "-").output.splitlines()) == 1
    assert call(tmp_path, "--clients").output.splitlines()[1].split() == ["0", "2", "0", "-", "-"]


def test_clients_that_were_measured_have_names_and_an_accuracy(tmp_path):
    accuracy = np.array([0.5, 0.25, math.nan, 1.0, 0.75, 0.5])
    measured = {"client_eval_accuracy": accuracy, "client_num_evaluated": np.array([8, 8, 0, 4, 4, 8])}
    names = ("ann", "bartholomew", "cy", "dot", "eve", "fay")
    write_results(tmp_path, [make_row(1, **measured), make_row(2)], client_names=names)
    lines = call(tmp_path, "--clients").output.splitlines()
    assert lines[0] == "client         examples  rounds  loss    accuracy   seconds  left out"
    assert lines[2] == "1 bartholomew         2       2  2.000   0.250      2s"
    assert lines[3] == "2 cy                  2       2  3.000   -          3s"
    assert "clients' accuracy" not in call(tmp_path).output  # of the last round, which was not measured so
    write_results(tmp_path, [make_row(1, **measured)], client_names=names)
    assert "clients' accuracy  0.250 to 1.000, median 0.500, of 5 clients" in call(tmp_path).output
    rows = list(csv.DictReader(io.StringIO(call(tmp_path, "--csv", "-", "--clients").output)))
    assert [row["eval_accuracy"] for row in rows] == ["0.5", "0.25", "", "1.0", "0.75", "0.5"]
    assert [row["num_evaluated"] for row in rows] == ["8", "8", "0", "4", "4", "8"]
