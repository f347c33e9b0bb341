"""One SGD step of a chain of linear layers, without autograd.

For y = a W^T + b with ReLU between the layers, the gradient of the mean
objective is its error / batch at the logits (for cross-entropy: softmax - onehot), and
going back

    dW = g^T a,  db = g^T 1,  g_before = (g W) where a > 0

A matrix product can add into its result: `W <- beta W + alpha g^T a` is gradient,
weight decay and update in one call, while W is still in the cache. Fifteen
operators replace the fifty of autograd, which is what a step on ten examples costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fedcore.training.objectives import Objective
from fedcore.training.settings import LocalTraining

Layers: TypeAlias = list[tuple[Tensor, Tensor]]
"""Weight [out, in] and bias [out] of each layer, sharing the model's memory."""


def dense_layers(model: nn.Module) -> Layers | None:
    """Return the layers if `model` is Flatten, Linear, ReLU, Linear, ..., else None.

    Exact types only: a subclass, a hook or a frozen weight may mean anything.
    """
    if type(model) is not nn.Sequential:
        return None
    modules = list(model)
    if modules and type(modules[0]) is nn.Flatten and modules[0].start_dim == 1:
        modules = modules[1:]
    if not len(modules) % 2:
        return None
    expected = [nn.ReLU if place % 2 else nn.Linear for place in range(len(modules))]
    if [type(module) for module in modules] != expected or any(map(_is_hooked, model.modules())):
        return None
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    if not all(map(_is_plain, linear)):
        return None
    return [(layer.weight.data, layer.bias.data) for layer in linear]


def _is_hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)  # noqa: SLF001
    return any(hooks)


def _is_plain(layer: nn.Linear) -> bool:
    return (
        isinstance(layer.bias, Tensor)
        and layer.weight.requires_grad
        and layer.bias.requires_grad
        and layer.weight.dtype == torch.float32
        and layer.weight.is_contiguous()
    )


def dense_step(
    layers: Layers, config: LocalTraining, mu: float, objective: Objective
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Return the step of `fedcore.training.sgd` for these layers; see there."""
    onehot = torch.eye(len(layers[-1][1]), device=layers[-1][1].device)
    update = (
        _momentum_update(layers, config, mu) if config.momentum else _update(layers, config, mu)
    )

    @torch.no_grad()
    def step(x: Tensor, y: Tensor, soft: Tensor | None) -> Tensor:
        below = [x.flatten(1)]
        for weight, bias in layers[:-1]:
            below.append(torch.addmm(bias, below[-1], weight.t()).relu_())
        logits = torch.addmm(layers[-1][1], below[-1], layers[-1][0].t())
        gradient = objective.error(logits, onehot.index_select(0, y), soft)
        for place in range(len(layers) - 1, -1, -1):
            after, activation = gradient, below[place]
            if place:  # before this layer's weights change
                gradient = torch.ops.aten.threshold_backward(
                    after.mm(layers[place][0]), activation, 0
                )
            update(place, after, activation)
        return logits

    return step


Update: TypeAlias = Callable[[int, Tensor, Tensor], None]


def _update(layers: Layers, config: LocalTraining, mu: float) -> Update:
    rate = config.learning_rate
    keep = 1 - rate * (config.weight_decay + mu)
    start = [(weight.clone(), bias.clone()) for weight, bias in layers] if mu else []

    def update(place: int, gradient: Tensor, activation: Tensor) -> None:
        weight, bias = layers[place]
        share = rate / len(gradient)
        weight.addmm_(gradient.t(), activation, beta=keep, alpha=-share)
        if keep != 1:
            bias.mul_(keep)
        bias.sub_(gradient.sum(0), alpha=share)
        if mu:
            weight.add_(start[place][0], alpha=rate * mu)
            bias.add_(start[place][1], alpha=rate * mu)

    return update


def _momentum_update(layers: Layers, config: LocalTraining, mu: float) -> Update:
    start = [(weight.clone(), bias.clone()) for weight, bias in layers] if mu else []
    velocity = [(torch.zeros_like(weight), torch.zeros_like(bias)) for weight, bias in layers]
    decay = config.weight_decay + mu

    def update(place: int, gradient: Tensor, activation: Tensor) -> None:
        speed = velocity[place]
        share = 1 / len(gradient)
        speed[0].addmm_(gradient.t(), activation, beta=config.momentum, alpha=share)
        speed[1].mul_(config.momentum).add_(gradient.sum(0), alpha=share)
        for side, weight in enumerate(layers[place]):
            if decay:
                speed[side].add_(weight, alpha=decay)
            if mu:
                speed[side].sub_(start[place][side], alpha=mu)
            weight.sub_(speed[side], alpha=config.learning_rate)

    return update
