"""A public support that follows the aggregate: where the sum moved last, and some others.

Under masks a client cannot choose its own coordinates. What the coordinator published
last is public, so its largest entries may choose for everybody; under differential
privacy that is post-processing. Coordinates outside would never be seen again, so a part
of the support is drawn at random, fresh in every round.

Devices do not know the last aggregate if they missed a round, so the positions travel in
the round's plan: about log2(1/fraction) + 1.5 bits for each.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from fedcore.codec.lossless import decode_positions, encode_positions
from fedcore.codec.public import public_words
from fedcore.codec.sparsify import check_dense_below
from fedcore.codec.stage import Bound, Domain, Reals, Vector
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.vectors import IntegerVector, RealVector


@dataclass(frozen=True, slots=True)
class PublicTopK:
    """Send the coordinates that moved most in the last aggregate, and some at random.

    Attributes:
        fraction: Of the coordinates, in (0, 1].
        exploration: Part of the support that is drawn at random.
        dense_below: Layers of fewer coordinates are sent whole, see `fedcore.codec.partly_dense`;
            0 for none.
    """

    fraction: float = 0.1
    exploration: float = 0.2
    dense_below: int = 0
    kind: Literal["public_top_k"] = "public_top_k"

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            msg = f"sparsify.fraction must be in (0, 1], got {self.fraction}"
            raise ConfigurationError(msg)
        if not 0 < self.exploration <= 1:
            msg = (
                f"sparsify.exploration must be in (0, 1], got {self.exploration}: without any, "
                "a coordinate that was left out once is left out for good"
            )
            raise ConfigurationError(msg)
        check_dense_below(self.dense_below)

    def choose(self, last: RealVector | None, dim: int, seed: int) -> str:
        """Return the support of a round.

        Args:
            last: The last aggregate, shape [dim]; None before the first.
            dim: Number of coordinates.
            seed: Public, of the random part; fresh for each round.
        """
        kept = max(1, round(self.fraction * dim))
        random = public_words("support", seed, dim)
        # The largest entries come first, then the smallest words.
        explored = min(kept, max(1, round(self.exploration * kept)))
        chosen = np.zeros(dim, np.bool_)
        if last is not None and kept > explored:
            magnitudes = np.abs(last)
            top = np.argpartition(magnitudes, dim - (kept - explored))[dim - (kept - explored) :]
            chosen[top[magnitudes[top] > 0]] = True
        random[chosen] = np.iinfo(np.uint64).max
        missing = kept - int(chosen.sum())
        chosen[np.argpartition(random, missing - 1)[:missing]] = True
        return b64encode(encode_positions(np.flatnonzero(chosen))).decode()


@dataclass(frozen=True, slots=True)
class Support:
    """Send the coordinates that `PublicTopK.choose` wrote down as `chosen`."""

    chosen: str

    def positions(self, dim: int) -> IntegerVector:
        """Return which of `dim` coordinates are sent, in increasing order.

        Raises:
            ConfigurationError: They do not fit.
        """
        return _positions(self.chosen, dim)

    def bind(self, source: Domain, /) -> Bound:
        """Accept real vectors; the target has the chosen coordinates only.

        Raises:
            ConfigurationError: The source is something else, or the positions do not fit it.
        """
        if not isinstance(source, Reals):
            msg = f"Support takes real vectors, got {source}: sparsify before quantising"
            raise ConfigurationError(msg)
        dim, positions = source.dim, self.positions(source.dim)

        def decode(total: Vector) -> Vector:
            dense = np.zeros(dim, np.float64)
            dense[positions] = total
            return dense

        return Bound(
            source=source,
            target=replace(source, dim=len(positions)),
            encode=lambda x, _: x[positions],
            decode=decode,
        )


@lru_cache(maxsize=4)
def _positions(text: str, dim: int) -> IntegerVector:
    try:
        positions = decode_positions(b64decode(text, validate=True), dim)
    except (ValueError, PeerProtocolError) as error:
        msg = f"a support must list positions below {dim}: {error}"
        raise ConfigurationError(msg) from None
    if not len(positions):
        msg = "a support must have at least one position, found none"
        raise ConfigurationError(msg)
    positions.setflags(write=False)
    return positions
