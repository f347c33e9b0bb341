"""A strategy that goes on where another process stopped.

Flower counts the rounds of each start from 1, and a strategy may compute with the number
(FedAdam corrects its moments' bias by it), as do devices. `Delegating` counts on. What a
strategy gathered over the rounds lies in attributes of its own; those of Flower's are
named here, and a test sees to it that no other attribute changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.fedopt import FedOpt

from fedcore.engine import to_arrays, to_record
from fedcore.errors import ConfigurationError
from strategies.checkpoint import StrategyState
from strategies.progress import Arrays
from strategies.pruning import PrunedStrategy

_ATTRIBUTES = ("current_arrays", "momentum_vector", "m_t", "v_t")


def gathered_by(strategy: Strategy) -> StrategyState:
    """Return what a strategy of `strategies.factory`, pruned or not, has gathered."""
    if isinstance(strategy, PrunedStrategy):
        return StrategyState(strategy.shrunk, gathered_by(strategy.inner).gathered)
    found = {name: getattr(strategy, name, None) for name in _ATTRIBUTES}
    return StrategyState(
        gathered={name: _named(value) for name, value in found.items() if value is not None}
    )


def give_back(strategy: Strategy, state: StrategyState) -> None:
    """Let a fresh strategy go on with what another of its kind had gathered.

    Raises:
        ConfigurationError: It was another kind.
    """
    if isinstance(strategy, PrunedStrategy):
        if state.pruned:
            strategy.take_over()
        give_back(strategy.inner, StrategyState(gathered=state.gathered))
        return
    unknown = [name for name in state.gathered if not hasattr(strategy, name)]
    if unknown or state.pruned:
        msg = (
            f"the checkpoint is of another strategy than {type(strategy).__name__}: go on with "
            "the configuration that wrote it"
        )
        raise ConfigurationError(msg)
    for name, arrays in state.gathered.items():
        setattr(strategy, name, _as_kept_by(strategy, name, arrays))


def _named(value: ArrayRecord | Mapping[str, Any] | list[npt.NDArray[Any]]) -> Arrays:
    match value:
        case ArrayRecord():
            return to_arrays(value)
        case list():
            return {str(place): np.asarray(array) for place, array in enumerate(value)}
        case _:
            return {name: np.asarray(array) for name, array in value.items()}


def _as_kept_by(strategy: Strategy, name: str, arrays: Arrays) -> object:
    if isinstance(strategy, flower.FedAvgM):
        return to_record(arrays) if name == "current_arrays" else list(arrays.values())
    return dict(arrays) if isinstance(strategy, FedOpt) else arrays
