"""Dense packing of b-bit elements: the wire form of a ring vector.

Element i occupies bits [i*b, (i+1)*b) of one little-endian bit string, padded
with zero bits to a whole byte. The form is canonical: a vector has one packing,
and a packing with wrong length or non-zero padding is refused.

Eight bytes of elements are one word, whose unused bits are squeezed out: of two
neighbours the upper one moves down to the lower one, then of two pairs, until one dense
number is left. Then each word is copied where it belongs, several bytes at once. Words
repeat their position within a byte after a few, so every step works on a column of them:

    elements  >  words [groups, words per group]  >  bytes [groups, bytes]

It is done in blocks that stay in the cache: beside the vector and its packing, only a
few blocks take memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from math import gcd
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from fedcore.errors import PeerProtocolError
from fedcore.ring.modular import Ring
from fedcore.vectors import RingVector

_BLOCK_BYTES: Final = 1 << 18
"""Of the elements handled at once: whole groups, small enough for the cache."""
_WORD: Final = np.dtype("<u8")
_BYTE: Final = np.dtype(np.uint8)
_SLACK: Final = 8
"""Bytes behind the last group, so that whole words can be read and written there."""
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
    source, form = np.frombuffer(data, np.uint8), _Form.of(ring)
    x = np.empty(dim, ring.dtype)
    step = _BLOCK_BYTES // ring.dtype.itemsize
    for start in range(0, dim, step):
        block = x[start : start + step]
        packed = np.zeros(form.groups(len(block)) * form.group_bytes + _SLACK, np.uint8)
        part = source[start * bits // 8 :][: len(packed) - _SLACK]
        packed[: len(part)] = part
        words = _load(packed, form)
        _spread(words, form)
        block[:] = words.view(ring.dtype.newbyteorder("<"))[: len(block)]
    return x


def _pack_into(target: _Bytes, x: RingVector, ring: Ring) -> None:
    form, step = _Form.of(ring), _BLOCK_BYTES // ring.dtype.itemsize
    for start in range(0, len(x), step):
        block = x[start : start + step]
        words = np.empty(form.groups(len(block)) * form.group_words, _WORD)
        elements = words.view(ring.dtype.newbyteorder("<"))
        elements[: len(block)] = block
        elements[len(block) :] = 0
        _squeeze(words, form)
        packed = _store(words, form)
        part = target[start * ring.bits // 8 :][: len(packed)]
        part[:] = packed[: len(part)]


@dataclass(frozen=True, slots=True)
class _Form:
    """How elements become words, and words become dense.

    Attributes:
        bits: Of an element.
        room: Bits that its dtype has for it.
        group_words: Words after which a word starts at a whole byte again.
    """

    bits: int
    room: int
    group_words: int

    @classmethod
    def of(cls, ring: Ring) -> _Form:
        room = 8 * ring.dtype.itemsize
        return cls(ring.bits, room, 8 // gcd(8, 64 // room * ring.bits))

    @property
    def word_bits(self) -> int:
        """Bits of a word that are used."""
        return 64 // self.room * self.bits

    @property
    def group_bytes(self) -> int:
        return self.group_words * self.word_bits // 8

    def groups(self, elements: int) -> int:
        return -(-elements * self.room // (64 * self.group_words))

    def levels(self) -> list[tuple[np.uint64, np.uint64, np.uint64]]:
        """Return for each merging of neighbours the lower ones, the upper ones, and their way.

        Both are masks of their bits in the squeezed word.
        """
        levels, bits, room = [], self.bits, self.room
        while room < 64:
            ones = sum(1 << place for place in range(0, 64, 2 * room))
            low = ((1 << bits) - 1) * ones
            levels.append((np.uint64(low), np.uint64(low << bits), np.uint64(room - bits)))
            bits, room = 2 * bits, 2 * room
        return levels

    def places(self) -> list[tuple[int, int, int, bool]]:
        """Return for each word of a group its index, byte, shift, and whether it needs 9 bytes."""
        starts = [(index, *divmod(index * self.word_bits, 8)) for index in range(self.group_words)]
        return [(*start, start[2] + self.word_bits > 64) for start in starts]


def _squeeze(words: _Words, form: _Form) -> None:
    """Move the elements of each word together, in place."""
    upper = np.empty_like(words)
    for low, high, way in form.levels():
        np.right_shift(words, way, out=upper)
        upper &= high
        words &= low
        words |= upper


def _spread(words: _Words, form: _Form) -> None:
    """Undo `_squeeze`, in place; bits above those of a word are dropped."""
    upper = np.empty_like(words)
    for low, high, way in reversed(form.levels()):
        np.bitwise_and(words, high, out=upper)
        upper <<= way
        words &= low
        words |= upper
    if form.room == 64:
        words &= np.uint64((1 << form.bits) - 1)


def _store(words: _Words, form: _Form) -> _Bytes:
    """Return squeezed words without the gaps between them, and no more than `_SLACK` zeros."""
    count = len(words) // form.group_words
    if form.group_words == 1:
        return _store_bytes(words, form.group_bytes)
    packed = np.zeros(count * form.group_bytes + _SLACK, np.uint8)
    groups = words.reshape(-1, form.group_words)
    for index, byte, shift, spills in form.places():
        # A group has more than 8 bytes: what is ored is never read by the same statement.
        column = _column(packed, byte, _WORD, count, form.group_bytes)
        column |= groups[:, index] << np.uint64(shift)
        if spills:
            ninth = _column(packed, byte + 8, _BYTE, count, form.group_bytes)
            ninth |= (groups[:, index] >> np.uint64(64 - shift)).astype(np.uint8)
    return packed


def _store_bytes(words: _Words, size: int) -> _Bytes:
    """Return the lowest `size` bytes of each word, and `_SLACK` more."""
    count = len(words)
    packed = np.empty(count * size + _SLACK, np.uint8)
    first, step = 0, 1
    if size >= 4:
        # Every other word with all of its bytes, which do not reach the next but one; then
        # those between over what is too much.
        _column(packed, 0, _WORD, (count + 1) // 2, 2 * size)[:] = words[::2]
        first, step = 1, 2
    for start, dtype in _pieces(size):
        part = words.view(dtype)[start // dtype.itemsize :: 8 // dtype.itemsize][first::step]
        _column(packed, first * size + start, dtype, len(part), step * size)[:] = part
    return packed


def _load(packed: _Bytes, form: _Form) -> _Words:
    """Return the words of bytes; bits above a word's own are arbitrary."""
    count = (len(packed) - _SLACK) // form.group_bytes
    groups = np.empty((count, form.group_words), _WORD)
    for index, byte, shift, spills in form.places():
        word = groups[:, index]
        column = _column(packed, byte, _WORD, count, form.group_bytes)
        np.right_shift(column, np.uint64(shift), out=word)
        if spills:
            ninth = _column(packed, byte + 8, _BYTE, count, form.group_bytes)
            word |= ninth.astype(np.uint64) << np.uint64(64 - shift)
    return groups.reshape(-1)


def _column(
    data: _Bytes, byte: int, dtype: np.dtype[Any], count: int, stride: int
) -> npt.NDArray[Any]:
    """Return a view of `count` numbers in `data`, the first at `byte`, `stride` bytes apart."""
    return np.ndarray((count,), dtype, data, byte, (stride,))


def _pieces(size: int) -> list[tuple[int, np.dtype[Any]]]:
    """Return where the 4, 2 and 1 bytes begin that `size` < 8 bytes consist of."""
    widths = [width for width in (4, 2, 1) if size & width]
    return [(sum(widths[:place]), np.dtype(f"<u{width}")) for place, width in enumerate(widths)]
