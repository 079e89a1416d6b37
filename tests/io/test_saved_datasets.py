"""Folders that `datasets` itself has written, with texts and with images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mpifedlora.errors import DataError
from mpifedlora.io.datasets import check_source, read_dataset

datasets = pytest.importorskip("datasets")
Image = pytest.importorskip("PIL.Image")

LABELS = ["ham", "spam"]
IMAGE = {"image": "image"}


def saved(
    folder: Path, column: str, values: list, feature: object, parts: tuple[str, ...] = ("train", "test")
) -> str:
    features = datasets.Features({column: feature, "label": datasets.ClassLabel(names=LABELS)})
    numbers = [number % 2 for number in range(len(values))]
    part = datasets.Dataset.from_dict({column: values, "label": numbers}, features=features)
    whole = datasets.DatasetDict(dict.fromkeys(parts, part)) if parts else part
    whole.save_to_disk(str(folder))
    return str(folder)


def test_texts_with_their_own_test_part(tmp_path: Path) -> None:
    source = saved(tmp_path / "posts", "text", ["a", "b", "c", "d"], datasets.Value("string"))
    check_source(source, None, {"text": "text"}, "label", None)
    dataset = read_dataset(source)
    assert dataset.label_names == ("ham", "spam")
    assert dataset.train.texts == dataset.test.texts == ("a", "b", "c", "d")
    assert dataset.train.labels.tolist() == [0, 1, 0, 1]


def test_one_part_is_split(tmp_path: Path) -> None:
    source = saved(tmp_path / "posts", "text", list("abcdefghij"), datasets.Value("string"), parts=())
    dataset = read_dataset(source, test_fraction=0.2)
    assert (len(dataset.train), len(dataset.test)) == (8, 2)


def test_images_come_as_bytes(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6), np.uint8)
    source = saved(tmp_path / "pets", "image", [Image.fromarray(each) for each in pixels], datasets.Image())
    train = read_dataset(source, columns=IMAGE).train
    assert train.columns["image"].dtype == np.uint8
    assert np.array_equal(train.columns["image"], pixels[..., None])


def test_images_in_parquet_as_datasets_writes_them(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    images = [Image.fromarray(each) for each in pixels]
    part = datasets.Dataset.from_dict({"image": images, "label": LABELS * 2}, features=features)
    part.to_parquet(str(tmp_path / "pets.parquet"))
    source = str(tmp_path / "pets.parquet")
    train = read_dataset(source, test_source=source, columns=IMAGE).train
    assert np.array_equal(train.columns["image"], pixels)


def test_images_of_unlike_sizes_are_named_by_row(tmp_path: Path) -> None:
    sizes = [(4, 4), (4, 4), (4, 5)]
    images = [Image.fromarray(np.zeros(size, np.uint8)) for size in sizes]
    source = saved(tmp_path / "pets", "image", images, datasets.Image())
    with pytest.raises(DataError, match=r"one size, got 5 x 4 .*row 3\) and 4 x 4"):
        read_dataset(source, columns=IMAGE)


def test_a_missing_column_of_images_names_its_option(tmp_path: Path) -> None:
    source = saved(tmp_path / "posts", "text", ["a", "b"], datasets.Value("string"))
    with pytest.raises(DataError, match=r"image_column must name a column, got 'image'"):
        read_dataset(source, columns=IMAGE)
