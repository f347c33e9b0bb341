"""Dense packing of b-bit elements: the wire form of a ring vector.

Element i occupies bits [i*b, (i+1)*b) of one little-endian bit string, padded
with zero bits to a whole byte. The form is canonical: a vector has one packing,
and a packing with wrong length or non-zero padding is refused.

Elements are first merged into words of at most 64 bits, as many as fit; then each
word's bytes are copied where they belong. Words repeat their position within a byte
after a few, so every step works on a whole column of them:

    elements [words, merged]  >  words [groups, words per group]  >  bytes [groups, bytes]

It is done in blocks that stay in the cache: beside the vector and its packing, only a
block takes memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from math import gcd
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from fedcore.errors import PeerProtocolError
from fedcore.ring.modular import Ring
from fedcore.vectors import RingVector

_BLOCK = 1 << 15
"""Elements handled at once: whole groups, small enough for the cache."""
_Words: TypeAlias = npt.NDArray[np.uint64]
_Bytes: TypeAlias = npt.NDArray[np.uint8]


def packed_size(dim: int, bits: int) -> int:
    """Return the number of bytes that `dim` elements of `bits` bits take."""
    return (dim * bits + 7) // 8


def pack(x: RingVector, ring: Ring, *, prefix: bytes = b"") -> bytes:
    """Return the wire form of a vector [dim] of reduced elements.

    Args:
        x: Shape [dim].
        ring: Of its elements.
        prefix: Put in front, where joining afterwards would copy everything once more.
    """
    dim, bits = len(x), ring.bits
    if bits == 8 * ring.dtype.itemsize:
        little = np.ascontiguousarray(x, ring.dtype.newbyteorder("<"))
        return b"".join((prefix, little.view(np.uint8).data))
    file = BytesIO(prefix)  # gives away its memory, where an array would be copied
    file.seek(len(prefix))
    size = packed_size(dim, bits)
    if size:
        file.seek(len(prefix) + size - 1)
        file.write(b"\0")
        with file.getbuffer() as view:
            _pack_into(np.frombuffer(view, np.uint8)[len(prefix) :], x, ring)
    return file.getvalue()


def unpack(data: bytes | memoryview, dim: int, ring: Ring, *, writable: bool = True) -> RingVector:
    """Return the vector [dim] whose wire form is `data`.

    Args:
        data: As `pack` made it, without a prefix; a view of bytes saves their copy.
        dim: Length of the vector.
        ring: Of its elements.
        writable: If False, the result may be a view of `data`, which saves one more.

    Raises:
        PeerProtocolError: The length is wrong or the padding is not zero.
    """
    bits = ring.bits
    expected = packed_size(dim, bits)
    if len(data) != expected:
        msg = f"{dim} elements of {bits} bits take {expected} bytes, found {len(data)}"
        raise PeerProtocolError(msg)
    if bits == 8 * ring.dtype.itemsize:
        return np.frombuffer(data, ring.dtype.newbyteorder("<")).astype(ring.dtype, copy=writable)
    surplus = 8 * expected - dim * bits
    if surplus and data[-1] >> (8 - surplus):
        msg = f"the last {surplus} padding bits of a packed vector must be zero"
        raise PeerProtocolError(msg)
    source = np.frombuffer(data, np.uint8)
    form = _Form.of(ring)
    x = np.empty(dim, ring.dtype)
    for start in range(0, dim, _BLOCK):
        block = x[start : start + _BLOCK]
        packed = np.zeros((form.groups(len(block)), form.group_bytes), np.uint8)
        part = source[start * bits // 8 :][: packed.size]
        packed.reshape(-1)[: len(part)] = part
        block[:] = _split(_load(packed, form), form, ring)[: len(block)]
    return x


def _pack_into(target: _Bytes, x: RingVector, ring: Ring) -> None:
    form = _Form.of(ring)
    for start in range(0, len(x), _BLOCK):
        block = x[start : start + _BLOCK]
        surplus = -len(block) % form.group_elements
        if surplus:
            block = np.concatenate([block, ring.zeros(surplus)])
        packed = _store(_merge(block, form), form).reshape(-1)
        part = target[start * ring.bits // 8 :][: len(packed)]
        part[:] = packed[: len(part)]


@dataclass(frozen=True, slots=True)
class _Form:
    """How elements become words, and words bytes.

    Attributes:
        bits: Of an element.
        merged: Elements in a word.
        group_words: Words after which a word starts at a whole byte again.
    """

    bits: int
    merged: int
    group_words: int

    @classmethod
    def of(cls, ring: Ring) -> _Form:
        merged = 8 // ring.dtype.itemsize
        return cls(ring.bits, merged, 8 // gcd(8, merged * ring.bits))

    @property
    def word_bits(self) -> int:
        return self.merged * self.bits

    @property
    def group_elements(self) -> int:
        return self.merged * self.group_words

    @property
    def group_bytes(self) -> int:
        return self.group_words * self.word_bits // 8

    def groups(self, elements: int) -> int:
        return -(-elements // self.group_elements)

    def places(self) -> list[tuple[int, int, int, bool]]:
        """Return for each word of a group its index, byte, shift, and whether it needs 9 bytes."""
        starts = [(index, *divmod(index * self.word_bits, 8)) for index in range(self.group_words)]
        return [(*start, start[2] + self.word_bits > 64) for start in starts]


def _merge(x: RingVector, form: _Form) -> _Words:
    words = x[0 :: form.merged].astype(np.uint64)
    for index in range(1, form.merged):
        words |= x[index :: form.merged].astype(np.uint64) << np.uint64(index * form.bits)
    return words


def _split(words: _Words, form: _Form, ring: Ring) -> RingVector:
    x = np.empty((len(words), form.merged), ring.dtype)
    for index in range(form.merged):
        x[:, index] = words >> np.uint64(index * form.bits)  # the cast drops what is above
    x &= ring.dtype.type(ring.mask)
    return x.reshape(-1)


def _store(words: _Words, form: _Form) -> _Bytes:
    """Return the bytes [groups, bytes] of words."""
    groups = words.reshape(-1, form.group_words)
    if form.group_words == 1:
        return _bytes_of(words)[:, : form.group_bytes]
    packed = np.zeros((len(groups), form.group_bytes), np.uint8)
    for index, byte, shift, spills in form.places():
        column = groups[:, index]
        room = packed[:, byte : byte + 8]
        room |= _bytes_of(column << np.uint64(shift))[:, : room.shape[1]]
        if spills:
            packed[:, byte + 8] |= (column >> np.uint64(64 - shift)).astype(np.uint8)
    return packed


def _load(packed: _Bytes, form: _Form) -> _Words:
    """Return the words of bytes [groups, bytes]; bits above a word's own are arbitrary."""
    groups = np.empty((len(packed), form.group_words), np.uint64)
    for index, byte, shift, spills in form.places():
        eight = np.zeros((len(packed), 8), np.uint8)
        part = packed[:, byte : byte + 8]
        eight[:, : part.shape[1]] = part
        word = eight.view("<u8")[:, 0].astype(np.uint64, copy=False) >> np.uint64(shift)
        if spills:
            word |= packed[:, byte + 8].astype(np.uint64) << np.uint64(64 - shift)
        groups[:, index] = word
    return groups.reshape(-1)


def _bytes_of(words: _Words) -> _Bytes:
    """Return the little-endian bytes [words, 8]."""
    return np.ascontiguousarray(words, "<u8").view(np.uint8).reshape(-1, 8)
