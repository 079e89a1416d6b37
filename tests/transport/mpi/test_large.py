"""A message and a row of more than 2 GiB, whose bytes no 32-bit count can hold."""

import pytest
import torch

from mpifedlora.core.layout import ModelShapes, TensorShape
from mpifedlora.core.plan import RoundPlan
from mpifedlora.core.wire import UpdateHeader, UpdateRows, WireFormat
from mpifedlora.io.process import available_bytes
from mpifedlora.transport import mpi

BORDER = 2**31
NUM_VALUES = (BORDER + 100) // 4
SHAPES = ModelShapes((), (), (TensorShape("w", (NUM_VALUES,)),))
NEEDED_BYTES = 12e9  # server and worker hold a message and a row each
WINDOW = 2**18


def fill(wire, first):
    """Write rising numbers, so that every place is told from every other; the server's and a row's differ."""
    torch.arange(first, first + NUM_VALUES, out=wire[: 4 * NUM_VALUES].view(torch.int32))


def holds(wire, first):
    """Say whether both ends, the border and every 1000th place are as filled."""
    values, border = wire[: 4 * NUM_VALUES].view(torch.int32), BORDER // 4
    places = (
        slice(0, WINDOW),
        slice(border - WINDOW, None),  # to the end
        slice(0, None, 1000),
    )
    wanted = (range(first, first + NUM_VALUES)[place] for place in places)
    return all(
        torch.equal(values[place], torch.arange(want.start, want.stop, want.step, dtype=torch.int32))
        for place, want in zip(places, wanted, strict=True)
    )


@pytest.mark.slow
def test_messages_and_rows_of_more_than_two_gibibytes_arrive_whole(comm):
    if comm.size != 2:
        return
    found = comm.bcast(available_bytes())  # both skip, or none
    if found is None or found < NEEDED_BYTES:
        pytest.skip(f"needs {NEEDED_BYTES / 1e9:.0f} GB of memory, got {(found or 0) / 1e9:.1f} GB")
    endpoint = mpi.connect(comm)
    endpoint.open(SHAPES, 1, WireFormat())
    plan = RoundPlan(2, "annealing", "full", (), (), (0,), sends_state=True)
    if endpoint.is_server:
        message = WireFormat().message_buffer(plan, SHAPES)
        assert len(message) > BORDER
        fill(message, -7)
        endpoint.broadcast(plan, message)
        assert [header.client_id for header in endpoint.collect_headers(plan)] == [0]
        (row,) = endpoint.collect_rows(plan)
        assert holds(row, 11)
        return
    got, message = endpoint.receive()
    assert holds(message, -7)
    rows = UpdateRows([WireFormat().row_bytes(got, SHAPES)])
    fill(rows.wire(0), 11)
    UpdateHeader(0, 1, 1, 0.0, 0.0, 0.0, True).write(rows, 0, got)
    endpoint.submit(rows)
