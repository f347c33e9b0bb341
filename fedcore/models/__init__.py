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
from fedcore.models.widths import (
    NoPruning,
    Pruning,
    Structured,
    Widths,
    fitting_widths,
    hidden_widths,
    pruned_widths,
    widths_of,
)

if TYPE_CHECKING:
    from fedcore.models.builders import build, parameter_count
    from fedcore.models.pruning import prune

__all__ = [
    "Cnn",
    "Cnn1d",
    "LeNet",
    "Logistic",
    "Mlp",
    "ModelConfig",
    "NoPruning",
    "Pruning",
    "Structured",
    "TwoNN",
    "Widths",
    "build",
    "check_fit",
    "fitting_widths",
    "hidden_widths",
    "parameter_count",
    "prune",
    "pruned_widths",
    "widths_of",
]

_HOMES = {"build": "builders", "parameter_count": "builders", "prune": "pruning"}


def __getattr__(name: str) -> object:
    """Import what needs torch when it is asked for [PEP 562]."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
