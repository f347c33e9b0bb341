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

The *central* Gaussian is one discrete Gaussian that the coordinator adds to the
revealed sum before anybody else sees it: tau is 0, and no survivor's share can be
missing, but the coordinator itself has seen the exact sum.

[CKS20] https://arxiv.org/abs/2004.00010
[KLS21] https://arxiv.org/abs/2102.06387
[AKL21] https://arxiv.org/abs/2110.04995
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, hypot, sqrt
from typing import Literal, TypeAlias

from fedcore.codec import Bound, Domain, Integers
from fedcore.errors import ConfigurationError
from fedcore.privacy.accounting import SMALLEST_SHARE
from fedcore.privacy.calibration import MAX_INFLATION
from fedcore.privacy.matrix import MatrixGaussian
from fedcore.privacy.rules import check, given, noise_rules
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
        amplification: Whether the ledger counts secret sampling in a device's favour, against
            those who see the models but not the cohorts; see `fedcore.privacy.sampling`.
    """

    kind: Literal["distributed_gaussian"] = "distributed_gaussian"
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float
    epsilon_budget: float | None = None
    colluders: float = 0.0
    max_inflation: float = MAX_INFLATION
    amplification: bool = False

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
        amplification: Whether the ledger counts secret sampling in a device's favour, against
            those who see the models but not the cohorts; see `fedcore.privacy.sampling`.
    """

    kind: Literal["distributed_skellam"] = "distributed_skellam"
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float
    epsilon_budget: float | None = None
    colluders: float = 0.0
    max_inflation: float = MAX_INFLATION
    amplification: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_mechanism(self)

    def noise(self, sigma_local: float, clients: int) -> SkellamNoise:
        """Return the stage that adds one share of standard deviation `sigma_local`."""
        return SkellamNoise(sigma_local**2, clients)


@dataclass(frozen=True, slots=True, kw_only=True)
class CentralGaussian:
    """One discrete Gaussian, added to the sum by the coordinator before it is published.

    It protects from whoever reads the models; the coordinator sees the exact sum.

    Attributes:
        noise_multiplier: Standard deviation of the noise in the sum over the sensitivity;
            None to have it found for `epsilon`.
        epsilon: What all rounds together may cost; None if the noise is given.
        delta: Of the (epsilon, delta) that the ledger reports; below 1 / devices.
        epsilon_budget: Nothing is released beyond it; None for no limit other than `epsilon`.
        max_inflation: A ring in which rounding costs more than this factor of noise is refused.
        amplification: As in `DistributedGaussian`.
    """

    kind: Literal["central_gaussian"] = "central_gaussian"
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float
    epsilon_budget: float | None = None
    max_inflation: float = MAX_INFLATION
    amplification: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        _check_mechanism(self)


Distributed: TypeAlias = DistributedGaussian | DistributedSkellam
"""Devices add the noise: it protects from the coordinator too."""
Central: TypeAlias = CentralGaussian | MatrixGaussian
"""The coordinator adds the noise: it protects from readers of the models only."""
Mechanism: TypeAlias = NoPrivacy | Distributed | Central


def stated_noise(mechanism: Mechanism) -> float:
    """Return the noise multiplier of `mechanism`; 0 for none.

    Raises:
        ConfigurationError: It has a target instead, whose noise was not found yet.
    """
    if isinstance(mechanism, NoPrivacy):
        return 0.0
    return given(mechanism.noise_multiplier, mechanism.epsilon)


def colluding(mechanism: Mechanism, clients: int) -> int:
    """Return how many of `clients` shares of noise are not counted, rounded up."""
    if not isinstance(mechanism, Distributed):
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


def _check_mechanism(mechanism: Distributed | CentralGaussian) -> None:
    colluders = mechanism.colluders if isinstance(mechanism, Distributed) else 0.0
    check(
        *noise_rules(
            mechanism.noise_multiplier,
            mechanism.epsilon,
            delta=mechanism.delta,
            epsilon_budget=mechanism.epsilon_budget,
            max_inflation=mechanism.max_inflation,
        ),
        (
            0 <= colluders < 1,
            (
                f"privacy.colluders must be in [0, 1), got {colluders}: "
                "it is a fraction of the cohort"
            ),
        ),
    )
