"""Arithmetic modulo 2^bits in the narrowest unsigned dtype.

A vector over Z/2^b is kept in the smallest of uint8, uint16, uint32, uint64
that holds b bits. Natural wrap-around of that dtype is arithmetic modulo a
multiple of 2^b, so sums and differences need no reduction until the value is
read: `reduce` drops the surplus high bits.

    lift : Z/2^b -> [-2^(b-1), 2^(b-1))     the signed representative
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedcore.errors import ConfigurationError
from fedcore.vectors import IntegerVector, RingVector

_DTYPES = (np.uint8, np.uint16, np.uint32, np.uint64)


@dataclass(frozen=True, slots=True)
class Ring:
    """The ring Z/2^bits.

    Attributes:
        bits: 1 to 64.

    Raises:
        ConfigurationError: `bits` is out of range.
    """

    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 64:
            msg = f"ring.bits must be in 1..64, got {self.bits}"
            raise ConfigurationError(msg)

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The narrowest unsigned dtype that holds an element."""
        return next(
            np.dtype(dtype) for dtype in _DTYPES if self.bits <= 8 * np.dtype(dtype).itemsize
        )

    @property
    def mask(self) -> int:
        """The largest element, 2^bits - 1."""
        return (1 << self.bits) - 1

    def reduce(self, x: npt.NDArray[Any]) -> RingVector:
        """Return integers of any width and sign as elements of the ring, same shape."""
        narrow = x.astype(self.dtype)  # a C cast: two's complement, modulo the dtype's size
        if self.bits < 8 * self.dtype.itemsize:
            narrow &= self.dtype.type(self.mask)
        return narrow

    def lift(self, x: RingVector) -> IntegerVector:
        """Return the representative in [-2^(bits-1), 2^(bits-1)), as int64, same shape."""
        shift = np.int64(64 - self.bits)
        return (x.astype(np.uint64) << np.uint64(shift)).view(np.int64) >> shift

    def zeros(self, dim: int) -> RingVector:
        """Return the zero vector [dim]."""
        return np.zeros(dim, self.dtype)
