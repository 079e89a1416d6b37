"""Checkpoints: whole or named as damaged, the latest whole one is found, old ones go."""

import errno

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from mpifedlora.errors import CheckpointError
from mpifedlora.io.checkpoints import CheckpointStore, decode, encode, numbers_of

TENSORS = {"state": torch.arange(5.0), "plan": torch.arange(7, dtype=torch.uint8)}


def nobody(text):
    raise AssertionError(text)


def test_numbers_and_tensors_come_back():
    numbers = {"budget": 3, "best": None, "config": {"lora": {"rank_max": 4}}}
    read, tensors = decode(encode(numbers, TENSORS))
    assert read == numbers == numbers_of(encode(numbers, TENSORS))
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_the_latest_is_found_and_old_ones_go(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.latest(nobody) is None
    for round_num in (1, 2, 10):
        store.write(round_num, encode({"round": round_num}, TENSORS))
    found = store.latest(nobody)
    assert found is not None
    assert (found.round_num, numbers_of(found.content)) == (10, {"round": 10})
    assert [path.name[:11] for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "round-00002",
        "round-00010",
    ]
    store.remove_after(2)
    assert store.latest(nobody).round_num == 2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), bit=st.integers(0, 7), is_cut=st.booleans())
def test_any_damage_is_named_and_the_one_before_is_taken(tmp_path_factory, place, bit, is_cut):
    folder = tmp_path_factory.mktemp("run")
    store = CheckpointStore(folder, keep=2)
    for round_num in (1, 2):
        store.write(round_num, encode({"round": round_num}, TENSORS))
    newest = max(folder.iterdir())
    content = bytearray(newest.read_bytes())
    place %= len(content)
    if is_cut:
        del content[place:]
    else:
        content[place] ^= 1 << bit
    newest.write_bytes(content)
    told = []
    found = store.latest(told.append)
    assert found.round_num == 1
    assert len(told) == 1
    assert newest.name in told[0]
    assert "damaged" in told[0]


def test_where_none_is_whole_nothing_is_resumed(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.write(1, encode({}, TENSORS))
    next(tmp_path.iterdir()).write_bytes(b"")
    with pytest.raises(CheckpointError, match="got 1 damaged"):
        store.latest(lambda text: None)


def test_other_files_are_no_checkpoints(tmp_path):
    for name in ("round-00009.safetensors", "round-9.x.safetensors", "notes.txt"):
        (tmp_path / name).write_text("x")
    assert CheckpointStore(tmp_path, keep=1).latest(nobody) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 64,
        save(TENSORS),
        save(TENSORS, {"format_version": "99", "numbers": "{}"}),
        save(TENSORS, {"format_version": "1", "numbers": "[]"}),
        save(TENSORS, {"format_version": "1", "numbers": "__import__('os')"}),
    ],
)
def test_other_formats_are_refused(content):
    with pytest.raises(CheckpointError, match="format_version 1"):
        decode(content)


@given(content=st.binary(max_size=300))
def test_no_bytes_are_more_than_refused(content):
    with pytest.raises(CheckpointError):
        decode(content)


def test_a_disk_that_refuses_keeps_what_was_written(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep=1)
    store.write(1, encode({}, TENSORS))

    def refuse(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mpifedlora.io.checkpoints.replace_file", refuse)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        store.write(2, encode({}, TENSORS))
    assert caught.value.errno == errno.ENOSPC
    assert store.latest(nobody).round_num == 1
