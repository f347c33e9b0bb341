"""What a release costs, as a curve of Rényi divergences.

The neighbouring relation everywhere: add or remove all that one unit (a
device, or an example) contributes to the sum. A mechanism is described by the
Rényi divergence of order alpha that it allows, at each order in `ORDERS`;
curves of successive releases add up [Mir17, Proposition 1], and the sum is
converted to (epsilon, delta) once, at the end [CKS20, Proposition 12].

For noise of standard deviation z times the sensitivity:

    Gaussian            alpha / 2z^2                                        [Mir17]
    discrete Gaussian   the same, plus what tau allows, see `discrete_gaussian`  [KLS21]
    Skellam             the same, plus O(1 / variance), see `skellam`           [AKL21]

Amplification by sampling is claimed only where a caller asks for it by name:
it needs a secret sample, and the devices that happen to be awake and charging
are not one. `fedcore.privacy.sampling` says what a cohort's sampling is worth.

[AKL21]      Agarwal, Kairouz and Liu, https://arxiv.org/abs/2110.04995
[BS16]       Bun and Steinke, https://arxiv.org/abs/1605.02065
[CKS20]      Canonne, Kamath and Steinke, https://arxiv.org/abs/2004.00010
[KLS21]      Kairouz, Liu and Steinke, https://arxiv.org/abs/2102.06387
[Mir17]      Mironov, https://arxiv.org/abs/1702.07476
[MTZ19]      Mironov, Talwar and Zhang, https://arxiv.org/abs/1908.10530
[WBK19]      Wang, Balle and Kasiviswanathan, https://arxiv.org/abs/1808.00087
[ZW19]       Zhu and Wang, http://proceedings.mlr.press/v97/zhu19c.html
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import exp, log, sqrt
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from fedcore.errors import ConfigurationError
from fedcore.privacy.target import least_noise

Curve: TypeAlias = npt.NDArray[np.float64]
"""Rényi divergences, one for each of the orders."""
Orders: TypeAlias = npt.NDArray[np.float64]

ORDERS: Final[tuple[float, ...]] = (
    *(1 + x / 10 for x in range(1, 100)),
    *(float(x) for x in range(11, 64)),
    *(float(x) for x in (64, 72, 80, 96, 128, 160, 192, 256, 384, 512, 1024)),
)
"""Dense where a large epsilon has its best order, wide enough for an epsilon of 0.05."""
SMALLEST_SHARE: Final = 0.5
"""Sums of discrete Gaussians are analysed from this sigma on [KLS21, section 3]."""


def epsilon(curve: Curve, delta: float) -> float:
    """Return the smallest epsilon that `curve` at `ORDERS` proves for `delta`.

    Raises:
        ConfigurationError: `delta` is not in (0, 1).

    Example:
        >>> round(epsilon(gaussian(1.0), delta=1e-5), 2)
        4.73
        >>> epsilon(nothing(), delta=1e-5)
        0.0
    """
    if not 0 < delta < 1:
        msg = f"privacy.delta must be in (0, 1), got {delta}: use less than 1 / devices"
        raise ConfigurationError(msg)
    if not curve.any():
        return 0.0
    if np.isinf(curve).all():
        return float("inf")
    from dp_accounting.rdp import compute_epsilon  # noqa: PLC0415 - half a second to import

    return float(compute_epsilon(ORDERS, curve.tolist(), delta)[0])


def nothing() -> Curve:
    """Return the cost of releasing nothing."""
    return np.zeros(len(ORDERS))


def everything() -> Curve:
    """Return the cost of a release without noise."""
    return np.full(len(ORDERS), np.inf)


def gaussian(noise_multiplier: float, orders: Orders | None = None) -> Curve:
    """Return alpha / 2z^2, the curve of the Gaussian mechanism [Mir17, Proposition 7].

    It is also that of one discrete Gaussian [CKS20], and with
    rho = 1/2z^2 the definition of rho-zCDP [BS16, Definition 1.1].
    """
    curve: Curve = _at(orders) / (2 * noise_multiplier**2)
    return curve


def tau(sigma_local: float, shares: int) -> float:
    """Bound how far a sum of discrete Gaussians is from one [KLS21, Theorem 1].

    Args:
        sigma_local: Of each share, in integer units.
        shares: How many are summed; more shares only increase the bound.
    """
    # The terms fall to a constant within some hundreds: the rest is that constant.
    explicit = np.arange(1, min(shares, 100_000))
    exponent = -2 * (np.pi * sigma_local) ** 2
    rest = max(0, shares - 100_000) * exp(exponent * (1 - 1e-5))
    return 10 * (float(np.exp(exponent * explicit / (explicit + 1)).sum()) + rest)


def discrete_gaussian(
    noise_multiplier: float,
    *,
    norm: float,
    sigma_local: float,
    shares: int,
    dim: int,
    orders: Orders | None = None,
) -> Curve:
    """Return the curve of a sum of discrete Gaussian shares [KLS21, Proposition 14].

    Args:
        noise_multiplier: Noise of the honest shares together over `norm`.
        norm: l2 sensitivity in integer units.
        sigma_local: Of each share, in integer units.
        shares: At least the number of honest shares in the sum.
        dim: Number of coordinates.
        orders: Where to evaluate; `ORDERS` if None.

    Raises:
        ConfigurationError: `sigma_local` is too small for the theorem.
    """
    if sigma_local < SMALLEST_SHARE:
        msg = (
            f"a share of discrete Gaussian noise needs sigma >= {SMALLEST_SHARE} integer units, "
            f"got {sigma_local:g}: raise quantize.bits, or choose distributed_skellam"
        )
        raise ConfigurationError(msg)
    gap = tau(sigma_local, shares)
    half_orders = _at(orders) / 2
    ratio = 1 / noise_multiplier
    ratio_l1 = ratio * min(sqrt(dim), norm)
    curve: Curve = np.minimum.reduce(
        [
            half_orders * ratio**2 + gap * dim,
            half_orders * (ratio**2 + 2 * ratio_l1 * gap + gap**2 * dim),
            half_orders * (ratio + sqrt(dim) * gap) ** 2,
        ]
    )
    return curve


def skellam(
    noise_multiplier: float, *, norm: float, dim: int, orders: Orders | None = None
) -> Curve:
    """Return the curve of Skellam noise [AKL21].

    The bound is the one that its authors compute, and holds at integer orders; between
    them (alpha - 1) times the divergence is convex in alpha, so the chord is a bound
    [WBK19].

    Args:
        noise_multiplier: Noise of the honest shares together over `norm`.
        norm: l2 sensitivity in integer units; on integers the l1 sensitivity is at
            most norm * min(sqrt(dim), norm).
        dim: Number of coordinates.
        orders: Where to evaluate; `ORDERS` if None.
    """
    variance = (noise_multiplier * norm) ** 2
    norm_l1 = norm * min(sqrt(dim), norm)

    def bound(order: Orders) -> Curve:
        excess = np.minimum(
            ((2 * order - 1) * norm**2 + 6 * norm_l1) / (4 * variance**2),
            3 * norm_l1 / (2 * variance),
        )
        return order * norm**2 / (2 * variance) + excess

    return _between_integers(bound, _at(orders))


def poisson_gaussian(noise_multiplier: float, sampling_rate: float) -> Curve:
    """Return the curve of the Gaussian mechanism on a Poisson sample [MTZ19, section 3.3].

    This is one step of DP-SGD.
    """
    import dp_accounting  # noqa: PLC0415 - half a second to import

    accountant = dp_accounting.rdp.RdpAccountant(ORDERS)
    step = dp_accounting.GaussianDpEvent(noise_multiplier)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(sampling_rate, step))
    return np.asarray(accountant.rdp, dtype=np.float64)


def fixed_size_gaussian(noise_multiplier: float, sample_size: int, population: int) -> Curve:
    """Return the curve of a Gaussian sum over a sample without replacement [WBK19, Theorem 27].

    For another neighbouring relation: one unit is *replaced*, the population's
    size being public. Do not add this curve to those of this module, which count
    adding or removing; the ledger refuses to.

    Args:
        noise_multiplier: Noise over the clipping norm. Replacing a unit moves the
            sum by twice that norm, which is accounted for here.
        sample_size: Units in each sample.
        population: Units to choose from.
    """
    import dp_accounting  # noqa: PLC0415 - half a second to import

    relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    accountant = dp_accounting.rdp.RdpAccountant(ORDERS, relation)
    step = dp_accounting.GaussianDpEvent(noise_multiplier / 2)
    accountant.compose(
        dp_accounting.SampledWithoutReplacementDpEvent(population, sample_size, step)
    )
    return np.asarray(accountant.rdp, dtype=np.float64)


def poisson_amplified(mechanism: Callable[[Orders], Curve], sampling_rate: float) -> Curve:
    """Return the curve of any `mechanism` on a Poisson sample [ZW19, Theorem 5].

    For the integer mechanisms, which have no bound of their own: it costs some
    percent more noise than `poisson_gaussian` would promise.

    Args:
        mechanism: Its curve without sampling, at any orders.
        sampling_rate: Probability that a unit is in the sample, in (0, 1).
    """
    from scipy.special import gammaln, logsumexp  # noqa: PLC0415 - only where amplified

    direct = mechanism(np.arange(0.0, max(ORDERS) + 1).clip(min=1.5))
    log_in, log_out = log(sampling_rate), np.log1p(-sampling_rate)

    def bound(orders: Orders) -> Curve:
        return np.array([at_integer(int(order)) for order in orders])

    @cache
    def at_integer(order: int) -> float:
        if order == 1:
            return 0.0
        j = np.arange(2, order + 1)
        binomials = gammaln(order + 1) - gammaln(j + 1) - gammaln(order - j + 1)
        terms = binomials + j * log_in + (order - j) * log_out + (j - 1) * direct[j]
        terms[1:] += log(3)
        none = (order - 1) * log_out + np.log1p((order - 1) * sampling_rate)
        return float(logsumexp([none, *terms])) / (order - 1)

    amplified = _between_integers(bound, _at(None))
    return np.minimum(amplified, mechanism(_at(None)))


def sample_amplified(replacement: Callable[[Orders], Curve], sampling_rate: float) -> Curve:
    """Return the curve of any mechanism on a sample without replacement [WBK19, Theorem 9].

    It bounds what *replacing* a unit changes, also by one that contributes nothing, when
    the size of the sample is known; `fixed_size_gaussian` is sharper for the Gaussian.

    Args:
        replacement: Curve of the mechanism when a unit of its sample is replaced, which
            moves a sum by up to twice the clipping norm; at any orders.
        sampling_rate: Units in the sample over units to choose from, in (0, 1].
    """
    from scipy.special import gammaln, logsumexp  # noqa: PLC0415 - only where amplified

    direct = replacement(np.arange(0.0, max(ORDERS) + 1).clip(min=1.5))
    pair = direct[2]
    # min{4 (e^x - 1), 2 e^x}, without overflow.
    second = min(log(4) + pair + np.log(-np.expm1(-pair)), log(2) + pair)

    def bound(orders: Orders) -> Curve:
        return np.array([at_integer(int(order)) for order in orders])

    @cache
    def at_integer(order: int) -> float:
        j = np.arange(2, order + 1)
        binomials = gammaln(order + 1) - gammaln(j + 1) - gammaln(order - j + 1)
        terms = j * log(sampling_rate) + binomials + log(2) + (j - 1) * direct[j]
        terms[0] = 2 * log(sampling_rate) + binomials[0] + second
        return float(logsumexp([0.0, *terms])) / (order - 1)

    return np.minimum(_between_integers(bound, _at(None)), replacement(_at(None)))


def zcdp_epsilon(rho: float, delta: float) -> float:
    """Convert rho-zCDP to (epsilon, delta)-DP [BS16, Proposition 1.3].

    Coarser than `epsilon`, but a formula that fits on a napkin; z times the
    sensitivity in Gaussian noise, over T releases, is rho = T / 2z^2.

    Example:
        >>> round(zcdp_epsilon(rho=0.5, delta=1e-5), 4)
        5.2985
    """
    return rho + 2 * sqrt(rho * log(1 / delta))


def sampling_delta(epsilon: float, *, distance: float, samples: int) -> float:
    """Return what an inexact sampler adds to delta: (1 + e^epsilon) * samples * distance.

    If M' is within d of M in total variation on every input, (epsilon, delta) for
    M is (epsilon, delta + (1 + e^epsilon) d) for M'; distances of independent
    samples add up.

    Args:
        epsilon: Of the exact mechanism.
        distance: Of one sample, e.g. `IntegerTable.distance`.
        samples: Rounds times clients times coordinates.

    Example:
        >>> sampling_delta(10.0, distance=1e-34, samples=1000 * 100 * 10**6) < 1e-18
        True
    """
    return (1 + exp(epsilon)) * samples * distance


def noise_multiplier_for(
    epsilon_target: float,
    delta: float,
    rounds: int,
    *,
    curve: Callable[[float], Curve] = gaussian,
) -> float:
    """Return the least noise, to six digits, that keeps `rounds` releases within a budget.

    Args:
        epsilon_target: The budget.
        delta: The probability that goes with it.
        rounds: Number of releases.
        curve: Cost of one release as a function of the noise multiplier; for DP-SGD
            ``lambda z: poisson_gaussian(z, sampling_rate)``.

    Raises:
        ConfigurationError: No amount of noise keeps the budget.

    Example:
        >>> round(noise_multiplier_for(1.0, 1e-5, rounds=1), 2)
        4.05
    """
    found = least_noise(lambda z: epsilon(rounds * curve(z), delta), epsilon_target)
    if found is None or found.epsilon > epsilon_target:
        msg = (
            f"no noise keeps {rounds} releases within epsilon {epsilon_target:g} at delta "
            f"{delta:g}: raise the budget or run fewer rounds"
        )
        raise ConfigurationError(msg)
    return found.noise_multiplier


def _at(orders: Orders | None) -> Orders:
    return np.array(ORDERS) if orders is None else orders


def _between_integers(bound: Callable[[Orders], Curve], orders: Orders) -> Curve:
    """Return `bound`, valid at integers from 2 on, at any orders above 1."""
    floor, ceiling = np.floor(orders), np.ceil(orders)
    weight = orders - floor
    # (alpha - 1) D_alpha vanishes at alpha = 1, whatever `bound` says there.
    below = np.where(floor > 1, (floor - 1) * bound(np.maximum(floor, 2)), 0.0)
    above = (ceiling - 1) * bound(np.maximum(ceiling, 2))
    return ((1 - weight) * below + weight * above) / (orders - 1)
