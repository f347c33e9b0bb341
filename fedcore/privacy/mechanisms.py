"""Which noise is added to a sum, and the codec stage that adds a client's share.

A mechanism is described here and calibrated elsewhere: configuration states the
noise relative to the sensitivity, `fedcore.privacy.calibrate` turns it into a
standard deviation in integer units, and the stage draws it.

Both distributed mechanisms add integers, so nothing is lost or leaked by
rounding after the noise, and the sum modulo 2^b is exact:

* *discrete Gaussian* [KLS21]: the sum of n shares is within tau of one discrete
  Gaussian; tau is below 1e-9 in total as soon as sigma_local is about 2;
* *Skellam* [AKL21]: the sum of shares is a Skellam variable again, for any
  sigma; the price over the Gaussian is a term of order 1/variance.

[CKS20] https://arxiv.org/abs/2004.00010
[KLS21] https://arxiv.org/abs/2102.06387
[AKL21] https://arxiv.org/abs/2110.04995
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, hypot, inf, sqrt
from typing import Literal, TypeAlias

from fedcore.codec import Bound, Domain, Integers
from fedcore.errors import ConfigurationError
from fedcore.privacy.accounting import SMALLEST_SHARE
from fedcore.privacy.calibration import MAX_INFLATION
from fedcore.privacy.rules import check
from fedcore.privacy.samplers import (
    MAX_SIGMA,
    SEED_BYTES,
    IntegerTable,
    discrete_gaussian_table,
    sample,
    skellam_table,
)


@dataclass(frozen=True, slots=True)
class NoPrivacy:
    """No noise: the ledger shows an infinite epsilon."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedGaussian:
    """A share of discrete Gaussian noise on every device.

    Attributes:
        noise_multiplier: Standard deviation of the noise in the sum over the sensitivity;
            None to have it found for `epsilon`.
        epsilon: What all rounds together may cost; None if the noise is given.
        delta: Of the (epsilon, delta) that the ledger reports; below 1 / devices.
        epsilon_budget: Nothing is released beyond it; None for no limit other than `epsilon`.
        colluders: Fraction of the cohort whose noise is not counted.
        max_inflation: A ring in which rounding costs more than this factor of noise is refused.
    """

    kind: Literal["distributed_gaussian"] = "distributed_gaussian"
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float
    epsilon_budget: float | None = None
    colluders: float = 0.0
    max_inflation: float = MAX_INFLATION

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_mechanism(self)

    def noise(self, sigma_local: float, clients: int) -> DiscreteGaussianNoise:
        """Return the stage that adds one share of standard deviation `sigma_local`."""
        return DiscreteGaussianNoise(sigma_local, clients)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistributedSkellam:
    """A share of Skellam noise on every device.

    Attributes:
        noise_multiplier: Standard deviation of the noise in the sum over the sensitivity;
            None to have it found for `epsilon`.
        epsilon: What all rounds together may cost; None if the noise is given.
        delta: Of the (epsilon, delta) that the ledger reports; below 1 / devices.
        epsilon_budget: Nothing is released beyond it; None for no limit other than `epsilon`.
        colluders: Fraction of the cohort whose noise is not counted.
        max_inflation: A ring in which rounding costs more than this factor of noise is refused.
    """

    kind: Literal["distributed_skellam"] = "distributed_skellam"
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float
    epsilon_budget: float | None = None
    colluders: float = 0.0
    max_inflation: float = MAX_INFLATION

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_mechanism(self)

    def noise(self, sigma_local: float, clients: int) -> SkellamNoise:
        """Return the stage that adds one share of standard deviation `sigma_local`."""
        return SkellamNoise(sigma_local**2, clients)


Mechanism: TypeAlias = NoPrivacy | DistributedGaussian | DistributedSkellam


def stated_noise(mechanism: Mechanism) -> float:
    """Return the noise multiplier of `mechanism`; 0 for none.

    Raises:
        ConfigurationError: It has a target instead, whose noise was not found yet.
    """
    if isinstance(mechanism, NoPrivacy):
        return 0.0
    if mechanism.noise_multiplier is None:
        msg = (
            f"privacy.epsilon={mechanism.epsilon:g} is for all rounds together, and a round does "
            "not know how many there are: find the noise first, with fedcore.pipeline.resolve"
            "(plan, rounds=..., clients=..., dim=...)"
        )
        raise ConfigurationError(msg)
    return mechanism.noise_multiplier


def colluding(mechanism: Mechanism, clients: int) -> int:
    """Return how many of `clients` shares of noise are not counted, rounded up."""
    if isinstance(mechanism, NoPrivacy):
        return 0
    # 0.1 * 30 is a little above 3 in floating point, and means 3.
    return ceil(mechanism.colluders * clients - 1e-9)


@dataclass(frozen=True, slots=True)
class DiscreteGaussianNoise:
    """Add one share of discrete Gaussian noise to an integer vector.

    Attributes:
        sigma: Of the share, in integer units.
        clients: How many shares a sum may hold.
    """

    sigma: float
    clients: int

    def __post_init__(self) -> None:
        """Check ranges."""
        if not SMALLEST_SHARE <= self.sigma <= MAX_SIGMA:
            msg = (
                f"sigma must be in [{SMALLEST_SHARE}, {MAX_SIGMA:g}] integer units, "
                f"got {self.sigma}: raise quantize.bits, or choose distributed_skellam"
            )
            raise ConfigurationError(msg)
        _check_clients(self.clients)

    def bind(self, source: Domain, /) -> Bound:
        """Accept integers; the sum spreads by sqrt(clients) * sigma.

        Raises:
            ConfigurationError: `source` does not hold integers.
        """
        # A discrete Gaussian has variance at most sigma^2 [CKS20, section 3].
        spread = sqrt(self.clients) * self.sigma
        return _bind_noise(source, spread, lambda: discrete_gaussian_table(self.sigma))


@dataclass(frozen=True, slots=True)
class SkellamNoise:
    """Add one share of Skellam noise to an integer vector.

    Attributes:
        variance: Of the share, in integer units squared.
        clients: How many shares a sum may hold.
    """

    variance: float
    clients: int

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.variance <= MAX_SIGMA**2:
            msg = (
                f"variance must be in (0, {MAX_SIGMA**2:g}] integer units squared, "
                f"got {self.variance}: choose the scale with fedcore.privacy.calibrate"
            )
            raise ConfigurationError(msg)
        _check_clients(self.clients)

    def bind(self, source: Domain, /) -> Bound:
        """Accept integers; the sum spreads by sqrt(clients * variance).

        Raises:
            ConfigurationError: `source` does not hold integers.
        """
        spread = sqrt(self.clients * self.variance)
        return _bind_noise(source, spread, lambda: skellam_table(self.variance))


def _bind_noise(source: Domain, spread: float, table: Callable[[], IntegerTable]) -> Bound:
    if not isinstance(source, Integers):
        msg = f"noise is added to integers, got {source}: quantize first, embed afterwards"
        raise ConfigurationError(msg)
    return Bound(
        source=source,
        target=replace(source, spread=hypot(source.spread, spread)),
        encode=lambda x, entropy: x + sample(table(), entropy.draw("noise", SEED_BYTES), len(x)),
        decode=lambda total: total,
    )


def _check_clients(clients: int) -> None:
    if clients < 1:
        msg = f"clients must be at least 1, got {clients}: count everyone who is invited"
        raise ConfigurationError(msg)


def _check_mechanism(mechanism: DistributedGaussian | DistributedSkellam) -> None:
    noise, target = mechanism.noise_multiplier, mechanism.epsilon
    delta, budget = mechanism.delta, mechanism.epsilon_budget
    check(
        (
            noise is None or 0 < noise < inf,
            (
                f"privacy.noise_multiplier must be in (0, inf), got {noise}: "
                "choose privacy=none for no noise"
            ),
        ),
        (0 < delta < 1, f"privacy.delta must be in (0, 1), got {delta}: use less than 1 / devices"),
        (
            (noise is None) != (target is None),
            (
                "exactly one of privacy.noise_multiplier and privacy.epsilon must be given, got "
                f"{noise} and {target}: set the other to null"
            ),
        ),
        (
            target is None or 0 < target < inf,
            (
                f"privacy.epsilon must be in (0, inf), got {target}: any positive target may be "
                "asked for, and one that the ring cannot reach is told the smallest that it can"
            ),
        ),
        (
            budget is None or 0 < budget < inf,
            (
                f"privacy.epsilon_budget must be in (0, inf) or null, got {budget}: "
                "leave it out for no limit"
            ),
        ),
        (
            0 <= mechanism.colluders < 1,
            (
                f"privacy.colluders must be in [0, 1), got {mechanism.colluders}: "
                "it is a fraction of the cohort"
            ),
        ),
        (
            1 < mechanism.max_inflation < inf,
            (
                f"privacy.max_inflation must be above 1, got {mechanism.max_inflation}: "
                f"{MAX_INFLATION:g} is the default, 1.01 asks for a ring that costs nothing"
            ),
        ),
    )
