"""A torch model as named numpy arrays, and back.

Arrays that come out are the caller's own: training on does not change them. Arrays
that go in are copied into the memory that the model already has. One copy each way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedcore.errors import ConfigurationError


def get_arrays(model: nn.Module, *, copy: bool = True) -> dict[str, npt.NDArray[Any]]:
    """Return the model's state, in the order of its state dict.

    Args:
        model: Any module.
        copy: False shares the memory of a model on the CPU: free, but the next
            training step or `set_arrays` changes the arrays under their owner.
    """
    shared = {name: tensor.cpu().numpy() for name, tensor in model.state_dict().items()}
    return {name: array.copy() for name, array in shared.items()} if copy else shared


def set_arrays(model: nn.Module, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
    """Overwrite the model's state; all of it, or nothing if something does not fit.

    Args:
        model: Keeps its tensors, so optimizers and views of them stay valid.
        arrays: One for each entry of the state dict; may be read-only.

    Raises:
        ConfigurationError: Names, shapes or kinds of numbers differ from the model's.
    """
    state = model.state_dict()
    if state.keys() != arrays.keys():
        missing, unknown = (
            sorted(state.keys() - arrays.keys()),
            sorted(arrays.keys() - state.keys()),
        )
        msg = (
            f"expected the {len(state)} arrays of the model, found {len(arrays)}; missing "
            f"{missing[:6]}, unknown {unknown[:6]}: client and server must use the same model"
        )
        raise ConfigurationError(msg)
    targets = {name: tensor.cpu().numpy() for name, tensor in state.items()}
    for name, target in targets.items():
        found = arrays[name]
        if found.shape != target.shape or not np.can_cast(found.dtype, target.dtype, "same_kind"):
            msg = (
                f"expected array {name!r} as {target.dtype}{list(target.shape)}, found "
                f"{found.dtype}{list(found.shape)}: client and server must use the same model"
            )
            raise ConfigurationError(msg)
    for name, tensor in state.items():
        np.copyto(targets[name], arrays[name], casting="same_kind")
        if tensor.device.type != "cpu":  # then the target was a copy
            tensor.copy_(torch.from_numpy(targets[name]))
