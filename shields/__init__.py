"""Protect portrait photos against generative editing, and prove it.

Everything is loaded on first use, so that `import shields` costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

# The function has the name of its module: bound at once, or importing the module would hide it.
from shields.verify import Report, verify

if TYPE_CHECKING:
    from shields.batch import Batch
    from shields.budget import Budget
    from shields.errors import (
        BudgetExceeded,
        ConfigError,
        DeviceError,
        FaceNotFound,
        ImageError,
        MissingPackage,
        OutputError,
        ShieldsError,
        UnknownName,
        WeightsError,
    )
    from shields.photo import read, write
    from shields.protectors import PROTECTORS
    from shields.protectors.base import Protector, ProtectorConfig
    from shields.shield import ProtectedPhoto, Region, Shield
    from shields.types import Face, Photo
    from shields.weights import Card, WeightStore

__all__ = [
    "PROTECTORS",
    "Batch",
    "Budget",
    "BudgetExceeded",
    "Card",
    "ConfigError",
    "DeviceError",
    "Face",
    "FaceNotFound",
    "ImageError",
    "MissingPackage",
    "OutputError",
    "Photo",
    "ProtectedPhoto",
    "Protector",
    "ProtectorConfig",
    "Region",
    "Report",
    "Shield",
    "ShieldsError",
    "UnknownName",
    "WeightStore",
    "WeightsError",
    "__version__",
    "read",
    "verify",
    "write",
]

_HOMES = {
    "shields.batch": ("Batch",),
    "shields.budget": ("Budget",),
    "shields.errors": (
        "BudgetExceeded",
        "ConfigError",
        "DeviceError",
        "FaceNotFound",
        "ImageError",
        "MissingPackage",
        "OutputError",
        "ShieldsError",
        "UnknownName",
        "WeightsError",
    ),
    "shields.photo": ("read", "write"),
    "shields.protectors": ("PROTECTORS",),
    "shields.protectors.base": ("Protector", "ProtectorConfig"),
    "shields.shield": ("ProtectedPhoto", "Region", "Shield"),
    "shields.types": ("Face", "Photo"),
    "shields.weights": ("Card", "WeightStore"),
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  whatever stands there
    if name == "__version__":
        try:
            return metadata.version("shields")
        except metadata.PackageNotFoundError:  # run from a source tree that is not installed
            return "0+unknown"
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
