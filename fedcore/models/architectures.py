"""The models that a configuration can name.

Each class says what a model is; `fedcore.models.build` makes the torch module.
All are plain chains of Linear, Conv, ReLU, MaxPool and Flatten: no state but
weights, nothing drawn at random in the forward pass, no batch statistics that
would leak across examples or break per-example gradients. What runs on a device
as int8 is the same chain.

    Logistic, Mlp, TwoNN   any input, flattened
    Cnn, LeNet             images [channels, height, width]
    Cnn1d                  sensor windows [channels, length]

[MMRHA17] McMahan et al., "Communication-Efficient Learning of Deep Networks from
          Decentralized Data", section 3. https://arxiv.org/abs/1602.05629
[LBBH98] LeCun et al., "Gradient-Based Learning Applied to Document Recognition".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, assert_never

from fedcore.errors import ConfigurationError

Shape: TypeAlias = tuple[int, ...]
"""Of one example, channels first."""

_MAX_WIDTH = 65_536


@dataclass(frozen=True, slots=True)
class Logistic:
    """Multinomial logistic regression: one linear layer."""

    kind: Literal["logistic"] = "logistic"


@dataclass(frozen=True, slots=True)
class Mlp:
    """Fully connected layers with ReLU between them.

    Attributes:
        hidden: Width of each hidden layer.
    """

    kind: Literal["mlp"] = "mlp"
    hidden: tuple[int, ...] = (128,)

    def __post_init__(self) -> None:
        """Check ranges."""
        if not self.hidden or not all(1 <= width <= _MAX_WIDTH for width in self.hidden):
            msg = (
                f"model.hidden must be one or more widths in 1..{_MAX_WIDTH}, got "
                f"{list(self.hidden)}: use kind=logistic for a model without hidden layers"
            )
            raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class TwoNN:
    """McMahan's 2NN, two hidden layers of 200: 199,210 parameters on MNIST."""

    kind: Literal["two_nn"] = "two_nn"


@dataclass(frozen=True, slots=True)
class Cnn:
    """McMahan's CNN, 5x5 convolutions of 32 and 64 channels: 1,663,370 parameters on MNIST."""

    kind: Literal["cnn"] = "cnn"


@dataclass(frozen=True, slots=True)
class LeNet:
    """LeNet-5 with ReLU and max pooling: 61,706 parameters on 28x28 or 32x32 grey images."""

    kind: Literal["lenet"] = "lenet"


@dataclass(frozen=True, slots=True)
class Cnn1d:
    """Two convolutions over time and one hidden layer, for windows of sensor readings.

    Attributes:
        channels: Feature maps of each convolution.
        kernel: Odd length of a filter, in samples.
        hidden: Width of the fully connected layer.
    """

    kind: Literal["cnn1d"] = "cnn1d"
    channels: int = 64
    kernel: int = 5
    hidden: int = 128

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, width in (("channels", self.channels), ("hidden", self.hidden)):
            if not 1 <= width <= _MAX_WIDTH:
                msg = f"model.{name} must be in 1..{_MAX_WIDTH}, got {width}"
                raise ConfigurationError(msg)
        if not (1 <= self.kernel <= 255 and self.kernel % 2):
            msg = (
                f"model.kernel must be an odd number in 1..255, got {self.kernel}: "
                "only odd filters keep the length of the window"
            )
            raise ConfigurationError(msg)


ModelConfig: TypeAlias = Logistic | Mlp | TwoNN | Cnn | LeNet | Cnn1d


def check_fit(config: ModelConfig, input_shape: Shape) -> None:
    """Refuse an input shape that `config` cannot take; needs no torch.

    Raises:
        ConfigurationError: With the smallest shape that would do.
    """
    if not input_shape or min(input_shape) < 1:
        msg = f"model {config.kind} needs inputs with at least one value, got {list(input_shape)}"
        raise ConfigurationError(msg)
    match config:
        case Logistic() | Mlp() | TwoNN():
            return
        case Cnn():
            # Below 12, the second 5x5 filter sees more padding than image.
            _require_image(config.kind, input_shape, smallest=12)
        case LeNet():
            _require_image(config.kind, input_shape, smallest=28)
        case Cnn1d():
            smallest = max(4, config.kernel)
            if len(input_shape) != 2 or input_shape[1] < smallest:
                msg = (
                    f"model cnn1d with kernel {config.kernel} needs windows [channels, length] of "
                    f"at least {smallest} samples, got {list(input_shape)}: lower model.kernel, "
                    "use longer windows, or choose model mlp"
                )
                raise ConfigurationError(msg)
        case _:
            assert_never(config)


def _require_image(kind: str, shape: Shape, *, smallest: int) -> None:
    if len(shape) != 3 or min(shape[1:]) < smallest:
        msg = (
            f"model {kind} needs images of at least {smallest}x{smallest} as "
            f"[channels, height, width], got {list(shape)}: choose model mlp or another data set"
        )
        raise ConfigurationError(msg)
