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
    if not dim:
        return prefix
    form, start = _Form.of(ring), len(prefix)
    file = BytesIO(prefix)  # gives away its memory, where an array would be copied
    file.seek(start + form.groups(dim) * form.group_bytes + _SLACK - 1)
    file.write(b"\0")
    with file.getbuffer() as view:
        _pack_into(np.frombuffer(view, np.uint8)[start:], x, ring)
    file.truncate(start + packed_size(dim, bits))
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
    words = np.empty(form.groups(min(step, dim)) * form.group_words, _WORD)
    scratch = np.empty_like(words)
    for start in range(0, dim, step):
        block = x[start : start + step]
        groups = form.groups(len(block))
        count, size = groups * form.group_words, groups * form.group_bytes + _SLACK
        packed = source[start * bits // 8 :][:size]
        if len(packed) < size:  # nothing must be read behind the data
            packed = np.concatenate([packed, np.zeros(size - len(packed), np.uint8)])
        _load(packed, words[:count], form)
        _spread(words[:count], scratch[:count], form)
        block[:] = words[:count].view(ring.dtype.newbyteorder("<"))[: len(block)]
    return x


def _pack_into(target: _Bytes, x: RingVector, ring: Ring) -> None:
    """Write the wire form of `x`, filled up to whole groups, into `target`, which is zero."""
    form, step = _Form.of(ring), _BLOCK_BYTES // ring.dtype.itemsize
    words = np.empty(form.groups(min(step, len(x))) * form.group_words, _WORD)
    scratch = np.empty_like(words)
    for start in range(0, len(x), step):
        block = np.ascontiguousarray(x[start : start + step], ring.dtype.newbyteorder("<"))
        missing = -len(block) % form.group_elements
        if missing:
            block = np.concatenate([block, np.zeros(missing, block.dtype)])
        count = len(block) * form.room // 64
        squeezed = _squeeze(block, words[:count], scratch[:count], form)
        _store(squeezed, scratch, form, target[start * ring.bits // 8 :])


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

    @property
    def group_elements(self) -> int:
        return 64 * self.group_words // self.room

    def groups(self, elements: int) -> int:
        return -(-elements // self.group_elements)

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


def _squeeze(elements: RingVector, words: _Words, upper: _Words, form: _Form) -> _Words:
    """Return words of `elements` that are moved together.

    Two neighbours low + high * 2^room are one number of twice as many bits. It becomes
    low + high * 2^bits when high * (2^room - 2^bits) is taken away: no masks are needed.

    Args:
        elements: Whole words of them; left alone.
        words: As many words, for the result.
        upper: As many words, to work in.
        form: Of the elements.
    """
    source, bits, room = elements, form.bits, form.room
    while room < 64:
        pair = np.dtype(f"<u{2 * room // 8}")
        high = upper.view(pair)
        np.right_shift(source.view(pair), pair.type(room), out=high)
        high *= pair.type((1 << room) - (1 << bits))
        np.subtract(source.view(pair), high, out=words.view(pair))
        source, bits, room = words, 2 * bits, 2 * room
    return source.view(_WORD)


def _spread(words: _Words, upper: _Words, form: _Form) -> None:
    """Undo `_squeeze`, in place; bits above those of a word are dropped."""
    for low, high, way in reversed(form.levels()):
        np.bitwise_and(words, high, out=upper)
        upper <<= way
        words &= low
        words |= upper
    if form.room == 64:
        words &= np.uint64((1 << form.bits) - 1)


def _store(words: _Words, scratch: _Words, form: _Form, packed: _Bytes) -> None:
    """Write squeezed words without the gaps between them.

    Args:
        words: Whole groups of them.
        scratch: As many words, to work in.
        form: Of the elements.
        packed: Zeros, room for them and for `_SLACK` bytes more; those stay zero.
    """
    count = len(words) // form.group_words
    if form.group_words == 1:
        _store_bytes(words, scratch, form.group_bytes, packed)
        return
    groups, part = words.reshape(-1, form.group_words), scratch[:count]
    for index, byte, shift, spills in form.places():
        # A group has more than 8 bytes: what is ored is never read by the same statement.
        column = _column(packed, byte, _WORD, count, form.group_bytes)
        column |= np.left_shift(groups[:, index], np.uint64(shift), out=part)
        if spills:
            ninth = _column(packed, byte + 8, _BYTE, count, form.group_bytes)
            ninth |= np.right_shift(groups[:, index], np.uint64(64 - shift), out=part).astype(_BYTE)


def _store_bytes(words: _Words, scratch: _Words, size: int, packed: _Bytes) -> None:
    """Write the lowest `size` bytes of each word, one after another.

    numpy is fast at odd addresses only when it copies from contiguous memory: what is
    written was put together in `scratch`.
    """
    first, step = 0, 1
    if size >= 4:
        # Every other word with all of its bytes, which do not reach the next but one; then
        # those between over what is too much.
        even = scratch[: (len(words) + 1) // 2]
        np.copyto(even, words[::2])
        _column(packed, 0, _WORD, len(even), 2 * size)[:] = even
        first, step = 1, 2
    for start, dtype in _pieces(size):
        strided = words.view(dtype)[start // dtype.itemsize :: 8 // dtype.itemsize][first::step]
        part = scratch.view(dtype)[: len(strided)]
        np.copyto(part, strided)
        _column(packed, first * size + start, dtype, len(part), step * size)[:] = part


def _load(packed: _Bytes, words: _Words, form: _Form) -> None:
    """Fill `words` from their bytes; bits above a word's own are arbitrary."""
    groups = words.reshape(-1, form.group_words)
    for index, byte, shift, spills in form.places():
        word = groups[:, index]
        column = _column(packed, byte, _WORD, len(groups), form.group_bytes)
        np.right_shift(column, np.uint64(shift), out=word)
        if spills:
            ninth = _column(packed, byte + 8, _BYTE, len(groups), form.group_bytes)
            word |= ninth.astype(np.uint64) << np.uint64(64 - shift)


def _column(
    data: _Bytes, byte: int, dtype: np.dtype[Any], count: int, stride: int
) -> npt.NDArray[Any]:
    """Return a view of `count` numbers in `data`, the first at `byte`, `stride` bytes apart."""
    return np.ndarray((count,), dtype, data, byte, (stride,))


def _pieces(size: int) -> list[tuple[int, np.dtype[Any]]]:
    """Return where the 4, 2 and 1 bytes begin that `size` < 8 bytes consist of."""
    widths = [width for width in (4, 2, 1) if size & width]
    return [(sum(widths[:place]), np.dtype(f"<u{width}")) for place, width in enumerate(widths)]
