"""The tasks that come with the package, and how one of them, or a user's own, is built.

A builder takes a `TaskSetup` and returns the base model with its head, and the task. A new task is one more
builder in `TASKS`, and its name and columns in `mpifedlora.core.tasks`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpifedlora.errors import AdapterError, MpiFedLoraError
from mpifedlora.training.base import BaseModel
from mpifedlora.training.causal_lm import causal_lm
from mpifedlora.training.image_classification import image_classification
from mpifedlora.training.labels import LabelTask
from mpifedlora.training.task import Task, TaskSetup, TextTask, load_tokenizer

__all__ = ["TASKS", "ClassificationTask", "build_task", "load_tokenizer"]

Builder = Callable[[TaskSetup], tuple[BaseModel, Task]]


class ClassificationTask(LabelTask, TextTask):
    """Cross-entropy on one label a text."""


def classification(setup: TaskSetup) -> tuple[BaseModel, Task]:
    """Build an encoder with a linear head, and the classification of texts."""
    task = ClassificationTask(setup.tokenizer(), setup.max_length, setup.device, setup.cache)
    return setup.classifier(), task


TASKS: dict[str, Builder] = {
    "classification": classification,
    "causal-lm": causal_lm,
    "image-classification": image_classification,
}


def build_task(name: str, builder: Callable[..., Any], setup: TaskSetup) -> tuple[BaseModel, Task]:
    """Build a task and its base model.

    Args:
        name: what the run file calls it.
        builder: one of `TASKS`, or a user's.
        setup: what it is given.

    Raises:
        AdapterError: if a user's builder raises or returns anything else.
    """
    try:
        base, task = builder(setup)
    except MpiFedLoraError:
        raise
    except Exception as error:  # a user's code may raise anything
        raise AdapterError(
            f"the builder of a task must return its base model and the task, got {type(error).__name__}: "
            f"{error} ({name}); see docs/tasks.md"
        ) from error
    missing = [member for member in _MEMBERS if not hasattr(task, member)]
    if missing or not isinstance(base, BaseModel):
        got = f"a task without {', '.join(missing)}" if missing else f"a {type(base).__name__} as base model"
        raise AdapterError(
            f"a task must have {', '.join(_MEMBERS)}, and its builder return (BaseModel, task), got {got} "
            f"({name}); see docs/tasks.md"
        )
    return base, task


_MEMBERS = ("statistics", "metric_names", "encode", "collate", "loss", "measure", "metrics")
