"""Unbiased quantisation of bounded real vectors.

`Quantize` promises that no entry exceeds its range, so the ring must hold the sum
of the largest entries. `Discretize` works at a given scale and only promises the
norm of its output and the spread of the sum: after a rotation that is far narrower,
at the price of a small probability that the sum wraps around [KLS21, section 4].

[KLS21] https://arxiv.org/abs/2102.06387
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal

import numpy as np

from fedcore.codec.stage import Bound, Domain, Integers, Reals, Vector
from fedcore.crypto.entropy import Entropy, generator
from fedcore.errors import ConfigurationError
from fedcore.ring import round_stochastically

_ATTEMPTS = 64


@dataclass(frozen=True, slots=True)
class Quantize:
    """Map [-norm, norm] onto signed integers of `bits` bits."""

    bits: int = 16
    kind: Literal["uniform"] = "uniform"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 32:
            msg = f"quantize.bits must be in 2..32, got {self.bits}"
            raise ConfigurationError(msg)

    def bind(self, source: Domain, /) -> Bound:
        """Accept real vectors of bounded norm; one step is norm / magnitude."""
        norm = _bounded(source, "Quantize")
        magnitude = 2 ** (self.bits - 1) - 1
        step = norm / magnitude

        def encode(x: Vector, entropy: Entropy) -> Vector:
            rounded = round_stochastically(x / step, generator(entropy, "rounding"))
            return rounded.clip(-magnitude, magnitude)

        return Bound(
            source=source,
            target=Integers(source.dim, magnitude, scale=1 / step),
            encode=encode,
            decode=lambda total: total * step,
        )


@dataclass(frozen=True, slots=True)
class Discretize:
    """Round `scale` times the vector, conditioned on the norm of the result.

    Attributes:
        scale: Integer units per real unit.
        rounded_norm: Bound on the l2 norm of the integer vector; redrawn until it holds.
        spread: Standard deviation of an entry of the sum over the cohort, without noise,
            in integer units.
    """

    scale: float
    rounded_norm: float
    spread: float

    def bind(self, source: Domain, /) -> Bound:
        """Accept real vectors of bounded norm that `rounded_norm` has room for."""
        norm = _bounded(source, "Discretize")
        if self.rounded_norm < self.scale * norm:
            msg = (
                f"rounded_norm must be at least scale * norm = {self.scale * norm:g}, "
                f"got {self.rounded_norm:g}"
            )
            raise ConfigurationError(msg)

        def encode(x: Vector, entropy: Entropy) -> Vector:
            rng = generator(entropy, "rounding")
            for _ in range(_ATTEMPTS):
                rounded = round_stochastically(x * self.scale, rng)
                if np.linalg.norm(rounded) <= self.rounded_norm:
                    return rounded
            return np.trunc(x * self.scale).astype(np.int64)  # never longer than scale * norm

        return Bound(
            source=source,
            target=Integers(
                source.dim, 0, norm=self.rounded_norm, spread=self.spread, scale=self.scale
            ),
            encode=encode,
            decode=lambda total: total / self.scale,
        )


def _bounded(source: Domain, stage: str) -> float:
    if not isinstance(source, Reals) or not isfinite(source.norm):
        msg = f"{stage} takes real vectors of bounded norm, got {source}: clip first"
        raise ConfigurationError(msg)
    return source.norm
