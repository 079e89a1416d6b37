"""Which tasks go with which data: rules between the tables of a run file, as in `combinations`."""

from __future__ import annotations

import difflib

from mpifedlora.core.method_config import RunTables
from mpifedlora.core.refusals import bars, refuse, switch
from mpifedlora.core.tasks import BUILT_IN, is_own, label_column


def _task_is_known(config: RunTables) -> None:
    name = config.task.name
    if is_own(name):
        return
    if name not in BUILT_IN:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        refuse(
            f"task.name must be one of {', '.join(BUILT_IN)}, or FILE.py:FUNCTION for a task of your own",
            f'"{name}"',
            f"did you mean {near[0]}?" if near else "choose one of them",
        )
    bars(config, f'task.name = "{name}"', "data.columns", "only a task of your own names its columns there")


def _labels_are_there(config: RunTables) -> None:
    subject = switch(config, "data.partition")
    if config.data.partition in ("dirichlet", "shards") and label_column(config.task, config.data) is None:
        refuse(
            f"{subject} shares out by label",
            f'task.name = "{config.task.name}", which has none',
            'set data.partition = "iid" or "quantity", or name a column in data.label_column',
        )


TASK_RULES = (_task_is_known, _labels_are_there)
