"""How finely to round, and how much noise each client adds.

A vector of l2 norm at most c is multiplied by s, rounded to integers, and
given integer noise; the sum over n clients is taken modulo 2^b. Three demands
meet in one quadratic equation for u = c s:

*Privacy.* Rounding lengthens a vector of norm u in d dimensions to at most

    D^2 = min{ (u + sqrt d)^2,  u^2 + d/4 + r (u + sqrt(d)/2) },  r = sqrt(2 ln(1/beta)),

where the second bound is enforced by rounding again until it holds, which takes
at most 1/(1 - beta) attempts on average [KLS21, Proposition 22 and Theorem 1].
The noise is measured against D, not against u.

*Dropout.* Only h = minimum_survivors - colluders shares of noise are certain to
be in the sum and unknown to the adversary, so each has variance z^2 D^2 / h,
where z is the noise multiplier. With every further survivor there is more. Noise that
the coordinator adds to the sum is there whoever survives: one draw of variance z^2 D^2.

*Headroom.* The standard deviation of a coordinate of the sum, times 2 k (k
standard deviations to either side), fits the ring [KLS21, section 4.2]:

    4 k^2 ( peak^2 u^2 n^2 + n/4 + n z^2 D^2 / h ) <= 4^b,

with z^2 D^2 for the last term if the noise is the coordinator's. It needs the room as
well: only a sum that is reduced modulo 2^b *after* the noise is private, since one
device can make a sum without noise wrap around, which moves it by 2^b.

The largest u that satisfies it is best: D/u, the inflation of the noise by
rounding, falls towards 1 as u grows. It is about sqrt(1 + d k^2 z^2 / 4^b).

[KLS21] Kairouz, Liu and Steinke, https://arxiv.org/abs/2102.06387
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp, hypot, inf, log, sqrt
from typing import Final

from fedcore.errors import ConfigurationError
from fedcore.privacy.rules import check
from fedcore.privacy.samplers import MAX_SIGMA

MAX_RING_BITS: Final = 64
MAX_INFLATION: Final = 2.0
"""Where nothing else is asked for, rounding may double the noise, not more."""
_MAX_SCALED_CLIP: Final = 2.0**52
"""Beyond it a float64 no longer holds the fraction that is to be rounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The public parameters of one noisy integer sum.

    Attributes:
        clip: Bound on the l2 norm of a client's vector, in real units.
        dim: Number of coordinates that are rounded, padding included.
        clients: How many are invited.
        minimum_survivors: The round aborts below this number.
        colluders: How many of the survivors may know their own noise and pool it.
        noise_multiplier: Noise of the sum over `rounded_norm`, at `minimum_survivors`.
        ring_bits: The sum is taken modulo 2^ring_bits.
        beta: Probability that one attempt at rounding exceeds `rounded_norm`, at most.
        scale: Integer units per real unit.
        rounded_norm: Bound on the l2 norm after rounding, in integer units: the sensitivity.
        sigma_local: Standard deviation of one draw of noise, in integer units: a client's
            share, or all of it if the coordinator adds it.
        signal_spread: Standard deviation of an entry of the sum before noise, in integer units.
        central: Whether the coordinator adds the noise.
    """

    clip: float
    dim: int
    clients: int
    minimum_survivors: int
    colluders: int
    noise_multiplier: float
    ring_bits: int
    beta: float
    scale: float
    rounded_norm: float
    sigma_local: float
    signal_spread: float
    central: bool = False

    @property
    def spread(self) -> float:
        """Standard deviation of an entry of the sum, signal and noise, in integer units."""
        draws = 1 if self.central else self.clients
        return hypot(self.signal_spread, sqrt(draws) * self.sigma_local)

    @property
    def inflation(self) -> float:
        """By what factor rounding increases sensitivity, and so noise: at least 1."""
        return self.rounded_norm / (self.clip * self.scale)

    def central_sigma(self, survivors: int) -> float:
        """Return the noise that `survivors` leave to the adversary, in integer units."""
        if self.central:
            return self.sigma_local
        return self.sigma_local * sqrt(max(0, survivors - self.colluders))

    def noise_multiplier_at(self, survivors: int) -> float:
        """Return the noise multiplier of a sum over `survivors` clients.

        A ledger states `noise_multiplier`, which is fixed before the run: composition
        with parameters that depend on what happened needs a more careful theorem.
        """
        return self.central_sigma(survivors) / self.rounded_norm


def calibrate(
    *,
    clip: float,
    dim: int,
    peak: float,
    clients: int,
    minimum_survivors: int,
    noise_multiplier: float,
    ring_bits: int,
    tails: float = 4.0,
    beta: float = exp(-0.5),
    colluders: int = 0,
    max_inflation: float = MAX_INFLATION,
    central: bool = False,
    largest_sigma: float = MAX_SIGMA,
) -> Calibration:
    """Return the finest scale that fits the ring, and the noise that goes with it.

    Args:
        clip: Bound on the l2 norm of a client's vector, in real units.
        dim: Number of coordinates that are rounded, padding included.
        peak: Sub-Gaussian scale of one coordinate as a fraction of the norm: 1/sqrt(p)
            after a random rotation in blocks of p, 1 without rotation.
        clients: How many are invited; all of them may survive.
        minimum_survivors: The secure sum aborts below this number.
        noise_multiplier: Wanted noise of the sum over its sensitivity; 0 for none.
        ring_bits: The sum is taken modulo 2^ring_bits.
        tails: Standard deviations to either side that fit the ring. [KLS21] uses 4 for
            the discrete Gaussian; [AKL21] (https://arxiv.org/abs/2110.04995) 3 for Skellam.
        beta: Probability that one attempt at rounding is rejected, at most.
        colluders: Survivors whose noise is not counted.
        max_inflation: Refuse a ring in which rounding costs more noise than this factor.
        central: Whether the coordinator adds the noise, instead of each client a share.
        largest_sigma: Of one draw, in integer units: where the sampler ends.

    Raises:
        ConfigurationError: An argument is out of range, or signal and noise do not fit;
            the message names the smallest ring that would do.

    Example:
        >>> fine = calibrate(
        ...     clip=1.0, dim=2**20, peak=2.0**-10, clients=100, minimum_survivors=90,
        ...     noise_multiplier=1.0, ring_bits=16,
        ... )
        >>> round(fine.inflation, 3), round(fine.noise_multiplier_at(90), 9)
        (1.002, 1.0)
    """
    check(
        (0 < clip < inf, f"clip.norm must be positive and finite, got {clip}"),
        (dim >= 1, f"dim must be at least 1, got {dim}"),
        (0 < peak <= 1, f"peak must be in (0, 1], got {peak}"),
        (
            1 <= minimum_survivors <= clients,
            f"minimum_survivors must be in 1..{clients}, got {minimum_survivors}",
        ),
        (
            0 <= colluders < minimum_survivors,
            (
                f"colluders must be in 0..{minimum_survivors - 1}, got {colluders}: raise "
                "minimum_survivors, or nobody's noise is counted"
            ),
        ),
        (
            0 <= noise_multiplier < inf,
            f"privacy.noise_multiplier must be finite and not negative, got {noise_multiplier}",
        ),
        (
            1 <= ring_bits <= MAX_RING_BITS,
            f"ring_bits must be in 1..{MAX_RING_BITS}, got {ring_bits}",
        ),
        (0 < tails < inf, f"tails must be positive and finite, got {tails}"),
        (0 < beta < 1, f"beta must be in (0, 1), got {beta}"),
        (max_inflation > 1, f"max_inflation must be above 1, got {max_inflation}"),
    )
    trade = _Trade(
        dim=dim,
        retry=sqrt(2 * log(1 / beta)),
        signal=(peak * clients) ** 2,
        rounding=clients / 4,
        share=noise_multiplier**2 / (1 if central else minimum_survivors - colluders),
        draws=1 if central else clients,
        clients=clients,
        tails=tails,
        max_inflation=max_inflation,
        largest_sigma=largest_sigma,
    )
    scaled_clip = trade.scaled_clip(ring_bits)
    if not trade.accepts(scaled_clip):
        raise ConfigurationError(_too_narrow(trade, ring_bits))
    norm = trade.rounded_norm(scaled_clip)
    return Calibration(
        clip=clip,
        dim=dim,
        clients=clients,
        minimum_survivors=minimum_survivors,
        colluders=colluders,
        noise_multiplier=noise_multiplier,
        ring_bits=ring_bits,
        beta=beta,
        scale=scaled_clip / clip,
        rounded_norm=norm,
        sigma_local=norm * sqrt(trade.share),
        signal_spread=sqrt(trade.signal * scaled_clip**2 + trade.rounding),
        central=central,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trade:
    """The equation of the module's docstring, in u = clip * scale."""

    dim: int
    retry: float
    signal: float
    rounding: float
    share: float
    draws: int
    clients: int
    tails: float
    max_inflation: float
    largest_sigma: float

    def slopes(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return (p, q) with D^2 = u^2 + p u + q, for either bound on the rounded norm."""
        root = sqrt(self.dim)
        return (2 * root, self.dim), (self.retry, self.dim / 4 + self.retry * root / 2)

    def rounded_norm(self, u: float) -> float:
        """Return D."""
        return sqrt(min(u * u + p * u + q for p, q in self.slopes()))

    def scaled_clip(self, bits: int) -> float:
        """Return the largest u that fits the ring and the sampler, or 0."""
        room = 4.0**bits / (4 * self.tails**2) - self.rounding
        noise = self.draws * self.share
        fits = max(
            _positive_root(self.signal + noise, noise * p, noise * q - room)
            for p, q in self.slopes()
        )
        if self.share == 0:
            return min(fits, _MAX_SCALED_CLIP)
        # The finest tables have an end; inflation is negligible long before. A little less,
        # or the roots below round to a sigma that is one bit too wide.
        widest = self.largest_sigma**2 * (1 - 1e-12) / self.share
        drawable = max(_positive_root(1, p, q - widest) for p, q in self.slopes())
        return min(fits, drawable)

    def accepts(self, u: float) -> bool:
        """Return whether `u` is usable, and rounding does not cost too much noise."""
        return u > 0 and (self.share == 0 or self.rounded_norm(u) <= self.max_inflation * u)


def _positive_root(a: float, b: float, c: float) -> float:
    """Return the positive x with a x^2 + b x + c = 0 for a > 0 and b >= 0, or 0."""
    if c >= 0:
        return 0.0
    # 2|c| / (b + ...) is the form without cancellation.
    return -2 * c / (b + sqrt(b * b - 4 * a * c))


def _too_narrow(trade: _Trade, bits: int) -> str:
    expected = f"a ring for {trade.clients} clients, {trade.dim} coordinates and this noise"
    u = trade.scaled_clip(bits)
    wider = next(
        (
            wider
            for wider in range(bits + 1, MAX_RING_BITS + 1)
            if trade.accepts(trade.scaled_clip(wider))
        ),
        None,
    )
    if wider is None:
        return (
            f"{expected} does not exist: each share would need a standard deviation above "
            f"{MAX_SIGMA:g} integer units; raise minimum_survivors, keep fewer coordinates or "
            "lower privacy.noise_multiplier"
        )
    if u > 0:
        inflation = ceil(100 * trade.rounded_norm(u) / u) / 100
        return (
            f"rounding into {bits} bits would take {inflation:.2f} times the noise of the central "
            f"Gaussian, and {expected} needs at least {wider} bits to stay within "
            f"privacy.max_inflation={trade.max_inflation:g}, got {bits}: raise quantize.bits to "
            f"{wider} or privacy.max_inflation to {inflation:.2f}, keep fewer coordinates or "
            "lower privacy.noise_multiplier"
        )
    return (
        f"{expected} needs at least {wider} bits, got {bits}: raise quantize.bits to "
        f"{wider}, keep fewer coordinates or lower privacy.noise_multiplier"
    )
