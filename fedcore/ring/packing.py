"""Dense packing of b-bit elements: the wire form of a ring vector.

Element i occupies bits [i*b, (i+1)*b) of one little-endian bit string, padded
with zero bits to a whole byte. The form is canonical: a vector has one packing,
and a packing with wrong length or non-zero padding is refused.

The work is done in groups of eight elements: eight elements of b bits are
exactly b bytes, so groups are independent of each other.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedcore.errors import PeerProtocolError
from fedcore.ring.modular import Ring
from fedcore.vectors import RingVector

_GROUP = 8


def packed_size(dim: int, bits: int) -> int:
    """Return the number of bytes that `dim` elements of `bits` bits take."""
    return (dim * bits + 7) // 8


def pack(x: RingVector, ring: Ring) -> bytes:
    """Return the wire form of a vector [dim] of reduced elements."""
    dim, bits = len(x), ring.bits
    if bits == 8 * ring.dtype.itemsize:
        return x.astype(ring.dtype.newbyteorder("<"), copy=False).tobytes()
    padded = np.zeros(-(-dim // _GROUP) * _GROUP, ring.dtype)
    padded[:dim] = x
    groups = padded.reshape(-1, _GROUP)
    packed = np.zeros((len(groups), bits), np.uint8)
    for index in range(_GROUP):
        _scatter(packed, groups[:, index], index * bits, bits)
    return packed.tobytes()[: packed_size(dim, bits)]


def unpack(data: bytes, dim: int, ring: Ring) -> RingVector:
    """Return the vector [dim] whose wire form is `data`.

    Raises:
        PeerProtocolError: The length is wrong or the padding is not zero.
    """
    bits = ring.bits
    expected = packed_size(dim, bits)
    if len(data) != expected:
        msg = f"{dim} elements of {bits} bits take {expected} bytes, found {len(data)}"
        raise PeerProtocolError(msg)
    if bits == 8 * ring.dtype.itemsize:
        return np.frombuffer(data, ring.dtype.newbyteorder("<")).astype(ring.dtype)
    surplus = 8 * expected - dim * bits
    if surplus and data[-1] >> (8 - surplus):
        msg = f"the last {surplus} padding bits of a packed vector must be zero"
        raise PeerProtocolError(msg)
    count = -(-dim // _GROUP)
    flat = np.zeros(count * bits, np.uint8)
    flat[:expected] = np.frombuffer(data, np.uint8)
    packed = flat.reshape(count, bits)
    groups = np.empty((count, _GROUP), ring.dtype)
    for index in range(_GROUP):
        groups[:, index] = _gather(packed, index * bits, bits, ring)
    return groups.reshape(-1)[:dim]


def _spans(start: int, bits: int) -> list[tuple[int, int]]:
    """Return (byte, shift) pairs: element bit 0 sits `shift` bits above that byte's bit 0."""
    first, last = start // 8, (start + bits - 1) // 8
    return [(byte, start - 8 * byte) for byte in range(first, last + 1)]


def _scatter(packed: npt.NDArray[np.uint8], x: RingVector, start: int, bits: int) -> None:
    """Write one column of elements into its bytes of every group, in place."""
    for byte, shift in _spans(start, bits):
        part = x << x.dtype.type(shift) if shift >= 0 else x >> x.dtype.type(-shift)
        packed[:, byte] |= part.astype(np.uint8)


def _gather(packed: npt.NDArray[np.uint8], start: int, bits: int, ring: Ring) -> RingVector:
    """Read one column of elements from its bytes of every group."""
    value: RingVector = np.zeros(len(packed), ring.dtype)
    for byte, shift in _spans(start, bits):
        part = packed[:, byte].astype(ring.dtype)
        value |= part >> ring.dtype.type(shift) if shift >= 0 else part << ring.dtype.type(-shift)
    value &= ring.dtype.type(ring.mask)
    return value
