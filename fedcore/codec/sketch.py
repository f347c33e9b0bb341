"""A linear sketch: every coordinate goes into one of fewer buckets, with a random sign.

    y_b = (1 / sqrt |b|) * sum of s_i x_i over the coordinates i in bucket b

This is one row of a count sketch [CCF02], with each bucket scaled to unit length. The
buckets do not overlap, so encoding is an orthogonal projection: it never lengthens a
vector, and decoding (each coordinate gets its bucket's mean, with its sign) loses
exactly the part of x that error feedback keeps. Every coordinate has a say in every
round, where a random support leaves most of them out; at high compression under a
secure sum that is the better bargain [RPU+20].

[CCF02]  Charikar, Chen and Farach-Colton, https://doi.org/10.1007/3-540-45465-9_59
[RPU+20] Rothchild et al., "FetchSGD", https://arxiv.org/abs/2007.07682
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedcore.codec.public import public_words
from fedcore.codec.sparsify import check_dense_below
from fedcore.codec.stage import Bound, Domain, Reals, Vector
from fedcore.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Sketch:
    """Send `fraction` as many numbers as there are coordinates, each a signed bucket sum.

    Attributes:
        fraction: Buckets over coordinates, in (0, 1].
        seed: Public; a round replaces it, so that buckets differ from round to round.
        unbiased: Scale the decoded sum so that its mean over seeds is the sum itself.
            Leave it off with error feedback, which sends later what is lost now.
        dense_below: Layers of fewer coordinates are sent whole, see `fedcore.codec.partly_dense`;
            0 for none.
    """

    fraction: float = 0.1
    seed: int = 0
    unbiased: bool = False
    dense_below: int = 0
    kind: Literal["sketch"] = "sketch"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            msg = f"sparsify.fraction must be in (0, 1], got {self.fraction}"
            raise ConfigurationError(msg)
        check_dense_below(self.dense_below)

    def bind(self, source: Domain, /) -> Bound:
        """Accept real vectors; the target has one coordinate for each bucket."""
        if not isinstance(source, Reals):
            msg = f"Sketch takes real vectors, got {source}: sketch before quantising"
            raise ConfigurationError(msg)
        dim, count = source.dim, max(1, round(self.fraction * source.dim))
        # A coordinate keeps 1/|b| of itself, and E[1/|b|] = (count/dim) (1 - (1 - 1/count)^dim).
        kept = (count / dim) * -np.expm1(dim * np.log1p(-1 / count)) if count > 1 else 1 / dim
        gain = 1 / kept if self.unbiased else 1.0

        def encode(x: Vector, _: object) -> Vector:
            buckets, weights = assignment(self.seed, dim, count)
            return np.bincount(buckets, weights=x * weights, minlength=count)

        def decode(total: Vector) -> Vector:
            buckets, weights = assignment(self.seed, dim, count)
            return total[buckets] * weights * gain

        return Bound(source, replace(source, dim=count), encode=encode, decode=decode)


@lru_cache(maxsize=4)
def assignment(
    seed: int, dim: int, count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the bucket of each coordinate, and its sign over the root of the bucket's size.

    Both follow from `seed` alone and are the same on every platform: the upper 32 bits
    of a key-stream word choose the bucket, its last bit the sign.
    """
    words = public_words("sketch", seed, dim)
    signs = 1.0 - 2.0 * (words & np.uint64(1))
    words >>= np.uint64(32)
    words *= np.uint64(count)
    words >>= np.uint64(32)
    buckets = words.view(np.int64)
    sizes = np.bincount(buckets, minlength=count)
    weights = (1 / np.sqrt(np.maximum(sizes, 1)))[buckets]
    weights *= signs
    buckets.setflags(write=False)
    weights.setflags(write=False)
    return buckets, weights
