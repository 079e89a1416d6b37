"""Which tasks there are, and which columns of the data each of them reads.

What a task computes is in `mpifedlora.training.tasks`; here is what can be known without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpifedlora.core.sections import DataConfig
from mpifedlora.core.task_config import TaskConfig
from mpifedlora.errors import ConfigError

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


def longest_input(config: Mapping[str, Any]) -> int | None:
    """Return the most tokens that a model has positions for, by its configuration, or None.

    >>> longest_input({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1})
    512
    """
    if config.get("position_biased_input") is False:  # DeBERTa's relative positions alone
        return None
    found = config.get("max_position_embeddings", config.get("n_positions"))
    if not isinstance(found, int) or found < 1:
        return None
    padding = config.get("pad_token_id")
    counts_from_padding = config.get("model_type") in _FROM_PADDING
    return found - (padding if isinstance(padding, int) else 0) - 1 if counts_from_padding else found


def check_length(config: Mapping[str, Any], max_length: int, name: str) -> None:
    """Check that examples are no longer than a model has positions for.

    Args:
        config: of the model.
        max_length: tokens of an example.
        name: of the model.

    Raises:
        ConfigError: if they are.
    """
    longest = longest_input(config)
    if longest is not None and max_length > longest:
        raise ConfigError(
            f"data.max_length must be at most what the model has positions for, got {max_length} and "
            f"{longest} ({name}); lower data.max_length"
        )


_FROM_PADDING = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "data2vec-text", "ibert")
_LABELLED = ("classification", "image-classification")
