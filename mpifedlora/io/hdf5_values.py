"""Values of an HDF5 file that may be damaged or foreign: as they are asked for, or refused."""

from __future__ import annotations

from typing import Any

import h5py
import numpy as np

from mpifedlora.io.results_schema import Array, check_shape

_PYTHON = {"str": (str,), "int": (int,), "float": (float, int), "bool": (bool,)}
_MOST_PACKED = 1100  # bytes of an array for one in the file: more than any compression of HDF5's reaches


def read_array(file: h5py.File, path: str, dtype: str, shape: tuple[int, ...]) -> Array:
    """Return a dataset's values.

    Raises:
        ValueError: if it is of another type or shape, or claims to hold more than the file can.
    """
    dataset = file[path]
    check_shape(path, dataset, shape)
    if dataset.dtype != np.dtype(dtype) or dataset.nbytes > _MOST_PACKED * file.id.get_filesize():
        raise ValueError(f"{path} as {dataset.dtype} of {dataset.nbytes} bytes")
    values: Array = dataset[()]
    return values


def read_texts(file: h5py.File, path: str) -> list[str]:
    """Return a list of texts.

    Raises:
        TypeError: if it is a dataset of anything else.
        ValueError: if it has no or several dimensions.
    """
    values = file[path].asstr()[()]
    if np.ndim(values) != 1:
        raise ValueError(f"{path} of shape {np.shape(values)}")
    return list(values)


def read_attribute(file: h5py.File, name: str, kind: str) -> Any:
    """Return an attribute of the file as Python's own value.

    Args:
        file: that has it.
        name: of the attribute.
        kind: `str`, `int`, `float`, `bool` or `tuple[str, ...]`.

    Raises:
        KeyError: if there is none.
        ValueError: if it is of another type.
    """
    value = file.attrs[name]
    if kind == "tuple[str, ...]":
        value = tuple(value.tolist())
        is_right = all(isinstance(text, str) for text in value)
    else:
        value = value.item() if isinstance(value, np.generic) else value
        is_right = type(value) in _PYTHON[kind]
    if not is_right:
        raise ValueError(f"{name} = {str(value)[:50]!r}, which is no {kind}")
    return value
