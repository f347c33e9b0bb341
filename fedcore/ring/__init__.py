"""Arithmetic mod 2^b in the narrowest unsigned dtype, fixed point, b-bit packing."""

from fedcore.ring.modular import Ring
from fedcore.ring.packing import pack, packed_size, unpack
from fedcore.ring.rounding import round_stochastically

__all__ = ["Ring", "pack", "packed_size", "round_stochastically", "unpack"]
