"""Coins and Gaussians for DP-SGD, of the operating system where no one may foresee them.

A Gaussian is built from four, so that the low-order bits of the sum do not betray what was
added [HB21].

[HB21] Holohan and Braghin, https://arxiv.org/abs/2107.10138
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedcore.crypto.entropy import Entropy


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


def poisson_sample(
    examples: int, rate: float, entropy: Entropy | None, rng: np.random.Generator
) -> Tensor:
    """Return the rows of a batch that every example joins by itself with probability `rate`."""
    draws = rng.random(examples) if entropy is None else uniforms(examples, entropy)
    return torch.from_numpy(np.flatnonzero(draws < rate))
