"""What a model costs whoever runs it, counted rather than measured.

Latency depends on the machine and on who else uses it; multiplications and weights do
not. Torch counts the operations of one forward pass, whatever the layers are.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What one prediction takes.

    Attributes:
        parameters: Weights.
        macs: Multiply-accumulate operations for one sample, those of biases, activations and
            pooling left out.
    """

    parameters: int
    macs: int


def size_of(model: torch.nn.Module, input_shape: tuple[int, ...]) -> ModelSize:
    """Return the size of `model`, which is not changed, for inputs of this shape."""
    import torch  # noqa: PLC0415
    from torch.utils.flop_counter import FlopCounterMode  # noqa: PLC0415

    still = copy.deepcopy(model).cpu().eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        still(torch.zeros(1, *input_shape))
    return ModelSize(
        parameters=sum(weight.numel() for weight in still.parameters()),
        macs=counter.get_total_flops() // 2,  # a multiplication and an addition each
    )
