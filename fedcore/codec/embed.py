"""Integers into the ring, with room for the sum."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import Literal

from fedcore.codec.stage import Bound, Domain, Integers, RingElements
from fedcore.errors import ConfigurationError, HeadroomError
from fedcore.ring import Ring


@dataclass(frozen=True, slots=True)
class Embed:
    """Represent integers modulo 2^bits such that the sum over `clients` can be lifted.

    The sum of all hard bounds plus `tails` standard deviations of the random part
    must fit; without a random part the lift is exact.
    """

    bits: int
    clients: int
    tails: float = 4.0
    kind: Literal["embed"] = "embed"

    def bind(self, source: Domain, /) -> Bound:
        """Accept integers whose sum fits the ring."""
        if not isinstance(source, Integers):
            msg = f"Embed takes integers, got {source}: quantise first"
            raise ConfigurationError(msg)
        ring = Ring(self.bits)
        if narrowest_ring(source, self.clients, self.tails) > self.bits:
            raise HeadroomError(
                clients=self.clients,
                magnitude=_magnitude(source, self.clients, self.tails),
                bits=self.bits,
                needed_bits=narrowest_ring(source, self.clients, self.tails),
            )
        return Bound(
            source=source,
            target=RingElements(source.dim, self.bits),
            encode=lambda x, _: ring.reduce(x),
            decode=ring.lift,
        )


def narrowest_ring(source: Integers, clients: int, tails: float = 4.0) -> int:
    """Return the bits of the narrowest ring that holds a sum over `clients`."""
    hard = clients * source.magnitude
    bits = max(1, (2 * hard).bit_length())
    if source.spread == 0:
        return bits
    # A calibrated spread fills its ring exactly: do not let a last bit of rounding decide.
    return max(bits, ceil(log2(2 * (hard + tails * source.spread)) - 1e-9))


def _magnitude(source: Integers, clients: int, tails: float) -> int:
    """Return the bound on one client's entry, with its part of the sum's random tails."""
    return source.magnitude + ceil(tails * source.spread / clients)
