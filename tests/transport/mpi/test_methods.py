"""Every preset over real MPI: the same bits for 1, 2 and 4 workers, and bytes in closed form."""

import federations
import numpy as np
import pytest
from federations import (
    HEADER_DOWN,
    HEADER_UP,
    NUM_MODULES,
    PRESETS,
    RUNS,
)

from mpifedlora.core.methods import METHODS
from mpifedlora.errors import ConfigError
from mpifedlora.io.results import read_results
from mpifedlora.runtime import launch

# The tiny model's adapted layers: in and out, and so the values of one rank of A and of B in all of them.
SIDES = [(32, 32)] * 4 + [(32, 64), (64, 32)]
PER_A = 2 * sum(inner for inner, _ in SIDES)
PER_B = 2 * sum(outer for _, outer in SIDES)
WHOLE, HEAD, PER_RANK = federations.values_of()
RANK, CLIENTS, ROUNDS = 4, 4, 4

# One worker is what test_resuming.py compares, for the same runs.
on_some = pytest.mark.parametrize("comm", [1, 3, 5], indirect=True, ids="{}_processes".format)


@on_some
@pytest.mark.parametrize("name", RUNS)
def test_same_bits_for_any_number_of_workers(comm, folder, name):
    federations.assert_same_bits(folder, name, RUNS[name], comm)


def stacked(total_rank):
    """Values of factors of one total rank in every module, each in the smaller of its two exact forms."""
    return 2 * sum(min(total_rank * (inner + outer), inner * outer) for inner, outer in SIDES)


FULL = (WHOLE, WHOLE)
BOTH = (RANK * PER_RANK + HEAD,) * 2
ONE_FACTOR = (RANK * PER_B + HEAD,) * 2

# Values that one client sends, and that it receives from round 2 on.
VALUES = {
    "fedavg": FULL,
    "fedprox": FULL,
    "fedavgm": FULL,
    "fedadam": FULL,
    "scaffold": (2 * WHOLE, 2 * WHOLE),
    "fedit": BOTH,
    "flexlora": BOTH,
    "hetlora": BOTH,
    "ffa-lora": ONE_FACTOR,
    "rolora": ONE_FACTOR,  # A and B of a rank have as many values here
    "fedsa-lora": (RANK * PER_A + HEAD,) * 2,
    "flora": (RANK * PER_RANK + HEAD, stacked(CLIENTS * RANK) + HEAD),
    "fedex-lora": (RANK * PER_RANK + HEAD, stacked((CLIENTS - 1) * RANK) + RANK * PER_RANK + HEAD),
}


def test_every_preset_has_a_closed_form():
    assert PER_A == PER_B
    assert {*VALUES, "sa-fedlora", "custom"} == set(METHODS)  # sa-fedlora: test_federation.py


@on_some
@pytest.mark.parametrize("name", VALUES)
def test_measured_bytes_are_the_closed_form(comm, folder, name):
    out = federations.federate(folder, name, RUNS[name], comm)
    if comm.rank:
        return
    results = read_results(out / "results.h5")
    up, down = VALUES[name]
    header_down = HEADER_DOWN + 4 * NUM_MODULES * (name == "scaffold")
    received = np.array([0] + [down] * (ROUNDS - 1))
    np.testing.assert_array_equal(results.rounds["uplink_bytes"], CLIENTS * (HEADER_UP + 4 * up))
    np.testing.assert_array_equal(results.rounds["downlink_bytes"], CLIENTS * (header_down + 4 * received))


@on_some
@pytest.mark.parametrize("name", ["hetlora, ranks", "flexlora, ranks", "flora, ranks"])
def test_clients_of_lower_rank_send_and_receive_less(comm, folder, name):
    out = federations.federate(folder, name, RUNS[name], comm)
    if comm.rank:
        return
    results = read_results(out / "results.h5")
    ranks = np.array([1, 2, 4, 1])
    up = (ranks * PER_RANK + HEAD).sum()
    down = CLIENTS * (stacked(ranks.sum()) + HEAD) if name.startswith("flora") else up
    received = np.array([0] + [down] * (ROUNDS - 1))
    np.testing.assert_array_equal(results.rounds["uplink_bytes"], CLIENTS * HEADER_UP + 4 * up)
    np.testing.assert_array_equal(results.rounds["downlink_bytes"], CLIENTS * HEADER_DOWN + 4 * received)


@on_some
def test_a_client_that_was_absent_receives_both_factors(comm, folder):
    out = federations.federate(folder, "rolora, cohort", RUNS["rolora, cohort"], comm)
    if comm.rank:
        return
    results = read_results(out / "results.h5")
    present = results.clients["participated"]
    for index in range(1, ROUNDS):
        # The last round's factor, and the one before it where the client missed that round's message.
        factors = [
            1 + (index > 1 and not present[index - 1][client]) for client in np.flatnonzero(present[index])
        ]
        expected = sum(HEADER_DOWN + 4 * (count * RANK * PER_B + HEAD) for count in factors)
        assert results.rounds["downlink_bytes"][index] == expected


@on_some
@pytest.mark.parametrize("name", ["private ffa-lora", "private fedavg"])
def test_privacy_spent_is_told_and_a_seed_is_no_privacy(comm, folder, name):
    out = federations.federate(folder, name, RUNS[name], comm)
    if comm.rank:
        return
    results = read_results(out / "results.h5")
    assert (np.diff(results.rounds["epsilon"]) > 0).all()
    assert not results.info.is_private
    assert results.info.reproducible


@on_some
def test_personal_models_are_measured_and_kept(comm, folder):
    out = federations.federate(folder, "fedsa-lora", RUNS["fedsa-lora"], comm)
    if comm.rank:
        return
    assert read_results(out / "results.h5").info.eval_model == "personal"
    names = sorted(path.name for path in (out / "client_adapters").iterdir())
    assert names == [f"client-{client:05d}" for client in range(CLIENTS)]
    states = sorted(path.name for path in (out / "client_states").glob("*.safetensors"))
    kept = [(client, round_num) for client in range(CLIENTS) for round_num in (ROUNDS - 1, ROUNDS)]
    assert states == [f"client-{client:05d}.round-{made:05d}.safetensors" for client, made in kept]


@on_some
@pytest.mark.parametrize(
    "name", ["fedit", "flora", "fedex-lora", "flexlora", "sa-fedlora", "hetlora", "rolora"]
)
def test_aggregation_error_and_dropped_energy_are_told(comm, folder, name):
    out = federations.federate(folder, name, RUNS[name], comm)
    if comm.rank:
        return
    rounds = read_results(out / "results.h5").rounds
    is_exact = name in ("flora", "fedex-lora", "rolora")
    assert (
        (rounds["aggregation_error"] < 1e-5).all() if is_exact else (rounds["aggregation_error"] > 1e-5).all()
    )
    assert (rounds["dropped_energy"] >= 0).all()


@on_some
def test_workers_that_see_another_folder_are_told_before_the_first_round(comm, folder):
    if comm.size == 1:
        return
    out = folder / f"elsewhere-{comm.size}-{min(comm.rank, 1)}"
    arguments = (folder / "run.toml", PRESETS["fedsa-lora"], out, False)
    if comm.rank == 0:
        with pytest.raises(
            ConfigError, match=r"same folder for clients' states, got one without .* on worker 0"
        ):
            launch.run(*arguments, comm=comm)
        assert not (out / "results.h5").exists()
    else:
        assert launch.run(*arguments, comm=comm) == launch.EXIT_FAILED_ELSEWHERE
