"""Images and their labels: a packaged set, or a folder with one subfolder a label.

Images are held as uint8 arrays (num_images, height, width, channels), one channel where all are grey, else
three. Those of a folder are decoded once and kept in the cache folder, from where they are mapped.
"""

from __future__ import annotations

import gzip
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mpifedlora.errors import DataError
from mpifedlora.io.array_cache import Int32, cached_values
from mpifedlora.io.data_fetch import PACKAGED, packaged_folder, read_packaged
from mpifedlora.io.row_streams import is_saved_dataset

Pixels = npt.NDArray[np.uint8]

PACKAGED_IMAGES = tuple(name for name, entry in PACKAGED.items() if entry.kind == "images")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_SIDE, _NUM_PIXELS = 28, 784
_NUM_SIDES = 3  # height, width, channels
_GREY = ("1", "L")
# What belongs to the system that wrote the folder.
_NO_DATA = ("Thumbs.db", "desktop.ini")


class Images(NamedTuple):
    """Images (num_images, height, width, channels) and each one's label."""

    pixels: Pixels
    labels: list[str]


class _File(NamedTuple):
    path: Path
    label: str


def is_image_source(source: str) -> bool:
    """Say whether a source is a packaged set of images, or a folder with subfolders."""
    if source in PACKAGED_IMAGES:
        return True
    folder = Path(source).expanduser()
    return folder.is_dir() and not is_saved_dataset(source) and bool(_subfolders(folder))


def open_images(source: str) -> dict[str, Callable[[], Images]]:
    """Open images: `train` always, `test` where the source has one; each is read when it is called.

    Args:
        source: a name in PACKAGED_IMAGES; or a folder with the subfolders `train` and `test` (or `val`),
            in which every subfolder is a label; or such a folder without parts.

    Raises:
        DataError: when read, naming the file that is no image, or of another size than the first.
    """
    if source in PACKAGED_IMAGES:
        return {"train": partial(_packaged, source)}
    return {name: partial(_read, folder) for name, folder in _parts(Path(source).expanduser()).items()}


def to_pixels(value: Any) -> Pixels:
    """Return one image of a table, (height, width, channels) uint8.

    Args:
        value: an image of Pillow's, as `datasets` has it, or the bytes of a file, as its Parquet files do.

    Raises:
        ValueError: if it is neither.
    """
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, bytes):
        opened: Pixels = _opened(BytesIO(content), _array_of)
        return opened
    if not hasattr(value, "convert"):
        raise ValueError(f"an image must be the bytes of an image file, got {type(value).__name__}")
    return _array_of(value)


def _array_of(image: Any) -> Pixels:
    pixels = np.asarray(image.convert("L" if image.mode in _GREY else "RGB"), np.uint8)
    return pixels.reshape(*pixels.shape[:2], -1)


def stacked(images: Sequence[Pixels], where: str) -> Pixels:
    """Put images of one size into one array; grey ones beside colour get three channels.

    Raises:
        DataError: naming the first row that has another size.
    """
    size = images[0].shape[:2]
    for number, image in enumerate(images, 1):
        if image.shape[:2] != size:
            raise DataError(
                f"images must all have one size, got {_size(image.shape)} ({where}, row {number}) and "
                f"{_size(size)} (row 1); resize them (the task scales them to what the model takes)"
            )
    num_channels = max(image.shape[2] for image in images)
    pixels = np.empty((len(images), *size, num_channels), np.uint8)
    for row, image in zip(pixels, images, strict=True):
        row[:] = image
    return pixels


def check_images(source: str) -> None:
    """Raise what `open_images` would raise, as far as the first image tells.

    Raises:
        DataError: see `open_images`.
    """
    if source in PACKAGED_IMAGES:
        packaged_folder(source)
        return
    for folder in _parts(Path(source).expanduser()).values():
        _check_alike(_image_files(folder)[:1], folder)


def _parts(folder: Path) -> dict[str, Path]:
    train = folder / "train"
    if not train.is_dir():
        return {"train": folder}
    test = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    return {"train": train} if test is None else {"train": train, "test": test}


def _image_files(folder: Path) -> list[_File]:
    """List the images in every label's subfolder, in the order of labels and names."""
    return [_File(path, label.name) for label in _subfolders(folder) for path in sorted(_inside(label))]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _inside(label: Path) -> Iterator[Path]:
    for path in label.iterdir():
        if path.name.startswith(".") or path.name in _NO_DATA:
            continue
        if path.suffix.lower() not in _SUFFIXES or not path.is_file():
            raise DataError(
                f"a label's folder must hold images alone ({', '.join(_SUFFIXES)}), got {path}; move it away"
            )
        yield path


def _read(folder: Path) -> Images:
    files = _image_files(folder)
    names = [str(file.path.relative_to(folder)).encode() for file in files]
    values = cached_values(
        "images", names + [_sha256(file.path) for file in files], lambda: _decoded(files, folder)
    )
    shape = [int(side) for side in values[:_NUM_SIDES]]
    pixels = values[_NUM_SIDES:].view(np.uint8)[: len(files) * math.prod(shape)]
    return Images(pixels.reshape(-1, *shape), [file.label for file in files])


def _sha256(path: Path) -> bytes:
    try:
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        raise DataError(f"an image must be readable, got {error}; check the file's permissions") from error


def _check_alike(files: Sequence[_File], folder: Path) -> tuple[int, int, int]:
    """Check the headers of images, and return their height, width and channels."""
    if not files:
        raise DataError(
            f"a folder of images must have a subfolder of images for each label, got none ({folder}); see "
            "docs/data.md"
        )
    sizes = [_opened(file.path, lambda image: (image.height, image.width)) for file in files]
    grey = [_opened(file.path, lambda image: image.mode in _GREY) for file in files]
    for file, size in zip(files, sizes, strict=True):
        if size != sizes[0]:
            raise DataError(
                f"images must all have one size, got {_size(size)} ({file.path}) and {_size(sizes[0])} "
                f"({files[0].path}); resize them (the task scales them to what the model takes)"
            )
    return *sizes[0], 1 if all(grey) else 3


def _size(size: Sequence[int]) -> str:
    return f"{size[1]} x {size[0]}"


def _decoded(files: Sequence[_File], folder: Path) -> Int32:
    """Return height, width, channels, and all pixels in fours."""
    shape = _check_alike(files, folder)
    pixels = np.zeros(len(files) * math.prod(shape) + 3 & -4, np.uint8)
    for image, file in zip(pixels[: len(files) * math.prod(shape)].reshape(-1, *shape), files, strict=True):
        image[:] = _opened(file.path, _array_of)
    return np.concatenate([np.array(shape, np.int32), pixels.view(np.int32)])


def _opened(file: Path | BytesIO, look: Callable[[Any], Any]) -> Any:
    name = file if isinstance(file, Path) else "an image"
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            f"reading {name} needs the package Pillow; run `pip install pillow` (or mpifedlora[vision])"
        ) from error
    try:
        with Image.open(file) as image:
            return look(image)
    # Damaged files come as any kind of error.
    except Exception as error:
        if not isinstance(file, Path):
            raise ValueError(f"an image must be readable, got {error}") from error
        raise DataError(f"an image must be readable, got {error} ({file}); replace or remove it") from error


def _packaged(name: str) -> Images:
    """Return the images of a packaged file: one a line, its pixels and its label, as numbers."""
    ((_, file, _),) = PACKAGED[name].files
    lines = gzip.decompress(read_packaged(name, file)).decode()
    table = np.array(lines.replace("\n", ",").strip(",").split(","), np.uint8).reshape(-1, _NUM_PIXELS + 1)
    pixels = np.ascontiguousarray(table[:, :-1]).reshape(-1, _SIDE, _SIDE, 1)
    return Images(pixels, [str(label) for label in table[:, -1].tolist()])
