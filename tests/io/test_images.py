from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from mpifedlora.errors import DataError
from mpifedlora.io import data_fetch
from mpifedlora.io.images import check_images, is_image_source, open_images

Image = pytest.importorskip("PIL.Image")
GREY, COLOUR = (4, 3), (4, 3, 3)  # height, width, channels


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MPIFEDLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


def picture(path: Path, shape: tuple[int, ...] = GREY, seed: int = 0) -> np.ndarray:
    """Write an image of random pixels, and return them."""
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(["cat/b.png", "cat/a.png", "dog/c.png"]):
        picture(tmp_path / "pets" / name, seed=number)
    return tmp_path / "pets"


def test_every_subfolder_is_a_label_and_images_come_in_the_order_of_their_names(folder: Path) -> None:
    train = open_images(str(folder))["train"]()
    assert train.labels == ["cat", "cat", "dog"]
    assert train.pixels.shape == (3, 4, 3, 1)
    assert train.pixels.dtype == np.uint8
    for image, seed in zip(train.pixels, (1, 0, 2), strict=True):
        assert np.array_equal(image[..., 0], np.random.default_rng(seed).integers(0, 256, GREY, np.uint8))


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_parts_are_subfolders(tmp_path: Path, held_out: str) -> None:
    picture(tmp_path / "train" / "cat" / "a.png")
    picture(tmp_path / held_out / "dog" / "a.png")
    parts = open_images(str(tmp_path))
    assert {name: part().labels for name, part in parts.items()} == {"train": ["cat"], "test": ["dog"]}


def test_grey_beside_colour_counts_as_colour(folder: Path) -> None:
    pixels = picture(folder / "dog" / "d.png", COLOUR)
    train = open_images(str(folder))["train"]()
    assert train.pixels.shape == (4, 4, 3, 3)
    assert np.array_equal(train.pixels[3], pixels)
    assert (train.pixels[0] == train.pixels[0][..., :1]).all()


def test_decoded_images_are_kept_and_mapped_until_a_file_changes(folder: Path, cache: Path) -> None:
    first = open_images(str(folder))["train"]()
    again = open_images(str(folder))["train"]()
    assert not again.pixels.flags.writeable
    assert np.array_equal(first.pixels, again.pixels)
    assert len(list(cache.iterdir())) == 1
    changed = picture(folder / "cat" / "a.png", seed=9)
    third = open_images(str(folder))["train"]()
    assert np.array_equal(third.pixels[0, ..., 0], changed)


def test_what_systems_leave_in_folders_is_no_image(folder: Path) -> None:
    (folder / "cat" / ".DS_Store").write_bytes(b"x")
    (folder / "cat" / "Thumbs.db").write_bytes(b"x")
    (folder / "README").write_text("pets")
    assert len(open_images(str(folder))["train"]().labels) == 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda pets: (pets / "dog" / "c.png").write_bytes(b"no image"), r"image must be readable.*c\.png"),
        (
            lambda pets: picture(pets / "dog" / "d.png", (5, 7)),
            r"one size, got 7 x 5 .*d\.png.*3 x 4 .*a\.png",
        ),
        (lambda pets: (pets / "cat" / "note.txt").write_text("?"), r"images alone.*cat/note\.txt"),
        (lambda pets: (pets / "cat" / "more").mkdir(), r"images alone.*cat/more"),
    ],
)
def test_what_is_no_image_is_named(folder: Path, spoil, message: str) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=message):
        open_images(str(folder))["train"]()


def test_a_cut_image_is_named(folder: Path) -> None:
    file = folder / "cat" / "a.png"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(DataError, match=r"image must be readable, got .*a\.png"):
        open_images(str(folder))["train"]()


def test_the_first_image_is_looked_at_when_inputs_are_checked(folder: Path) -> None:
    check_images(str(folder))
    (folder / "cat" / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.png"):
        check_images(str(folder))


def test_only_folders_with_labels_of_images_are_images(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.csv").write_text("text,label\n")
    assert is_image_source(str(folder))
    assert not is_image_source(str(tmp_path / "texts"))
    assert not is_image_source(str(tmp_path / "texts" / "a.csv"))
    assert not is_image_source("20newsgroups")


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"a\.png needs the package Pillow; run `pip install pillow`"):
        open_images(str(folder))["train"]()


def test_packaged_digits_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPIFEDLORA_CACHE")
    if not (data_fetch.cache_folder() / "mnist-5k").is_dir():
        pytest.skip("run `mpifedlora data fetch mnist-5k`")
    assert is_image_source("mnist-5k")
    train = open_images("mnist-5k")["train"]()
    assert train.pixels.shape == (5000, 28, 28, 1)
    assert [train.labels.count(str(digit)) for digit in range(10)] == [500] * 10
    # Ink is where digits are, and a nought is hollow.
    assert train.pixels[:, :2, :2].mean() < 1 < 30 < train.pixels.mean()
    assert train.pixels[:500, 14, 14].mean() < train.pixels[500:1000, 14, 14].mean() / 4
