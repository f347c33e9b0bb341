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


def build(config: ModelConfig, input_shape: Shape, classes: int, seed: int) -> nn.Sequential:
    """Return a model on the CPU that maps [batch, *input_shape] to logits [batch, classes].

    Args:
        config: Which model.
        input_shape: Of one example, channels first.
        classes: Number of outputs, at least 2.
        seed: Of the initial weights, in 0..2^63-1.

    Raises:
        ConfigurationError: The model cannot take inputs of this shape.
    """
    check_fit(config, input_shape)
    if classes < 2:
        msg = f"a model needs at least 2 classes, got {classes}"
        raise ConfigurationError(msg)
    if not 0 <= seed < 2**63:
        msg = f"seed must be in 0..2^63-1, got {seed}"
        raise ConfigurationError(msg)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone; GPUs keep their state
        return nn.Sequential(_layers(config, input_shape, classes))


def parameter_count(model: nn.Module) -> int:
    """Return the number of trainable weights."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def _layers(config: ModelConfig, shape: Shape, classes: int) -> OrderedDict[str, nn.Module]:
    match config:
        case Logistic():
            return _dense(shape, (), classes)
        case Mlp():
            return _dense(shape, config.hidden, classes)
        case TwoNN():
            return _dense(shape, (200, 200), classes)
        case Cnn():
            return _cnn(shape, classes)
        case LeNet():
            return _lenet(shape, classes)
        case Cnn1d():
            return _cnn1d(config, shape, classes)
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


def _cnn(shape: Shape, classes: int) -> OrderedDict[str, nn.Module]:
    channels, height, width = shape
    return OrderedDict(
        conv1=nn.Conv2d(channels, 32, 5, padding=2),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(32, 64, 5, padding=2),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(64 * (height // 2 // 2) * (width // 2 // 2), 512),
        relu3=nn.ReLU(),
        output=nn.Linear(512, classes),
    )


def _lenet(shape: Shape, classes: int) -> OrderedDict[str, nn.Module]:
    channels, height, width = shape
    padding = 2 if min(height, width) < 32 else 0  # [LBBH98] sets 28x28 digits into 32x32
    rows, columns = (((size + 2 * padding - 4) // 2 - 4) // 2 for size in (height, width))
    return OrderedDict(
        conv1=nn.Conv2d(channels, 6, 5, padding=padding),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(6, 16, 5),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(16 * rows * columns, 120),
        relu3=nn.ReLU(),
        fc2=nn.Linear(120, 84),
        relu4=nn.ReLU(),
        output=nn.Linear(84, classes),
    )


def _cnn1d(config: Cnn1d, shape: Shape, classes: int) -> OrderedDict[str, nn.Module]:
    sensors, length = shape
    padding = config.kernel // 2
    return OrderedDict(
        conv1=nn.Conv1d(sensors, config.channels, config.kernel, padding=padding),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool1d(2),
        conv2=nn.Conv1d(config.channels, config.channels, config.kernel, padding=padding),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool1d(2),
        flatten=nn.Flatten(),
        fc1=nn.Linear(config.channels * (length // 2 // 2), config.hidden),
        relu3=nn.ReLU(),
        output=nn.Linear(config.hidden, classes),
    )
