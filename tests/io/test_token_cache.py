from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpifedlora.io import array_cache
from mpifedlora.io.token_cache import Tokens, cached_tokens

TEXTS = ("one two", "", "three")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MPIFEDLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


class Tokenizer:
    """A token a character, and 0 at a text's end; it counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, texts: Sequence[str]) -> Tokens:
        self.calls += 1
        ids = [[*map(ord, text), 0] for text in texts]
        return np.concatenate(ids).astype(np.int32), np.array([len(row) for row in ids], np.int64)


def refuse(texts: Sequence[str]) -> Tokens:
    raise AssertionError("the tokens were made before")


def assert_right(got: Tokens, texts: Sequence[str] = TEXTS) -> None:
    for array, wanted in zip(got, Tokenizer()(texts), strict=True):
        assert array.dtype == wanted.dtype
        assert array.tolist() == wanted.tolist()


def only_file(cache: Path) -> Path:
    (path,) = cache.iterdir()  # and no temporary file
    return path


def is_mapped(array: Any) -> bool:
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array is not None


def test_tokens_are_made_once_and_then_mapped_from_the_file(cache: Path) -> None:
    tokenizer = Tokenizer()
    first = cached_tokens(TEXTS, "", tokenizer)
    again = cached_tokens(TEXTS, "", tokenizer)
    assert tokenizer.calls == 1
    for tokens, lengths in (first, again):
        assert_right((tokens, lengths))
        assert is_mapped(tokens)
        assert not tokens.flags.writeable
    assert np.load(only_file(cache)).dtype == np.int32


@pytest.mark.parametrize(
    ("texts", "settings"),
    [
        (("one two", "", "Three"), ""),
        (("three", "", "one two"), ""),
        (("one two", "three", ""), ""),
        (("one twot", "", "hree"), ""),
        (("one two", "", "three", ""), ""),
        (TEXTS, "uncased"),
        (TEXTS[:2], ""),
    ],
    ids=["text", "order", "place-of-empty", "border", "one-more", "settings", "fewer"],
)
def test_other_texts_and_settings_have_files_of_their_own(
    cache: Path, texts: Sequence[str], settings: str
) -> None:
    cached_tokens(TEXTS, "", Tokenizer())
    assert_right(cached_tokens(texts, settings, Tokenizer()), texts)
    assert len(list(cache.iterdir())) == 2
    assert_right(cached_tokens(TEXTS, "", refuse))


def test_a_flipped_bit_anywhere_is_found(cache: Path) -> None:
    cached_tokens(TEXTS, "", Tokenizer())
    path = only_file(cache)
    whole = path.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert_right(cached_tokens(TEXTS, "", Tokenizer()))
    # Some of the header's bits mean nothing; whatever did has been written anew.
    assert_right(cached_tokens(TEXTS, "", refuse))


def npy(values: Any) -> bytes:
    content = io.BytesIO()
    np.save(content, values)
    return content.getvalue()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "header alone": lambda whole: whole[:128],
    "cut": lambda whole: whole[:-4],
    "no tokens": lambda whole: whole[:144],
    "zeros": lambda whole: whole[:128] + bytes(len(whole) - 128),
    "all zeros": lambda whole: bytes(len(whole)),
    "text": lambda whole: b"not tokens at all",
    "a zip": lambda whole: b"PK\x03\x04" + whole[4:],
    "no values": lambda whole: npy(np.zeros(0, np.int32)),
    "one number": lambda whole: npy(np.int32(7)),
    "a table": lambda whole: npy(np.zeros((2, 2), np.int32)),
    "other numbers": lambda whole: npy(np.zeros(16, np.int64)),
    "unsigned": lambda whole: whole.replace(b"<i4", b"<u4"),
    "last token": lambda whole: whole[:-1] + b"\x01",
    "a length": lambda whole: whole[:132] + b"\x07" + whole[133:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_again(cache: Path, damage: str) -> None:
    cached_tokens(TEXTS, "", Tokenizer())
    path = only_file(cache)
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[damage](whole))
    tokenizer = Tokenizer()
    assert_right(cached_tokens(TEXTS, "", tokenizer))
    assert tokenizer.calls == 1
    assert path.read_bytes() == whole


def test_a_file_of_another_length_is_not_taken(cache: Path) -> None:
    """The tokens of more texts, under the name of fewer."""
    cached_tokens(TEXTS, "", Tokenizer())
    path = only_file(cache)
    cached_tokens(TEXTS * 2, "", Tokenizer())
    (other,) = set(cache.iterdir()) - {path}
    other.replace(path)
    assert_right(cached_tokens(TEXTS, "", Tokenizer()))


def test_a_folder_that_cannot_be_written_leaves_the_tokens_in_memory(cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    tokenizer = Tokenizer()
    for calls in (1, 2):
        tokens, lengths = cached_tokens(TEXTS, "", tokenizer)
        assert_right((tokens, lengths))
        assert tokenizer.calls == calls
    assert not is_mapped(tokens)


def test_a_full_disk_leaves_the_tokens_in_memory(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(array_cache, "replace_file", fail)
    assert_right(cached_tokens(TEXTS, "", Tokenizer()))
    assert not list(cache.iterdir())


def test_a_user_without_a_home_folder_has_the_tokens_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(array_cache, "cache_folder", fail)
    assert_right(cached_tokens(TEXTS, "", Tokenizer()))


def test_no_texts_make_no_file(cache: Path) -> None:
    empty = np.zeros(0, np.int32), np.zeros(0, np.int64)
    assert cached_tokens([], "", lambda texts: empty) is empty
    assert not cache.exists()


def test_a_file_that_another_process_wrote_meanwhile_is_taken_and_stays(cache: Path) -> None:
    def slow(texts: Sequence[str]) -> Tokens:
        cached_tokens(texts, "", Tokenizer())
        return Tokenizer()(texts)

    inode = None

    def watched(texts: Sequence[str]) -> Tokens:
        nonlocal inode
        made = slow(texts)
        inode = only_file(cache).stat().st_ino
        return made

    tokens, lengths = cached_tokens(TEXTS, "", watched)
    assert_right((tokens, lengths))
    assert is_mapped(tokens)
    assert only_file(cache).stat().st_ino == inode


def test_many_may_write_at_once(cache: Path) -> None:
    together = threading.Barrier(4)

    def tokenize(texts: Sequence[str]) -> Tokens:
        together.wait(timeout=30)
        return Tokenizer()(texts)

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: cached_tokens(TEXTS, "", tokenize), range(4)):
            assert_right(found)
    assert_right(cached_tokens(TEXTS, "", refuse))
    assert only_file(cache)
