"""`mpifedlora run` on a model so small that neither transformers nor PEFT is loaded, paced, with told phases.

To load these two is three quarters of a process's start. What is in their place is the network that is
trained, its LoRA layers, optimiser and tokenizer; server, workers, protocol, transport and files are the
package's own. Each process tells what it does as the names of its threads (`/proc/PID/comm`), and stays in
each phase for some hundredths of a second, so that faults find it there.

Arguments: as those of `mpifedlora`. `write_inputs` makes what the run file names.
"""

import json
import sys
import time
from functools import wraps
from pathlib import Path
from types import SimpleNamespace

PACE_S = 0.04
PHASES = (
    "start",
    "set-up",
    "broadcast",
    "train",
    "collect",
    "measure",
    "results",
    "checkpoint",
    "export",
    "end",
)
NUM_ROUNDS, VOCABULARY, HIDDEN = 6, 64, 16


def write_inputs(folder):
    """Write a run file, its data, and a model folder that is checked and never loaded."""
    import torch
    from safetensors.torch import save_file
    from support import make_csv

    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    save_file({"unused": torch.zeros(1)}, folder / "model" / "model.safetensors")
    make_csv(folder / "data.csv", 60)
    tables = {
        "model": {"name": str(folder / "model"), "head": "stock"},
        "data": {"source": str(folder / "data.csv"), "alpha": 1.0, "max_length": 8},
        "federation": {"num_clients": 4, "num_rounds": NUM_ROUNDS, "seed": 0},
        "lora": {"rank_max": 4, "rank_min": 1, "alpha": 8.0},
        "training": {"local_steps": 2, "batch_size": 4, "threads": 1, "device": "cpu", "learning_rate": 0.2},
        "evaluation": {"batch_size": 32, "max_examples": 8},
    }
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    (folder / "run.toml").write_text("\n".join(lines))
    return folder / "run.toml"


def tell(phase):
    """Make a phase the name of this thread; return what it was."""
    comm = Path("/proc/thread-self/comm")
    before = comm.read_text().strip()
    comm.write_text(phase)
    return before


def mark(owner, name, phase):
    """Tell the phase while a function of an object or module runs, and stay in it for a while."""
    function = getattr(owner, name)

    @wraps(function)
    def marked(*arguments, **options):
        before = tell(phase)
        time.sleep(PACE_S)
        try:
            return function(*arguments, **options)
        finally:
            tell(before)

    setattr(owner, name, marked)


def mark_phases():
    from mpifedlora.io import checkpoints
    from mpifedlora.io.results import ResultsWriter
    from mpifedlora.runtime import exporting, launch, server, worker
    from mpifedlora.transport.mpi import MpiServer, MpiWorker

    for owner, name, phase in (
        (launch, "_connect", "connect"),
        (launch, "agree", "set-up"),
        (launch, "_recover", "set-up"),
        (MpiServer, "broadcast", "broadcast"),
        (MpiWorker, "receive", "broadcast"),
        (worker, "train_client", "train"),
        (MpiServer, "collect_headers", "collect"),
        (MpiServer, "collect_rows", "collect"),
        (MpiServer, "stream", "collect"),
        (MpiWorker, "submit", "collect"),
        (worker.Worker, "predictions", "measure"),
        (server.Server, "_measure", "measure"),
        (ResultsWriter, "write", "results"),
        (checkpoints, "replace_file", "checkpoint"),
        (exporting.TrainedModel, "write_all", "export"),
        (server.Server, "_stop", "end"),
    ):
        mark(owner, name, phase)


def put_in_place():
    """Put the small network, its LoRA layers, optimiser and tokenizer where the large ones would be."""
    import torch
    from torch import nn

    from mpifedlora.training import local, lora_layers, models, task
    from mpifedlora.training.base import BaseModel, Logits
    from mpifedlora.training.lora_layers import ACTIVE

    class Classifier(nn.Module):
        """Words, their mean, two layers, a head."""

        def __init__(self, num_labels):
            super().__init__()
            self.words = nn.Embedding(VOCABULARY, HIDDEN)
            self.first, self.second = nn.Linear(HIDDEN, 24), nn.Linear(24, HIDDEN)
            self.head = nn.Linear(HIDDEN, num_labels)

        def forward(self, input_ids, attention_mask):
            mask = attention_mask.unsqueeze(-1)
            mean = (self.words(input_ids) * mask).sum(1) / mask.sum(1).clamp_min(1)
            return Logits(self.head(torch.tanh(self.second(torch.tanh(self.first(mean))))))

    class LoraLinear(nn.Module):
        """What the package asks of a LoRA layer."""

        def __init__(self, base_layer):
            super().__init__()
            self.base_layer, self.r, self.scaling, self.is_on = base_layer, {}, {}, True
            shape = base_layer.weight.shape
            self.lora_A = nn.ModuleDict({ACTIVE: nn.Linear(shape[1], 1, bias=False)})
            self.lora_B = nn.ModuleDict({ACTIVE: nn.Linear(1, shape[0], bias=False)})

        def enable_adapters(self, is_on):
            self.is_on = is_on

        def forward(self, x):
            out = self.base_layer(x)
            if not self.is_on:
                return out
            return out + self.lora_B[ACTIVE](self.lora_A[ACTIVE](x)) * self.scaling[ACTIVE]

    class Saved(nn.Module):
        """A module that is trained whole."""

        def __init__(self, module):
            super().__init__()
            self.modules_to_save = nn.ModuleDict({ACTIVE: module})

        def forward(self, x):
            return self.modules_to_save[ACTIVE](x)

    class Adapted(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.base_model = nn.Module()
            self.base_model.model = model

        def forward(self, **batch):
            return self.base_model.model(**batch)

    def adapt(model, names, options):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name in names:
            setattr(model, name, LoraLinear(getattr(model, name)))
        for name in options["modules_to_save"]:
            getattr(model, name).requires_grad_(True)
            setattr(model, name, Saved(getattr(model, name)))
        return Adapted(model)

    class Descent:
        """Torch's own optimisers load its compiler, which takes as long as torch."""

        def __init__(self, flat, grad, learning_rate):
            self.flat, self.grad, self.learning_rate = flat, grad, learning_rate

        def step(self):
            self.flat.sub_(self.grad, alpha=self.learning_rate)

    def build_base(name, *, num_labels, seed, **options):
        torch.manual_seed(seed)
        return BaseModel(Classifier(num_labels), ("head",))

    class Tokenizer:
        pad_token_id = 0

        def __call__(self, texts, *, max_length, **options):
            rows = [[1 + sum(word.encode()) % (VOCABULARY - 1) for word in text.split()] for text in texts]
            return {"input_ids": [row[:max_length] for row in rows]}

    def lora_config(names, options, lora_rank, scaling):
        config = SimpleNamespace(r=lora_rank, lora_alpha=scaling * lora_rank, target_modules=names)
        config.to_dict = lambda: {key: value for key, value in vars(config).items() if key != "to_dict"}
        return config

    models.adapt, task.build_base, lora_layers.lora_config = adapt, build_base, lora_config
    task.load_tokenizer = lambda name: Tokenizer()
    local._optimizer = lambda flat, grad, head_values, settings, learning_rate: Descent(
        flat, grad, learning_rate
    )


def main():
    tell("start")
    from mpifedlora.cli.main import entry

    put_in_place()
    mark_phases()
    entry()


if __name__ == "__main__":
    sys.exit(main())
