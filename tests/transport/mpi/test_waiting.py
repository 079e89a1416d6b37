"""Waiting for requests that nobody has to answer."""

import time

import numpy as np
import pytest

from mpifedlora.transport.mpi import waiting


class Later:
    """A request that is done after some seconds."""

    def __init__(self, seconds):
        self._done_at = time.perf_counter() + seconds

    def Test(self):
        return time.perf_counter() >= self._done_at


def test_a_sleep_is_a_small_share_of_the_wait_so_far(monkeypatch):
    slept, started, sleep = [], time.perf_counter(), time.sleep

    def noted(seconds):
        slept.append((time.perf_counter() - started, seconds))
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", noted)
    waiting.wait(Later(0.3))
    assert all(waited > 2e-3 for waited, _ in slept)  # the first 2 ms without one
    assert all(seconds <= max(1e-4, 0.01 * waited) for waited, seconds in slept)
    assert max(seconds for _, seconds in slept) > 1e-3
    assert len(slept) < 1000


def test_nobody_sleeps_while_bytes_may_be_on_their_way(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    waiting.wait(Later(0.02), num_bytes=10**9)
    assert slept == []


@pytest.mark.parametrize("gives_way", [True, False])
def test_who_gives_way_sleeps_between_all_tests_and_others_only_yield(monkeypatch, gives_way):
    from mpi4py import MPI

    value = np.zeros(1)
    request = MPI.COMM_SELF.Irecv(value)
    calls = []

    def sent_at_third(*name):
        calls.append(name)
        if len(calls) == 3:
            MPI.COMM_SELF.Send(np.ones(1), 0)

    monkeypatch.setattr(time, "sleep", lambda seconds: sent_at_third("sleep", seconds))
    monkeypatch.setattr(waiting.os, "sched_yield", lambda: sent_at_third("yield"))
    waiting.wait_busily([request], gives_way=gives_way)
    assert value[0] == 1
    assert set(calls) == {("sleep", 2e-5) if gives_way else ("yield",)}
