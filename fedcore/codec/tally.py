"""Whole numbers that ride in the same sum as the update.

The number of examples and the training metrics must be summed exactly, and must not
travel in the clear. A number of 56 bits is cut into digits so small that the sum of
one digit over the cohort still fits an element of the ring; the digits are appended
to the vector. The coordinator reads the digit sums and carries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedcore.errors import ConfigurationError
from fedcore.ring import Ring
from fedcore.vectors import RingVector

VALUE_BITS = 56


@dataclass(frozen=True, slots=True)
class Tally:
    """Exact sums of `slots` signed numbers over up to `clients` clients.

    Attributes:
        slots: How many numbers.
        clients: How many summands at most.
        ring: Where the digits live.

    Raises:
        ConfigurationError: The ring has no room for a digit.
    """

    slots: int
    clients: int
    ring: Ring

    def __post_init__(self) -> None:
        if self.slots and self.digit_bits < 1:
            msg = (
                f"a ring of {self.ring.bits} bits has no room to count over "
                f"{self.clients} clients: it needs more than {self.clients.bit_length()} bits"
            )
            raise ConfigurationError(msg)

    @property
    def digit_bits(self) -> int:
        """Bits of one digit: `clients` of them add up to less than the ring's size."""
        return self.ring.bits - self.clients.bit_length()

    @property
    def digits(self) -> int:
        """Ring elements per number."""
        return -(-VALUE_BITS // self.digit_bits) if self.slots else 0

    @property
    def dim(self) -> int:
        """Ring elements that the tally appends to the vector."""
        return self.slots * self.digits

    @property
    def limit(self) -> int:
        """Largest absolute value of one client's number; larger ones are cut to it."""
        return ((1 << (VALUE_BITS - 1)) - 1) // self.clients

    def encode(self, values: Sequence[int]) -> RingVector:
        """Return the digits [dim] of one client's numbers."""
        if not self.slots:
            return self.ring.zeros(0)
        numbers = [max(-self.limit, min(self.limit, value)) for value in values]
        digit = (1 << self.digit_bits) - 1
        rows = [
            [((number % (1 << VALUE_BITS)) >> (self.digit_bits * place)) & digit]
            for number in numbers
            for place in range(self.digits)
        ]
        return np.array(rows, dtype=self.ring.dtype).reshape(self.dim)

    def decode(self, total: RingVector) -> tuple[int, ...]:
        """Return the sums of the numbers from the summed digits [dim]."""
        sums = []
        for row in total.reshape(self.slots, self.digits).tolist():
            value = sum(digit << (self.digit_bits * place) for place, digit in enumerate(row))
            value %= 1 << VALUE_BITS
            sums.append(value - (1 << VALUE_BITS) if value >> (VALUE_BITS - 1) else value)
        return tuple(sums)
