"""Updates compressed one by one, for rounds without masks.

Under a secure sum all clients send the same coordinates at the same width, or their masks
would not cancel. Where the coordinator may see single updates, each client can choose
its own coordinates and code them by their statistics, which is several times smaller:

    TopK             the largest entries, a few bits each
    SparseTernary    the largest entries, all replaced by their mean magnitude [SWMS19]
    Qsgd             every entry, rounded without bias to few levels of its bucket [AGLTV17]

The first two are biased and need error feedback: the client keeps what was lost and adds
it to its next update. All three end in scales and an integer vector, and share one form
on the wire: float32 scales, one for each bucket, then `encode_integers`.

[SWMS19]  Sattler et al., "Robust and Communication-Efficient Federated Learning from
          Non-IID Data", https://arxiv.org/abs/1903.02891
[AGLTV17] Alistarh et al., "QSGD", https://arxiv.org/abs/1610.02132
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedcore.codec.lossless import decode_integers, encode_integers
from fedcore.crypto.entropy import Entropy, generator
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.ring import round_stochastically
from fedcore.vectors import IntegerVector, RealVector

Scales: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TopK:
    """Keep the `fraction` of entries that are largest in magnitude, rounded to `bits` bits.

    Attributes:
        fraction: Of the entries, in (0, 1].
        bits: Of a kept entry, sign included.
    """

    fraction: float = 0.01
    bits: int = 8
    kind: Literal["top_k"] = "top_k"

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)
        if not 2 <= self.bits <= 16:
            msg = f"compress.bits must be in 2..16, got {self.bits}"
            raise ConfigurationError(msg)

    def compress(self, x: RealVector, entropy: Entropy) -> bytes:
        """Return the wire form of a vector [dim]."""
        del entropy  # the same update gives the same bytes
        peak = float(np.abs(x).max(initial=0.0))
        scale = np.float32(peak / (2 ** (self.bits - 1) - 1))
        integers = np.zeros(len(x), np.int64)
        if scale > 0:
            chosen = largest(x, self.fraction)
            integers[chosen] = np.rint(x[chosen] / scale).astype(np.int64)
        return write(np.array([scale]), integers)

    def decompress(self, data: bytes | memoryview, dim: int) -> RealVector:
        """Return the vector [dim], float32, that `data` stands for."""
        return read(data, dim, dim)


@dataclass(frozen=True, slots=True)
class SparseTernary:
    """Keep the signs of the `fraction` of entries that are largest, and their mean magnitude.

    [SWMS19, algorithm 1]

    Attributes:
        fraction: Of the entries, in (0, 1]; the paper's p.
    """

    fraction: float = 0.01
    kind: Literal["sparse_ternary"] = "sparse_ternary"

    def __post_init__(self) -> None:
        _check_fraction(self.fraction)

    def compress(self, x: RealVector, entropy: Entropy) -> bytes:
        """Return the wire form of a vector [dim]."""
        del entropy  # the same update gives the same bytes
        chosen = largest(x, self.fraction)
        integers = np.zeros(len(x), np.int64)
        integers[chosen] = np.sign(x[chosen]).astype(np.int64)
        return write(np.array([np.abs(x[chosen]).mean()], np.float32), integers)

    def decompress(self, data: bytes | memoryview, dim: int) -> RealVector:
        """Return the vector [dim], float32, that `data` stands for."""
        return read(data, dim, dim)


@dataclass(frozen=True, slots=True)
class Qsgd:
    """Round every entry, without bias, to one of `levels` fractions of its bucket's norm.

    [AGLTV17, section 3.1]

    Attributes:
        levels: Positive ones; 1 gives -norm, 0 and norm.
        bucket: Entries that share a norm; 0 for all.
    """

    levels: int = 4
    bucket: int = 512
    kind: Literal["qsgd"] = "qsgd"

    def __post_init__(self) -> None:
        if not 1 <= self.levels < 1 << 15:
            msg = f"compress.levels must be in 1..2^15, got {self.levels}"
            raise ConfigurationError(msg)
        if not 0 <= self.bucket < 1 << 30:
            msg = f"compress.bucket must be in 0..2^30, got {self.bucket}"
            raise ConfigurationError(msg)

    def compress(self, x: RealVector, entropy: Entropy) -> bytes:
        """Return the wire form of a vector [dim]; the rounding draws on `entropy`."""
        size = self.bucket or len(x)
        starts = np.arange(0, len(x), size)
        norms = np.sqrt(np.add.reduceat(np.square(x, dtype=np.float64), starts))
        scales = (norms / self.levels).astype(np.float32)
        units = _spread(np.where(scales > 0, scales, np.float32(1)), len(x), size)
        return write(scales, round_stochastically(x / units, generator(entropy, "rounding")))

    def decompress(self, data: bytes | memoryview, dim: int) -> RealVector:
        """Return the vector [dim], float32, that `data` stands for."""
        return read(data, dim, self.bucket or dim)


Compressor: TypeAlias = TopK | SparseTernary | Qsgd


def largest(x: RealVector, fraction: float) -> npt.NDArray[np.int64]:
    """Return the positions of the `fraction` of entries that are largest in magnitude."""
    kept = max(1, round(fraction * len(x)))
    if kept >= len(x):
        return np.arange(len(x))
    return np.argpartition(np.abs(x), len(x) - kept)[len(x) - kept :].astype(np.int64)


def write(scales: Scales, integers: IntegerVector) -> bytes:
    """Return the common wire form."""
    return scales.astype("<f4").tobytes() + encode_integers(integers)


def read(data: bytes | memoryview, dim: int, bucket: int) -> RealVector:
    """Return the vector [dim] whose buckets of `bucket` entries share a scale.

    Raises:
        PeerProtocolError: `data` is anything else, or does not stand for finite numbers.
    """
    count = ceil(dim / bucket)
    if len(data) < 4 * count:
        msg = f"{count} scales take {4 * count} bytes, found {len(data)}"
        raise PeerProtocolError(msg)
    scales = np.frombuffer(data, "<f4", count)
    integers = decode_integers(data[4 * count :], dim)
    bound = float(np.abs(integers).max(initial=0)) * float(np.abs(scales).max(initial=0.0))
    # Written so that a scale that is not a number is refused as well.
    if not bound <= sqrt(float(np.finfo(np.float32).max)):
        msg = "an update must consist of moderate numbers, found one that is too large"
        raise PeerProtocolError(msg)
    return _spread(scales, dim, bucket) * integers.astype(np.float32)


def _spread(scales: Scales, dim: int, bucket: int) -> Scales:
    return np.repeat(scales, bucket)[:dim] if bucket < dim else scales


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        msg = f"compress.fraction must be in (0, 1], got {fraction}"
        raise ConfigurationError(msg)
