"""What `doctor` asks of heavy libraries; each is asked in a child process, by its name in `PROBES`."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any


def probe_torch() -> dict[str, Any]:
    """Return what torch says of itself and of GPUs."""
    import torch

    has_gpu = torch.cuda.is_available()
    devices = (
        [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        if has_gpu
        else []
    )
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "devices": [f"{one.name} ({one.total_memory / 2**30:.0f} GiB)" for one in devices],
    }


def probe_models() -> dict[str, Any]:
    """Load what models and adapters need."""
    from mpifedlora.training import lora_layers, tasks

    lora_layers.lora_config([], {}, 1, 1.0)
    return {"transformers": version("transformers"), "peft": version("peft"), "tasks": sorted(tasks.TASKS)}


def probe_hdf5() -> dict[str, Any]:
    """Write a small results file, and read it again."""
    from mpifedlora.io.results import try_hdf5

    return {"version": try_hdf5()}


PROBES = {"torch": probe_torch, "models": probe_models, "hdf5": probe_hdf5}

if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]]()))
