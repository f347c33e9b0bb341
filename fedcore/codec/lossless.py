"""Integer vectors in as few bytes as their statistics allow, exactly.

A vector is its magnitudes, then a bit for the sign of each that is not zero. Numbers of 0
or more are written in one of two forms:

    dense     a Golomb-Rice code for every number
    sparse    the gaps between those that are not zero, and each of these less one,
              which are numbers of 0 or more again

so that a ternary vector ends after its gaps, and a steep slope around zero is peeled off
level by level. Quantised updates look like that, and take a few percent more than their
entropy; a general compressor would need more passes, and a library on the device.

Reading takes no more memory than the vector that was asked for and a multiple of the
bytes that were given.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from fedcore.codec.rice import (
    Naturals,
    best_parameter,
    coded_bits,
    gaps_before,
    rice_decode,
    rice_encode,
)
from fedcore.errors import PeerProtocolError
from fedcore.vectors import IntegerVector

LARGEST: Final = 1 << 47
"""Magnitudes are below it."""
_DENSE, _SPARSE = range(2)
_LEVELS: Final = 8
_VARINT_BYTES: Final = 6


def encode_integers(x: IntegerVector) -> bytes:
    """Return the shortest form of a vector [dim] with magnitudes below `LARGEST`."""
    signs = np.packbits((x < 0)[x != 0], bitorder="little").tobytes()
    magnitudes = np.abs(x)
    most = int(magnitudes.max(initial=0))
    return _write(magnitudes.astype(np.min_scalar_type(most)), _LEVELS) + signs


def decode_integers(data: bytes | memoryview, dim: int) -> IntegerVector:
    """Return the vector [dim] that `encode_integers` wrote.

    Raises:
        PeerProtocolError: Anything else.
    """
    x, rest = _read(memoryview(data), dim, LARGEST, _LEVELS)
    filled = np.flatnonzero(x != 0)
    size = (len(filled) + 7) // 8
    if len(rest) != size:
        msg = f"{len(filled)} signs take {size} bytes, found {len(rest)}"
        raise PeerProtocolError(msg)
    signs = np.unpackbits(np.frombuffer(rest, np.uint8), bitorder="little")
    if signs[len(filled) :].any():
        msg = "the padding behind the signs must be zero"
        raise PeerProtocolError(msg)
    x[filled[signs[: len(filled)].view(np.bool_)]] *= -1
    return x


def encode_positions(positions: IntegerVector) -> bytes:
    """Return the short form of strictly increasing positions [count], from 0 on."""
    gaps = gaps_before(positions).astype(np.uint64)
    return _varint(len(gaps)) + _coded(gaps, best_parameter(gaps))


def decode_positions(data: bytes | memoryview, dim: int) -> IntegerVector:
    """Return the strictly increasing positions below `dim` that `encode_positions` wrote.

    Raises:
        PeerProtocolError: Anything else.
    """
    count, rest = _read_varint(memoryview(data))
    places, rest = _places(rest, count, dim)
    if rest:
        msg = f"nothing must stand behind the positions, found {len(rest)} bytes"
        raise PeerProtocolError(msg)
    return places


def _write(values: Naturals, levels: int) -> bytes:
    """Return the shorter form of `values`; sparse ones have at most `levels` levels."""
    parameter = best_parameter(values)
    dense_bits = coded_bits(values, parameter)
    filled = np.flatnonzero(values != 0)
    if levels and 4 * len(filled) < 3 * len(values):
        gaps = gaps_before(filled).astype(np.min_scalar_type(len(values)))
        gap_bits = best_parameter(gaps)
        if coded_bits(gaps, gap_bits) < dense_bits:
            rest = _write(values[filled] - values.dtype.type(1), levels - 1)
            sparse = bytes((_SPARSE,)) + _varint(len(filled)) + _coded(gaps, gap_bits) + rest
            if 8 * len(sparse) < dense_bits:
                return sparse
    return bytes((_DENSE,)) + _coded(values, parameter)


def _read(
    data: memoryview, count: int, limit: int, levels: int
) -> tuple[IntegerVector, memoryview]:
    """Return `count` numbers below `limit`, and what stands behind them."""
    form, data = _byte(data)
    if form == _DENSE:
        return _uncoded(data, count, limit)
    if form != _SPARSE or not levels:
        msg = f"numbers must be written in one of two forms, found form {form} at level {levels}"
        raise PeerProtocolError(msg)
    filled, data = _read_varint(data)
    places, data = _places(data, filled, count)
    above, data = _read(data, filled, limit - 1, levels - 1)
    values = np.zeros(count, np.int64)
    values[places] = above + 1
    return values, data


def _places(data: memoryview, count: int, dim: int) -> tuple[IntegerVector, memoryview]:
    """Return `count` increasing positions below `dim`, and what stands behind them."""
    if count > dim:
        msg = f"at most {dim} positions are different, found {count}"
        raise PeerProtocolError(msg)
    gaps, data = _uncoded(data, count, dim)
    places = np.cumsum(gaps) + np.arange(count)
    if count and places[-1] >= dim:
        msg = f"positions must be below {dim}, found a larger one"
        raise PeerProtocolError(msg)
    return places, data


def _coded(values: Naturals, parameter: int) -> bytes:
    codes = rice_encode(values, parameter)
    return bytes((parameter,)) + _varint(len(codes)) + codes


def _uncoded(data: memoryview, count: int, limit: int) -> tuple[IntegerVector, memoryview]:
    parameter, data = _byte(data)
    size, data = _read_varint(data)
    return rice_decode(data[:size], count, parameter, limit), data[size:]


def _byte(data: memoryview) -> tuple[int, memoryview]:
    if not data:
        msg = "an integer vector ended too early"
        raise PeerProtocolError(msg)
    return data[0], data[1:]


def _varint(value: int) -> bytes:
    """Return `value` in groups of seven bits, the lowest first."""
    groups = bytearray()
    while value > 0x7F:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*groups, value))


def _read_varint(data: memoryview) -> tuple[int, memoryview]:
    value = 0
    for place in range(_VARINT_BYTES):
        byte, data = _byte(data)
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, data
    msg = f"a count must take at most {_VARINT_BYTES} bytes, found more"
    raise PeerProtocolError(msg)
