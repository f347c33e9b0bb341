"""Updates that were compressed one by one, added up in the clear.

Each is decoded as it arrives and added in fixed point: integer sums do not depend on the
order of arrival, so the same updates give the same mean on every engine. Only the sum
is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from fedcore.errors import PeerProtocolError
from fedcore.pipeline.bound import BoundRound
from fedcore.ring import packed_size, unpack
from fedcore.vectors import IntegerVector, RealVector, RingVector

_UNIT: Final = 2.0**40
"""Steps per real unit: finer than float32 for entries above 1e-5, and 1e-12 below."""
_LARGEST: Final = 2.0**22 / 1024
"""Bound on an entry; 2^10 clients of it fit an int64, and no honest entry comes near."""


@dataclass(frozen=True, slots=True)
class ClearSum:
    """The sum of compressed updates, and the tally beside it.

    Attributes:
        bound: The round.
        tally: Sum of the tallies, in the ring.
        update: Sum of the updates in steps of 2^-40, shape [dim]; the owner may overwrite it.
    """

    bound: BoundRound
    tally: RingVector = field(repr=False)
    update: IntegerVector = field(repr=False)

    @classmethod
    def of(cls, bound: BoundRound) -> ClearSum:
        """Return the sum over nobody."""
        return cls(bound, bound.ring.zeros(bound.dim), np.zeros(bound.plan.dim, np.int64))

    def add(self, data: bytes | memoryview) -> ClearSum:
        """Return the sum with one upload more; `self` must not be used again.

        Raises:
            PeerProtocolError: Malformed, or an entry that no honest update has.
        """
        bound = self.bound
        if bound.compressor is None:
            msg = "updates of this round are added in a ring"
            raise PeerProtocolError(msg)
        view, head = memoryview(data), packed_size(bound.dim, bound.ring.bits)
        tally = unpack(view[:head], bound.dim, bound.ring)
        update = bound.compressor.decompress(view[head:], bound.plan.dim)
        if float(np.abs(update).max(initial=0.0)) > _LARGEST:
            msg = f"an update's entries must be at most {_LARGEST:g}, found a larger one"
            raise PeerProtocolError(msg)
        steps = np.rint(update.astype(np.float64) * _UNIT).astype(np.int64)
        np.add(self.update, steps, out=self.update)
        return replace(self, tally=self.tally + tally)

    @property
    def reals(self) -> RealVector:
        """The sum of the updates, shape [dim]."""
        return self.update / _UNIT
