"""Seeds stretched into uniform vectors, added block by block.

The generator is AES-256 in counter mode (NIST SP 800-38A, section 6.5) from a
zero counter: every seed is used for one vector only. A power-of-two ring takes
the key stream as it is, so no rejection is needed and every element is uniform.

All streams of one call advance together over blocks that stay in the cache.
The accumulator is touched once per block, not once per stream, and no element is
ever wider than the ring's own dtype. A counter can be set, so any part of a vector
can be masked alone: `fedcore.crypto.parallel` gives one part to each core.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from fedcore.errors import LocalProtocolError
from fedcore.ring import Ring
from fedcore.vectors import RingVector

SEED_BYTES = 32
MASKS_AT_ONCE = 4096
"""Open streams: a cipher takes about a kilobyte, and a large cohort has 100,000 masks."""
_CIPHER_BYTES = 16
_BLOCK_BYTES = 1 << 18
"""Accumulator block and key-stream block together fit a 1 MiB second-level cache."""


@dataclass(frozen=True, slots=True)
class Mask:
    """One signed key stream.

    Attributes:
        seed: 32 secret bytes, used for this vector only.
        sign: +1 to add the stream, -1 to subtract it.
    """

    seed: bytes = field(repr=False)
    sign: Literal[1, -1] = 1


OpenStream: TypeAlias = tuple[CipherContext, Literal[1, -1]]
"""A key stream at some position, and its sign."""


class AddMasks(Protocol):
    """`add_masks`, or something that returns the same, e.g. with more cores."""

    def __call__(self, x: RingVector, masks: Iterable[Mask], ring: Ring, /) -> RingVector:
        """Return `x` plus the signed key streams, reduced."""
        ...


def add_masks(
    x: RingVector, masks: Iterable[Mask], ring: Ring, *, out: RingVector | None = None
) -> RingVector:
    """Return `x` plus the signed key streams, reduced.

    Args:
        x: Shape [dim], elements of `ring`; left unchanged unless it is `out`.
        masks: Any number of them.
        ring: Fixes the dtype; the result is the same on every platform.
        out: Where the result goes, like `x`; may be `x` itself, which then needs no
            memory but one block. A new vector if None.

    Raises:
        LocalProtocolError: A seed is not 32 bytes long, or `x` and `out` are not of the
            ring's dtype and of one shape.
    """
    check_elements(x, ring)
    listed = check_seeds(masks)
    if out is None:
        out = x.copy()
    else:
        check_elements(out, ring)
        if out.shape != x.shape:
            msg = f"expected an output of shape {x.shape}, found {out.shape}"
            raise LocalProtocolError(msg)
        if out is not x:
            np.copyto(out, x)
    fold_masks(out, listed, ring)
    return out


def expand(seed: bytes, dim: int, ring: Ring) -> RingVector:
    """Return the uniform vector [dim] that `seed` stands for."""
    total = ring.zeros(dim)
    return add_masks(total, [Mask(seed)], ring, out=total)


def check_elements(x: RingVector, ring: Ring) -> None:
    """Refuse a vector whose dtype is not the ring's.

    Raises:
        LocalProtocolError: It is another.
    """
    if x.dtype != ring.dtype:
        msg = f"expected elements of dtype {ring.dtype}, found {x.dtype}"
        raise LocalProtocolError(msg)


def check_seeds(masks: Iterable[Mask]) -> list[Mask]:
    """Return `masks`, listed.

    Raises:
        LocalProtocolError: A seed is not 32 bytes long.
    """
    listed = list(masks)
    for mask in listed:
        if len(mask.seed) != SEED_BYTES:
            msg = f"a mask seed must be {SEED_BYTES} bytes, got {len(mask.seed)}"
            raise LocalProtocolError(msg)
    return listed


def fold_masks(total: RingVector, masks: Sequence[Mask], ring: Ring, first_byte: int = 0) -> None:
    """Add signed key streams to `total` [dim], in place, and reduce it.

    Args:
        total: A part of a vector.
        masks: Checked.
        ring: Of the elements.
        first_byte: Where the part begins in the whole vector; a multiple of 16.
    """
    for start in range(0, max(len(masks), 1), MASKS_AT_ONCE):
        streams = open_streams(masks[start : start + MASKS_AT_ONCE], first_byte)
        fold_streams(total, streams, ring)


def open_streams(masks: Iterable[Mask], first_byte: int = 0) -> list[OpenStream]:
    """Return the key streams of checked masks, each about to give its byte `first_byte`.

    Args:
        masks: At most `MASKS_AT_ONCE`.
        first_byte: A multiple of 16, the cipher's block.
    """
    mode = modes.CTR((first_byte // _CIPHER_BYTES).to_bytes(_CIPHER_BYTES, "big"))
    return [(Cipher(algorithms.AES(mask.seed), mode).encryptor(), mask.sign) for mask in masks]


def fold_streams(total: RingVector, streams: Sequence[OpenStream], ring: Ring) -> None:
    """Add the next elements of every stream to `total` [dim], in place, and reduce it."""
    size = min(_BLOCK_BYTES, total.nbytes)
    zeros = memoryview(bytes(size))
    buffer = np.empty(size + _CIPHER_BYTES, np.uint8)  # update_into wants a spare cipher block
    target = buffer.data
    step = _BLOCK_BYTES // ring.dtype.itemsize
    surplus = ring.bits < 8 * ring.dtype.itemsize
    for start in range(0, len(total), step):
        block = total[start : start + step]
        plain = zeros[: block.nbytes]
        words = buffer[: block.nbytes].view(ring.dtype)
        for stream, sign in streams:
            stream.update_into(plain, target)
            if sys.byteorder == "big":
                words.byteswap(inplace=True)
            if sign > 0:
                np.add(block, words, out=block)
            else:
                np.subtract(block, words, out=block)
        if surplus:
            np.bitwise_and(block, ring.dtype.type(ring.mask), out=block)
