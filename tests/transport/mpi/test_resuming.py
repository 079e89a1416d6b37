"""A resumed run is the run that was never cut short, bit for bit, on any number of workers."""

import federations
import pytest
from federations import RUNS

from mpifedlora.runtime import interruption, launch

SECOND = [
    "training.scope=adapter",
    "initiating.rounds=1",
    "initiating.scope=full",
]
MORE = {
    "full stage first": SECOND,
    "full stage first, bfloat16 down": [*SECOND, "transport.downlink_dtype=bfloat16"],
    "int8 both ways": ["transport.uplink_dtype=int8", "transport.downlink_dtype=int8"],
    "fedit, what was lost": [
        "federation.method=fedit",
        "transport.uplink_dtype=int8",
        "transport.downlink_dtype=int8",
        "transport.error_feedback=true",
    ],
    "measured on workers": ["evaluation.on=workers"],
    "measured now and then": ["evaluation.every=3"],
    "bfloat16 base": ["model.dtype=bfloat16"],
    "reduce": ["federation.method=fedit", "transport.collect=reduce", "federation.reproducible=false"],
}


def cut_short(monkeypatch, folder, out, settings, comm, after):
    """Run until round `after` has ended."""
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(
            interruption.Interruption, "is_due", lambda self: asked.append(1) or len(asked) == after
        )
        assert launch.run(folder / "run.toml", settings, out, True, comm=comm) == (
            85 if comm.rank == 0 else 0
        )


@pytest.mark.parametrize("comm", [2], indirect=True)
@pytest.mark.parametrize(
    ("name", "after"),
    [*((name, 2) for name in [*RUNS, *MORE]), *((name, after) for name in MORE for after in (1, 3))],
)
def test_resumed_as_never_interrupted(comm, folder, monkeypatch, name, after):
    from mpi4py import MPI

    settings = {**RUNS, **MORE}[name]
    out = folder / f"{name}-resumed-{comm.size}-{after}"
    if comm.rank == 0:
        cut_short(monkeypatch, folder, out, settings, MPI.COMM_SELF, after)
    federations.meet(comm)
    assert launch.run(folder / "run.toml", settings, out, False, comm=comm, resumes=True) == 0
    assert_same(folder, name, settings, comm, out)


@pytest.mark.parametrize("comm", [3], indirect=True)
@pytest.mark.parametrize("name", ["sa-fedlora", "scaffold with cuts", "fedsa-lora", "flora", "target"])
def test_cut_short_on_many_and_resumed_on_one(comm, folder, monkeypatch, name):
    from mpi4py import MPI

    settings, out = RUNS[name], folder / f"{name}-shrunk-{comm.size}"
    cut_short(monkeypatch, folder, out, settings, comm, 2)
    federations.meet(comm)
    if comm.rank == 0:
        assert launch.run(None, [], out, False, comm=MPI.COMM_SELF, resumes=True) == 0
        assert_same(folder, name, settings, MPI.COMM_SELF, out)


def assert_same(folder, name, settings, comm, out):
    from mpi4py import MPI

    if comm.rank == 0:
        found = federations.contents(out)
        wanted = federations.contents(federations.federate(folder, name, settings, MPI.COMM_SELF))
        # How many older states of clients stay is not the run's result.
        keys = [key for key in wanted if not key.startswith("client_states")]
        assert [key for key in keys if found.get(key) != wanted[key]] == []
