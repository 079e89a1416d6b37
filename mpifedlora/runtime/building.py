"""From a checked configuration to the task and its model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mpifedlora.core.config import RunConfig
from mpifedlora.core.tasks import check_length, is_own
from mpifedlora.errors import AdapterError
from mpifedlora.io.model_files import model_path

if TYPE_CHECKING:
    from mpifedlora.core.layout import ModelShapes
    from mpifedlora.training.base import BaseModel
    from mpifedlora.training.models import FederatedModel
    from mpifedlora.training.task import Task


def build_task(config: RunConfig, label_names: Sequence[str], device: str = "cpu") -> tuple[BaseModel, Task]:
    """Load the pre-trained model with a head for the task, and build the task.

    Args:
        config: of the run.
        label_names: of the data.
        device: where batches go.

    Raises:
        AdapterError: if the model cannot be loaded, or a user's builder fails.
        ConfigError: if the file of a user's task cannot be run.
    """
    from mpifedlora.io.task_files import load_builder
    from mpifedlora.io.token_cache import cached_tokens
    from mpifedlora.training.base import quantized
    from mpifedlora.training.task import TaskSetup
    from mpifedlora.training.tasks import TASKS, build_task

    model, name = config.model, config.task.name
    builder = load_builder(name, config.task.sha256) if is_own(name) else TASKS[name]
    setup = TaskSetup(
        model=model_path(model.name),
        label_names=label_names,
        max_length=config.data.max_length,
        device=device,
        seed=config.federation.seed,
        head=model.head,
        dtype=model.dtype,
        dropout=model.dropout,
        template=config.task.template,
        packing=config.task.packing,
        options=config.task.options,
        cache=cached_tokens,
    )
    quantize = model.quantize if device.startswith("cuda") else "none"  # elsewhere a run is only read
    with quantized(quantize, model.dtype, device):
        base, task = build_task(name, builder, setup)
    described: Any = getattr(base.module, "config", None)
    if described is not None and name != "image-classification":
        check_length(described.to_dict(), config.data.max_length, model.name)
    return base, task


def read_shapes(config: RunConfig, label_names: Sequence[str]) -> ModelShapes:
    """Return the shapes of the model that a run would train, without its weights.

    Args:
        config: of the run.
        label_names: of the data.

    Raises:
        AdapterError: as for a run.
        ConfigError: as for a run.
    """
    from mpifedlora.training.base import without_weights
    from mpifedlora.training.shapes import find_parts

    try:
        with without_weights():
            base, _ = build_task(config, label_names)
    except AdapterError:  # whatever is wrong, or a user's builder that looks at the weights
        base, _ = build_task(config, label_names)
    return find_parts(base, config.lora.target_modules, config.lora.modules_to_save).shapes


def build_model(config: RunConfig, base: BaseModel, device: str = "cpu") -> FederatedModel:
    """Put LoRA layers on a base model."""
    from mpifedlora.training.models import FederatedModel

    lora = config.lora
    model = FederatedModel(
        base,
        rank_max=lora.rank_max,
        alpha=lora.alpha,
        use_rslora=lora.use_rslora,
        dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save,
        device=device,
        seed=config.federation.seed,
    )
    if config.training.gradient_checkpointing:
        model.checkpoint_activations()
    if config.training.compile:
        model.compile()
    return model
