"""Seeds stretched into uniform vectors, added block by block.

The generator is AES-256 in counter mode (NIST SP 800-38A, section 6.5) from a
zero counter: every seed is used for one vector only. A power-of-two ring takes
the key stream as it is, so no rejection is needed and every element is uniform.

All streams of one call advance together over blocks that stay in the cache.
The accumulator is touched once per block, not once per stream, and no element is
ever wider than the ring's own dtype.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from fedcore.errors import LocalProtocolError
from fedcore.ring import Ring
from fedcore.vectors import RingVector

SEED_BYTES = 32
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


def add_masks(x: RingVector, masks: Iterable[Mask], ring: Ring) -> RingVector:
    """Return `x` plus the signed key streams, reduced.

    Args:
        x: Shape [dim], elements of `ring`; left unchanged.
        masks: Any number of them.
        ring: Fixes the dtype; the result is the same on every platform.

    Raises:
        LocalProtocolError: A seed is not 32 bytes long, or the dtype is not the ring's.
    """
    if x.dtype != ring.dtype:
        msg = f"expected elements of dtype {ring.dtype}, found {x.dtype}"
        raise LocalProtocolError(msg)
    total = x.copy()
    streams = [(_key_stream(mask.seed), mask.sign) for mask in masks]
    zeros = bytes(min(_BLOCK_BYTES, total.nbytes))
    buffer = np.empty(_BLOCK_BYTES + 16, np.uint8)  # update_into wants a spare cipher block
    step = _BLOCK_BYTES // ring.dtype.itemsize
    for start in range(0, len(total), step):
        block = total[start : start + step]
        for stream, sign in streams:
            stream.update_into(zeros[: block.nbytes], buffer.data)
            words = buffer[: block.nbytes].view(ring.dtype)
            if sys.byteorder == "big":
                words = words.byteswap()
            if sign > 0:
                np.add(block, words, out=block)
            else:
                np.subtract(block, words, out=block)
    return ring.reduce(total) if ring.bits < 8 * ring.dtype.itemsize else total


def expand(seed: bytes, dim: int, ring: Ring) -> RingVector:
    """Return the uniform vector [dim] that `seed` stands for."""
    return add_masks(ring.zeros(dim), [Mask(seed)], ring)


def _key_stream(seed: bytes) -> CipherContext:
    if len(seed) != SEED_BYTES:
        msg = f"a mask seed must be {SEED_BYTES} bytes, got {len(seed)}"
        raise LocalProtocolError(msg)
    return Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
