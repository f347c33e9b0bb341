"""Golomb-Rice codes of whole vectors: short codes for small numbers.

A number v is split at r bits: the quotient v >> r in unary, that many zeros and a one,
and the remainder in r bits. For gaps between the k nonzero of d coordinates, which are
geometric, this is within three percent of the entropy [Gol66, SWMS19 algorithm 2].

The codes of a vector are stored in two streams, all quotients and then all remainders,
which costs nothing and lets both be written and read without a loop over numbers:
the ones of the first stream are found at once, and their distances are the quotients.

[Gol66]  https://doi.org/10.1109/TIT.1966.1053907
[SWMS19] Sattler et al., https://arxiv.org/abs/1903.02891
"""

from __future__ import annotations

from math import log2
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from fedcore.errors import PeerProtocolError
from fedcore.ring import Ring, pack, packed_size, unpack
from fedcore.vectors import IntegerVector

Naturals: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]
"""Shape [count], numbers of 0 or more; the narrower the dtype, the faster."""
MOST_BITS: Final = 48
"""Of a remainder."""
_SAMPLE: Final = 1 << 14
_QUOTIENT_BITS: Final = 20


def best_parameter(values: Naturals) -> int:
    """Return the number of remainder bits that makes the codes of `values` shortest.

    Long vectors are judged by every so many-th number, and by the largest: its quotient
    must not take megabytes.
    """
    if not len(values):
        return 0
    least = max(0, int(values.max()).bit_length() - _QUOTIENT_BITS)
    some = values[:: max(1, len(values) // _SAMPLE)]
    mean = float(some.mean(dtype=np.float64))
    guess = max(least, round(log2(max(mean, 0.5) * 0.69)))
    around = [r for r in range(max(least, guess - 1), guess + 3) if r <= MOST_BITS]
    return min(around, key=lambda r: coded_bits(some, r))


def coded_bits(values: Naturals, parameter: int) -> int:
    """Return how many bits the codes of `values` take, before padding to bytes."""
    quotients = int(_quotients(values, parameter).sum(dtype=np.uint64))
    return quotients + len(values) * (1 + parameter)


def rice_encode(values: Naturals, parameter: int) -> bytes:
    """Return the codes of `values`, quotients first.

    Args:
        values: Shape [count]; with a parameter from `best_parameter`, or the quotients
            of a few large numbers take many bytes.
        parameter: Bits of a remainder, 0..`MOST_BITS`.
    """
    if not len(values):
        return b""
    ends = np.cumsum(_quotients(values, parameter), dtype=np.int64)
    ends += np.arange(len(ends))
    bits = np.zeros(int(ends[-1]) + 1, np.bool_)
    bits[ends] = True
    unary = np.packbits(bits, bitorder="little").tobytes()
    return unary + _remainders(values, parameter)


def rice_decode(data: bytes | memoryview, count: int, parameter: int, limit: int) -> IntegerVector:
    """Return the `count` numbers that `rice_encode` wrote, shape [count].

    Args:
        data: The codes and nothing else.
        count: How many there are.
        parameter: Bits of a remainder.
        limit: Every number must be below it; at most 2^62.

    Raises:
        PeerProtocolError: Anything else; the memory used is bounded by the bytes given.
    """
    if not 0 <= parameter <= MOST_BITS:
        msg = f"a code's remainder must have 0..{MOST_BITS} bits, found {parameter}"
        raise PeerProtocolError(msg)
    tail = packed_size(count, parameter)
    unary = np.frombuffer(data, np.uint8)[: max(0, len(data) - tail)]
    if count > 8 * len(unary):
        msg = f"{count} codes take at least {count} bits and {tail} bytes, found {len(data)} bytes"
        raise PeerProtocolError(msg)
    # What is unpacked are zeros and ones: as booleans they are searched many times faster.
    ends = np.flatnonzero(np.unpackbits(unary, bitorder="little").view(np.bool_))
    if len(ends) != count or len(unary) != (int(ends[-1]) // 8 + 1 if count else 0):
        msg = f"expected {count} codes and nothing behind them, found {len(ends)}"
        raise PeerProtocolError(msg)
    values = gaps_before(ends)
    _check_below(values, (limit - 1 >> parameter) + 1)
    if parameter:
        rest = unpack(data[len(data) - tail :], count, Ring(parameter))
        values <<= parameter
        values |= rest.astype(np.int64)
    _check_below(values, limit)
    return values


def gaps_before(positions: npt.NDArray[np.int64]) -> IntegerVector:
    """Return how many numbers are left out before each of strictly increasing positions."""
    gaps = positions.astype(np.int64)
    gaps[1:] -= positions[:-1]
    gaps[1:] -= 1
    return gaps


def _quotients(values: Naturals, parameter: int) -> Naturals:
    return values >> values.dtype.type(parameter)


def _check_below(values: IntegerVector, limit: int) -> None:
    if len(values) and int(values.max()) >= limit:
        msg = f"a coded number must be below {limit}, found a larger one"
        raise PeerProtocolError(msg)


def _remainders(values: Naturals, parameter: int) -> bytes:
    if not parameter:
        return b""
    ring = Ring(parameter)
    return pack(ring.reduce(values), ring)
