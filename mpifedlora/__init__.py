"""Federated LoRA fine-tuning as one MPI job.

The names below are the public ones; docs/api.md describes them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpifedlora.core.config import RunConfig
    from mpifedlora.errors import MpiFedLoraError
    from mpifedlora.io.results import Results, read_results
    from mpifedlora.io.results_schema import RoundRow
    from mpifedlora.runtime.api import Federation
    from mpifedlora.runtime.callbacks import Callback, Run
    from mpifedlora.runtime.loading import load_base_model

__version__ = "0.1.0"

_HOMES = {
    "Callback": "mpifedlora.runtime.callbacks",
    "Federation": "mpifedlora.runtime.api",
    "MpiFedLoraError": "mpifedlora.errors",
    "Results": "mpifedlora.io.results",
    "RoundRow": "mpifedlora.io.results_schema",
    "Run": "mpifedlora.runtime.callbacks",
    "RunConfig": "mpifedlora.core.config",
    "load_base_model": "mpifedlora.runtime.loading",
    "read_results": "mpifedlora.io.results",
}

__all__ = [
    "Callback",
    "Federation",
    "MpiFedLoraError",
    "Results",
    "RoundRow",
    "Run",
    "RunConfig",
    "__version__",
    "load_base_model",
    "read_results",
]


def __getattr__(name: str) -> Any:
    # Public names are imported when first used, so that `import mpifedlora` loads no torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
