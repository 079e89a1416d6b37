"""Federated LoRA fine-tuning as one MPI job."""

from typing import Any

__version__ = "0.1.0"

_HOMES = {"load_base_model": "mpifedlora.runtime.loading"}

__all__ = ["__version__", "load_base_model"]


def __getattr__(name: str) -> Any:
    # Public names are imported when first used, so that `import mpifedlora` loads no torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
