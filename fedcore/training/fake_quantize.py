"""A model that computes in floats what its int8 release will compute in integers.

Quantisation-aware training [JKC+18]: every value that the release keeps as int8 is
rounded to the same grid in the forward pass, and the backward pass goes straight
through the rounding, so that local training settles on weights that the rounding does
not hurt. The grids are those of `fedcore.release.quantize_int8`:

    weights      symmetric, one scale per output channel: max|w| / 127
    activations  the input and what leaves each ReLU, one scale per tensor: the range
                 that was seen, zero included, in 255 steps
    logits       float, as in the release

(The release rounds biases too, to 32 bits: a ten-thousandth of an activation's step.)
A release takes its ranges from public calibration data. A device has its own examples:
ranges start from one pass of the float model over them, and widen while the weights
move. Nothing is added to the model: it has no more state than before, so there is
nothing more to aggregate, and nothing new to leak.

[JKC+18] Jacob et al., "Quantization and Training of Neural Networks for Efficient
         Integer-Arithmetic-Only Inference". https://arxiv.org/abs/1712.05877
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fedcore.errors import ConfigurationError
from fedcore.training.sgd import as_tensor

_SMALLEST_STEP = torch.finfo(torch.float32).eps  # a channel of zeros still needs a scale
_PASSED_ON = (nn.Flatten, nn.MaxPool1d, nn.MaxPool2d)  # keep values on the grid


def fake_int8(model: nn.Module, x: npt.NDArray[np.float32]) -> nn.Sequential:
    """Return a view of `model` that computes like its int8 release.

    The view shares the model's weights: to train it is to train the model.

    Args:
        model: A chain of Linear, Conv, ReLU, MaxPool and Flatten.
        x: Shape [n, *input_shape]: their values set the ranges of the activations, which
            widen in training mode and stay in evaluation mode.

    Raises:
        ConfigurationError: The model is no such chain.
    """
    layers: list[nn.Module] = [_Activation()]
    for module in model.children():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            layers.append(_Weighted(module))
        elif isinstance(module, nn.ReLU):
            layers += [module, _Activation()]
        elif isinstance(module, _PASSED_ON):
            layers.append(module)
        else:
            msg = (
                "quantisation-aware training knows chains of Linear, Conv, ReLU, MaxPool and "
                f"Flatten, found {type(module).__name__}: choose qat=none"
            )
            raise ConfigurationError(msg)
    device = str(next((weight.device for weight in model.parameters()), "cpu"))
    _set_ranges(layers, as_tensor(x, device))
    return nn.Sequential(*layers).train()


@torch.no_grad()
def _set_ranges(layers: list[nn.Module], x: Tensor) -> None:
    """Show each rounding what passes by in floats, as the release's calibration does."""
    for layer in layers:
        if isinstance(layer, _Activation):
            layer.see(x)
        else:
            x = layer.layer(x) if isinstance(layer, _Weighted) else layer(x)


class _Activation(nn.Module):
    """Rounds to 256 values that cover all it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self._low = self._high = torch.zeros(())

    def see(self, x: Tensor) -> None:
        """Widen the range to cover `x`."""
        low, high = x.aminmax()
        self._low = torch.minimum(self._low.to(x.device), low)
        self._high = torch.maximum(self._high.to(x.device), high)

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` [any shape] on the grid; values beyond it are clipped."""
        if self.training:
            self.see(x.detach())
        step = ((self._high - self._low) / 255).clamp_min(_SMALLEST_STEP)
        zero = (-128 - self._low / step).round().to(torch.int32)
        result: Tensor = torch.fake_quantize_per_tensor_affine(x, step, zero, -128, 127)
        return result


class _Weighted(nn.Module):
    """A layer whose weights are rounded to 255 values for each output channel."""

    def __init__(self, layer: nn.Linear | nn.Conv1d | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output, with the weights that the release has."""
        weight = self.layer.weight
        step = (weight.detach().abs().flatten(1).amax(1) / 127).clamp_min(_SMALLEST_STEP)
        zero = torch.zeros(len(step), dtype=torch.int32, device=step.device)
        rounded = torch.fake_quantize_per_channel_affine(weight, step, zero, 0, -127, 127)
        if isinstance(self.layer, nn.Linear):
            return linear(x, rounded, self.layer.bias)
        result: Tensor = self.layer._conv_forward(x, rounded, self.layer.bias)  # noqa: SLF001
        return result
