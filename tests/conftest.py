"""Files that many tests share; see `support`."""

from __future__ import annotations

from pathlib import Path

import pytest
import support

from mpifedlora.runtime.setup import quiet_libraries

quiet_libraries()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def tiny_model_folder(tiny_folder: Path) -> Path:
    import torch

    torch.set_num_threads(1)
    return support.make_model(tiny_folder / "model")


@pytest.fixture(scope="session")
def tiny_csv(tiny_folder: Path) -> Path:
    return support.make_csv(tiny_folder / "data.csv")


@pytest.fixture(scope="session")
def tiny_run_file(tiny_folder: Path, tiny_model_folder: Path, tiny_csv: Path) -> Path:
    return support.make_run_file(tiny_folder)
