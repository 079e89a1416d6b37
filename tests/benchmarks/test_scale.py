"""The costs on paper of rounds of Llama: sizes by hand, and what is committed is what the script makes."""

import csv
import math
from pathlib import Path

import pytest
import scale
import scale_costs
from click.testing import CliRunner
from scale_costs import ANNEALED, FIXED, FULL, METHODS, MODELS, WIRES, Link, Row, SvdRow, SvdTimes

from mpifedlora.core.layout import AdapterLayout, LinearShape, ModelShapes, TensorShape
from mpifedlora.core.lowrank import _dense_cost, _factored_cost

STUDY = Path(scale.__file__).parent
TINY = ModelShapes((LinearShape("q", 30, 20),), (), (TensorShape("q.weight", (30, 20)),))
# Sides of all adapted layers of one block: q, k, v, o and three of the feed-forward part.
SIDES_7B = 4 * (4096 + 4096) + 3 * (4096 + 11008)
SIDES_70B = 2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672)
HEADER = 128


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scale")
    outcome = CliRunner().invoke(scale.main, ["--out", str(folder)], catch_exceptions=False)
    assert outcome.exit_code == 0
    return folder


@pytest.fixture(scope="module")
def rows():
    return scale_costs.read_rows(Row, STUDY / "results" / "scale.csv")


@pytest.fixture(scope="module")
def svds():
    return scale_costs.read_rows(SvdRow, STUDY / "results" / "scale_svd.csv")


def test_one_module_of_70b_by_hand():
    shapes = scale_costs.model_shapes({**MODELS["Llama-70B"], "num_hidden_layers": 1})
    sizes = {module.name.rpartition(".")[2]: module[1:] for module in shapes.modules}
    assert sizes == {
        **dict.fromkeys(("q_proj", "o_proj"), (8192, 8192)),
        **dict.fromkeys(("k_proj", "v_proj"), (1024, 8192)),
        **dict.fromkeys(("gate_proj", "up_proj"), (28672, 8192)),
        "down_proj": (8192, 28672),
    }
    (key,) = (module for module in shapes.modules if module.name.endswith("k_proj"))
    own = ModelShapes((key,), (), ())
    (*_, last) = scale_costs.rounds_of(scale_costs.make_config(FIXED, "bfloat16"), own)
    assert last.high.uplink.bytes == 2 * 16 * (1024 + 8192) + HEADER
    assert AdapterLayout((key,), (16,)).num_values == 147_456


@pytest.mark.parametrize(
    ("model", "sides", "num_layers", "num_weights"),
    [("Llama-7B", SIDES_7B, 32, 6_738_415_616), ("Llama-70B", SIDES_70B, 80, 68_976_648_192)],
)
@pytest.mark.parametrize(("wire", "size"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_of_a_whole_model_by_hand(rows, model, sides, num_layers, num_weights, wire, size):
    direction = size * sides * num_layers
    down = HEADER + 8 * 7 * num_layers

    def sent(method):
        chosen = [row for row in rows if (row.model, row.wire, row.method) == (model, wire, method)]
        (values,) = {(row.up_bytes, row.down_bytes, row.last_up_bytes, row.last_down_bytes) for row in chosen}
        return values

    for method, message in ((FULL, size * num_weights), (FIXED, 16 * direction)):
        mean_down = round(down + message * 19 / 20)  # none goes down in the first of 20 rounds
        assert sent(method) == (message + HEADER, mean_down, message + HEADER, message + down)
    up, mean_down, *last = sent(ANNEALED)
    # The last round has rank 2, and the direction that the last cut has frozen goes down with it.
    assert last == [2 * direction + HEADER, 3 * direction + down]
    ranks = [16, 16, 16, 16, 15, 14, 13, 13, 12, 11, 10, 9, 8, 7, 6, 6, 5, 4, 3, 2]
    assert up == round(direction * sum(ranks) / 20 + HEADER)
    assert mean_down == round(direction * (sum(ranks[1:]) + 14) / 20 + down)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wire", WIRES)
def test_one_client_is_enough_to_count_the_bytes_of_each(method, wire):
    one, many = (
        [
            (each.high.uplink.bytes / number, each.high.downlink.bytes / number)
            for each in scale_costs.rounds_of(scale_costs.make_config(method, wire, number), TINY)
            if each.is_exact
        ]
        for number in (1, 5)
    )
    assert one == many
    assert len(one) == 20


@pytest.mark.parametrize(
    ("link", "collect", "num_clients", "seconds"),
    [
        # 1 MB up and 2 MB down at 1 MB/s a client; the server has 10 MB/s, enough for 10 of them.
        (Link("far", 8e6, 80e6, False), "gather", 5, 1 + 2),
        (Link("far", 8e6, 80e6, False), "gather", 20, 2 * (1 + 2)),
        # 7 clients and the server are three levels of a tree; rows come up the server's link.
        (Link("near", 8e6, 8e6, True), "gather", 7, 7 * 1 + 3 * 2),
        (Link("near", 8e6, 8e6, True), "reduce", 7, 3 * 1 + 3 * 2),
    ],
)
def test_one_transfer_by_hand(link, collect, num_clients, seconds):
    assert scale_costs.transfer_s(link, collect, num_clients, 1e6, 2e6) == pytest.approx(seconds)


def test_a_row_by_hand(rows):
    fits = scale_costs.read_fits()
    row = scale_costs.find(
        rows, model="Llama-7B", method=FIXED, wire="float32", link="100 Mbit/s", clients=1024
    )
    # 10 Gbit/s for 1,024 clients.
    transfer = 1024 * 8 * (row.up_bytes + row.down_bytes) / 10e9
    latency = fits["gather"].start_s + 1024 * fits["gather"].latency_s
    assert row.latency_s == pytest.approx(latency, rel=1e-4)
    assert row.link_s == pytest.approx(latency + transfer, rel=1e-4)
    megabytes = (row.up_bytes + row.down_bytes) / 2e6
    assert row.memory_s == pytest.approx(fits["gather"].seconds(1024, megabytes), rel=1e-4)


def test_only_means_of_four_byte_values_are_added_up(rows):
    reduced = {(row.method, row.wire, row.link) for row in rows if row.collect == "reduce"}
    assert reduced == {(method, "float32", "100 Gbit/s") for method in METHODS}


def test_what_the_section_says_in_words_holds(rows, svds):
    def seconds(model, clients, method, link, collect="gather"):
        place = {"model": model, "clients": clients, "method": method, "link": link, "collect": collect}
        return scale_costs.find(rows, wire="float32", **place).link_s

    for row in svds:
        place = row.model, row.clients
        assert seconds(*place, FIXED, "100 Gbit/s", "reduce") < seconds(*place, ANNEALED, "100 Gbit/s")
        assert row.mean_s > seconds(*place, ANNEALED, "100 Mbit/s")
        full, fixed, annealed = (seconds(*place, method, "100 Mbit/s") for method in METHODS)
        assert full > fixed > annealed


def sample(label, out_features, in_features, inner, value):
    return {
        "label": label,
        "out_features": out_features,
        "in_features": in_features,
        "inner": inner,
        "value": value,
    }


def test_seconds_of_an_svd_are_the_measured_ones_and_scaled_between():
    times = SvdTimes(
        [
            *(sample("factored_s", 4096, 1024, 128, value) for value in (5.0, 1.0, 2.0)),
            sample("factored_s", 1024, 4096, 512, 40.0),
            sample("dense_estimate_s", 4096, 1024, 128, 70.0),
            sample("relative_error", 4096, 1024, 128, 0.1),
        ]
    )
    module = LinearShape("up", 4096, 1024)
    assert times.seconds(module, 128) == pytest.approx(2.0)
    assert times.seconds(LinearShape("down", 1024, 4096), 512) == pytest.approx(40.0)
    assert times.is_timed(module, 512)
    costs = [_factored_cost(1024, 4096, inner) for inner in (128, 256, 512, 64)]
    between = costs[1] * math.sqrt(2.0 / costs[0] * 40.0 / costs[2])
    assert times.seconds(module, 256) == pytest.approx(between)
    assert times.seconds(module, 64) == pytest.approx(costs[3] * 2.0 / costs[0])
    assert not times.is_timed(module, 256)
    dense = 70.0 * _dense_cost(1024, 4096, 9000) / _dense_cost(1024, 4096, 128)
    assert times.seconds(module, 9000) == pytest.approx(dense)
    assert not times.is_timed(module, 128 * 128)


def test_where_the_last_round_is_said_to_be_timed_it_is(svds):
    # Rank 2 of 64 and of 1,024 clients: the inner dimensions of 8 and 128 clients at rank 16.
    assert [row.last_is_measured for row in svds] == [True] * 4
    content = {(row.model, row.clients): row for row in svds}
    medians = {(4096, 4096): 0.04535109700000106, (4096, 11008): 0.06182371849999413}
    by_hand = 32 * (4 * medians[4096, 4096] + 3 * medians[4096, 11008])
    assert content["Llama-7B", 64].last_s == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("name", ["scale.csv", "scale_svd.csv"])
def test_committed_numbers_are_what_the_script_makes(made, name):
    ours, theirs = (
        list(csv.reader((folder / name).open(newline=""))) for folder in (made, STUDY / "results")
    )
    assert len(ours) == len(theirs)
    for new, old in zip(ours, theirs, strict=True):
        assert [number(cell) for cell in new] == [
            pytest.approx(each, rel=1e-3) if isinstance(each, float) else each for each in map(number, old)
        ]


def number(cell):
    """Return what is written with a point as a float, all else as it is."""
    return float(cell) if cell.replace(".", "", 1).isdigit() and "." in cell else cell


def test_committed_section_is_what_the_script_makes_of_committed_numbers(made, rows, svds):
    text = (STUDY / "scale.md").read_text()
    assert scale.section(rows, svds) == text
    assert scale.table(rows) in text
    assert len(text.splitlines()) <= 40
    assert (made / "scale.md").exists()
    assert (made / "scale.png").read_bytes().startswith(b"\x89PNG")
