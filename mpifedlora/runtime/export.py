"""A model of a run for others: an adapter, or a plain transformers folder, with its card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpifedlora.core.snapshot import trained
from mpifedlora.errors import CheckpointError, ConfigError
from mpifedlora.io.adapter_files import write_image_processor, write_labels, write_tensors
from mpifedlora.io.atomic import replace_file
from mpifedlora.io.checkpoints import CheckpointStore
from mpifedlora.io.client_store import ClientStore
from mpifedlora.io.export_folder import check_new_folder, new_folder
from mpifedlora.io.model_card import POOLED_HEAD_FILE, CardFacts, model_card
from mpifedlora.io.model_files import hub_name
from mpifedlora.io.output_folder import CHECKPOINTS_FOLDER, CLIENT_STATES_FOLDER, RUN_FILE, free_name
from mpifedlora.io.results import Results, read_results
from mpifedlora.io.run_file import read_run_file, write_run_file
from mpifedlora.runtime.building import build_model, build_task
from mpifedlora.runtime.checkpointing import Resumption
from mpifedlora.runtime.exporting import Adapter, TrainedModel
from mpifedlora.runtime.memory import Memory
from mpifedlora.runtime.setup import quiet_libraries
from mpifedlora.training.base import FEATURE_SCALE, load_weights
from mpifedlora.training.image_classification import ImageTask
from mpifedlora.training.merging import merge_adapter, save_model
from mpifedlora.training.task import TextTask

_PIPELINES = {
    "classification": "text-classification",
    "causal-lm": "text-generation",
    "image-classification": "image-classification",
}


def export(
    run_folder: Path, out: Path, round_num: int | None = None, client_id: int | None = None, *, merges: bool
) -> str:
    """Write a run's model to a folder of its own.

    Args:
        run_folder: `--out` of the run; it may still go on.
        out: a new or empty folder.
        round_num: after which the model is taken; by default the last with a checkpoint.
        client_id: whose own model is taken, where clients keep their B.
        merges: whether the adapter is added to the base weights: a folder that transformers loads.

    Returns:
        What was written, in words.

    Raises:
        CheckpointError: if the folder holds no run, or no checkpoint of that round.
        ConfigError: if `out` holds something, or what is asked for does not exist under the run's method.
    """
    check_new_folder(out)
    quiet_libraries()
    results = read_results(run_folder)
    round_num, model = _model_after(run_folder, round_num, results)
    _check(model, client_id, round_num, merges=merges)
    adapter = None if model.trained.plan.scope == "full" else model.adapter(client_id)
    facts = CardFacts(
        title=out.absolute().name,
        round_num=round_num,
        base_model=hub_name(model.config.model.name),
        is_merged=merges,
        is_pooled=model.model.is_pooled,
        feature_scale=FEATURE_SCALE,
        max_length=model.config.data.max_length,
        lora_ranks=[part.lora_rank for part in adapter[0]] if adapter else [],
        client_id=client_id,
        pipeline=_PIPELINES.get(model.config.task.name, ""),
        class_name=type(model.model.peft_model.base_model.model).__name__,
    )
    labels = results.info.label_names
    with new_folder(out) as made:
        if merges:
            _write_merged(made, model, adapter, labels)
        else:
            assert adapter is not None, "checked before"
            _write_adapter(made, model, adapter, labels)
        replace_file(made / "README.md", model_card(results, facts).encode())
    what = "model" if merges else "adapter"
    whose = "" if client_id is None else f" of client {client_id}"
    return f"{what}{whose} after round {round_num} in {free_name(out)}; its README.md says how to load it"


def _model_after(run_folder: Path, round_num: int | None, results: Results) -> tuple[int, TrainedModel]:
    config = read_run_file(run_folder / RUN_FILE).config
    store = CheckpointStore(run_folder / CHECKPOINTS_FOLDER, config.checkpoint.keep)
    there = store.rounds()
    if round_num is None and not there:
        raise CheckpointError(
            f"a run must have a checkpoint to be exported, got none ({free_name(run_folder)}); a finished "
            "run's adapter/ is that of its last round; checkpoint.every = 1 keeps checkpoints"
        )
    chosen = there[-1] if round_num is None else round_num
    resumption = Resumption.read(store.read(chosen))
    base, _ = build_task(config, results.info.label_names)
    model = build_model(config, base)
    resumption.recover(model)
    state = trained(resumption.tensors, model.shapes)
    # The last message may not have come yet when the checkpoint was taken.
    model.receive(state.plan, resumption.tensors["message"])
    return chosen, TrainedModel(config, model, state, Memory(ClientStore(run_folder / CLIENT_STATES_FOLDER)))


def _check(model: TrainedModel, client_id: int | None, round_num: int, *, merges: bool) -> None:
    method, clients = model.config.federation.method, model.clients
    if model.keeps_b and client_id is None:
        raise ConfigError(
            f"--client must be given where each client keeps a B of its own, got none under {method}; "
            f"name one of {_listed(clients)}"
        )
    if not model.keeps_b and client_id is not None:
        raise ConfigError(
            f"--client needs a method whose clients keep a B of their own, got {method}; leave --client out"
        )
    if client_id is not None and client_id not in clients:
        raise ConfigError(
            f"--client must be one that has been trained by round {round_num}, got {client_id}; "
            f"name one of {_listed(clients)}"
        )
    if model.trained.plan.scope == "full" and not merges:
        raise ConfigError(
            f"--merge must be given where the whole model is trained, got a model without an adapter after "
            f"round {round_num}; add --merge"
        )


def _listed(clients: list[int]) -> str:
    shown = ", ".join(map(str, clients[:10]))
    return f"{shown}, ... {clients[-1]}" if len(clients) > 10 else shown or "those of a later round"


def _write_adapter(folder: Path, model: TrainedModel, adapter: Adapter, labels: Sequence[str]) -> None:
    model.write_adapter(folder, *adapter)
    model.write_changed_weights(folder)
    replace_file(folder / RUN_FILE, write_run_file(model.config).encode())
    write_labels(folder, labels)


def _write_merged(folder: Path, model: TrainedModel, adapter: Adapter | None, labels: Sequence[str]) -> None:
    config = model.config
    base, task = build_task(config, labels)
    module = load_weights(base, model.changed_weights())
    if adapter is not None:
        merge_adapter(module, model.model.shapes, *adapter, model.model.scaling)
    if head := save_model(module, folder, labels, config.model.dtype if adapter else "float32"):
        write_tensors(folder / POOLED_HEAD_FILE, head)
    if isinstance(task, TextTask):
        task.tokenizer.save_pretrained(folder)
    elif isinstance(task, ImageTask):
        write_image_processor(folder, task.processor())
