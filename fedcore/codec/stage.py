"""Composable, sum-preserving encodings.

A stage has two halves, one per side of the network. The client runs `encode`
on its own vector; the server runs `decode` on the *sum* of the encodings. The
law that makes secure aggregation possible, and that every stage is tested
against, is

    decode(encode(x_1) + ... + encode(x_n))  ~  x_1 + ... + x_n

up to the stage's documented loss (clipping, rounding, dropped coordinates).

Stages are first described, then bound to a domain. Binding is where sizes
and ranges are checked, so a codec that cannot work fails before training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from math import inf
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from fedcore.crypto.entropy import Entropy

Vector: TypeAlias = npt.NDArray[Any]
Encode: TypeAlias = Callable[[Vector, Entropy], Vector]
Decode: TypeAlias = Callable[[Vector], Vector]


@dataclass(frozen=True, slots=True)
class Reals:
    """Real vectors of bounded Euclidean norm.

    Attributes:
        dim: Number of coordinates.
        norm: Bound on the l2 norm; infinite before clipping.
        peak: Sub-Gaussian scale of one coordinate as a fraction of `norm`: 1 for
            arbitrary vectors, about 1/sqrt(dim) after a random rotation.
    """

    dim: int
    norm: float = inf
    peak: float = 1.0


@dataclass(frozen=True, slots=True)
class Integers:
    """Integer vectors, one per client, that will be summed.

    Attributes:
        dim: Number of coordinates.
        magnitude: Hard bound on the absolute value of an entry of one client.
        norm: Hard bound on the l2 norm of one client's vector, before noise.
        spread: Standard deviation of what an entry of the *sum* may hold beyond
            `clients * magnitude`: noise, and signal that is only bounded with
            high probability.
        scale: Integer units per real unit.
    """

    dim: int
    magnitude: int
    norm: float = inf
    spread: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class RingElements:
    """Vectors over Z/2^bits."""

    dim: int
    bits: int


Domain: TypeAlias = Reals | Integers | RingElements


@dataclass(frozen=True, slots=True)
class Bound:
    """A stage that knows its domains: both halves, ready to run."""

    source: Domain
    target: Domain
    encode: Encode = field(repr=False)
    decode: Decode = field(repr=False)

    def then(self, outer: Bound) -> Bound:
        """Return the composition: encode left to right, decode right to left."""
        return Bound(
            source=self.source,
            target=outer.target,
            encode=lambda x, entropy: outer.encode(self.encode(x, entropy), entropy),
            decode=lambda total: self.decode(outer.decode(total)),
        )


class Stage(Protocol):
    """Anything that can be bound to a domain."""

    def bind(self, source: Domain, /) -> Bound:
        """Check that this stage accepts `source`, and return both halves."""
        ...


def identity(source: Domain) -> Bound:
    """Return the codec that changes nothing."""
    return Bound(source, source, encode=lambda x, _: np.asarray(x), decode=lambda total: total)


def chain(source: Domain, *stages: Stage) -> Bound:
    """Bind `stages` one after another, each to the target of the one before.

    Example:
        >>> from fedcore.codec import Clip, Embed, Quantize, Reals, chain
        >>> codec = chain(Reals(3), Clip(1.0), Quantize(bits=8), Embed(bits=16, clients=100))
        >>> codec.target
        RingElements(dim=3, bits=16)
        >>> chain(Reals(3), Clip(1.0), Quantize(bits=8), Embed(bits=8, clients=100))
        Traceback (most recent call last):
        ...
        fedcore.errors.HeadroomError: a sum of 100 vectors with entries up to 127 needs \
a ring of 15 bits, got 8: raise ring.bits or lower quantize.bits

    Raises:
        ConfigurationError: A stage does not accept the target of the one before.
    """
    return reduce(
        lambda inner, stage: inner.then(stage.bind(inner.target)), stages, identity(source)
    )
