"""Epsilon of a pair of Gaussians, and of samples that are taken for Gaussians.

An observer sees one number. It comes from N(m1, s1) if the canary took part and from
N(m0, s0) if not. The pair is (epsilon, delta)-close if, in both directions,

    delta >= P(Z > epsilon) - e^epsilon Q(Z > epsilon),   Z = log p/q,        [Ste22, eq. 6]

and Z is a quadratic in the number: its upper set lies outside two roots, between them,
or on one side of one. [AKOOMS24] fit the two Gaussians to canaries of ONE training run
and call the smallest such epsilon their estimate. It is an estimate and no bound: a fit
knows nothing of tails that it has not seen. The interval given with it is that of the
fit, from resampled canaries. For a bound see `one_run`.

From k canaries a standard deviation is known to about 1 / sqrt(2k). With 32 that is an
eighth, and two Gaussians of one mean whose spreads differ by an eighth are as far apart
as an epsilon of 1 at delta = 1e-3, and farther by twice the error. Noise that hides a
canary has the same spread with it and without, so with few canaries the mean alone is
fitted, too.

[AKOOMS24] Andrew et al., "One-shot Empirical Privacy Estimation for Federated Learning",
           ICLR 2024. https://arxiv.org/abs/2302.03098
[Ste22]    Steinke, "Composition of Differential Privacy & Privacy Amplification by
           Subsampling". https://arxiv.org/abs/2210.00597
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, expm1, inf, log, sqrt
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Reals: TypeAlias = npt.NDArray[np.float64]
LARGEST_EPSILON = 1e7
"""From here on an epsilon is called infinite."""


@dataclass(frozen=True, slots=True)
class Normal:
    """A Gaussian by its mean and standard deviation."""

    mean: float
    std: float

    @classmethod
    def fit(cls, samples: Reals) -> Normal:
        """Return the Gaussian with the mean and the unbiased variance of two or more samples."""
        return cls(float(samples.mean()), float(samples.std(ddof=1)))


@dataclass(frozen=True, slots=True)
class Estimate:
    """An estimated epsilon and the 95 % interval of its fit."""

    epsilon: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Estimates:
    """Epsilon by two fits.

    Attributes:
        shift: Only the canaries' mean is fitted; their spread is that of the null, as it
            is under Gaussian noise. The one to read with fewer than some hundred canaries.
        fit: Mean and spread are fitted, as in [AKOOMS24].
    """

    shift: Estimate
    fit: Estimate


def estimate(
    seen: Reals, null: Normal, delta: float, *, seed: int, resamples: int = 400
) -> Estimates:
    """Return epsilon between `null` and the Gaussian fitted to `seen`, in both ways.

    Args:
        seen: The statistic of every canary that took part, at least 2.
        null: Of canaries that did not.
        delta: The probability that goes with epsilon.
        seed: Of the resampling.
        resamples: How often; the interval is that of the percentiles.
    """
    rng = np.random.default_rng([seed, len(seen)])
    drawn = [Normal.fit(sample) for sample in rng.choice(seen, (resamples, len(seen)))]
    return Estimates(
        *(
            _interval(null, [replace(x, **kept) for x in (Normal.fit(seen), *drawn)], delta)
            for kept in ({"std": null.std}, {})
        )
    )


def _interval(null: Normal, fits: Sequence[Normal], delta: float) -> Estimate:
    """Return the epsilon of the first fit, and the percentiles of the others."""
    point, *others = (epsilon_between(null, fit, delta) for fit in fits)
    low, high = np.quantile(others, [0.025, 0.975], method="nearest")
    return Estimate(point, float(low), float(high))


def epsilon_between(p: Normal, q: Normal, delta: float) -> float:
    """Return the smallest epsilon at which `p` and `q` are (epsilon, delta)-close.

    Example:
        >>> round(epsilon_between(Normal(0, 1), Normal(1, 1), delta=1e-5), 2)  # z = 1
        4.38
        >>> epsilon_between(Normal(0, 1), Normal(0, 1), delta=1e-5)
        0.0
    """
    from scipy.optimize import brentq  # noqa: PLC0415 - only where an audit runs

    if min(p.std, q.std) <= 0:
        return 0.0 if p == q else inf

    def excess(epsilon: float) -> float:
        found = max(_log_delta(p, q, epsilon), _log_delta(q, p, epsilon))
        return max(found, -1e6) - log(delta)

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 4
        if high > LARGEST_EPSILON:
            return inf
    return float(brentq(excess, 0.0, high, xtol=1e-9, rtol=1e-9))


def _log_delta(p: Normal, q: Normal, epsilon: float) -> float:
    """Return log of P(Z > epsilon) - e^epsilon Q(Z > epsilon); -inf where it is not positive."""
    # log p(y)/q(y) - epsilon = a y^2 + b y + c, with y measured from q in units of q.std.
    mean, ratio = (p.mean - q.mean) / q.std, q.std / p.std
    a = (1 - ratio**2) / 2
    b = mean * ratio**2
    c = log(ratio) - (mean * ratio) ** 2 / 2 - epsilon
    standard = Normal(0.0, 1.0)
    moved = Normal(mean, 1 / ratio)
    log_p, log_q = _log_mass(moved, a, b, c), _log_mass(standard, a, b, c)
    gap = epsilon + log_q - log_p if log_p > -inf else 0.0
    return log_p + log(-expm1(gap)) if gap < 0 else -inf


def _log_mass(of: Normal, a: float, b: float, c: float) -> float:
    """Return log of the probability that a y^2 + b y + c > 0."""
    if abs(a) < 1e-14:
        if b == 0:
            return 0.0 if c > 0 else -inf
        root = (-c / b - of.mean) / of.std
        return _log_below(-root if b > 0 else root)
    inside = b * b - 4 * a * c
    if inside <= 0:
        return 0.0 if a > 0 else -inf
    # The stable pair of roots: their product is c / a.
    far = -(b + (sqrt(inside) if b >= 0 else -sqrt(inside))) / 2
    roots = sorted(((far / a), (c / far)) if far else (0.0, 0.0))
    left, right = ((root - of.mean) / of.std for root in roots)
    if a > 0:
        return float(np.logaddexp(_log_below(left), _log_below(-right)))
    if left > 0:
        left, right = -right, -left
    below, above = _log_below(left), _log_below(right)
    share = 1 - exp(min(0.0, below - above))
    return above + log(share) if share > 0 else -inf


def _log_below(x: float) -> float:
    from scipy.special import log_ndtr  # noqa: PLC0415 - only where an audit runs

    return float(log_ndtr(x))
