from __future__ import annotations

import errno
import math
import os
import random
import re
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_writers import INSTANTS, KilledWriters
from safetensors.torch import save_file
from torch import Tensor

from mpifedlora.errors import CheckpointError
from mpifedlora.io.client_store import ClientStore

ROOT = str(Path(__file__).parents[2])
NAME = "client-00007.round-00012.safetensors"
State = dict[str, Tensor]


def make_state(client_id: int = 7, round_num: int = 12, num_values: int = 50_000) -> State:
    values = torch.arange(num_values, dtype=torch.float32) + 1000 * client_id
    return {"factors": values / round_num, "variate": -values * round_num}


def assert_same_bits(one: State, other: State) -> None:
    assert sorted(one) == sorted(other)
    for name in one:
        assert (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape), name
        assert one[name].numpy().tobytes() == other[name].numpy().tobytes(), name


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestRoundTrip:
    def test_the_same_bits_come_back(self, tmp_path: Path) -> None:
        odd = torch.tensor([0.0, -0.0, math.inf, -math.nan, 1e-45, 3.4e38])
        odd[3:4].view(torch.int32)[0] += 5  # a payload, as no arithmetic makes it
        state = {"variate": odd, "factors": torch.rand(9), "nothing": torch.zeros(0), "ф/…": torch.ones(1)}
        ClientStore(tmp_path).write(7, 12, state)
        back = ClientStore(tmp_path).read(7, 12)
        assert_same_bits(back, state)
        assert list(back) == sorted(state)
        back["variate"].zero_()  # a caller's own memory
        assert_same_bits(ClientStore(tmp_path).read(7, 12), state)

    def test_no_tensors(self, tmp_path: Path) -> None:
        ClientStore(tmp_path).write(0, 1, {})
        assert ClientStore(tmp_path).read(0, 1) == {}

    def test_views_of_one_buffer_and_trained_tensors(self, tmp_path: Path) -> None:
        flat = torch.arange(6.0, requires_grad=True)
        ClientStore(tmp_path).write(7, 12, {"a": flat[:4], "b": flat[2:], "c": flat})
        back = ClientStore(tmp_path).read(7, 12)
        assert {name: values.tolist() for name, values in back.items()} == {
            "a": [0, 1, 2, 3],
            "b": [2, 3, 4, 5],
            "c": [0, 1, 2, 3, 4, 5],
        }

    def test_every_version_is_a_file_of_its_own(self, tmp_path: Path) -> None:
        store = ClientStore(tmp_path / "new" / "clients")
        versions = [(7, 12), (7, 13), (8, 12), (123_456, 654_321)]
        for version in versions:
            store.write(*version, make_state(*version, num_values=3))
        for version in versions:
            assert_same_bits(store.read(*version), make_state(*version, num_values=3))
        assert names(tmp_path / "new" / "clients") == [
            "client-00007.round-00012.safetensors",
            "client-00007.round-00013.safetensors",
            "client-00008.round-00012.safetensors",
            "client-123456.round-654321.safetensors",
        ]

    def test_a_round_done_again_replaces_its_version(self, tmp_path: Path) -> None:
        store = ClientStore(tmp_path)
        store.write(7, 12, make_state())
        store.write(7, 12, {"factors": torch.ones(2)})
        assert_same_bits(store.read(7, 12), {"factors": torch.ones(2)})
        assert names(tmp_path) == [NAME]

    def test_a_chdir_changes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        store = ClientStore(Path("clients"))
        monkeypatch.chdir("/")
        store.write(7, 12, make_state())
        assert names(tmp_path / "clients") == [NAME]


class TestReadRefuses:
    def test_what_no_worker_here_wrote(self, tmp_path: Path) -> None:
        message = (
            r"^clients' states must be on storage that every worker sees, got No such file.*; put the run's"
        )
        for folder in (tmp_path, tmp_path / "none"):
            with pytest.raises(CheckpointError, match=message) as caught:
                ClientStore(folder).read(7, 12)
            assert caught.value.errno == errno.ENOENT
            assert str(folder / NAME) in str(caught.value)

    def test_a_flipped_bit_anywhere(self, tmp_path: Path) -> None:
        store = ClientStore(tmp_path)
        store.write(7, 12, make_state(num_values=2))
        whole, chance = (tmp_path / NAME).read_bytes(), random.Random(0)
        for position in range(len(whole)):
            content = bytearray(whole)
            content[position] ^= 1 << chance.randrange(8)
            (tmp_path / NAME).write_bytes(content)
            with pytest.raises(
                CheckpointError, match=r"must be read back as it was written, got .+; check the"
            ):
                store.read(7, 12)

    @pytest.mark.parametrize("keep", [0, 7, 8, 100, 0.5, 0.999])
    def test_a_file_cut_short(self, tmp_path: Path, keep: float) -> None:
        store = ClientStore(tmp_path)
        store.write(7, 12, make_state())
        size = (tmp_path / NAME).stat().st_size
        os.truncate(tmp_path / NAME, int(keep * size) if 0 < keep < 1 else int(keep))
        with pytest.raises(CheckpointError, match="must be read back as it was written") as caught:
            store.read(7, 12)
        assert str(tmp_path / NAME) in str(caught.value)

    @pytest.mark.parametrize(("client_id", "round_num"), [(8, 12), (7, 11), (12, 7)])
    def test_another_clients_or_rounds_state(self, tmp_path: Path, client_id: int, round_num: int) -> None:
        store = ClientStore(tmp_path)
        store.write(client_id, round_num, make_state())
        (written,) = tmp_path.iterdir()
        written.rename(tmp_path / NAME)
        found = f"client 7 and round 12 must hold .* got that of client {client_id} and round {round_num} "
        with pytest.raises(CheckpointError, match=found):
            store.read(7, 12)

    def test_tensors_of_another_program(self, tmp_path: Path) -> None:
        save_file(make_state(), tmp_path / NAME)
        with pytest.raises(CheckpointError, match="must be read back as it was written"):
            ClientStore(tmp_path).read(7, 12)


class TestRemoval:
    def versions(self, folder: Path) -> ClientStore:
        store = ClientStore(folder)
        for client_id, round_num in [(7, 9), (7, 10), (7, 11), (8, 9), (70, 9), (7, 100_000)]:
            store.write(client_id, round_num, make_state(num_values=2))
        return store

    def test_only_older_versions_of_the_client(self, tmp_path: Path) -> None:
        store = self.versions(tmp_path)
        left = [
            left_by_a_killed_writer(tmp_path / f"client-00007.round-{number}")
            for number in ("00010", "00011")
        ]
        store.remove_before(7, 11)
        assert names(tmp_path) == [
            left[1].name,
            "client-00007.round-00011.safetensors",
            "client-00007.round-100000.safetensors",
            "client-00008.round-00009.safetensors",
            "client-00070.round-00009.safetensors",
        ]

    def test_one_version(self, tmp_path: Path) -> None:
        store = ClientStore(tmp_path)
        for round_num in (3, 4):
            store.write(7, round_num, make_state(round_num=round_num, num_values=2))
        store.remove(7, 4)
        store.remove(7, 5)
        assert names(tmp_path) == ["client-00007.round-00003.safetensors"]

    def test_nothing_to_remove(self, tmp_path: Path) -> None:
        ClientStore(tmp_path / "none").remove_before(7, 11)
        assert names(tmp_path) == []

    def test_a_disk_that_refuses(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store = self.versions(tmp_path)

        def refuse(*_: Any, **__: Any) -> None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(Path, "unlink", refuse)
        store.remove_before(7, 11)
        store.remove(7, 11)
        assert len(names(tmp_path)) == 6


def left_by_a_killed_writer(path: Path, ending: str = ".safetensors") -> Path:
    temporary = path.with_name(f".{path.name}{ending}.other.node.1.00ff.tmp")
    temporary.write_text("half")
    return temporary


class TestToken:
    def test_it_comes_back(self, tmp_path: Path) -> None:
        server, worker = ClientStore(tmp_path / "clients"), ClientStore(tmp_path / "clients")
        assert worker.read_token() == ""
        for token in ("1f", "2e…"):
            server.write_token(token)
            assert worker.read_token() == token
        assert names(tmp_path / "clients") == ["shared.token"]

    def test_another_folder_holds_none(self, tmp_path: Path) -> None:
        ClientStore(tmp_path / "a").write_token("1f")
        assert ClientStore(tmp_path / "b").read_token() == ""

    def test_what_cannot_be_read_or_written(self, tmp_path: Path) -> None:
        (tmp_path / "clients").write_text("a file")
        with pytest.raises(CheckpointError, match=r"storage that every worker sees, got Not a directory \("):
            ClientStore(tmp_path / "clients").read_token()
        with pytest.raises(CheckpointError, match="states must be writable, got File exists"):
            ClientStore(tmp_path / "clients").write_token("1f")


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestDiskRefuses:
    def test_a_file_size_limit(self, tmp_path: Path) -> None:
        store = ClientStore(tmp_path)
        store.write(7, 12, make_state(round_num=1))
        for round_num in (12, 13):
            with file_size_limit(8192), pytest.raises(CheckpointError) as caught:
                store.write(7, round_num, make_state())
            assert caught.value.errno == errno.EFBIG
            path = tmp_path / f"client-00007.round-000{round_num}.safetensors"
            assert f"must be writable, got File too large ({path}); free space" in str(caught.value)
        assert names(tmp_path) == [NAME]
        assert_same_bits(store.read(7, 12), make_state(round_num=1))
        store.write(7, 12, make_state())
        assert_same_bits(store.read(7, 12), make_state())

    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_a_late_failure_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
    ) -> None:
        store = ClientStore(tmp_path)
        store.write(7, 12, make_state(round_num=1))

        def refuse(*_: Any) -> None:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        with monkeypatch.context() as patch:
            patch.setattr(os, step, refuse)
            with pytest.raises(CheckpointError, match="quota") as caught:
                store.write(7, 12, make_state())
        assert caught.value.errno == errno.EDQUOT
        assert ".tmp" not in str(caught.value)
        assert names(tmp_path) == [NAME]
        assert_same_bits(store.read(7, 12), make_state(round_num=1))


def store_writer(folder: Path) -> Callable[[int], None]:
    torch.set_num_threads(1)
    store = ClientStore(folder)
    return lambda round_num: store.write(round_num % 3, round_num, make_state(round_num % 3, round_num))


def read_everything(folder: Path) -> list[int]:
    """Return the rounds that are there, each read back whole."""
    versions = [[int(part) for part in re.findall(r"\d{5}", path.name)] for path in folder.glob("client-*")]
    for client_id, round_num in versions:
        assert_same_bits(ClientStore(folder).read(client_id, round_num), make_state(client_id, round_num))
    return sorted(round_num for _, round_num in versions)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_instant_every_version_is_whole(tmp_path: Path) -> None:
    writers, chance, longest = KilledWriters(__file__, "store_writer(path)", tmp_path), random.Random(0), 0
    try:
        for instant in INSTANTS:
            written = writers.run_until_killed(instant, chance.uniform(0, 0.06))
            found = read_everything(tmp_path)
            longest = max(longest, written)
            assert found == list(range(1, len(found) + 1))
            assert len(found) >= longest
            if instant in ("half-written", "before-replace"):
                assert found == []
            if instant == "after-replace":
                assert found == [1]
    finally:
        writers.end()
    assert longest >= 1


def test_a_reader_beside_a_writer_sees_one_state_or_the_other(tmp_path: Path) -> None:
    states = [make_state(round_num=1), make_state(round_num=2, num_values=60_000)]
    store, ended = ClientStore(tmp_path), threading.Event()
    store.write(7, 12, states[0])

    def write_until_told() -> None:
        while not ended.is_set():
            store.write(7, 12, states[1])
            store.write(7, 12, states[0])

    thread, seen = threading.Thread(target=write_until_told, daemon=True), list[int]()
    thread.start()
    while len(seen) < 40 or len(set(seen)) < 2:
        assert thread.is_alive()
        back = ClientStore(tmp_path).read(7, 12)
        seen.append(len(back["factors"]))
        assert_same_bits(back, states[seen[-1] == 60_000])
    ended.set()
    thread.join()
