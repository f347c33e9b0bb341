"""One noisy value that was revealed, with all that its cost depends on.

Releases compose one by one, except those of one stream of correlated noise: they are
parts of a single mechanism, and together cost what the latest of them has made possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from math import sqrt
from typing import Final, Literal, TypeAlias, get_args

import numpy as np

from fedcore.privacy import accounting
from fedcore.privacy.accounting import Curve, Orders
from fedcore.privacy.calibration import Calibration
from fedcore.privacy.matrix import MatrixGaussian, spent_participations
from fedcore.privacy.mechanisms import Mechanism, NoPrivacy, stated_noise
from fedcore.privacy.rules import check
from fedcore.privacy.samplers import gaussian_distance, skellam_distance
from fedcore.privacy.sampling import Sampling

Unit: TypeAlias = Literal["device", "example"]
NoiseKind: TypeAlias = Literal[
    "none",
    "gaussian",
    "distributed_gaussian",
    "distributed_skellam",
    "central_gaussian",
    "matrix_gaussian",
]

LARGEST_COUNT: Final = 2**53
"""Beyond it a count is no longer exact in a float64."""
_NEGLIGIBLE_NOISE: Final = 1e-6
"""Counted as none: epsilon would be in the billions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A noisy sum, or a round of DP-SGD.

    Attributes:
        round_number: 1-based.
        unit: Whose contribution is bounded by `norm`.
        mechanism: Which noise was added.
        noise_multiplier: Standard deviation of the noise over `norm`, counting honest noise
            only; 0 for none.
        norm: l2 sensitivity, in the units of `sigma_local`.
        sigma_local: Standard deviation of one share; of the whole noise if not distributed.
        scale: Integer units per real unit.
        dim: Number of coordinates.
        clients: How many were invited.
        survivors: How many are in the sum, colluders included.
        sampling: How the devices in the sum, or the batch, were chosen, as executed.
        sampling_rate: With which probability each of them was chosen.
        population: How many there were to choose from; 0 if unknown. Of devices only.
        amplification_claimed: Whether the cost is reduced for sampling: `sampling` is Poisson,
            and of devices all that were drawn are in the sum. Their number is public, so it is
            `clients` out of `population` that counts, not `sampling_rate`. It holds against
            those who see the models, not against the coordinator; see
            `fedcore.privacy.sampling`.
        steps: Releases of this kind in the round: 1 for a sum, batches for DP-SGD.
        participations: Of a device in a stream of correlated noise, at most. `noise_multiplier`,
            `norm` and `sigma_local` are then those of the stream with all of them.
        separation: Rounds between two of them, at least.
        stream: Names the correlated noise; empty before it is drawn, and without it.
    """

    round_number: int
    unit: Unit
    mechanism: NoiseKind
    noise_multiplier: float
    norm: float = 1.0
    sigma_local: float = 0.0
    scale: float = 1.0
    dim: int = 1
    clients: int = 1
    survivors: int = 1
    sampling: Sampling = "unknown"
    sampling_rate: float = 1.0
    population: int = 0
    amplification_claimed: bool = False
    steps: int = 1
    participations: int = 1
    separation: int = 1
    stream: str = ""

    def __post_init__(self) -> None:
        """Refuse what is out of range, or claims more than it can hold."""
        check(_in_literals(self), _counts_from_one(self), _moderate_or_zero(self))
        check(
            (
                self.survivors <= self.clients,
                f"survivors must be at most clients={self.clients}, got {self.survivors}",
            ),
            (0 < self.sampling_rate <= 1, f"sampling_rate not in (0, 1]: {self.sampling_rate}"),
            (self.norm > 0, f"norm must be positive, got {self.norm}: clip first"),
            (
                not self._of_integers or self._claimed <= self._added * (1 + 1e-9),
                (
                    f"a noise of {self._claimed:g} is claimed, but {self.survivors} survivors with "
                    f"sigma_local={self.sigma_local:g} add at most {self._added:g}"
                ),
            ),
            (len(self.stream) <= 64, f"stream must have at most 64 letters: {self.stream!r:.80}"),
            (
                not self.amplification_claimed or self.mechanism != "matrix_gaussian",
                "amplification must not be claimed for correlated noise",
            ),
            (
                not self.amplification_claimed or self.sampling == "poisson",
                (
                    f"amplification must not be claimed for sampling={self.sampling}: when units "
                    "are added or removed, it holds for secret Poisson samples only"
                ),
            ),
            (
                not self.population or self.clients <= self.population <= LARGEST_COUNT,
                f"population must be at least clients={self.clients}, got {self.population}",
            ),
            (
                not self._claims_for_devices or self.population > 0,
                "amplification must not be claimed for an unknown population",
            ),
            (
                not self._claims_for_devices or self.survivors == self.clients,
                (
                    f"amplification must not be claimed for {self.survivors} survivors out of "
                    f"{self.clients} devices drawn: the lost ones had no chance to be in the sum"
                ),
            ),
        )

    @classmethod
    def of_sum(
        cls,
        round_number: int,
        mechanism: Mechanism,
        calibration: Calibration,
        *,
        survivors: int,
        sampling: Sampling = "unknown",
    ) -> Release:
        """Return the release of one secure sum, at its calibrated noise."""
        if isinstance(mechanism, MatrixGaussian):
            norm = mechanism.sensitivity * calibration.rounded_norm
            return cls(
                round_number=round_number,
                unit="device",
                mechanism=mechanism.kind,
                noise_multiplier=stated_noise(mechanism),
                norm=norm,
                sigma_local=stated_noise(mechanism) * norm,
                scale=calibration.scale,
                dim=calibration.dim,
                clients=calibration.clients,
                survivors=survivors,
                sampling=sampling,
                participations=mechanism.participations,
                separation=mechanism.min_separation,
            )
        return cls(
            round_number=round_number,
            unit="device",
            mechanism=mechanism.kind,
            noise_multiplier=(
                0.0 if isinstance(mechanism, NoPrivacy) else calibration.noise_multiplier
            ),
            norm=calibration.rounded_norm,
            sigma_local=calibration.sigma_local,
            scale=calibration.scale,
            dim=calibration.dim,
            clients=calibration.clients,
            survivors=survivors,
            sampling=sampling,
        )

    @property
    def curve(self) -> Curve:
        """Rényi divergences at `accounting.ORDERS`: what this release costs. Read-only.

        Of a stream: what all its rounds up to this one cost together.
        """
        number = self.round_number if self.correlated else 1
        return _curve(replace(self, round_number=number, survivors=self.clients, scale=1.0))

    @property
    def correlated(self) -> bool:
        """Whether this is a part of a stream, and does not compose one by one."""
        return self.mechanism == "matrix_gaussian"

    @property
    def distance(self) -> float:
        """How far the integer noise of all clients together is from its distribution, at most.

        Statistical (total variation) distance; distances of independent samples add up.
        Floating-point noise ("gaussian", "matrix_gaussian") has no such bound and is not counted.
        """
        if self.mechanism in {"none", "gaussian", "matrix_gaussian"} or not self.sigma_local:
            return 0.0
        of_one = (
            skellam_distance(self.sigma_local**2)
            if self.mechanism == "distributed_skellam"
            else gaussian_distance(self.sigma_local)
        )
        draws = self.clients if self._distributed else 1
        return draws * self.dim * of_one

    @property
    def _distributed(self) -> bool:
        return self.mechanism in {"distributed_gaussian", "distributed_skellam"}

    @property
    def _of_integers(self) -> bool:
        return self._distributed or self.mechanism in {"central_gaussian", "matrix_gaussian"}

    @property
    def _claims_for_devices(self) -> bool:
        return self.amplification_claimed and self.unit == "device"

    @property
    def _claimed(self) -> float:
        return self.noise_multiplier * self.norm

    @property
    def _added(self) -> float:
        return sqrt(self.survivors if self._distributed else 1) * self.sigma_local


def epsilon_of(releases: Iterable[Release], delta: float) -> float:
    """Return the epsilon of all `releases` together.

    Example:
        >>> one = Release(round_number=1, unit="device", mechanism="gaussian", noise_multiplier=4.0)
        >>> round(epsilon_of([one, one], delta=1e-5), 3)
        1.478
    """
    return accounting.epsilon(compose(releases), delta)


@lru_cache(maxsize=256)
def _curve(release: Release) -> Curve:
    """Return the curve; releases that differ only in irrelevant fields share it."""
    curve = release.steps * _step_curve(release)
    curve.setflags(write=False)
    return curve


def _step_curve(release: Release) -> Curve:
    z = release.noise_multiplier
    if release.mechanism == "none" or z < _NEGLIGIBLE_NOISE:
        return accounting.everything()
    if release.correlated:
        spent = spent_participations(
            release.round_number,
            separation=release.separation,
            participations=release.participations,
        )
        return accounting.gaussian(z) * (spent / release.participations)
    if release.amplification_claimed and release.unit == "example" and release.sampling_rate < 1:
        return accounting.poisson_gaussian(z, release.sampling_rate)
    direct = _mechanism(release)(np.array(accounting.ORDERS))
    if not release.amplification_claimed or release.unit == "example":
        return direct
    # To replace a unit is to remove one and add one: twice the sensitivity, same noise.
    doubled = replace(
        release, noise_multiplier=z / 2, norm=2 * release.norm, amplification_claimed=False
    )
    rate = release.clients / release.population
    return np.minimum(direct, accounting.sample_amplified(_mechanism(doubled), rate))


def _mechanism(release: Release) -> Callable[[Orders], Curve]:
    """Return the curve of one release, without sampling, at any orders."""
    z = release.noise_multiplier

    def curve(orders: Orders) -> Curve:
        if release.mechanism in {"gaussian", "central_gaussian"}:
            return accounting.gaussian(z, orders)
        if release.mechanism == "distributed_skellam":
            return accounting.skellam(z, norm=release.norm, dim=release.dim, orders=orders)
        return accounting.discrete_gaussian(
            z,
            norm=release.norm,
            sigma_local=release.sigma_local,
            shares=release.clients,  # an upper bound, and the same every round
            dim=release.dim,
            orders=orders,
        )

    return curve


def compose(releases: Iterable[Release]) -> Curve:
    """Return what `releases` cost together."""
    total = accounting.nothing()
    latest: dict[tuple[str, float, int, int], Release] = {}
    for release in releases:
        if not release.correlated:
            total = total + release.curve
            continue
        stream = (
            release.stream,
            release.noise_multiplier,
            release.participations,
            release.separation,
        )
        if stream not in latest or latest[stream].round_number < release.round_number:
            latest[stream] = release
    return sum((release.curve for release in latest.values()), start=total)


def _in_literals(release: Release) -> tuple[bool, str]:
    for name, allowed in (("unit", Unit), ("mechanism", NoiseKind), ("sampling", Sampling)):
        value = getattr(release, name)
        if value not in get_args(allowed):
            return False, f"{name} must be one of {get_args(allowed)}, got {value!r:.40}"
    return True, ""


def _counts_from_one(release: Release) -> tuple[bool, str]:
    counts = ("round_number", "dim", "clients", "survivors", "steps")
    for name in (*counts, "participations", "separation"):
        value = getattr(release, name)
        if not 1 <= value <= LARGEST_COUNT:
            return False, f"{name} must be in 1..2^53, got {value!r:.40}"
    return True, ""


def _moderate_or_zero(release: Release) -> tuple[bool, str]:
    # Fourth powers of these numbers stay within a float64.
    for name in ("noise_multiplier", "norm", "sigma_local", "scale", "sampling_rate"):
        value = getattr(release, name)
        if value != 0 and not 1e-30 <= value <= 1e30:
            return False, f"{name} must be 0 or in 1e-30..1e30, got {value}"
    return True, ""
