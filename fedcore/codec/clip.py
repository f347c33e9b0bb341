"""Bounding how much one client can move the sum."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import Literal

import numpy as np

from fedcore.codec.stage import Bound, Domain, Reals, Vector
from fedcore.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Clip:
    """Scale a vector down to Euclidean norm `norm` if it is longer.

    The loss is the part that is cut off. A vector whose norm is not finite becomes
    zero: one device whose training diverged must not spoil the sum.
    """

    norm: float = 1.0
    kind: Literal["norm"] = "norm"

    def __post_init__(self) -> None:
        if not (isfinite(self.norm) and self.norm > 0):
            msg = f"clip.norm must be positive and finite, got {self.norm}"
            raise ConfigurationError(msg)

    def bind(self, source: Domain, /) -> Bound:
        """Accept any real vector; promise the norm."""
        if not isinstance(source, Reals):
            msg = f"Clip takes real vectors, got {source}: clip before quantising"
            raise ConfigurationError(msg)
        return Bound(
            source=source,
            target=replace(source, norm=min(self.norm, source.norm)),
            encode=lambda x, _: clip_norm(x, self.norm),
            decode=lambda total: total,
        )

    def exceeded(self, x: Vector) -> bool:
        """Return whether `x` [dim] is longer than the norm, or not finite."""
        with np.errstate(over="ignore"):
            return not np.linalg.norm(x.astype(np.float64)) <= self.norm


def clip_norm(x: Vector, norm: float) -> Vector:
    """Return `x` [dim], shortened to `norm` if it is longer, as float64."""
    wide = x.astype(np.float64)
    with np.errstate(over="ignore"):
        length = float(np.linalg.norm(wide))
    if not isfinite(length):
        return np.zeros_like(wide)
    return wide * (norm / length) if length > norm else wide
