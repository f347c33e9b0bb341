"""Integer noise by table: exact to 2^-100, and as fast as memory.

A distribution on the integers becomes a table of cumulative probabilities

    C_i = floor(2^128 P[X <= lowest + i]),

computed once with integers of several hundred bits. A sample is the first i
with U < C_i for a uniform 128-bit U, which is inversion, and is correct for
any distribution. Two facts make it fast:

* the upper 64 bits of U decide, except when they equal the upper half of some
  C_i: the lower 64 bits are drawn only then (once in 2^64 / entries samples);
* the first bits of U index a guide table [Dev86, section III.2.4]. Almost every
  bucket lies between two neighbouring C_i, so one look-up is the whole answer;
  the rest is settled by binary search.

U is the keystream of AES-256-CTR, so the noise is as unpredictable as its seed.

The statistical distance of a table to its distribution is known (`distance`);
`fedcore.privacy.accounting.sampling_delta` turns it into an increase of delta.
Look-ups are not constant time: a process that watches the cache of the machine
which draws the noise may learn about it. That machine is the owner's device.

Floating-point samplers have no such bound, and their low bits have broken
differential privacy [Mir12]; exact rejection samplers [CKS20, section 5] need
microseconds a sample.

[CKS20] https://arxiv.org/abs/2004.00010
[Dev86] Devroye, Non-Uniform Random Variate Generation, Springer 1986.
[Mir12] Mironov, On significance of the least significant bits for differential
        privacy, CCS 2012.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache, partial
from itertools import accumulate
from math import asinh, ceil, hypot, log, sqrt
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedcore.errors import ConfigurationError
from fedcore.vectors import IntegerVector

SEED_BYTES: Final = 32
MAX_SIGMA: Final = 2.0**14
"""Largest standard deviation of a table: 440,000 entries, 11 MB, 0.3 s to build."""

_TAIL_BITS: Final = 130
"""A table leaves out values of total probability below 2^-130."""
_PRECISION: Final = 256
"""Fraction bits of the weights that a table is built from."""
_BLOCK: Final = 2**15
"""Samples drawn at a time: words, indices and results stay in the L2 cache."""
_UNDECIDED: Final = np.iinfo(np.int32).min
"""Marks the buckets of the guide table that hold a boundary."""

Words: TypeAlias = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, eq=False)
class IntegerTable:
    """A distribution on consecutive integers, ready to be sampled.

    Attributes:
        lowest: The smallest value.
        high: Upper 64 bits of C_0, C_1, ..., shape [values - 1]; the last C is 2^128.
        low: Lower 64 bits of the same.
        guide: The sample for each leading-bits pattern, or a mark where they do not decide.
        guide_bits: How many leading bits index `guide`.
        distance: Bound on the statistical (total variation) distance of one sample.
    """

    lowest: int
    high: Words = field(repr=False)
    low: Words = field(repr=False)
    guide: npt.NDArray[np.int32] = field(repr=False)
    guide_bits: int
    distance: float

    @property
    def highest(self) -> int:
        """The largest value."""
        return self.lowest + len(self.high)


def sample(table: IntegerTable, seed: bytes, size: int) -> IntegerVector:
    """Return `size` independent samples; the same for the same seed on every platform.

    Args:
        table: What to sample.
        seed: 32 secret uniform bytes, used for this call only.
        size: Number of samples.

    Returns:
        Shape [size], int64.

    Raises:
        ValueError: `seed` is not 32 bytes long.

    Example:
        >>> sample(discrete_gaussian_table(2.0), bytes(32), 5).tolist()
        [0, 0, 1, 0, 0]
    """
    if len(seed) != SEED_BYTES:
        msg = f"seed must be {SEED_BYTES} bytes, got {len(seed)}: draw it from an Entropy"
        raise ValueError(msg)
    samples = np.empty(size, np.int64)
    keystream = _Keystream(seed, stream=0)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        lower_halves = partial(_lower_halves, seed, start, stop)
        samples[start:stop] = _invert(table, keystream.words(stop - start), lower_halves)
    return samples


def standard_normals(seed: bytes, size: int) -> npt.NDArray[np.float64]:
    """Return `size` independent standard normals; the same for the same seed.

    By inversion of 64-bit uniforms, symmetric, out to 9 standard deviations. They are
    floating-point numbers and have no stated distance to the Gaussian: whoever uses them
    must not publish their low bits.

    Args:
        seed: 32 secret uniform bytes, used for this call only.
        size: Number of samples.

    Returns:
        Shape [size], float64.

    Raises:
        ValueError: `seed` is not 32 bytes long.

    Example:
        >>> standard_normals(bytes(32), 3).round(3).tolist()
        [-0.617, 0.631, 0.354]
    """
    from scipy.special import ndtri  # noqa: PLC0415 - only where correlated noise is drawn

    if len(seed) != SEED_BYTES:
        msg = f"seed must be {SEED_BYTES} bytes, got {len(seed)}: draw it from an Entropy"
        raise ValueError(msg)
    words = _Keystream(seed, stream=0).words(size)
    # The lower half of (0, 1), where floats are dense, and a sign.
    tails = ((words >> np.uint64(1)).astype(np.float64) + 0.5) * 2.0**-64
    normals: npt.NDArray[np.float64] = ndtri(np.minimum(tails, 0.5))
    normals[(words & np.uint64(1)).astype(bool)] *= -1
    return normals


def _lower_halves(seed: bytes, start: int, stop: int) -> Words:
    """Return the lower 64 bits of the uniforms start..stop; next to never called."""
    return _Keystream(seed, stream=1).words(stop)[start:]


def _invert(table: IntegerTable, words: Words, refine: Callable[[], Words]) -> IntegerVector:
    """Return the sample for each upper half in `words`; `refine` gives the lower halves."""
    buckets = (words >> np.uint64(64 - table.guide_bits)).view(np.int64)
    samples = table.guide[buckets].astype(np.int64)
    undecided = np.flatnonzero(samples == _UNDECIDED)
    upper = words[undecided]
    first = np.searchsorted(table.high, upper, side="left")
    samples[undecided] = table.lowest + first
    # Above every C_i the clipped index points to a smaller one, which is no tie.
    ties = np.flatnonzero(table.high.take(first, mode="clip") == upper)
    if ties.size:
        first = first[ties]
        last = np.searchsorted(table.high, upper[ties], side="right")
        lower = refine()[undecided[ties]]
        for tie, start, stop, word in zip(ties.tolist(), first, last, lower, strict=True):
            among = table.low[start:stop]
            samples[undecided[tie]] += np.searchsorted(among, word, side="right")
    return samples


class _Keystream:
    """AES-256-CTR of a seed; streams are 2^120 blocks apart and never meet."""

    __slots__ = ("_encryptor",)

    def __init__(self, seed: bytes, *, stream: int) -> None:
        counter = bytes([stream]) + bytes(15)
        self._encryptor = Cipher(algorithms.AES(seed), modes.CTR(counter)).encryptor()

    def words(self, count: int) -> Words:
        """Return the next `count` uniform words."""
        return np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype="<u8")


@lru_cache(maxsize=8)
def discrete_gaussian_table(sigma: float) -> IntegerTable:
    """Return the table of P[X = x] ~ exp(-x^2 / 2 sigma^2) [CKS20, Definition 1].

    Raises:
        ConfigurationError: `sigma` is not in (0, MAX_SIGMA].
    """
    _check_sigma("sigma", sigma)
    reach = _gaussian_reach(sigma)
    variance = Fraction(sigma) ** 2
    with localcontext() as context:
        context.prec = 2 + ceil(_PRECISION * log(2) / log(10))
        exponent = -Decimal(variance.denominator) / Decimal(variance.numerator)
        ratio = int((exponent / 2).exp() * 2**_PRECISION)
        decay = int(exponent.exp() * 2**_PRECISION)
    # exp(-(k+1)^2/2s^2) = exp(-k^2/2s^2) * ratio_k and ratio_{k+1} = ratio_k * exp(-1/s^2);
    # truncation costs at most k^2 units of 2^-256 after k steps.
    weights = [1 << _PRECISION]
    for _ in range(reach):
        weights.append(weights[-1] * ratio >> _PRECISION)
        ratio = ratio * decay >> _PRECISION
    return _symmetric_table(weights)


@lru_cache(maxsize=8)
def skellam_table(variance: float) -> IntegerTable:
    """Return the table of a difference of two Poisson(variance / 2) variables.

    The probabilities exp(-v) I_|x|(v), with the modified Bessel function I, obey

        I_{k-1}(v) = I_{k+1}(v) + (2k / v) I_k(v),

    which is stable downwards: start far out with anything and normalise at the
    end (Miller's algorithm; https://dlmf.nist.gov/3.6 section v).

    Raises:
        ConfigurationError: `variance` is not in (0, MAX_SIGMA^2].
    """
    _check_sigma("sqrt(variance)", sqrt(variance) if variance > 0 else variance)
    reach = _skellam_reach(variance, _TAIL_BITS + 1)
    start = _skellam_reach(variance, 2 * _TAIL_BITS)
    rational = Fraction(variance)
    above, here = 0, 1 << 64
    weights = []
    for order in range(start, 0, -1):
        if order <= reach:
            weights.append(here)
        step = 2 * order * rational.denominator * here // rational.numerator
        above, here = here, above + step
    return _symmetric_table([here, *reversed(weights)])


def gaussian_distance(sigma: float) -> float:
    """Return the `distance` of `discrete_gaussian_table` without building the table."""
    return _distance(_gaussian_reach(sigma))


def skellam_distance(variance: float) -> float:
    """Return the `distance` of `skellam_table` without building the table."""
    return _distance(_skellam_reach(variance, _TAIL_BITS + 1))


def _distance(reach: int) -> float:
    """Return how far a table of -reach..reach is from its distribution."""
    # Each of the cumulative values is at most 2^-128 too small; the rest is the cut tail.
    return (2 * reach + 1) * 2.0**-128 + 2.0**-_TAIL_BITS


def _gaussian_reach(sigma: float) -> int:
    """Return a t with P[|X| > t] <= 2^-_TAIL_BITS."""
    # P[|X| > t] <= 2 exp(-t^2 / 2 sigma^2), as for the Gaussian [CKS20, section 3].
    return ceil(sigma * sqrt(2 * log(2) * (_TAIL_BITS + 1)))


def _skellam_reach(variance: float, bits: int) -> int:
    """Return a t with P[X > t] <= 2^-bits, by Chernoff's bound.

    The cumulant generating function is v (cosh(s) - 1); its optimum is sinh(s) = t / v.
    """
    low, high = 0, 64 + ceil(32 * sqrt(variance))
    while high - low > 1:
        t = (low + high) // 2
        # hypot(t, v) - v without cancellation.
        rise = t * t / (hypot(t, variance) + variance)
        low, high = (low, t) if t * asinh(t / variance) - rise > bits * log(2) else (t, high)
    return high


def _symmetric_table(weights: Sequence[int]) -> IntegerTable:
    """Return the table of P[|X| = k] ~ weights[k], of either sign."""
    reach = len(weights) - 1
    sums = list(accumulate([*reversed(weights), *weights[1:]]))
    total = sums.pop()
    cumulative = b"".join(((c << 128) // total).to_bytes(16, "little") for c in sums)
    low, high = np.frombuffer(cumulative, dtype="<u8").reshape(-1, 2).T.copy()
    guide, guide_bits = _guide(high, lowest=-reach)
    for array in (low, high, guide):
        array.setflags(write=False)
    return IntegerTable(-reach, high, low, guide, guide_bits, _distance(reach))


def _guide(high: Words, lowest: int) -> tuple[npt.NDArray[np.int32], int]:
    """Return the sample of each bucket that holds no boundary, and the index bits."""
    bits = min(20, max(12, len(high).bit_length() + 4))
    starts = np.arange(2**bits, dtype=np.uint64) << np.uint64(64 - bits)
    ends = starts + np.uint64(2 ** (64 - bits) - 1)
    below = np.searchsorted(high, starts, side="left")
    decided = below == np.searchsorted(high, ends, side="right")
    return np.where(decided, lowest + below, _UNDECIDED).astype(np.int32), bits


def _check_sigma(name: str, sigma: float) -> None:
    if not 0 < sigma <= MAX_SIGMA:
        msg = (
            f"{name} must be in (0, {MAX_SIGMA:g}] integer units, got {sigma:g}: "
            "choose the scale with fedcore.privacy.calibrate"
        )
        raise ConfigurationError(msg)
