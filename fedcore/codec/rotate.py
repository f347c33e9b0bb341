"""Random rotations, after which no coordinate stands out.

A vector of norm c has coordinates of typical size c/sqrt(dim) after a random
rotation, however it looked before. That is what lets a narrow ring hold the sum
[SYKM17, section 3]. The rotation is x -> H D x with a random diagonal of signs D
and the Walsh-Hadamard matrix H, which exists for powers of two only.

Other lengths are not padded. With p the largest power of two up to the length,
one such rotation is applied to the first p coordinates and a second one to the
last p. Both are orthogonal, so their product is. Every coordinate of the result is
the output of one of them, and given all earlier signs such an output is a sum of
signed entries of a vector of norm at most c, divided by sqrt(p): its sub-Gaussian
scale is at most c / sqrt(p).

[SYKM17] https://arxiv.org/abs/1611.00429
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedcore.codec.public import public_words
from fedcore.codec.stage import Bound, Domain, Reals, Vector, identity
from fedcore.errors import ConfigurationError

_LARGEST_FACTOR = 128
"""Order of the dense factors: H_p is their Kronecker product, one BLAS call each."""


@dataclass(frozen=True, slots=True)
class NoRotation:
    """Leave the coordinates as they are."""

    kind: Literal["none"] = "none"

    def bind(self, source: Domain, /) -> Bound:
        """Accept anything; change nothing."""
        return identity(source)


@dataclass(frozen=True, slots=True)
class Hadamard:
    """Rotate by a randomised Walsh-Hadamard transform, chosen by `seed`.

    Attributes:
        seed: Public; a round replaces it.
    """

    seed: int = 0
    kind: Literal["hadamard"] = "hadamard"

    def bind(self, source: Domain, /) -> Bound:
        """Accept real vectors; promise flat coordinates."""
        if not isinstance(source, Reals):
            msg = f"Hadamard takes real vectors, got {source}: rotate before quantising"
            raise ConfigurationError(msg)
        block = 1 << (source.dim.bit_length() - 1)
        return Bound(
            source=source,
            target=replace(source, peak=block**-0.5),
            encode=lambda x, _: rotate(x, self.seed),
            decode=lambda total: rotate_back(total, self.seed),
        )


def rotate(x: Vector, seed: int) -> Vector:
    """Return the rotated vector [dim], as float64."""
    y = x.astype(np.float64)
    for part, signs in _blocks(seed, len(y)):
        y[part] = walsh_hadamard(y[part] * signs)
    return y


def rotate_back(y: Vector, seed: int) -> Vector:
    """Return the vector [dim] whose rotation is `y`, as float64."""
    x = y.astype(np.float64)
    for part, signs in reversed(_blocks(seed, len(x))):
        x[part] = walsh_hadamard(x[part]) * signs
    return x


def walsh_hadamard(x: Vector) -> Vector:
    """Return the orthonormal Walsh-Hadamard transform of [2^m] float64; its own inverse.

    H_p is a Kronecker product. Each pass multiplies by one factor and moves its axis
    from the front to the back, so that after the last pass all axes are in place.
    """
    rest = len(x)
    y: Vector = x
    while rest > 1:
        factor = min(rest, _LARGEST_FACTOR)
        y = (y.reshape(factor, -1).T @ _hadamard(factor)).ravel()
        rest //= factor
    return y


@lru_cache(maxsize=8)
def _hadamard(order: int) -> npt.NDArray[np.float64]:
    """Return the orthonormal Walsh-Hadamard matrix [order, order]."""
    matrix: npt.NDArray[np.float64] = np.ones((1, 1))
    step = np.array([[1.0, 1.0], [1.0, -1.0]])
    while len(matrix) < order:
        matrix = np.kron(matrix, step)
    matrix /= order**0.5
    return matrix


@lru_cache(maxsize=4)
def _blocks(seed: int, dim: int) -> tuple[tuple[slice, npt.NDArray[np.int8]], ...]:
    """Return the coordinates and the signs of each block."""
    block = 1 << (dim.bit_length() - 1)
    parts = [slice(0, block)] if block == dim else [slice(0, block), slice(dim - block, dim)]
    words = public_words("rotation", seed, -(-block * len(parts) // 64))
    bits = np.unpackbits(words.astype("<u8").view(np.uint8), bitorder="little")
    signs = (1 - 2 * bits.astype(np.int8))[: block * len(parts)].reshape(len(parts), block)
    return tuple(zip(parts, signs, strict=True))
