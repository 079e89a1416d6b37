"""Which tasks go with which data: rules between the tables of a run file, as in `combinations`."""

from __future__ import annotations

import difflib

from mpifedlora.core.method_config import RunTables
from mpifedlora.core.refusals import bars, needs, refuse, switch
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


def _packing_has_rows(config: RunTables) -> None:
    if config.task.name != "causal-lm":
        subject = switch(config, "task.packing")
        needs(config, f'task.name = "{config.task.name}"', "task.packing", False, why=_LANGUAGE)
        needs(config, subject, "task.template", "auto", why=_LANGUAGE)
        bars(config, f'task.name = "{config.task.name}"', "data.messages_column", _LANGUAGE)


def _dora_is_not_exact(config: RunTables) -> None:
    why = (
        "its layers are m * (W + s B A) / |W + s B A|, which is not linear in B A: neither the exact sum of "
        "clients nor a cut by SVD keeps what they compute"
    )
    needs(config, "an adapter that is aggregated and cut", "lora.use_dora", False, why=why)


def _quantized_weights_are_fixed(config: RunTables) -> None:
    if config.model.quantize == "none":
        return
    subject, why = switch(config, "model.quantize"), "weights in 8 or 4 bits are neither trained nor added to"
    needs(config, subject, "training.scope", "adapter", "b-only", "alternating", why=why)
    if config.initiating.rounds:
        needs(config, subject, "initiating.scope", "adapter", why=why)
    needs(config, subject, "aggregation.kind", "product", "factors", "zero-pad", why=why)
    needs(config, subject, "training.compile", False, why="torch cannot compile these layers")


_LANGUAGE = "only a language model reads prompts and responses"
TASK_RULES = (
    _task_is_known,
    _labels_are_there,
    _packing_has_rows,
    _dora_is_not_exact,
    _quantized_weights_are_fixed,
)
