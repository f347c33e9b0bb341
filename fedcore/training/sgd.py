"""Local training: plain SGD with as little around it as possible.

A federated client takes few steps on few examples, so a small model's time goes
into the operators around the arithmetic. Hence no DataLoader, no module of
`torch.optim` (which loads torch._dynamo: 60-90 MB and a second of CPU), no extra
forward pass for the metrics, and one of two steps:

    dense      a chain of linear layers: backward pass and update in one product
               a layer, without autograd (see `dense`)
    autograd   any other module: `torch.autograd.grad` and fused updates

Both compute, with g the mean gradient of a batch [LSZ+20 for the term in mu],

    d = g + weight_decay w + mu (w - w_start);  v = momentum v + d;  w = w - rate v

which is `torch.optim.SGD` when mu is 0.

[LSZ+20] Li et al., "Federated Optimization in Heterogeneous Networks" (FedProx).
         https://arxiv.org/abs/1812.06127
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedcore.errors import ConfigurationError
from fedcore.training.dense import dense_layers, dense_step
from fedcore.training.objectives import Objective, SoftTargets, objective_of
from fedcore.training.settings import LocalTraining, TrainReport

Step: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Takes inputs [batch, ...], labels [batch] and a teacher's probabilities [batch, classes], if
there is one; updates the model, returns logits."""
PrivateStep: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""The same for DP-SGD, which learns from labels alone: takes a batch, which may be empty."""


def one_thread() -> None:
    """Pin torch to one thread in this process; call it once where a worker starts.

    Two threads are 5 to 10 times slower than one when anything else wants the
    cores. Parallelism comes from processes, one model each.
    """
    torch.set_num_threads(1)


def train(
    model: nn.Module,
    x: npt.NDArray[np.float32],
    y: npt.NDArray[np.int64],
    config: LocalTraining,
    rng: np.random.Generator,
    *,
    proximal_mu: float = 0.0,
    teacher: SoftTargets | None = None,
    device: str = "cpu",
) -> TrainReport:
    """Train `model` in place on one client's examples.

    The same weights, examples and `rng` give the same weights bit for bit. (A
    module that draws in its forward pass, such as dropout, uses torch's generator.)

    Args:
        model: Moved to `device` and left there, in training mode.
        x: Shape [n, *input_shape].
        y: Shape [n].
        config: How to train.
        rng: Shuffles; not used when one batch holds all examples.
        proximal_mu: Strength of FedProx's pull towards the weights at the start.
        teacher: What a larger model thinks of `x`, row by row; None for labels alone.
        device: Where to compute, e.g. "cuda:0".

    Raises:
        ConfigurationError: There are no examples, `proximal_mu` is negative, or the teacher
            speaks of another number of examples.
    """
    check_examples(x, y)
    check_proximal(proximal_mu)
    model.to(device).train()
    inputs, labels = as_tensor(x, device), as_tensor(y, device)
    objective, soft = objective_of(teacher, len(y), device)
    layers = dense_layers(model)
    step = (
        _autograd_step(model, config, proximal_mu, objective)
        if layers is None
        else dense_step(layers, config, proximal_mu, objective)
    )
    for _ in range(config.epochs):
        logits, seen = [], []
        for x_batch, y_batch, soft_batch in _batches(inputs, labels, soft, config.batch_size, rng):
            logits.append(step(x_batch, y_batch, soft_batch))
            seen.append(y_batch)
    loss, correct = measure(torch.cat(logits), torch.cat(seen))
    return TrainReport(loss / len(y), correct / len(y), len(y))


def check_examples(x: npt.NDArray[np.float32], y: npt.NDArray[np.int64]) -> None:
    """Refuse an empty client, and inputs without a label each.

    Raises:
        ConfigurationError: As said.
    """
    if len(x) != len(y) or not len(y):
        msg = (
            f"a client needs one label for each of its examples and at least one example, "
            f"got {len(x)} inputs and {len(y)} labels"
        )
        raise ConfigurationError(msg)


def check_proximal(mu: float) -> None:
    """Refuse a proximal term that pushes away.

    Raises:
        ConfigurationError: `mu` is negative or not finite.
    """
    if not 0 <= mu < np.inf:
        msg = f"proximal_mu must be 0 or more and finite, got {mu}: 0 turns it off"
        raise ConfigurationError(msg)


def as_tensor(array: npt.NDArray[np.float32] | npt.NDArray[np.int64], device: str) -> Tensor:
    """Share the memory of `array` on the CPU; copy only what torch cannot share."""
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)


def measure(logits: Tensor, labels: Tensor) -> tuple[float, int]:
    """Return the summed cross-entropy and the number of right answers."""
    loss = cross_entropy(logits, labels, reduction="sum")
    return float(loss), int((logits.argmax(1) == labels).sum())


def _batches(
    inputs: Tensor,
    labels: Tensor,
    soft: Tensor | None,
    batch_size: int,
    rng: np.random.Generator,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    if not 0 < batch_size < len(labels):
        yield inputs, labels, soft
        return
    order = torch.from_numpy(rng.permutation(len(labels))).to(inputs.device)
    for rows in order.split(batch_size):  # type: ignore[no-untyped-call]
        opinions = None if soft is None else soft.index_select(0, rows)
        yield inputs.index_select(0, rows), labels.index_select(0, rows), opinions


def _autograd_step(
    model: nn.Module, config: LocalTraining, mu: float, objective: Objective
) -> Step:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    descend = descent(weights, config, mu)

    def step(x: Tensor, y: Tensor, soft: Tensor | None) -> Tensor:
        logits: Tensor = model(x)
        descend(list(torch.autograd.grad(objective.loss(logits, y, soft), weights)))
        return logits.detach()

    return step


def descent(
    weights: list[nn.Parameter], config: LocalTraining, mu: float
) -> Callable[[list[Tensor]], None]:
    """Return what takes one step along a gradient, which it overwrites."""
    plain = [weight.data for weight in weights]  # updates outside of autograd's sight
    start = [weight.clone() for weight in plain] if mu else []
    velocity = [torch.zeros_like(weight) for weight in plain] if config.momentum else []

    def descend(change: list[Tensor]) -> None:
        if config.weight_decay:
            torch._foreach_add_(change, plain, alpha=config.weight_decay)
        if mu:
            torch._foreach_add_(change, plain, alpha=mu)
            torch._foreach_add_(change, start, alpha=-mu)
        if config.momentum:
            torch._foreach_mul_(velocity, config.momentum)
            torch._foreach_add_(velocity, change)
            change = velocity
        torch._foreach_add_(plain, change, alpha=-config.learning_rate)

    return descend
