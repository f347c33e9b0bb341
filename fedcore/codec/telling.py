"""A clip that tells, inside the same sum, how often it did not clip.

To follow a quantile of the norms, the coordinator needs the fraction of updates that fit
the clip C, and nothing about any one of them. So each device appends its answer b in
{0, 1} to the vector as one more coordinate,

    y = [ clip(x, C),  (2 b - 1) beta C ],      |y| <= C sqrt(1 + beta^2),

and it travels under whatever noise and masks the update gets. The bit is centred, for a
coordinate of +-beta C adds only half as much norm as one of 0 or 2 beta C [ATMR21,
section 3]. A sum over m devices whose last coordinate is S tells the fraction

    1/2 + S / (2 beta C m),

without bias, for rounding and noise have none. Both parts are one vector with one norm:
no second release, no second theorem.

[ATMR21] Andrew, Thakkar, McMahan and Ramaswamy, "Differentially private learning with
adaptive clipping", https://arxiv.org/abs/1905.03871
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import hypot, isfinite

import numpy as np

from fedcore.codec.clip import Clip, clip_norm
from fedcore.codec.stage import Bound, Domain, Reals, Vector
from fedcore.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class TellingClip:
    """Clip to `norm`, and append whether the vector fitted.

    Attributes:
        norm: C, the bound on the vector.
        weight: beta, the size of the appended coordinate in units of `norm`.
    """

    norm: float
    weight: float

    def __post_init__(self) -> None:
        for name, value in (("norm", self.norm), ("weight", self.weight)):
            if not (isfinite(value) and value > 0):
                msg = f"{name} of a telling clip must be positive and finite, got {value}"
                raise ConfigurationError(msg)

    def bind(self, source: Domain, /) -> Bound:
        """Accept any real vector; promise the norm of the vector and its bit together."""
        if not isinstance(source, Reals):
            msg = f"TellingClip takes real vectors, got {source}: clip before quantising"
            raise ConfigurationError(msg)
        bound = min(self.norm, source.norm)
        return Bound(
            source=source,
            target=replace(
                source, dim=source.dim + 1, norm=hypot(bound, self.weight * self.norm), peak=1.0
            ),
            encode=lambda x, _: self._encode(x),
            decode=lambda total: total[:-1],
        )

    def exceeded(self, x: Vector) -> bool:
        """Return whether `x` [dim] is longer than the norm, or not finite."""
        return Clip(self.norm).exceeded(x)

    def fraction(self, total: Vector, clients: int) -> float:
        """Return the fraction that fitted, from the sum [dim + 1] over `clients`.

        An estimate without bias: with noise it may lie outside of [0, 1].
        """
        return 0.5 + float(total[-1]) / (2 * self.weight * self.norm * clients)

    def _encode(self, x: Vector) -> Vector:
        sign = -1.0 if self.exceeded(x) else 1.0
        return np.append(clip_norm(x, self.norm), sign * self.weight * self.norm)
