"""Loading what a run has left behind."""

from __future__ import annotations

import os
from pathlib import Path

from mpifedlora.io.adapter_files import read_base_weights, read_labels
from mpifedlora.io.output_folder import RUN_FILE
from mpifedlora.io.results import read_results
from mpifedlora.io.run_file import read_run_file
from mpifedlora.runtime.building import build_task
from mpifedlora.runtime.setup import quiet_libraries
from mpifedlora.training.base import Module, load_weights


def load_base_model(run_folder: str | os.PathLike[str]) -> Module:
    """Build the base model that a run's adapter belongs to.

    With the adapter on it, the model gives the federated model's logits:

        base = load_base_model("runs/demo")
        model = PeftModel.from_pretrained(base, "runs/demo/adapter")
        logits = model(input_ids=..., attention_mask=...).logits

    The file of a task of one's own is run again, if it has not changed.

    A run of the whole model (`fedavg`) has no adapter: the model returned is the trained one.

    Args:
        run_folder: `--out` of a finished run, or an adapter of `mpifedlora export`.

    Returns:
        The model in evaluation mode, with the pre-trained weights, or those that the run has trained
        (`initiating.scope = "full"`).

    Raises:
        AdapterError: if the weights do not fit the model.
        CheckpointError: if the folder holds no run.
        ConfigError: if its run file cannot be read.
    """
    folder = Path(run_folder)
    labels = read_labels(folder)
    labels = list(read_results(folder).info.label_names) if labels is None else labels
    quiet_libraries()
    base, _ = build_task(read_run_file(folder / RUN_FILE).config, labels)
    return load_weights(base, read_base_weights(folder))
