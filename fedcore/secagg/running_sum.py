"""A sum that is added to in place, for states that are values.

A state of the server must not change, but a fresh vector for every upload would cost
more than the addition. So the sum belongs to the newest state: each state knows how
many vectors it has seen, and the sum refuses one that has seen fewer than the sum
holds. Memory is one vector, however many clients there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fedcore.errors import StateReusedError
from fedcore.vectors import RingVector


@dataclass(slots=True)
class RunningSum:
    """The sum of the vectors that were added so far.

    Attributes:
        vector: Shape [dim]; sums wrap around in its dtype.
    """

    vector: RingVector = field(repr=False)
    _count: int = 0
    _sealed: bool = False

    def add(self, vector: RingVector, *, seen: int) -> None:
        """Add one vector of the same shape and dtype.

        Args:
            vector: Shape [dim].
            seen: How many vectors the caller has added before.

        Raises:
            StateReusedError: Another state has added since, or has taken the total.
        """
        self._check(seen)
        if self._sealed:
            msg = "the total was taken already, so nothing can be added; start a new round"
            raise StateReusedError(msg)
        np.add(self.vector, vector, out=self.vector)
        self._count += 1

    def close(self, *, seen: int) -> RingVector:
        """Return the total, to which nothing can be added any more.

        Raises:
            StateReusedError: Another state has added since.
        """
        self._check(seen)
        self._sealed = True
        return self.vector

    def _check(self, seen: int) -> None:
        if seen != self._count:
            msg = (
                f"this state has added {seen} inputs, but its sum holds {self._count}: "
                "only the newest state of a round may be advanced"
            )
            raise StateReusedError(msg)
