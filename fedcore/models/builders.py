"""From a model's description to its torch module, with weights that follow from a seed.

Torch's layers draw their initial weights from a global generator. `build` saves
that generator, seeds it, and puts it back: the weights depend on the seed alone,
and whoever draws next gets what they would have got without us. (A private
generator would need layers built on the meta device, which loads 500 modules and
37 MB: too much for a board.)
"""

from __future__ import annotations

from collections import OrderedDict
from math import prod
from typing import assert_never

import torch
from torch import nn

from fedcore.errors import ConfigurationError
from fedcore.models.architectures import (
    Cnn,
    Cnn1d,
    LeNet,
    Logistic,
    Mlp,
    ModelConfig,
    Shape,
    TwoNN,
    check_fit,
)
from fedcore.models.widths import Widths, hidden_widths


def build(
    config: ModelConfig,
    input_shape: Shape,
    classes: int,
    seed: int,
    widths: Widths | None = None,
) -> nn.Sequential:
    """Return a model on the CPU that maps [batch, *input_shape] to logits [batch, classes].

    Args:
        config: Which model.
        input_shape: Of one example, channels first.
        classes: Number of outputs, at least 2.
        seed: Of the initial weights, in 0..2^63-1.
        widths: Of the hidden layers after pruning; None for those of `config`.

    Raises:
        ConfigurationError: The model cannot take inputs of this shape, or has another number
            of hidden layers.
    """
    check_fit(config, input_shape)
    if classes < 2:
        msg = f"a model needs at least 2 classes, got {classes}"
        raise ConfigurationError(msg)
    if not 0 <= seed < 2**63:
        msg = f"seed must be in 0..2^63-1, got {seed}"
        raise ConfigurationError(msg)
    expected = hidden_widths(config)
    given = expected if widths is None else widths
    if len(given) != len(expected):
        msg = f"model {config.kind} has {len(expected)} hidden layers, got widths {list(given)}"
        raise ConfigurationError(msg)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone; GPUs keep their state
        return nn.Sequential(_layers(config, input_shape, classes, given))


def parameter_count(model: nn.Module) -> int:
    """Return the number of trainable weights."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def _layers(
    config: ModelConfig, shape: Shape, classes: int, widths: Widths
) -> OrderedDict[str, nn.Module]:
    match config:
        case Logistic() | Mlp() | TwoNN():
            return _dense(shape, widths, classes)
        case Cnn():
            return _cnn(shape, classes, widths)
        case LeNet():
            return _lenet(shape, classes, widths)
        case Cnn1d():
            return _cnn1d(config, shape, classes, widths)
        case _:
            assert_never(config)


def _dense(shape: Shape, hidden: Shape, classes: int) -> OrderedDict[str, nn.Module]:
    layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    width = prod(shape)
    for number, following in enumerate(hidden, start=1):
        layers[f"fc{number}"] = nn.Linear(width, following)
        layers[f"relu{number}"] = nn.ReLU()
        width = following
    layers["output"] = nn.Linear(width, classes)
    return layers


def _cnn(shape: Shape, classes: int, widths: Widths) -> OrderedDict[str, nn.Module]:
    channels, height, width = shape
    first, second, hidden = widths
    return OrderedDict(
        conv1=nn.Conv2d(channels, first, 5, padding=2),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(first, second, 5, padding=2),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(second * (height // 2 // 2) * (width // 2 // 2), hidden),
        relu3=nn.ReLU(),
        output=nn.Linear(hidden, classes),
    )


def _lenet(shape: Shape, classes: int, widths: Widths) -> OrderedDict[str, nn.Module]:
    channels, height, width = shape
    first, second, third, fourth = widths
    padding = 2 if min(height, width) < 32 else 0  # [LBBH98] sets 28x28 digits into 32x32
    rows, columns = (((size + 2 * padding - 4) // 2 - 4) // 2 for size in (height, width))
    return OrderedDict(
        conv1=nn.Conv2d(channels, first, 5, padding=padding),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(first, second, 5),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(second * rows * columns, third),
        relu3=nn.ReLU(),
        fc2=nn.Linear(third, fourth),
        relu4=nn.ReLU(),
        output=nn.Linear(fourth, classes),
    )


def _cnn1d(
    config: Cnn1d, shape: Shape, classes: int, widths: Widths
) -> OrderedDict[str, nn.Module]:
    sensors, length = shape
    first, second, hidden = widths
    padding = config.kernel // 2
    return OrderedDict(
        conv1=nn.Conv1d(sensors, first, config.kernel, padding=padding),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool1d(2),
        conv2=nn.Conv1d(first, second, config.kernel, padding=padding),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool1d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(second * (length // 2 // 2), hidden),
        relu3=nn.ReLU(),
        output=nn.Linear(hidden, classes),
    )
