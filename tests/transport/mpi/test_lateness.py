"""A client that is really slow, on workers of their own."""

import time

import pytest

from mpifedlora.io.results import read_results
from mpifedlora.runtime import launch
from mpifedlora.training.models import FederatedModel

DEADLINE_S = 5.0
SETTINGS = [
    "federation.reproducible=false",
    f"faults.round_deadline_s={DEADLINE_S}",
    "faults.late=next-round",
    "aggregation.kind=product",
    "training.local_steps=3",
]


@pytest.fixture
def slow(monkeypatch):
    """Let the second step of client 1 in round 2 take longer than a round may."""
    bind, forward, seen = FederatedModel.bind, FederatedModel.__call__, {}

    def told(self, plan, flat, grad=None, client_id=None):
        seen.update(place=(plan.round_num, client_id), passes=0)
        bind(self, plan, flat, grad, client_id)

    def called(self, batch):
        seen["passes"] += 1
        if self.peft_model.training and seen["place"] == (2, 1) and seen["passes"] == 2:
            time.sleep(1.2 * DEADLINE_S)
        return forward(self, batch)

    monkeypatch.setattr(FederatedModel, "bind", told)
    monkeypatch.setattr(FederatedModel, "__call__", called)


@pytest.mark.parametrize("comm", [5], indirect=True)
@pytest.mark.usefixtures("slow")
def test_a_slow_client_goes_on_in_the_next_round(comm, folder):
    """Each of four clients has a worker, so nobody waits for the slow one but the round."""
    out = folder / "late"
    assert launch.run(folder / "run.toml", SETTINGS, out, False, comm=comm) == 0
    if comm.rank == 0:
        found = read_results(out / "results.h5")
        assert found.clients["outcome"][:, 1].tolist() == ["used", "postponed", "used", "used"]
        assert set(found.clients["outcome"][:, [0, 2, 3]].flat) == {"used"}
        assert found.rounds["num_participants"].tolist() == [4, 3, 4, 4]
        assert any("client 1 began in round 2" in event.text for event in found.events)
