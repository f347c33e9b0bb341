"""Structured pruning: the weakest channels go, and with them whatever read them.

A zero in a weight matrix costs as much time and space as any other number. A channel
that is gone costs nothing, but its going concerns three layers at once: the row of its
own weights and its bias, the columns of the next layer (after Flatten, one for every
position of the channel's map). torch-pruning traces these groups [FMSWM23] and removes
them together.

What goes is judged by magnitude: the l2 norm of a channel's group, the one criterion
that needs no data. A coordinator has none; under a secure sum it has the global model
and nothing else. The choice is post-processing of a model that was already released, so
it costs no privacy.

[FMSWM23] Fang et al., "DepGraph: Towards Any Structural Pruning".
          https://arxiv.org/abs/2301.12900
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fedcore.errors import ConfigurationError
from fedcore.models.architectures import Shape
from fedcore.models.widths import Widths


def prune(model: nn.Sequential, input_shape: Shape, widths: Widths) -> nn.Sequential:
    """Return a copy of `model` whose hidden layers have the given widths.

    Layers are pruned from the input to the output, each by its norms after the one before
    lost its channels. The channels that stay keep their order; equal models give equal
    results.

    Args:
        model: A chain whose last layer with weights gives the logits; is not changed.
        input_shape: Of one example, channels first.
        widths: One for each layer with weights but the last, at most as wide as it is.

    Raises:
        ConfigurationError: torch-pruning is not installed, or the widths do not fit.
    """
    try:
        import torch_pruning  # noqa: PLC0415 - only the coordinator prunes
    except ImportError as error:
        msg = 'pruning needs torch-pruning: pip install "fedcore[train]"'
        raise ConfigurationError(msg) from error
    small = copy.deepcopy(model).cpu()
    layers = [layer for layer in small if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)][:-1]
    found = [layer.weight.shape[0] for layer in layers]
    if len(widths) != len(found) or any(
        not 1 <= width <= most for width, most in zip(widths, found, strict=True)
    ):
        msg = f"expected one width for each hidden layer, at most {found}, got {list(widths)}"
        raise ConfigurationError(msg)
    graph: Any = torch_pruning.DependencyGraph()
    graph.build_dependency(small, example_inputs=torch.zeros(2, *input_shape))
    importance: Any = torch_pruning.importance.GroupMagnitudeImportance(p=2)
    for layer, width, most in zip(layers, widths, found, strict=True):
        remove = (
            torch_pruning.prune_linear_out_channels
            if isinstance(layer, nn.Linear)
            else torch_pruning.prune_conv_out_channels
        )
        group = graph.get_pruning_group(layer, remove, idxs=list(range(most)))
        weakest = importance(group).argsort(stable=True)[: most - width]
        if len(weakest):
            graph.get_pruning_group(layer, remove, idxs=sorted(weakest.tolist())).prune()
    return small
