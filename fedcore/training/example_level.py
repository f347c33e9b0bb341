"""Example-level differential privacy on the client: DP-SGD by Opacus [ACG+16].

Every step takes each example with probability q (Poisson sampling), clips each
example's gradient to l2 norm C, adds Gaussian noise of standard deviation
sigma C to the sum, and divides by the expected batch size q n. The number of
examples n is treated as public.

The steps of one participation compose to `example_level_epsilon`; what a client
spends over all rounds is composed by the caller from the reports.

Opacus clips in one of two ways with the same result: by per-example gradients in
memory, or by ghost norms and a second, reweighted backward pass [LTLH22]. With
`secure_mode`, sampling and noise come from the operating system, and each noise
value is built from four Gaussians, so that its low-order bits do not betray what
was added [HB21].

[ACG+16] Abadi et al., https://arxiv.org/abs/1607.00133
[HB21] Holohan and Braghin, https://arxiv.org/abs/2107.10138
[LTLH22] Li et al., https://arxiv.org/abs/2110.05679
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import inf
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from opacus.accountants import PRVAccountant, RDPAccountant
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fedcore.crypto.entropy import Entropy, SystemEntropy
from fedcore.errors import ConfigurationError
from fedcore.training.settings import ExampleLevelPrivacy, ExampleLevelReport, LocalTraining
from fedcore.training.sgd import as_tensor, check_examples, check_proximal, measure

_PRV_EPSILON = 100.0  # beyond it the convolution needs gigabytes, and nobody needs the digits

Gradients: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Takes a batch, leaves what the optimizer needs on the weights, returns logits."""


def train_example_level(
    model: nn.Module,
    x: npt.NDArray[np.float32],
    y: npt.NDArray[np.int64],
    config: LocalTraining,
    privacy: ExampleLevelPrivacy,
    *,
    rng: np.random.Generator,
    proximal_mu: float = 0.0,
    device: str = "cpu",
) -> ExampleLevelReport:
    """Train `model` in place with DP-SGD; arguments as in `train`.

    An epoch is as many steps as there are batches of `config.batch_size`; the
    sample rate is one over that number. Without `secure_mode` the same `rng` gives
    the same weights bit for bit.

    Returns:
        Loss and accuracy over the examples sampled in the last epoch (before
        noise: not for publication), the number of steps and the sample rate.

    Raises:
        ConfigurationError: There are no examples, or the model mixes examples.
    """
    check_examples(x, y)
    check_proximal(proximal_mu)
    problems = ModuleValidator.validate(model, strict=False)
    if problems:
        msg = (
            f"DP-SGD needs a model that treats examples separately: {problems[0]}; "
            "use group or layer normalisation"
        )
        raise ConfigurationError(msg)
    model.to(device).train()
    inputs, labels = as_tensor(x, device), as_tensor(y, device)
    batches = -(-len(y) // config.batch_size) if config.batch_size else 1
    sample_rate = 1 / batches
    wrapped, optimizer, gradients = _attach(
        model,
        config,
        privacy,
        expected_batch_size=len(y) * sample_rate,
        generator=torch.Generator(device).manual_seed(int(rng.integers(2**63))),
    )
    optimizer.attach_step_hook(_proximal_hook(model, proximal_mu))
    entropy = SystemEntropy() if privacy.secure_mode else None
    try:
        for _ in range(config.epochs):
            logits, seen = [], []
            for _ in range(batches):
                rows = _poisson_sample(len(y), sample_rate, entropy, rng).to(device)
                y_batch = labels.index_select(0, rows)
                logits.append(gradients(inputs.index_select(0, rows), y_batch))
                seen.append(y_batch)
                optimizer.step()
                optimizer.zero_grad()
    finally:
        _detach(model, wrapped)
    sampled = torch.cat(seen)
    loss, correct = measure(torch.cat(logits), sampled)
    count = max(1, len(sampled))
    return ExampleLevelReport(
        loss=loss / count,
        accuracy=correct / count,
        examples=len(y),
        steps=config.epochs * batches,
        sample_rate=sample_rate,
    )


def example_level_epsilon(
    noise_multiplier: float, sample_rate: float, steps: int, delta: float
) -> float:
    """Return epsilon of `steps` Poisson-sampled Gaussian steps at `delta`.

    The smaller of two upper bounds: Renyi DP, and where it is below 100 also the
    numerical composition of privacy losses [GLW21, https://arxiv.org/abs/2106.02848].
    Neighbours differ by adding or removing one example.

    Raises:
        ConfigurationError: An argument is out of range.
    """
    if not (0 <= noise_multiplier < inf and 0 < sample_rate <= 1 and steps >= 0 and 0 < delta < 1):
        msg = (
            "epsilon needs noise_multiplier >= 0, sample_rate in (0, 1], steps >= 0 and delta in "
            f"(0, 1), got {noise_multiplier}, {sample_rate}, {steps}, {delta}"
        )
        raise ConfigurationError(msg)
    if steps == 0:
        return 0.0
    if noise_multiplier == 0:
        return inf
    history = [(noise_multiplier, sample_rate, steps)]
    with warnings.catch_warnings(), np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        # "Optimal order is the largest alpha": the bound holds. numpy: the tails of the grid.
        warnings.filterwarnings("ignore", "Optimal order is the", UserWarning)
        renyi = _spent(RDPAccountant(), history, delta)
        tight = _spent(PRVAccountant(), history, delta) if renyi < _PRV_EPSILON else inf
    return min(renyi, tight) if tight > 0 else renyi


def _spent(accountant: Any, history: list[tuple[float, float, int]], delta: float) -> float:
    accountant.history = history
    return float(accountant.get_epsilon(delta))


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


def secure_normal(size: int, entropy: Entropy) -> npt.NDArray[np.float64]:
    """Return `size` standard normal values, each half the sum of four [HB21, section 5.1].

    Two pairs of uniforms make four Gaussians by Box and Muller's transform.
    """
    radius_bits, angle_bits = uniforms(4 * size, entropy).reshape(2, 2, size)
    radius = np.sqrt(-2 * np.log1p(-radius_bits))  # 1 - u is in (0, 1]
    angle = 2 * np.pi * angle_bits
    total: npt.NDArray[np.float64] = (radius * (np.cos(angle) + np.sin(angle))).sum(axis=0) / 2
    return total


def uniforms(size: int, entropy: Entropy) -> npt.NDArray[np.float64]:
    """Return `size` uniform multiples of 2^-53 in [0, 1)."""
    words = np.frombuffer(entropy.draw("example-level", 8 * size), dtype="<u8")
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _poisson_sample(
    examples: int, rate: float, entropy: Entropy | None, rng: np.random.Generator
) -> Tensor:
    draws = rng.random(examples) if entropy is None else uniforms(examples, entropy)
    return torch.from_numpy(np.flatnonzero(draws < rate))


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
