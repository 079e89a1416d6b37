"""From a checked configuration to the objects of a run.

The first part is cheap (no torch, no model): it finds most mistakes of a user before anything heavy
is loaded. The second builds what every process needs.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpifedlora.core.batches import Indices
from mpifedlora.core.config import RunConfig
from mpifedlora.core.partition import share_alike, split_by_owner
from mpifedlora.core.seeding import numpy_generator
from mpifedlora.errors import ConfigError
from mpifedlora.io.model_files import check_model_folder, check_positions, check_targets, model_path
from mpifedlora.io.tables import Examples
from mpifedlora.io.trackers import check_trackers
from mpifedlora.runtime.building import build_model, build_task
from mpifedlora.runtime.data import FederatedData, check_data
from mpifedlora.runtime.method import carried_progress

if TYPE_CHECKING:
    from mpifedlora.runtime.evaluation import Evaluation, OwnEvaluation
    from mpifedlora.runtime.memory import Memory
    from mpifedlora.training.local import LocalSettings
    from mpifedlora.training.models import FederatedModel
    from mpifedlora.training.task import EncodedExamples, Task


def check_inputs(config: RunConfig) -> None:
    """Find in milliseconds what is wrong with data source and model.

    Raises:
        ConfigError: if privacy or a tracker is asked for and its package is not installed.
        DataError: see `mpifedlora.runtime.data.check_data`.
        AdapterError: see `mpifedlora.io.adapter_files.check_model_folder`.
    """
    check_data(config)
    path = model_path(config.model.name)
    check_model_folder(path)
    check_trackers(config.tracking.tools)
    if config.privacy.clip_norm is not None:
        from mpifedlora.core.privacy import spent_epsilon

        spent_epsilon(0, 1.0, config.privacy.noise_multiplier, config.privacy.delta)
    check_targets(path, config.lora.target_modules)
    if config.task.name != "image-classification":
        check_positions(path, config.data.max_length)


@dataclass(frozen=True)
class Replica:
    """What one process needs to train or measure.

    Args:
        model: base model with LoRA layers.
        task: examples to numbers, and what is measured.
        evaluation: what is reported.
        held_out: what a measured rank schedule goes by, on the server.
        data: and who owns it.
        settings: of local training.
        memory: what clients keep between rounds.
    """

    model: FederatedModel
    task: Task
    evaluation: Evaluation | OwnEvaluation
    held_out: Evaluation
    data: FederatedData
    settings: LocalSettings
    memory: Memory

    def examples_of(self) -> Callable[[int], EncodedExamples]:
        """Return a function that gives a client's examples; they are encoded when first needed."""
        return self.data.encoded_by(lambda examples: encoded(self.task, examples))


def encoded(task: Task, examples: Examples) -> EncodedExamples:
    """Return examples as a task's numbers."""
    return task.encode(examples.columns, examples.labels)


def build_replica(config: RunConfig, data: FederatedData, device: str, states_folder: Path) -> Replica:
    """Load the model and put everything on a device.

    Args:
        config: of the run.
        data: examples and owners.
        device: where the model computes.
        states_folder: where clients' states lie, the same for all processes.

    Raises:
        AdapterError: if the model cannot be loaded or a target module matches nothing.
    """
    from mpifedlora.io.client_store import ClientStore
    from mpifedlora.runtime.memory import Memory
    from mpifedlora.training.local import LocalSettings

    base, task = build_task(config, data.dataset.label_names, device)
    model = build_model(config, base, device)
    memory = Memory(ClientStore(states_folder))
    training = config.training
    return Replica(
        model=model,
        task=task,
        evaluation=_evaluation(config, data, task, memory),
        held_out=_held_out(config, data, task),
        data=data,
        memory=memory,
        settings=LocalSettings(
            batch_size=training.batch_size,
            local_steps=training.local_steps,
            local_epochs=training.local_epochs,
            optimizer=training.optimizer,
            head_rate_factor=training.head_rate_factor,
            weight_decay=training.weight_decay,
            momentum=training.momentum,
            grad_clip=training.grad_clip,
            precision=training.precision,
            seed=config.federation.seed,
            clip_norm=config.privacy.clip_norm,
            batching=training.batching,
            carried=carried_progress(config),
            accumulation_steps=training.accumulation_steps,
        ),
    )


def _evaluation(
    config: RunConfig, data: FederatedData, task: Task, memory: Memory
) -> Evaluation | OwnEvaluation:
    from mpifedlora.runtime.evaluation import Evaluation, OwnEvaluation

    batch_size, precision = config.evaluation.batch_size, config.training.precision
    is_personal, own = config.evaluation.model == "personal", data.own_parts(config.evaluation.split)
    if own is not None:
        return OwnEvaluation(
            task,
            cache(lambda client_id: encoded(task, own.examples_of(client_id))),
            split_by_owner(_drawn(config, sum(own.sizes)), own.sizes),
            own.pins,
            batch_size,
            precision,
            is_personal=is_personal,
            recall=memory.recall,
        )
    whole = data.dataset.part(config.evaluation.split)
    examples = whole.take(_drawn(config, len(whole)))
    parts = None
    if is_personal:
        parts = share_alike(data.label_table(), examples.labels, config.federation.seed, "evaluation-parts")
    return Evaluation(task, examples, batch_size, precision, parts, memory.recall)


def _held_out(config: RunConfig, data: FederatedData, task: Task) -> Evaluation:
    from mpifedlora.runtime.evaluation import Evaluation

    examples = data.dataset.validation
    return Evaluation(task, examples, config.evaluation.batch_size, config.training.precision)


def _drawn(config: RunConfig, num_examples: int) -> Indices:
    """Return which of the held-out examples are measured."""
    most = config.evaluation.max_examples
    if most is None or most >= num_examples:
        return np.arange(num_examples)
    return np.sort(numpy_generator(config.federation.seed, "evaluation").permutation(num_examples)[:most])


def choose_threads(requested: int | None, num_cores: int, num_sharing: int) -> int:
    """Return the CPU threads of one process: as asked for, or a fair share of its cores.

    Args:
        requested: `[training] threads`.
        num_cores: cores that this process may run on.
        num_sharing: processes of this job that may run on the same ones.

    >>> choose_threads(None, 16, 4), choose_threads(None, 2, 5), choose_threads(1, 16, 4)
    (4, 1, 1)
    """
    return requested or max(1, num_cores // num_sharing)


def check_quantization(quantize: str, device: str) -> None:
    """Check that a process can hold base weights in 8 or 4 bits.

    Args:
        quantize: `[model] quantize`.
        device: of this process.

    Raises:
        ConfigError: if it has no GPU, or the package bitsandbytes is missing.
    """
    if quantize == "none":
        return
    if not device.startswith("cuda"):
        raise ConfigError(
            f'model.quantize = "{quantize}" needs a GPU for every process, the server too, got {device}; ask '
            'for one GPU more than there are workers on the server\'s node, or set model.quantize = "none"'
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f'model.quantize = "{quantize}" needs the package bitsandbytes, got none; run '
            "`pip install 'mpifedlora[gpu]'`"
        )


def choose_device(requested: str, num_visible: int, worker_index: int, num_workers: int) -> str:
    """Return the device of one process, without any host name.

    Workers take the visible GPUs in turn, by their number among the node's workers. The server's
    number is num_workers: it takes a GPU only if there is one more than the workers need.

    Args:
        requested: `auto`, `cpu` or `cuda`.
        num_visible: GPUs that this process sees.
        worker_index: 0..num_workers-1 for workers, num_workers for the server.
        num_workers: workers on this node.

    Raises:
        ConfigError: if `cuda` is asked for and a worker sees no GPU.

    >>> [choose_device("auto", 2, index, 3) for index in range(4)]
    ['cuda:0', 'cuda:1', 'cuda:0', 'cpu']
    """
    is_server = worker_index == num_workers
    if requested == "cuda" and num_visible == 0 and not is_server:
        raise ConfigError(
            'training.device = "cuda" needs a GPU on every worker, got none '
            f'(worker {worker_index} of its node); use device = "auto", or ask the scheduler for GPUs'
        )
    if requested == "cpu" or num_visible == 0 or (is_server and num_visible <= num_workers):
        return "cpu"
    return f"cuda:{worker_index % num_visible}"


def describe_device(device: str, threads: int) -> str:
    """Return a device's kind and this process's threads: where they are equal, so are the bits."""
    import torch

    kind = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    return f"{kind}, {threads} thread" + ("s" if threads > 1 else "")


def configure_torch(threads: int, device: str, *, is_deterministic: bool) -> None:
    """Fix threads and, where asked for, deterministic GPU kernels."""
    import torch

    torch.set_num_threads(threads)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        if is_deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)


def num_visible_gpus() -> int:
    """Return the CUDA devices that this process sees."""
    import torch

    return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0


def quiet_libraries() -> None:
    """Keep model libraries from drawing bars and reports into a job's log."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # What one library says to another of its coming versions.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def collect_rarely() -> None:
    """Look for garbage less often: at Python's own pace an eighth of heavy imports is that."""
    gc.set_threshold(10_000, 10, 10)
