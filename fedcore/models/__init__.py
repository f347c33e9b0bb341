"""Models by name: light descriptions, and `build`, which loads torch when first used."""

from importlib import import_module
from typing import TYPE_CHECKING

from fedcore.models.architectures import (
    Cnn,
    Cnn1d,
    LeNet,
    Logistic,
    Mlp,
    ModelConfig,
    TwoNN,
    check_fit,
)

if TYPE_CHECKING:
    from fedcore.models.builders import build, parameter_count

__all__ = [
    "Cnn",
    "Cnn1d",
    "LeNet",
    "Logistic",
    "Mlp",
    "ModelConfig",
    "TwoNN",
    "build",
    "check_fit",
    "parameter_count",
]


def __getattr__(name: str) -> object:
    """Import what needs torch when it is asked for [PEP 562]."""
    if name in {"build", "parameter_count"}:
        return getattr(import_module("fedcore.models.builders"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
