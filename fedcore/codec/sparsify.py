"""Sending only some coordinates, the same ones on every client.

Under masks a support may depend on public data alone: the positions are never
sent, and a client cannot choose its own, since masks cancel position by position.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedcore.codec.public import public_words
from fedcore.codec.stage import Bound, Domain, Reals, Vector, identity
from fedcore.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Dense:
    """Send every coordinate."""

    kind: Literal["dense"] = "dense"

    def bind(self, source: Domain, /) -> Bound:
        """Accept anything; change nothing."""
        return identity(source)


@dataclass(frozen=True, slots=True)
class RandomK:
    """Send the same `fraction` of coordinates on every client, chosen by `seed`.

    Attributes:
        fraction: Of the coordinates, in (0, 1].
        seed: Public; a round replaces it, so that supports differ from round to round.
        unbiased: Multiply the decoded sum by dim / kept, so that its mean over
            supports is the sum itself. Leave it off with error feedback, which
            sends later what is left out now.
        dense_below: Layers of fewer coordinates are sent whole, see `fedcore.codec.partly_dense`;
            0 for none.
    """

    fraction: float = 0.1
    seed: int = 0
    unbiased: bool = False
    dense_below: int = 0
    kind: Literal["random_k"] = "random_k"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            msg = f"sparsify.fraction must be in (0, 1], got {self.fraction}"
            raise ConfigurationError(msg)
        check_dense_below(self.dense_below)

    def bind(self, source: Domain, /) -> Bound:
        """Accept real vectors; the target has the kept coordinates only."""
        if not isinstance(source, Reals):
            msg = f"RandomK takes real vectors, got {source}: sparsify before quantising"
            raise ConfigurationError(msg)
        dim, kept = source.dim, self.kept(source.dim)
        gain = dim / kept if self.unbiased else 1.0

        def decode(total: Vector) -> Vector:
            dense = np.zeros(dim, np.float64)
            dense[support(self.seed, dim, kept)] = total * gain
            return dense

        return Bound(
            source=source,
            target=replace(source, dim=kept),
            encode=lambda x, _: x[support(self.seed, dim, kept)],
            decode=decode,
        )

    def kept(self, dim: int) -> int:
        """Return how many of `dim` coordinates are sent."""
        return max(1, round(self.fraction * dim))

    def positions(self, dim: int) -> npt.NDArray[np.int64]:
        """Return which of `dim` coordinates are sent, in increasing order."""
        return support(self.seed, dim, self.kept(dim))


def check_dense_below(count: int) -> None:
    """Refuse a size that no layer can fall below.

    Raises:
        ConfigurationError: It is negative, or larger than any model.
    """
    if not 0 <= count < 1 << 48:
        msg = f"sparsify.dense_below must be in 0..2^48, got {count}"
        raise ConfigurationError(msg)


@lru_cache(maxsize=4)
def support(seed: int, dim: int, kept: int) -> npt.NDArray[np.int64]:
    """Return `kept` of `dim` positions in increasing order, uniformly chosen by `seed`.

    They are the positions of the smallest of `dim` key-stream words, so they are the
    same on every platform and with every version of numpy.
    """
    words = public_words("support", seed, dim)
    chosen = np.argpartition(words, kept - 1)[:kept] if kept < dim else np.arange(dim)
    positions = np.sort(chosen).astype(np.int64)
    positions.setflags(write=False)
    return positions
