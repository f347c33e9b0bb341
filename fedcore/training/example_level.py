"""Example-level differential privacy on the client: DP-SGD [ACG+16].

Every step takes each example with probability q (Poisson sampling), clips each
example's gradient to l2 norm C, adds Gaussian noise of standard deviation
sigma C to the sum, and divides by the expected batch size q n. The number of
examples n is treated as public.

The steps of one participation compose to `example_level_epsilon`; what a client
spends over all rounds is composed by the caller from the reports.

How the gradients are clipped is one of three ways with the same result: by Opacus,
in two of them (`opacus_steps`), or one example at a time (`one_by_one`). With
`secure_mode`, sampling and noise come from the operating system (`secure_noise`).

[ACG+16] Abadi et al., https://arxiv.org/abs/1607.00133
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fedcore.crypto.entropy import SystemEntropy
from fedcore.errors import ConfigurationError
from fedcore.training.secure_noise import poisson_sample
from fedcore.training.settings import ExampleLevelPrivacy, ExampleLevelReport, LocalTraining
from fedcore.training.sgd import as_tensor, check_examples, check_proximal, measure

_PRV_EPSILON = 100.0  # beyond it the convolution needs gigabytes, and nobody needs the digits


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
    problem_of, steps = _way(privacy)
    problem = problem_of(model)
    if problem is not None:
        msg = (
            f"DP-SGD needs a model that treats examples separately: {problem}; "
            "use group or layer normalisation"
        )
        raise ConfigurationError(msg)
    model.to(device).train()
    inputs, labels = as_tensor(x, device), as_tensor(y, device)
    batches = -(-len(y) // config.batch_size) if config.batch_size else 1
    sample_rate = 1 / batches
    entropy = SystemEntropy() if privacy.secure_mode else None
    with steps(
        model,
        config,
        privacy,
        expected_batch_size=len(y) * sample_rate,
        generator=torch.Generator(device).manual_seed(int(rng.integers(2**63))),
        proximal_mu=proximal_mu,
    ) as step:
        for _ in range(config.epochs):
            logits, seen = [], []
            for _ in range(batches):
                rows = poisson_sample(len(y), sample_rate, entropy, rng).to(device)
                y_batch = labels.index_select(0, rows)
                logits.append(step(inputs.index_select(0, rows), y_batch))
                seen.append(y_batch)
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


def _way(privacy: ExampleLevelPrivacy) -> tuple[Callable[[nn.Module], str | None], Any]:
    """Return what checks a model, and what gives the step; Opacus is loaded if it does the work."""
    if privacy.one_by_one:
        from fedcore.training import one_by_one  # noqa: PLC0415 - neither loads the other

        return one_by_one.problem_of, one_by_one.one_by_one_steps
    from fedcore.training import opacus_steps  # noqa: PLC0415

    return opacus_steps.problem_of, opacus_steps.opacus_steps


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
    # A device that trains needs no accountant, and this one loads all of Opacus.
    from opacus.accountants import PRVAccountant, RDPAccountant  # noqa: PLC0415

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
