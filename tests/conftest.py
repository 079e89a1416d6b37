"""Files that many tests share; see `support`. And how `pytest -n` shares the tests out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis
import pytest
import support

from mpifedlora.runtime.setup import quiet_libraries

quiet_libraries()

# How long an example takes says nothing on a machine that does other things too.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

# What one process of `pytest -n` does, one test after the other, in this order: the longest first. The
# tests of a group start a cluster or several processes each. A file that is not named is a group of its own.
GROUPS = {
    "slurm": ("tests/slurm/",),
    "mpirun": (
        "tests/faults/",
        "tests/runtime/test_newsgroups.py",
        "tests/runtime/test_launch.py",
        "tests/runtime/test_resuming.py",
    ),
}


def group_of(nodeid: str) -> str:
    """Return the group of a test, which is its file where no group has it."""
    file = nodeid.partition("::")[0]
    return next((name for name, places in GROUPS.items() if file.startswith(places)), file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the groups come first: they mostly wait, and the others fill the cores meanwhile."""
    order = list(GROUPS)
    items.sort(
        key=lambda item: order.index(group) if (group := group_of(item.nodeid)) in order else len(order)
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each group to one process."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


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
