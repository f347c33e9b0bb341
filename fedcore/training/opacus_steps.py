"""Steps of DP-SGD by Opacus: all gradients of a batch at once.

Opacus clips in one of two ways with the same result: by per-example gradients in memory,
or by ghost norms and a second, reweighted backward pass [LTLH22].

[LTLH22] Li et al., https://arxiv.org/abs/2110.05679
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedcore.crypto.entropy import SystemEntropy
from fedcore.training.secure_noise import secure_normal
from fedcore.training.settings import ExampleLevelPrivacy, LocalTraining
from fedcore.training.sgd import PrivateStep

Gradients: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Takes a batch, leaves what the optimizer needs on the weights, returns logits."""


def problem_of(model: nn.Module) -> str | None:
    """Return why Opacus does not take a model; None if it does."""
    problems = ModuleValidator.validate(model, strict=False)
    return str(problems[0]) if problems else None


@contextmanager
def opacus_steps(
    model: nn.Module,
    config: LocalTraining,
    privacy: ExampleLevelPrivacy,
    *,
    expected_batch_size: float,
    generator: torch.Generator,
    proximal_mu: float,
) -> Iterator[PrivateStep]:
    """Give the step; Opacus' hooks are on the model until the block ends."""
    wrapped, optimizer, gradients = _attach(
        model, config, privacy, expected_batch_size=expected_batch_size, generator=generator
    )
    optimizer.attach_step_hook(_proximal_hook(model, proximal_mu))

    def step(x: Tensor, y: Tensor) -> Tensor:
        logits = gradients(x, y)
        optimizer.step()
        optimizer.zero_grad()
        return logits

    try:
        yield step
    finally:
        _detach(model, wrapped)


class _SecureNoise:
    """Replaces the noise of an Opacus optimizer by the operating system's."""

    def add_noise(self: Any) -> None:
        """Set each weight's gradient to its clipped sum plus noise, rounded once at the end."""
        deviation = self.noise_multiplier * self.max_grad_norm
        for weight in self.params:
            noise = torch.from_numpy(secure_normal(weight.numel(), SystemEntropy()))
            total = weight.summed_grad.double().cpu() + deviation * noise.view_as(weight)
            weight.grad = total.to(weight)


class _SecureOptimizer(_SecureNoise, DPOptimizer):  # type: ignore[misc]
    """Opacus' optimizer for per-example gradients, with secure noise."""


class _SecureGhostOptimizer(_SecureNoise, DPOptimizerFastGradientClipping):  # type: ignore[misc]
    """Opacus' optimizer for ghost clipping, with secure noise."""


_OPTIMIZERS = {
    (False, False): DPOptimizer,
    (False, True): _SecureOptimizer,
    (True, False): DPOptimizerFastGradientClipping,
    (True, True): _SecureGhostOptimizer,
}


def _attach(
    model: nn.Module,
    config: LocalTraining,
    privacy: ExampleLevelPrivacy,
    *,
    expected_batch_size: float,
    generator: torch.Generator,
) -> tuple[Any, Any, Gradients]:
    sgd = torch.optim.SGD(
        [weight for weight in model.parameters() if weight.requires_grad],
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    optimizer = _OPTIMIZERS[privacy.ghost, privacy.secure_mode](
        sgd,
        noise_multiplier=privacy.stated_noise,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=expected_batch_size,
        generator=generator,
    )
    if not privacy.ghost:
        hooked = GradSampleModule(model)

        def per_example(x: Tensor, y: Tensor) -> Tensor:
            logits: Tensor = hooked(x.requires_grad_())  # or torch warns about its backward hooks
            cross_entropy(logits, y).backward()  # type: ignore[no-untyped-call]
            return logits.detach()

        return hooked, optimizer, per_example
    ghost = GradSampleModuleFastGradientClipping(model, max_grad_norm=privacy.max_grad_norm)
    criterion = DPLossFastGradientClipping(ghost, optimizer, nn.CrossEntropyLoss())

    def two_passes(x: Tensor, y: Tensor) -> Tensor:
        logits: Tensor = ghost(x.requires_grad_())
        criterion(logits, y).backward()
        return logits.detach()

    return ghost, optimizer, two_passes


def _proximal_hook(model: nn.Module, mu: float) -> Callable[[Any], None]:
    """Add FedProx's pull after the noise: it depends on no example."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    start = [weight.detach().clone() for weight in weights] if mu else []

    def pull(optimizer: Any) -> None:
        del optimizer
        for weight, origin in zip(weights, start, strict=False):
            if weight.grad is not None:
                weight.grad.add_(weight.detach() - origin, alpha=mu)

    return pull


def _detach(model: nn.Module, wrapped: Any) -> None:
    """Leave nothing behind: per-example gradients must not outlive the training."""
    wrapped.to_standard_module()
    for weight in model.parameters():
        weight.grad = None
        for name in ("grad_sample", "summed_grad", "_norm_sample", "_forward_counter"):
            if hasattr(weight, name):
                delattr(weight, name)
    for module in model.modules():
        for name in ("activations", "max_batch_len"):
            if hasattr(module, name):
                delattr(module, name)
