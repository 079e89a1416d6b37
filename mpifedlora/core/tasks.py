"""Which tasks there are, and which columns of the data each of them reads.

What a task computes is in `mpifedlora.training.tasks`; here is what can be known without torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from mpifedlora.core.sections import DataConfig
from mpifedlora.core.task_config import TaskConfig

BUILT_IN = ("classification", "causal-lm", "image-classification")
"""Names of the tasks that come with the package."""


def is_own(name: str) -> bool:
    """Say whether a task is a user's: `FILE.py:FUNCTION`.

    >>> is_own("mytask.py:build"), is_own("classification")
    (True, False)
    """
    return ".py:" in name


def value_columns(task: TaskConfig, data: DataConfig) -> Mapping[str, str]:
    """Return what a task reads of each example, beside its label: name for the task -> column.

    >>> value_columns(TaskConfig(), DataConfig(source="posts.csv", text_column="body"))
    {'text': 'body'}
    """
    if is_own(task.name) and data.columns is not None:
        return {column: column for column in data.columns}
    if task.name == "image-classification":
        return {"image": data.image_column}
    if task.name != "causal-lm":
        return {"text": data.text_column}
    if data.messages_column is not None:
        return {"messages": data.messages_column}
    return {"prompt": data.prompt_column, "response": data.response_column}


def label_column(task: TaskConfig, data: DataConfig) -> str | None:
    """Return the column that the labels come from; None where the task has none.

    >>> label_column(TaskConfig(), DataConfig(source="posts.csv"))
    'label'
    """
    if data.label_column is None and task.name in _LABELLED:
        return "label"
    return data.label_column


_LABELLED = ("classification", "image-classification")
