"""Steps of DP-SGD in the memory of one example: its gradient, clipped, into a running sum.

    sum = sum over the batch of g_i min(1, C / |g_i|),   d = (sum + noise) / expected batch

No per-example gradients, no second pass, no hooks on the model; neither Opacus nor torch's
compiler is loaded. The price is a forward and a backward pass for each example, which for
small models on few cores is less than what hooks cost. Clipping, noise and the step that
follows are those of Opacus, number for number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _NormBase

from fedcore.crypto.entropy import SystemEntropy
from fedcore.training.secure_noise import secure_normal
from fedcore.training.settings import ExampleLevelPrivacy, LocalTraining
from fedcore.training.sgd import PrivateStep, descent

_NORM_FLOOR = 1e-6
"""Added to every norm, as Opacus does: the gradient of an example may be zero."""


def problem_of(model: nn.Module) -> str | None:
    """Return which module keeps something of all examples; None if none does."""
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            return f"{name} ({type(module).__name__}) averages over examples"
    return None


@contextmanager
def one_by_one_steps(
    model: nn.Module,
    config: LocalTraining,
    privacy: ExampleLevelPrivacy,
    *,
    expected_batch_size: float,
    generator: torch.Generator,
    proximal_mu: float,
) -> Iterator[PrivateStep]:
    """Give the step; it keeps one sum of the model's size and leaves nothing on the model."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    descend = descent(weights, config, proximal_mu)
    add_noise = _noise_of(privacy, generator)

    def step(x: Tensor, y: Tensor) -> Tensor:
        total = [torch.zeros_like(weight) for weight in weights]
        rows: list[Tensor] = []
        for one in range(len(y)):
            row = model(x[one : one + 1])
            loss = cross_entropy(row, y[one : one + 1])
            gradient = list(torch.autograd.grad(loss, weights))
            torch._foreach_mul_(gradient, _factor(gradient, privacy.max_grad_norm))
            torch._foreach_add_(total, gradient)
            rows.append(row.detach())
        descend([add_noise(part) / expected_batch_size for part in total])
        return torch.cat(rows) if rows else _logits_of_none(model, x)

    yield step


def _logits_of_none(model: nn.Module, x: Tensor) -> Tensor:
    """Return the logits of an empty batch, shape [0, classes]."""
    with torch.no_grad():
        logits: Tensor = model(x)
    return logits


def _factor(gradient: list[Tensor], bound: float) -> Tensor:
    """Return what scales a gradient to a norm of at most `bound`."""
    norm = torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(part) for part in gradient])
    )
    return torch.clamp(bound / (norm + _NORM_FLOOR), max=1.0)


def _noise_of(
    privacy: ExampleLevelPrivacy, generator: torch.Generator
) -> Callable[[Tensor], Tensor]:
    """Return what adds the noise to a sum; in secure mode rounded once, at the end."""
    deviation = privacy.stated_noise * privacy.max_grad_norm

    def seeded(total: Tensor) -> Tensor:
        if not deviation:
            return total
        noise = torch.normal(0.0, deviation, total.shape, generator=generator, device=total.device)
        return total + noise

    def secure(total: Tensor) -> Tensor:
        noise = torch.from_numpy(secure_normal(total.numel(), SystemEntropy()))
        noisy: Tensor = (total.double().cpu() + deviation * noise.view_as(total)).to(total)
        return noisy

    return secure if privacy.secure_mode else seeded
