"""Split-learning fine-tuning of Hugging Face models.

The face of the package: these names, imported when first used. Nothing inside imports it.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cutlayer.client.connect import connect
    from cutlayer.client.training import TrunkOptimizer, attach
    from cutlayer.errors import CutlayerError
    from cutlayer.split.adapters import seed_adapter

__all__ = ["CutlayerError", "TrunkOptimizer", "attach", "connect", "seed_adapter"]

__version__ = _version("cutlayer")

_HOMES = {
    "CutlayerError": "cutlayer.errors",
    "TrunkOptimizer": "cutlayer.client.training",
    "attach": "cutlayer.client.training",
    "connect": "cutlayer.client.connect",
    "seed_adapter": "cutlayer.split.adapters",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cutlayer' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
