"""Small layers whole, large ones sparse.

A bias or the scale of a norm moves a whole feature, and there are few of them: left to a
support of one tenth it waits ten rounds on average for what would have cost a thousandth
of the upload. Deep gradient compression and its successors send such layers dense
[LHM+18]. Which layers are small is public: it follows from the model alone, so the law of
the sum and the masks are those of the sparsifier inside.

[LHM+18] Lin, Han, Mao, Wang and Dally, "Deep Gradient Compression",
         https://arxiv.org/abs/1712.01887
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fedcore.codec.sketch import Sketch
from fedcore.codec.sparsify import RandomK
from fedcore.codec.stage import Bound, Domain, Reals, Vector
from fedcore.codec.top_support import Support
from fedcore.crypto.entropy import Entropy
from fedcore.errors import ConfigurationError
from fedcore.vectors import IntegerVector

Ranges: TypeAlias = tuple[tuple[int, int], ...]
"""Pairs of where a range starts and where it stops; increasing, apart from each other."""


@dataclass(frozen=True, slots=True)
class PartlyDense:
    """Send some ranges of a vector whole, and of the others what another stage sends.

    Attributes:
        rest: For the coordinates outside of the ranges, as a vector of their own.
        whole: The ranges; they leave at least one coordinate outside.
    """

    rest: RandomK | Sketch | Support
    whole: Ranges

    def bind(self, source: Domain, /) -> Bound:
        """Accept real vectors; the target has the ranges, and what `rest` sends.

        Raises:
            ConfigurationError: The source is something else, or the ranges do not fit it.
        """
        if not isinstance(source, Reals):
            msg = f"PartlyDense takes real vectors, got {source}: sparsify before quantising"
            raise ConfigurationError(msg)
        dim, count = source.dim, sum(stop - start for start, stop in self.whole)
        if any(stop > dim for _, stop in self.whole) or count >= dim:
            msg = (
                f"ranges to send whole must leave some of {dim} coordinates, got {count} in "
                f"{len(self.whole)} ranges up to {max(stop for _, stop in self.whole)}"
            )
            raise ConfigurationError(msg)
        inner = self.rest.bind(replace(source, dim=dim - count))

        def encode(x: Vector, entropy: Entropy) -> Vector:
            inside = _inside(self.whole, dim)
            sent = np.concatenate((x[inside], inner.encode(x[~inside], entropy)))
            return sent[self._order(dim)]

        def decode(total: Vector) -> Vector:
            inside, sent = _inside(self.whole, dim), np.empty(len(total), np.float64)
            sent[self._order(dim)] = total
            dense = np.empty(dim, np.float64)
            dense[inside] = sent[:count]
            dense[~inside] = inner.decode(sent[count:])
            return dense

        return Bound(
            source=source,
            target=replace(source, dim=count + inner.target.dim),
            encode=encode,
            decode=decode,
        )

    def positions(self, dim: int) -> IntegerVector:
        """Return which of `dim` coordinates are sent, in increasing order.

        Raises:
            ConfigurationError: A sketch sends no single coordinates.
        """
        if isinstance(self.rest, Sketch):
            msg = "a sketch sends no single coordinates: choose sparsify=random_k for layers"
            raise ConfigurationError(msg)
        return np.sort(_sent(self.rest, self.whole, dim))

    def _order(self, dim: int) -> IntegerVector | slice:
        """Return the order in which the ranges, and then the rest, are sent.

        Coordinates are sent in increasing order, so that what is sent of a layer stays
        together; the buckets of a sketch belong to no layer and come last.
        """
        if isinstance(self.rest, Sketch):
            return slice(None)
        return np.argsort(_sent(self.rest, self.whole, dim), kind="stable")


def small_layers(sizes: Iterable[int], below: int) -> Ranges:
    """Return where layers of fewer than `below` coordinates are, in a flat vector.

    Args:
        sizes: Of all layers, in the order of the flat vector.
        below: 0 for none of them.
    """
    ends = pairwise(accumulate(sizes, initial=0))
    return tuple((start, stop) for start, stop in ends if stop - start < below)


def outside(ranges: Ranges, dim: int) -> IntegerVector:
    """Return which of `dim` coordinates are in none of the ranges, in increasing order."""
    return np.flatnonzero(~_inside(ranges, dim))


def _sent(rest: RandomK | Support, whole: Ranges, dim: int) -> IntegerVector:
    """Return which coordinates are sent: first those of the ranges, then those of the rest."""
    others = outside(whole, dim)
    return np.concatenate(
        (np.flatnonzero(_inside(whole, dim)), others[rest.positions(len(others))])
    )


@lru_cache(maxsize=4)
def _inside(ranges: Ranges, dim: int) -> npt.NDArray[np.bool_]:
    inside = np.zeros(dim, np.bool_)
    for start, stop in ranges:
        inside[start:stop] = True
    inside.setflags(write=False)
    return inside
