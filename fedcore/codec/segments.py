"""A bound for each layer, and one for all of them together.

A vector of l2 norm c may be one layer alone: a flat clip then scales every other layer
down with the one that exploded. Per-layer clipping gives each layer l a bound c_l of its
own, with c_1^2 + ... + c_L^2 = c^2, so the norm of the whole is at most c all the same
[MRTZ18, section 2]. The sensitivity, and so the noise, is that of a flat clip at c.

[MRTZ18] McMahan, Ramage, Talwar and Zhang, https://arxiv.org/abs/1710.06963
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isfinite, sqrt

import numpy as np

from fedcore.codec.clip import Clip, clip_norm
from fedcore.codec.stage import Bound, Domain, Reals, Vector
from fedcore.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class ClipSegments:
    """Scale each segment of a vector down to a norm of its own.

    A segment whose norm is not finite becomes zero, as in `Clip`. Segments may be empty:
    of a small layer a sparse round sends nothing.

    Attributes:
        norms: Bound on the l2 norm of each segment.
        stops: Where each segment ends; the next one begins there, the last one ends
            with the vector.
    """

    norms: tuple[float, ...]
    stops: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.norms or len(self.norms) != len(self.stops):
            msg = (
                f"segments must have one norm and one end each, got {len(self.norms)} norms and "
                f"{len(self.stops)} ends"
            )
            raise ConfigurationError(msg)
        if any(not (isfinite(norm) and norm > 0) for norm in self.norms):
            msg = f"the norm of every segment must be positive and finite, got {min(self.norms)}"
            raise ConfigurationError(msg)
        if any(stop < start for start, stop in pairwise((0, *self.stops))):
            msg = f"segments must follow one another, got the ends {self.stops[:6]}"
            raise ConfigurationError(msg)

    @property
    def norm(self) -> float:
        """Bound on the norm of the whole vector."""
        return sqrt(sum(norm * norm for norm in self.norms))

    def bind(self, source: Domain, /) -> Bound:
        """Accept real vectors that end where the last segment does; promise the norm."""
        if not isinstance(source, Reals):
            msg = f"ClipSegments takes real vectors, got {source}: clip before quantising"
            raise ConfigurationError(msg)
        if source.dim != self.stops[-1]:
            msg = f"segments must end at {source.dim}, where the vector ends, got {self.stops[-1]}"
            raise ConfigurationError(msg)
        return Bound(
            source=source,
            target=replace(source, norm=min(self.norm, source.norm)),
            encode=lambda x, _: self._clip(x),
            decode=lambda total: total,
        )

    def exceeded(self, x: Vector) -> bool:
        """Return whether a segment of `x` [dim] is longer than its bound, or not finite."""
        return any(Clip(norm).exceeded(x[part]) for part, norm in self._parts())

    def _clip(self, x: Vector) -> Vector:
        clipped = np.empty(len(x), np.float64)
        for part, norm in self._parts():
            clipped[part] = clip_norm(x[part], norm)
        return clipped

    def _parts(self) -> Iterator[tuple[slice, float]]:
        for (start, stop), norm in zip(pairwise((0, *self.stops)), self.norms, strict=True):
            yield slice(start, stop), norm
