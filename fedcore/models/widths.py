"""How wide the hidden layers of a model are, and how wide pruning leaves them.

All models here are chains, so an architecture is its description and one number for
each hidden layer: its output channels, or its units. Structured pruning lowers these
numbers and nothing else. How far is a matter of configuration, known to everybody
before the run; which channels go is decided by the weights, by whoever holds the
global model (`fedcore.models.prune`). So devices need no description of the pruned
model beside their job: arrays of either size fit exactly one of two known shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal, TypeAlias, assert_never

import numpy.typing as npt

from fedcore.errors import ConfigurationError
from fedcore.models.architectures import Cnn, Cnn1d, LeNet, Logistic, Mlp, ModelConfig, TwoNN

Widths: TypeAlias = tuple[int, ...]
"""Of the hidden layers, in the order of the chain."""


@dataclass(frozen=True, slots=True)
class NoPruning:
    """Every channel stays."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, slots=True)
class Structured:
    """Remove the weakest channels of every hidden layer, once, and train on without them.

    Attributes:
        ratio: Share of each hidden layer's channels that goes.
        after_round: The last round with all of them; 0 prunes the initial weights.
        multiple: Widths that stay are multiples of this, rounded up: int8 kernels work on
            8, 16 or 32 channels at a time. 1 for none.
    """

    ratio: float = 0.5
    after_round: int = 0
    multiple: int = 1
    kind: Literal["structured"] = "structured"

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.ratio < 1:
            msg = f"pruning.ratio must be in (0, 1), got {self.ratio}: choose pruning=none for 0"
            raise ConfigurationError(msg)
        if self.after_round < 0:
            msg = f"pruning.after_round must be 0 or more, got {self.after_round}"
            raise ConfigurationError(msg)
        if not 1 <= self.multiple <= 1024:
            msg = f"pruning.multiple must be in 1..1024, got {self.multiple}: 8 suits int8 kernels"
            raise ConfigurationError(msg)


Pruning: TypeAlias = Structured | NoPruning


def hidden_widths(config: ModelConfig) -> Widths:
    """Return the widths of the model's hidden layers; none for a linear model."""
    match config:
        case Logistic():
            return ()
        case Mlp():
            return config.hidden
        case TwoNN():
            return (200, 200)
        case Cnn():
            return (32, 64, 512)
        case LeNet():
            return (6, 16, 120, 84)
        case Cnn1d():
            return (config.channels, config.channels, config.hidden)
        case _:
            assert_never(config)


def pruned_widths(config: ModelConfig, pruning: Pruning) -> Widths | None:
    """Return the widths that pruning leaves; None if it is off.

    Raises:
        ConfigurationError: No channel would go.
    """
    if isinstance(pruning, NoPruning):
        return None
    before, step = hidden_widths(config), pruning.multiple
    # The small term undoes the rounding of 1 - ratio: 0.9 of 20 channels leaves 2, not 3.
    after = tuple(
        min(width, step * max(1, ceil(width * (1 - pruning.ratio) / step - 1e-9)))
        for width in before
    )
    if after == before:
        msg = (
            f"pruning.ratio={pruning.ratio:g} in multiples of {step} leaves all hidden layers "
            f"{list(before)} of model {config.kind} as they are: raise the ratio, lower "
            "pruning.multiple, or choose pruning=none"
        )
        raise ConfigurationError(msg)
    return after


def widths_of(arrays: Mapping[str, npt.NDArray[Any]]) -> Widths:
    """Return the widths of the hidden layers of the chain whose state is `arrays`."""
    weights = [array for name, array in arrays.items() if name.endswith(".weight")]
    return tuple(int(weight.shape[0]) for weight in weights[:-1])


def fitting_widths(
    config: ModelConfig, pruning: Pruning, arrays: Mapping[str, npt.NDArray[Any]]
) -> Widths | None:
    """Return the widths to build a model with that takes `arrays`; None for the description's.

    Only what the configuration names is built, whatever the arrays look like: arrays that
    fit neither model are refused by `set_arrays`, as always.
    """
    pruned = pruned_widths(config, pruning)
    return pruned if pruned is not None and widths_of(arrays) == pruned else None
